"""A real HTTP proxy that does to an S3 server what networks do: loses answers, refuses, cuts bodies short. And what poor stores do.

Put between a client and the loopback server by its URL; a rule decides for each request what happens to it.
"""

import http.client
import select
import threading
from collections import Counter
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
    SILENT = "not passed on, and never answered"
    TRUNCATED = "passed on, the connection ends in the middle of the answer's body"
    FLIPPED = "passed on, the last byte of the answer's body changed"
    CONFLICT = "answered with 409, another write is under way, not passed on"
    NOT_IMPLEMENTED = "answered with 501, not passed on"
    UNCONDITIONAL = "passed on without If-Match and If-None-Match, as by a store that does not know them"
    CHECKED_FIRST = "If-Match and If-None-Match checked by a look at the object, then passed on without them"


CONDITIONS = ("if-match", "if-none-match")

RENDEZVOUS_SECONDS = 1
"""How long one write that passed the check of `CHECKED_FIRST` waits for another one, so that two do whenever two race."""

CLIENT_PORT = "client-port"

Rule = Callable[[str, str, dict[str, str]], Fault]
"""Method, path with query, headers (names in lower case), and the client's port as `CLIENT_PORT`."""


class FaultyProxy:
    """`with FaultyProxy(server.url) as proxy`: a server at `proxy.url` whose `proxy.rule` may be set at any time."""

    def __init__(self, upstream: str) -> None:
        self.rule: Rule = lambda method, path, headers: Fault.NONE
        self.seen: list[tuple[str, str, Fault]] = []
        self.passed: Counter[str] = Counter()
        self.checked = threading.Condition()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                headers = {name.lower(): value for name, value in self.headers.items()}
                port = str(self.client_address[1])
                fault = proxy.rule(self.command, self.path, headers | {CLIENT_PORT: port})
                proxy.seen.append((self.command, self.path, fault))
                body = self.rfile.read(int(headers.get("content-length", 0)))
                if fault in REFUSALS:
                    status, code = REFUSALS[fault]
                    self.reply(status, {"content-type": "application/xml"}, error_body(code))
                    return
                if fault in (Fault.RESET, Fault.SILENT):
                    if fault is Fault.SILENT:
                        select.select([self.connection], [], [])  # until the client gives up
                    self.close_connection = True
                    return
                conditions = {name: headers[name] for name in CONDITIONS if name in headers}
                if fault is Fault.CHECKED_FIRST and conditions and not proxy.passes(self.path, headers):
                    self.reply(412, {"content-type": "application/xml"}, error_body("PreconditionFailed"))
                    return
                if fault in (Fault.UNCONDITIONAL, Fault.CHECKED_FIRST):
                    headers = {name: value for name, value in headers.items() if name not in CONDITIONS}
                found, content = proxy.ask(self.command, self.path, body, headers)
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

        self.upstream = urlsplit(upstream).netloc
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def ask(
        self, method: str, path: str, body: bytes, headers: dict[str, str]
    ) -> tuple[http.client.HTTPResponse, bytes]:
        """Pass a request on."""
        connection = http.client.HTTPConnection(self.upstream, timeout=30)
        connection.request(method, path, body, headers)
        found = connection.getresponse()
        content = found.read()
        connection.close()
        return found, content

    def passes(self, path: str, headers: dict[str, str]) -> bool:
        """Check the conditions of a write by a look at the object; one that passes waits a moment for another that does too."""
        found, _ = self.ask("HEAD", path, b"", {name: headers[name] for name in ("host", "authorization")})
        etag = found.getheader("ETag", "").strip('"') if found.status == 200 else None
        wanted = headers.get("if-match")
        stands = etag is None if wanted is None else etag == wanted.strip('"')
        if not stands:
            return False
        with self.checked:
            self.passed[path] += 1
            self.checked.notify_all()
            turn = self.passed[path]
            self.checked.wait_for(lambda: self.passed[path] > turn, RENDEZVOUS_SECONDS)
        return True

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
    Fault.CONFLICT: (409, "ConditionalRequestConflict"),
    Fault.NOT_IMPLEMENTED: (501, "NotImplemented"),
}


def error_body(code: str) -> bytes:
    """What S3 says with an error."""
    return f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>{code}</Message></Error>'.encode()
