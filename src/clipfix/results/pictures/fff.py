"""A figure of pairs that FFF promoted to positives, by which to judge its thresholds."""

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
from clipfix.results.report import log_picture

log = logging.getLogger(__name__)

AT_MOST = 1000  # promotions to choose from, because very low thresholds promote every pair


class Promoted(L.Callback):
    """Writes `promoted.png` to the run folder and to W&B: images, and captions of other images promoted to positives.

    The pairs are a random choice from the batch of rank 0. Later files overwrite earlier ones. Thresholds and reference
    features do not change, so later files differ only by their batch.

    Args:
        folder: The run folder.
        every_n_steps: Steps between two files.
        pairs: Number of pairs in a file.
    """

    def __init__(self, folder: str, every_n_steps: int, pairs: int) -> None:
        self.path = Path(folder) / "promoted.png"
        self.every_n_steps, self.pairs = every_n_steps, pairs
        self.next_step, self.warned = 0, False

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Draw after the first step, which sets the thresholds, and then every n steps."""
        if trainer.global_step < self.next_step or not trainer.is_global_zero:
            return
        self.next_step = (trainer.global_step // self.every_n_steps + 1) * self.every_n_steps
        assert isinstance(pl_module, FFF)
        promotions = pl_module.mining.promoted(batch, at_most=AT_MOST)
        if not promotions:
            if not self.warned and pl_module.mining.active:
                log.warning(
                    "No pair of this batch was promoted: lower method.mining.thresholds. run=thresholds suggests some."
                )
            self.warned = True
            return
        cells = []
        for promotion in choose(promotions, self.pairs):
            cosines = (
                f"S_it {promotion.image_text:.3f}, S_ii {promotion.image_image:.3f}, S_tt {promotion.text_text:.3f}"
            )
            image, other = (to_pil_image(batch["image"][row].float().cpu()) for row in promotion[:2])
            cells.append(Cell(image, " + ".join(promotion.reasons), [(cosines, None)]))
            cells.append(Cell(other, "its caption is promoted", [(promotion.caption, None)]))
        gallery(cells, across=8, characters=34).savefig(self.path, dpi=100, bbox_inches="tight")
        log_picture("promoted/grid", self.path, trainer.loggers)


def choose(promotions: Sequence[Promotion], pairs: int) -> list[Promotion]:
    """Return a random choice of promotions with a fixed seed. The conditions take turns, beginning with the rarest.

    Two images can promote each other, with several captions. They are shown once, unless a condition has no other pair.
    """
    order = random.Random(0).sample(promotions, len(promotions))
    counts = Counter(reason for promotion in promotions for reason in promotion.reasons)
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
