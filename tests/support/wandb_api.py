"""A local HTTP server with those parts of the W&B API that saving needs. It stores what it receives."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

ME = {"id": "me", "username": "me", "entity": "me", "flags": "{}", "teams": {"edges": []}}


@contextmanager
def server() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield the address, and a list of the variables of every mutation."""
    received: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = (
                json.loads(self.rfile.read(int(self.headers["content-length"]))) if self.path == "/graphql" else {}
            )
            query = request.get("query", "")
            if "mutation" in query:
                received.append(request["variables"])
            sweep = {"name": "s", "project": {"id": "p", "name": "clipfix", "entity": {"id": "me", "name": "me"}}}
            data = {
                "viewer": ME,
                "upsertView": {"view": {"id": "v", "name": "nw-v-v"}, "inserted": True},
                "upsertSweep": {"sweep": sweep, "configValidationWarnings": []},
            }
            answers = {name: value for name, value in data.items() if f"{name}(" in query or f"{name} {{" in query}
            answer = json.dumps({"data": answers}).encode()
            self.send_response(200 if query else 404)
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: Any) -> None:
            """Print nothing."""

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=listening.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{listening.server_port}", received
    listening.shutdown()
