"""The one pass that keeps what every layer leaves, and what comes to the head."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor, nn

from depthmix.method.backbone import Backbone
from depthmix.method.capture import HiddenStateCapture


@dataclass(frozen=True)
class Captured:
    """What one pass left behind."""

    states: dict[int, Float[Tensor, "batch seq hidden"]]
    """Residual stream `h_j` by depth: 0 is the embeddings, `num_hidden_layers` the top."""

    answer: Float[Tensor, "batch seq hidden"]
    """What the final norm, or the mixture in its place, handed to the head."""


def capture_all(
    backbone: Backbone,
    input_ids: Int[Tensor, "batch seq"],
    *,
    attention_mask: Int[Tensor, "batch seq"] | None = None,
    depths: Collection[int] | None = None,
) -> Captured:
    """Run the decoder once, without a cache, and keep the residual stream.

    Args:
        backbone: The model's parts.
        input_ids: Token ids, moved to the model's device.
        attention_mask: 0 at padding; `None` where there is none.
        depths: Depths to keep, from 0; `None` keeps that of every layer, from 1.

    Returns:
        The residual stream at those depths, and the final norm's output.
    """
    # The final norm stands above the last layer, as each layer does above the one before.
    stages = nn.ModuleList([*backbone.layers, backbone.final_norm])
    device, answers = backbone.model.device, []
    capture = HiddenStateCapture()
    capture.watch(stages, set(range(1, len(stages)) if depths is None else depths))
    handle = stages[-1].register_forward_hook(lambda _norm, _args, output: answers.append(output))
    try:
        backbone.decoder(
            input_ids=input_ids.to(device),
            attention_mask=None if attention_mask is None else attention_mask.to(device),
            use_cache=False,
        )
    finally:
        handle.remove()
        capture.remove()
    return Captured(capture.take(), answers[-1])
