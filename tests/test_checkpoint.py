"""A mixture without PEFT: attach, save, load, detach."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import AutoModelForCausalLM, TrainingArguments

import depthmix
from depthmix import MoDEConfig, MoDETrainer, attach, detach, set_top_k
from depthmix.adapters.checkpoint import read_mixture_options
from depthmix.method.norm import find_mixture_norm
from depthmix.models.loading import load_model
from depthmix.models.spec import ModelSpec
from models import random_ids, randomise, tiny_model

INPUT_IDS = random_ids(2, 7)


@torch.no_grad()
def logits(model):
    return model.eval()(INPUT_IDS).logits


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("options", [{}, {"router_init": "identity", "train_final_norm": True}])
def test_saved_is_the_same(model_type, options, tmp_path):
    model = tiny_model(model_type)
    plain = logits(model)
    norm = attach(model, late_layers=2, **options)
    randomise(norm.mixture, only_trainable=True)
    mixed = logits(model)
    set_top_k(model, 1)  # for a look, which is not saved
    model.save_pretrained(tmp_path)
    set_top_k(model, None)
    assert torch.equal(logits(model), mixed)
    assert torch.equal(logits(depthmix.load(tmp_path)), mixed)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), plain)
    detach(model)
    assert torch.equal(logits(model), plain)
    model.save_pretrained(tmp_path / "plain")
    assert read_mixture_options(tmp_path / "plain") is None


@pytest.mark.parametrize("max_shard_size", ["5GB", "10KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_adapter_can_be_saved(tmp_path, dtype, max_shard_size):
    tiny_model().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)
    tuned = get_peft_model(base, MoDEConfig(target_modules=["q_proj"], late_layers=2))
    randomise(tuned, only_trainable=True)
    merged = tuned.merge_and_unload()
    merged.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (max_shard_size == "10KB")
    loaded = depthmix.load(tmp_path, dtype=dtype)
    assert torch.equal(logits(loaded), logits(merged))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert torch.equal(plain.model.norm.weight, merged.model.norm.base_layer.weight)
    again = load_model(ModelSpec(name=str(tmp_path), dtype=str(dtype).removeprefix("torch.")))
    assert torch.equal(logits(again), logits(merged))


def test_a_trainers_checkpoint_is_gone_on_from_and_loaded(tmp_path):
    ids = random_ids(8, 7)
    data = Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})
    common = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_steps": 2}
    arguments = TrainingArguments(output_dir=str(tmp_path), max_steps=4, **common)

    def make_trainer():
        model = tiny_model()
        attach(model, late_layers=2, router_init="gaussian")
        randomise(find_mixture_norm(model), only_trainable=True)
        return MoDETrainer(model=model, args=arguments, train_dataset=data)

    whole = make_trainer()
    whole.train()
    first = depthmix.load(tmp_path / "checkpoint-2")
    assert not torch.equal(logits(first), logits(whole.model))
    resumed = make_trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(logits(resumed.model), logits(whole.model))
    assert torch.equal(logits(depthmix.load(tmp_path / "checkpoint-4")), logits(whole.model))


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "mixtral", "llama"])
@pytest.mark.parametrize("tied", [False, True])
def test_files_have_the_ordinary_names(model_type, tied, tmp_path):
    model = tiny_model(model_type, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "plain")
    ordinary = load_file(tmp_path / "plain" / "model.safetensors")
    norm = attach(model, late_layers=2)
    # What FSDP and DeepSpeed gather is given to `save_pretrained`, by the names in the model.
    for name, gathered in (("own", None), ("given", dict(model.state_dict()))):
        model.save_pretrained(tmp_path / name, state_dict=gathered)
        saved = load_file(tmp_path / name / "model.safetensors")
        assert {key for key in saved if ".mixture." not in key} == set(ordinary)
        assert all(torch.equal(saved[key], ordinary[key]) for key in ordinary)
        assert torch.equal(logits(depthmix.load(tmp_path / name)), logits(model))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    name = norm.backbone.final_norm_name
    renamed = {key.replace(f"{name}.base_layer", name): value for key, value in before.items()}
    for state in (before, renamed):
        randomise(model, seed=9)
        model.load_state_dict(state)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    detach(model)
    model.save_pretrained(tmp_path / "again")
    assert set(load_file(tmp_path / "again" / "model.safetensors")) == set(ordinary)


def test_distributed_state_dicts_are_whole():
    model = tiny_model()
    attach(model, late_layers=2)
    state = get_model_state_dict(model)
    assert set(state) == set(model.state_dict())
    set_model_state_dict(model, state)


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def test_a_sharded_model_is_saved_whole(one_process, tmp_path):
    plain = tiny_model()
    attach(plain, late_layers=2)
    expected = {key: value.clone() for key, value in plain.state_dict().items()}
    sharded = FullyShardedDataParallel(plain, use_orig_params=True, device_id=torch.device("cpu"))
    state = sharded.state_dict()
    assert set(state) == set(expected)
    plain = tiny_model()
    attach(plain, late_layers=2)
    plain.save_pretrained(tmp_path / "saved", state_dict=state)
    loaded = depthmix.load(tmp_path / "saved")
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, expected[key])


def test_a_configuration_that_tells_of_a_mixture_is_not_one(tmp_path):
    first = tiny_model()
    second = type(first)(first.config)  # which both share
    attach(first, late_layers=2)
    first.save_pretrained(tmp_path / "first")
    second.save_pretrained(tmp_path / "second")
    AutoModelForCausalLM.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "third")
    assert read_mixture_options(tmp_path / "first")["late_layers"] == [3, 4]
    for name in ("second", "third"):
        assert read_mixture_options(tmp_path / name) is None
        assert find_mixture_norm(load_model(ModelSpec(name=str(tmp_path / name)))) is None
    attach(second, late_layers=3)
    detach(second)
    detach(first)
    assert not hasattr(first.config, "mixture_of_depths")


def test_damage_is_one_sentence(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(FileNotFoundError, match="holds none; load"):
            depthmix.load(folder)
    attach(model, late_layers=2)
    model.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    complete = load_file(weights)

    def store(state):
        save_file(state, weights, metadata={"format": "pt"})

    lost = "model.norm.mixture.norms.3.weight"
    store({name: value for name, value in complete.items() if name != lost})
    with pytest.raises(ValueError, match=f"lack {lost}; the folder"):
        depthmix.load(tmp_path)
    store({name: value for name, value in complete.items() if name != "model.norm.weight"})
    with pytest.raises(ValueError, match=r"lack model\.norm\.weight; the folder"):
        depthmix.load(tmp_path)
    for name in (lost, "model.layers.1.mlp.up_proj.weight"):
        store(complete | {name: torch.zeros(3)})
        with pytest.raises(ValueError, match=rf"hold {name} of the shape \(3,\), which is not the"):
            depthmix.load(tmp_path)
    for name in ("model.other", "model.norm.mixture.norms.2.weight"):
        store(complete | {name: torch.zeros(2)})
        with pytest.raises(ValueError, match=f"hold {name}, which the model and its mixture do"):
            depthmix.load(tmp_path)
    for value in (torch.nan, torch.inf):
        store(complete | {lost: torch.full((16,), value)})
        with pytest.raises(ValueError, match=f"NaN or infinite values in {lost}"):
            depthmix.load(tmp_path)
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"model.safetensors is damaged"):
        depthmix.load(tmp_path)
    weights.unlink()
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"index.json is damaged"):
        depthmix.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is damaged"):
        depthmix.load(tmp_path)
    with pytest.raises(RuntimeError, match="has a mixture already"):
        attach(model, late_layers=2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, "auto", "float16", torch.float32])
@pytest.mark.parametrize("max_shard_size", ["5GB", "10KB"])
def test_the_mixture_is_read_in_float32(dtype, max_shard_size, tmp_path):
    model = tiny_model().to(torch.bfloat16)
    norm = attach(model, late_layers=2)
    randomise(norm.mixture, only_trainable=True)
    saved = {name: value.clone() for name, value in norm.mixture.state_dict().items()}
    assert not torch.equal(saved["norms.3.weight"].bfloat16().float(), saved["norms.3.weight"])
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    loaded = depthmix.load(tmp_path, dtype=dtype)
    mixture = find_mixture_norm(loaded).mixture
    for name, value in mixture.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, saved[name])
    widened = {"auto": torch.bfloat16, "float16": torch.float16}.get(dtype, dtype)
    assert loaded.dtype == widened


def test_each_variant_has_its_own_mixture(tmp_path):
    model = tiny_model()
    norm = attach(model, late_layers=2)
    model.save_pretrained(tmp_path)
    randomise(norm.mixture, only_trainable=True)
    model.save_pretrained(tmp_path, variant="other", max_shard_size="10KB")
    for variant in (None, "other"):
        loaded = depthmix.load(tmp_path, variant=variant)
        router = find_mixture_norm(loaded).mixture.router.bias
        assert torch.equal(router, norm.mixture.router.bias) == (variant == "other")
    with pytest.raises(FileNotFoundError, match="holds none"):
        depthmix.load(tmp_path, variant="missing")


CPU = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu"}
CPU |= {"lm_head": "cpu", **{f"model.layers.{i}": "cpu" for i in range(4)}}


@pytest.mark.parametrize("part", ["model.norm", "lm_head", "model.layers.3"])
def test_parts_on_disk(part, tmp_path):
    options = {"device_map": {**CPU, part: "disk"}, "offload_folder": tmp_path / "offloaded"}
    model = tiny_model()
    model.save_pretrained(tmp_path / "base")
    norm = attach(model, late_layers=2)
    expected = logits(model)
    offloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base", **options)
    attach(offloaded, late_layers=2)
    assert torch.equal(logits(offloaded), expected)
    randomise(norm.mixture, only_trainable=True)
    expected = logits(model)
    model.save_pretrained(tmp_path / "tuned")
    loaded = depthmix.load(tmp_path / "tuned", **options)
    assert torch.equal(logits(loaded), expected)
    with pytest.warns(UserWarning, match="save a model with offloaded modules"):
        loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(depthmix.load(tmp_path / "again")), expected)
