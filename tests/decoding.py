"""Models and prompts to generate from, and how two results are compared."""

from __future__ import annotations

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from depthmix import attach
from depthmix.method.norm import active_mixture
from models import random_ids, tiny_model

DECODERS = ["llama", "mistral", "gemma2", "gemma3_text", "qwen3", "gpt_neox"]


def make_model(model_type="llama", *, dtype=torch.float64, **options):
    model = tiny_model(model_type).requires_grad_(False).to(dtype)
    attach(model, **{"late_layers": 3, **options})
    active_mixture(model).to(dtype)
    return model.eval()


def top_1(model_type="llama", **options):
    """Build a model whose own router spreads the tokens over its routes."""
    model = make_model(model_type, router_init="gaussian", top_k=1, **options)
    router = active_mixture(model).router
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        router.weight.copy_(torch.randn(router.weight.shape, generator=generator))
    return model


def prompts(batch, length, *, padded, seed=1):
    ids = random_ids(batch, length, seed=seed)
    mask = torch.ones_like(ids)
    if padded:
        for row in range(1, batch):
            mask[row, : min(row, length - 1)] = 0
    return {"input_ids": torch.where(mask.bool(), ids, 0), "attention_mask": mask}


def decode(generator, inputs, **options):
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    torch.manual_seed(3)
    return generator.generate(**inputs, **{**settings, **options})


def assert_same(found, expected, inputs, **tolerance):
    assert torch.equal(found.sequences, expected.sequences)
    for ours, truth in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, truth, **tolerance)
    mask = inputs["attention_mask"]
    for ours, truth in zip(
        found.past_key_values.layers, expected.past_key_values.layers, strict=True
    ):
        assert ours.get_seq_length() == truth.get_seq_length()
        length, first = truth.keys.shape[-2], truth.get_seq_length() - truth.keys.shape[-2]
        real = torch.ones(len(mask), truth.get_seq_length(), dtype=torch.bool)
        real[:, : mask.shape[1]] = mask.bool()
        real = real[:, first : first + length]
        for a, b in ((ours.keys, truth.keys), (ours.values, truth.values)):
            torch.testing.assert_close(
                a.transpose(1, 2)[real], b.transpose(1, 2)[real], **tolerance
            )


def follow(sequences):
    """Let the loop choose the tokens of these sequences, whatever the logits say."""

    class Follow(LogitsProcessor):
        def __call__(self, input_ids, scores):
            chosen = sequences[:, input_ids.shape[1], None]
            return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)

    return LogitsProcessorList([Follow()])


def call_at(length, function):
    """Call a function, as a stopping criterion that never stops, once there are so many tokens."""

    class Call(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            if input_ids.shape[1] == length:
                function(input_ids)
            return torch.zeros(len(input_ids), dtype=torch.bool)

    return StoppingCriteriaList([Call()])


def own_functions(model):
    """Say which functions and hooks each module holds by itself."""
    names = {"forward", "_replaced_forward", "weigh"}
    return {
        name: (vars(module).keys() & names, list(module._forward_pre_hooks))
        for name, module in model.named_modules()
    }
