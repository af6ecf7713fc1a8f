"""Time and peak memory of versions of one computation, by turns, each in its own process."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median, quantiles
from typing import Any

# Asked in the plain way, CUDA could not be used in processes forked afterwards.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

import torch
import torch._inductor.compile_fx  # once, for all processes: what compiling imports takes seconds

MIB = 2**20

Build = Callable[[], Callable[[], None]]
"""Makes a computation, ready to run."""


@dataclass(frozen=True)
class Measurement:
    """What one version took, turn by turn."""

    seconds: list[float]
    """Wall time of each turn."""

    peak_mib: list[float]
    """Highest memory of each turn above its start, in MiB."""

    def summary(self) -> dict[str, float]:
        """Give median and 20/80 percentiles of time, and the median peak."""
        low, *_, high = quantiles([*self.seconds] * 2, n=5, method="inclusive")
        return {
            "seconds": median(self.seconds),
            "seconds_p20": low,
            "seconds_p80": high,
            "peak_mib": median(self.peak_mib),
        }


def measure(
    versions: dict[str, Build],
    *,
    rounds: int,
    threads: int,
    limits: dict[str, int] | None = None,
    warm_ups: int = 1,
    cold: tuple[str, ...] = (),
) -> dict[str, Measurement]:
    """Run every version in turn, round after round, after turns that do not count.

    The processes are forked, so this one must not have computed anything with torch.

    Args:
        versions: Computations by name.
        rounds: Turns of each version.
        threads: Threads of each process.
        limits: Versions that get fewer turns, because they are slow.
        warm_ups: Turns that do not count.
        cold: Versions whose first turn counts, because they have nothing to warm up.

    Returns:
        Measurements by name; a version that cannot run here is reported on stderr and left out.
    """
    context = multiprocessing.get_context("fork")
    gc.freeze()  # what was imported is never garbage, and looking at it in every process is slow
    pipes: dict[str, Connection] = {}
    processes = {}
    for name, build in versions.items():
        pipes[name], theirs = context.Pipe()
        processes[name] = context.Process(target=_work, args=(theirs, build, threads), daemon=True)
        processes[name].start()
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in pipes}

    def ask(name: str, what: str) -> None:
        """Have a version take its turn, and drop it if it cannot."""
        if name not in turns:
            return
        pipes[name].send(what)
        while not pipes[name].poll(1):  # a process that is killed for its memory says nothing
            if not processes[name].is_alive():
                raise RuntimeError(f"The process of {name} has died; is there too little memory?")
        answer = pipes[name].recv()
        if "error" in answer:
            print(f"{name} cannot run here: {answer['error']}", file=sys.stderr)
            del turns[name]
        elif what == "count":
            turns[name].append(answer)

    for name in pipes:  # one after the other, undisturbed
        for what in ("build", *["warm"] * (0 if name in cold else warm_ups)):
            ask(name, what)
    for turn in range(rounds):
        for name in pipes:
            if turn < (limits or {}).get(name, rounds):
                ask(name, "count")
    for name, pipe in pipes.items():
        pipe.send(None)
        processes[name].join()
    return {
        name: Measurement([turn["seconds"] for turn in own], [turn["peak_mib"] for turn in own])
        for name, own in turns.items()
    }


def ratio(measured: dict[str, Measurement], version: str, baseline: str) -> dict[str, float]:
    """Compare two versions that were measured side by side: median of the turns' ratios."""
    ours, theirs = measured[version], measured[baseline]
    times = [a / b for a, b in zip(ours.seconds, theirs.seconds, strict=False)]
    return {
        "time": median(times),
        "memory": median(ours.peak_mib) / max(median(theirs.peak_mib), 1e-9),
    }


def _work(pipe: Connection, build: Build, threads: int) -> None:
    """Serve turns until told to stop."""
    torch.set_num_threads(threads)
    step: Callable[[], None] = lambda: None  # noqa: E731
    while (what := pipe.recv()) is not None:
        try:
            if what == "build":
                step = build()
            pipe.send({} if what == "build" else _take_turn(step))
            _trim()
        except Exception as error:  # the version is reported as one that cannot run
            pipe.send({"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"})


def _take_turn(step: Callable[[], None]) -> dict[str, float]:
    """Run once; give seconds, and the peak of memory above what was held before."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "peak_mib": (torch.cuda.max_memory_allocated() - held) / MIB}
    Path("/proc/self/clear_refs").write_text("5", "ascii")  # forgets the peak of earlier turns
    held = _memory("VmRSS")
    start = time.perf_counter()
    step()
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_mib": _memory("VmHWM") - held}


def _trim() -> None:
    """Give freed memory back: others need it, and it would hide what the next turn takes."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _memory(name: str) -> float:
    """Read this process's memory in MiB."""
    status = Path("/proc/self/status").read_text("ascii")
    return int(status.partition(f"{name}:")[2].split()[0]) / 1024
