"""The configuration of an export, which becomes that of its base model with the mixture in it."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig


class DepthmixConfig(PretrainedConfig):
    """What reads the `config.json` of an export, and never an instance of itself."""

    model_type = "depthmix"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Make the base model's configuration, by whose class and type vLLM knows what to do.

        Args:
            config_dict: Content of the file.
            kwargs: As transformers passes them.

        Returns:
            The configuration, with `mixture_of_depths` and the export's `architectures`.

        Raises:
            ValueError: If it names no base model that the installed transformers knows.
        """
        settings = dict(config_dict)
        base = settings.pop("base_model_type", None)
        if base not in CONFIG_MAPPING or not settings.get("mixture_of_depths"):
            raise ValueError(
                "`config.json` must be that of an export by depthmix, with a `base_model_type` "
                f"that transformers knows and `mixture_of_depths`, got {base!r}; export the run "
                "anew, or update transformers."
            )
        settings.pop("auto_map", None)  # the code beside the weights is for transformers alone
        return CONFIG_MAPPING[base].from_dict({**settings, "model_type": base}, **kwargs)
