"""A frozen linear head as plain tensors: which heads are one, and what is read of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from depthmix.method.backbone import Backbone


@dataclass(frozen=True)
class LinearHead:
    """A frozen linear head as plain tensors, and what follows its product."""

    weight: Float[Tensor, "vocab hidden"]
    bias: Float[Tensor, " vocab"] | None
    scale: float
    soft_cap: float | None

    def project(
        self, states: Float[Tensor, "rows hidden"], *, out: Float[Tensor, "rows vocab"]
    ) -> None:
        """Write the head's product into `out`, before scale and soft cap."""
        if self.bias is None:
            torch.mm(states, self.weight.t(), out=out)
        else:
            torch.addmm(self.bias, states, self.weight.t(), out=out)

    def take(self, entries: Int[Tensor, " entries"]) -> LinearHead:
        """Give the head for some entries of the vocabulary alone."""
        bias = None if self.bias is None else self.bias[entries]
        return replace(self, weight=self.weight[entries], bias=bias)

    def cap(self, logits: Float[Tensor, "*batch vocab"]) -> Float[Tensor, "*batch vocab"]:
        """Apply the soft cap, where there is one."""
        return logits if self.soft_cap is None else self.soft_cap * (logits / self.soft_cap).tanh()

    def predict(self, products: Float[Tensor, "*batch vocab"]) -> Float[Tensor, "*batch vocab"]:
        """Turn head products into logits; the same tensor where there is nothing to do."""
        return self.cap(products if self.scale == 1 else products * self.scale)


def is_fusable(head: nn.Module) -> bool:
    """Tell whether a head is a plain linear map that is not trained, and whose weight is here."""
    return is_plain(head) and not any(parameter.requires_grad for parameter in head.parameters())


def is_plain(head: nn.Module) -> bool:
    """Tell whether a head is a plain linear map whose weight is here."""
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        return False
    # Accelerate replaces `forward` where a model is spread over devices, which changes nothing
    # here, and where it is offloaded, so that its weight is elsewhere.
    dispatched = not getattr(getattr(head, "_hf_hook", None), "offload", True)
    whole = type(head.weight) in (Tensor, nn.Parameter) or isinstance(head.weight, DTensor)
    return ("forward" not in vars(head) or dispatched) and whole and head.weight.is_floating_point()


def take_linear_head(backbone: Backbone) -> LinearHead:
    """Take a head's tensors, whole where they are sharded, in the dtype it would compute in.

    Args:
        backbone: The model's head, which `is_fusable`, its scale and soft cap.
    """
    head = backbone.head
    assert isinstance(head, nn.Linear)
    device = head.weight.device.type
    dtype = head.weight.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)

    def whole(parameter: Tensor) -> Tensor:
        full = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        return full.detach().to(dtype)

    bias = None if head.bias is None else whole(head.bias)
    return LinearHead(whole(head.weight), bias, backbone.logit_scale, backbone.soft_cap)
