"""The lens page with a box to type a text into, served to this machine alone."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from depthmix.data.spec import Template
from depthmix.depth.lens import Lens
from depthmix.models.spec import ModelSpec
from depthmix.models.subjects import Subjects, load_subjects
from depthmix.pages.lens_page import Form, render_lens
from depthmix.pages.page import LARGEST_PAGE

LOOPBACK = "127.0.0.1"
"""The only address that is served."""

LARGEST_REQUEST = 1_000_000
"""Bytes of a request beyond which it is not read."""

LARGEST_DISCARD = 50_000_000
"""Bytes of a longer one that are dropped first: a browser shows no answer before it has sent."""

EXAMPLE = "The capital of France is Paris, and the capital of Italy is Rome."
"""What models read at first, where nothing else is said."""

PATIENCE = 30
"""Seconds that a browser has to send a request."""


def serve_lens(
    models: Sequence[str | Path | ModelSpec],
    *,
    text: str | None = None,
    layers: str | Sequence[int] = "all",
    template: Template | None = None,
    port: int = 8765,
) -> None:
    """Serve the lens page to browsers on this machine, until Ctrl-C.

    Args:
        models: One model or two, as `load_model` takes them, whose tokenizers give the same tokens;
            loaded once.
        text: What they read at first; `None` takes an example, and an empty text nothing.
        layers: Layers to read out, as `load_subjects` takes them.
        template: How texts become what they read, as `load_subjects` takes it.
        port: Where to listen; 0 takes any that is free.

    Raises:
        ValueError: If the port is none, a model is named twice, or there are no late layers. What
            is wrong with a text is said on the page.
        OSError: If the port is taken, or a model cannot be found.
    """
    if not 0 <= port <= 65535:
        raise ValueError(f"`port` must be between 0 and 65535, got {port}; 0 takes a free one.")
    # A taken port is said before models are loaded, which takes longer.
    with LensServer(port) as server:
        subjects = load_subjects(models, layers=layers, template=template, drafts=True)
        server.take(subjects, text=EXAMPLE if text is None else text)
        print(f"The lens is at http://{LOOPBACK}:{server.server_port}/ (Ctrl-C ends)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


class LensServer(ThreadingHTTPServer):
    """Listens from the start, and answers by `serve_forever` once it has taken models.

    Args:
        port: Where to listen; 0 takes any that is free.

    Raises:
        OSError: If the port is taken.
    """

    reader: _Reader
    first: _Answer

    def __init__(self, port: int = 0) -> None:
        try:
            super().__init__((LOOPBACK, port), partial(_Handler, self))
        except OSError as error:
            raise OSError(
                f"`port` must be free, and {port} is not ({error.strerror}); choose another, or 0."
            ) from error

    def take(self, subjects: Subjects, *, text: str = "") -> None:
        """Take the models, and the text that they read at first; empty for nothing."""
        self.reader = _Reader(subjects)
        self.first = self.reader.read(text) if text else _Answer(page=self.reader.render({}))


@dataclass(frozen=True, kw_only=True)
class _Answer:
    """A page, and how the request went."""

    page: str
    status: HTTPStatus = HTTPStatus.OK


class _Reader:
    """Lets the models read one text at a time."""

    def __init__(self, subjects: Subjects) -> None:
        self._subjects = subjects
        self._lock = threading.Lock()

    def read(self, text: str) -> _Answer:
        """Make the page about a text, or the page that says why there is none."""
        if not text.strip():
            return self.refuse(text, "Type a text first.")
        try:
            with self._lock:
                lenses = self._subjects.look(text)
            page = self.render(lenses, text=text)
        except ValueError as error:
            return self.refuse(text, str(error))
        if len(page.encode()) > LARGEST_PAGE:
            return self.refuse(text, "This text is too long for a page; try a part of it.")
        return _Answer(page=page)

    def refuse(self, text: str, error: str, status: HTTPStatus = HTTPStatus.BAD_REQUEST) -> _Answer:
        """Make the page that says what is wrong."""
        return _Answer(page=self.render({}, text=text, error=error), status=status)

    def render(self, lenses: dict[str, Lens], *, text: str = "", error: str = "") -> str:
        """Make the page, with its form."""
        models = " and ".join(self._subjects.models)
        return render_lens(lenses, form=Form(models=models, text=text, error=error))


class _Handler(BaseHTTPRequestHandler):
    """Answers requests for the one page that there is."""

    timeout = PATIENCE

    def __init__(self, site: LensServer, *args: Any) -> None:
        self._site = site
        super().__init__(*args)  # which answers the request

    def do_GET(self) -> None:
        """Show the page with the first text."""
        self._answer(self._find_fault() or self._site.first)

    def do_POST(self) -> None:
        """Read the text of the form."""
        fault = self._find_fault()
        length = self.headers.get("Content-Length", "")
        if fault is None and not length.isdecimal():
            fault = self._fault("A request must say its length.", HTTPStatus.LENGTH_REQUIRED)
        # Python reads no number of thousands of digits.
        if fault is None and (len(length) > 15 or int(length) > LARGEST_REQUEST):
            fault = self._fault("This text is too long.", HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
            left = LARGEST_DISCARD if len(length) > 15 else min(int(length), LARGEST_DISCARD)
            while left > 0 and (piece := self.rfile.read(min(left, 65536))):
                left -= len(piece)
        if fault is not None:
            self.close_connection = True  # what was not read must not be taken for a request
            self._answer(fault)
            return
        body = self.rfile.read(int(length)).decode("utf-8", errors="replace")
        fields = parse_qs(body, keep_blank_values=True)
        text = fields.get("text", [""])[0].replace("\r\n", "\n")  # as forms send line breaks
        self._answer(self._site.reader.read(text))

    def log_message(self, format: str, *args: object) -> None:
        """Keep the terminal quiet."""

    def _find_fault(self) -> _Answer | None:
        """Refuse other sites' pages, also those whose name was pointed at this machine."""
        port = self.connection.getsockname()[1]
        hosts = [f"{name}:{port}" for name in (LOOPBACK, "localhost")]
        origin = self.headers.get("Origin")
        if self.headers.get("Host") not in hosts:
            return self._fault("This page is for this machine alone.", HTTPStatus.FORBIDDEN)
        if origin is not None and origin not in [f"http://{host}" for host in hosts]:
            return self._fault("Another page may not ask here.", HTTPStatus.FORBIDDEN)
        if self.path.partition("?")[0] != "/":
            return self._fault("There is nothing here; the page is at /.", HTTPStatus.NOT_FOUND)
        return None

    def _fault(self, error: str, status: HTTPStatus) -> _Answer:
        return self._site.reader.refuse("", error, status)

    def handle(self) -> None:
        """Answer, unless the browser has gone away meanwhile: nobody is left to be told."""
        with contextlib.suppress(ConnectionError, TimeoutError):
            super().handle()

    def finish(self) -> None:
        """Send what is left, if there is still somebody to send it to."""
        with contextlib.suppress(ConnectionError, TimeoutError):
            super().finish()

    def _answer(self, answer: _Answer) -> None:
        """Send a page."""
        content = answer.page.encode()
        self.send_response(answer.status)
        for name, value in (
            ("Content-Type", "text/html; charset=utf-8"),
            ("Content-Length", str(len(content))),
            ("Cache-Control", "no-store"),
            ("X-Content-Type-Options", "nosniff"),
            ("X-Frame-Options", "DENY"),
        ):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)
