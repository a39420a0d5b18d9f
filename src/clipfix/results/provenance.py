"""Provenance of scores: model, data, library versions and code. Every results.json holds it."""

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
    """Return the facts that are the same before and after training, by the names of fields in `Record`."""
    name = Path(backbone.name).parts[-2:] if backbone.folder else (backbone.name,)  # without the path on this machine
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
    """Return the files of a data source, local ones as absolute paths, others as urls.

    Args:
        source: Urls of shards, as in yaml; an object with a method `files()` that returns the list; or None.
    """
    if source is None:
        return []
    if hasattr(source, "files"):
        return source.files()
    urls = expand(source, allow_pipe=True)  # nothing is read here; the reader checks allow_pipe
    return [url if urlsplit(url).scheme else str(Path(url).resolve()) for url in urls]


def data_hash(sources: Mapping[str, Any]) -> dict[str, Any]:
    """Return the number of files and the SHA-256 of their contents in order, which is independent of their paths.

    Remote files are not read again to compute a hash; their urls are returned instead.
    """
    all_files = [file for source in sources.values() for file in files(source)]
    if remote := [file for file in all_files if urlsplit(file).scheme]:
        return {"files": len(all_files), "sha256": None, "urls": without_secrets(remote)}
    return {"files": len(all_files), "sha256": sha256("".join(map(_digest, all_files)).encode()).hexdigest()}


def _digest(file: str) -> str:
    status = Path(file).stat()
    return _digest_of(file, status.st_size, status.st_mtime_ns)


@cache
def _digest_of(file: str, size: int, changed_ns: int) -> str:
    """Return the digest of one file. A file is read once per process unless its size or time changes."""
    with open(file, "rb") as opened:
        return file_digest(opened, "sha256").hexdigest()


def check_splits(benchmarks: Mapping[str, Benchmark], seen: Mapping[str, Iterable[Any]]) -> None:
    """Raise an error if a benchmark is scored on files that the run trains on or selects its checkpoint by.

    Files are compared by path or url, so a copy with another name is not detected. Data that a probe is fitted on is
    not checked.

    Args:
        benchmarks: The benchmarks by name.
        seen: {config key: data sources that the run reads before it reports}.
    """
    for key, sources in seen.items():
        seen_files = {file for source in sources for file in files(source)}
        for name, benchmark in benchmarks.items():
            shared = [file for file in files(benchmark.sources().get("shards")) if file in seen_files]
            if shared:
                raise ValueError(
                    f"eval.benchmarks.{name} would be scored on {shared[0]}, which is also in {key} "
                    f"({len(shared)} such files). Scores on training or selection data are not valid: set "
                    "other shards for one of the two."
                )


# -- code --------------------------------------------------------------------------------------------------------------


def commit() -> dict[str, Any] | None:
    """Return the commit of this checkout and whether files differ from it; None if the code is not in a checkout."""
    root = PACKAGE.parents[1]
    if not (root / ".git").exists():  # an installed package may be inside an unrelated repository
        return None
    try:
        output = [
            subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True).stdout.strip()
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.CalledProcessError):  # git is not installed, or does not trust the repository
        return None
    return {"hash": output[0], "dirty": bool(output[1])}
