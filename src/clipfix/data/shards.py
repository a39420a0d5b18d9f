"""Reading of shards: from urls to undecoded samples. Broken files, servers and tar archives are handled here."""

import glob
import logging
import re
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

RETRIES = 8  # requests to a server after a failed one; the first is immediate
SILENCE = 60  # seconds without a byte after which a request fails
GOPEN = ("", "file", *wds.gopen_schemes)  # protocols that webdataset opens; fsspec opens the others, such as s3


def expand(urls: str | Iterable[str], allow_pipe: bool = False) -> list[str]:
    """Return one url for each shard.

    Args:
        urls: paths, globs, folders, brace ranges, `pipe:` commands, or urls of http(s), s3 and others.
        allow_pipe: whether `pipe:` commands are allowed.

    Raises:
        ValueError: if a path or glob matches nothing, the package for a protocol is missing, or a shell command is not
            allowed. This is raised before training starts.
    """
    entries = [urls] if isinstance(urls, str) else list(urls)
    shards = [shard for entry in entries for url in braceexpand(entry) for shard in _resolve(url, allow_pipe)]
    if missing := [shard for shard in shards if not urlsplit(shard).scheme and not Path(shard).is_file()]:
        raise ValueError(
            f"{len(missing)} of {len(shards)} shards of {entries} do not exist, first {missing[0]!r} "
            f"(working folder {Path.cwd()}): correct data.train or data.selection{existing(entries)}"
        )
    return shards


def existing(entries: list[str]) -> str:
    """Return how to ask for the shards of a brace range that exist; "" if none does."""
    for entry in entries:
        pattern = re.sub(r"\{[^{}]*\}", "*", entry)
        if pattern != entry and (there := len(glob.glob(str(Path(pattern).expanduser()), recursive=True))):
            return f", or ask for the {there} that exist: '{pattern}'"
    return ""


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
    if path.is_dir():  # img2dataset also writes parquet and json files there, which are not shards
        pattern = str(Path(glob.escape(str(path))) / "*.tar")
    elif glob.has_magic(url) and not path.exists():
        pattern = str(path)
    else:
        return [str(path)]
    if not (shards := sorted(glob.glob(pattern, recursive=True))):
        raise ValueError(f"no shard matches {pattern!r} (working folder {Path.cwd()}): correct the path, or write one")
    return [f"./{shard}" if urlsplit(shard).scheme else shard for shard in shards]  # a file may be named `pipe:...`


class StrictMember(tarfile.TarInfo):
    """A tar header that raises an error if it is damaged. tarfile treats damage and a missing end as the end."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> "StrictMember":
        try:
            return super().fromtarfile(archive)
        except tarfile.HeaderError as error:
            if isinstance(error, tarfile.EOFHeaderError):  # type: ignore[attr-defined]
                raise
            raise tarfile.ReadError(f"damaged or cut off, {error}") from None


def open_shard(url: str, again: int = RETRIES) -> Any:
    """Open a shard as a stream of bytes.

    Requests to a server that is down or busy are repeated for about two minutes, with waits that double from one second
    on. A server that sends nothing for a minute counts as down. A connection that breaks while reading is not repeated.
    For s3:// and gs:// s3fs and gsutil retry; for `pipe:` the command has to.

    Args:
        again: number of retries.
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


def content(tar: tarfile.TarFile, url: str) -> Iterator[dict[str, Any]]:
    """Yield the name and the bytes of each file in an archive, as webdataset's `group_by_keys` takes them."""
    for member in tar:
        if member.isreg() and (file := tar.extractfile(member)):
            yield {"fname": member.name, "data": file.read(), "__url__": url}
        tar.members = []  # type: ignore[attr-defined]  # tarfile would keep every header it has seen


def warn(url: str, error: Exception) -> None:
    log.warning("shard %s is broken (%s): using its readable part", url, error)


def read_shard(
    url: str, on_error: Callable[[str, Exception], object] = warn, again: int = RETRIES
) -> Iterator[dict[str, Any]]:
    """Yield the undecoded samples of one shard: bytes by suffix, `__key__` and `__url__`.

    Args:
        on_error: called with the url and the error if the shard is broken. Samples before the damage are yielded.
        again: number of retries of a request to a server.
    """

    def broken(error: Exception) -> bool:
        on_error(url, error)
        return True  # webdataset continues

    def members() -> Iterator[dict[str, Any]]:
        try:
            stream = open_shard(url, again)
            with tarfile.open(fileobj=stream, mode="r|*", tarinfo=StrictMember) as tar:
                yield from content(tar, url)
            while stream.read(1 << 20):  # read to the end: a command whose pipe is closed early would fail
                pass
            stream.close()
        except Exception as error:  # any error of a file, a network or a command ends this shard, not the run
            broken(error)

    yield from in_order(group_by_keys(members(), handler=broken), broken)


def in_order(samples: Iterable[dict[str, Any]], broken: Callable[[Exception], object]) -> Iterator[dict[str, Any]]:
    """Yield samples up to the first whose key came before with other members: its members are not adjacent.

    A shard is read as a stream, so such a sample cannot be joined. A key that repeats with the same members is another
    sample.
    """
    suffixes: dict[str, set[str]] = {}
    for sample in samples:
        key, found = sample["__key__"], {name for name in sample if not name.startswith("__")}
        if key in suffixes and not suffixes[key] & found:
            broken(
                ValueError(
                    f"the members of the sample {key!r} are not next to each other: pack it again in the order of "
                    "names, tar --sort=name"
                )
            )
            return
        suffixes[key] = found
        yield sample
