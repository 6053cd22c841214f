"""The page of a study, served: it shows what stands in the study's files and follows them while the study runs.

The server of the standard library is enough: a few readers on one machine, two addresses, one page in memory. It knows
these two addresses and compares paths with them, so no path leads into the file system.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import ipaddress
import json
import socket
import sys
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from jaxtune.errors import UserError
from jaxtune.layout import CONFIG_FILE, JOURNAL_FILE, METRICS_FILE, SUMMARY_FILE, TRIALS_FOLDER
from jaxtune.reports.page import View, notice, render, version, view
from jaxtune.reports.records import read_study

PORT = 8808
"""Tried first where no port is asked for."""

DATA = "view.json"

_HEADERS = {
    "Cache-Control": "no-cache",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": "frame-ancestors 'none'",
}


class Document(NamedTuple):
    """What one address answers.

    Attributes:
      type: its media type.
      body: its bytes.
      tag: its entity tag (RFC 9110, 8.8.3), quoted.
    """

    type: str
    body: bytes
    tag: str


class LivePage:
    """The documents of a study's page, made anew when the study's files have changed.

    Args:
      directory: the study's; it need not be there yet.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self._lock = threading.Lock()
        self._stamp: object = None
        self._documents: dict[str, Document] = {}

    def documents(self) -> dict[str, Document]:
        """The newest documents by path: the page, and the JSON object that it asks for afterwards."""
        with self._lock:  # several readers wait for one rendering
            stamp = self._files()
            if stamp != self._stamp:
                self._documents, self._stamp = self._render(), stamp
            return self._documents

    def _files(self) -> list[tuple[str, int, int]]:
        """Name, time and size of every file that the page is made from."""
        found = []
        trials = f"{TRIALS_FOLDER}/*/"
        for pattern in (JOURNAL_FILE, SUMMARY_FILE, CONFIG_FILE, f"{trials}{CONFIG_FILE}", f"{trials}{METRICS_FILE}"):
            for file in sorted(self.directory.glob(pattern)):
                with contextlib.suppress(OSError):  # moved or replaced since it was listed
                    status = file.stat()
                    found.append((str(file), status.st_mtime_ns, status.st_size))
        return found

    def _render(self) -> dict[str, Document]:
        shown = self._view()
        data = {
            "version": version(),
            "title": shown.title,
            "ended": shown.ended,
            "head": shown.head,
            "main": shown.main,
            "cards": shown.cards,
        }
        page = render(shown, refresh=DATA)
        return {
            "/": _document("text/html; charset=utf-8", page),
            f"/{DATA}": _document("application/json", json.dumps(data, allow_nan=False)),
        }

    def _view(self) -> View:
        if not (self.directory / JOURNAL_FILE).is_file():
            return notice(
                self.directory,
                "There is no study here yet",
                f"{self.directory} has no {JOURNAL_FILE}. The study appears here when it begins.",
            )
        try:
            return view(read_study(self.directory), live=True)
        except (UserError, OSError) as error:
            return notice(self.directory, "The study's files cannot be read", f"{error}")


def _document(media_type: str, text: str) -> Document:
    body = text.encode()
    return Document(media_type, body, f'"{hashlib.sha256(body).hexdigest()[:32]}"')


class PageServer(ThreadingHTTPServer):
    """Serves a study's page.

    Args:
      address: host and port as the system's socket takes them.
      family: of the address.
      page: what is served.
      any_name: answer whatever name a request gives this machine; otherwise only the names of the loopback interface,
        so that a site whose name was made to point here (DNS rebinding) reads nothing.
    """

    daemon_threads = True

    def __init__(self, address: tuple[str, int], family: socket.AddressFamily, page: LivePage, *, any_name: bool):
        self.address_family = family
        super().__init__(address, functools.partial(_Handler, page, any_name))

    def server_bind(self) -> None:
        """Binds without looking this machine's name up, which can take long and is not needed."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A reader that went away in the middle of an answer is no error; anything else is told."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return int(self.server_address[1])

    @property
    def url(self) -> str:
        """Where this machine's browser finds the page."""
        host = str(self.server_address[0])
        if ipaddress.ip_address(host).is_unspecified:
            host = socket.gethostname()
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}/"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "jaxtune", ""
    timeout = 60  # seconds that an idle connection is kept

    def __init__(self, page: LivePage, any_name: bool, *request: Any):
        self.page, self.any_name = page, any_name
        super().__init__(*request)  # answers the request

    def do_GET(self) -> None:
        self._answer(self.wfile.write)

    def do_HEAD(self) -> None:
        self._answer(lambda body: None)

    def _answer(self, write: Callable[[bytes], object]) -> None:
        if not self.any_name and not _is_loopback_name(self.headers.get("Host", "")):
            self.send_error(HTTPStatus.FORBIDDEN, "Ask for this page as localhost")
            return
        document = self.page.documents().get(self.path.partition("?")[0])
        if document is None:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        known = [tag.strip().removeprefix("W/") for tag in self.headers.get("If-None-Match", "").split(",")]
        same = document.tag in known or "*" in known
        self.send_response(HTTPStatus.NOT_MODIFIED if same else HTTPStatus.OK)
        for name, value in (*_HEADERS.items(), ("ETag", document.tag)):
            self.send_header(name, value)
        if not same:
            self.send_header("Content-Type", document.type)
            self.send_header("Content-Length", str(len(document.body)))
        self.end_headers()
        if not same:
            write(document.body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: a page that asks every few seconds would fill the terminal."""


def _is_loopback_name(host: str) -> bool:
    """Whether a Host header names this machine's loopback interface; its port may be that of a tunnel."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    return name == "localhost" or _is_loopback(name)


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def make_server(
    directory: Path, *, host: str = "127.0.0.1", port: int | None = None, public: bool = False
) -> PageServer:
    """A server of a study's page, listening; ``serve_forever`` then answers.

    Args:
      directory: the study's; it need not be there yet.
      host: name or address of the interface.
      port: 0 takes any free one; None :data:`PORT`, or any free one where that is taken.
      public: allow an interface that other machines reach.

    Raises:
      UserError: the host is not of this machine or not loopback without ``public``, or the port cannot be had.
    """
    if port is not None and not 0 <= port <= 65535:
        raise UserError(f"--port {port}: a port is a number from 0 to 65535")
    try:
        family, *_, address = socket.getaddrinfo(host, port or 0, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise UserError(f"--host {host}: no such host ({error.strerror or error})") from error
    loopback = _is_loopback(str(address[0]))
    if not loopback and not public:
        raise UserError(
            f"--host {host}: other machines could read the study there, without a password; add --public if that is "
            f"meant, or leave --host out and use a tunnel: ssh -L {port or PORT}:localhost:{port or PORT} THIS_MACHINE"
        )
    page = LivePage(directory)
    for candidate in [port] if port is not None else [PORT, 0]:
        try:
            return PageServer((str(address[0]), candidate), family, page, any_name=not loopback)
        except OSError as error:
            if port is not None or candidate == 0:
                problem = f"cannot listen at {host}:{candidate}: {error.strerror or error}"
                raise UserError(f"--port {candidate}: {problem}; --port 0 takes a free one") from error
    raise AssertionError("the last candidate returns or raises")
