"""Read an export as somebody without depthmix does: `python fresh_reading.py request.json`.

This file runs in a process of its own and imports nothing of depthmix. It writes the logits and the
greedy tokens of the model in a folder, loaded by plain transformers.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(request: Path) -> None:
    """Do what a request asks for.

    Args:
        request: JSON file with the `folder`, its `form`, where the `code` of the mixture is, the
            `prompts` and `continuations` as token ids, and the file for the `answer`.
    """
    asked = json.loads(request.read_text("utf-8"))
    folder = Path(asked["folder"])
    trusted = asked["form"] == "transformers"
    if asked["form"] == "vllm":
        model = load_for_vllm(folder, Path(asked["code"]))
    else:
        model = AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=trusted, dtype=torch.float32
        )
    AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted)
    save_file(read(model.eval(), **{name: asked[name] for name in READ}), asked["answer"])
    assert not any(name.partition(".")[0] == "depthmix" for name in sys.modules)


READ = ("prompts", "continuations", "pad_token_id")
"""What `read` takes of a request."""


@torch.no_grad()
def read(
    model: Any,
    *,
    prompts: list[list[int]],
    continuations: list[list[int]] | None = None,
    pad_token_id: int,
    num_tokens: int | None = None,
) -> dict[str, Tensor]:
    """Read prompts with their continuations one by one, and go on from the prompts as one batch.

    Args:
        model: A causal language model.
        prompts: Token ids.
        continuations: What follows each; `None` takes what the model itself says, prompt by prompt.
        pad_token_id: What stands to the left of shorter prompts.
        num_tokens: Length of the continuations where they are not given.

    Returns:
        `tokens`, (prompts, new), and for each prompt `logits_<number>`, (new, vocab), float32: what
        predicts each token of its continuation.
    """
    found: dict[str, Tensor] = {}
    if continuations is None:
        assert num_tokens is not None
        alone = [go_on(model, [prompt], num_tokens, pad_token_id)[0] for prompt in prompts]
        continuations = [row.tolist() for row in alone]
        found["tokens"] = torch.stack(alone)
    else:
        found["tokens"] = go_on(model, prompts, len(continuations[0]), pad_token_id)
    for number, (prompt, rest) in enumerate(zip(prompts, continuations, strict=True)):
        input_ids = torch.tensor([prompt + rest], device=model.device)
        logits = model(input_ids=input_ids, use_cache=False).logits[0]
        found[f"logits_{number}"] = logits[len(prompt) - 1 : -1].float().cpu().contiguous()
    return found


def go_on(model: Any, prompts: list[list[int]], num_tokens: int, pad_token_id: int) -> Tensor:
    """Generate greedily over a cache, shorter prompts padded on the left."""
    longest = max(map(len, prompts))
    rows = [[pad_token_id] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    output = model.generate(
        input_ids=torch.tensor(rows, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        pad_token_id=pad_token_id,
    )
    return output[:, longest:].cpu().contiguous()


def load_for_vllm(folder: Path, code: Path) -> Any:
    """Load the ordinary model in a folder for vLLM, and put the mixture beside it there on it."""
    spec = importlib.util.spec_from_file_location("modeling_depthmix", code)
    assert spec is not None
    assert spec.loader is not None  # it is a Python file
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with tempfile.TemporaryDirectory() as name:
        twin = Path(name)
        for path in folder.iterdir():
            (twin / path.name).symlink_to(path.resolve())
        config = json.loads((folder / "config.json").read_text("utf-8"))
        settings = config.pop("mixture_of_depths")
        config["model_type"] = config.pop("base_model_type")
        config["architectures"] = [config["architectures"][0].removeprefix("Depthmix")]
        (twin / "config.json").unlink()
        (twin / "config.json").write_text(json.dumps(config), "utf-8")
        model = AutoModelForCausalLM.from_pretrained(twin, dtype=torch.float32)
    final_norm = model.get_submodule(settings["final_norm"])
    mixture = module.Mixture(settings, final_norm, model.config.hidden_size)
    weights = load_file(folder / "mixture.safetensors")
    mixture.load_state_dict({n.removeprefix("mixture."): value for n, value in weights.items()})
    mixture.watch(model.get_submodule(settings["decoder_layers"]), final_norm)
    return model


if __name__ == "__main__":
    main(Path(sys.argv[1]))
