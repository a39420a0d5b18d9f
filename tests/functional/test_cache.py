"""Tip-Adapter and APE: the authors' own numbers, invariants, and the published loops written out."""

from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from clipfix.functional.cache import (
    Grid,
    Refined,
    ape_logits,
    ape_t_logits,
    channel_criterion,
    interclass_similarity,
    label_divergence,
    search,
    tip_logits,
    zeroshot_logits,
)

REFERENCE = load_file(Path(__file__).with_name("ape.safetensors"))
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}  # of the largest value


class Case:
    """Inputs and results of the authors' code, in one precision."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.name, self.dtype = name, dtype
        self.precision = "f64" if dtype == torch.float64 else "f32"
        self.text, self.keys, self.val, self.test = (
            self.input(key).to(dtype) for key in ("text", "cache_keys", "val_features", "test_features")
        )
        self.labels, self.val_labels = self.input("cache_labels"), self.input("val_labels")
        self.values = F.one_hot(self.labels).to(dtype)
        self.alpha, self.beta, self.gamma = (self.config(f"init_{key}").item() for key in ("alpha", "beta", "gamma"))

    def input(self, key: str) -> Tensor:
        return REFERENCE[f"{self.name}.in.{key}"]

    def config(self, key: str) -> Tensor:
        return REFERENCE[f"{self.name}.cfg.{key}"]

    def out(self, key: str) -> Tensor:
        """Return a result that is equal in both precisions."""
        return REFERENCE[f"{self.name}.out.{key}"]

    def check(self, found: Tensor, key: str) -> None:
        expected = REFERENCE[f"{self.name}.{self.precision}.{key}"]
        assert found.dtype == expected.dtype == self.dtype
        assert (found - expected).abs().max() <= TOLERANCE[self.dtype] * expected.abs().max().clamp(min=1), key

    @property
    def grid(self) -> Grid:
        return Grid.of(tuple(self.config("search_scale").tolist()), tuple(self.config("search_step").tolist()))

    @property
    def channels(self) -> Tensor:
        return self.out("criterion.indices_free")


@pytest.fixture(
    params=list(product(["k1", "k3"], [torch.float64, torch.float32])), ids=lambda pair: f"{pair[0]}-{pair[1]}"
)
def case(request) -> Case:
    return Case(*request.param)


def test_criterion_is_the_authors(case):
    by_class = case.keys.unflatten(0, (len(case.text), -1))
    both = torch.cat([case.text[:, None], by_class], dim=1)
    case.check(interclass_similarity(both), "criterion.similarity_both")
    case.check(interclass_similarity(case.text[:, None]), "criterion.similarity_text")
    for mode, keys, count in (("free", by_class, "training_free"), ("train", None, "training")):
        value = channel_criterion(case.text, keys, *case.config(f"w_{count}").tolist())
        case.check(value, f"criterion.value_{mode}")
        chosen = value.topk(int(case.config(f"{count}_feat_num"))).indices
        assert torch.equal(chosen, case.out(f"criterion.indices_{mode}"))


def test_logits_are_the_authors(case):
    refined = Refined.of(case.test, case.text, case.keys, case.values, case.channels)
    case.check(refined.divergence, "ape.kl")
    case.check(zeroshot_logits(case.test, case.text), "ape.zeroshot_test_logits")
    settings = (case.text, case.keys, case.values)
    case.check(
        ape_logits(case.test, *settings, case.channels, case.alpha, case.beta, case.gamma), "ape.init_test_logits"
    )
    case.check(tip_logits(case.val, *settings, case.alpha, case.beta), "tip.init_val_logits")
    alpha, beta, gamma, _ = case.out("ape.best").tolist()
    case.check(ape_logits(case.test, *settings, case.channels, alpha, beta, gamma), "ape.best_test_logits")
    alpha, beta, _ = case.out("tip.best").tolist()
    case.check(tip_logits(case.test, *settings, alpha, beta), "tip.best_test_logits")


def test_trained_logits_are_the_authors(case):
    channels = case.out("criterion.indices_train")
    scale = case.config("apet_scale").tolist()
    alphas, betas = ((0.1, 0.1 + (scale[place] - 0.1) / 2) for place in (1, 0))
    given = case.input("given_res").to(case.dtype), case.input("given_value_weights").to(case.dtype)
    start = torch.zeros_like(given[0]), torch.ones_like(given[1])
    for key, (residuals, weights) in (("init", start), ("given", given)):
        found = [
            [
                ape_t_logits(case.val, case.text, case.keys, case.labels, channels, residuals, weights, alpha, beta)
                for alpha in alphas
            ]
            for beta in betas
        ]
        case.check(torch.stack([torch.stack(row) for row in found]), f"apet.{key}_val_logits")


@pytest.mark.parametrize("max_entries", [2**26, 100])
def test_searches_find_the_authors_winners(case, max_entries):
    zeroshot = zeroshot_logits(case.val, case.text)
    refined = Refined.of(case.val, case.text, case.keys, case.values, case.channels)
    cosines = refined.features @ refined.keys.T
    found = search(
        zeroshot, cosines, refined.divergence, case.values, case.val_labels, case.grid, max_entries=max_entries
    )
    assert torch.equal(found.correct, case.out("ape.grid_correct"))
    assert [found.alpha, found.beta, found.gamma, found.accuracy] == pytest.approx(case.out("ape.best").tolist())
    grid = case.grid._replace(gamma=torch.zeros(1, dtype=torch.float64))
    zeros = torch.zeros_like(refined.divergence)
    tip = search(zeroshot, case.val @ case.keys.T, zeros, case.values, case.val_labels, grid)
    assert torch.equal(tip.correct[..., 0], case.out("tip.grid_correct"))
    assert [tip.alpha, tip.beta, tip.accuracy] == pytest.approx(case.out("tip.best").tolist())


# -- invariants --------------------------------------------------------------------------------------------------------


def test_no_cache_is_zero_shot_and_ape_without_its_parts_is_tip_adapter():
    case = Case("k3", torch.float64)
    settings, every = (case.text, case.keys, case.values), torch.arange(case.text.shape[1])
    plain = zeroshot_logits(case.test, case.text)
    assert torch.equal(tip_logits(case.test, *settings, 0.0, 2.0), plain)
    assert torch.equal(ape_logits(case.test, *settings, every, 0.0, 2.0, 0.3), plain)
    tip = tip_logits(case.test, *settings, 1.5, 2.0)
    torch.testing.assert_close(ape_logits(case.test, *settings, every, 1.5, 2.0, 0.0), tip, rtol=0, atol=1e-6)
    for count in (1, 7, len(every)):
        start = torch.zeros(len(case.text), count, dtype=torch.float64), torch.ones(len(case.keys), 1).double()
        found = ape_t_logits(case.test, case.text, case.keys, case.labels, every[:count], *start, 1.5, 2.0)
        torch.testing.assert_close(found, tip)


def test_similarity_equals_the_loops_over_pairs_of_classes():
    items = torch.randn(4, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pairs = [
        items[i, m] * items[j, n]
        for i, j in product(range(4), repeat=2)
        if i != j
        for m, n in product(range(3), repeat=2)
    ]
    torch.testing.assert_close(interclass_similarity(items), torch.stack(pairs).mean(dim=0))


def test_order_of_the_cached_images_changes_nothing():
    case = Case("k3", torch.float64)
    order = torch.randperm(len(case.keys), generator=torch.Generator().manual_seed(0))
    found = ape_logits(case.test, case.text, case.keys[order], case.values[order], case.channels, 1.0, 2.0, 0.5)
    expected = ape_logits(case.test, case.text, case.keys, case.values, case.channels, 1.0, 2.0, 0.5)
    torch.testing.assert_close(found, expected)


def test_divergence_in_closed_form():
    case = Case("k3", torch.float64)
    predicted = (case.keys @ case.text.T).softmax(dim=1).gather(1, case.labels[:, None])[:, 0]
    others = (1 - F.one_hot(case.labels)).double() * 0  # a label of zero adds nothing
    expected = torch.log2(torch.tensor(1 + 1e-6)) - torch.log2(predicted + 1e-6) + others.sum(dim=1)
    torch.testing.assert_close(label_divergence(case.keys, case.text, case.values), expected, rtol=1e-6, atol=1e-6)


def test_first_of_equal_points_wins():
    labels = torch.tensor([0, 1])
    zeroshot = torch.eye(2)
    found = search(zeroshot, torch.eye(2), torch.zeros(2), torch.eye(2), labels, Grid.of((7.0, 7.0, 1.0), (3, 4, 2)))
    assert (found.correct == 2).all()
    assert (found.alpha, found.beta, found.gamma, found.accuracy) == (0.1, 0.1, 0.0, 100.0)
