"""vLLM's models with a mixture: each is made when vLLM asks for it by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from vllm import ModelRegistry
from vllm.logger import init_logger
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.interfaces import supports_eagle3

from depthmix_vllm import PREFIX
from depthmix_vllm.mixing import Mixture

logger = init_logger("vllm.depthmix")

WEIGHTS = "mixture."
"""What the names of a mixture's weights begin with."""


class MixtureOfDepths(nn.Module):
    """What a class of vLLM's is derived from beside its base, to answer by a mixture."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        config = vllm_config.model_config.hf_config
        settings: Mapping[str, Any] = config.mixture_of_depths
        has_bias = getattr(self._holder.norm, "bias", None) is not None
        self.mixture = Mixture(settings, config.hidden_size, has_bias=has_bias)
        self.drafted: tuple[int, ...] = ()
        self.set_aux_hidden_state_layers(())
        layers = ", ".join(map(str, self.mixture.late_layers))
        kind = type(self).__name__.removeprefix(PREFIX)
        logger.info("Mixture of depths is on: layers %s of %s vote on each token.", layers, kind)

    @property
    def _holder(self) -> Any:
        """The module that holds the layers and the final norm."""
        return getattr(self, "model", self)

    def set_aux_hidden_state_layers(self, layers: tuple[int, ...]) -> None:
        """Have the base hand out residual streams: ours, and those that a draft model reads.

        Args:
            layers: Depths that a draft model asks for.
        """
        self.drafted = tuple(sorted(set(layers)))
        super().set_aux_hidden_state_layers((*self.mixture.depths, *self.drafted))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the base, and mix what it hands out, on the rank that has the last layer."""
        output = super().forward(*args, **kwargs)
        if not isinstance(output, tuple):
            if torch.is_tensor(output):
                raise RuntimeError(
                    f"{type(self).__name__} hands out no residual streams in this version of vLLM, "
                    "so its depths cannot be mixed; use another version."
                )
            return output  # goes to the next pipeline rank
        normed, handed = output
        depths = sorted({*self.mixture.depths, *self.drafted})
        if len(handed) != len(depths):
            raise RuntimeError(
                f"The residual streams at {depths} are needed, and {len(handed)} were handed out; "
                "use `--pipeline-parallel-size 1` for this model."
            )
        states = dict(zip(depths, handed, strict=True))
        mixed = self.mixture(states, normed, self._holder.norm)
        return (mixed, [states[depth] for depth in self.drafted]) if self.drafted else mixed

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the mixture's weights, and let the base load the others.

        Args:
            weights: By the names that they have in the files.

        Returns:
            The names of those that were loaded.

        Raises:
            ValueError: If weights of the mixture are missing or do not fit.
        """
        own = dict(self.mixture.named_parameters())
        loaded: set[str] = set()

        def rest() -> Iterable[tuple[str, Tensor]]:
            for name, tensor in weights:
                if not name.startswith(WEIGHTS):
                    yield name, tensor
                    continue
                key = name.removeprefix(WEIGHTS)
                if key not in own or own[key].shape != tensor.shape:
                    raise ValueError(
                        f"The export's weights hold {name} of the shape {tuple(tensor.shape)}, "
                        "which its settings do not have; export the run anew."
                    )
                default_weight_loader(own[key], tensor)
                loaded.add(key)

        found = super().load_weights(rest())
        if missing := sorted(own.keys() - loaded):
            raise ValueError(
                f"The export's weights lack {', '.join(WEIGHTS + name for name in missing)}; "
                "export the run anew."
            )
        return {*(found or ()), *(WEIGHTS + name for name in own)}


def __getattr__(name: str) -> type[nn.Module]:
    """Make the class of an export from its base's, `DepthmixLlamaForCausalLM` for example."""
    architecture = name.removeprefix(PREFIX)
    if architecture == name or architecture not in ModelRegistry.models:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    base = ModelRegistry.models[architecture].load_model_cls()
    if not supports_eagle3(base):
        raise ValueError(
            f"`architectures` names {name}, and vLLM's {architecture} hands out no residual "
            "streams (`SupportsEagle3`), so its depths cannot be mixed; export one layer, or serve "
            "the form `transformers` by transformers."
        )
    kind = type(name, (MixtureOfDepths, base), {"__module__": __name__, "__doc__": base.__doc__})
    globals()[name] = kind
    return kind
