"""What the numbers of a run come from: weights, data, versions, code. Every results.json carries it, as recipe.py's."""

import subprocess
from collections.abc import Iterable, Mapping
from functools import cache
from hashlib import file_digest, sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from clipfix import PACKAGE, __version__
from clipfix.data.shards import expand
from clipfix.evals.base import Benchmark
from clipfix.models.clip import Backbone
from clipfix.system.secrets import without_secrets

LIBRARIES = ("torch", "lightning", "open_clip_torch", "diffusers", "transformers", "numpy")


def facts(backbone: Backbone, benchmarks: Mapping[str, Benchmark]) -> dict[str, Any]:
    """All that does not change from before a repair to after it."""
    name = Path(backbone.name).parts[-2:] if backbone.folder else (backbone.name,)  # no path of this machine
    weight = next(backbone.parameters())
    return {
        "model": "/".join(name),
        "data": {benchmark: data_hash(scored.sources()) for benchmark, scored in benchmarks.items()},
        "versions": {"clipfix": __version__} | {library: version(library) for library in LIBRARIES},
        "commit": commit(),
        "device": torch.cuda.get_device_name(weight.device) if weight.is_cuda else str(weight.device),
    }


# -- data --------------------------------------------------------------------------------------------------------------


def files(source: Any) -> list[str]:
    """The files, as absolute paths, and urls of what a benchmark or a method reads: urls of shards, as in yaml.

    A source of another kind says so itself, by a method `files()` that returns the same.
    """
    if source is None:
        return []
    if hasattr(source, "files"):
        return source.files()
    found = expand(source, allow_pipe=True)  # whoever reads them asks whether a pipe may run
    return [url if urlsplit(url).scheme else str(Path(url).resolve()) for url in found]


def data_hash(sources: Mapping[str, Any]) -> dict[str, Any]:
    """How many files, and SHA-256 of the contents of them all in order, whatever they are called and wherever they lie.

    What comes over the network is not read once more for this: there its urls are given, and no hash.
    """
    found = [file for source in sources.values() for file in files(source)]
    if remote := [file for file in found if urlsplit(file).scheme]:
        return {"files": len(found), "sha256": None, "urls": without_secrets(remote)}
    return {"files": len(found), "sha256": sha256("".join(map(_digest, found)).encode()).hexdigest()}


def _digest(file: str) -> str:
    status = Path(file).stat()
    return _digest_of(file, status.st_size, status.st_mtime_ns)


@cache
def _digest_of(file: str, size: int, changed_ns: int) -> str:
    """Of one file, read once a process as long as it stays as it is."""
    with open(file, "rb") as opened:
        return file_digest(opened, "sha256").hexdigest()


def check_splits(benchmarks: Mapping[str, Benchmark], seen: Mapping[str, Iterable[Any]]) -> None:
    """Refuses to report a score on files that the run trains on or chooses its checkpoint by.

    `seen` has, by the key of the config, the sources that the run sees before the report. Files are told apart by path
    or url: a copy under another name goes unnoticed. What a probe is fitted on may be seen, what it is asked may not.
    """
    for key, sources in seen.items():
        known = {file for source in sources for file in files(source)}
        for name, benchmark in benchmarks.items():
            asked = [file for file in files(benchmark.sources().get("shards")) if file in known]
            if asked:
                raise ValueError(
                    f"eval.benchmarks.{name} would be scored on {asked[0]}, which is in {key} too ({len(asked)} such "
                    "files): what a run trains on or chooses its checkpoint by cannot judge it. Name other shards for "
                    "one of the two."
                )


# -- code --------------------------------------------------------------------------------------------------------------


def commit() -> dict[str, Any] | None:
    """The commit of the checkout that this code runs from, and whether its files differ; None where there is none."""
    root = PACKAGE.parents[1]
    if not (root / ".git").exists():  # installed: a repository further up would be somebody else's
        return None
    try:
        said = [
            subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True).stdout.strip()
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.CalledProcessError):  # no git here, or a repository that it will not read
        return None
    return {"hash": said[0], "dirty": bool(said[1])}
