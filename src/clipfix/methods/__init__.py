"""Recipes: one paper, one file, one LightningModule. Start with `base.py`, then `finetune.py`, the one to copy."""
