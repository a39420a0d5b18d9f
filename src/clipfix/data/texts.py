"""Selection of the texts of a sample that go into a batch."""

import itertools
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NotRequired

from typing_extensions import TypedDict

LONGEST_TEXT = 20_000  # characters; no tower reads as many, and a tokenizer takes seconds for a few million
# The end of a sentence is a full stop and a space, but not after an initial (J. Smith), an abbreviation, or a unit that
# is between a number and a small letter (3.5 in. disk).
ABBREVIATIONS = ("Dr", "Mr", "Ms", "St", "vs", "No", "cf", "ca", "Mrs", "Rev", "Fig", "e.g", "i.e", "Prof", "approx")
UNITS = ("in", "ft", "oz", "lb", "yd", "mi")
END = re.compile(
    "".join(rf"(?<!\b{word})" for word in ("[A-Z]", *map(re.escape, ABBREVIATIONS)))
    + "(?:" + "".join(rf"(?<!\d {unit})" for unit in UNITS) + r"\. |\. (?![a-z]))"
)  # fmt: skip
PICKS = ("one", "first_sentence", "other_sentences", "all", "random")


class TextSettings(TypedDict):
    """The arguments of a `Text` in a config."""

    key: str
    pick: str
    k: NotRequired[int | None]


@dataclass(frozen=True)
class Text:
    """Selects k texts of each sample.

    Args:
        key: `txt`, or a key of the sample's json, which holds a string or a list of strings.
        pick: `one` takes the first text. `first_sentence` and `other_sentences` take a part of it. `all` takes the
            texts in order, and `random` in an order that is drawn anew in each pass; both repeat texts if a sample has
            fewer than k.
        k: number of texts of each sample; None, which only benchmarks may use, takes all of them.

    Raises:
        ValueError: if `pick` is unknown, or does not fit `k`.
    """

    key: str
    pick: str
    k: int | None = 1

    def __post_init__(self) -> None:
        if self.pick not in PICKS:
            raise ValueError(f"data.texts: pick is {self.pick!r}: choose from {', '.join(PICKS)}")
        if (self.k is not None and self.k < 1) or (self.k != 1 and self.pick not in ("all", "random")):
            raise ValueError(f"data.texts: k is {self.k} with pick={self.pick}: set k=1, or pick=all or pick=random")

    @property
    def unchanged(self) -> bool:
        """True if the texts are used unchanged, so that stored features of them can be used."""
        return self.pick not in ("first_sentence", "other_sentences")

    def draw(self, sample: Mapping[str, Any], rng: random.Random) -> list[str]:
        """Return k texts of a decoded sample; raise ValueError if it has none."""
        texts = strings(sample, self.key)
        if self.pick == "first_sentence":  # Source: Long-CLIP (arXiv 2403.15378), short caption of its training set
            texts = [sentences(texts[0])[0]]
        elif self.pick == "other_sentences":
            texts = [other_sentences(texts[0], rng)]
        elif self.pick == "random":
            texts = rng.sample(texts, len(texts))
        return texts if self.k is None else list(itertools.islice(itertools.cycle(texts), self.k))


def strings(sample: Mapping[str, Any], key: str) -> list[str]:
    """Return the texts under a key of a decoded sample; raise ValueError if there is none."""
    value = sample["txt"] if key == "txt" else sample["json"].get(key)
    entries = value if isinstance(value, list) else [value] if isinstance(value, str) else []
    texts = [text.strip()[:LONGEST_TEXT] for text in entries if text.strip()]
    if not texts:
        raise ValueError(f"no text under {key!r} (its json has: {', '.join(sample['json']) or 'nothing'})")
    "".join(texts).encode()  # raises for half a surrogate pair, which json can hold and tokenizers fail on
    return texts


def sentences(text: str) -> list[str]:
    """Return the sentences of a text, without the full stops between them.

    Departs from Long-CLIP and DeBias-CLIP, which split at every ". ": abbreviations do not end a sentence.
    """
    return END.split(text)


def other_sentences(text: str, rng: random.Random) -> str:
    """Return some of the sentences after the first, in random order. A text of one sentence is returned unchanged.

    Source: DeBias-CLIP (arXiv 2602.22419), short caption: the first sentence, a summary, is left out, and the number of
    the others is uniform.
    """
    others = [sentence for sentence in sentences(text)[1:] if sentence.strip()]
    if not others:
        return text
    return ". ".join(rng.sample(others, rng.randint(1, len(others)))).strip()


def by_sample(batch: Mapping[str, Any], name: str) -> list[list[str]]:
    """Return the texts of a name in a collated batch, as one list for each sample."""
    each = len(batch[name]) // len(batch["image"])
    return [batch[name][start : start + each] for start in range(0, len(batch[name]), each)]
