"""The numbers, against slow computations, and how often intervals hold the truth."""

from statistics import fmean, stdev

import numpy as np
import pytest
from runs import PAIRS, run

from clipfix.evals.outcomes import Outcome
from clipfix.results.compare.bootstrap import changes, interval, over_seeds, sample_items
from clipfix.results.compare.figures import PATTERNS
from clipfix.results.compare.results import group, read
from clipfix.results.compare.rows import Cell, rows, table

PUBLISHED = {
    "benchmark": "pairs", "metric": "mean", "method": "diva", "backbone": "tiny", "by": "DIVA",
    "before": 19.3, "after": 25.9, "source": "2407.20171, table 1", "verified": False,
}  # fmt: skip


@pytest.fixture
def two(tmp_path):
    paths = [run(tmp_path / f"diva{seed}", 0.4, 0.6, seed=seed) for seed in range(3)]
    paths += [run(tmp_path / f"fff{seed}", 0.4, 0.5, seed=seed + 7, method="fff") for seed in range(2)]
    return group([read(path) for path in paths])


def test_table_values_are_a_slow_computation(two):
    found = {f"{row.benchmark}/{row.metric}": row for row in rows(two, [], 50, 0.95, seed=0)}
    assert len(found) == 11 + 2 + 5 + 2
    for name, row in found.items():
        for one, cell in zip(two, row.cells, strict=True):
            differences = [result.after[name] - result.before[name] for result in one.results]
            assert cell.before == pytest.approx(fmean(result.before[name] for result in one.results))
            assert (cell.mean, cell.sd) == pytest.approx((fmean(differences), stdev(differences)))
            assert (cell.interval is None) == (name == "pairs/ties")
        assert row.difference.mean == pytest.approx(row.cells[1].mean - row.cells[0].mean)
        assert row.difference.sd is None  # other seeds: there is no difference seed by seed


def test_draws_are_a_loop_over_patterns_and_pairs(two):
    """Each draw again, by adding up the pairs that it drew."""
    results = [(r.outcomes_before["pairs"], r.outcomes_after["pairs"]) for r in two[0].results]
    metrics = ["mean", *PATTERNS, "ties"]
    fast = changes(results, metrics, 20, np.random.default_rng(5))
    names = np.unique(np.concatenate([outcome.items for outcome in results[0][0].values()]))
    rng = np.random.default_rng(5)
    home = {item: pattern for pattern, outcome in results[0][0].items() for item in outcome.items}
    _, strata = np.unique(
        np.array([[home[name] == pattern for pattern in results[0][0]] for name in names], float) > 0,
        axis=0, return_inverse=True,
    )  # fmt: skip
    times = sample_items(strata.ravel(), 20, rng)
    for b in range(20):
        for r, (before, after) in enumerate(results):
            means = []
            for k, pattern in enumerate(PATTERNS, 1):
                gained = drawn = 0.0
                for item, old, new in zip(
                    before[pattern].items, before[pattern].ranks, after[pattern].ranks, strict=True
                ):
                    count = times[b, list(names).index(item)]
                    gained += count * (int(new == 1) - int(old == 1))
                    drawn += count
                assert drawn == PAIRS  # within its pattern
                means.append(100 * gained / drawn)
                assert fast[b, r, k] == pytest.approx(means[-1])
            assert fast[b, r, 0] == pytest.approx(fmean(means))
    assert np.isnan(fast[:, :, -1]).all()


def test_weights_count_and_blocks_do_not(monkeypatch, two):
    """Of a picture asked twice, and of two pictures of one class where the other has one."""
    outcome = Outcome(np.array(["a", "b", "c"]), np.array([1, 2, 1]), np.array([0.5, 0.5, 1.0]))
    wrong = Outcome(outcome.items, np.array([2, 2, 2]), outcome.weights)
    found = changes([({"x": wrong}, {"x": outcome})], ["x"], 4000, np.random.default_rng(0))[:, 0, 0]
    assert set(np.round(found)) <= {round(100 * x) for x in (0, 1, 1 / 2, 3 / 4, 2 / 3, 4 / 5, 1 / 3)}
    results = [(r.outcomes_before["lengths"], r.outcomes_after["lengths"]) for r in two[0].results]
    whole = changes(results, ["20_tokens_R@1"], 30, np.random.default_rng(3))
    monkeypatch.setattr("clipfix.results.compare.bootstrap.CELLS", 1)
    np.testing.assert_allclose(changes(results, ["20_tokens_R@1"], 30, np.random.default_rng(3)), whole)


def planted(rng, items, seeds, effect, seed_sd):
    """Runs of which the expected change is `effect` over all items and seeds there could be."""
    hard = rng.normal(0, 1.0, items)
    before = rng.random(items) < 0.5
    runs = []
    for shift in rng.normal(0, seed_sd, seeds):
        chance = np.clip(0.5 + effect + shift + 0.15 * hard, 0, 1)
        after = rng.random(items) < chance
        runs.append(tuple({"x": Outcome(names(items), np.where(side, 1, 2))} for side in (before, after)))
    return runs


def names(items):
    return np.array([f"{i:04d}" for i in range(items)])


@pytest.mark.parametrize(("seeds", "seed_sd"), [(1, 0.0), (3, 0.02), (5, 0.04)])
def test_intervals_hold_the_truth_about_as_often_as_they_say(seeds, seed_sd):
    rng = np.random.default_rng(seeds)
    held, repeats = 0, 200
    for _ in range(repeats):
        runs = planted(rng, 200, seeds, 0.1, seed_sd)
        drawn = np.einsum("bs,bs->b", over_seeds(seeds, 400, rng), changes(runs, ["x"], 400, rng)[:, :, 0])
        low, high = interval(drawn, 0.95)
        held += low <= 10 <= high
    assert 0.90 <= held / repeats <= 0.99


def test_nothing_changed_gives_an_interval_around_zero(tmp_path):
    """Two groups of the same model: each other's difference is exactly nothing, and told as such."""
    paths = [run(tmp_path / f"a{seed}", seed=seed) for seed in range(3)]
    paths += [run(tmp_path / f"b{seed}", seed=seed, method="fff") for seed in range(3)]
    found = rows(group([read(path) for path in paths]), [], 200, 0.95, seed=0)
    mean = found[0]
    assert mean.difference.interval == (0, 0)
    assert str(mean.difference) == "0.0 ± 0.0"
    assert not mean.difference.significant
    chance = [run(tmp_path / "c", 0.5, 0.5, seed=3)]  # other answers, as often right
    (row, *_) = rows(group([read(path) for path in chance]), [], 500, 0.95, seed=0)
    assert row.cells[0].interval[0] < 0 < row.cells[0].interval[1]


def test_a_known_difference_is_found(two):
    mean = rows(two, [], 500, 0.95, seed=0)[0]
    assert mean.cells[0].significant
    assert mean.cells[0].interval[0] < mean.cells[0].mean < mean.cells[0].interval[1]
    assert mean.difference.interval[0] < -10 < mean.difference.interval[1]


def test_without_outcomes_there_is_no_interval(tmp_path):
    paths = [run(tmp_path / "a", seed=0), run(tmp_path / "b", seed=1)]
    (tmp_path / "b" / "outcomes.npz").unlink()
    row = rows(group([read(path) for path in paths]), [], 50, 0.95, seed=0)[0]
    assert row.cells[0].interval is None
    assert row.cells[0].bounds == ""


def test_published_numbers_stand_beside_their_own_method_with_their_source(two):
    found = rows(two, [PUBLISHED, PUBLISHED | {"backbone": "vit-l14"}], 20, 0.95, seed=0)
    (told,) = found[0].published
    assert (told.by, told.numbers, told.source) == ("DIVA", "19.3 → 25.9", "arXiv 2407.20171, table 1; not verified")
    assert not any(row.published for row in found[1:])
    assert [str(column.header) for column in table(two, found, 0.95).columns][-1] == "published"


def test_cells_read_well():
    told = [str(Cell(mean, sd, None)) for mean, sd in ((0.04, 0.1), (-0.04, None), (2.44, 1.36))]
    assert told == ["0.0 ± 0.1", "0.0", "+2.4 ± 1.4"]
    assert Cell(1.0, None, (-0.5, 2.52)).bounds == "-0.5 to +2.5"
