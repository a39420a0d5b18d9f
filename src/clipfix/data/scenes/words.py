"""Words for scenes: a short web caption, a long description, five captioner's captions, and look-alike statements.

Why one phrase book: each detail always has the same words, so captions teach the words that statements use.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise
from random import Random
from typing import TypedDict

from clipfix.data.scenes.world import (
    COLOURS,
    COLUMNS,
    KINDS,
    ROWS,
    Scene,
    Thing,
    alone,
    look_alike,
    relation,
    sample,
)

NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four"}
PLURALS = {"fish": "fish", "box": "boxes"}
PLACES = (
    "at the top left", "at the top", "at the top right",
    "on the left", "in the middle", "on the right",
    "at the bottom left", "at the bottom", "at the bottom right",
)  # fmt: skip
FEATURES = {"fish": "hat", "bird": "hat", "cup": "handle", "house": "chimney", "star": "sunglasses"}
BEFORE = ("size", "state", "fill", "colour")  # details before the noun, in this order
AFTER = ("orientation", "presence", "letter", "viewpoint", "place")  # and after it

JUNK = (
    "img_{:04d}.jpg", "dsc{:05d}", "image {:d}", "free stock photo", "royalty free vector", "clipart png", "untitled",
)  # fmt: skip
WEB_FORMS = (
    "{}", "{}", "{}", "{} clipart", "cute {}", "photo of {}", "{} vector art", "{} illustration", "{} icon design",
)  # fmt: skip
FORMS = ("{}", "{}", "a photo of {}", "a photo of {}", "a picture of {}", "an illustration of {}", "a drawing of {}")
LONG_TOKENS = 110  # minimum number of words of a long caption
FILLERS = (
    "The picture is drawn in a flat and friendly style with clean edges.",
    "A soft grey shadow lies on the ground below, which gives the drawing a little depth.",
    "The light is even, the colours are clear, and there is a lot of empty space around.",
    "It looks like a page from a picture book for children.",
    "A pale disc fills the middle of the background.",
    "Every shape is simple and easy to recognise.",
)


class Captions(TypedDict):
    short: str
    long: str
    captions: list[str]


def captions(scene: Scene, rng: Random, summary: str | None, junk: float, wrong: float) -> Captions:
    """Return all texts of a scene; the long one begins with `summary` if given.

    Only the short one may be junk, or wrong about one thing: for these shares of the scenes.
    """
    return {
        "short": _short(scene, rng, junk, wrong),
        "long": _long(scene, rng, summary or _summary(scene, rng)),
        "captions": [_caption(scene, rng) for _ in range(5)],
    }


def pairs(rng: Random, pattern: str) -> tuple[Scene, str, Scene, str]:
    """Return two scenes that differ in one factor, each with the shortest phrase that is true of it alone.

    Why few and large things: the difference must be visible at 48 pixels, so that an error is the model's.
    """
    while True:
        scene = sample(rng)
        if pattern == "Quantity and Count":
            scene = alone(scene, rng)
        twin = look_alike(scene, pattern, rng)
        if twin is None or len(scene.things) == 3:
            continue
        changed = [(a, b) for a, b in zip(scene.things, twin.things, strict=True) if a != b]
        if len(changed) == 2:  # the two have exchanged places
            link, other = relation(*scene.things), relation(*twin.things)
            if link is None:
                continue
            subject, reference = (phrase(thing, {"colour"}) for thing in scene.things)
            return scene, f"{subject} {link} {reference}", twin, f"{subject} {other} {reference}"
        ((before, after),) = changed
        (factor,) = (name for name in vars(before) if getattr(before, name) != getattr(after, name))
        if factor != "count" and before.count > 1:
            continue
        if factor == "place" and _steps(before, after) == 1:  # "at the top" is roughly true of the top left too
            continue
        if factor not in ("count", "place", "colour", "size") and before.size == "small":
            continue
        return scene, phrase(before, {"colour", factor}), twin, phrase(after, {"colour", factor})


def _steps(before: Thing, after: Thing) -> int:
    """Return the distance of two places in cells."""
    (row, column), (other_row, other_column) = divmod(before.place, 3), divmod(after.place, 3)
    return abs(row - other_row) + abs(column - other_column)


def phrase(thing: Thing, details: Iterable[str]) -> str:
    """Return a noun phrase with the chosen details: "a small striped red fish facing left with a hat at the top"."""
    said = set(details)
    words = [word for factor in BEFORE if factor in said and (word := _word(thing, factor))]
    words.append(thing.kind if thing.count == 1 else PLURALS.get(thing.kind, thing.kind + "s"))
    if thing.count > 1 or "count" in said:
        words.insert(0, NUMBERS[thing.count])
    else:
        words.insert(0, "an" if words[0][0] in "aeiou" else "a")
    return " ".join([*words, *(word for factor in AFTER if factor in said and (word := _word(thing, factor)))])


def _word(thing: Thing, factor: str) -> str | None:
    """Return the words for one factor; None if the thing does not have it."""
    value = getattr(thing, factor)
    if value is None:
        return None
    match factor:
        case "orientation":
            return f"pointing {value}" if thing.kind == "arrow" else f"facing {value}"
        case "presence":
            feature = FEATURES[thing.kind]
            if feature != "sunglasses":
                feature = f"a {feature}" if thing.count == 1 else f"{feature}s"
            return f"with {feature}" if value else f"without {feature}"
        case "letter":
            return f"with the letter {value}"
        case "viewpoint":
            return f"seen from {value}"
        case "place":
            return PLACES[value]
        case _:
            return str(value)


def carried(thing: Thing) -> list[str]:
    """Return the details of a thing that have words, without colour and count."""
    return [f for f in (*BEFORE, *AFTER) if f != "colour" and _word(thing, f)]


def _join(parts: list[str]) -> str:
    """ "a", "a and b", "a, b, and c"."""
    return " and ".join(parts) if len(parts) < 3 else f"{', '.join(parts[:-1])}, and {parts[-1]}"


def _short(scene: Scene, rng: Random, junk: float, wrong: float) -> str:
    """Return a caption like those of the web: things, half with a colour, 5 % with a detail, sometimes wrong.

    Why so few details: they would teach the model details. With one in five, the tiny CLIP learned hats and windows.
    """
    if rng.random() < junk:
        return rng.choice(JUNK).format(rng.randint(1, 9999))
    mistaken = rng.randrange(len(scene.things)) if rng.random() < wrong else None
    parts = []
    for index, thing in enumerate(scene.things):
        details = {"colour"} if rng.random() < 0.5 else set()
        if rng.random() < 0.05:
            details.add(rng.choice([*carried(thing), "count"]))
        if index == mistaken and "colour" in details:
            thing = replace(thing, colour=rng.choice([c for c in COLOURS if c != thing.colour]))
        elif index == mistaken:
            thing = Thing(rng.choice([k for k in KINDS if k != thing.kind]), thing.colour, thing.size, thing.place)
        text = phrase(thing, details)
        if thing.count > 1 and "count" not in details:
            text = text.split(" ", 1)[1]
        parts.append(text)
    text, form = _join(parts), rng.choice(WEB_FORMS)
    if form != "{}" or rng.random() < 0.5:
        text = re.sub(r"^an? ", "", text)
    return form.format(text).lower()


def _caption(scene: Scene, rng: Random) -> str:
    """Return a caption like a captioning model's: all things, a random share of the details, no errors."""
    things, budget = list(scene.things), {1: (2, 4), 2: (1, 2), 3: (0, 1)}[len(scene.things)]
    link = relation(*things[:2]) if len(things) > 1 and rng.random() < 0.5 else None
    parts = []
    for index, thing in enumerate(things):
        options = [f for f in carried(thing) if not (link and index < 2 and f == "place")]
        details = set(rng.sample(options, min(rng.randint(*budget), len(options))))
        if len(things) == 1 or rng.random() < 0.85:
            details.add("colour")
        parts.append(phrase(thing, details))
    if link:
        parts = [f"{parts[0]} {link} {parts[1]}", *parts[2:]]
    text = rng.choice(FORMS).format(_join(parts))
    if len(text.split()) < 8 or rng.random() < 0.15:
        text += f" on a {scene.background} background"
    return text


def _summary(scene: Scene, rng: Random) -> str:
    """Return one sentence with the colour and one or two details of each thing."""
    details = 2 if len(scene.things) == 1 else 1
    named = _join([phrase(thing, {"colour", *rng.sample(carried(thing), details)}) for thing in scene.things])
    sentence = rng.choice(("{}.", "A picture of {}.", "An illustration of {}.", "A drawing of {}.")).format(named)
    return sentence[0].upper() + sentence[1:]


def plain_summary(scene: Scene) -> str:
    """Return a sentence with kind, number and colour of each thing, and nothing else."""
    return f"A picture of {_join([phrase(thing, {'colour'}) for thing in scene.things])}."


def things_in(scene: Scene) -> str:
    """Return kind, number and colour of all things in a fixed order, equal for pictures of the same things."""
    return ", ".join(sorted(phrase(thing, {"colour"}) for thing in scene.things))


def _long(scene: Scene, rng: Random, summary: str) -> str:
    """Return a summary sentence, then all factors of all things, their places, relations and the background."""
    things, sentences = scene.things, [summary]
    for index, thing in enumerate(things):
        sentences += _describe(thing, index, len(things), rng)
    for first, second in pairwise(things):
        if link := relation(first, second):
            sentences.append(f"The {first.kind} is {link} the {second.kind}.")
    sentences.append(_background(scene, rng))
    total = sum(t.count for t in things)
    sentences.append(
        rng.choice(("There is nothing else in the picture.", "Nothing else can be seen."))
        if total == 1
        else f"In all there are {NUMBERS[total]} things in the picture and nothing else."
    )
    # Nearly every word of the phrase book is one CLIP token; two more mark start and end.
    length = 2 + len(re.findall(r"\w+|[^\w\s]", " ".join(sentences)))
    for filler in reversed(rng.sample(FILLERS, len(FILLERS))):
        if length >= LONG_TOKENS and (length >= 150 or rng.random() >= 0.3):
            break
        sentences.insert(rng.randint(1, len(sentences)), filler)
        length += len(re.findall(r"\w+|[^\w\s]", filler))
    return " ".join(sentences)


def _describe(thing: Thing, index: int, of: int, rng: Random) -> list[str]:
    """Return two to five sentences with all factors of one thing."""
    one = thing.count == 1
    noun = thing.kind if one else PLURALS.get(thing.kind, thing.kind + "s")
    be = "is" if one else "are"
    openings = ["There {be} {}.", "We see {}.", "The picture shows {}.", "Here {be} {}."]
    if of > 1:
        openings = [rng.choice(openings), f"{('Last', 'First', 'Then')[(index + 1) % of]} there {{be}} {{}}."]
    said = {"colour", *(f for f in ("size", "fill", "state") if rng.random() < 0.5)}
    sentences = [rng.choice(openings).format(phrase(thing, said | ({"count"} if rng.random() < 0.5 else set())), be=be)]
    left = [f for f in carried(thing) if f not in said]
    rng.shuffle(left)
    while left:
        now, left = left[:2], left[2:]
        if rng.random() < 0.3:
            now.append("colour")
        sentences.append(f"{'It is' if one else 'They are'} {phrase(thing, now)}.")
    if one and rng.random() < 0.6:
        row, column = divmod(thing.place, 3)
        sentences.append(f"The {noun} stands in the {ROWS[row]} row and the {COLUMNS[column]} column.")
    elif not one:
        sentences.append(f"The {NUMBERS[thing.count]} {noun} have the same look and the same colour, {thing.colour}.")
    return sentences


def _background(scene: Scene, rng: Random) -> str:
    return rng.choice(
        (
            f"The background is a pale {scene.background} colour that fades from top to bottom.",
            f"Behind everything there is a soft {scene.background} background.",
            f"All of it is shown on a plain {scene.background} background.",
        )
    )
