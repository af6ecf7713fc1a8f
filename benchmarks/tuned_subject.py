"""A tuned model as it generates: merged, with exits, and plans of drafts calibrated here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from answers import Answers, Prompts, Way, answer_by
from peft import PeftModel
from results import rounded
from transformers import GenerationConfig
from tuned_model import TunedModel

from depthmix import FastGeneration, load_exits
from depthmix.adapters.exit_files import find_exits, read_exit_settings
from depthmix.data.records import load_records
from depthmix.decoding.draft_plan import DraftPlan
from depthmix.depth.calibration import expect
from depthmix.depth.calibrator import Calibrator
from depthmix.depth.confidences import Continuation, record_confidences
from depthmix.method.found_exits import find_exits as find_own_exits
from depthmix.method.parts import find_parts
from depthmix.method.placement import to_accelerator
from depthmix.models.asking import greedy
from depthmix.models.loading import load_model, load_tokenizer
from depthmix.models.own_texts import Question, read_questions, write_continuations
from depthmix.models.spec import ModelSpec
from depthmix.models.template import recall_template

TEXTS_UNCHANGED = 0.95
"""Share of the texts that stay the same where nothing verifies."""


@dataclass(eq=False)
class Subject:
    """A tuned model, merged, with its exits."""

    tuned: TunedModel
    """Where it lies."""

    exit_folder: Path | None
    """Where its exits lie; `None` for those that were trained together with it."""

    max_new_tokens: int
    """Tokens of an answer at most."""

    dtype: Any = "float32"
    """Type of its weights."""

    def __post_init__(self) -> None:
        self.spec = ModelSpec(name=str(self.tuned.run), dtype=self.dtype)
        self.tokenizer = load_tokenizer(self.spec)
        self.tokenizer.padding_side = "left"
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        loaded: Any = to_accelerator(load_model(self.spec)).eval()
        self.exits: Any = find_own_exits(loaded)
        self.model: Any = loaded
        if isinstance(loaded, PeftModel):
            self.model = loaded.merge_and_unload().eval()
        if self.exit_folder is not None:
            self.exits = load_exits(self.exit_folder, self.model)
        if self.exits is None:
            raise SystemExit(
                f"This benchmark needs exits, and {self.tuned.run} was not trained with any and "
                f"has none in {self.tuned.exits}; put some on by `python benchmarks/"
                "tuned_model.py`, or name their folder by `--exits`."
            )

    @property
    def config(self) -> GenerationConfig:
        """How it decodes: greedily, up to the end of a text."""
        return greedy(self.model, self.tokenizer, self.max_new_tokens)

    @property
    def device(self) -> Any:
        """Where it is."""
        return self.model.device

    def ask(self, file: Path, places: slice | Sequence[int]) -> list[Question]:
        """Render some of a file's records as the run's own training did."""
        records = load_records(str(file), split="test")
        chosen = records[places] if isinstance(places, slice) else [records[n] for n in places]
        asked = recall_template(self.spec)
        options: dict[str, Any] = {"source": str(file), "variables": asked.variables}
        return read_questions(list(chosen), asked.template, self.tokenizer, **options)

    def calibrate(self, questions: Sequence[Question]) -> Calibrator:
        """Let it answer, and measure what its parts cost here."""
        prompts = [question.prompt for question in questions]
        texts = write_continuations(
            self.model, self.tokenizer, prompts, max_new_tokens=self.max_new_tokens
        )
        return Calibrator(
            backbone=self.backbone,
            exits=self.exits,
            texts=texts,
            answers=[question.answer for question in questions],
        )

    @cached_property
    def backbone(self) -> Any:
        """Its parts."""
        return find_parts(self.model)[0]

    def expected(self, plan: DraftPlan, calibrator: Calibrator, asked: Prompts, seen: Answers):
        """Say what the model of costs expects of a plan on texts that the model wrote.

        Args:
            plan: The plan, whose drafts the top verifies.
            calibrator: It has the costs.
            asked: Prompts.
            seen: The model's own answers to them.

        Returns:
            Speed-up, acceptance and the rest.
        """
        ends = set(self.config.eos_token_id or ())
        texts = [
            Continuation(
                prompt=tuple(prompt), tokens=tuple(tokens), ended=bool(ends & {*tokens[-1:]})
            )
            for prompt, tokens in zip(asked, seen.texts, strict=True)
        ]
        recorded = record_confidences(
            self.backbone, self.exits, texts, vocabularies=[plan.vocabulary]
        )[0]
        layers = self.backbone.num_hidden_layers
        return expect(recorded, plan, calibrator.costs, num_hidden_layers=layers)

    def own_way(self) -> Way:
        """Give its own `generate`."""
        return answer_by(self.model.generate, self.config, device=self.device)

    def fast(self, plan: DraftPlan, *, verify: bool = True, model: Any = None) -> FastGeneration:
        """Let exits draft, for this model or another of its shape."""
        return FastGeneration(model or self.model, self.exits, plan, verify=verify)

    def way_of(self, generator: Any) -> Way:
        """Give the way of something that generates."""
        return answer_by(generator.generate, self.config, device=self.device)

    def about(self) -> dict[str, Any]:
        """Say which model and which exits these are."""
        exits: dict[str, Any] = {"layers": list(self.exits.layers), "rank": self.exits.rank}
        if self.exit_folder is not None:
            exits["sha256"] = read_exit_settings(self.exit_folder)["sha256"]
        return {"model": self.tuned.about, "exits": exits}


def find_exit_folder(tuned: TunedModel, exits: Path | None) -> Path | None:
    """Find the exits that were put on a model: where it is said, or in its folder."""
    return find_exits(exits) or exits if exits else find_exits(tuned.exits)


def describe_plan(plan: DraftPlan) -> dict[str, Any]:
    """Give a plan as JSON has it, with the number of its tokens in their place."""
    values = asdict(replace(plan, vocabulary=None))
    known = plan.vocabulary
    return {**values, "vocabulary": None if known is None else len(known)}


def engine_of(fast: Any) -> dict[str, float]:
    """Say how fast generation went, over all that it has answered."""
    drafted = fast.num_drafted.total()
    values = {
        "acceptance": fast.acceptance_rate,
        "layers_per_token": fast.layers_per_token,
        "drafted": drafted / max(fast.num_steps, 1),
    }
    return rounded(values.items())
