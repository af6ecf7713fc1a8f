"""A language model whose last layers vote on each token: a Mixture-of-Depths Ensemble (MoDE).

This file lies beside the weights, and is all that transformers needs to run them:
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`. The model is the one that
was tuned, but for its final norm: the head gets `sum_i G_i N_i(h_i)`, where h_i is the residual
stream behind late layer i, N_i that layer's norm, and G = softmax(router(h)) is routed for each
token by the stream below the first late layer. The method: arXiv 2410.13077.
"""

import copy
import threading
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM


class DepthmixConfig(LlamaConfig):
    """The base model's configuration, with the mixture's settings in `mixture_of_depths`."""

    model_type = "depthmix"
    base_model_type: str | None = None
    mixture_of_depths: dict[str, Any] | None = None


class Mixture(nn.Module):
    """Router and norms of the layers that vote, in float32 whatever the model's dtype.

    Args:
        settings: `mixture_of_depths` of the configuration.
        final_norm: The model's final norm, whose class the late layers' norms have.
        hidden_size: Width of the residual stream.
    """

    def __init__(self, settings: dict[str, Any], final_norm: nn.Module, hidden_size: int) -> None:
        super().__init__()
        self.settings = settings
        self.late_layers = settings["late_layers"]
        own = settings["own_norms"]
        self.norms = nn.ModuleDict({str(layer): copy.deepcopy(final_norm) for layer in own})
        self.router = nn.Linear(hidden_size, len(self.late_layers), bias=settings["router_bias"])
        self.depths = {self.late_layers[0] - 1, *self.late_layers[:-1], self.late_layers[-1] - 1}
        self.kept: dict[Any, dict[int, Tensor]] = {}  # residual streams by thread and depth

    def watch(self, layers: Any, final_norm: nn.Module) -> None:
        """Keep what enters some layers, and stand in for what leaves the final norm."""
        layers[0].register_forward_pre_hook(self._begin)
        for depth in sorted(self.depths):
            layers[depth].register_forward_pre_hook(partial(self._keep, depth), with_kwargs=True)
        final_norm.register_forward_hook(self._replace)

    def forward(self, states: dict[int, Tensor], normed: Tensor, final_norm: nn.Module) -> Tensor:
        """Mix the late layers' normed states.

        Args:
            states: Residual stream behind each late layer, and below the first, by layer number.
            normed: What the model's own final norm makes of the last one.
            final_norm: That norm, for late layers that have none of their own.
        """
        x = states[self.late_layers[0] - 1].float()
        if self.settings["router_input"] == "normed":
            x = F.rms_norm(x, x.shape[-1:])
        bias = None if self.router.bias is None else self.router.bias.float()
        logits = F.linear(x, self.router.weight.float(), bias)
        logits = logits / self.settings["router_temperature"]
        top_k = self.settings["top_k"]
        if top_k is not None and top_k < len(self.late_layers):
            best = logits.topk(top_k, dim=-1)
            logits = torch.full_like(logits, -torch.inf).scatter(-1, best.indices, best.values)
        weights = logits.softmax(dim=-1)
        mixed = torch.zeros((), dtype=weights.dtype, device=weights.device)
        for place, layer in enumerate(self.late_layers):
            state = normed
            if str(layer) in self.norms:
                norm = self.norms[str(layer)]
                state = norm(states[layer].to(next(norm.parameters()).dtype))
            elif layer != self.late_layers[-1]:
                state = final_norm.forward(states[layer])  # without the hook that called us
            mixed = mixed + weights[..., place : place + 1] * state.to(weights.dtype)
        return mixed.to(normed.dtype)

    def _begin(self, _layer: nn.Module, _args: tuple) -> None:
        self.kept[_thread()] = {}

    def _keep(self, depth: int, _layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.kept[_thread()][depth] = args[0] if args else kwargs["hidden_states"]

    def _replace(self, final_norm: nn.Module, args: tuple, normed: Tensor) -> Tensor:
        states = self.kept.pop(_thread(), {})
        if missing := self.depths - states.keys():
            raise RuntimeError(
                f"All layers must run before the final norm, and the streams at {sorted(missing)} "
                "were not seen; leave `assistant_early_exit` out."
            )
        states[self.late_layers[-1]] = args[0]
        states = {layer: state.to(normed.device) for layer, state in states.items()}
        return self(states, normed, final_norm)


def _thread() -> int | None:
    """Tell whose pass it is; several threads may run one model."""
    return None if torch.compiler.is_compiling() else threading.get_ident()


class DepthmixLlamaForCausalLM(LlamaForCausalLM):
    """The base model with the mixture in its final norm's place."""

    config_class = DepthmixConfig

    def __init__(self, config: DepthmixConfig) -> None:
        super().__init__(config)
        wide = self._keep_in_fp32_modules_strict or ()
        self._keep_in_fp32_modules_strict = {*wide, "mixture"}
        settings = config.mixture_of_depths or {}
        final_norm = self.get_submodule(settings["final_norm"])
        self.mixture = Mixture(settings, final_norm, config.hidden_size)
        self.mixture.watch(self.get_submodule(settings["decoder_layers"]), final_norm)
        self.post_init()
