"""What a mixture trains, in float32 over a trunk of any dtype: copies of its norm, linear maps."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from accelerate.hooks import remove_hook_from_module
from accelerate.utils import align_module_device
from jaxtyping import Float
from peft.utils.integrations import gather_params_ctx
from torch import Tensor, nn


class WideLinear(nn.Linear):
    """A linear map in float32, whatever its weight's dtype or autocast.

    It is a module of its own so that sharded weights are gathered when it is called.
    """

    def forward(self, input: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        """Give the product, float32."""
        with torch.autocast(input.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return F.linear(input.float(), self.weight.float(), bias)


def copy_norm(final_norm: nn.Module) -> nn.Module:
    """Copy a pretrained norm: its values as the start, none of its hooks, ready to train.

    Args:
        final_norm: The norm, whole, sharded or offloaded; it is not changed.
    """
    with gather_params_ctx(list(final_norm.parameters())), align_module_device(final_norm):
        norm = copy.deepcopy(final_norm)
    return remove_hook_from_module(norm, recurse=True).requires_grad_(True)


def apply_norm(
    norm: nn.Module, hidden_states: Float[Tensor, "*batch hidden"]
) -> Float[Tensor, "*batch hidden"]:
    """Apply a copied norm in its own dtype.

    It may be float32 over a bfloat16 trunk, which LayerNorm kernels refuse.

    Args:
        norm: The norm.
        hidden_states: Residual stream in any dtype.

    Returns:
        The normed states, in the norm's dtype where it has weights.
    """
    parameter = next(norm.parameters(), None)
    return norm(hidden_states if parameter is None else hidden_states.to(parameter.dtype))
