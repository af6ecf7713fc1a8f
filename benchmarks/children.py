"""Children of a benchmark: processes that are killed, or whose disk becomes full."""

from __future__ import annotations

import os
import resource
import signal
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress

NO_ROOM, FAILED = 3, 1
"""Exit codes of a child."""


def spawn(action: Callable[[], None], *, full: tuple[float, int] | None = None) -> tuple[int, int]:
    """Run something in a process group of its own; give its id and a pipe with its last words."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        with suppress(ProcessLookupError, PermissionError):
            os.setpgid(child, child)  # here and there, whichever comes first
        os.close(writing)
        return child, reading
    os.setpgid(0, 0)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    code = 0
    try:
        if full is not None:
            moment, limit = full
            bounds = (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
            timer = threading.Timer(
                moment, resource.setrlimit, args=(resource.RLIMIT_FSIZE, bounds)
            )
            timer.daemon = True
            timer.start()
        action()
    except OSError as error:
        code = NO_ROOM if "must be a place with room" in str(error) else FAILED
        os.write(writing, traceback.format_exc()[-3000:].encode())
    except BaseException:
        code = FAILED
        os.write(writing, traceback.format_exc()[-3000:].encode())
    os._exit(code)


def finish(child: int, pipe: int, *, kill_after: float | None = None) -> tuple[int | None, str]:
    """Wait for a child, or kill it; None stands for a killed one."""
    began = time.perf_counter()
    killed = False
    while True:
        ended, status = os.waitpid(child, os.WNOHANG if kill_after is not None else 0)
        if ended:
            break
        left = kill_after - (time.perf_counter() - began) if kill_after is not None else 0.0
        if left <= 0:
            os.killpg(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            killed = os.WIFSIGNALED(status)
            break
        time.sleep(min(left, 0.005))
    words = os.read(pipe, 4096).decode(errors="replace")
    os.close(pipe)
    return (None if killed else os.waitstatus_to_exitcode(status)), words
