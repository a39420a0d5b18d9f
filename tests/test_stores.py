"""Shards from a server that has bad days: asked again, named, never taken for whole."""

import functools
import http.server
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import pytest
from shards import numbered
from streams import shard_data

from clipfix.data.shards import read_shard


class Store(http.server.SimpleHTTPRequestHandler):
    """Answers the first requests of each path as `troubles` says, then as it should."""

    troubles: tuple[str, ...] = ()
    asked: ClassVar[Counter[str]] = Counter()

    def do_GET(self) -> None:
        trouble = self.troubles[self.asked[self.path]] if self.asked[self.path] < len(self.troubles) else ""
        self.asked[self.path] += 1
        if trouble.isdigit():
            self.send_error(int(trouble))
        elif trouble == "hangs up":
            self.connection.close()
        elif trouble == "is silent":
            time.sleep(1)
        elif trouble in ("breaks off", "falls silent"):
            data = Path(self.translate_path(self.path)).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2 // 512 * 512])
            time.sleep(trouble == "falls silent")
        else:
            super().do_GET()

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def store(tmp_path: Path, request: pytest.FixtureRequest) -> Any:
    Store.troubles, Store.asked = request.param, Counter()
    handler = functools.partial(Store, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    "store", [("503", "429"), ("hangs up",), ("500", "hangs up"), ("is silent",)], indirect=True, ids=str
)
def test_a_store_that_fails_is_asked_again_and_nothing_is_lost(
    store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clipfix.data.shards.SILENCE", 0.5)
    keys = numbered(tmp_path, [5])
    assert [raw["__key__"] for raw in read_shard(f"{store}/00000.tar")] == keys
    assert Store.asked["/00000.tar"] == 1 + len(Store.troubles)
    assert not [record for record in caplog.records if record.name == "clipfix.data.shards"]


@pytest.mark.parametrize("store", [("404",)], indirect=True)
def test_what_a_store_does_not_have_is_asked_for_once(
    store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    numbered(tmp_path, [5])
    assert not list(read_shard(f"{store}/00000.tar"))
    (line,) = caplog.messages
    assert "404" in line
    assert Store.asked == {"/00000.tar": 1}


@pytest.mark.parametrize("store", [("breaks off",), ("falls silent",)], indirect=True, ids=str)
def test_of_a_shard_that_breaks_off_the_rest_comes_with_the_next_pass(
    store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clipfix.data.shards.SILENCE", 0.5)
    keys = numbered(tmp_path, [20])
    first, second = ([raw["__key__"] for raw in read_shard(f"{store}/00000.tar")] for _ in range(2))
    assert 0 < len(first) < 20
    assert second == keys
    (line,) = caplog.messages
    assert "is broken" in line


def test_a_server_that_is_down_is_named(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr("urllib3.util.retry.time.sleep", waited.append)
    assert not list(read_shard("http://127.0.0.1:9/0.tar"))
    assert waited == [1, 2, 4, 8, 16, 32, 64]  # doubled each time, two minutes in all
    assert "shard http://127.0.0.1:9/0.tar is broken" in caplog.messages[-1]


@pytest.mark.parametrize("store", [("503",) * 99], indirect=True, ids=["503"])
def test_a_store_that_is_gone_stops_the_run_after_one_pass_of_asking_again(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbered(tmp_path, [5, 5, 5])
    monkeypatch.setattr("urllib3.util.retry.time.sleep", lambda seconds: None)
    data = shard_data(f"{store}/{{00000..00002}}.tar")
    with pytest.raises(ValueError, match=r"no shard of data.train .3. begins with one.*/00002\.tar: .*too many 503"):
        next(iter(data.train_dataloader()))
    # Once, eight times again, and once more, without waiting, to be sure that no shard is fine.
    assert Store.asked == {f"/0000{number}.tar": 10 for number in range(3)}
