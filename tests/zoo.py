"""Every causal language model that the installed transformers knows, as tiny as it can be made."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig, PreTrainedModel

from models import randomise

MAX_PARAMETERS = 3_000_000

TWO = "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads"
TWO += " num_experts_per_tok num_experts_per_token moe_k moe_topk top_k_experts index_n_heads"
TWO += " linear_num_key_heads linear_num_value_heads"
FOUR = "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_experts"
FOUR += " num_local_experts n_routed_experts moe_num_experts mamba_n_heads mamba_num_heads"
FOUR += " qk_rope_head_dim"
EIGHT = "head_dim d_kv mamba_d_head mamba_d_state mamba_head_dim ssm_state_size state_size"
EIGHT += " hidden_size_per_layer_input linear_key_head_dim linear_value_head_dim global_head_dim"
EIGHT += " index_head_dim q_lora_rank kv_lora_rank qk_nope_head_dim v_head_dim"
TWELVE = "moe_intermediate_size expert_intermediate_size shared_expert_intermediate_size"
SIXTEEN = "hidden_size d_model n_embd dim embed_dim embedding_size word_embed_proj_dim lru_width"
SIXTEEN += " attention_hidden_size"
TWENTY_FOUR = "intermediate_size ffn_dim n_inner ffn_hidden_size inner_dim d_ff dim_ff"
TWENTY_FOUR += " encoder_ffn_dim decoder_ffn_dim"
ONE = "num_key_value_heads n_group topk_group first_k_dense_replace mamba_n_groups n_groups"
SIXTY_FOUR = "max_position_embeddings n_positions max_seq_len"
SIZES: dict[str, int | float] = {"initializer_range": 0.5, "image_size": 28, "patch_size": 14}
SIZES |= {"vocab_size": 61, "vocab_size_per_layer_input": 61, "num_nextn_predict_layers": 0}
SIZES |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
for _size, _names in (
    (1, ONE),
    (2, TWO),
    (4, FOUR),
    (8, EIGHT),
    (12, TWELVE),
    (16, SIXTEEN),
    (24, TWENTY_FOUR),
    (64, SIXTY_FOUR),
):
    SIZES |= dict.fromkeys(_names.split(), _size)


def list_causal_models() -> list[tuple[type[PretrainedConfig], type[PreTrainedModel]]]:
    """List the pairs of configuration and model, each once."""
    pairs = []
    for config_class, found in MODEL_FOR_CAUSAL_LM_MAPPING.items():
        classes = found if isinstance(found, (list, tuple)) else [found]
        pairs += [(config_class, model_class) for model_class in classes]
    return pairs


def build(config_class: type[PretrainedConfig], model_class: type[PreTrainedModel]):
    """Build a model at random, or say why it cannot be made tiny.

    Returns:
        The model and "", or None and the reason of the last try.
    """
    reason = ""
    for config in _list_configs(config_class):
        try:
            options = config()
            with torch.device("meta"):
                size = sum(p.numel() for p in model_class(copy.deepcopy(options)).parameters())
            if size > MAX_PARAMETERS:
                reason = f"{size} parameters"
                continue
            torch.manual_seed(0)
            model = model_class(options).eval()
            randomise(model)
            with torch.no_grad():
                model(input_ids=torch.tensor([[3, 4, 5]]), use_cache=False)
        except Exception as error:  # whatever the model's own code raises
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
            continue
        return model, ""
    return None, reason


def _list_configs(config_class: type[PretrainedConfig]) -> Iterator:
    try:
        default = config_class()
        options = _shrunk(default)
        for name in getattr(default, "sub_configs", None) or {}:
            part = getattr(default, name, None)
            if isinstance(part, PretrainedConfig):
                options[name] = {**_shrunk(part), "model_type": type(part).model_type}
    except Exception as error:  # a configuration that has no defaults
        failure = error

        def fail() -> None:
            raise failure

        yield fail
        return
    for heads in ({}, {"num_key_value_heads": 2}):
        for left_out in ((), ("head_dim",)):
            given = {n: v for n, v in {**options, **heads}.items() if n not in left_out}
            yield lambda given=given: config_class(**copy.deepcopy(given))


def _shrunk(config: PretrainedConfig) -> dict:
    return {name: size for name, size in SIZES.items() if getattr(config, name, None) is not None}


def runs_alone(model: PreTrainedModel) -> bool:
    """Tell whether a model's answer depends on its input alone, and is finite."""
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        first, second = (model(input_ids=ids, use_cache=False).logits for _ in range(2))
    return bool(first.isfinite().all()) and torch.equal(first, second)
