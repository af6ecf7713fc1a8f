"""The ledger of trainable parameters: what each part of the method costs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from depthmix.files.html import to_html
from depthmix.method.architecture import find_backbone
from depthmix.method.norm import active_mixture, find_mixture_norm


@dataclass(frozen=True)
class Ledger:
    """Numbers of trainable parameters, by part."""

    lora_below: int
    """LoRA in the layers below the first late layer: the paper's LoRA_¬K."""

    lora_late: int
    """LoRA in the late layers and anything above: what LoRA_all adds."""

    norms: int
    """Trained norms of the mixture."""

    router: int
    """The mixture's router."""

    other: int
    """Everything else that is trained."""

    total: int
    """Everything that is trained."""

    model: int
    """Parameters of the pretrained model, for scale."""

    exits: int = 0
    """Exits that are trained together with the mixture."""

    @property
    def rows(self) -> tuple[tuple[str, str, str, str], ...]:
        """A printable table: header, then name, number and shares of each part that there is."""
        parts = [
            ("LoRA below the late layers", self.lora_below),
            ("LoRA in the late layers", self.lora_late),
            ("late norms", self.norms),
            ("router", self.router),
            ("exits", self.exits),
            ("other", self.other),
        ]
        parts = [*(part for part in parts if part[1]), ("trainable", self.total)]
        below = self.lora_below
        return (
            ("parameters", "number", "of LoRA below", "of the model"),
            *(
                (
                    name,
                    f"{number:,}",
                    f"{100 * number / below:.2f} %" if below else "-",
                    f"{100 * number / self.model:.3f} %",
                )
                for name, number in parts
            ),
        )

    def __str__(self) -> str:
        return "\n".join(f"{a:<28}{b:>14}{c:>16}{d:>15}" for a, b, c, d in self.rows)

    def _repr_html_(self) -> str:
        """Show the table in a notebook."""
        return to_html(self.rows[0], self.rows[1:])


def parameter_ledger(
    model: nn.Module,
    *,
    first_late_layer: int | None = None,
    final_norm: str | None = None,
    decoder_layers: str | None = None,
) -> Ledger:
    """Count a model's trainable parameters by part; a model on the meta device will do.

    Args:
        model: Any tuned model, with or without a mixture or PEFT.
        first_late_layer: Where the late layers begin, for a model without a mixture.
        final_norm: Name of the final norm of such a model, where it cannot be found by itself.
        decoder_layers: Name of its `ModuleList` of layers, likewise.

    Returns:
        The ledger. Without a mixture and without `first_late_layer`, all LoRA counts as below.
    """
    norm = find_mixture_norm(model)
    bare = model.get_base_model() if isinstance(model, PeftModel) else model
    names = {"final_norm": final_norm, "decoder_layers": decoder_layers}
    backbone = norm.backbone if norm else find_backbone(bare, try_out=False, **names)
    mixture = active_mixture(model)
    if mixture is not None:
        first_late_layer = mixture.late_layers[0]
    late = (
        set()
        if first_late_layer is None
        else {
            id(p) for layer in backbone.layers[first_late_layer - 1 :] for p in layer.parameters()
        }
    )
    below = {id(p) for p in backbone.layers.parameters()} - late
    if first_late_layer is None:
        below |= {id(p) for p in model.parameters()}
    lora = {
        id(p): p
        for module in model.modules()
        if isinstance(module, LoraLayer)
        for p in _adapter_parameters(module)
        if p.requires_grad
    }
    trainable = {id(p): p for p in model.parameters() if p.requires_grad}
    lora_below = sum(p.numel() for i, p in lora.items() if i in below)
    lora_late = sum(p.numel() for i, p in lora.items() if i not in below)
    norms = _num_trainable(mixture.norms) if mixture else 0
    router = _num_trainable(mixture.router) if mixture else 0
    exits = _num_trainable(mixture.exits) if mixture and mixture.exits else 0
    total = sum(p.numel() for p in trainable.values())
    adapters = {
        id(p)
        for m in model.modules()
        if isinstance(m, BaseTunerLayer)
        for p in _adapter_parameters(m)
    }
    adapters |= {id(p) for p in mixture.parameters()} if mixture else set()
    return Ledger(
        lora_below=lora_below,
        lora_late=lora_late,
        norms=norms,
        router=router,
        exits=exits,
        other=total - lora_below - lora_late - norms - router - exits,
        total=total,
        model=sum(p.numel() for p in model.parameters() if id(p) not in adapters),
    )


def _adapter_parameters(layer: nn.Module) -> Iterator[nn.Parameter]:
    """Iterate over a tuner layer's own parameters, without those of the layer that it wraps."""
    return (p for name, p in layer.named_parameters() if not name.startswith("base_layer."))


def _num_trainable(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)
