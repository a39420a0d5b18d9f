"""Two groups of the same seeds, whose differences are taken seed by seed; and where an interval ends."""

from statistics import fmean, stdev

import numpy as np
import pytest
from runs import run

from clipfix.results.compare.bootstrap import interval
from clipfix.results.compare.results import group, read
from clipfix.results.compare.rows import rows


def test_a_difference_is_the_second_minus_the_first_seed_by_seed(tmp_path):
    paths = [run(tmp_path / f"diva{seed}", 0.4, 0.6, seed=seed) for seed in range(3)]
    paths += [run(tmp_path / f"fff{seed}", 0.4, 0.5 - 0.1 * seed, seed=seed, method="fff") for seed in range(3)]
    first, second = group([read(path) for path in paths])
    for row in rows([first, second], [], 50, 0.95, seed=0):
        name = f"{row.benchmark}/{row.metric}"
        gains = [{result.record.seed: result.change(name) for result in one.results} for one in (first, second)]
        differences = [gains[1][seed] - gains[0][seed] for seed in range(3)]
        assert row.difference.mean == pytest.approx(fmean(differences))
        assert row.difference.sd == pytest.approx(stdev(differences))


def test_an_interval_leaves_as_much_out_on_either_side():
    assert interval(np.arange(101.0), 0.9) == pytest.approx((5, 95))
