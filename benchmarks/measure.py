"""Time and peak memory of versions of one computation, by turns, each in its own process."""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median, quantiles
from typing import Any

# Asked in the plain way, CUDA could not be used in processes forked afterwards.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

import torch
import torch._inductor.compile_fx  # once, for all processes: what compiling imports takes seconds

RESULTS = Path(__file__).parent / "results"
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
        low, *_, high = quantiles(self.seconds, n=5) if len(self.seconds) > 1 else self.seconds * 2
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
    cold: tuple[str, ...] = (),
) -> dict[str, Measurement]:
    """Run every version in turn, round after round, after one turn that does not count.

    The processes are forked, so this one must not have computed anything with torch.

    Args:
        versions: Computations by name.
        rounds: Turns of each version.
        threads: Threads of each process.
        limits: Versions that get fewer turns, because they are slow.
        cold: Versions whose first turn counts, because they have nothing to warm up.

    Returns:
        Measurements by name; a version that cannot run here is reported on stderr and left out.
    """
    context = multiprocessing.get_context("fork")
    gc.freeze()  # what was imported is never garbage, and looking at it in every process is slow
    pipes: dict[str, Connection] = {}
    for name, build in versions.items():
        pipes[name], theirs = context.Pipe()
        context.Process(target=_work, args=(theirs, build, threads), daemon=True).start()
    for name in list(pipes):  # built and warmed up one after the other, undisturbed
        answer = _ask(pipes[name], "build")
        if "error" not in answer and name not in cold:
            answer = _ask(pipes[name], "run")
        if "error" in answer:
            print(f"{name} cannot run here: {answer['error']}", file=sys.stderr)
            pipes.pop(name).send(None)
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in pipes}
    for turn in range(rounds):
        for name, pipe in pipes.items():
            if turn < (limits or {}).get(name, rounds):
                turns[name].append(_ask(pipe, "run"))
    for pipe in pipes.values():
        pipe.send(None)
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


def _ask(pipe: Connection, what: str) -> dict[str, Any]:
    pipe.send(what)
    return pipe.recv()


def _work(pipe: Connection, build: Build, threads: int) -> None:
    """Serve turns until told to stop."""
    torch.set_num_threads(threads)
    step: Callable[[], None] = lambda: None  # noqa: E731
    while (what := pipe.recv()) is not None:
        try:
            if what == "build":
                step = build()
            pipe.send({} if what == "build" else _take_turn(step))
        except Exception as error:  # the version is reported as one that cannot run
            pipe.send({"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"})


def _take_turn(step: Callable[[], None]) -> dict[str, float]:
    """Run once; give seconds, and the peak of memory above what was held before."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "peak_mib": (torch.cuda.max_memory_allocated() - held) / MIB}
    ctypes.CDLL(None).malloc_trim(0)  # or what earlier turns left would hide what this one takes
    Path("/proc/self/clear_refs").write_text("5", "ascii")  # forgets the peak of earlier turns
    held = _memory("VmRSS")
    start = time.perf_counter()
    step()
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_mib": _memory("VmHWM") - held}


def _memory(name: str) -> float:
    """Read this process's memory in MiB."""
    status = Path("/proc/self/status").read_text("ascii")
    return int(status.partition(f"{name}:")[2].split()[0]) / 1024


def parse_arguments(description: str, name: str) -> argparse.Namespace:
    """Read the command line that all benchmarks share."""
    parser = argparse.ArgumentParser(description=description)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="the ratios alone, in under 50 seconds")
    size.add_argument("--toy", action="store_true", help="every part, at a size for tests")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--output", type=Path, default=RESULTS / f"{name}.json")
    return parser.parse_args()


def write_results(arguments: argparse.Namespace, results: dict[str, Any]) -> None:
    """Write results with what made them, and print the ratios."""
    size = "quick" if arguments.quick else "toy" if arguments.toy else "full"
    run = {
        "command": " ".join(["python", *sys.argv]),
        "size": size,
        "device": _device(),
        "threads": arguments.threads,
        "commit": _git("rev-parse", "HEAD") + ("+" if _git("status", "--porcelain") else ""),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**run, **results}, indent=1) + "\n"
    arguments.output.write_text(text, "utf-8")
    for key, value in results["ratios"].items():
        print(f"{key:50} {value:.3f}")
    print(f"Written to {arguments.output}.")


def rounded(values: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Keep four significant digits."""
    return {name: float(f"{value:.4g}") for name, value in values}


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    described = Path("/proc/cpuinfo").read_text("utf-8")
    model = described.partition("model name")[2].partition(":")[2].partition("\n")[0].strip()
    fast = [flag for flag in ("amx_bf16", "avx512_bf16", "avx2") if flag in described]
    return f"{model or platform.machine()}, {fast[0] if fast else 'no'} matrix instructions"


def _git(*arguments: str) -> str:
    answer = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    return answer.stdout.strip()
