"""What the mixture would find in a model, and what it would add, before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peft import get_peft_model

from depthmix.adapter_config import MoDEConfig
from depthmix.backbone import find_backbone
from depthmix.ledger import Ledger, parameter_ledger
from depthmix.models import load_model
from depthmix.options import read_options
from depthmix.run_config import ModelSection


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """A model's parts and the parameters of a mixture on it; `str` makes a printable table."""

    parts: Mapping[str, str]
    """What was found and verified, by name."""

    ledger: Ledger
    """Parameters of the model and of what would be trained."""

    def __str__(self) -> str:
        width = max(map(len, self.parts))
        lines = [f"{name:<{width}}  {value}" for name, value in self.parts.items()]
        return "\n".join([*lines, "", str(self.ledger)])


def inspect_model(section: ModelSection, mode: Mapping[str, Any] | None = None) -> Inspection:
    """Find a model's layers, final norm and head, and count the parameters of a mixture on it.

    Args:
        section: The model; it is loaded, since what is found is verified by a forward pass.
        mode: Keyword arguments of `MoDEConfig`, as text or in their types.

    Returns:
        The parts and the parameters.

    Raises:
        ValueError: If the model computes something else than `head(final_norm(last layer))`, or
            an option is wrong.
        TypeError: If it is no decoder-only language model.
        OSError: If it cannot be found.
    """
    config = MoDEConfig(**read_options("mode", mode or {}, MoDEConfig))
    model = load_model(section)
    backbone = find_backbone(
        model, final_norm=config.final_norm, decoder_layers=config.decoder_layers
    )
    late_layers = config.resolve_late_layers(backbone.num_hidden_layers)
    head = model.get_output_embeddings()
    assert head is not None  # or `find_backbone` had refused the model
    head_name = next(name for name, module in model.named_modules() if module is head)
    parts = {
        "model": f"{type(model).__name__} ({section.name})",
        "decoder layers": f"{backbone.layers_name} ({backbone.num_hidden_layers})",
        "final norm": f"{backbone.final_norm_name} ({type(backbone.final_norm).__name__})",
        "head": f"{head_name} ({head.weight.size(0)} tokens)",
        "hidden size": str(backbone.hidden_size),
        "logit scale": f"{backbone.logit_scale:g}",
        "soft cap": "none" if backbone.soft_cap is None else f"{backbone.soft_cap:g}",
        "late layers": ", ".join(map(str, late_layers)),
    }
    return Inspection(parts=parts, ledger=parameter_ledger(get_peft_model(model, config)))
