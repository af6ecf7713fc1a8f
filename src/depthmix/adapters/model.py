"""MoDE as a PEFT method: `MODE_LORA`, any LoRA variant under a mixture of depths."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import LoraModel, PeftConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import delete_adapter
from peft.utils import register_peft_method
from torch import Tensor, nn
from transformers import PreTrainedModel

from depthmix.adapters.attached import MoDENorm
from depthmix.adapters.config import MoDEConfig
from depthmix.adapters.files import MIXTURE, add_new_mixture, as_lora, check_conversion
from depthmix.adapters.layer import MoDELayer, check_merge, check_one_adapter
from depthmix.adapters.peft_type import MODE_LORA, check_type
from depthmix.adapters.shared_weights import part_adapted_weights
from depthmix.adapters.targets import check_targets, rename_targets
from depthmix.adapters.weights import check_weights, load_weights
from depthmix.method.architecture import find_backbone
from depthmix.method.backbone import Backbone
from depthmix.method.capture import undoing_hooks
from depthmix.method.norm import find_mixture_norm
from depthmix.method.placement import check_adapted, check_base_files


class MoDEModel(LoraModel):
    """LoRA in the layers, and a mixture of depths in place of the final norm."""

    prefix = "lora_"
    tuner_layer_cls = (LoraLayer, MoDELayer)  # pyrefly: ignore[bad-assignment]

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Put an adapter into the model, or leave the model as it was.

        What the configuration lacks is filled into a copy: the user's own serves other models too,
        and what becomes of it later changes none that has it.
        """
        config = self.peft_config[adapter_name] = copy.deepcopy(self.peft_config[adapter_name])
        assert isinstance(config, MoDEConfig)
        self._complete(config)
        # Taking a further adapter back hooks into the layers anew, for those that stay.
        is_first = len(self.peft_config) == 1
        with undoing_hooks(list(self.model.modules()) if is_first else []):
            try:
                super().inject_adapter(model, adapter_name, *args, **kwargs)
                check_adapted(self.model, str(config.final_norm))
            except BaseException:
                self._take_back(adapter_name)
                raise

    def _complete(self, config: MoDEConfig) -> None:
        """Fill in what only the model tells, and check the rest against it."""
        if isinstance(find_mixture_norm(self.model), MoDENorm):
            raise RuntimeError(
                "The model has an attached or merged mixture already; call `detach(model)` before "
                "it gets a MoDE adapter."
            )
        check_base_files(self.model)
        config.check_base(self.model)
        is_new = config.base_num_hidden_layers is None
        backbone = self._find_backbone(config)
        rename_targets(config, self.model)
        self._prepare_adapter_config(config, self.get_model_config(self.model))
        config.resolve(backbone)
        check_targets(config, self.model, is_new=is_new)

    def _take_back(self, adapter_name: str) -> None:
        """Remove what there is of an adapter whose injection failed."""
        if len(self.peft_config) == 1:
            self._unload_and_optionally_merge(merge=False)
        else:
            delete_adapter(self.model, adapter_name, self.prefix, self.tuner_layer_cls)

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        """Keep the pretrained final norm frozen where the biases of LoRA's layers are trained."""
        super()._mark_only_adapters_as_trainable(model)
        norm = find_mixture_norm(model)
        configs: Any = [self.peft_config[name] for name in self.active_adapters]
        if isinstance(norm, MoDELayer) and all(config.bias != "all" for config in configs):
            norm.base_layer.requires_grad_(False)

    def _check_target_module_compatiblity(
        self, peft_config: PeftConfig, model: nn.Module, target_name: str
    ) -> None:
        """Refuse the targets that PEFT refuses for LoRA, which it knows by the method's name."""
        super()._check_target_module_compatiblity(as_lora(peft_config), model, target_name)

    def _post_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        """Have transformers' `load_adapter`, which calls this, read the adapter as PEFT does."""
        super()._post_injection_hook(model, config, adapter_name)
        if isinstance(model, PreTrainedModel):
            vars(model)["_load_pretrained_model"] = load_weights

    def _find_backbone(self, peft_config: MoDEConfig) -> Backbone:
        """Find the model's parts; what a saved adapter names was verified when it was made."""
        return find_backbone(
            self.model,
            final_norm=peft_config.final_norm,
            decoder_layers=peft_config.decoder_layers,
            try_out=peft_config.base_num_hidden_layers is None,
        )

    @staticmethod
    def _check_target_module_exists(  # pyrefly: ignore[bad-override]
        peft_config: MoDEConfig, key: str
    ) -> Any:
        if key == peft_config.final_norm:
            return True
        found = LoraModel._check_target_module_exists(peft_config, key)
        return False if found and not peft_config.adapts(key) else found

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
    def _get_adapter_state_dict(
        cls,
        model: Any,
        config: MoDEConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """Select what is saved; the vocabulary may have grown since the adapter was made."""
        config.base_vocab_size = model.config.get_text_config().vocab_size
        return super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: MoDEConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Map a checkpoint to the model, and refuse one that is not the adapter's."""
        remapped = super()._remap_adapter_state_dict_for_load(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict
        )
        remapped = add_new_mixture(model, config, adapter_name, remapped)
        check_weights(model, adapter_name, remapped)
        norm = find_mixture_norm(model)
        assert isinstance(norm, MoDELayer)  # the adapter is in place
        norm.make_ready(adapter_name)
        return remapped

    @classmethod
    def _convert_state_dict_for_initial_model(
        cls,
        peft_model: Any,
        peft_config: PeftConfig,
        path_initial_model_for_weight_conversion: str,
        output_state_dict: dict[str, Tensor],
        kwargs: dict[str, Any],
    ) -> dict[str, Tensor]:
        """Make a plain LoRA of PiSSA and its like, under the same mixture.

        PEFT sets what makes the initial adapter a plain one on configurations of LoRA by name, and
        keeps its two factors alone.
        """
        assert isinstance(peft_config, MoDEConfig)  # a copy of PEFT's
        path = Path(path_initial_model_for_weight_conversion)
        check_conversion(peft_config, output_state_dict, path.name, set(peft_model.peft_config))
        peft_config.init_lora_weights = True
        peft_config.save_pretrained(str(path))
        converted = super()._convert_state_dict_for_initial_model(
            peft_model, peft_config, str(path), output_state_dict, kwargs
        )
        mixture = {name: v for name, v in output_state_dict.items() if MIXTURE in name}
        return converted | mixture

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Choose the active adapter; refuse several before the first layer has changed."""
        check_one_adapter([adapter_name] if isinstance(adapter_name, str) else adapter_name)
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, and activate another where it was the active one."""
        super().delete_adapter(adapter_name)
        # PEFT asks the first adapted layer, which need not have all adapters; the mixture has.
        norm = find_mixture_norm(self.model)
        if isinstance(norm, MoDELayer) and norm.active_adapters:
            self.set_adapter(norm.active_adapters)

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
        """Refuse, before the first layer is merged.

        Raises:
            ValueError: Always.
        """
        for layer in self.model.modules():
            if isinstance(layer, MoDELayer):
                layer.merge()

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: Any = None,
    ) -> Any:
        """Take adapters off; refuse what cannot be merged before the first layer has changed."""
        if merge:
            names = self.active_adapters if adapter_names is None else adapter_names
            check_merge(find_mixture_norm(self.model), names, safe_merge=safe_merge)
            part_adapted_weights(self.model)
        return super()._unload_and_optionally_merge(
            merge=merge,
            progressbar=progressbar,
            safe_merge=safe_merge,
            adapter_names=adapter_names,
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
    reader: Any = PeftConfig
    read = reader.from_peft_type

    def from_peft_type(cls: type[PeftConfig], **settings: Any) -> PeftConfig:
        """Read an adapter's settings, and refuse a mixture's under the name of another method."""
        check_type(settings)
        return read.__func__(cls, **settings)

    reader.from_peft_type = classmethod(from_peft_type)
