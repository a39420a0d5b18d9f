"""Nothing that a run leaves, prints or sends holds a secret, though its shards come from a store that asks for one."""

import base64
import functools
import http.server
import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from shards import numbered

from clipfix.system import secrets

USER, PASSWORD, SIGNATURE, TOKEN = "reader", "hunter2hunter2", "c2lnbmVkLWJ5LW1l", "tkn-0123456789"
RUN = ["method=finetune", "data=shards", "eval=none", "trainer=cpu", "method.steps=2", "method.schedule.warmup_steps=0",
       "data.batch_size=4", "data.workers=0", "data.shuffle=0"]  # fmt: skip


class Store(http.server.SimpleHTTPRequestHandler):
    """Gives shards to who knows the password and the signature."""

    def do_GET(self) -> None:
        wanted = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        if self.headers["Authorization"] != f"Basic {wanted}" or not self.path.endswith(f"Signature={SIGNATURE}"):
            self.send_error(403)
        else:
            super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def store(tmp_path: Path) -> Iterator[str]:
    """Two shards, of which one is there."""
    numbered(tmp_path / "store", [16])
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Store, directory=str(tmp_path / "store"))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_run_keeps_tells_and_sends_no_secret(store, clipfix, monkeypatch, tmp_path, caplog):
    url = f"http://{USER}:{PASSWORD}@{store}/{{00000,absent}}.tar?X-Amz-Signature={SIGNATURE}"
    monkeypatch.setenv("SHARDS", url)
    monkeypatch.setenv("STORE_TOKEN", TOKEN)
    with caplog.at_level(logging.DEBUG):
        run, printed = clipfix(*RUN, "logger=wandb", "data.train=${oc.env:SHARDS}", "+seen=${oc.env:STORE_TOKEN}")
    told = "".join(record.getMessage() for record in caplog.records) + printed
    assert f"http://***@{store}/absent.tar" in told
    files = [path for path in run.rglob("*") if path.is_file()]
    assert {"config.yaml", "results.json", "last.ckpt"} <= {path.name for path in files}
    assert any(path.suffix == ".wandb" for path in files)
    for secret in (PASSWORD, SIGNATURE, TOKEN):
        assert secret not in told
        assert not [path for path in files if secret.encode() in path.read_bytes()]
    assert f"http://***@{store}/" in (run / "config.yaml").read_text()  # the rest of it is told


def test_a_secret_among_the_words_of_the_command_is_refused(clipfix):
    with pytest.raises(SystemExit) as stopped:
        clipfix(*RUN, f"data.train=https://{USER}:{PASSWORD}@host/0.tar")
    message = str(stopped.value.code)
    assert "holds a secret" in message
    assert "${oc.env:" in message
    assert PASSWORD not in message


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3 at https://me:pass-word@host:9000/a.tar, twice", "s3 at https://***@host:9000/a.tar, twice"),
        ("https://h/0.tar?a=1&X-Amz-Signature=ab%2Fc&b=2", "https://h/0.tar?a=1&X-Amz-Signature=***&b=2"),
        ("https://h/0.tar?sv=2&sig=abc", "https://h/0.tar?sv=2&sig=***"),
        (
            "pipe:curl -H 'Authorization: Bearer abc.def' https://h/0.tar",
            "pipe:curl -H 'Authorization: Bearer ***' https://h/0.tar",
        ),
        ("pipe:curl -H 'X-Api-Key: abc' https://h", "pipe:curl -H 'X-Api-Key: ***' https://h"),
        ('pipe:curl -H "Authorization: Bearer $TOKEN" https://h', None),
        ("https://host/{000..100}.tar", None),
        ("data.texts.short.key=json.caption", None),
        ("hf://org/name@main/x?signal=1", None),
        ("export.push_to=org/signature=1", None),
        ("method.optimizer.betas=[0.9,0.98]", None),
    ],
)
def test_what_looks_like_a_secret_is_hidden_and_nothing_else(text, shown):
    assert secrets.hidden(text) == (text if shown is None else shown)
