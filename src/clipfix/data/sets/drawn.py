"""A labelled set of drawn pictures, made on this machine: classes that differ in one factor of a thing.

The tiny CLIP knows the things and their colours, but hardly their fill, state, direction and letter, so a few examples
are worth something. A scene is in one split only, and none of val and test is among the scenes that the tiny CLIP was
trained on.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from clipfix.data.labelled import SPLITS, Contents, Split, read_json
from clipfix.data.scenes import BACKGROUNDS, COLOURS, Scene, Thing, draw
from clipfix.data.scenes.shards import split_of
from clipfix.data.scenes.words import phrase
from clipfix.data.scenes.world import CARRIED, MIDDLE, WORLD, sample_jitter
from clipfix.data.sets.by_folder import Folders

# Of each kind of thing, the factor that tells its classes apart, and the values that are classes.
CLASSES: dict[str, tuple[str, tuple[str, ...]]] = {
    "arrow": ("orientation", ("left", "right", "up", "down")),
    "box": ("state", ("open", "closed")),
    "fish": ("fill", ("solid", "striped", "outlined")),
    "heart": ("letter", ("A", "X")),
    "house": ("state", ("lit", "unlit")),
    "lamp": ("fill", ("solid", "striped", "outlined")),
    "star": ("fill", ("solid", "striped", "outlined")),
    "umbrella": ("state", ("open", "closed")),
}
# The scenes of the drawn world that a split may have.
OWN = {"train": "train", "val": "selection", "test": "test"}
TRIES = 5000  # scenes without a new one among them, after which a class has no other


class Drawn(Folders):
    """`<root>/{train,val,test}/<class>/<n>.png`, drawn when it is first read.

    Args:
        pictures: number of pictures of each class by split.
        seed: another seed draws other pictures.
        settings: those of `LabelledSet`.
    """

    def __init__(self, *, pictures: dict[str, int], **settings: Any) -> None:
        super().__init__(**settings)
        if set(pictures) != set(SPLITS) or min(pictures.values()) < 1:
            raise ValueError(f"data.set.pictures is {pictures}: give {', '.join(SPLITS)} a number of 1 or more each.")
        self.pictures = dict(pictures)

    def prepare(self) -> Path:
        """Draw the pictures unless they are there, and return their folder.

        Several processes may do so at once; the first to finish is kept.

        Raises:
            ValueError: the folder holds pictures of other settings, or other files.
        """
        if self._is_there():
            return self.root
        self.root.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{self.root.name}-", dir=self.root.parent))
        try:
            draft.chmod(0o755)
            for split in SPLITS:
                self._draw(draft / split, split)
            (draft / "info.json").write_text(json.dumps(self.info(), indent=1) + "\n")
            try:
                draft.rename(self.root)
            except OSError:  # another process was first
                self._is_there()
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        return self.root

    def info(self) -> dict[str, Any]:
        """Return what info.json in the folder says: all that changes the pictures."""
        return {"world": WORLD, "seed": self.seed, "pictures": self.pictures, "classes": class_names()}

    def read(self) -> Contents:
        found = super().read()
        return found._replace(files=[self.root / "info.json"])

    def _is_there(self) -> bool:
        if not self.root.is_dir() or not any(self.root.iterdir()):
            return False
        file = self.root / "info.json"
        found = read_json(file) if file.is_file() else None
        if found != self.info():
            raise ValueError(
                f"data.set.root={self.root} holds {'other files' if found is None else 'a set of other settings'}: "
                "delete the folder, or set another data.set.root."
            )
        return True

    def _draw(self, folder: Path, split: Split) -> None:
        for kind, (factor, values) in CLASSES.items():
            for value in values:
                name = class_name(kind, factor, value)
                place = folder / name
                place.mkdir(parents=True)
                for number, scene in enumerate(self._scenes(kind, factor, value, split)):
                    draw(scene).save(place / f"{number:03d}.png")

    def _scenes(self, kind: str, factor: str, value: str, split: Split) -> Iterator[Scene]:
        """Yield the scenes of a class, all of them different."""
        rng, tries = Random(f"labelled/{self.seed}/{split}/{kind}/{value}"), 0
        seen: set[Scene] = set()
        while len(seen) < self.pictures[split]:
            scene, tries = one_thing(kind, {factor: value}, rng), tries + 1
            if split_of(scene) == OWN[split] and scene not in seen:
                seen.add(scene)
                tries = 0
                yield scene
            elif tries == TRIES:
                raise ValueError(
                    f"data.set.pictures.{split} is {self.pictures[split]}, but there are only {len(seen)} different "
                    f"pictures of {class_name(kind, factor, value)!r}: set {len(seen)} or less."
                )


def one_thing(kind: str, given: dict[str, Any], rng: Random) -> Scene:
    """Return a scene of one large thing in the middle with the given factors; all others are random."""
    drawn: dict[str, Any] = {factor: rng.choice(values) for factor, values in CARRIED[kind].items()} | given
    thing = Thing(kind, rng.choice(COLOURS), "large", MIDDLE, **drawn)
    return Scene((thing,), rng.choice(BACKGROUNDS), sample_jitter(1, rng))


def class_names() -> list[str]:
    """Return the names of all classes: "arrow pointing left", "open box"."""
    return sorted(class_name(kind, factor, value) for kind, (factor, values) in CLASSES.items() for value in values)


def class_name(kind: str, factor: str, value: str) -> str:
    """Return the words of the drawn world for a class, without the article."""
    given: dict[str, Any] = {factor: value}
    return phrase(Thing(kind, COLOURS[0], "large", MIDDLE, **given), {factor}).split(" ", 1)[1]
