"""A W&B server as far as saving needs one: it answers to HTTP on this machine and keeps what it was sent."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

ME = {"id": "me", "username": "me", "entity": "me", "flags": "{}", "teams": {"edges": []}}


@contextmanager
def server() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Its address, and the variables of every mutation so far."""
    kept: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["content-length"]))) if self.path == "/graphql" else {}
            query = asked.get("query", "")
            if "mutation" in query:
                kept.append(asked["variables"])
            sweep = {"name": "s", "project": {"id": "p", "name": "clipfix", "entity": {"id": "me", "name": "me"}}}
            data = {
                "viewer": ME,
                "upsertView": {"view": {"id": "v", "name": "nw-v-v"}, "inserted": True},
                "upsertSweep": {"sweep": sweep, "configValidationWarnings": []},
            }
            found = {name: value for name, value in data.items() if f"{name}(" in query or f"{name} {{" in query}
            answer = json.dumps({"data": found}).encode()
            self.send_response(200 if query else 404)
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: Any) -> None:
            """Not on the test's screen."""

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=listening.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{listening.server_port}", kept
    listening.shutdown()
