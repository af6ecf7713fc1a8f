"""A real server on this machine that speaks OpenAI's chat completions, as a test wants it to."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from depthmix.evaluation.judge import JudgeSpec


@dataclass
class Reply:
    """What the server sends back."""

    content: str = "Good. Rating: [[5]]"
    """The judge's answer, for the status 200."""

    status: int = 200

    raw: str | None = None
    """Whole body instead."""

    after: threading.Event | None = None
    """What has to happen before."""


class JudgeServer(ThreadingHTTPServer):
    """Keeps every request, and answers by a function of the request's body and number."""

    def __init__(self, reply: Callable[[dict, int], Reply]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply = reply
        self.bodies: list[dict] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.num_under_way = 0
        self.most_under_way = 0
        self.lock = threading.Lock()

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def section(self, **options) -> JudgeSpec:
        """Name this server as the judge; one request at a time, so that their order is known."""
        return JudgeSpec(
            **{"model": "judge", "base_url": self.base_url, "concurrency": 1} | options
        )


class Handler(BaseHTTPRequestHandler):
    server: JudgeServer

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            number = len(server.bodies)
            server.bodies.append(body)
            server.headers.append({name.lower(): value for name, value in self.headers.items()})
            server.paths.append(self.path)
            server.num_under_way += 1
            server.most_under_way = max(server.most_under_way, server.num_under_way)
        reply = server.reply(body, number)
        if reply.after is not None:
            reply.after.wait()
        message = {"role": "assistant", "content": reply.content}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        completion = {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"]}
        text = json.dumps(completion | {"choices": [choice]}) if reply.raw is None else reply.raw
        with server.lock:
            server.num_under_way -= 1
        try:
            self.send_response(reply.status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text.encode())))
            if reply.status != 200:
                self.send_header("Retry-After-Ms", "1")
            self.end_headers()
            self.wfile.write(text.encode())
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client has stopped waiting

    def log_message(self, *args):
        pass


@contextmanager
def serve(reply: Callable[[dict, int], Reply] = lambda body, number: Reply()):
    """Run a server while a test lasts."""
    server = JudgeServer(reply)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
