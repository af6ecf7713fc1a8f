"""Adapters on tied embeddings are merged once, and into what they adapt alone."""

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

import depthmix
from adapters import logits
from depthmix import MoDEConfig
from models import randomise, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT tells of tied weights

TARGETS = {
    "both, made alike": {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    "embeddings alone": {"target_modules": ["embed_tokens", "q_proj"]},
    "no tied weight": {"target_modules": ["q_proj"]},
}


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
def test_a_merge_over_tied_weights_changes_no_prediction(targets, tmp_path):
    base = tiny_model(tie_word_embeddings=True)
    tuned = get_peft_model(base, MoDEConfig(late_layers=2, r=2, **targets)).eval()
    randomise(tuned, only_trainable=True)
    expected = logits(tuned)
    merged = tuned.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-3, atol=1e-3)
    tied = merged.lm_head.weight is merged.model.embed_tokens.weight
    assert tied == (targets["target_modules"] == ["q_proj"])
    merged.save_pretrained(tmp_path)
    loaded = depthmix.load(tmp_path).eval()
    torch.testing.assert_close(logits(loaded), logits(merged))
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.tie_word_embeddings == tied
