"""What predicts at layers below the top, and whether it fits a model."""

from __future__ import annotations

import warnings
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor, nn

from depthmix.decoding.draft_plan import DraftPlan
from depthmix.method.backbone import Backbone
from depthmix.method.fingerprint import TOLERANCE, Fingerprint
from depthmix.method.found_exits import find_exits
from depthmix.method.norm import MixtureNorm, explain_no_mixture, find_mixture_norm


@runtime_checkable
class Predictor(Protocol):
    """What predicts at layers below the top: trained exits, or a mixture's own late layers."""

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers that it predicts at, increasing."""
        ...

    def __call__(
        self, layer: int, hidden_states: Float[Tensor, "*batch hidden"]
    ) -> Float[Tensor, "*batch hidden"]:
        """Give what the head takes, from the residual stream that a layer leaves."""
        ...


class LateLayers:
    """A mixture's late layers below the final one, each of which predicts by its own norm.

    Args:
        norm: The mixture in its place.
    """

    def __init__(self, norm: MixtureNorm) -> None:
        self.norm = norm
        mixture = norm.active_mixture
        self.layers: tuple[int, ...] = mixture.late_layers[:-1] if mixture is not None else ()

    def __call__(
        self, layer: int, hidden_states: Float[Tensor, "*batch hidden"]
    ) -> Float[Tensor, "*batch hidden"]:
        """Give `N_i(h_i)`."""
        return self.norm.answer_alone(layer, hidden_states[..., None, :]).squeeze(-2)


def find_predictor(model: nn.Module) -> Predictor:
    """Find what drafts for a model where nothing is said.

    Args:
        model: With exits that it was trained with, or a mixture whose late layers draft.

    Raises:
        ValueError: If it has neither.
    """
    trained = find_exits(model)
    if trained is not None:
        return trained
    norm = find_mixture_norm(model)
    if norm is None or norm.active_mixture is None:
        raise ValueError(
            "`exits` must be given for a model without a mixture of depths, which has no layer "
            f"to draft with ({explain_no_mixture(model)}); put some on by "
            "`depthmix add-exits`, and load them by `load_exits`."
        )
    late = LateLayers(norm)
    if not late.layers:
        raise ValueError(
            "`exits` must be given for a mixture of the final layer alone, which has no other "
            "to draft with; put some on by `depthmix add-exits`, and load them by `load_exits`."
        )
    return late


def check_exits(exits: Predictor, backbone: Backbone) -> None:
    """Refuse exits that were made for a model of another shape.

    Args:
        exits: What is to draft.
        backbone: The model's parts.

    Raises:
        ValueError: If depth or width is another one.
    """
    for name in ("num_hidden_layers", "hidden_size"):
        own, given = getattr(backbone, name), getattr(exits, name, None)
        if given not in (None, own):
            raise ValueError(
                f"`exits` must be made for a model like this one, with {own} as its `{name}`, "
                f"got exits for {given}; put new ones on by `depthmix add-exits`."
            )


def check_made_for(exits: Predictor, backbone: Backbone, *, verify: bool) -> None:
    """Warn of exits that were made for another model of the same shape, or refuse them.

    Where the top verifies what they draft they only cost time; else their text is nobody's.

    Args:
        exits: What is to draft; nothing is said of exits that do not know their model.
        backbone: The model's parts.
        verify: Whether the top verifies what they draft.

    Raises:
        ValueError: If nothing verifies what they draft.
    """
    made_for = getattr(exits, "made_for", None)
    if not isinstance(made_for, Fingerprint):
        return
    difference = made_for.difference(backbone)
    if difference <= TOLERANCE:
        return
    what = (
        "`exits` must be those of this very model, and they were made for one that says other "
        f"things after the same tokens (logits differ by {difference:.0%}, where merging, another "
        f"type or 8 bits make up to {TOLERANCE:.0%})"
    )
    way_out = "load the model that they were made for, or put exits on this one by `add-exits`"
    if not verify:
        raise ValueError(f"{what}; with `verify=False` nobody would notice: {way_out}.")
    warnings.warn(
        f"{what}; the text stays the model's own, and is hardly faster: {way_out}.", stacklevel=3
    )


def check_plan(plan: DraftPlan, exits: Predictor, backbone: Backbone) -> None:
    """Refuse a plan that does not fit a model and its exits.

    Args:
        plan: How they are to draft.
        exits: What is to draft.
        backbone: The model's parts.

    Raises:
        ValueError: If it names an exit or a token that there is not, or was found for others.
    """
    if plan.exits_sha256 not in (None, getattr(exits, "sha256", None) or plan.exits_sha256):
        raise ValueError(
            "`plan` must have been found for these exits, and was for others; make another one by "
            "`depthmix calibrate`."
        )
    unknown = [layer for layer in plan.exits if layer not in exits.layers]
    if unknown:
        raise ValueError(
            f"`plan` must draft with exits that there are ({list(exits.layers)}), got "
            f"layer {unknown[0]}; make another one by `depthmix calibrate`."
        )
    if exits.layers[-1] >= backbone.num_hidden_layers:
        raise ValueError(
            f"`exits` must be below the final layer, {backbone.num_hidden_layers}, got "
            f"layer {exits.layers[-1]}; they were made for another model."
        )
    known = plan.vocabulary
    if known is not None and known[-1] >= backbone.vocab_size:
        raise ValueError(
            f"`plan` must draft tokens that the model has ({backbone.vocab_size}), got "
            f"token {known[-1]}; make another one by `depthmix calibrate`."
        )
