"""Which of the texts of a sample go into a batch."""

import itertools
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NotRequired

from typing_extensions import TypedDict

LONGEST_TEXT = 20_000  # characters: no tower reads as many, and a tokenizer takes seconds for a few million
PICKS = ("one", "first_sentence", "other_sentences", "all", "random")


class TextSettings(TypedDict):
    """What a config says of a `Text`."""

    key: str
    pick: str
    k: NotRequired[int | None]


@dataclass(frozen=True)
class Text:
    """Which text of a sample goes into the batch: `key` says where it lies, `pick` which of several, `k` how many.

    A batch is rectangular, so every sample gives exactly k texts: `all` takes them in order, `random` in an order
    drawn anew each pass, and both begin again at the first when a sample has fewer than k. `k` of None takes as many as
    there are: for benchmarks alone.
    """

    key: str
    pick: str
    k: int | None = 1

    def __post_init__(self) -> None:
        if self.pick not in PICKS:
            raise ValueError(f"data.texts: pick {self.pick!r} is none of {', '.join(PICKS)}")
        if (self.k is not None and self.k < 1) or (self.k != 1 and self.pick not in ("all", "random")):
            raise ValueError(f"data.texts: k={self.k} with pick={self.pick}: k > 1 needs pick=all or pick=random")

    @property
    def whole(self) -> bool:
        """Whether it gives texts as they lie there, so that what is stored of them can be looked up."""
        return self.pick not in ("first_sentence", "other_sentences")

    def draw(self, sample: Mapping[str, Any], rng: random.Random) -> list[str]:
        texts = strings(sample, self.key)
        if self.pick == "first_sentence":  # Source: Long-CLIP (arXiv 2403.15378), short caption of its training set
            texts = [texts[0].split(". ", 1)[0]]
        elif self.pick == "other_sentences":
            texts = [other_sentences(texts[0], rng)]
        elif self.pick == "random":
            texts = rng.sample(texts, len(texts))
        return texts if self.k is None else list(itertools.islice(itertools.cycle(texts), self.k))


def strings(sample: Mapping[str, Any], key: str) -> list[str]:
    """The texts that lie under a key of a decoded sample, one or more."""
    found = sample["txt"] if key == "txt" else sample["json"].get(key)
    several = found if isinstance(found, list) else [found] if isinstance(found, str) else []
    texts = [text.strip()[:LONGEST_TEXT] for text in several if text.strip()]
    if not texts:
        raise ValueError(f"no text under {key!r} (its json has: {', '.join(sample['json']) or 'nothing'})")
    "".join(texts).encode()  # json can hold half a surrogate pair, on which tokenizers fail
    return texts


def other_sentences(text: str, rng: random.Random) -> str:
    """Some of the sentences after the first, in any order; a text of one sentence as it is.

    Source: DeBias-CLIP (arXiv 2602.22419), its short caption: the first sentence, a summary, is left out, and the
    number of the others is uniform.
    """
    others = [sentence for sentence in text.split(". ")[1:] if sentence.strip()]
    if not others:
        return text
    return ". ".join(rng.sample(others, rng.randint(1, len(others)))).strip()


def by_sample(batch: Mapping[str, Any], name: str) -> list[list[str]]:
    """Return the texts of that name in a collated batch, those of each sample in a list of their own."""
    each = len(batch[name]) // len(batch["image"])
    return [batch[name][start : start + each] for start in range(0, len(batch[name]), each)]
