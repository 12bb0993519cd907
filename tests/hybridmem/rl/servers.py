"""Local HTTP server with scripted answers."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# Maps a request's body and number to a status and a body, which may be sent in parts.
Answer = Callable[[dict[str, Any], int], tuple[int, bytes | Iterator[bytes]]]


@contextmanager
def serving(answer: Answer, headers: dict[str, str] | None = None) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Run the server; yield its address and the list of received requests (body, path, headers)."""
    requests: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append({"body": body, "path": self.path, "headers": dict(self.headers)})
            status, content = answer(body, len(requests))
            try:
                self.send_response(status)
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                self.end_headers()
                for part in [content] if isinstance(content, bytes) else content:
                    self.wfile.write(part)
            except OSError:  # the client gave up
                pass

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def as_json(value: Any) -> tuple[int, bytes]:
    """Return a successful JSON answer."""
    return 200, json.dumps(value).encode()
