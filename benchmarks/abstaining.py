"""Do exits know when the model is wrong? How well confidences tell right answers from wrong ones.

The tuned model of `tuned_model.py` answers held-out word problems, greedily and in float32. Each
confidence in its answer is judged by the area under its ROC curve (AUROC): the chance that a right
answer has a higher one than a wrong answer, 0.5 for a coin. Two are the final layer's own, the
others are read off exits that were put on the finished model: how often they say the same token as
the final layer, and how sure they are of it. All were fixed before any was looked at; those of
single exits stand beside them. Intervals are a bootstrap's over answers.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from results import parse_arguments, rounded, write_results
from scipy.stats import rankdata
from torch import Tensor
from toy_subject import make_toy
from transformers.utils.logging import disable_progress_bar
from tuned_model import FOLDER, NUM_HELD_OUT, TunedModel, find_tuned_model
from tuned_subject import find_exit_folder

from depthmix import load_exits, load_model, load_tokenizer
from depthmix.adapters.exit_files import read_exit_settings
from depthmix.data.records import load_records
from depthmix.depth.capture_all import capture_all
from depthmix.depth.confidences import Continuation
from depthmix.method.backbone import Backbone
from depthmix.method.exits import Exits
from depthmix.method.parts import find_parts
from depthmix.models.own_texts import read_questions, write_continuations
from depthmix.models.spec import ModelSpec
from depthmix.models.template import recall_template

NUM_RESAMPLES = 2000
SEED = 0
LEAST = 1e-12
"""Probability below which an exit's is not counted, so that one token cannot decide a mean."""

OWN = ("final_mean", "final_least")
"""The final layer's own confidences: the mean log-probability of its tokens, and the least one."""


def area_under_roc(scores: Float[np.ndarray, " answers"], right: Bool[np.ndarray, " answers"]):
    """Give the chance that a right answer has a higher score than a wrong one, ties counting half.

    It is the statistic of Mann and Whitney, by ranks; `nan` where all answers are of one kind.
    """
    num_right, num_wrong = int(right.sum()), int((~right).sum())
    if not num_right or not num_wrong:
        return np.nan
    ranks = rankdata(scores)[right].sum()
    return float((ranks - num_right * (num_right + 1) / 2) / (num_right * num_wrong))


def bootstrap(
    scores: Float[np.ndarray, " answers"],
    right: Bool[np.ndarray, " answers"],
    *,
    against: Float[np.ndarray, " answers"] | None = None,
) -> list[float]:
    """Give a 95 % interval over answers, of an area or of its difference to another score's."""
    generator, drawn = np.random.default_rng(SEED), []
    for _ in range(NUM_RESAMPLES):
        rows = generator.integers(len(right), size=len(right))
        area = area_under_roc(scores[rows], right[rows])
        if against is not None:
            area -= area_under_roc(against[rows], right[rows])
        drawn.append(area)
    return [float(f"{end:.4g}") for end in np.nanquantile(drawn, (0.025, 0.975))]


@torch.inference_mode()
def read_answer(backbone: Backbone, exits: Exits, text: Continuation) -> dict[str, float]:
    """Give every confidence in an answer, from one pass over prompt and answer."""
    captured = capture_all(
        backbone, torch.tensor([[*text.prompt, *text.tokens]]), depths=exits.layers
    )
    chosen = torch.tensor(text.tokens)[:, None]

    def predict(states: Float[Tensor, "1 seq hidden"]) -> Float[Tensor, "tokens vocab"]:
        normed = states[0, len(text.prompt) - 1 : -1]
        return backbone.unembed(normed.to(backbone.head_dtype(normed.dtype))).float().softmax(-1)

    final = predict(captured.answer).gather(-1, chosen)
    found = {"final_mean": float(final.log().mean()), "final_least": float(final.min())}
    agreements, confidences = [], []
    for layer in exits.layers:
        probabilities = predict(exits(layer, captured.states[layer]))
        agreements.append((probabilities.argmax(-1, keepdim=True) == chosen).float())
        confidences.append(probabilities.gather(-1, chosen).clamp_min(LEAST))
        found[f"exit_{layer}_agreement"] = float(agreements[-1].mean())
        found[f"exit_{layer}_least"] = float(confidences[-1].min())
    found["exits_agreement"] = float(torch.stack(agreements).mean())
    found["exits_mean"] = float(torch.stack(confidences).log().mean())
    found["exits_and_final"] = found["exits_mean"] + found["final_mean"]
    return found


def answer(
    tuned: TunedModel, exit_folder: Path | None, number: int, max_new_tokens: int
) -> tuple[list[dict[str, float]], list[bool]]:
    """Let the model answer, and give each answer's confidences and whether it is right."""
    spec = ModelSpec(name=str(tuned.run), dtype="float32")
    tokenizer, loaded = load_tokenizer(spec), load_model(spec)
    model: Any = loaded
    model = model.merge_and_unload().eval()
    if exit_folder is None:
        raise SystemExit(
            f"This benchmark needs exits, and there are none in {tuned.exits}; put some on by "
            "`python benchmarks/tuned_model.py`, or name their folder by `--exits`."
        )
    exits, (backbone, _) = load_exits(exit_folder, model), find_parts(model)
    records = load_records(str(tuned.held_out), split="test")[:number]
    template = recall_template(spec)
    questions = read_questions(records, template.template, tokenizer, source=str(tuned.held_out))
    prompts = [question.prompt for question in questions]
    texts = write_continuations(model, tokenizer, prompts, max_new_tokens=max_new_tokens)
    scores = [read_answer(backbone, exits, text) for text in texts]
    ends = [tokenizer.decode(text.tokens, skip_special_tokens=True).split()[-1:] for text in texts]
    right = [
        end == record["completion"].split()[-1:] for end, record in zip(ends, records, strict=True)
    ]
    return scores, right


def judge(scores: Sequence[dict[str, float]], right: Sequence[bool]) -> dict[str, Any]:
    """Say how well each confidence tells right from wrong, alone and beside the model's own best.

    Args:
        scores: Confidences by name, of each answer.
        right: Whether it is right.
    """
    kinds = np.asarray(right, dtype=bool)
    found: dict[str, Any] = {"num_answers": len(kinds), "accuracy": float(kinds.mean())}
    if kinds.all() or not kinds.any():
        return {**found, "ratios": {}}  # nothing tells them apart
    by_name = {name: np.array([score[name] for score in scores]) for name in scores[0]}
    areas = {name: area_under_roc(values, kinds) for name, values in by_name.items()}
    own = max(OWN, key=areas.__getitem__)
    return {
        **found,
        "own": own,
        "intervals": {name: bootstrap(values, kinds) for name, values in by_name.items()},
        "differences": {
            name: [
                float(f"{areas[name] - areas[own]:.4g}"),
                *bootstrap(values, kinds, against=base),
            ]
            for base in (by_name[own],)
            for name, values in by_name.items()
            if name != own
        },
        "ratios": rounded((f"auroc_{name}", area) for name, area in areas.items()),
    }


def main() -> None:
    """Answer, read, judge, write."""
    arguments = parse_arguments(
        __doc__ or "",
        "abstaining",
        threads=1,
        tuned="folder of the tuned model, .tuned by default",
        exits="folder of its exits, by default those in the tuned model's",
    )
    disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    number = 8 if arguments.toy else 60 if arguments.quick else NUM_HELD_OUT
    max_new_tokens = 4 if arguments.toy else 64
    with tempfile.TemporaryDirectory() as folder:
        is_toy = arguments.toy and arguments.tuned is None
        try:
            tuned = (
                make_toy(Path(folder)) if is_toy else find_tuned_model(arguments.tuned or FOLDER)
            )
        except FileNotFoundError as error:
            raise SystemExit(str(error)) from None
        exits = find_exit_folder(tuned, arguments.exits)
        scores, right = answer(tuned, exits, number, max_new_tokens)
        about = read_exit_settings(exits or tuned.exits)
    judged = judge(scores, right)
    if not judged["ratios"] and not arguments.toy:
        raise SystemExit("All answers are right, or all are wrong, so nothing tells them apart.")
    model = {"model": tuned.about, "exits": {name: about[name] for name in ("layers", "sha256")}}
    write_results(arguments, {"tuned": model, "dtype": "float32", **judged})


if __name__ == "__main__":
    main()
