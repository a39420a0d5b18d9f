"""FGVC-Aircraft: pictures of 100 variants, in the files of its authors."""

from pathlib import Path

from clipfix.data.labelled import SPLITS, Contents, Labelled, LabelledSet, Split, distinct, read_lines


class Aircraft(LabelledSet):
    """`variants.txt`, whose order is the label, `images_variant_{train,val,test}.txt` and `images/<id>.jpg`.

    Each line of a list is an id and a name that may have blanks. Source: Maji et al. 2013 (arXiv 1306.5151), and
    `fgvc_aircraft.py` of CoOp.
    """

    def read(self) -> Contents:
        variants = self.existing(self.home / "variants.txt")
        classes = distinct(read_lines(variants), variants)
        labels = {name: label for label, name in enumerate(classes)}
        splits: dict[Split, list[Labelled]] = {}
        files: list[Path | str] = [variants]
        for split in SPLITS:
            file = self.existing(self.home / f"images_variant_{split}.txt")
            splits[split] = []
            for line in read_lines(file):
                number, _, name = line.partition(" ")
                if name not in labels:
                    raise ValueError(f"{file}: {line!r} must be an id and a name that is in variants.txt.")
                picture = self.home / "images" / f"{number}.jpg"
                splits[split].append(Labelled(number, picture, labels[name]))
            self.with_pictures(splits[split], file)
            files.append(file)
        return Contents(classes, splits, files)
