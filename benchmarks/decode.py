"""What generation costs on a tuned model, beside its peers: prompt by prompt in one process.

The model is that of `tuned_model.py`, merged, in float32. Its exits are calibrated on held-out
problems; others are asked. The classes of the library as it was (`before.py`) take turns in a
process of their own, beside a `generate` there. Other texts are `decode_texts.py`'s.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from answers import (
    Answers,
    Prompts,
    choose_fastest,
    compare,
    count_same,
    split,
    take_turns,
)
from before import COMMIT, find_today, prepare_before
from earlier_classes import earlier_ways
from peers import dense_way, early_exit_ways, lookup_ways
from results import parse_arguments, rounded, write_results
from toy_subject import make_toy
from transformers.utils.logging import disable_progress_bar
from tuned_model import FOLDER, ROOT, find_tuned_model
from tuned_subject import TEXTS_UNCHANGED, Subject, describe_plan, engine_of, find_exit_folder

from depthmix.method.placement import to_accelerator
from depthmix.models.loading import load_model
from depthmix.models.spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is measured."""

    num_prompts: int = 12
    """Prompts that are measured."""

    num_selecting: int = 1
    """Prompts that choose the best setting of a peer."""

    num_others: int = 5
    """Prompts of Alpaca, and prompts for the untuned model."""

    num_calibrating: int = 120
    """Problems that calibrate."""

    batch_sizes: tuple[int, ...] = (4, 8)
    """Sizes of batches beside 1."""

    max_new_tokens: int = 64
    """Tokens of an answer at most."""


SIZES = {
    "full": Size(),
    "quick": Size(
        num_prompts=4, num_selecting=1, num_others=1, num_calibrating=120, batch_sizes=(4,)
    ),
    "toy": Size(
        num_prompts=4, num_selecting=1, num_others=2, num_calibrating=118, max_new_tokens=6
    ),
}


def save_for_earlier(subject: Subject, layers: Sequence[int], folder: Path) -> dict[str, Path]:
    """Save the merged model and its exits' norms, for the process of the earlier library."""
    subject.model.save_pretrained(folder / "merged")
    subject.tokenizer.save_pretrained(folder / "merged")
    norms = {layer: subject.exits.by_layer[str(layer)].norm.state_dict() for layer in layers}
    torch.save(norms, folder / "norms.pt")
    return {"model": folder / "merged", "norms": folder / "norms.pt"}


def describe(found: dict[str, Answers], references: dict[str, str]) -> dict[str, Any]:
    """Say of each way how fast it was, beside its reference."""
    described = {}
    for name, answers in found.items():
        reference = found[references.get(name, "generate")]
        values = compare((reference, answers))
        described[name] = {
            **rounded(values.items()),
            "tokens_per_second": float(f"{answers.tokens_per_second:.4g}"),
            "num_same": count_same(answers, reference),
            "num_texts": len(answers.texts),
        }
    return described


def find_alpaca() -> Path | None:
    """Find prompts of another kind, where the data sets lie for the tests."""
    data = Path(os.environ.get("DEPTHMIX_DATA", ROOT.parent / "shared" / "data"))
    file = data / "alpaca" / "validation.json"
    return file if file.is_file() else None


def measure(subject: Subject, size: Size, *, toy: bool, threads: int) -> dict[str, Any]:
    """Measure all ways on one model."""
    held_out = subject.tuned.held_out
    questions = subject.ask(held_out, slice(0, size.num_prompts + size.num_selecting))
    prompts = [list(question.prompt) for question in questions]
    asked, selecting = prompts[: size.num_prompts], split(prompts[size.num_prompts :], 1)
    print("Calibrating", flush=True)
    calibrator = subject.calibrate(subject.ask(held_out, slice(-size.num_calibrating, None)))
    lossless, lossy = calibrator.choose(), calibrator.choose_unverified(TEXTS_UNCHANGED)
    fast = subject.fast(lossless.plan)
    unverified = subject.fast(lossy.plan, verify=False)
    ways = {
        "generate": subject.own_way(),
        "fast_lossless": subject.way_of(fast),
        "fast_lossy": subject.way_of(unverified),
    }
    settings, batches = {}, {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        side = find_today() if toy else prepare_before()
        options = {"threads": threads, "do_sample": False, "pad_token_id": None}
        for name in ("max_new_tokens", "pad_token_id", "eos_token_id"):
            options[name] = getattr(subject.config, name)
        saved = save_for_earlier(subject, lossless.plan.exits, folder)
        earlier = stack.enter_context(earlier_ways(side, **saved, options=options))
        print("Choosing the peers' settings", flush=True)
        families = {"early_exit": early_exit_ways(subject), "lookup": lookup_ways(subject)}
        speculation = {n: w for n, w in earlier.items() if n.startswith("self_speculation")}
        families |= {"self_speculation": speculation} if speculation else {}
        peers = {"dense": dense_way(subject, saved["model"])}
        for family, choices in families.items():
            settings[family], peers[family] = choose_fastest(choices, selecting)
        alone = {**peers, **ways, "lazy_depth": earlier["lazy_depth"]}
        alone["earlier_generate"] = earlier["generate"]
        references = dict.fromkeys(
            ("self_speculation", "lazy_depth", "earlier_generate"), "earlier_generate"
        )
        for number in (1, *size.batch_sizes):
            print(f"Batches of {number}", flush=True)
            chosen = alone if number == 1 else ways
            batches[number] = take_turns(chosen, split(asked, number))
    print("Other text, and the untuned model", flush=True)
    foreign = measure_foreign(subject, replace(lossless.plan, stay_dense=False), asked, size)
    expected = subject.expected(lossless.plan, calibrator, asked, batches[1]["generate"])
    return {
        "compared": compare_keys(batches, foreign),
        "batches": {n: describe(found, references) for n, found in batches.items()},
        "foreign": {name: describe(found, {}) for name, found in foreign.items()},
        "settings": {n: one.removeprefix("self_speculation, ") for n, one in settings.items()},
        "engine": engine_of(fast),
        "plan": describe_plan(lossless.plan),
        "unverified_plan": describe_plan(lossy.plan),
        "promise": asdict(lossy.promise) if lossy.promise else None,
        "expected": {
            "lossless": asdict(lossless.expected),
            "lossless_here": asdict(expected),
            "lossy": asdict(lossy.expected),
        },
    }


def measure_foreign(
    subject: Subject, plan: Any, asked: Prompts, size: Size
) -> dict[str, dict[str, Answers]]:
    """Draft where calibration has not been: on other text, and with the untuned model."""
    foreign = {}
    alpaca = find_alpaca()
    if alpaca is not None:
        questions = subject.ask(alpaca, slice(0, size.num_others))
        ways = {"generate": subject.own_way(), "fast": subject.way_of(subject.fast(plan))}
        others = [list(question.prompt) for question in questions]
        foreign["alpaca"] = take_turns(ways, split(others, 1))
    name = str(subject.tuned.base)
    base: Any = to_accelerator(load_model(ModelSpec(name=name, dtype="float32"))).eval()
    untuned = subject.fast(plan, model=base)
    ways = {"generate": subject.way_of(base), "fast": subject.way_of(untuned)}
    foreign["untuned"] = take_turns(ways, split(asked[: size.num_others], 1))
    return foreign


def compare_keys(
    batches: dict[int, dict[str, Answers]], foreign: dict[str, dict[str, Answers]]
) -> dict[str, dict[str, float]]:
    """Compute the published ratios, each with its interval."""
    one = batches[1]
    fast = (one["generate"], one["fast_lossless"])
    pairs: dict[str, list[tuple[Answers, Answers]]] = {"fast_posthoc_over_generate": [fast]}
    if "self_speculation" in one:
        earlier = (one["self_speculation"], one["earlier_generate"])
        pairs["fast_lossless_over_today"] = [fast, earlier]
    pairs["fast_lossless_over_early_exit"] = [(one["early_exit"], one["fast_lossless"])]
    four = batches[4]
    pairs["fast_lossless_b4_over_generate"] = [(four["generate"], four["fast_lossless"])]
    pairs["fast_lossy_over_generate"] = [(one["generate"], one["fast_lossy"])]
    compared = {name: compare(*pair) for name, pair in pairs.items()}
    others = [compare((found["generate"], found["fast"])) for found in foreign.values()]
    compared["fast_worst_over_dense"] = min(others, key=lambda values: values["ratio"])
    compared["dense_mode_over_base"] = compare((one["dense"], one["generate"]))
    return {name: rounded(values.items()) for name, values in compared.items()}


def main() -> None:
    """Measure, compare, write."""
    arguments = parse_arguments(
        __doc__ or "",
        "decode",
        threads=1,
        tuned="folder of the tuned model, .tuned by default",
        exits="folder of its exits, by default those in the tuned model's",
    )
    disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    name = "quick" if arguments.quick else "toy" if arguments.toy else "full"
    size = SIZES[name]
    with tempfile.TemporaryDirectory() as folder:
        is_toy = arguments.toy and arguments.tuned is None
        place = arguments.tuned or FOLDER
        try:
            tuned = make_toy(Path(folder)) if is_toy else find_tuned_model(place)
        except FileNotFoundError as error:
            raise SystemExit(str(error)) from None
        exits = find_exit_folder(tuned, arguments.exits)
        subject = Subject(tuned, exits, size.max_new_tokens)
        measured = measure(subject, size, toy=arguments.toy, threads=arguments.threads)
        about, compared = subject.about(), measured.pop("compared")
    results = {
        "before": COMMIT,
        "tuned": about,
        **asdict(size),
        "dtype": "float32",
        "ratios": {key: values["ratio"] for key, values in compared.items()},
        "intervals": {key: [values["low"], values["high"]] for key, values in compared.items()},
    }
    write_results(arguments, {**results, **measured})


if __name__ == "__main__":
    main()
