"""Shapes in signatures are checked while the tests run; and no test talks to W&B or to a model hub."""

import os

from jaxtyping import install_import_hook

os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
install_import_hook(["clipfix.functional", "clipfix.methods"], "beartype.beartype")
