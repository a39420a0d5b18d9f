"""Intervals of changes: a paired bootstrap over the items of a benchmark and the seeds of a group.

Items (pairs, images) and seeds are crossed, because every model is scored on every item. They are resampled
independently, and the weight of a result is the product of how often its item and its seed were sampled. All columns
and groups use the same samples of items, so that the difficulty of items cancels in differences.

Source: Owen, The pigeonhole bootstrap (Annals of Applied Statistics 1(2), 2007); Owen and Eckles, Bootstrapping data
arrays of arbitrary order (arXiv 1106.2125), who show that it is mildly conservative. The intervals are percentiles.
Departs: items are sampled within strata. A stratum is the set of items that have the same questions, such as the pairs
of one pattern. With one seed the interval does not contain the variance over seeds; with three seeds it is a poor
estimate of it.
"""

from collections.abc import Sequence

import numpy as np

from clipfix.evals.outcomes import Outcomes, parts

CELLS = 4_000_000  # of the matrix samples x items in one block; bounds memory


def changes(
    runs: Sequence[tuple[Outcomes | None, Outcomes]], metrics: Sequence[str], resamples: int, rng: np.random.Generator
) -> np.ndarray:
    """Return [resamples, runs, metrics] the change of each run in points, for each sample of items; NaN for counts.

    Args:
        runs: (outcomes before, outcomes after) of each run, for one benchmark and the same items. Without outcomes
            before, the score is returned instead of the change.
        metrics: Names of the metrics.
        resamples: Number of bootstrap samples.
        rng: The random generator.
    """
    questions = runs[0][1]
    names = np.unique(np.concatenate([outcome.items for outcome in questions.values()]))
    index = {name: np.searchsorted(names, outcome.items) for name, outcome in questions.items()}
    pieces_of = {metric: parts(metric, metrics, questions) for metric in metrics}
    pieces = list(dict.fromkeys(piece for several in pieces_of.values() for piece in several))

    def by_item(name: str, values: np.ndarray) -> np.ndarray:
        return np.bincount(index[name], values, minlength=len(names))

    weights = {name: np.ones(len(o.ranks)) if o.weights is None else o.weights for name, o in questions.items()}
    below = np.stack([by_item(name, weights[name]) for name, _ in pieces], axis=1)  # [items, pieces] denominators
    above = np.empty((len(names), len(runs), len(pieces)))  # numerators
    for i, (before, after) in enumerate(runs):
        for j, (name, at) in enumerate(pieces):
            gained = (after[name].ranks <= at).astype(float)
            if before is not None:
                gained -= before[name].ranks <= at
            above[:, i, j] = by_item(name, weights[name] * gained)

    _, strata = np.unique(
        np.stack([by_item(name, weights[name]) > 0 for name in index], axis=1), axis=0, return_inverse=True
    )
    values = np.empty((resamples, len(runs), len(pieces)))
    block = max(1, CELLS // len(names))
    for start in range(0, resamples, block):
        times = sample_items(strata.ravel(), min(block, resamples - start), rng)
        part = (times @ above.reshape(len(names), -1)).reshape(len(times), len(runs), len(pieces))
        values[start : start + block] = 100 * part / (times @ below)[:, None]
    out = np.full((resamples, len(runs), len(metrics)), np.nan)
    for k, metric in enumerate(metrics):
        if pieces_of[metric]:
            out[:, :, k] = values[:, :, [pieces.index(piece) for piece in pieces_of[metric]]].mean(axis=2)
    return out


def sample_items(strata: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Return [resamples, items] how often each item was sampled. A stratum has as many samples as items.

    Args:
        strata: [items] the stratum of each item.
    """
    times = np.empty((resamples, len(strata)))
    for stratum in np.unique(strata):
        members = np.flatnonzero(strata == stratum)
        times[:, members] = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), size=resamples)
    return times


def over_seeds(seeds: int, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Return [resamples, seeds] the weight of each seed in the mean."""
    return rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples) / seeds


def interval(values: np.ndarray, coverage: float) -> tuple[float, float] | None:
    """Return the quantiles that bound the middle `coverage` of the values; None if there are NaNs, as for counts."""
    if np.isnan(values).any():
        return None
    low, high = np.quantile(values, [(1 - coverage) / 2, (1 + coverage) / 2])
    return float(low), float(high)
