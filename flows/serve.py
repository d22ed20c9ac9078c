"""`dpo-loop serve-report`: the reports of a run over HTTP, read-only, from the standard library.

What is served is a list, not a folder: a URL is compared as it came, undecoded, with the patterns below, so that no spelling of a path leads
elsewhere, and a file is served only if it is that file and no link. The pages hold what models wrote; their own policy (hashes of their one
script and style) is sent as a header too.

A browser is answered only under a name that cannot be made to point here by somebody else (DNS rebinding): the --host that was given and its
address, with this port; on loopback any name of loopback; on all addresses (0.0.0.0, ::) any address written in numbers, and localhost.
"""

from __future__ import annotations

import html
import ipaddress
import re
import signal
import socket
import socketserver
import threading
from collections.abc import Callable, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from dpo_loop.errors import InputError
from dpo_loop.exchange import GATE_REPORT, JUNIT
from dpo_loop.layout import RunDir

_OF_A_ROUND = re.compile(rf"/rounds/([0-9]{{3}})/(report/report\.html|gate/{re.escape(GATE_REPORT)}|gate/{re.escape(JUNIT)})")
_TYPES = {".html": "text/html; charset=utf-8", ".json": "application/json", ".xml": "application/xml; charset=utf-8"}
_PAGE_POLICY = re.compile(rb'<meta http-equiv="Content-Security-Policy" content="([^"]*)">')
_HEAD_BYTES = 4096
_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^\[\]:@/]+))(?::([0-9]{1,5}))?")
_HTTP_PORT = 80
"""Which browsers leave out of the Host header."""
_Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_NOTHING = "default-src 'none'"
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


def serve(run: RunDir, host: str, port: int, announce: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM; call it from the main thread. announce: gets the URL. Raises InputError where nobody can listen."""
    with ReportServer(run, host, port) as server:
        for number in (signal.SIGINT, signal.SIGTERM):
            # From another thread: shutdown waits for serve_forever, which the handler interrupts.
            signal.signal(number, lambda *_: threading.Thread(target=server.shutdown).start())
        announce(server.url)
        server.serve_forever()


def is_loopback(host: str) -> bool:
    address = _address(host)
    return host.lower() == "localhost" if address is None else address.is_loopback


class ReportServer(ThreadingHTTPServer):
    """Listens from its construction on; `serve_forever` answers."""

    def __init__(self, run: RunDir, host: str, port: int) -> None:
        self.run = run
        self.host = host
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            raise InputError(
                f"cannot listen on {host} port {port}: {error.strerror}. Give another --port (0 takes a free one) or a --host of this machine."
            ) from error

    @property
    def url(self) -> str:
        return f"http://{_bracketed(self.host)}:{self.server_port}/"

    def knows(self, host_headers: Sequence[str]) -> bool:
        """Whether the request names this server; see the top of this file. A request has one Host header, in any case of letters."""
        found = _HOST.fullmatch(host_headers[0].lower()) if len(host_headers) == 1 else None
        if found is None or int(found[3] or _HTTP_PORT) != self.server_port:
            return False
        name, bound = found[1] or found[2], _address(str(self.server_address[0]))
        asked = _address(name)
        everywhere = bound is not None and bound.is_unspecified
        if asked is None:
            return name == self.host.lower() or (name == "localhost" and (everywhere or is_loopback(self.host)))
        return everywhere or asked == bound or (is_loopback(self.host) and str(asked) in ("127.0.0.1", "::1"))

    def server_bind(self) -> None:
        """Without the standard library's question for this machine's full name, which may wait for a DNS server."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.host, self.server_address[1]


def _address(host: str) -> _Address | None:
    """None for a name."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


class _Handler(BaseHTTPRequestHandler):
    server: ReportServer
    protocol_version = "HTTP/1.1"
    timeout = 30
    """Seconds that a silent connection keeps its thread."""

    def do_GET(self) -> None:
        if not self.server.knows(self.headers.get_all("Host", [])):
            self._refuse(HTTPStatus.FORBIDDEN, "this server answers to its own address only, as it was given with --host")
            return
        path = self.path.partition("?")[0]
        run = self.server.run
        if path == "/latest":
            newest = next((here for here in reversed(run.rounds()) if _readable(run, here.report_page)), None)
            if newest is None:
                self._refuse(HTTPStatus.NOT_FOUND, "this run has no report yet")
            else:
                self._reply(HTTPStatus.FOUND, b"", location=f"/{newest.report_page.relative_to(run.path).as_posix()}")
            return
        file = _file_of(run, path)
        if file is None:
            self._refuse(
                HTTPStatus.NOT_FOUND, "there is nothing here; / lists the rounds once one has ended, /latest is the newest report"
            )
            return
        self._reply(HTTPStatus.OK, file.read_bytes(), kind=_TYPES[file.suffix])

    do_HEAD = do_GET

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:  # noqa: ARG002 - theirs
        """The standard library's page repeats what was asked; this does not."""
        self._refuse(HTTPStatus(code), HTTPStatus(code).phrase)

    def _refuse(self, status: HTTPStatus, why: str) -> None:
        self.close_connection = True
        self._reply(status, f"{why}\n".encode())

    def _reply(
        self, status: HTTPStatus, body: bytes, *, kind: str = "text/plain; charset=utf-8", location: str | None = None
    ) -> None:
        self.send_response(status)
        headers = _HEADERS | {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "Content-Security-Policy": _policy(kind, body),
        }
        if location is not None:
            headers["Location"] = location
        if self.close_connection:
            headers["Connection"] = "close"
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def version_string(self) -> str:
        return "dpo-loop"

    def log_message(self, format: str, *args: Any) -> None:
        pass


def _file_of(run: RunDir, path: str) -> Path | None:
    if path in ("/", "/index.html"):
        file = run.index_page
    elif found := _OF_A_ROUND.fullmatch(path):
        file = run.round(int(found[1])).path / found[2]
    else:
        return None
    return file if _readable(run, file) else None


def _readable(run: RunDir, file: Path) -> bool:
    """The file itself: a link, also one to another file of the run, is none."""
    return file.is_file() and file.resolve() == run.path.resolve() / file.relative_to(run.path)


def _policy(kind: str, body: bytes) -> str:
    """The page's own, which a header completes: only a header can forbid frames."""
    own = _PAGE_POLICY.search(body[:_HEAD_BYTES]) if kind == _TYPES[".html"] else None
    return f"{html.unescape(own[1].decode()) if own else _NOTHING}; frame-ancestors 'none'"
