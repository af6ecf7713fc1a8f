"""The adapter's configuration: LoRA's options, the mixture's, and where the adapters go."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from peft import LoraConfig, PeftConfig
from transformers import PreTrainedModel
from transformers.utils import cached_file

from depthmix.adapters.peft_type import MODE_LORA
from depthmix.method.backbone import Backbone
from depthmix.method.config import MixtureConfig, is_idle
from depthmix.method.presets import PRESETS
from depthmix.options.types import checked_options

NAMING_PARTS = (
    *("target_modules", "exclude_modules", "modules_to_save"),
    *("layers_pattern", "target_parameters"),
)
"""Options of `LoraConfig` that hold names of the model's parts."""


@checked_options
@dataclass(kw_only=True)
class MoDEConfig(MixtureConfig, LoraConfig):
    """A `LoraConfig` with a mixture of depths on top.

    All of `LoraConfig` is there (rank, targets, DoRA, rsLoRA, …) beside the mixture's options.
    `target_modules=[]` trains the mixture alone.
    """

    adapt: Literal["all", "below"] = "below"
    """Layers that get LoRA adapters: all of them (LoRA_all), or those below the first late layer
    (the paper's LoRA_¬K, in which MoDE replaces the last layers' adapters)."""

    lora_alpha: int | float = 8  # pyrefly: ignore[bad-override]
    """LoRA's scale is this over `r`. PEFT gives a fraction to an adapter with rank stabilisation
    that it has made of PiSSA's."""

    base_num_hidden_layers: int | None = None
    """Decoder layers of the model that the adapter was made for; filled in by PEFT."""

    base_hidden_size: int | None = None
    """Width of the model that the adapter was made for; filled in by PEFT."""

    base_vocab_size: int | None = None
    """Tokens that the model knew which the adapter was made for; filled in by PEFT."""

    def __post_init__(self) -> None:
        LoraConfig.__post_init__(self)
        MixtureConfig.__post_init__(self)
        self._check_lora()
        if self.layer_replication:
            raise ValueError(
                "`layer_replication` changes the number of layers after the mixture has chosen its "
                "own; replicate the layers first, save that model, and tune it."
            )
        if self.arrow_config:
            raise ValueError(
                "`arrow_config` runs several adapters at once, and a model has one mixture at a "
                "time; leave it out, or give the plain LoRA adapters to Arrow and fold the mixture "
                "in before (`merge_and_unload()`)."
            )
        self.has_new_mixture = False  # whether the file is a plain LoRA adapter's; not saved
        self.peft_type = MODE_LORA
        self.task_type = self.task_type or "CAUSAL_LM"

    @classmethod
    def from_lora(cls, lora_config: LoraConfig, **options: Any) -> MoDEConfig:
        """Put a mixture on top of a LoRA configuration.

        Args:
            lora_config: Any LoRA configuration; it is not changed.
            options: Fields of `MixtureConfig`, and `adapt`, which is `all` here where nothing else
                is said, so that no adapter is lost.

        Returns:
            The same adapters with a mixture.
        """
        fields: dict[str, Any] = {"adapt": "all"}
        fields |= {
            field.name: copy.deepcopy(getattr(lora_config, field.name))
            for field in dataclasses.fields(lora_config)
            if field.init and field.name != "peft_type"
        }
        return cls(**fields | options)

    @classmethod
    def from_adapter(cls, adapter: Path | str, **options: Any) -> MoDEConfig:
        """Put a new mixture on top of a finished LoRA adapter.

        `PeftModel.from_pretrained(base, adapter, config=MoDEConfig.from_adapter(adapter),
        is_trainable=True)` then takes LoRA's weights from the adapter's file, and starts the
        mixture as a new one.

        Args:
            adapter: Folder of the adapter, or its id on the hub; it is not changed.
            options: Fields of `MixtureConfig`.

        Returns:
            The adapter's configuration with a mixture.

        Raises:
            ValueError: If it is no LoRA adapter.
        """
        lora = PeftConfig.from_pretrained(str(adapter))
        if type(lora) is not LoraConfig:
            raise ValueError(
                "`adapter` must be a plain LoRA adapter, which gets a mixture on top, and "
                f"{adapter} is of the type {lora.peft_type}; load that with "
                "`AutoPeftModelForCausalLM`."
            )
        config = cls.from_lora(lora, **{"inference_mode": False, **options})
        config.has_new_mixture = True
        return config

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
        return cls(**{**copy.deepcopy(PRESETS[preset]), **options})

    def _check_lora(self) -> None:
        """Check what PEFT takes, and what then has no effect or a wrong one."""
        if self.r < 1:
            raise ValueError(
                f"`r` must be at least 1, got {self.r}; `target_modules=[]` trains the mixture "
                "without adapters."
            )
        if self.lora_alpha == 0:
            raise ValueError(
                "`lora_alpha` must not be 0, by which all adapters are multiplied, so that they "
                "learn nothing; `target_modules=[]` trains the mixture without adapters."
            )
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(
                f"`lora_dropout` must be at least 0 and below 1, got {self.lora_dropout}; 0 drops "
                "nothing."
            )
        for name in NAMING_PARTS:
            value = getattr(self, name)
            if value == "" or (value and not all(part.strip() for part in value)):
                raise ValueError(
                    f"`{name}` must hold names of parts of the model, and an empty text is none, "
                    f"got {value!r}; leave it out, or name a part."
                )
        patterns = {**(self.rank_pattern or {}), **(self.alpha_pattern or {})}
        names = [self.target_modules, self.exclude_modules, *patterns]
        for pattern in (name for name in names if isinstance(name, str)):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    "`target_modules`, `exclude_modules` and the names in `rank_pattern` and "
                    f"`alpha_pattern` must be regular expressions, and {pattern!r} is none "
                    f"({error}); give a list to name parts as they are."
                ) from error
        for name, least in (("rank_pattern", 1), ("alpha_pattern", 0)):
            for value in (getattr(self, name) or {}).values():
                if isinstance(value, bool) or not isinstance(value, int | float) or value < least:
                    raise ValueError(
                        f"`{name}` must hold numbers of at least {least}, got {value!r}."
                    )
        layers = self.layers_to_transform
        if layers == []:
            raise ValueError(
                "`layers_to_transform` must hold at least one layer, and PEFT takes an empty list "
                "for all of them; leave it out, or give `target_modules=[]` to adapt none."
            )
        layers = [layers] if isinstance(layers, int) else layers or [0]
        if min(layers) < 0:
            raise ValueError(
                "`layers_to_transform` must hold indices of layers, which PEFT counts from 0 up, "
                f"got {min(layers)}."
            )

    def to_dict(self) -> dict[str, Any]:
        """Give what a file holds: as PEFT, and exits' options only where there are exits."""
        return {name: v for name, v in super().to_dict().items() if not is_idle(self, name)}

    def check_base(self, model: PreTrainedModel) -> None:
        """Check that the model has the shape that the adapter was made for.

        Raises:
            ValueError: If it has not.
        """
        base = model.config.get_text_config()
        shape = (base.num_hidden_layers, base.hidden_size)
        made_for = (self.base_num_hidden_layers, self.base_hidden_size)
        if made_for != (None, None) and made_for != shape:
            raise ValueError(
                f"The adapter was made for a model of {made_for[0]} layers and width "
                f"{made_for[1]}, and this one has {shape[0]} and {shape[1]}; load it on the model "
                f"it was made for ({self.base_model_name_or_path or 'unnamed'})."
            )
        known = (None, base.vocab_size, _read_vocab_size(model))
        if self.base_vocab_size not in known:
            raise ValueError(
                f"The adapter was made for a model of {self.base_vocab_size} tokens, and this one "
                f"has {base.vocab_size}; load it on the model it was made for "
                f"({self.base_model_name_or_path or 'unnamed'}), or, if tokens were added to that, "
                f"call `model.resize_token_embeddings({self.base_vocab_size})` before."
            )

    def resolve(self, backbone: Backbone) -> None:
        """Fill in what only the model tells."""
        self.base_num_hidden_layers = backbone.num_hidden_layers
        self.base_hidden_size = backbone.hidden_size
        self.base_vocab_size = backbone.model.config.get_text_config().vocab_size
        groups = self.trainable_token_indices or []
        lists = groups.values() if isinstance(groups, dict) else [groups]
        embeddings: Any = backbone.model.get_input_embeddings()
        num_tokens = embeddings.weight.shape[0]
        unknown = [index for some in lists for index in some if index not in range(num_tokens)]
        if unknown:
            raise ValueError(
                f"`trainable_token_indices` must be between 0 and {num_tokens - 1} (the model has "
                f"{num_tokens} tokens), got {unknown[0]}."
            )
        self.final_norm, self.decoder_layers = backbone.final_norm_name, backbone.layers_name
        first_late_layer = self.resolve_late_layers(backbone.num_hidden_layers)[0]
        if self.adapt == "below" and first_late_layer == 1 and self.target_modules != set():
            raise ValueError(
                "`adapt='below'` leaves no layer to adapt when all layers are in `late_layers`; "
                "use `adapt='all'`, or `target_modules=[]` for the mixture alone."
            )

    def adapts(self, name: str) -> bool:
        """Tell whether the layer that holds the module or parameter `name` gets adapters."""
        prefix = f"{self.decoder_layers}."
        if self.adapt == "all" or not name.startswith(prefix):
            return True
        layer = int(name.removeprefix(prefix).partition(".")[0]) + 1
        assert self.base_num_hidden_layers is not None
        return layer < self.resolve_late_layers(self.base_num_hidden_layers)[0]


def _read_vocab_size(model: PreTrainedModel) -> int | None:
    """Read how many tokens a model knows by its files; in memory, others may have been added."""
    if not model.name_or_path:
        return None
    path = cached_file(
        model.name_or_path,
        "config.json",
        local_files_only=True,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if path is None:
        return None
    settings = json.loads(Path(path).read_text("utf-8"))
    return settings.get("text_config", settings).get("vocab_size")
