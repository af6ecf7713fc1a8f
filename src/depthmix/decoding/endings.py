"""After which tokens a row has ended, and what pads it from there on."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import GenerationConfig


def find_endings(
    generation_config: GenerationConfig, device: torch.device
) -> tuple[int, Int[Tensor, " endings"]]:
    """Say what pads rows that have ended, and after which tokens padding follows."""
    ends, padding = generation_config._eos_token_tensor, generation_config._pad_token_tensor
    if ends is None or padding is None:
        return 0, torch.empty(0, dtype=torch.long, device=device)
    return int(padding), torch.cat([ends.view(-1), padding.view(-1)]).to(device)
