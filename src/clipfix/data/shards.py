"""Shard urls in, undecoded samples out; everything that can be wrong with a file, a server or a tar is met here."""

import glob
import logging
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec
import requests
import webdataset as wds
from braceexpand import braceexpand
from requests.adapters import HTTPAdapter
from urllib3.util import Retry
from webdataset.tariterators import group_by_keys

log = logging.getLogger(__name__)

RETRIES = 8  # of a server; the first at once
SILENCE = 60  # seconds without a byte after which a server counts as down
GOPEN = ("", "file", *wds.gopen_schemes)  # what webdataset opens; fsspec has the rest, s3 among them


def expand(urls: str | Iterable[str], allow_pipe: bool = False) -> list[str]:
    """One url per shard, from paths, globs, folders, brace ranges, `pipe:` commands and http(s), s3, ... urls.

    Whatever cannot be read later is refused here, before any training: a path or glob that matches nothing, a
    protocol whose package is missing, a shell command that the config does not allow.
    """
    entries = [urls] if isinstance(urls, str) else list(urls)
    shards = [shard for entry in entries for url in braceexpand(entry) for shard in _resolve(url, allow_pipe)]
    if missing := [shard for shard in shards if not urlsplit(shard).scheme and not Path(shard).is_file()]:
        raise ValueError(
            f"{len(missing)} of {len(shards)} shards of {entries} do not exist, first {missing[0]!r} "
            f"(working folder {Path.cwd()}): correct data.train / data.selection"
        )
    return shards


def _resolve(url: str, allow_pipe: bool) -> list[str]:
    scheme = urlsplit(url).scheme
    if scheme == "pipe" and not allow_pipe:
        raise ValueError(f"{url!r} runs a shell command: set data.allow_pipe=true if you trust it")
    if scheme not in GOPEN:
        try:
            fsspec.get_filesystem_class(scheme)
        except (ImportError, ValueError) as error:
            raise ValueError(
                f"{url!r} cannot be read ({error}). For s3: pip install 'clipfix[s3]', "
                f"or data.allow_pipe=true with 'pipe:aws s3 cp {url} -'"
            ) from None
    if scheme:
        return [url]
    path = Path(url).expanduser()
    if path.is_dir():  # as img2dataset leaves it: its parquet and json files beside the shards are not ours to read
        pattern = str(Path(glob.escape(str(path))) / "*.tar")
    elif glob.has_magic(url) and not path.exists():
        pattern = str(path)
    else:
        return [str(path)]
    if not (shards := sorted(glob.glob(pattern, recursive=True))):
        raise ValueError(f"no shard matches {pattern!r} (working folder {Path.cwd()}): correct the path, or pack one")
    return shards


class _StrictMember(tarfile.TarInfo):
    """A tar header that says when it is damaged: tarfile alone takes damage, and a missing end, for the end."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> "_StrictMember":
        try:
            return super().fromtarfile(archive)
        except tarfile.HeaderError as error:
            if isinstance(error, tarfile.EOFHeaderError):  # type: ignore[attr-defined]
                raise
            raise tarfile.ReadError(f"damaged or cut off, {error}") from None


def open_shard(url: str, again: int = RETRIES) -> Any:
    """Bytes of a shard from wherever it lies. A server that is down or busy is asked again for two minutes.

    Waits double from a second on; a server that says nothing for a minute counts as down. What breaks off midway is
    not asked for again here. For s3:// and gs:// it is s3fs and gsutil that retry, for `pipe:` the command if it does.
    """
    scheme = urlsplit(url).scheme
    if scheme in ("http", "https"):
        retry = Retry(total=again, backoff_factor=0.5, status_forcelist=(408, 429, 500, 502, 503, 504))
        session = requests.Session()
        session.mount(f"{scheme}://", HTTPAdapter(max_retries=retry))
        answer = session.get(url, stream=True, timeout=SILENCE)
        answer.raise_for_status()
        return answer.raw
    return wds.gopen(url) if scheme in GOPEN else fsspec.open(url, "rb").open()


def warn(url: str, error: Exception) -> None:
    log.warning("shard %s is broken (%s): using its readable part", url, error)


def read_shard(
    url: str, tell: Callable[[str, Exception], object] = warn, again: int = RETRIES
) -> Iterator[dict[str, Any]]:
    """The samples of one shard, undecoded; a broken shard gives what can be read of it, and `tell` hears why."""

    def broken(error: Exception) -> bool:
        tell(url, error)
        return True  # webdataset's word for: go on

    def members() -> Iterator[dict[str, Any]]:
        try:
            stream = open_shard(url, again)
            with tarfile.open(fileobj=stream, mode="r|*", tarinfo=_StrictMember) as tar:
                for member in tar:
                    if member.isreg() and (file := tar.extractfile(member)):
                        yield {"fname": member.name, "data": file.read(), "__url__": url}
                    tar.members = []  # type: ignore[attr-defined]  # tarfile would keep every header it has seen
            while stream.read(1 << 20):  # to the end: a command whose pipe closes early would count as failed
                pass
            stream.close()
        except Exception as error:  # whatever a file, a network or a command can throw ends this shard, not the run
            broken(error)

    yield from group_by_keys(members(), handler=broken)
