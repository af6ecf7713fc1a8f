"""Generation by the classes of an earlier library, in a process of its own that takes turns.

The process runs this file by the interpreter of that library's environment (`before.py`), on the
same merged weights, with an attached mixture of the exits' layers and the final one: its late norms
are the exits', its routing is held on the final layer, where a trained router settles, so that it
answers as the model itself does. One line of JSON asks for one batch, and one answers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from answers import Answer, Prompts, Way, answer_by
from before import Side
from torch import Tensor

NUM_DRAFTS = (2, 4)
"""Tokens that `SelfSpeculation` drafts at a time, as they are tried."""


def hold_on_final_layer(mixture: Any) -> None:
    """Give the final layer all of the weight; what routing costs is paid all the same."""
    routed = mixture.weigh

    def weigh(router_input: Tensor) -> Tensor:
        weights = torch.zeros_like(routed(router_input))
        weights[..., -1] = 1
        return weights

    mixture.weigh = weigh


@contextmanager
def earlier_ways(
    side: Side, *, model: Path, norms: Path, options: dict[str, Any]
) -> Iterator[dict[str, Way]]:
    """Start the process, and end it.

    Args:
        side: The earlier library.
        model: Folder of the merged model.
        norms: File with the weights of the exits' norms by layer, of `torch.save`.
        options: `threads`, and fields of the `GenerationConfig`.

    Yields:
        Ways to answer by name: `generate`, `lazy_depth`, and `self_speculation` by its settings,
        where that library has it.
    """
    path = os.pathsep.join([str(side.source / "src"), str(Path(__file__).parent)])
    process = subprocess.Popen(
        [str(side.bin / "python"), __file__, str(model), str(norms), json.dumps(options)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
    )

    def read() -> Any:
        line = process.stdout.readline() if process.stdout else ""
        if not line:
            raise SystemExit("The process of the earlier library has ended; see what it said.")
        return json.loads(line)

    def ask(name: str, prompts: Prompts) -> Answer:
        assert process.stdin
        process.stdin.write(json.dumps([name, prompts]) + "\n")
        process.stdin.flush()
        return Answer(*read())

    try:
        yield {name: partial(ask, name) for name in read()}
    finally:
        with suppress(BrokenPipeError):
            process.stdin and process.stdin.close()
        process.wait()


def serve(model_folder: str, norms_file: str, described: str) -> None:
    """Answer batches until nothing more is asked."""
    said, sys.stdout = sys.stdout, sys.stderr  # whatever else is printed
    options = json.loads(described)
    torch.set_num_threads(options.pop("threads"))
    from transformers import GenerationConfig

    make = partial(answer_by, config=GenerationConfig(**options))
    ways = {name: make(way) for name, way in load_ways(model_folder, norms_file).items()}
    print(json.dumps(list(ways)), file=said, flush=True)
    for line in sys.stdin:
        name, prompts = json.loads(line)
        answer = ways[name](prompts)
        print(json.dumps([answer.seconds, answer.texts]), file=said, flush=True)


def load_ways(model_folder: str, norms_file: str) -> dict[str, Callable[..., Any]]:
    """Load the model twice, alone and with a mixture; give what generates, by name."""
    from transformers import AutoModelForCausalLM

    import depthmix

    load = partial(AutoModelForCausalLM.from_pretrained, model_folder, dtype=torch.float32)
    alone, mixed = load().eval(), load().eval()
    norms = torch.load(norms_file)
    layers = [*norms, mixed.config.num_hidden_layers]
    mixture = depthmix.attach(mixed, late_layers=layers).mixture
    mixed.eval()
    for layer, weights in norms.items():
        mixture.norms[str(layer)].load_state_dict(weights)
    hold_on_final_layer(mixture)
    ways = {"generate": alone.generate, "lazy_depth": depthmix.LazyDepth(mixed).generate}
    speculation = getattr(depthmix, "SelfSpeculation", None)
    for layer in norms if speculation else ():
        for number in NUM_DRAFTS:
            one = speculation(mixed, draft_layer=layer, num_draft_tokens=number)
            ways[f"self_speculation, layer {layer}, {number} drafts"] = one.generate
    return ways


if __name__ == "__main__":
    serve(*sys.argv[1:])
