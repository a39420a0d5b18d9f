"""clipfix repairs CLIP models and scores them before and after.

cli/         the command line: config, verbs, sweeps, error messages
methods/     one paper, one file; parts/ is what they are made of and share
functional/  the formulas of the papers
models/      CLIP, the diffusion model, adapters, weight files
data/        shards to batches; sets/ reads published data sets, scenes/ draws a world
training/    phases, schedules, ranks, checkpoints, callbacks
evals/       benchmarks: a model in, named scores out
results/     results.json, reports, pictures, runs side by side
annotate/    shards with captions, features or latents added
export/      folders that other libraries load
system/      files, processes, secrets, names that moved
"""

from pathlib import Path

__version__ = "0.1.0"
PACKAGE = Path(__file__).parent
# In a wheel conf/ is inside the package; in a checkout it is at the top, where people look for it.
CONF = next(folder for folder in (PACKAGE / "conf", PACKAGE.parents[1] / "conf") if folder.is_dir())
