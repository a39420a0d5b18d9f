"""How sure a change is: a paired bootstrap over the items of a benchmark and the seeds of a group.

Items (pairs, pictures) and seeds are crossed: every seed's model answers every item. So both are resampled, each on its
own, and an answer counts as often as its item and its seed were drawn together. Before and after, and all groups, meet
the same draws: what is hard for every model cancels in a difference.

Source: Owen, The pigeonhole bootstrap (Annals of Applied Statistics 1(2), 2007); Owen and Eckles, Bootstrapping data
arrays of arbitrary order (arXiv 1106.2125), who show it mildly conservative. Percentile intervals.
Departs: items are drawn within strata, the sets of items that the same questions were asked of: the patterns of pairs.
With one seed nothing says how seeds vary, and the interval is of items alone; with three it says little more.
"""

from collections.abc import Sequence

import numpy as np

from clipfix.evals.outcomes import Outcomes, parts

CELLS = 4_000_000  # of a block of draws x items: bounds the memory


def changes(
    runs: Sequence[tuple[Outcomes | None, Outcomes]], metrics: Sequence[str], resamples: int, rng: np.random.Generator
) -> np.ndarray:
    """[resamples, runs, metrics]: what each run changed, in points, had other items been drawn; NaN for counts.

    A run is its outcomes before and after; without a before, its score. All are of one benchmark and the same items.
    """
    questions = runs[0][1]
    names = np.unique(np.concatenate([outcome.items for outcome in questions.values()]))
    index = {name: np.searchsorted(names, outcome.items) for name, outcome in questions.items()}
    asked = {metric: parts(metric, metrics, questions) for metric in metrics}
    pieces = list(dict.fromkeys(piece for several in asked.values() for piece in several))

    def total(name: str, values: np.ndarray) -> np.ndarray:
        return np.bincount(index[name], values, minlength=len(names))

    weights = {name: np.ones(len(o.ranks)) if o.weights is None else o.weights for name, o in questions.items()}
    below = np.stack([total(name, weights[name]) for name, _ in pieces], axis=1)  # items, pieces
    above = np.empty((len(names), len(runs), len(pieces)))
    for i, (before, after) in enumerate(runs):
        for j, (name, at) in enumerate(pieces):
            gained = (after[name].ranks <= at).astype(float)
            if before is not None:
                gained -= before[name].ranks <= at
            above[:, i, j] = total(name, weights[name] * gained)

    _, strata = np.unique(
        np.stack([total(name, weights[name]) > 0 for name in index], axis=1), axis=0, return_inverse=True
    )
    found = np.empty((resamples, len(runs), len(pieces)))
    block = max(1, CELLS // len(names))
    for start in range(0, resamples, block):
        times = draw(strata.ravel(), min(block, resamples - start), rng)
        part = (times @ above.reshape(len(names), -1)).reshape(len(times), len(runs), len(pieces))
        found[start : start + block] = 100 * part / (times @ below)[:, None]
    out = np.full((resamples, len(runs), len(metrics)), np.nan)
    for k, metric in enumerate(metrics):
        if asked[metric]:
            out[:, :, k] = found[:, :, [pieces.index(piece) for piece in asked[metric]]].mean(axis=2)
    return out


def draw(strata: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """[resamples, items]: how often each item was drawn, as many draws within a stratum as it has items."""
    times = np.empty((resamples, len(strata)))
    for stratum in np.unique(strata):
        members = np.flatnonzero(strata == stratum)
        times[:, members] = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), size=resamples)
    return times


def over_seeds(seeds: int, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """[resamples, seeds]: the share of each seed in the mean."""
    return rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples) / seeds


def interval(values: np.ndarray, coverage: float) -> tuple[float, float] | None:
    """The middle `coverage` of the draws; None of what cannot be drawn."""
    if np.isnan(values).any():
        return None
    low, high = np.quantile(values, [(1 - coverage) / 2, (1 + coverage) / 2])
    return float(low), float(high)
