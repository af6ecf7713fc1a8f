"""Tiny random decoders of many architectures, random enough that every error shows."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

SMALL = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 1.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
MOE |= {"moe_intermediate_size": 12, "decoder_sparse_step": 1}
GPT2_NAMES = {"n_embd": 16, "n_layer": 4, "n_head": 2, "n_positions": 64}

ARCHITECTURES: dict[str, dict] = {
    "llama": {},
    "mistral": {"sliding_window": 4},
    "mixtral": MOE,
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": MOE,
    "gemma2": {"final_logit_softcapping": 5.0, "query_pre_attn_scalar": 8, "sliding_window": 4},
    "gemma3_text": {"query_pre_attn_scalar": 8, "sliding_window": 4},
    "gpt2": GPT2_NAMES,
    "gpt_neox": {},
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 8},
    "phi": {},
    "phi3": {},
    "falcon": {"multi_query": True, "ffn_hidden_size": 24, "head_dim": None},
    "bloom": {"n_head": 2, "n_layer": 4},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 4.0},
    "olmo2": {},
    "glm": {"partial_rotary_factor": 0.5},
    "smollm3": {},
    "deepseek_v3": {
        **MOE,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "head_dim": 4,
        "v_head_dim": 8,
        "num_key_value_heads": 2,
    },
    "gpt_oss": {**MOE, "num_key_value_heads": 2},
}
"""Model types, each with what its configuration needs beside `SMALL`."""


def tiny_model(model_type: str = "llama", *, seed: int = 0, **options: object) -> PreTrainedModel:
    """Build a decoder of four layers and width 16 whose every parameter is random and large."""
    torch.manual_seed(seed)
    settings = {**SMALL, **ARCHITECTURES.get(model_type, {}), **options}
    settings = {name: value for name, value in settings.items() if value is not None}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings))
    randomise(model, seed=seed)
    return model.eval()


def randomise(module: nn.Module, *, seed: int = 0, only_trainable: bool = False) -> None:
    """Redraw norm weights and biases, or all trainable parameters, from a wide distribution."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        is_vector = parameter.dim() == 1 or "norm" in name or "ln_" in name
        if parameter.requires_grad if only_trainable else is_vector:
            with torch.no_grad():
                parameter.copy_(0.5 + torch.randn(parameter.shape, generator=generator))


def random_ids(*shape: int, seed: int = 1, vocab_size: int = 61) -> torch.Tensor:
    """Draw token ids, none of them a special token."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocab_size, shape, generator=generator)
