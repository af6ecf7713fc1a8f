"""What PEFT does to a model with an attached mixture, seen from inside the model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

WAYS_OUT = (
    "use `MoDEConfig` for LoRA with a mixture, or train and save the attached mixture before "
    "another PEFT method goes on top of it"
)
"""What to do instead of putting a PEFT method onto a mixture that has learnt nothing."""


class PeftWitness(AuxiliaryTrainingWrapper):
    """A part of an attached mixture that PEFT asks when a method comes and when it is saved.

    Any PEFT method but `MODE_LORA` freezes an attached mixture with the rest of the model, and its
    file holds none of it. That is right for a second stage over a mixture that is trained and
    saved, and a loss otherwise. PEFT asks all modules of this kind (`modules_to_save` makes them,
    too) whenever it sets or saves an adapter, so this one, which holds nothing and is never called,
    sees each method and speaks up.

    Args:
        norm: The module that stands for the final norm, with its `mixture` and `backbone`.
    """

    norm: Any

    def __init__(self, norm: Any) -> None:
        nn.Module.__init__(self)  # there is no module to wrap
        self.__dict__["norm"] = norm  # no child of its child
        self._adapters: set[str] = set()
        self._made: dict[str, int] | None = None  # versions of the weights as `attach` made them
        self._saved: dict[str, Tensor] | None = None  # weights in the folder that was loaded
        self._told = False
        self.weight = None  # PEFT copies it from the module it unloads

    __getattr__ = nn.Module.__getattr__

    def is_new(self) -> None:
        """Remember that the mixture has learnt nothing yet."""
        self._made = self._versions()

    def is_saved(self, weights: Mapping[str, Tensor]) -> None:
        """Remember that the model's own folder holds these weights of the mixture."""
        self._saved, self._made = dict(weights), None

    @property
    def disable_adapters(self) -> bool:
        """Whether the model's adapters are disabled, as its other layers say."""
        return any(layer.disable_adapters for layer in self._layers()[:1])

    @property
    def active_adapters(self) -> list[str]:
        """The model's active adapters, as its other layers say."""
        return next((list(layer.active_adapters) for layer in self._layers()), [])

    def check_set_adapter(self, adapter_name: str | list[str]) -> str | None:
        """Refuse a method that would freeze a mixture that has learnt nothing."""
        if self._would_be_lost():
            self._take_adapters_off()
            raise RuntimeError(
                "This PEFT method would freeze the attached mixture before it has learnt anything, "
                f"and its file would not hold it; {WAYS_OUT} (`requires_grad_(False)` on what "
                "`attach` returned says that it is to stay as it is)."
            )
        self._made = None
        if not self._told and not self._is_in_folder():
            self._told = True
            warnings.warn(
                "The mixture stays frozen under this PEFT method, whose adapter cannot be saved "
                "alone, since the folder of its base model does not hold the mixture; save the "
                "whole model after `merge_and_unload()`, or save the model with its mixture and "
                "load it by `depthmix.load` before it gets the adapter.",
                stacklevel=2,
            )
        return None

    def check_training(self) -> None:
        """Refuse a training pass under a method that asks nobody, such as soft prompts."""
        if self._made is None or self._trains() or not torch.is_grad_enabled():
            return
        model = self.norm.backbone.model
        adapted = any(type(m).__module__.startswith("peft.") for m in model.modules())
        alone = not any(weight.requires_grad for weight in model.parameters())
        if (adapted or alone) and not self._has_learnt():
            raise RuntimeError(
                "The attached mixture is frozen, has learnt nothing, and would not be saved with "
                f"what is trained here; {WAYS_OUT}."
            )
        self._made = None

    def adapter_state_dict(  # pyrefly: ignore[bad-override]
        self, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Refuse to save an adapter alone where that loses the mixture; it has no tensors here."""
        if not self._is_in_folder():
            raise RuntimeError(
                f"The adapter {adapter_name!r} cannot be saved alone, since its file does not hold "
                "the mixture under it, and the model that it would be loaded onto "
                f"({self.norm.backbone.model.name_or_path or 'unnamed'}) has none like it; save "
                "the whole model after `merge_and_unload()`, or save the model with its mixture "
                "and load it by `depthmix.load` before it gets the adapter."
            )
        return {}

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """Expect no tensors in an adapter's file."""
        return {}

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Stay where it is."""
        return self

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Have no adapter to set."""

    def enable_adapters(self, enabled: bool) -> None:
        """Have no adapter to enable."""

    def delete_adapter(self, adapter_name: str, new_active_adapters: list[str] | None) -> None:
        """Have no adapter to delete."""

    def set_requires_grad(
        self, adapter_names: str | Sequence[str], requires_grad: bool = True
    ) -> None:
        """Have no adapter to train."""

    def _get_available_adapters(self) -> set[str]:
        return set()

    def _layers(self) -> list[BaseTunerLayer]:
        return [m for m in self.norm.backbone.model.modules() if isinstance(m, BaseTunerLayer)]

    def _versions(self) -> dict[str, int]:
        """Count the writes to each weight: optimisers and `load_state_dict` write."""
        return {
            name.replace("base_layer.", ""): 0 if weight.is_inference() else weight._version
            for name, weight in self.norm.mixture.named_parameters()
        }

    def _has_learnt(self) -> bool:
        made, now = self._made, self._versions()
        return made is None or any(now.get(name) != version for name, version in made.items())

    def _trains(self) -> bool:
        return any(weight.requires_grad for weight in self.norm.mixture.parameters())

    def _would_be_lost(self) -> bool:
        return self._trains() and not self._has_learnt()

    def _is_in_folder(self) -> bool:
        """Tell whether the folder that the model was loaded from holds the mixture as it is."""
        if self._saved is None:
            return False
        for name, weight in self.norm.mixture.state_dict().items():
            saved = self._saved.get(name)
            if saved is None or saved.shape != weight.shape or weight.is_meta:
                continue  # shards, or copies of PEFT's
            if not torch.equal(saved.to(weight.device, weight.dtype), weight):
                return False
        return True

    def _take_adapters_off(self) -> None:
        """Put the model's own modules back where a refused method has begun to replace them."""
        model = self.norm.backbone.model
        taken: list[str] = []
        for name, module in list(model.named_modules()):
            inside = any(name.startswith(f"{one}.") for one in taken)
            if isinstance(module, BaseTunerLayer) and not inside:
                taken.append(name)
                model.set_submodule(name, module.get_base_layer())
