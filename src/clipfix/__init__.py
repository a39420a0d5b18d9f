"""clipfix: the bench where CLIP gets repaired.

__main__.py   the command line;  verbs.py  what a run may do: score, train, score, report; export and the others
backbone.py   a CLIP (open_clip) behind a few methods;  diffusion.py  a frozen generator behind two
shards.py, data.py  shards to batches;  annotate/  shards to richer shards;  scenes/  a drawn world, no download
methods/      one paper, one file;  functional/  their formulas
trained.py    which weights train, adapters (LoRA) among them;  wise.py  their mean with the original ones
evals/        benchmarks: a backbone in, named scores out;  report.py  tables and pictures
compare/      runs side by side, from results.json and outcomes.py's record of every item
ranks.py      torchrun, SLURM: who else is there;  sweeps.py  many runs;  resolvers.py  what yaml may ask for
mining/       mined positives for a person to judge
"""

from pathlib import Path

__version__ = "0.1.0"
PACKAGE = Path(__file__).parent
# An installed wheel carries conf/ inside the package; in a checkout it lies at the top, where people look.
CONF = next(folder for folder in (PACKAGE / "conf", PACKAGE.parents[1] / "conf") if folder.is_dir())
