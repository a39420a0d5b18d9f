"""clipfix repairs CLIP models and scores them before and after.

cli/         command line: verbs, config checks, sweeps, error messages
methods/     one file per paper
parts/       objects that methods are composed of, chosen in conf/<part>/
functional/  formulas of the papers, as pure functions
models/      CLIP, diffusion models, adapters, reading of weight files
data/        shards to batches; sets/ reads published data sets, scenes/ draws the synthetic world
training/    phases, schedules, ranks, checkpoints, callbacks
evals/       benchmarks: each computes named scores of a model
results/     results.json, report of a run, pictures, comparison of runs
annotate/    adds captions, features or latents to shards
export/      writes models in the formats of other libraries
system/      files, ranks, secrets, old names of moved classes
"""

from pathlib import Path

__version__ = "0.1.0"
PACKAGE = Path(__file__).parent
# In a wheel conf/ is inside the package; in a checkout it is at the top, where people look for it.
CONF = next(folder for folder in (PACKAGE / "conf", PACKAGE.parents[1] / "conf") if folder.is_dir())
