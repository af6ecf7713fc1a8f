"""What the mixture would find in a model, and what it would add, before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft import PeftModel, PeftType, get_peft_model

from depthmix.adapters.calls import without_old_name
from depthmix.adapters.config import MoDEConfig
from depthmix.adapters.ledger import Ledger, parameter_ledger
from depthmix.data.records import load_records
from depthmix.data.spec import Template
from depthmix.depth.layer_choice import NUM_PROBED_RECORDS, LayerChoice, choose_on_records
from depthmix.files.settings import read_options
from depthmix.method.architecture import find_backbone
from depthmix.method.norm import active_mixture, find_mixture_norm
from depthmix.method.placement import to_accelerator
from depthmix.models.loading import load_model, load_tokenizer
from depthmix.models.spec import ModelSpec, to_spec


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """A model's parts and the parameters of a mixture on it; `str` makes a printable table."""

    parts: Mapping[str, str]
    """What was found and verified, by name."""

    ledger: Ledger
    """Parameters of the model and of what would be trained."""

    choice: LayerChoice | None = None
    """What each layer predicts on some records, and the late layers that this speaks for."""

    def __str__(self) -> str:
        width = max(map(len, self.parts))
        lines = [f"{name:<{width}}  {value}" for name, value in self.parts.items()]
        lines += ["", str(self.ledger)]
        return "\n".join(lines if self.choice is None else [*lines, "", str(self.choice)])


def inspect_model(
    model: str | Path | ModelSpec,
    mode: Mapping[str, Any] | None = None,
    *,
    probe: str | None = None,
    template: Template = "auto",
) -> Inspection:
    """Find a model's layers, final norm and head, its tuners, and count what they train.

    Args:
        model: A name or a spec, as `load_model` takes it. The model is loaded, since what is found
            is verified by a forward pass. If it is or has an adapter, that is inspected; otherwise
            the mixture that `mode` would give.
        mode: Keyword arguments of `MoDEConfig`, as text or in their types.
        probe: File or data set on whose first records each layer is read out; with it,
            `late_layers` may be `auto`.
        template: How those records become text.

    Returns:
        The parts, the parameters and what the probe found.

    Raises:
        ValueError: If the model computes something else than `head(final_norm(last layer))`, an
            option is wrong, or options or a probe are given for an adapter.
        TypeError: If it is no decoder-only language model.
        OSError: If it or the records cannot be found.
    """
    spec, choice = to_spec(model), None
    loaded = load_model(spec, is_trainable=True)
    if isinstance(loaded, PeftModel):
        if mode or probe is not None:
            raise ValueError(
                f"`{'mode' if mode else 'probe'}` must be left out for {spec.name}, "
                "whose adapter has its own options; name the pretrained model to see what others "
                "would give."
            )
        tuned, tuners = loaded, _describe_tuners(loaded)
        backbone = find_backbone(loaded.get_base_model())
    else:
        config = MoDEConfig(**read_options("mode", mode or {}, MoDEConfig))
        backbone = find_backbone(
            loaded, final_norm=config.final_norm, decoder_layers=config.decoder_layers
        )
        if probe is not None:
            to_accelerator(loaded)
            records = load_records(probe, limit=NUM_PROBED_RECORDS)
            tokenizer = load_tokenizer(spec)
            choice = choose_on_records(loaded, tokenizer, records, config, template=template)
            if config.late_layers == "auto":
                config = replace(config, late_layers=list(choice.late_layers))
        with without_old_name():
            tuned = get_peft_model(loaded, config)
        tuners = "none yet; the numbers are a new mixture's"
    norm, mixture = find_mixture_norm(tuned), active_mixture(tuned)
    final_norm = norm.base_layer if norm is not None else backbone.final_norm
    head_name = next(n for n, module in backbone.model.named_modules() if module is backbone.head)
    parts = {
        "model": f"{type(backbone.model).__name__} ({spec.name})",
        "decoder layers": f"{backbone.layers_name} ({backbone.num_hidden_layers})",
        "final norm": f"{backbone.final_norm_name} ({type(final_norm).__name__})",
        "head": f"{head_name} ({backbone.vocab_size} tokens)",
        "hidden size": str(backbone.hidden_size),
        "logit scale": f"{backbone.logit_scale:g}",
        "soft cap": "none" if backbone.soft_cap is None else f"{backbone.soft_cap:g}",
        "tuners": tuners,
        "late layers": ", ".join(map(str, mixture.late_layers)) if mixture else "none",
    }
    return Inspection(parts=parts, ledger=parameter_ledger(tuned), choice=choice)


def _describe_tuners(model: PeftModel) -> str:
    """Name each adapter with its method and, where it has one, its rank."""
    return "; ".join(
        f"{name} ({PeftType(config.peft_type).value}{f', r = {rank}' if rank else ''})"
        for name, config in model.peft_config.items()
        for rank in [getattr(config, "r", None)]
    )
