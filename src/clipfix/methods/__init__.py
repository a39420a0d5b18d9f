"""Methods: one LightningModule for each paper. Read `base.py` first, then `finetune.py`, the template to copy."""
