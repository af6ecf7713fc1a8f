"""A tuned tiny Llama: LoRA and a mixture with random weights."""

from __future__ import annotations

import torch
from peft import get_peft_model
from peft.tuners.lora import LoraLayer

from depthmix import MoDEConfig
from models import random_ids, randomise, tiny_model

INPUT_IDS = random_ids(3, 7)
OPTIONS = {
    "target_modules": ["q_proj", "up_proj"],
    "r": 2,
    "late_layers": 3,
    "router_init": "gaussian",
}


def tuned_model(model=None, *, seed=5, **options):
    """Put LoRA and a mixture with random weights on a tiny Llama."""
    tuned = get_peft_model(model or tiny_model(), MoDEConfig(**{**OPTIONS, **options}))
    return redrawn(tuned, seed=seed).eval()


def redrawn(model, *, seed):
    """Redraw what is trained, gently enough that every route is used."""
    randomise(model, seed=seed, only_trainable=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "norms" not in name:
                parameter.mul_(0.02 if "router" in name else 0.2)
    return model


@torch.no_grad()
def logits(model, input_ids=INPUT_IDS):
    return model(input_ids).logits


def lora_targets(model):
    return {name for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def greedy(model, input_ids=INPUT_IDS[:1], **options):
    return model.generate(
        input_ids=input_ids, max_new_tokens=12, do_sample=False, eos_token_id=None, **options
    )
