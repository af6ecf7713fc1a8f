"""Writes docs/options.md from the dataclasses that hold the options: `make docs`.

What an option means is its docstring, which is also its help on the command line. Only when to
change it stands here.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trl import SFTConfig

from depthmix.adapters.config import MoDEConfig
from depthmix.data.spec import DataSpec, EvaluationSpec
from depthmix.decoding.draft_plan import DraftPlan
from depthmix.evaluation.conversations import MTBenchSpec
from depthmix.evaluation.judge import JudgeSpec
from depthmix.evaluation.plan import EvaluationPlan
from depthmix.method.presets import PAPER_MODE
from depthmix.models.spec import ModelSpec
from depthmix.training.config import PAPER_TRAINING, RunConfig

PAGE = Path(__file__).parent / "options.md"

INTRODUCTION = """\
# Options

Each option, its default, the paper's value and when to change it. In a file `mode.r` is `r` in the
section `[mode]`, on the command line `--mode.r 16`, in Python an argument of the class. Unknown
options are refused, with the nearest name.

This page is written by `make docs` from the classes themselves. "-" is a value that must be given,
and an empty cell of the paper's is one that it does not speak of. `[mode]` also takes all of PEFT's
[`LoraConfig`](https://huggingface.co/docs/peft/package_reference/lora), `[training]` all of TRL's
[`SFTConfig`](https://huggingface.co/docs/trl/sft_trainer), and `--generation.…` all of
transformers' `GenerationConfig`. Settings to begin with: [start](start.md#settings-to-begin-with).
"""

WHEN = {
    "method": "for the baseline of every comparison",
    "preset": "to replicate, or for speed",
    "model.dtype": "`bfloat16` to halve the memory, `float32` without bfloat16 products",
    "data.template": "to train a plain text model on instructions, or the other way round",
    "data.without": "always, before a published number",
    "data.shuffle": "with `limit`, or where records are sorted",
    "evaluation.metric": "where the line about the metric names another one than you want",
    "evaluation.before": "to save time, once the pretrained model has been measured",
    "evaluation.num_items": "where measuring takes longer than training",
    "evaluation.max_new_tokens": "to the longest answer: measuring is faster for it",
    "mode.late_layers": "`auto` for another model; a list for early exits",
    "mode.top_k": "to see what few routes do; it gives no speed by itself",
    "mode.router_init": "`gaussian` to have all layers take part from the first step",
    "mode.router_input": "to replicate",
    "mode.distillation_weight": "0 to save its cost on long completions",
    "mode.distillation_top_m": "where the loss is on many tokens and the router is spread",
    "mode.distillation_token_share": "where the loss is on many tokens",
    "mode.task_loss": "to see what a layer can do alone",
    "mode.log_layer_losses": "to watch late layers",
    "mode.adapt": "for the comparison with LoRA_all",
    "mode.exits": "rather not: use `add-exits`",
    "mode.final_norm": "where the search fails",
    "mode.decoder_layers": "where the search fails",
    "mode.r": "16 to begin with",
    "mode.lora_alpha": "twice `r` to begin with",
    "mode.target_modules": "`all-linear` to begin with; `[]` for the mixture alone",
    "training.learning_rate": "1e-3 to begin with below 1 B parameters, 3e-4 above",
    "training.per_device_train_batch_size": "less where memory ends, with more accumulation",
    "training.gradient_accumulation_steps": "more where the batch had to be less",
    "training.num_train_epochs": "1 to begin with",
    "training.warmup_steps": "a tenth of all steps to begin with",
    "training.max_length": "where records are longer: what is behind it is cut off",
    "layer": "to read one layer alone",
    "protocol": "to compare with published numbers",
    "num_fewshot": "0 for a model tuned on the task's own text",
}
"""When to change an option, by its name on the command line."""

LORA = {
    "r": "Rank of LoRA's factors.",
    "lora_dropout": "Share of LoRA's inputs that is dropped in training.",
    "target_modules": "Modules that get adapters, by the end of their names; by default those that "
    "PEFT knows for the model.",
}
"""What options of PEFT's mean, in a few words."""

TRAINING = {
    "learning_rate": "The largest rate, reached at the end of the warm-up.",
    "num_train_epochs": "How often each record is read; `max_steps` says it in steps.",
    "warmup_steps": "Steps in which the rate rises; below 1 a share of all steps.",
    "per_device_train_batch_size": "Records that are run together.",
    "gradient_accumulation_steps": "Such batches to an optimiser step.",
    "max_length": "Tokens of a record, of which the rest is cut off.",
}
"""What options of TRL's and transformers' mean, in a few words."""

PAPER_TOO = {"train_late_norms": True, "train_final_norm": False, "task_loss": "ensemble"}
"""The paper's values that are the library's as well, and so in no preset."""

SECTIONS = ("model", "data", "mode", "training", "evaluation")
"""Fields of a run that are sections."""

UNKNOWN = object()


def list_docstrings(owner: type) -> dict[str, str]:
    """Read what stands below the fields of a class and of those that it inherits from."""
    found: dict[str, str] = {}
    for one in reversed([c for c in owner.__mro__ if c.__module__.startswith("depthmix")]):
        body = ast.parse(textwrap.dedent(inspect.getsource(one))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, after in zip(body.body, body.body[1:], strict=False):
            said = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and said:
                found[field.target.id] = " ".join(str(after.value.value).split())
    return found


def show(value: Any) -> str:
    """Write a value as a file takes it."""
    if value is UNKNOWN:
        return ""
    if value is None or value is dataclasses.MISSING:
        return "none" if value is None else "-"
    if isinstance(value, list | tuple | set | frozenset):
        return ", ".join(f"`{one}`" for one in value) or "none"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """The options of one class."""

    title: str
    """Its heading."""

    text: str
    """What stands above it."""

    owner: type
    """The dataclass that holds them."""

    meanings: Mapping[str, str]
    """What each option that is shown means."""

    paper: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """The paper's values."""

    section: str = ""
    """Where the options stand in a run's file."""

    def render(self) -> str:
        """Write heading and table, without columns that would be empty."""
        rows = [["option", "default", "paper", "change it", "what it is"], *self._list_rows()]
        filled = [any(cells[1:]) for cells in zip(*rows, strict=True)]
        rows = [[c for c, shown in zip(row, filled, strict=True) if shown] for row in rows]
        rows.insert(1, ["---"] * sum(filled))
        lines = [f"| {' | '.join(row)} |" for row in rows]
        lines[1] = lines[1].replace(" ", "")
        return "\n".join([f"## {self.title}", "", self.text, "", *lines, ""])

    def _list_rows(self) -> Iterator[list[str]]:
        known = {field.name: field for field in dataclasses.fields(self.owner)}
        for name, meaning in self.meanings.items():
            field, whole = known[name], f"{self.section}.{name}" if self.section else name
            default = field.default
            if default is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            meaning = meaning.replace("|", "\\|").replace("`None`", "none")
            shown = [show(default), show(self.paper.get(name, UNKNOWN))]
            yield [f"`{name}`", *shown, WHEN.get(whole, ""), meaning]


def list_tables() -> Iterator[Table]:
    """List all tables of the page."""
    known = list_docstrings(MoDEConfig)
    run = {k: v for k, v in list_docstrings(RunConfig).items() if k not in SECTIONS}
    yield Table(title="Of a run", text="Outside of all sections.", owner=RunConfig, meanings=run)
    for title, owner, text in (
        ("model", ModelSpec, "Which model."),
        ("data", DataSpec, "What to train on."),
        ("evaluation", EvaluationSpec, "What is measured before and after training."),
    ):
        yield Table(
            title=title, text=text, owner=owner, meanings=list_docstrings(owner), section=title
        )
    own = {k: v for k, v in known.items() if not k.startswith("base_") and k != "lora_alpha"}
    yield Table(
        title="mode",
        text="The mixture's own options, in `MoDEConfig`.",
        owner=MoDEConfig,
        meanings=own,
        paper=PAPER_MODE | PAPER_TOO,
        section="mode",
    )
    yield Table(
        title="mode: LoRA's",
        text="Of PEFT's options, those that matter most.",
        owner=MoDEConfig,
        meanings=LORA | {"lora_alpha": known["lora_alpha"]},
        paper=PAPER_MODE,
        section="mode",
    )
    yield Table(
        title="training",
        text="Of TRL's and transformers' options, those that the paper speaks of.",
        owner=SFTConfig,
        meanings=TRAINING,
        paper=PAPER_TRAINING,
        section="training",
    )
    for title, owner, text in (
        ("evaluate", EvaluationPlan, "Of `depthmix evaluate`, and of `EvaluationPlan`."),
        ("judge", JudgeSpec, "Who rates answers."),
        ("mt_bench", MTBenchSpec, "How a model answers MT-Bench."),
        ("Drafting", DraftPlan, "A `DraftPlan`, which `depthmix calibrate` finds."),
    ):
        yield Table(title=title, text=text, owner=owner, meanings=list_docstrings(owner))


def render() -> str:
    """Write the page."""
    return "\n".join([INTRODUCTION, *(table.render() for table in list_tables())])


if __name__ == "__main__":
    PAGE.write_text(render(), "utf-8")
