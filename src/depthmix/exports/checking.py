"""Whether an export is the run that it was made of: both asked the same, the export by others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from depthmix.data.rendering import encode
from depthmix.exports import fresh_reading, modeling_depthmix
from depthmix.exports.fresh_reading import read

TEXTS = (
    "The capital of France is",
    "Question: Tom has 3 boxes with 12 pencils each and gives 7 away. How many are left?\nAnswer:",
    "def add(a, b):\n    return",
)
"""What both are asked."""

NUM_TOKENS = 32
"""Greedy tokens that are compared per text."""

TOLERANCES = {torch.float32: 1e-4, torch.float16: 3e-3, torch.bfloat16: 2e-2}
"""By how much logits may differ for each type of stored weights, as a share of the largest: what
rounding the merged weights to it may do."""


@dataclass(frozen=True)
class Reference:
    """What a run says, in float32."""

    prompts: list[list[int]]
    """Token ids of what it was asked."""

    tokens: Tensor
    """Its greedy continuations, (prompts, new)."""

    logits: list[Tensor]
    """What predicts them, each (new, vocab)."""

    pad_token_id: int
    """What pads prompts."""


@dataclass(frozen=True, kw_only=True)
class ExportCheck:
    """How far an export is from its run; `str` makes a line of it."""

    engine: str
    """What loaded the export."""

    logit_difference: float
    """Largest difference of two logits."""

    largest_logit: float
    """Largest logit of the run, as a measure for it."""

    tolerance: float
    """Largest difference that rounding explains."""

    num_tokens: int
    """Greedy tokens that were compared."""

    num_equal: int
    """Those that are the run's, up to the first other one of each text."""

    gap: float
    """By how much the run preferred its own token where the export took another first; 0 where it
    never did."""

    @property
    def is_right(self) -> bool:
        """Whether rounding explains all that is different."""
        return self.logit_difference <= self.tolerance and self.gap <= 2 * self.tolerance

    def __str__(self) -> str:
        tie = ""
        if self.num_equal < self.num_tokens:
            tie = f" (where they part, the run's own two best were {self.gap:.2g} apart)"
        return (
            f"Loaded anew in a process of its own by {self.engine}: logits differ from the run's "
            f"by at most {self.logit_difference:.2g} of {self.largest_logit:.3g}, where "
            f"{self.tolerance:.2g} is allowed, and {self.num_equal} of {self.num_tokens} greedy "
            f"tokens are the run's{tie}."
        )


def ask_run(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str] = TEXTS
) -> Reference:
    """Ask a run what its export is to say.

    Args:
        model: The run, in float32, at the depth that is exported.
        tokenizer: Its own.
        texts: What it is asked.

    Returns:
        Its answers.
    """
    prompts = [list(encode(text, tokenizer)) for text in texts]
    pad = tokenizer.pad_token_id
    assert isinstance(pad, int)  # `load_tokenizer` sees to it
    found = read(model.eval(), prompts=prompts, pad_token_id=pad, num_tokens=NUM_TOKENS)
    logits = [found[f"logits_{number}"] for number in range(len(prompts))]
    return Reference(prompts, found["tokens"], logits, pad)


def ask_folder(reference: Reference, folder: Path, form: str) -> dict[str, Tensor]:
    """Load an export in a fresh process, and ask it what the run was asked.

    Args:
        reference: What the run says.
        folder: The export.
        form: Its form.

    Returns:
        As `fresh_reading.read` gives it.

    Raises:
        RuntimeError: If the export cannot be loaded.
    """
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        request = {
            "folder": str(folder.resolve()),
            "form": form,
            "code": modeling_depthmix.__file__,
            "prompts": reference.prompts,
            "continuations": reference.tokens.tolist(),
            "pad_token_id": reference.pad_token_id,
            "answer": str(place / "answer.safetensors"),
        }
        (place / "request.json").write_text(json.dumps(request), "utf-8")
        # Code that comes with a model is copied there before it runs.
        environment = {**os.environ, "HF_MODULES_CACHE": str(place / "modules")}
        command = [sys.executable, "-P", fresh_reading.__file__, str(place / "request.json")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            lines = done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"]
            raise RuntimeError(
                f"`form` {form!r} was written and cannot be loaded by transformers in a process of "
                f"its own ({lines[-1]}), so nothing is kept of it; take another form."
            )
        return load_file(place / "answer.safetensors")


def compare(reference: Reference, answer: dict[str, Tensor], dtype: torch.dtype) -> ExportCheck:
    """Compare what an export says with what its run does.

    Args:
        reference: What the run says.
        answer: What the export says, from `ask_folder`.
        dtype: Type of the export's stored weights.

    Returns:
        The comparison. A token that is another one is set against how far apart the run had the two
        where they part; what follows is another text.
    """
    import transformers

    largest = max(float(logits.abs().max()) for logits in reference.logits)
    differences, gap, num_equal = [], 0.0, 0
    for number, logits in enumerate(reference.logits):
        differences.append(float((answer[f"logits_{number}"] - logits).abs().max()))
        same = (answer["tokens"][number] == reference.tokens[number]).long().cumprod(0)
        num_same = int(same.sum())
        num_equal += num_same
        if num_same < same.numel():
            own, other = reference.tokens[number, num_same], answer["tokens"][number, num_same]
            gap = max(gap, float(logits[num_same, own] - logits[num_same, other]))
    return ExportCheck(
        engine=f"transformers {transformers.__version__}",
        logit_difference=max(differences),
        largest_logit=largest,
        tolerance=TOLERANCES[dtype] * largest,
        num_tokens=reference.tokens.numel(),
        num_equal=num_equal,
        gap=gap,
    )


def check_right(check: ExportCheck, form: str) -> None:
    """Refuse an export that is another model than its run.

    Args:
        check: The comparison.
        form: Its form.

    Raises:
        RuntimeError: If it is.
    """
    if not check.is_right:
        raise RuntimeError(
            f"`form` {form!r} was written and is another model than the run, so nothing is kept of "
            f"it; take another form. {check}"
        )


def describe(reference: Reference, answer: dict[str, Tensor]) -> dict[str, Any]:
    """Write down what an export says, so that any engine can be held to it.

    Args:
        reference: What the run says.
        answer: What the export says, from `ask_folder`.

    Returns:
        In JSON's types: `prompts`, the run's greedy `tokens` and the `logprobs` that the export
        gives these in float32.
    """
    log_probs = [
        answer[f"logits_{number}"].log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1).tolist()
        for number, tokens in enumerate(reference.tokens)
    ]
    return {
        "prompts": reference.prompts,
        "tokens": reference.tokens.tolist(),
        "logprobs": log_probs,
    }
