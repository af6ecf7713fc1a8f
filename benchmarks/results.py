"""The command line that all benchmarks share, and their results as JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from depthmix.files.versions import find_commit

RESULTS = Path(__file__).parent / "results"


def parse_arguments(
    description: str, name: str, *, threads: int | None = None, **paths: str
) -> argparse.Namespace:
    """Read the command line that all benchmarks share; `paths` are more options and their help."""
    parser = argparse.ArgumentParser(description=description)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="the ratios alone, in under 50 seconds")
    size.add_argument("--toy", action="store_true", help="every part, at a size for tests")
    threads = threads or len(os.sched_getaffinity(0))
    parser.add_argument("--threads", type=int, default=threads)
    parser.add_argument("--output", type=Path, default=RESULTS / f"{name}.json")
    for option, described in paths.items():
        parser.add_argument(f"--{option}", type=Path, help=described)
    return parser.parse_args()


def write_results(arguments: argparse.Namespace, results: dict[str, Any]) -> None:
    """Write results with what made them, and print the ratios."""
    size = "quick" if arguments.quick else "toy" if arguments.toy else "full"
    run = {
        "command": " ".join(["python", *sys.argv]),
        "size": size,
        "device": _device(),
        "threads": arguments.threads,
        "commit": find_commit(Path(__file__)),
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


def fast_dtype() -> str:
    """Name the type that this machine multiplies fastest without losing float32's range."""
    fast = ("amx_bf16", "avx512_bf16")
    described = Path("/proc/cpuinfo").read_text("utf-8")
    fast_here = torch.cuda.is_available() or any(flag in described for flag in fast)
    return "bfloat16" if fast_here else "float32"


def _device() -> str:
    """Name the machine, as far as it matters to the numbers."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    described = Path("/proc/cpuinfo").read_text("utf-8")
    model = described.partition("model name")[2].partition(":")[2].partition("\n")[0].strip()
    fast = [flag for flag in ("amx_bf16", "avx512_bf16", "avx2") if flag in described]
    return f"{model or platform.machine()}, {fast[0] if fast else 'no'} matrix instructions"
