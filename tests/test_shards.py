"""Shards: every way to name them, and every way they can break."""

import functools
import http.server
import itertools
import logging
import tarfile
import threading
from pathlib import Path
from typing import Any

import fsspec
import pytest
from shards import encoded, numbered, pack, photographs, picture
from streams import shard_data, stream

from clipfix.data.decoding import samples
from clipfix.data.shards import expand, read_shard
from clipfix.system.files import add_sample


def test_every_way_to_name_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photographs(tmp_path / "a")
    numbered(tmp_path / "b", [1, 1, 1])
    monkeypatch.chdir(tmp_path)
    a, b = [f"a/{n:05d}.tar" for n in range(2)], [f"b/{n:05d}.tar" for n in range(3)]
    assert expand("a") == a  # img2dataset's parquet and statistics stay out
    assert expand("b/*.tar") == b
    assert expand("b/{00000..00001}.tar") == b[:2]
    assert expand(["b/00002.tar", "a", "b/0000[01].tar"]) == [b[2], *a, *b[:2]]
    assert expand("{a,b}") == a + b
    assert expand("https://host/{0..1}.tar") == ["https://host/0.tar", "https://host/1.tar"]
    assert expand("pipe:cat b/{0..1}.tar", allow_pipe=True) == ["pipe:cat b/0.tar", "pipe:cat b/1.tar"]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nowhere/*.tar", "no shard matches 'nowhere/"),
        ("empty", "no shard matches 'empty/"),
        ("b/{00000..00009}.tar", "9 of 10 shards .* first 'b/00001.tar'"),
        ("pipe:cat b/00000.tar", "data.allow_pipe=true"),
        ("s4://bucket/0.tar", "'s4://bucket/0.tar' cannot be read"),
    ],
)
def test_what_cannot_be_read_is_refused_before_training(
    url: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbered(tmp_path / "b", [1])
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        shard_data(url)


def test_s3_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(scheme: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    with pytest.raises(ValueError, match=r"pip install 'clipfix\[s3\]'"):
        expand("s3://bucket/{0..9}.tar")


def test_http_pipe_and_remote_filesystems_read_what_the_folder_holds(tmp_path: Path) -> None:
    keys = photographs(tmp_path)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    handler.func.log_message = lambda *_: None  # type: ignore[attr-defined]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        over_http = list(samples(f"http://127.0.0.1:{server.server_port}/{{00000..00001}}.tar"))
        server.shutdown()
    over_pipe = list(samples(f"pipe:cat {tmp_path}/{{00000..00001}}.tar", allow_pipe=True))
    for path in sorted(tmp_path.glob("*.tar")):  # fsspec's filesystem in memory stands for its s3
        fsspec.filesystem("memory").pipe(f"/bucket/{path.name}", path.read_bytes())
    over_fsspec = list(samples("memory://bucket/{00000..00001}.tar"))
    local = list(samples(str(tmp_path)))
    assert [sample["key"] for sample in local] == keys
    assert local == over_http == over_pipe == over_fsspec


# ------------------------------------------------------------------------------------------------------- broken shards


def cut(data: bytes) -> bytes:
    return data[: len(data) * 2 // 3 // 512 * 512 + 100]


def cut_between_members(data: bytes) -> bytes:
    return data[: data.index(b"00003.png")]


def damaged_header(data: bytes) -> bytes:
    place = data.index(b"00003.png")
    return data[:place] + b"\xaa" * 512 + data[place + 512 :]


def not_a_tar(data: bytes) -> bytes:
    return b"<html>404</html>"


@pytest.mark.parametrize(
    ("damage", "readable"), [(cut, 3), (cut_between_members, 3), (damaged_header, 3), (not_a_tar, 0)]
)
def test_a_broken_shard_is_named_and_its_readable_part_used(
    damage: Any, readable: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys = numbered(tmp_path, [5, 5, 5])
    path = tmp_path / "00001.tar"
    whole = path.read_bytes()
    first = int(keys[5])
    path.write_bytes(damage(whole.replace(f"{first + 3:05d}.png".encode(), b"00003.png")))
    with caplog.at_level(logging.WARNING):
        found = [sample["key"] for sample in stream(tmp_path, endless=False)]
    assert found == keys[:5] + keys[5 : 5 + readable] + keys[10:]
    (line,) = caplog.messages
    assert f"shard {path} is broken" in line


@pytest.mark.parametrize("command", ["exit 3", "cat {}.absent", "cat {}; exit 3"])
def test_a_failed_command_is_named(command: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys = numbered(tmp_path, [4])
    url = "pipe:" + command.format(tmp_path / "00000.tar")
    found = [raw["__key__"] for raw in read_shard(url)]
    assert found == keys[: len(found)]
    (line,) = caplog.messages
    assert f"shard {url} is broken" in line


def test_a_shard_that_vanishes_is_named_and_the_others_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clipfix.data.order.RUN", 4)  # samples that are read at once
    numbered(tmp_path, [4, 4, 4])
    batches = iter(shard_data(str(tmp_path), workers=0, shuffle=0, batch_size=4).train_dataloader())
    first = set(next(batches)["key"])
    gone = next(path for path in sorted(tmp_path.glob("*.tar")) if f"{int(path.stem) * 4:05d}" not in first)
    gone.unlink()
    seen = {key for batch in itertools.islice(batches, 6) for key in batch["key"]}
    assert len(seen) == 8
    assert not seen & {f"{int(gone.stem) * 4 + place:05d}" for place in range(4)}
    assert f"shard {gone} is broken (" in caplog.text
    assert "No such file" in caplog.text


def test_samples_of_one_key(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Two that lie apart are two samples; beside each other they are one, and what is there twice is named."""
    a, b, c = ({"png": encoded(picture(number)), "txt": str(number)} for number in range(3))
    pack(tmp_path / "0.tar", {"a": a, "b": b})
    pack(tmp_path / "1.tar", {"a": c})
    assert [(s["key"], s["txt"]) for s in samples(str(tmp_path))] == [("a", "0"), ("b", "1"), ("a", "2")]
    assert not caplog.messages
    with tarfile.open(tmp_path / "1.tar", "w") as tar:
        for key, members in ("a", a), ("a", b), ("c", c):  # as a writer leaves it that was started again
            add_sample(tar, key, {"png": members["png"], "txt": members["txt"].encode()})
    assert [s["txt"] for s in samples(str(tmp_path / "1.tar"))] == ["0", "2"]
    assert all("duplicate file name" in line for line in caplog.messages)
    assert len(caplog.messages) == 2


def test_padding_after_the_archive_is_no_failure(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys = numbered(tmp_path, [4])
    url = f"pipe:cat {tmp_path}/00000.tar; head -c 1000000 /dev/zero"
    assert [raw["__key__"] for raw in read_shard(url)] == keys
    assert not caplog.messages
