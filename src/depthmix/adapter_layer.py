"""The adapters' mixtures in place of the final norm."""

from __future__ import annotations

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from depthmix.adapter_config import MoDEConfig
from depthmix.attachment import install
from depthmix.backbone import Backbone
from depthmix.mixture import Mixture
from depthmix.mixture_norm import MixtureNorm
from depthmix.objective import Objective


class MoDELayer(MixtureNorm, BaseTunerLayer):
    """A mixture per adapter in place of the final norm.

    Its attribute begins with "lora_": transformers puts the adapter's name behind the one prefix
    that a PEFT method registers.
    """

    adapter_layer_names = ("lora_mode",)
    lora_mode: nn.ModuleDict

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone)
        self.lora_mode = nn.ModuleDict()
        self.objective = Objective(self)

    @property
    def active_mixture(self) -> Mixture | None:
        """The active adapter's mixture; None while adapters are disabled."""
        if self.disable_adapters:
            return None
        for name in self.active_adapters:
            if name in self.lora_mode:
                mixture = self.lora_mode[name]
                assert isinstance(mixture, Mixture)
                return mixture
        return None

    def update_layer(self, adapter_name: str, config: MoDEConfig) -> None:
        """Add an adapter's mixture."""
        self.lora_mode[adapter_name] = Mixture(
            config,
            final_norm=self.get_base_layer(),
            late_layers=config.resolve_late_layers(self.backbone.num_hidden_layers),
            hidden_size=self.backbone.hidden_size,
        )
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        self._watch()

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Choose the active adapter; mixtures of several adapters do not add up."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        check_one_adapter([name for name in names if name in self.lora_mode])
        super().set_adapter(adapter_names, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter's mixture, and stop capturing what only it read."""
        super().delete_adapter(adapter_name)
        self._watch()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Leave a plain mixture where the final norm stood (merge), or the norm itself."""
        if adapter_names is not None:
            self.set_adapter(adapter_names)
        mixture = self.active_mixture
        self.unwatch()
        self.objective.remove()
        if not merge or mixture is None:
            return self.base_layer
        self.backbone.model.set_submodule(self.backbone.final_norm_name, self.base_layer)
        return install(self.backbone, mixture)

    def _watch(self) -> None:
        self.watch(m for m in self.lora_mode.values() if isinstance(m, Mixture))


def check_one_adapter(names: list[str]) -> None:
    """Refuse to make several mixtures active at once.

    Raises:
        ValueError: If there is more than one name.
    """
    if len(names) > 1:
        raise ValueError(
            f"`adapter_names` must name one MoDE adapter at a time, got {', '.join(names)}; "
            "routing weights of several adapters do not add up."
        )
