"""Labelled pictures for learning a task from a few examples: splits, draws of K pictures a class, sentences by class.

The readers of the layouts that people have are in `data/sets/`: folders, CoOp's json files, FGVC's lists, shards.
Reading a set lists its pictures and decodes none. Errors name `data.set`, where a config has the set.
"""

import difflib
import json
import logging
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from random import Random
from typing import Any, Literal, NamedTuple

from PIL import Image

log = logging.getLogger(__name__)

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
NAMED = 3  # classes that one message names


class Labelled(NamedTuple):
    """One picture and the index of its class. The key is unique in its set.

    The picture is a file, the bytes of a file, or already decoded; `picture()` reads all three.
    """

    key: str
    image: Path | bytes | Image.Image
    label: int

    def picture(self) -> Image.Image:
        """Decode the picture to RGB, as `decoding.decode` does; EXIF does not rotate it.

        Raises:
            ValueError: the file is missing, damaged, or no picture.
        """
        from clipfix.data.decoding import decode

        try:
            if isinstance(self.image, Image.Image):
                return self.image.convert("RGB")
            data = self.image.read_bytes() if isinstance(self.image, Path) else self.image
            return decode({"__key__": self.key, "jpg": data})["image"]
        except Exception as error:  # Pillow raises many kinds for damaged files
            place = self.image if isinstance(self.image, Path) else self.key
            raise ValueError(f"{place} cannot be read as a picture ({error}): fetch it again, or remove it.") from error


class Contents(NamedTuple):
    """What a reader found. Without `val` in `splits`, the base class carves it out of train."""

    classes: list[str]
    splits: dict[Split, list[Labelled]]
    files: Sequence[Path | str] = ()  # that define the set: a json, lists, shards; not the pictures


class LabelledSet(ABC):
    """A data set of classes with the splits train, val and test. Nothing is read before it is asked for.

    Val is never the test split: where a set has none, `val_share` of the pictures of each class is taken out of train.
    Shots are drawn from what is left of train, so they and val have no picture in common.

    Args:
        root: the folder of the set, or the folder above it if `folder` is given.
        templates: prompt templates; `{}` is the class.
        folder: names that the set's folder may have in `root`; the first that exists is read.
        fetch: what to download and where to put it; part of error messages.
        prompts: a json {class name: [sentences]}, such as CuPL's; None for templates alone.
        val_share: share of train that becomes val if the set has no val split. Source of 0.2: CoOp (arXiv 2109.01134),
            `split_trainval`.
        seed: of the carving. It is not the seed of the shots.
        recipe: numbers for this set that a method may refer to; not used here.

    Raises:
        ValueError: a template without one `{}`, or a share outside of 0 to 1.
    """

    def __init__(
        self,
        root: str,
        templates: Sequence[str],
        folder: str | Sequence[str] = (),
        fetch: str = "",
        prompts: str | None = None,
        val_share: float = 0.2,
        seed: int = 0,
        recipe: Mapping[str, Any] | None = None,
    ) -> None:
        if isinstance(templates, str) or not templates:
            raise ValueError("data.set.templates must be a list of one or more prompts, as ['a photo of a {}.'].")
        if wrong := [template for template in templates if template.count("{") != 1 or "{}" not in template]:
            raise ValueError(f"data.set.templates has {wrong[0]!r}: it must have one {{}}, for the class.")
        if not 0 < val_share < 1:
            raise ValueError(f"data.set.val_share is {val_share}: set a share between 0 and 1.")
        self.root, self.fetch, self.val_share, self.seed = Path(root).expanduser(), fetch, val_share, seed
        self.folders = [folder] if isinstance(folder, str) else list(folder)
        self.templates, self.recipe = list(templates), dict(recipe or {})
        self.prompt_file = None if prompts is None else Path(prompts).expanduser()

    @abstractmethod
    def read(self) -> Contents:
        """Return classes and items, whose pictures exist. `self.home` exists."""

    def prepare(self) -> Path:
        """Make the set, if it is one that is made on this machine and is not there; return its folder."""
        return self.home

    # -- what users of a set read --------------------------------------------------------------------------------------

    @property
    def home(self) -> Path:
        """The folder of the set. `root` may also be that folder itself."""
        if not self.folders or self.root.name in self.folders:
            return self.root
        found = [self.root / name for name in self.folders if (self.root / name).is_dir()]
        return found[0] if found else self.root / self.folders[0]

    @property
    def classes(self) -> list[str]:
        """Names of the classes; their places are the labels."""
        return self._contents.classes

    def split(self, name: Split) -> list[Labelled]:
        """Return the pictures of a split in a fixed order.

        Raises:
            ValueError: there is no such split, or the set is missing, incomplete or damaged.
        """
        if name not in SPLITS:
            raise ValueError(f"There is no split {name!r}: choose {', '.join(SPLITS)}.")
        return list(self._contents.splits[name])

    @cached_property
    def prompts(self) -> dict[str, list[str]]:
        """Sentences by class, for all classes; empty without a file. `_` in the file's names counts as a blank."""
        return {} if self.prompt_file is None else read_prompts(self.prompt_file, self.classes)

    def facts(self) -> dict[str, Any]:
        """Return what identifies the data in results.json.

        The digest is of the keys and labels of all splits and of the class names. It is equal on every machine.
        """
        found = self._contents
        digest = blake2b(json.dumps(found.classes).encode(), digest_size=8)
        for name in SPLITS:
            digest.update(
                "".join(f"\n{name} {item.label} {item.key}" for item in found.splits[name]).encode(
                    "utf-8", "surrogateescape"
                )
            )
        files = [str(file) for file in (*found.files, *([self.prompt_file] if self.prompt_file else []))]
        pictures = {name: len(found.splits[name]) for name in SPLITS}
        return {
            "set": type(self).__name__, "root": str(self.home), "files": files,
            "classes": len(found.classes), "pictures": pictures, "digest": digest.hexdigest(),
        }  # fmt: skip

    # -- for readers ---------------------------------------------------------------------------------------------------

    def existing(self, path: Path) -> Path:
        """Return a path that exists.

        Raises:
            ValueError: it does not; the message has what to fetch.
        """
        if not path.exists():
            raise ValueError(f"There is no {path}. {self.fetch}".rstrip())
        return path

    def with_pictures(self, items: list[Labelled], source: Path) -> list[Labelled]:
        """Return the items that a file lists, all of whose pictures must exist."""
        missing = [item.image for item in items if isinstance(item.image, Path) and not item.image.is_file()]
        if missing:
            raise ValueError(
                f"{source} lists {len(missing)} of {len(items)} pictures that do not exist, first {missing[0]}: fetch "
                f"them again. {self.fetch}".rstrip()
            )
        return items

    @cached_property
    def _contents(self) -> Contents:
        if not self.prepare().is_dir():
            raise ValueError(f"There is no folder {self.home}. {self.fetch or 'Correct data.set.root.'}")
        found = self.read()
        check(found, self.home)
        if not found.splits.get("val"):
            train, val = carve(found.splits["train"], self.val_share, self.seed)
            if not val:
                raise ValueError(
                    f"{self.home} has no val split, and no class of train has two pictures to take one from: add a "
                    "val split."
                )
            found = found._replace(splits={**found.splits, "train": train, "val": val})
        return found


def check(found: Contents, home: Path) -> None:
    """Raise ValueError if a label has no class, a class no picture in train, or two splits have the same picture."""
    classes, splits = found.classes, found.splits
    for name, items in splits.items():
        if wrong := [item for item in items if not 0 <= item.label < len(classes)]:
            raise ValueError(
                f"{home}: {wrong[0].key} of {name} has label {wrong[0].label}, but there are {len(classes)} classes: "
                f"labels go from 0 to {len(classes) - 1}."
            )
    for name in ("train", "test"):
        if not splits.get(name):
            raise ValueError(f"{home} has no picture in its {name} split: add some.")
    trained = {item.label for item in splits["train"]}
    if absent := [name for label, name in enumerate(classes) if label not in trained]:
        raise ValueError(
            f"{home}: {len(absent)} of {len(classes)} classes have no picture in train, first {absent[0]!r}: add "
            "pictures, or remove the class."
        )
    seen: dict[str, str] = {}
    for name, items in splits.items():
        for item in items:
            if item.key in seen:
                places = name if seen[item.key] == name else f"{seen[item.key]} and {name}"
                raise ValueError(f"{home}: {item.key} is twice in {places}: list each picture once.")
            seen[item.key] = name


def distinct(classes: list[str], place: Path) -> list[str]:
    """Return names of classes that all differ: prompts could not tell two classes of one name apart.

    Names that the user gives are not checked: two of ImageNet's are used twice ("missile" and "sunglasses").
    """
    if twice := [name for name, times in Counter(classes).items() if times > 1]:
        raise ValueError(f"{place} has two classes {twice[0]!r}: give each a name of its own.")
    return classes


def carve(items: Sequence[Labelled], share: float, seed: int) -> tuple[list[Labelled], list[Labelled]]:
    """Split items into two parts class by class and return both, in the order given.

    The second part gets the share of each class, rounded, but at least one picture and never all of them; of a class
    with a single picture it gets none.
    """
    taken: set[str] = set()
    for label, members in by_label(items).items():
        number = max(1, min(round(share * len(members)), len(members) - 1)) if len(members) > 1 else 0
        taken |= {item.key for item in Random(f"carve/{seed}/{label}").sample(members, number)}
    return [item for item in items if item.key not in taken], [item for item in items if item.key in taken]


def draw_shots(
    items: Iterable[Labelled], shots: int, seed: int, classes: Sequence[str] | None = None
) -> list[Labelled]:
    """Return `shots` pictures of each class, sorted by label.

    The draw depends on the seed and the keys, not on the order of the items. A draw of fewer shots by the same seed is
    the beginning of a larger one, class by class. A class with fewer pictures gives all of them, then some again, drawn
    with replacement; one warning names such classes.

    Args:
        items: pictures of all classes, labels 0 to C - 1.
        shots: pictures of each class.
        seed: of the draw.
        classes: names of the classes, for messages.

    Raises:
        ValueError: `shots` is below 1, or a label has no picture.
    """
    if shots < 1:
        raise ValueError(f"{shots} shots cannot be drawn: set 1 or more pictures a class.")
    members = by_label(items)
    names: Mapping[int, str] = dict(enumerate(map(repr, classes or ())))
    total = len(classes) if classes else max(members, default=-1) + 1
    if not total:
        raise ValueError("Shots cannot be drawn from no pictures.")
    if absent := [label for label in range(total) if label not in members]:
        raise ValueError(
            f"Shots cannot be drawn: class {names.get(absent[0], absent[0])} has no picture. Labels must go from 0 to "
            f"{total - 1} without a gap."
        )
    drawn, short = [], []
    for label in range(total):
        rng = Random(f"shots/{seed}/{label}")
        order = sorted(members[label], key=lambda item: item.key)
        rng.shuffle(order)
        if len(order) < shots:
            short.append(f"{names.get(label, f'class {label}')} ({len(order)})")
            order += rng.choices(order, k=shots - len(order))
        drawn += order[:shots]
    if short:
        more = f" and {len(short) - NAMED} more" if len(short) > NAMED else ""
        log.warning("fewer than %d pictures, so some are used twice: %s%s", shots, ", ".join(short[:NAMED]), more)
    return drawn


def by_label(items: Iterable[Labelled]) -> dict[int, list[Labelled]]:
    members: dict[int, list[Labelled]] = defaultdict(list)
    for item in items:
        members[item.label].append(item)
    return dict(members)


def spaced(name: str) -> str:
    """Return the name of a class as prompts have it: with blanks for `_`. Source: Tip-Adapter, `clip_classifier`."""
    return name.replace("_", " ")


# -- files -------------------------------------------------------------------------------------------------------------


def read_prompts(file: Path, classes: Sequence[str]) -> dict[str, list[str]]:
    """Return the sentences of each class from a json {class name: [sentences]}, such as `CuPL_prompts_<set>.json`.

    Source: CuPL (arXiv 2209.03320) and the files that APE uses. Other classes in the file are ignored.

    Raises:
        ValueError: there is no such file, it has another form, or a class is missing in it.
    """
    content = read_json(file, "data.set.prompts")
    if not isinstance(content, dict):
        raise ValueError(f"data.set.prompts={file} must be an object, {{class name: [sentences]}}.")
    found = {spaced(name): sentences for name, sentences in content.items()}
    if absent := [name for name in classes if spaced(name) not in found]:
        near = difflib.get_close_matches(absent[0], found, n=1)
        hint = f"; it has {near[0]!r}" if near else ""
        raise ValueError(
            f"data.set.prompts={file} has no sentences for {absent[0]!r} ({len(absent)} of {len(classes)} classes are "
            f"missing{hint}): add them, or set data.set.prompts=null."
        )
    for name in classes:
        sentences = found[spaced(name)]
        if not isinstance(sentences, list) or not sentences or not all(isinstance(one, str) for one in sentences):
            raise ValueError(f"data.set.prompts={file}: {name!r} must have a list of one or more sentences.")
    return {name: found[spaced(name)] for name in classes}


def read_json(file: Path, key: str | None = None) -> Any:
    """Return the content of a json file; ValueError if there is none, or if it is damaged."""
    place = f"{key}={file}" if key else str(file)
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{place}: there is no such file.") from None
    except (OSError, ValueError) as error:  # damaged, another format, a folder
        raise ValueError(f"{place} cannot be read as json ({error}): fetch it again.") from None


def read_lines(file: Path) -> list[str]:
    """Return the lines of a text file that are not empty, without the blanks around them."""
    try:
        return [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as text ({error}): fetch it again.") from None


def read_names(names: str | Sequence[str]) -> list[str]:
    """Return names of classes: those of a list, of a text file with one a line, or of a json list."""
    if not isinstance(names, str):
        return list(names)
    file = Path(names).expanduser()
    found = read_json(file) if file.suffix == ".json" else read_lines(file)
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise ValueError(f"{file} must be a list of class names, in the order of the labels.")
    return found
