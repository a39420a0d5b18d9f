"""Pairs that a method promoted: the picture by which a person judges its thresholds, beside its losses."""

import logging
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from torchvision.transforms.functional import to_pil_image

from clipfix.evals.plots import Cell, gallery
from clipfix.methods.fff import FFF
from clipfix.parts.mining import Promotion
from clipfix.results.report import show

log = logging.getLogger(__name__)

FOUND = 1000  # promotions to choose from: thresholds set far too low promote every pair there is


class Promoted(L.Callback):
    """Every so many steps `promoted.png` in the run folder, and W&B: images, and captions of others promoted to them.

    Unpicked, from the rows of rank zero alone, so that drawing asks nothing of other ranks. The file is overwritten:
    the thresholds and what compares do not change, so later ones differ by their batch.
    """

    def __init__(self, folder: str, every_n_steps: int, pairs: int) -> None:
        self.path = Path(folder) / "promoted.png"
        self.every_n_steps, self.pairs = every_n_steps, pairs
        self.due, self.told = 0, False

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After the first step, which finds the thresholds, and then after every n-th."""
        if trainer.global_step < self.due or not trainer.is_global_zero:
            return
        self.due = (trainer.global_step // self.every_n_steps + 1) * self.every_n_steps
        assert isinstance(pl_module, FFF)
        found = pl_module.mining.promoted(batch, at_most=FOUND)
        if not found:
            if not self.told and pl_module.mining.active:
                log.warning(
                    "no pair of this batch was promoted: lower method.mining.thresholds; run=thresholds says how far"
                )
            self.told = True
            return
        cells = []
        for promotion in choose(found, self.pairs):
            cosines = (
                f"S_it {promotion.image_text:.3f}, S_ii {promotion.image_image:.3f}, S_tt {promotion.text_text:.3f}"
            )
            image, other = (to_pil_image(batch["image"][row].float().cpu()) for row in promotion[:2])
            cells.append(Cell(image, " + ".join(promotion.reasons), [(cosines, None)]))
            cells.append(Cell(other, "whose caption it gets", [(promotion.caption, None)]))
        gallery(cells, across=8, characters=34).savefig(self.path, dpi=100, bbox_inches="tight")
        show("promoted/grid", self.path, trainer.loggers)


def choose(found: Sequence[Promotion], pairs: int) -> list[Promotion]:
    """A random choice, the same every time: the conditions take turns, the rarest first; each two pictures once.

    Two pictures are promoted both ways and with several captions, which would fill the grid with one pair; they return
    only where a condition has nothing else to show.
    """
    order = random.Random(0).sample(found, len(found))
    counts = Counter(reason for promotion in found for reason in promotion.reasons)
    turns = {
        reason: iter([promotion for promotion in order if reason in promotion.reasons])
        for reason, _ in reversed(counts.most_common())
    }
    chosen: list[Promotion] = []
    shown: set[frozenset[int]] = set()
    represented: set[str] = set()
    while turns and len(chosen) < pairs:
        for reason, rest in list(turns.items()):
            if len(chosen) == pairs:
                break
            for promotion in rest:
                if frozenset(promotion[:2]) not in shown or reason not in represented:
                    chosen.append(promotion)
                    shown.add(frozenset(promotion[:2]))
                    represented.update(promotion.reasons)
                    break
            else:
                del turns[reason]
    return chosen
