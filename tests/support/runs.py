"""Result files in the format of runs, with outcomes made by the test."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from clipfix.evals import outcomes
from clipfix.evals.outcomes import Outcome, Outcomes
from clipfix.results.compare.figures import PATTERNS

PAIRS = 12  # of each pattern
PICTURES = 40
RECIPE = {"method": {"steps": 10, "control": None}, "wise": None}
SETTINGS = {
    "pairs": {"_target_": "clipfix.evals.pairs.Pairs", "shards": "test/pairs-*.tar", "prefix": "a photo of "},
    "retrieval_long": {"shards": "test/test-*.tar", "text": {"key": "long", "pick": "one"}, "recall_at": [1, 5]},
}


def answers(right: float, seed: int) -> dict[str, Outcomes]:
    """Return outcomes of one scoring in which about the fraction `right` of all items is right."""
    rng = np.random.default_rng(seed)

    def some(names: list[str], places: int) -> Outcome:
        wrong = rng.integers(2, places + 1, len(names))
        return Outcome(np.array(names), np.where(rng.random(len(names)) < right, 1, wrong))

    keys = [f"{i:06d}" for i in range(PICTURES)]
    twice = np.repeat(1 / PICTURES, 2 * PICTURES)
    return {
        "pairs": {p: some([f"{n * PAIRS + i}" for i in range(PAIRS)], 2) for n, p in enumerate(PATTERNS)},
        "zeroshot": {"shape": some(keys, 12), "colour": some(keys[:30], 9)},
        "retrieval_long": {way: some(keys, PICTURES) for way in ("image_to_text", "text_to_image")},
        "lengths": {f"{n}_tokens": Outcome(np.array(keys * 2), some(keys * 2, 9).ranks, twice) for n in (20, 77)},
    }


def percentages(found: dict[str, Outcomes]) -> dict[str, float]:
    metrics = {
        "pairs": ["mean", *PATTERNS],
        "zeroshot": ["shape", "colour"],
        "retrieval_long": ["mean", *(f"{way}_R@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5))],
        "lengths": ["20_tokens_R@1", "77_tokens_R@1"],
    }
    scores: dict[str, Any] = {
        f"eval/{benchmark}/{metric}": outcomes.percent(metric, names, found[benchmark])
        for benchmark, names in metrics.items()
        for metric in names
    }
    return scores | {"eval/pairs/ties": 0.0}


def run(folder: Path, before: float = 0.5, after: float = 0.6, seed: int = 0, **facts: Any) -> Path:
    """Write a run folder of `fit`, and return its results.json. A fact of None is left out."""
    first, last = answers(before, 999), answers(after, 1000 + seed)
    folder.mkdir(parents=True)
    content = {
        "method": "diva",
        "backbone": "tiny",
        "control": None,
        "seed": seed,
        "commit": {"hash": "0123456789abcdef", "dirty": True},
        "weights": {"before": "fedcba9876543210", "after": "ba9876543210fedc"},
        "data": {name: {"files": 2, "sha256": "aa11"} for name in first},
        "versions": {"torch": "2.9.0"},
        "recipe": RECIPE,
        "benchmarks": SETTINGS,
        "seconds": 61.4,
    } | facts
    scores = {"before": percentages(first), "after": percentages(last)}
    content = {key: value for key, value in content.items() if value is not None}
    (folder / "results.json").write_text(json.dumps(content | {"scores": scores}))
    outcomes.save(folder, ["before", "after"], {name: [first[name], last[name]] for name in first})
    return folder / "results.json"
