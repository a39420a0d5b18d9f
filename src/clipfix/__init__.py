"""clipfix: the bench where CLIP gets repaired.

__main__.py   the whole program: compose, build, evaluate, train, evaluate, report
backbone.py   a CLIP (open_clip) behind a few verbs;  diffusion.py  a frozen generator behind two
shards.py, data.py  shards to batches;  annotate/  shards to richer shards;  scenes/  a drawn world, no download
methods/      one paper, one file;  functional/  their formulas
trained.py    which weights train, adapters (LoRA) among them;  wise.py  their mean with the original ones
evals/        benchmarks: a backbone in, named scores out;  report.py  tables and pictures
compare/      runs side by side, from results.json and outcomes.py's record of every item
mining/       mined positives for a person to judge
"""

__version__ = "0.1.0"
