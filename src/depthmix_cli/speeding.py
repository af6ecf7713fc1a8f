"""Commands that let a finished model answer faster."""

from __future__ import annotations

import sys
from typing import Any, Literal

from depthmix_cli.declarations import part, taking
from depthmix_cli.options import SPEC, Model


@taking(
    (
        "depthmix.models.exits:add_exits",
        *("layers", "rank", "num_steps", "max_length", "seed", "output", "overwrite"),
    ),
    ("depthmix.depth.exit_training:train_exits", "batch_size", "learning_rate", "distillation"),
    (SPEC, "adapter", "dtype"),
)
def add_exits(
    model: Model,
    *,
    data: str,
    eval: str | None = None,
    template: Literal["auto", "plain", "alpaca", "chat", "lm-eval"] = "auto",
    **options: Any,
) -> None:
    """Put exits on a finished model, which draft its tokens; its answers stay as they are.

    It takes minutes on two cores, for a plain model, an adapter, a merged model or one with a
    mixture. For example:

    `depthmix add-exits runs/arc --data train.jsonl`

    Args:
        data: Records to learn from, as `data.train` takes them; best those of the run.
        eval: Records to read the exits on, the first 64 of them; by default the last of `data`,
            which are then not learnt.
        template: How records become text; `auto` takes that of the run's training.
    """
    from depthmix.data.spec import DataSpec
    from depthmix.models.exits import add_exits
    from depthmix.models.spec import ModelSpec

    def say(step: int, losses: dict[int, float]) -> None:
        if step == 1 or step % 10 == 0:
            shown = ", ".join(f"{layer}: {loss:.3f}" for layer, loss in losses.items())
            print(f"step {step}, loss by exit: {shown}", file=sys.stderr)

    spec = ModelSpec(name=model, **part(options, "adapter", "dtype"))
    records = DataSpec(train=data, eval=eval, template=template)
    added = add_exits(spec, records, on_step=say, **options)
    print(added, f"Saved in {added.folder}.", sep="\n")


@taking(
    (
        "depthmix.models.calibrating:calibrate",
        *("exits", "template", "num_texts", "max_new_tokens", "num_measured"),
    ),
    (SPEC, "adapter", "dtype"),
)
def calibrate(
    model: Model,
    *,
    data: str,
    lossy: bool = False,
    texts_unchanged: float | None = None,
    **options: Any,
) -> None:
    """Find out how a model's exits draft best on this machine, and keep that beside them.

    The model answers some of the records by itself. Exits, thresholds and the tokens that may be
    drafted are chosen by one half of these texts; the other half tells what to expect, and then
    both ways to generate are measured. Where it is not worth it, fast generation stays dense. For
    example:

    `depthmix calibrate runs/arc --data held-out.jsonl`

    Args:
        lossy: Choose thresholds for drafts that nothing verifies: faster, and no longer always the
            model's own text.
        texts_unchanged: Share of the texts that is to stay the same with `--lossy`, 0.98 by
            default.
    """
    from depthmix.models.calibrating import calibrate
    from depthmix.models.spec import ModelSpec

    if texts_unchanged is not None and not lossy:
        raise ValueError(
            f"`texts_unchanged` needs `--lossy`, got {texts_unchanged} without it; drafts that the "
            "top verifies change no text."
        )
    share = 0.98 if lossy and texts_unchanged is None else texts_unchanged
    spec = ModelSpec(name=model, **part(options, "adapter", "dtype"))
    print(calibrate(spec, data, texts_unchanged=share, **options))


@taking(
    (
        "depthmix.evaluation.bench:bench",
        *("prompts", "template", "num_prompts", "max_new_tokens", "top_k"),
    ),
    (SPEC, "adapter", "dtype"),
)
def bench(model: Model, **options: Any) -> None:
    """Measure how fast a run generates in each way that it can, on your own prompts.

    Base, merged LoRA, the run as it is, Top-K, fast with and without verification, and prompt
    lookup take turns, prompt by prompt. What the run does not have is left out and said. For
    example:

    `depthmix bench runs/arc --prompts mine.txt`
    """
    from depthmix.evaluation.bench import bench
    from depthmix.models.spec import ModelSpec

    spec = ModelSpec(name=model, **part(options, "adapter", "dtype"))
    print(bench(spec, **options))
