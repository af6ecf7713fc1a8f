"""The page of a lens: one text token by token and layer by layer, for one model or two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from depthmix.data.spec import Template
from depthmix.depth.lens import Lens, Prediction
from depthmix.figures.layers import draw_layers
from depthmix.figures.style import SUFFIXES, save_figure
from depthmix.models.spec import ModelSpec
from depthmix.models.subjects import load_subjects
from depthmix.pages.page import render_page, write_page

SCRIPTS = ("lens_paint.js", "lens_measures.js", "lens_tokens.js", "lens_maps.js", "lens.js")
"""The page's script, in parts that are joined in this order."""

DIGITS = 4
"""Decimals of every number on the page."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """A box on a served page, to type a text into."""

    models: str
    """Names of the models that will read it."""

    text: str = ""
    """What the box holds."""

    error: str = ""
    """Why that could not be read; empty if it could."""


def show_lens(
    models: Sequence[str | Path | ModelSpec],
    text: str,
    *,
    layers: str | Sequence[int] = "all",
    template: Template | None = None,
    tokens: tuple[int, int] | None = None,
    path: Path,
) -> Path:
    """Let models read a text, and write the page, or a figure, about what each depth predicts.

    Args:
        models: One model or two, as `load_model` takes them, whose tokenizers give the same tokens.
        text: What they read.
        layers: Layers to read out: `all`, `late` for those of the models' mixtures, or numbers, as
            text with commas between them.
        template: What stands around the text: nothing (`plain`), Alpaca's words or the chat
            template. By default what the first which is a run was trained with; otherwise `plain`.
        tokens: First and last token that a figure shows, counted from 1; by default all. A page
            always has all.
        path: The file to write, whose suffix says what it is: `.html` for the page, `.svg`, `.png`
            or `.pdf` for layers by tokens as a heat map. Its folder is made if missing.

    Returns:
        The written file.

    Raises:
        ValueError: If the suffix is another, there are no late layers, a layer or text does not fit
            a model, a page is given `tokens`, or the models cannot stand beside each other.
        OSError: If a model cannot be found.
    """
    if path.suffix not in (".html", *SUFFIXES):
        raise ValueError(
            f"`path` must end in .html for the page, or in {', '.join(SUFFIXES)} for a figure, got "
            f"{str(path)!r}; choose one of these."
        )
    if path.suffix == ".html" and tokens is not None:
        raise ValueError(
            f"`tokens` choose a part of a figure, and {path} is a page, which has them all; leave "
            "them out, or write a .svg."
        )
    lenses = load_subjects(models, layers=layers, template=template, drafts=True).look(text)
    if path.suffix == ".html":
        return write_lens(lenses, path)
    return save_figure(draw_layers(lenses, tokens=tokens), path)


def write_lens(lenses: Mapping[str, Lens], path: Path) -> Path:
    """Write lenses as one HTML page that needs no other file and no network.

    Args:
        lenses: One lens or two of the same text, by the name of the model.
        path: The file to write; its folder is made if missing.

    Returns:
        The written file.

    Raises:
        ValueError: If the lenses have different tokens, there is none or more than two, or the page
            would be larger than 5 MB.
    """
    page = render_lens(lenses)
    return write_page(page, path, way_out="read out fewer layers, or a shorter text")


def render_lens(lenses: Mapping[str, Lens], *, form: Form | None = None) -> str:
    """Make the page of a lens.

    Args:
        lenses: As for `write_lens`; with a form, there may be none.
        form: A box to type a text into, for a page that is served; `None` for a page that stands
            alone.

    Returns:
        The page.

    Raises:
        ValueError: As for `write_lens`.
    """
    names = " and ".join(lenses) or (form.models if form is not None else "")
    num_tokens = len(next(iter(lenses.values())).tokens) if lenses else 0
    what = f" on {num_tokens:,} token{'s' * (num_tokens != 1)}" if lenses else ""
    return render_page(
        "lens.html",
        styles=["lens.css"],
        scripts=SCRIPTS if lenses else (),
        title=f"Lens · {names}",
        lead=f"{names}{what}.",
        form=form,
        data=to_page_data({"": lenses}) if lenses or form is None else None,
    )


def to_page_data(passages: Mapping[str, Mapping[str, Lens]]) -> dict[str, Any]:
    """Lay lenses out for the page's script: rounded, and each text once.

    Args:
        passages: Title of each text to its lenses, one or two, by the name of the model. All texts
            have the same models, read out at the same layers.

    Returns:
        What the page's script reads, in JSON's types.

    Raises:
        ValueError: If the lenses of a text have different tokens, there is none or more than two,
            or texts differ in models or layers.
    """
    texts: dict[str, int] = {}
    laid_out = []
    for title, lenses in passages.items():
        if not 1 <= len(lenses) <= 2:
            raise ValueError(
                f"`lenses` must be one or two with names of their own, got {len(lenses)}; write a "
                "page for each pair."
            )
        if len({lens.tokens for lens in lenses.values()}) > 1:
            raise ValueError(
                "`lenses` must have the same tokens, and those of "
                f"{' and '.join(lenses)} differ; write a page for each."
            )
        laid_out.append(
            {
                "title": title,
                "opening": max(1, *(lens.opening for lens in lenses.values())),
                "lenses": [_lay_out(name, lens, texts) for name, lens in lenses.items()],
            }
        )
    shapes = {
        tuple(
            (name, lens.routing is None, *(prediction.readout for prediction in lens.layers))
            for name, lens in lenses.items()
        )
        for lenses in passages.values()
    }
    if len(shapes) != 1:
        raise ValueError(
            "`passages` must be at least one, all with the same models and layers, got "
            f"{len(shapes)} kinds; write a page for each."
        )
    return {"texts": list(texts), "passages": laid_out}


def _lay_out(model: str, lens: Lens, texts: dict[str, int]) -> dict[str, Any]:
    """Lay one lens out; texts that are new get the next number."""

    def place(text: str) -> int:
        return texts.setdefault(text, len(texts))

    def predict(prediction: Prediction) -> dict[str, Any]:
        layer = prediction.readout
        return {
            "name": f"layer {layer}" if isinstance(layer, int) else layer,
            "layer": layer if isinstance(layer, int) else None,
            "ensemble": layer == "ensemble",
            "top": [[place(text) for text in row] for row in prediction.top_tokens],
            "p": [_round(row) for row in prediction.top_probabilities],
            "entropy": _round(prediction.entropy),
            "kl": _round(prediction.kl_to_final),
            "jsd": jsd if (jsd := prediction.jsd_to_ensemble) is None else _round(jsd),
            "loss": _round(prediction.loss),
            "rank": prediction.rank,
        }

    # Without a mixture the model's own prediction is its final layer's, shown once.
    own = (lens.ensemble,) if lens.routing is not None else ()
    routing = lens.routing and {
        "layers": lens.routing.late_layers,
        "weights": [_round(row) for row in lens.routing.weights],
        "entropy": _round(lens.routing.entropy),
        "depth": _round(lens.routing.mean_depth),
    }
    readouts = [predict(prediction) for prediction in (*lens.layers, *own)]
    tokens = [place(text) for text in lens.tokens]
    drafts = lens.drafts and {
        "layers": lens.drafts.layers,
        "tokens": [place(text) for text in lens.drafts.tokens],
        "accepted": lens.drafts.accepted,
    }
    laid_out = {"model": model, "tokens": tokens, "readouts": readouts, "routing": routing}
    return {**laid_out, "drafts": drafts} if drafts else laid_out


def _round(values: Sequence[float]) -> list[float]:
    """Keep the decimals that the page shows."""
    return [round(value, DIGITS) for value in values]
