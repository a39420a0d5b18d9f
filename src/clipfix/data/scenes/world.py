"""The contents of a picture: things, their factors, and pictures that differ in exactly one factor.

Why a drawn world: every factor that CLIP overlooks is known exactly, so a repair can be measured factor by factor.
Source: the nine patterns of MMVP (arXiv 2401.06209, section 3.2), each tied to factors that can be drawn.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from random import Random
from typing import Any

WORLD = 2  # the version of pictures and words: raise it with any change of a pixel or a word

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown")
SIZES = ("large", "small")
FILLS = ("solid", "striped", "outlined")
LETTERS = ("A", "H", "L", "O", "T", "X")
BACKGROUNDS = ("sky", "mint", "cream", "lilac")
SIDEWAYS = ("left", "right")
VIEWPOINTS = ("the side", "above")
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "middle", "right")
MIDDLE = 4  # the 3 x 3 grid is numbered row by row; groups are around the middle
MAX_COUNT = 4

# The factors of each kind besides colour, size, place and count, with their values.
CARRIED: dict[str, dict[str, tuple[Any, ...]]] = {
    "fish": {"orientation": SIDEWAYS, "presence": (True, False), "fill": FILLS},
    "bird": {"orientation": SIDEWAYS, "presence": (True, False), "fill": FILLS},
    "arrow": {"orientation": ("left", "right", "up", "down"), "fill": FILLS},
    "car": {"orientation": SIDEWAYS, "viewpoint": VIEWPOINTS},
    "cup": {"presence": (True, False), "viewpoint": VIEWPOINTS},
    "box": {"state": ("open", "closed"), "letter": LETTERS},
    "lamp": {"state": ("lit", "unlit"), "fill": FILLS},
    "house": {"state": ("lit", "unlit"), "presence": (True, False)},
    "star": {"presence": (True, False), "fill": FILLS},
    "heart": {"letter": LETTERS},
    "flower": {"viewpoint": VIEWPOINTS},
    "umbrella": {"state": ("open", "closed"), "fill": FILLS},
}
KINDS = tuple(CARRIED)

PATTERNS: dict[str, tuple[str, ...]] = {
    "Orientation and Direction": ("orientation",),
    "Presence of Specific Features": ("presence",),
    "State and Condition": ("state",),
    "Quantity and Count": ("count",),
    "Positional and Relational Context": ("place",),
    "Color and Appearance": ("colour",),
    "Structural and Physical Characteristics": ("size", "fill"),
    "Text": ("letter",),
    "Viewpoint and Perspective": ("viewpoint",),
}


@dataclass(frozen=True)
class Thing:
    """One thing, or a group of equal copies; a factor that its kind does not have is None."""

    kind: str
    colour: str
    size: str
    place: int
    count: int = 1
    fill: str | None = None
    orientation: str | None = None
    presence: bool | None = None
    state: str | None = None
    letter: str | None = None
    viewpoint: str | None = None


@dataclass(frozen=True)
class Scene:
    """The ground truth of one picture. All kinds in a scene differ, so a kind identifies one thing or one group."""

    things: tuple[Thing, ...]
    background: str
    jitter: tuple[tuple[int, int], ...]  # each thing is shifted by up to a pixel

    def to_dict(self) -> dict[str, Any]:
        """Return lists, strings and numbers, as stored in the json of a shard."""
        return {
            "things": [dict(vars(thing)) for thing in self.things],
            "background": self.background,
            "jitter": [list(offset) for offset in self.jitter],
        }


def sample(rng: Random) -> Scene:
    """Return a random scene: one to three things, or a group of two to four copies."""
    things, copies = rng.choices(((1, False), (2, False), (3, False), (1, True)), weights=(42, 26, 12, 20))[0]
    return _compose(rng.sample(sorted(KINDS), things), rng, rng.randint(2, MAX_COUNT) if copies else 1)


def _compose(kinds: Iterable[str], rng: Random, count: int = 1) -> Scene:
    kinds = list(kinds)
    places = rng.sample(range(9), len(kinds)) if count == 1 else [MIDDLE]
    things = tuple(
        Thing(
            kind=kind,
            colour=rng.choice(COLOURS),
            size=rng.choices(SIZES, weights=(2, 1))[0],
            place=place,
            count=count,
            **{factor: rng.choice(values) for factor, values in CARRIED[kind].items()},
        )
        for kind, place in zip(kinds, places, strict=True)
    )
    return Scene(things, rng.choice(BACKGROUNDS), sample_jitter(len(things), rng))


def sample_jitter(things: int, rng: Random) -> tuple[tuple[int, int], ...]:
    return tuple((rng.randint(-1, 1), rng.randint(-1, 1)) for _ in range(things))


def drawn_anew(scene: Scene, rng: Random) -> Scene:
    """Return a scene with the same kinds, numbers and colours; all other factors are sampled anew."""
    other = _compose([thing.kind for thing in scene.things], rng, scene.things[0].count)
    things = tuple(replace(new, colour=old.colour) for new, old in zip(other.things, scene.things, strict=True))
    return replace(other, things=things)


def values(scene: Scene, index: int, factor: str) -> list[Any]:
    """Return the other values that a factor of a thing may have in this scene; empty if the thing does not have it."""
    thing = scene.things[index]
    if factor == "colour":
        options: Iterable[Any] = COLOURS
    elif factor == "size":
        options = SIZES
    elif factor == "count":  # only a thing that is alone in the middle has room for copies
        options = range(1, MAX_COUNT + 1) if len(scene.things) == 1 and thing.place == MIDDLE else ()
    elif factor == "place":
        options = set(range(9)) - {t.place for t in scene.things} if thing.count == 1 else ()
    else:
        options = CARRIED[thing.kind].get(factor, ())
    return [value for value in options if value != getattr(thing, factor)]


def look_alike(scene: Scene, pattern: str, rng: Random) -> Scene | None:
    """Return the scene with one factor changed by an MMVP pattern; None if no thing in it has such a factor.

    A change of place is, half of the time, two things exchanged, which only a relation ("above") describes.
    """
    if pattern == "Positional and Relational Context" and len(scene.things) > 1 and rng.random() < 0.5:
        first, second, *rest = scene.things
        swapped = (replace(first, place=second.place), replace(second, place=first.place), *rest)
        return replace(scene, things=swapped)
    choices = [
        (index, factor)
        for index in range(len(scene.things))
        for factor in PATTERNS[pattern]
        if values(scene, index, factor)
    ]
    if not choices:
        return None
    index, factor = rng.choice(choices)
    things = list(scene.things)
    things[index] = replace(things[index], **{factor: rng.choice(values(scene, index, factor))})
    return replace(scene, things=tuple(things))


def alone(scene: Scene, rng: Random) -> Scene:
    """Return a scene with the first thing alone in the middle, in one to four copies, so that its count can change."""
    thing = replace(scene.things[0], place=MIDDLE, count=rng.randint(1, MAX_COUNT))
    return replace(scene, things=(thing,), jitter=scene.jitter[:1])


def relation(first: Thing, second: Thing) -> str | None:
    """Return the relation of two things in one row or column; None if they share neither."""
    (row, column), (other_row, other_column) = divmod(first.place, 3), divmod(second.place, 3)
    if column == other_column:
        return "above" if row < other_row else "below"
    if row == other_row:
        return "to the left of" if column < other_column else "to the right of"
    return None


def factors(scene: Scene) -> dict[str, str | int | None]:
    """Return the factors of the main thing, for linear probes; None if a factor does not apply."""
    thing = scene.things[0]
    single = thing.count == 1
    return {
        "shape": thing.kind,
        "colour": thing.colour,
        "size": thing.size,
        "fill": thing.fill,
        "orientation": thing.orientation,
        "presence": None if thing.presence is None else ("with" if thing.presence else "without"),
        "state": thing.state,
        "count": thing.count,
        "row": ROWS[thing.place // 3] if single else None,
        "column": COLUMNS[thing.place % 3] if single else None,
        "letter": thing.letter,
        "viewpoint": thing.viewpoint,
    }
