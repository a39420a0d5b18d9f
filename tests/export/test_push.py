"""An upload arrives: huggingface_hub talks to a small server that answers as the hub does."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from front_door import refusal


class Hub(BaseHTTPRequestHandler):
    """The endpoints of the hub that an upload asks; every file travels in the commit itself."""

    asked: list[tuple[str, str | None]] = []  # noqa: RUF012
    files: dict[str, bytes] = {}  # noqa: RUF012

    def answer(self, content: Any, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.asked.append((self.path, self.headers["Authorization"]))
        if self.headers["Authorization"] != "Bearer hf_good":
            self.answer({"error": "Invalid username or password."}, 401)
        else:
            self.answer({"name": "me", "type": "user", "auth": {"accessToken": {"role": "write"}}})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0)).decode()
        self.asked.append((self.path, self.headers["Authorization"]))
        url = f"http://{self.headers['Host']}/me/model"
        if self.path.endswith("/preupload/main"):
            names = [file["path"] for file in json.loads(body)["files"]]
            self.answer({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        elif "/commit/main" in self.path:
            values = [line["value"] for line in map(json.loads, body.splitlines()) if line["key"] == "file"]
            self.files |= {value["path"]: base64.b64decode(value["content"]) for value in values}
            self.answer({"success": True, "commitOid": "0" * 40, "commitUrl": f"{url}/commit/{'0' * 40}"})
        else:
            self.answer({"url": url, "name": "me/model"})

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", endpoint)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    Hub.asked.clear()
    Hub.files.clear()
    yield Hub
    server.shutdown()
    server.server_close()


def test_what_was_written_is_what_arrives(hub, clipfix, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    clipfix("run=export", "to=timm", "output=out", "push_to=me/model")
    written = {path.name: path.read_bytes() for path in Path("out/timm").iterdir()}
    assert hub.files == written
    assert {"README.md", "provenance.json", "config.json", "open_clip_model.safetensors"} == written.keys()
    writing = {token for path, token in hub.asked if path.endswith("/create") or "/commit/" in path}
    assert writing == {"Bearer hf_good"}


def test_a_wrong_token_is_told_before_any_work(hub, clipfix, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_bad")
    assert "needs a login at the hub" in refusal(clipfix, "run=export", "to=timm", "output=out", "push_to=me/model")
    assert not Path("out").exists()
    assert not hub.files
