"""What a run says of its data: what it trains on, and what it is measured by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from depthmix.options.types import check_number, checked_options

Template = Literal["auto", "plain", "alpaca", "chat"]
"""How a record becomes text."""

TrainingTemplate = Literal[Template, "lm-eval"]
"""How a training record becomes text; `lm-eval` as in its data set's benchmark."""


Metric = Literal["exact_match", "choices", "loss"]
"""How records of one's own are judged: by a generated answer, by the likeliest of given choices, or
by the loss of what training would learn."""


@checked_options
@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """What to train on."""

    train: str
    """JSON, JSONL, CSV or Parquet file, name of a data set of the catalogue, or id of one on the
    hub."""

    eval: str | None = None
    """What to validate on during training, named like `train`; `None` does without."""

    template: TrainingTemplate = "auto"
    """How a record becomes text; `auto` takes `chat` for messages, `alpaca` for instructions and
    prompts as they are. `lm-eval` writes a named data set as its benchmark asks and answers."""

    limit: int | None = None
    """Use this many records from the start of each data set, after `without` and `shuffle`; `None`
    uses all."""

    without: tuple[str, ...] = ()
    """Test sets whose questions are left out of training, as `depthmix audit` takes them; `all`
    stands for every named one at hand."""

    shuffle: int | None = None
    """Seed of a random order of the training records, of which `limit` takes the first; `None`
    keeps theirs."""

    split: str = "train"
    """Split of a named or hub data set to train on; files have none."""

    eval_split: str = "validation"
    """Split of a named or hub data set to validate on; files have none."""


@checked_options
@dataclass(frozen=True, kw_only=True)
class EvaluationSpec:
    """What to measure before and after training."""

    data: str
    """JSON, JSONL, CSV or Parquet file of records, in a form of training records or with `answer`;
    name of a data set of the catalogue, or id of one on the hub."""

    metric: Metric | None = None
    """`exact_match`: generate and compare the answer. `choices`: take the likeliest choice. `loss`:
    nats per token of what training would learn. `None`: `choices` where there are some,
    `exact_match` where every answer is a number or a few words, else `loss`."""

    num_items: int | None = None
    """Use this many records from the start; `None` uses all."""

    before: bool = True
    """Also evaluate the pretrained model, before training."""

    max_new_tokens: int = 128
    """Tokens to generate per answer at most (`exact_match`)."""

    batch_size: int = 16
    """Prompts that are run together."""

    def __post_init__(self) -> None:
        for name in ("num_items", "max_new_tokens", "batch_size"):
            check_number(f"evaluation.{name}", getattr(self, name), at_least=1)
