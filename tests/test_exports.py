"""Exports: each form is the run, in every architecture, or is refused."""

from __future__ import annotations

import copy
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from adapters import tuned_model
from depthmix.adapters.attach import attach
from depthmix.adapters.merged import check_exportable, store_in, take_apart
from depthmix.adapters.readout import reading_out
from depthmix.exports.folders import cut, write_layer, write_plain, write_transformers, write_vllm
from depthmix.exports.fresh_reading import go_on, load_for_vllm
from depthmix.exports.modeling_depthmix import __file__ as CODE
from depthmix.exports.settings import describe_mixture, describe_norm
from models import ARCHITECTURES, random_ids, randomise, tiny_model

INPUT_IDS = random_ids(2, 7)
GENERATION = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 0}


@pytest.fixture(autouse=True)
def modules(tmp_path, monkeypatch):
    """Where transformers copies code to that comes with a model."""
    place = str(tmp_path / "modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", place)
    monkeypatch.syspath_prepend(place)


@torch.no_grad()
def logits(model, input_ids=INPUT_IDS):
    return model.eval()(input_ids).logits


def mixed_model(model_type="llama", *, dtype=None, **options):
    """Put a mixture on a tiny model, random enough that each late layer has a say."""
    options = {"late_layers": [2, 3, 4], "router_init": "gaussian", **options}
    model = tiny_model(model_type)
    store_in(model, dtype or torch.float32)
    mixture = attach(model, **options).mixture
    randomise(mixture, seed=3)
    with torch.no_grad():
        mixture.router.weight.mul_(0.2)
    return model


def load_trusted(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()


class TestTransformers:
    @pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
    def test_every_architecture_is_the_same(self, model_type, tmp_path):
        model = mixed_model(model_type)
        expected = logits(model)
        prompts = [INPUT_IDS[0].tolist(), INPUT_IDS[1, :4].tolist()]
        tokens = [go_on(model, [prompt], 6, 0)[0] for prompt in prompts]
        write_transformers(take_apart(model), tmp_path, torch.float32)
        exported = load_trusted(tmp_path)
        torch.testing.assert_close(logits(exported), expected, rtol=1e-5, atol=1e-5)
        for prompt, own in zip(prompts, tokens, strict=True):
            assert torch.equal(go_on(exported, [prompt], 6, 0)[0], own)
        assert torch.equal(go_on(exported, prompts, 6, 0), torch.stack(tokens))

    @pytest.mark.parametrize(
        "options",
        [
            {"router_init": "identity", "train_final_norm": True, "router_input": "raw"},
            {"late_layers": [1, 4], "router_temperature": 0.5, "train_late_norms": False},
            {"top_k": 2, "exits": [1]},
        ],
    )
    @pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2"])
    def test_every_option_of_the_mixture(self, model_type, options, tmp_path):
        model = mixed_model(model_type, **options)
        expected = logits(model)
        write_transformers(take_apart(model), tmp_path, torch.float32)
        exported = load_trusted(tmp_path)
        torch.testing.assert_close(logits(exported), expected, rtol=1e-5, atol=1e-5)
        assert not any("exits" in name for name, _ in exported.named_parameters())

    def test_in_bfloat16_it_is_the_run_in_bfloat16(self, tmp_path):
        model = mixed_model(dtype=torch.bfloat16)
        expected = logits(model)
        write_transformers(take_apart(model), tmp_path, torch.bfloat16)
        exported = load_trusted(tmp_path, dtype="auto")
        assert torch.equal(logits(exported), expected)
        assert exported.dtype == torch.bfloat16
        assert {one.dtype for one in exported.mixture.parameters()} == {torch.float32}

    def test_lora_is_merged_and_tied_weights_stay_tied(self, tmp_path):
        model = tuned_model(tiny_model(tie_word_embeddings=True))
        expected = logits(model)
        write_transformers(take_apart(model), tmp_path, torch.float32)
        exported = load_trusted(tmp_path)
        torch.testing.assert_close(logits(exported), expected, rtol=1e-4, atol=1e-4)
        assert exported.lm_head.weight is exported.model.embed_tokens.weight

    def test_saved_again_it_is_the_same(self, tmp_path):
        model = mixed_model("qwen3_moe")
        (tmp_path / "one").mkdir()
        write_transformers(take_apart(model), tmp_path / "one", torch.float32)
        exported = load_trusted(tmp_path / "one")
        exported.save_pretrained(tmp_path / "two")
        again = load_trusted(tmp_path / "two")
        assert torch.equal(logits(again), logits(exported))
        assert (tmp_path / "two" / "modeling_depthmix.py").is_file()

    def test_it_learns_as_the_run(self, tmp_path):
        model = mixed_model()
        loss = model(INPUT_IDS, labels=INPUT_IDS, use_cache=False).loss
        write_transformers(take_apart(model), tmp_path, torch.float32)
        exported = load_trusted(tmp_path)
        own = exported(INPUT_IDS, labels=INPUT_IDS).loss
        own.backward()
        assert exported.mixture.router.weight.grad.abs().max() > 0
        assert float(own.detach()) <= float(loss.detach()) + 1e-4  # the run adds its distillation

    def test_without_trust_it_is_refused(self, tmp_path):
        write_transformers(take_apart(mixed_model()), tmp_path, torch.float32)
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=False)
        (tmp_path / "modeling_depthmix.py").unlink()
        with pytest.raises((OSError, ValueError), match="modeling_depthmix"):
            AutoConfig.from_pretrained(tmp_path, trust_remote_code=True)

    def test_threads_and_copies_do_not_meet(self, tmp_path):
        write_transformers(take_apart(mixed_model()), tmp_path, torch.float32)
        exported = load_trusted(tmp_path)
        twin = copy.deepcopy(exported)
        texts = [random_ids(1, 5 + n, seed=n) for n in range(4)]
        expected = [logits(exported, text) for text in texts]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda text: logits(exported, text), texts * 10))
        assert all(torch.equal(a, b) for a, b in zip(found, expected * 10, strict=True))
        nn.init.zeros_(exported.mixture.router.weight)
        assert torch.equal(logits(twin, texts[0]), expected[0])

    def test_a_pass_that_stops_early_is_refused(self, tmp_path):
        write_transformers(take_apart(mixed_model(late_layers=[2, 4])), tmp_path, torch.float32)
        exported = load_trusted(tmp_path)
        with pytest.raises(RuntimeError, match="leave `assistant_early_exit` out"):
            exported.generate(INPUT_IDS[:1], assistant_early_exit=3, **GENERATION)


class TestVllm:
    @pytest.mark.parametrize("model_type", ["llama", "mixtral", "qwen3_moe", "gemma2", "gpt2"])
    def test_the_files_are_an_ordinary_models_and_a_mixture(self, model_type, tmp_path):
        model = mixed_model(model_type)
        expected = logits(model)
        write_vllm(take_apart(model), tmp_path, torch.float32)
        exported = load_for_vllm(tmp_path, Path(CODE))
        torch.testing.assert_close(logits(exported), expected, rtol=1e-5, atol=1e-5)
        config = json.loads((tmp_path / "config.json").read_text())
        assert config["model_type"] == "depthmix"
        assert config["base_model_type"] == model_type
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
        assert index["mixture.router.weight"] == "mixture.safetensors"
        assert set(index.values()) == {path.name for path in tmp_path.glob("*.safetensors")}
        with pytest.raises(ValueError, match="depthmix"):
            AutoModelForCausalLM.from_pretrained(tmp_path)

    def test_a_norm_of_another_kind_is_refused(self, tmp_path):
        model = mixed_model()
        parts = take_apart(model)
        parts.backbone.final_norm.variance_epsilon = 7.0

        class Odd(type(parts.backbone.final_norm)):
            def forward(self, hidden_states):
                return super().forward(hidden_states) + 1

        parts.backbone.final_norm.__class__ = Odd
        with pytest.raises(ValueError, match="neither an RMSNorm nor a LayerNorm"):
            write_vllm(parts, tmp_path, torch.float32)
        assert list(tmp_path.iterdir()) == []


class TestLayers:
    @pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
    def test_a_late_layer_is_an_ordinary_model(self, model_type, tmp_path):
        model = mixed_model(model_type, late_layers=[3, 4])
        with reading_out(model, 3):
            expected = logits(model)
        write_layer(take_apart(model), 3, tmp_path, torch.float32)
        exported = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        torch.testing.assert_close(logits(exported), expected, rtol=1e-5, atol=1e-5)
        assert exported.config.num_hidden_layers == 3
        assert not hasattr(exported.config, "mixture_of_depths")

    def test_the_final_layer_has_its_own_norm_and_plain_the_pretrained(self, tmp_path):
        model = mixed_model(train_final_norm=True)
        with reading_out(model, "final"):
            own = logits(model)
        parts = take_apart(model)
        pretrained = logits(parts.model)
        write_layer(parts, 4, tmp_path / "layer", torch.float32)
        write_plain(parts, tmp_path / "plain", torch.float32)
        for name, expected in (("layer", own), ("plain", pretrained)):
            found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / name))
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(own, pretrained)

    def test_a_model_that_cannot_be_shorter_is_refused(self):
        parts = take_apart(mixed_model())

        class Fixed(type(parts.model.config)):
            @classmethod
            def from_dict(cls, settings, **_):
                raise ValueError("four layers or none")

        parts.model.config.__class__ = Fixed
        with pytest.raises(ValueError, match=r"cannot have 3 of its 4 layers \(four layers or"):
            cut(parts, 3)


class TestSettings:
    @pytest.mark.parametrize(
        ("model_type", "kind", "offset"),
        [
            ("llama", "rms", 0.0),
            ("gemma2", "rms", 1.0),
            ("gpt2", "layer", None),
            ("cohere", "layer", None),
            ("granite", "rms", 0.0),
            ("gpt_oss", "rms", 0.0),
        ],
    )
    def test_norms_are_known_by_what_they_do(self, model_type, kind, offset):
        settings = describe_mixture(take_apart(mixed_model(model_type)))
        assert settings["norm"]["kind"] == kind
        assert settings["norm"].get("offset") == offset
        json.dumps(settings)

    def test_what_is_no_norm_is_none(self):
        assert describe_norm(nn.Identity()) is None
        assert describe_norm(nn.GroupNorm(2, 16)) is None


class TestRefusals:
    def test_models_that_no_folder_can_hold(self):
        model = tiny_model()
        model.config.quantization_config = {"quant_method": "gptq"}
        with pytest.raises(ValueError, match="are quantised; name the same base"):
            check_exportable(model)
        prompted = tiny_model()
        config = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
        with pytest.raises(ValueError, match="PROMPT_TUNING puts tokens in front"):
            check_exportable(get_peft_model(prompted, config))
        odd = tiny_model()
        odd.__class__ = type("OwnForCausalLM", (type(odd),), {})
        with pytest.raises(ValueError, match="own models for text alone, and OwnForCausalLM"):
            check_exportable(odd)
