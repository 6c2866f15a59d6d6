"""A real HTTP proxy that does to an S3 server what networks do: loses answers, refuses, cuts bodies short.

Put between a client and the loopback server by its URL; a rule decides for each request what happens to it.
"""

import http.client
import threading
from collections.abc import Callable
from enum import Enum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self
from urllib.parse import urlsplit


class Fault(Enum):
    """What happens to one request."""

    NONE = "passed on, and answered"
    LOST_ANSWER = "passed on and done, but the connection ends without an answer"
    DENIED = "answered with 403, not passed on"
    EXPIRED = "answered with 400 ExpiredToken, not passed on"
    ERROR = "answered with 500, not passed on"
    SLOW_DOWN = "answered with 503 SlowDown, not passed on"
    RESET = "not passed on, the connection ends without an answer"
    TRUNCATED = "passed on, the connection ends in the middle of the answer's body"
    FLIPPED = "passed on, the last byte of the answer's body changed"


Rule = Callable[[str, str, dict[str, str]], Fault]
"""Method, path with query, headers (names in lower case)."""


class FaultyProxy:
    """`with FaultyProxy(server.url) as proxy`: a server at `proxy.url` whose `proxy.rule` may be set at any time."""

    def __init__(self, upstream: str) -> None:
        self.rule: Rule = lambda method, path, headers: Fault.NONE
        self.seen: list[tuple[str, str, Fault]] = []
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                headers = {name.lower(): value for name, value in self.headers.items()}
                fault = proxy.rule(self.command, self.path, headers)
                proxy.seen.append((self.command, self.path, fault))
                body = self.rfile.read(int(headers.get("content-length", 0)))
                if fault in REFUSALS:
                    status, code = REFUSALS[fault]
                    self.reply(status, {"content-type": "application/xml"}, REFUSAL_BODY.format(code=code).encode())
                    return
                if fault is Fault.RESET:
                    self.close_connection = True
                    return
                connection = http.client.HTTPConnection(urlsplit(upstream).netloc, timeout=30)
                connection.request(self.command, self.path, body, headers)
                found = connection.getresponse()
                content = found.read()
                connection.close()
                if fault is Fault.LOST_ANSWER:
                    self.close_connection = True
                    return
                if fault is Fault.FLIPPED:
                    content = content[:-1] + bytes([content[-1] ^ 1])
                if fault is Fault.TRUNCATED and len(content) > 1:
                    self.reply(found.status, dict(found.getheaders()), content, cut=len(content) // 2)
                    self.close_connection = True
                    return
                self.reply(found.status, dict(found.getheaders()), content)

            do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = answer

            def reply(self, status: int, headers: dict[str, str], content: bytes, cut: int | None = None) -> None:
                self.send_response_only(status)
                for name, value in headers.items():
                    if name.lower() not in ("content-length", "connection", "transfer-encoding"):
                        self.send_header(name, value)
                # HEAD has no body, but says how long one would be.
                length = next((value for name, value in headers.items() if name.lower() == "content-length"), None)
                self.send_header("Content-Length", length or str(len(content)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content[:cut])

            def log_message(self, format: str, *args: object) -> None:
                """Silent: `seen` holds the requests."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


REFUSALS = {
    Fault.DENIED: (403, "AccessDenied"),
    Fault.EXPIRED: (400, "ExpiredToken"),
    Fault.ERROR: (500, "InternalError"),
    Fault.SLOW_DOWN: (503, "SlowDown"),
}
REFUSAL_BODY = '<?xml version="1.0"?><Error><Code>{code}</Code><Message>injected</Message></Error>'
