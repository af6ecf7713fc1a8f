"""A mixture in place of the final norm, without PEFT."""

from __future__ import annotations

from typing import Any

from depthmix.method.backbone import Backbone
from depthmix.method.mixture import Mixture
from depthmix.method.norm import MixtureNorm


class MoDENorm(MixtureNorm):
    """A mixture in place of the final norm, without PEFT.

    `save_pretrained` writes the pretrained norm under the names that it has without a mixture
    (`adapters.attach.install` says so to transformers), and `load_state_dict` takes them back.

    Args:
        backbone: The model's parts.
        mixture: The mixture that predicts.
    """

    def __init__(self, backbone: Backbone, mixture: Mixture) -> None:
        super().__init__(backbone)
        self.mixture = mixture
        self.watch([mixture])
        self.register_load_state_dict_pre_hook(_insert_base_layer)

    @property
    def active_mixture(self) -> Mixture:
        """The one mixture, or the copy of it that PEFT's `modules_to_save` trains."""
        mixture: Any = self.mixture
        while not isinstance(mixture, Mixture):
            names = () if mixture.disable_adapters else mixture.active_adapters
            mixture = mixture.modules_to_save[names[0]] if names else mixture.original_module
        return mixture

    def unload_and_optionally_merge_module(self, **_options: Any) -> MoDENorm:
        """Stay where it is when PEFT takes the adapters of a model away."""
        return self

    def get_base_layer(self) -> MoDENorm:
        """Stay where it is; PEFT asks whatever has a `base_layer`."""
        return self

    def merge(self, *_args: Any, **_options: Any) -> None:
        """Have nothing to merge; PEFT asks whatever has a `base_layer`."""


def _insert_base_layer(norm: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Name the pretrained norm's weights as they are named here."""
    for name in norm.base_layer.state_dict():
        if prefix + name in state:
            state[f"{prefix}base_layer.{name}"] = state.pop(prefix + name)
