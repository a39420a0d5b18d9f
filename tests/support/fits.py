"""Training of any method for a few steps by a real Trainer."""

import lightning as L
import torch
from small import batch
from torch.utils.data import DataLoader

from clipfix.methods.base import Method


def fit(method: Method, folder, steps: int, resume=None, callbacks=()) -> L.Trainer:
    """Train on a stream that yields batch n at step n, also after resuming, and return the Trainer."""

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return (batch(4, seed) for seed in range(method.batches_seen, 100))

    checkpoint = L.pytorch.callbacks.ModelCheckpoint(folder, filename="last", enable_version_counter=False)
    trainer = L.Trainer(
        max_steps=steps, max_epochs=-1, accelerator="cpu", logger=False, callbacks=[checkpoint, *callbacks],
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(method, DataLoader(Stream(), batch_size=None), ckpt_path=resume, weights_only=True)
    return trainer
