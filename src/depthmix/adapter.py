"""MoDE as a PEFT method: `MODE_LORA`, any LoRA variant under a mixture of depths."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import LoraConfig, LoraModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import PeftType, register_peft_method
from torch import Tensor, nn
from transformers import PreTrainedModel

from depthmix.attachment import install
from depthmix.backbone import Backbone, find_backbone
from depthmix.config import MixtureConfig
from depthmix.mixture import Mixture, MixtureNorm
from depthmix.objective import Objective

PAPER_MODE: dict[str, Any] = {
    "r": 32,
    "lora_alpha": 64,
    "lora_dropout": 0.05,
    "target_modules": ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"],
    "adapt": "below",
    "late_layers": 3,
    "router_init": "gaussian",
    "router_input": "raw",
    "distillation_weight": 1e-4,
    "divergence": "reverse_kl",
    "reduction": "mean",
}
"""The paper's settings (section 4.1), with LLM-Adapters' LoRA underneath."""

PRESETS = {"paper": PAPER_MODE}
"""Settings by name."""


def _peft_type(name: str) -> PeftType:
    """Add a member to PEFT's enumeration of methods, which is how other packages join it.

    The name must not be part of "model" in lower case, or transformers takes every base weight
    for an adapter's: "MODE" would be, "MODE_LORA" is not.
    """
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member.__dict__["_value_"] = name
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)
    return member


MODE_LORA = _peft_type("MODE_LORA")
"""PEFT's name of the method."""


@dataclass(kw_only=True)
class MoDEConfig(MixtureConfig, LoraConfig):
    """A `LoraConfig` with a mixture of depths on top.

    All of `LoraConfig` is there (rank, targets, DoRA, rsLoRA, …) beside the mixture's options.
    `target_modules=[]` trains the mixture alone.
    """

    adapt: Literal["all", "below"] = "below"
    """Layers that get LoRA adapters: all of them (LoRA_all), or those below the first late layer
    (the paper's LoRA_¬K, in which MoDE replaces the last layers' adapters)."""

    base_num_hidden_layers: int | None = None
    """Decoder layers of the model that the adapter was made for; filled in by PEFT."""

    base_hidden_size: int | None = None
    """Width of the model that the adapter was made for; filled in by PEFT."""

    def __post_init__(self) -> None:
        LoraConfig.__post_init__(self)
        MixtureConfig.__post_init__(self)
        if self.adapt not in ("all", "below"):
            raise ValueError(f"`adapt` must be one of all, below, got {self.adapt!r}.")
        self.peft_type = MODE_LORA
        self.task_type = self.task_type or "CAUSAL_LM"

    @classmethod
    def from_lora(cls, lora_config: LoraConfig, **options: Any) -> MoDEConfig:
        """Put a mixture on top of a LoRA configuration.

        Args:
            lora_config: Any LoRA configuration; it is not changed.
            options: Fields of `MixtureConfig`, and `adapt`.

        Returns:
            The same adapters with a mixture.
        """
        fields = {
            field.name: getattr(lora_config, field.name)
            for field in dataclasses.fields(lora_config)
            if field.init and field.name != "peft_type"
        }
        return cls(**{**fields, **options})

    @classmethod
    def from_preset(cls, preset: str, **options: Any) -> MoDEConfig:
        """Start from named settings.

        Args:
            preset: `paper` for the paper's settings.
            options: Fields that differ.

        Returns:
            The configuration.

        Raises:
            ValueError: If there is no such preset.
        """
        if preset not in PRESETS:
            raise ValueError(f"`preset` must be one of {', '.join(PRESETS)}, got {preset!r}.")
        return cls(**{**PRESETS[preset], **options})

    def to_lora(self, model: PreTrainedModel) -> LoraConfig:
        """Configure the same adapters in the same layers without the mixture, as a baseline.

        Args:
            model: The model to adapt; only its configuration is read.

        Returns:
            A plain LoRA configuration that names its target modules in full.
        """
        with torch.device("meta"):
            shape = type(model)(model.config)
        resolved = dataclasses.replace(self)
        tuner = MoDEModel(shape, resolved, "default")
        targets = [name for name in tuner.targeted_module_names if name != resolved.final_norm]
        names = {field.name for field in dataclasses.fields(LoraConfig) if field.init}
        fields: dict[str, Any] = {name: getattr(self, name) for name in names - {"peft_type"}}
        fields |= {"target_modules": targets, "target_parameters": resolved.target_parameters}
        return LoraConfig(**fields)

    def resolve(self, backbone: Backbone) -> None:
        """Fill in what only the model tells, or check it for an adapter that knows already.

        Raises:
            ValueError: If the adapter was made for a model of another shape.
        """
        shape = (backbone.num_hidden_layers, backbone.hidden_size)
        made_for = (self.base_num_hidden_layers, self.base_hidden_size)
        if made_for != (None, None) and made_for != shape:
            raise ValueError(
                f"The adapter was made for a model of {made_for[0]} layers and width "
                f"{made_for[1]}, and this one has {shape[0]} and {shape[1]}; load it on the model "
                f"it was made for ({self.base_model_name_or_path or 'unnamed'})."
            )
        self.base_num_hidden_layers, self.base_hidden_size = shape
        self.final_norm, self.decoder_layers = backbone.final_norm_name, backbone.layers_name
        self.resolve_late_layers(backbone.num_hidden_layers)

    def adapts(self, name: str) -> bool:
        """Tell whether the layer that holds the module or parameter `name` gets adapters."""
        prefix = f"{self.decoder_layers}."
        if self.adapt == "all" or not name.startswith(prefix):
            return True
        layer = int(name.removeprefix(prefix).partition(".")[0]) + 1
        assert self.base_num_hidden_layers is not None
        return layer < self.resolve_late_layers(self.base_num_hidden_layers)[0]


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
        if sum(name in self.lora_mode for name in names) > 1:
            raise ValueError(
                f"`adapter_names` must name one MoDE adapter at a time, got {', '.join(names)}; "
                "routing weights of several adapters do not add up."
            )
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
        self.capture.remove()
        self.objective.remove()
        if not merge or mixture is None:
            return self.base_layer
        self.backbone.model.set_submodule(self.backbone.final_norm_name, self.base_layer)
        return install(self.backbone, mixture)

    def _watch(self) -> None:
        self.watch(m for m in self.lora_mode.values() if isinstance(m, Mixture))


class MoDEModel(LoraModel):
    """LoRA in the layers, and a mixture of depths in place of the final norm."""

    prefix = "lora_"
    tuner_layer_cls = (LoraLayer, MoDELayer)  # pyrefly: ignore[bad-assignment]

    def _prepare_adapter_config(self, peft_config: MoDEConfig, model_config: dict) -> MoDEConfig:
        backbone = self._find_backbone(peft_config)
        peft_config = super()._prepare_adapter_config(peft_config, model_config)
        peft_config.resolve(backbone)
        if peft_config.target_parameters:
            peft_config.target_parameters = [
                name
                for name, _ in self.model.named_parameters()
                if peft_config.adapts(name)
                and any(f".{name}".endswith(f".{t}") for t in peft_config.target_parameters)
            ]
        return peft_config

    def _find_backbone(self, peft_config: MoDEConfig) -> Backbone:
        """Find the model's parts; what a saved adapter names was verified when it was made."""
        return find_backbone(
            self.model,
            final_norm=peft_config.final_norm,
            decoder_layers=peft_config.decoder_layers,
            probe=peft_config.base_num_hidden_layers is None,
        )

    @staticmethod
    def _check_target_module_exists(  # pyrefly: ignore[bad-override]
        peft_config: MoDEConfig, key: str
    ) -> Any:
        if key == peft_config.final_norm:
            return True
        found = LoraModel._check_target_module_exists(peft_config, key)
        return found if found and peft_config.adapts(key) else found and False

    def _create_and_replace(
        self,
        lora_config: MoDEConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        *,
        parameter_name: str | None = None,
    ) -> None:
        if current_key != lora_config.final_norm:
            super()._create_and_replace(
                lora_config,
                adapter_name,
                target,
                target_name,
                parent,
                current_key,
                parameter_name=parameter_name,
            )
            return
        layer = target
        if not isinstance(layer, MoDELayer):
            layer = MoDELayer(self._find_backbone(lora_config))
            layer.train(target.training)
            setattr(parent, target_name, layer)
        layer.update_layer(adapter_name, lora_config)
        if adapter_name not in self.active_adapters:
            layer.lora_mode[adapter_name].requires_grad_(False)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        marker = f".lora_mode.{adapter_name}."
        if marker in key:
            return key.replace(marker, ".lora_mode.")
        return super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: MoDEConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Map a checkpoint to the model, and refuse one that lacks weights."""
        remapped = super()._remap_adapter_state_dict_for_load(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict
        )
        marker = f".{adapter_name}"
        missing = [
            name
            for name, _ in model.named_parameters()
            if ".lora_" in name
            and (f"{marker}." in name or name.endswith(marker))
            and name not in remapped
            and f"base_model.model.{name}" not in remapped
        ]
        if missing:
            raise ValueError(
                f"The adapter file lacks {len(missing)} of the adapter's tensors (the first is "
                f"{missing[0]}); it is damaged or was made with other options: save it again."
            )
        return remapped

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "`adapter_names` cannot mix adapters in one batch: a mixture routes the whole "
                "batch; call `set_adapter` and run each adapter's rows by themselves."
            )
        with super()._enable_peft_forward_hooks(*args, **kwargs):
            yield

    def merge_adapter(self, *_args: Any, **_kwargs: Any) -> None:
        """Refuse: a mixture is no change of a weight that could be merged and unmerged.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "`merge_adapter` cannot merge a mixture into the final norm's weight; "
            "`merge_and_unload()` folds the LoRA weights and keeps the mixture as a plain module."
        )

    def add_weighted_adapter(self, *_args: Any, **_kwargs: Any) -> None:
        """Refuse: routers and norms of several adapters cannot be averaged like LoRA's products.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "`add_weighted_adapter` cannot combine mixtures; combine plain LoRA adapters before "
            "a mixture is trained on top."
        )


def register() -> None:
    """Make `MODE_LORA` known to PEFT, once."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING

    if MODE_LORA in PEFT_TYPE_TO_CONFIG_MAPPING:
        return
    register_peft_method(
        name="mode_lora", config_cls=MoDEConfig, model_cls=MoDEModel, prefix=MoDEModel.prefix
    )
    assert PEFT_TYPE_TO_PREFIX_MAPPING[MODE_LORA] == MoDEModel.prefix
