"""Where a Hugging Face decoder keeps its layers, its final norm and its head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from depthmix.method.backbone import Backbone
from depthmix.method.capture import undoing_hooks

FINAL_NORM_NAMES = (
    "norm",
    "ln_f",
    "final_layer_norm",
    "final_layernorm",
    "norm_f",
    "layer_norm",
    "embedding_norm",
    "final_norm",
    "ln_out",
)
"""Names that decoders give their final norm; it stands beside the list of layers."""

LOGIT_FACTORS = {
    "logit_scale": lambda value: value,
    "output_multiplier": lambda value: value,
    "lm_head_multiplier": lambda value: value,
    "logits_scaling": lambda value: 1 / value,
}
"""Config fields that scale the logits, with the factor that each one means."""

SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap", "softcap")
"""Config fields that hold c where a model caps its logits, `c tanh(logits / c)`."""

TRIED_LOGIT = 64.0
"""Size to which the logits of a trial are scaled up, so that a cap of any usual size shows."""


def find_backbone(
    model: nn.Module,
    *,
    final_norm: str | None = None,
    decoder_layers: str | None = None,
    try_out: bool = True,
) -> Backbone:
    """Find a decoder's layers, final norm and head, and verify them by a forward pass.

    Args:
        model: A decoder-only language model with its head.
        final_norm: Full name of the final norm, where the search fails.
        decoder_layers: Full name of the `ModuleList` of layers, where the search fails.
        try_out: Verify what was found on three tokens, where the weights are there to do it: not on
            the meta device, and not while DeepSpeed has them partitioned.

    Returns:
        The parts, all verified.

    Raises:
        TypeError: If `model` is not a decoder-only language model with a head.
        ValueError: If a part cannot be found, or the model computes something else than
            `head(final_norm(last layer))`.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            "`model` must be a Hugging Face `PreTrainedModel` with a language-modelling head, "
            f"got {type(model).__name__}; load one with `AutoModelForCausalLM`."
        )
    kind = type(model).__name__
    if model.config.is_encoder_decoder:
        raise TypeError(
            f"`model` must be a decoder-only language model, and {kind} is an encoder-decoder; "
            "choose a model that `AutoModelForCausalLM` loads."
        )
    if not model.can_generate() or model.get_output_embeddings() is None:
        raise TypeError(
            f"`model` must be a decoder-only language model with a head, and {kind} cannot "
            "generate text; load it with `AutoModelForCausalLM`, or choose another model."
        )
    config = model.config.get_text_config()
    layers_name = decoder_layers or _find_layers(model, config.num_hidden_layers)
    final_norm_name = final_norm or _find_final_norm(model, layers_name)
    for name, argument in ((layers_name, "decoder_layers"), (final_norm_name, "final_norm")):
        if name not in dict(model.named_modules()):
            raise ValueError(
                f"`{argument}` must name a module of {kind}, got {name!r}; "
                "`print(model)` shows the names."
            )
    layers = model.get_submodule(layers_name)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(
            f"`decoder_layers` must name a `ModuleList`, and {layers_name!r} is a "
            f"{type(layers).__name__}; `print(model)` shows the names."
        )
    backbone = Backbone(
        layers_name=layers_name,
        final_norm_name=final_norm_name,
        num_hidden_layers=len(layers),
        hidden_size=config.hidden_size,
        logit_scale=_logit_scale(config),
        soft_cap=_soft_cap(config),
        model=model,
    )
    absent = any(p.is_meta or not p.numel() for p in model.parameters())  # meta, or ZeRO-3
    if try_out and not absent:
        _try_out(backbone)
    return backbone


def _find_layers(model: PreTrainedModel, num_hidden_layers: int) -> str:
    """Find the one list of `num_hidden_layers` modules, the decoder's own where there are more."""
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_hidden_layers
    ]
    beside_norm = [name for name in names if _norms_beside(model, name)]
    outermost = min((name.count(".") for name in beside_norm or names), default=0)
    names = [name for name in beside_norm or names if name.count(".") == outermost]
    if len(names) == 1:
        return names[0]
    found = f"found {', '.join(names)}" if names else "found none"
    raise ValueError(
        f"Cannot find the decoder layers of {type(model).__name__} ({found} of length "
        f"{num_hidden_layers}); pass their name as `decoder_layers`."
    )


def _find_final_norm(model: PreTrainedModel, layers_name: str) -> str:
    """Find the norm that stands beside the layers."""
    norms = _norms_beside(model, layers_name)
    if len(norms) == 1:
        return norms[0]
    if norms:
        raise ValueError(
            f"Cannot tell the final norm of {type(model).__name__} among {', '.join(norms)}; "
            "pass its name as `final_norm`."
        )
    raise ValueError(
        f"Cannot find the final norm of {type(model).__name__}: a model that norms inside its "
        "layers only (post-norm) has none and MoDE cannot replace it; if this one has a final "
        "norm, pass its name as `final_norm`."
    )


def _norms_beside(model: PreTrainedModel, layers_name: str) -> list[str]:
    """Name the modules beside the layers that are called like a final norm."""
    parent_name = layers_name.rpartition(".")[0]
    parent = model.get_submodule(parent_name)
    prefix = f"{parent_name}." if parent_name else ""
    return [
        f"{prefix}{name}"
        for name in FINAL_NORM_NAMES
        if isinstance(getattr(parent, name, None), nn.Module)
    ]


def _logit_scale(config: PretrainedConfig) -> float:
    """Read the factor between the head's product and the logits."""
    scale = 1.0
    for name, factor in LOGIT_FACTORS.items():
        value = getattr(config, name, None)
        if value is not None:
            inverted = name == "logits_scaling" and config.model_type == "hyperclovax"
            scale *= value if inverted else factor(value)
    return scale


def _soft_cap(config: PretrainedConfig) -> float | None:
    """Read c of the cap on the logits, or None where there is none."""
    return next((cap for name in SOFT_CAPS if (cap := getattr(config, name, None))), None)


@torch.no_grad()
def _try_out(backbone: Backbone) -> None:
    """Check on three tokens that the layers form a chain from the embeddings to the head.

    What the norm returns is scaled up on the way, since a cap hardly shows in small logits.
    """
    model, kind = backbone.model, type(backbone.model).__name__
    embeddings = next(model.get_input_embeddings().parameters())
    input_ids = torch.arange(1, 4, device=embeddings.device)[None] % embeddings.shape[0]
    entered: list[Tensor] = []  # what each layer and then the final norm received
    left: list[Tensor] = []  # what each of them returned

    def watch(_module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        entered.append(args[0] if args else kwargs["hidden_states"])
        left.append(output[0] if isinstance(output, tuple) else output)

    def enlarge(_module: nn.Module, _args: tuple, output: Tensor) -> Tensor:
        product = backbone.project(output).float().abs().max()
        return output * (TRIED_LOGIT / product.clamp(1e-6, TRIED_LOGIT)).to(output.dtype)

    stages = [*backbone.layers, backbone.final_norm]
    with undoing_hooks(stages):
        handles = [backbone.final_norm.register_forward_hook(enlarge)]
        handles += [stage.register_forward_hook(watch, with_kwargs=True) for stage in stages]
        with evaluating(model):
            logits = model(input_ids=input_ids, use_cache=False).logits
        for handle in handles:
            handle.remove()
    chained = len(entered) == len(stages) and all(
        torch.equal(output, following)
        for output, following in zip(left[:-1], entered[1:], strict=True)
    )
    if not chained:
        raise ValueError(
            f"{kind} does not pass the output of each layer in `{backbone.layers_name}` to the "
            f"next and then to `{backbone.final_norm_name}`, so its depths cannot be mixed; if "
            "another module is the final norm, pass its name as `final_norm`."
        )
    predicted = backbone.unembed(left[-1]).to(logits.device).float()
    scale = max(1.0, float(predicted.abs().max()))
    if not torch.allclose(predicted, logits.float(), rtol=1e-2, atol=1e-2 * scale):
        raise ValueError(
            f"The logits of {kind} are not its head applied to the output of "
            f"`{backbone.final_norm_name}`, so its depths cannot be mixed; if another module is "
            "the final norm, pass its name as `final_norm`."
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout off for a while, and restore each module's own mode.

    Args:
        model: Any module.
    """
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training
