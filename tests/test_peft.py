"""The mixture as a PEFT method: every way of loading, switching, merging, running and refusing."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import shutil

import pytest
import torch
import torch.multiprocessing
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig, pipeline

from checkpoints import make_tokenizer, save_checkpoint
from depthmix import MoDEConfig
from depthmix.adapter import to_lora
from depthmix.adapter_config import PAPER_MODE
from depthmix.attachment import find_mixture_norm
from depthmix.mixture_norm import MoDENorm
from models import random_ids, randomise, tiny_model

INPUT_IDS = random_ids(3, 7)
OPTIONS = {"target_modules": ["q_proj", "up_proj"], "r": 2, "late_layers": 3}


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


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base_dir, tmp_path_factory):
    """Save a tuned model's adapter; give its folder and the logits."""
    tuned = tuned_model(AutoModelForCausalLM.from_pretrained(base_dir))
    folder = tmp_path_factory.mktemp("adapter")
    tuned.save_pretrained(folder)
    return folder, logits(tuned)


# Loading.


def test_saved_adapter_holds_the_adapter_alone(adapter):
    saved = load_file(adapter[0] / "adapter_model.safetensors")
    assert {key for key in saved if "lora_mode" in key} == {
        "base_model.model.model.norm.lora_mode.norms.2.weight",
        "base_model.model.model.norm.lora_mode.norms.3.weight",
        "base_model.model.model.norm.lora_mode.router.weight",
    }
    assert len(saved) == 3 + 2 * 2  # LoRA's two factors in two modules of the one layer below
    config = json.loads((adapter[0] / "adapter_config.json").read_text())
    assert config["peft_type"] == "MODE_LORA"
    assert config["final_norm"] == "model.norm"


@pytest.mark.parametrize(
    "load",
    [
        lambda base, adapter: PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base), adapter
        ),
        lambda base, adapter: PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base), adapter, low_cpu_mem_usage=True
        ),
        lambda _base, adapter: AutoPeftModelForCausalLM.from_pretrained(adapter),
        lambda _base, adapter: AutoModelForCausalLM.from_pretrained(adapter),
    ],
    ids=["PeftModel", "low_cpu_mem_usage", "AutoPeftModel", "AutoModel"],
)
def test_loaded_is_the_same(load, base_dir, adapter, caplog):
    with caplog.at_level(logging.INFO):
        model = load(base_dir, adapter[0]).eval()
    assert torch.equal(logits(model), adapter[1])
    assert "LOAD REPORT" not in caplog.text
    assert "MISSING" not in caplog.text


def test_plain_model_loads_and_switches_the_adapter(base_dir, adapter, caplog):
    model = AutoModelForCausalLM.from_pretrained(base_dir)
    plain = logits(model)
    with caplog.at_level(logging.INFO):
        model.load_adapter(adapter[0])
    assert torch.equal(logits(model), adapter[1])
    assert "MISSING" not in caplog.text
    model.disable_adapters()
    assert torch.equal(logits(model), plain)
    model.enable_adapters()
    assert torch.equal(logits(model), adapter[1])


# Several adapters.


def test_adapters_of_different_depth_are_switched_and_deleted():
    model = tiny_model()
    plain = logits(model)
    tuned = tuned_model(model, late_layers=2)
    shallow = logits(tuned)
    tuned.add_adapter("deep", MoDEConfig(target_modules=[], late_layers=4, top_k=2))
    assert torch.equal(logits(tuned), shallow)
    tuned.set_adapter("deep")
    deep = logits(redrawn(tuned, seed=6))
    assert not torch.allclose(deep, shallow, atol=1e-2)
    tuned.set_adapter("default")
    assert torch.equal(logits(tuned), shallow)
    with tuned.disable_adapter():
        assert torch.equal(logits(tuned), plain)
    assert torch.equal(logits(tuned), shallow)
    tuned.delete_adapter("default")
    assert torch.equal(logits(tuned), deep)
    assert not any(".default." in name for name, _ in tuned.named_parameters())


@pytest.mark.parametrize("name", ["second", "norms", "router", "0"])
def test_second_adapter_is_saved_and_loaded_by_its_name(name, tmp_path):
    tuned = tuned_model()
    tuned.add_adapter("other", MoDEConfig(**{**OPTIONS, "late_layers": [2, 4]}))
    tuned.set_adapter("other")
    expected = logits(redrawn(tuned, seed=6))
    tuned.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert not torch.equal(logits(loaded.eval()), expected)
    loaded.load_adapter(tmp_path / "other", adapter_name=name)
    loaded.set_adapter(name)
    assert torch.equal(logits(loaded), expected)


def test_only_the_active_adapter_is_trained():
    tuned = tuned_model()
    tuned.add_adapter("other", MoDEConfig(**OPTIONS))
    for active, idle in (("default", "other"), ("other", "default")):
        tuned.set_adapter(active)
        trained = [name for name, p in tuned.named_parameters() if p.requires_grad]
        assert f"base_model.model.model.norm.lora_mode.{active}.router.weight" in trained
        assert not any(f".{idle}." in name for name in trained)


def test_model_status():
    status = tuned_model().get_model_status()
    assert status.peft_types == {"default": "MODE_LORA"}
    assert status.active_adapters == ["default"]
    assert status.requires_grad == {"default": True}
    assert status.trainable_params == 2 * (16 + 16 + 16 + 24) + 2 * 16 + 3 * 16
    assert status.num_adapter_layers == 3


# Merging.


def test_merge_folds_lora_and_keeps_the_mixture():
    tuned = tuned_model()
    expected = logits(tuned)
    merged = tuned.merge_and_unload()
    assert type(merged) is type(tiny_model())
    assert not lora_targets(merged)
    assert isinstance(merged.model.norm, MoDENorm)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    assert {name for name in merged.state_dict() if "model.norm" in name} == {
        "model.norm.base_layer.weight",
        "model.norm.mixture.norms.2.weight",
        "model.norm.mixture.norms.3.weight",
        "model.norm.mixture.router.weight",
    }


def test_merge_of_a_chosen_adapter():
    tuned = tuned_model()
    tuned.add_adapter("other", MoDEConfig(**{**OPTIONS, "late_layers": 2}))
    tuned.set_adapter("other")
    expected = logits(redrawn(tuned, seed=6))
    tuned.set_adapter("default")
    merged = tuned.merge_and_unload(adapter_names=["other"])
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)


def test_unload_gives_the_base_back():
    base = tiny_model()
    plain, weights = logits(base), {name: p.clone() for name, p in base.state_dict().items()}
    unloaded = tuned_model(base).unload()
    assert torch.equal(logits(unloaded), plain)
    assert unloaded.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in unloaded.state_dict().items())
    hooks = [h for m in unloaded.modules() for h in (*m._forward_pre_hooks, *m._forward_hooks)]
    assert not hooks
    again = tuned_model(unloaded)
    assert torch.equal(logits(again), logits(tuned_model()))


# Generation.


def greedy(model, input_ids=INPUT_IDS[:1], **options):
    return model.generate(
        input_ids=input_ids, max_new_tokens=12, do_sample=False, eos_token_id=None, **options
    )


def naive_greedy(model, input_ids=INPUT_IDS[:1], num_tokens=12):
    """Decode without a cache: the whole sequence anew for every token."""
    for _ in range(num_tokens):
        following = logits(model, input_ids)[:, -1].argmax(-1, keepdim=True)
        input_ids = torch.cat([input_ids, following], dim=1)
    return input_ids


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cache_implementation": "static"},
        *({"assistant_early_exit": layer} for layer in (1, 2, 3, 4)),
    ],
    ids=lambda options: " ".join(map(str, options.values())) or "dynamic",
)
def test_generated_tokens_are_those_without_a_cache(options):
    tuned = tuned_model()
    expected = naive_greedy(tuned)
    assert len(set(expected[0, 7:].tolist())) > 3
    assert not torch.equal(expected, naive_greedy(tiny_model()))
    assert torch.equal(greedy(tuned, **options), expected)


def test_beams_equal_the_sequence_scores_without_a_cache():
    tuned = tuned_model()
    options = {"num_beams": 3, "early_stopping": False}
    cached = greedy(tuned, use_cache=True, **options)
    assert torch.equal(cached, greedy(tuned, use_cache=False, **options))
    assert not torch.equal(cached, greedy(tuned))


def test_left_padded_batch_equals_its_rows_alone():
    tuned = tuned_model()
    rows = [INPUT_IDS[0, :4], INPUT_IDS[1]]
    padded = torch.stack([torch.cat([torch.zeros(7 - len(row), dtype=int), row]) for row in rows])
    together = greedy(tuned, padded, attention_mask=(padded != 0).long())
    for row, tokens in zip(rows, together, strict=True):
        alone = greedy(tuned, row[None])[0]
        assert torch.equal(tokens[7:], alone[len(row) :])


def test_continuous_batching():
    tuned = tuned_model()
    rows = [INPUT_IDS[0, :4].tolist(), INPUT_IDS[1].tolist()]
    settings = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    limits = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=16)
    merged = tuned.merge_and_unload()
    outputs = merged.generate_batch(
        rows, generation_config=settings, continuous_batching_config=limits
    )
    answers = {tuple(out.prompt_ids): out.generated_tokens for out in outputs.values()}
    for row in rows:
        ids = torch.tensor([row])
        assert answers[tuple(row)] == naive_greedy(merged, ids, 6)[0, len(row) :].tolist()


def test_pipeline_generates_the_same_text(tmp_path):
    save_checkpoint(tmp_path)
    tokenizer = make_tokenizer()
    tuned = tuned_model(AutoModelForCausalLM.from_pretrained(tmp_path))
    generator = pipeline("text-generation", model=tuned, tokenizer=tokenizer)
    answer = generator("Q: 1+1?", max_new_tokens=5, do_sample=False, return_full_text=False)
    ids = tokenizer("Q: 1+1?", return_tensors="pt").input_ids
    expected = naive_greedy(tuned, ids, 5)[0, ids.shape[1] :]
    assert answer[0]["generated_text"] == tokenizer.decode(expected, skip_special_tokens=True)


# Tools around the model.


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("merged", [False, True])
def test_copies_stand_alone(clone, merged):
    tuned = tuned_model()
    if merged:
        tuned = tuned.merge_and_unload()
    expected = logits(tuned)
    twin = clone(tuned)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.zero_()
    assert torch.equal(logits(twin), expected)
    norm = find_mixture_norm(twin)
    assert norm.backbone.model is (twin if merged else twin.get_base_model())
    assert norm.objective.norm is norm
    twin.train()
    assert twin(INPUT_IDS, labels=INPUT_IDS).loss.isfinite()
    assert norm.objective.take() is not None


def test_lm_eval_loglikelihood_is_the_sum_by_hand(tmp_path):
    save_checkpoint(tmp_path)
    tokenizer = make_tokenizer()
    tuned = tuned_model(AutoModelForCausalLM.from_pretrained(tmp_path))
    judge = HFLM(pretrained=tuned, tokenizer=tokenizer, batch_size=1)
    request = Instance("loglikelihood", doc={}, arguments=("Q: 1+1?", " 2."), idx=0)
    [(value, is_greedy)] = judge.loglikelihood([request], disable_tqdm=True)
    prompt, answer = tokenizer("Q: 1+1?").input_ids, tokenizer(" 2.").input_ids
    log_probs = logits(tuned, torch.tensor([prompt + answer]))[0].log_softmax(-1)
    by_hand = sum(log_probs[len(prompt) - 1 + i, token] for i, token in enumerate(answer))
    assert value == pytest.approx(float(by_hand), rel=1e-5)
    assert not is_greedy


# Several processes.


def gradients_of(model, input_ids):
    model.zero_grad()
    model(input_ids=input_ids, labels=input_ids).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def work_in_one_of_two_processes(rank, folder):
    """Take one half of a batch through DDP and FSDP2, and compile; save what comes of it."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    half = random_ids(4, 7)[2 * rank : 2 * rank + 2]
    tuned = tuned_model(distillation_weight=0.3).train()
    found = {"DDP": gradients_of(DistributedDataParallel(tuned), half)}
    tuned = tuned_model(distillation_weight=0.3).train()
    for layer in tuned.get_base_model().model.layers:
        fully_shard(layer)
    sharded = gradients_of(fully_shard(tuned), half)
    found["FSDP2"] = {name: value.full_tensor() for name, value in sharded.items()}
    tuned = tuned_model(distillation_weight=0.3)
    if rank == 0:  # compiled here, since dynamo cannot look through the tests' type checks
        found["fullgraph"] = logits(torch.compile(tuned, fullgraph=True, backend="eager"))
    else:
        compiled = torch.compile(tuned.train(), backend="eager")
        found["compiled"] = gradients_of(compiled, random_ids(4, 7))
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def work_of_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(work_in_one_of_two_processes, args=(str(folder),), nprocs=2)
    return torch.load(folder / "1.pt") | torch.load(folder / "0.pt")


@pytest.mark.parametrize("way", ["DDP", "FSDP2", "compiled"])
def test_gradients_are_those_of_one_process(way, work_of_processes):
    tuned = tuned_model(distillation_weight=0.3).train()
    expected = gradients_of(tuned, random_ids(4, 7))
    gradients = {
        name.removeprefix("module.").removeprefix("_orig_mod."): value
        for name, value in work_of_processes[way].items()
    }
    assert gradients.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(gradients[name], value, rtol=1e-4, atol=1e-4)


def test_compiled_without_graph_breaks_is_the_same(work_of_processes):
    torch.testing.assert_close(work_of_processes["fullgraph"], logits(tuned_model()))


# Variants of LoRA.


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"target_modules": []},
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.(q|v)_proj"},
        {"rank_pattern": {"q_proj": 3}},
        {"modules_to_save": ["lm_head"]},
        {"adapt": "all", "layers_to_transform": [0, 3]},
    ],
    ids=lambda options: " ".join(options),
)
def test_variant_is_saved_loaded_and_merged(options, tmp_path):
    base = tiny_model()
    plain = logits(base)
    tuned = tuned_model(base, **options)
    expected = logits(tuned)
    assert not torch.allclose(expected, plain, atol=1e-2)
    tuned.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path).eval()
    assert torch.equal(logits(loaded), expected)
    torch.testing.assert_close(logits(tuned.merge_and_unload()), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("adapt", "layers"), [("below", {"0"}), ("all", {"0", "1", "2", "3"})])
def test_adapted_layers(adapt, layers):
    targets = lora_targets(tuned_model(target_modules="all-linear", adapt=adapt))
    assert {name.split(".")[4] for name in targets} == layers
    assert len(targets) == 7 * len(layers)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral"])
def test_expert_parameters_below_the_late_layers(model_type, tmp_path):
    options = {
        "target_modules": ["q_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        "lora_dropout": 0.0,
        "late_layers": 2,
    }
    tuned = tuned_model(tiny_model(model_type), **options)
    expected = logits(tuned)
    targets = lora_targets(tuned)
    assert {name.split(".")[4] for name in targets} == {"0", "1"}
    assert sum("experts" in name for name in targets) == 4
    tuned.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(model_type), tmp_path).eval()
    assert torch.equal(logits(loaded), expected)


# Configurations.


def test_from_lora_keeps_every_field():
    lora = LoraConfig(r=3, lora_alpha=5, target_modules=["v_proj"], use_dora=True, bias="none")
    before = copy.deepcopy(lora)
    config = MoDEConfig.from_lora(lora, late_layers=2, adapt="all")
    assert (config.r, config.lora_alpha, config.use_dora) == (3, 5, True)
    assert config.target_modules == {"v_proj"}
    assert (config.late_layers, config.adapt, config.peft_type) == (2, "all", "MODE_LORA")
    assert lora == before
    assert lora.peft_type == "LORA"


def test_one_configuration_serves_several_models():
    config = MoDEConfig(**OPTIONS)
    untouched = copy.deepcopy(config)
    get_peft_model(tiny_model(), config)
    assert config == untouched
    deeper = get_peft_model(tiny_model(num_hidden_layers=6), config)
    assert find_mixture_norm(deeper).active_mixture.late_layers == (4, 5, 6)


def test_from_preset():
    config = MoDEConfig.from_preset("paper", r=4)
    for name, value in PAPER_MODE.items():
        if name not in ("r", "target_modules"):
            assert getattr(config, name) == value
    assert config.target_modules == set(PAPER_MODE["target_modules"])
    assert config.r == 4
    with pytest.raises(ValueError, match="`preset` must be one of paper, got 'papper'"):
        MoDEConfig.from_preset("papper")


@pytest.mark.parametrize("adapt", ["all", "below"])
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "up_proj"]},
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj"], "use_dora": True},
    ],
    ids=["names", "all-linear", "dora"],
)
def test_to_lora_has_the_same_adapters(adapt, options):
    config = MoDEConfig(**{**OPTIONS, **options}, adapt=adapt)
    untouched = copy.deepcopy(config)
    lora = to_lora(config, tiny_model())
    assert config == untouched
    assert type(lora) is LoraConfig
    assert lora.peft_type == "LORA"
    plain = get_peft_model(tiny_model(), lora)
    assert find_mixture_norm(plain) is None
    tuned = get_peft_model(tiny_model(), config)
    assert lora_targets(plain) == lora_targets(tuned)
    shapes = {name: p.shape for name, p in plain.named_parameters() if p.requires_grad}
    assert shapes == {
        name: p.shape
        for name, p in tuned.named_parameters()
        if p.requires_grad and "lora_mode" not in name
    }


def test_to_lora_of_expert_parameters():
    options = {"target_parameters": ["mlp.experts.down_proj"], "target_modules": ["q_proj"]}
    config = MoDEConfig(**options, late_layers=2, r=2)
    plain = get_peft_model(tiny_model("qwen3_moe"), to_lora(config, tiny_model("qwen3_moe")))
    tuned = get_peft_model(tiny_model("qwen3_moe"), config)
    assert lora_targets(plain) == lora_targets(tuned)


# Refusals.


def test_merge_adapter_is_refused():
    tuned = tuned_model()
    before = logits(tuned)
    with pytest.raises(ValueError, match="`merge_adapter` cannot merge a mixture"):
        tuned.merge_adapter()
    assert torch.equal(logits(tuned), before)


def test_adapter_on_a_merged_mixture_is_refused():
    merged = tuned_model().merge_and_unload()
    with pytest.raises(RuntimeError, match="has an attached or merged mixture already"):
        tuned_model(merged)


def test_adapters_mixed_in_one_batch_are_refused():
    tuned = tuned_model()
    with pytest.raises(ValueError, match="`adapter_names` cannot mix adapters in one batch"):
        tuned(INPUT_IDS, adapter_names=["default", "__base__", "default"])
    with pytest.raises(ValueError, match="`adapter_names` cannot mix adapters in one batch"):
        greedy(tuned, INPUT_IDS, adapter_names=["default"] * 3)


def test_two_active_mixtures_are_refused():
    tuned = tuned_model()
    tuned.add_adapter("other", MoDEConfig(**OPTIONS))
    tuned.set_adapter("other")
    redrawn(tuned, seed=7)
    tuned.set_adapter("default")
    before = logits(tuned)
    with pytest.raises(ValueError, match="must name one MoDE adapter at a time"):
        tuned.base_model.set_adapter(["default", "other"])
    assert torch.equal(logits(tuned), before)


def test_weighted_sum_of_adapters_is_refused():
    tuned = tuned_model()
    tuned.add_adapter("other", MoDEConfig(**OPTIONS))
    with pytest.raises(ValueError, match="`add_weighted_adapter` cannot combine mixtures"):
        tuned.add_weighted_adapter(["default", "other"], [0.5, 0.5], "sum")


def test_plain_lora_beside_a_mixture_is_refused():
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        tuned_model().add_adapter("plain", LoraConfig(target_modules=["q_proj"]))


@pytest.mark.parametrize(
    ("shape", "message"),
    [({"num_hidden_layers": 5}, "4 layers and width 16.* 5 and 16"), ({"hidden_size": 24}, "24")],
)
def test_adapter_of_another_base_is_refused(shape, message, adapter):
    other = tiny_model(**shape)
    with pytest.raises(ValueError, match=f"adapter was made for a model of .*{message}"):
        PeftModel.from_pretrained(other, adapter[0])


def test_truncated_adapter_is_refused(adapter, tmp_path):
    shutil.copy(adapter[0] / "adapter_config.json", tmp_path)
    content = (adapter[0] / "adapter_model.safetensors").read_bytes()
    (tmp_path / "adapter_model.safetensors").write_bytes(content[:-100])
    with pytest.raises(Exception, match=r"(?i)incomplete|invalid|header"):
        PeftModel.from_pretrained(tiny_model(), tmp_path)


@pytest.mark.parametrize("lost", ["lora_mode.router", "lora_mode.norms.3", "q_proj.lora_B"])
def test_adapter_with_missing_weights_is_refused(lost, adapter, tmp_path):
    weights = load_file(adapter[0] / "adapter_model.safetensors")
    kept = {name: value for name, value in weights.items() if lost not in name}
    assert len(kept) == len(weights) - 1
    save_file(kept, tmp_path / "adapter_model.safetensors")
    shutil.copy(adapter[0] / "adapter_config.json", tmp_path)
    with pytest.raises(ValueError, match="lacks 1 of the adapter's tensors"):
        PeftModel.from_pretrained(tiny_model(), tmp_path)


@pytest.mark.parametrize("targets", [["no_such_proj"], ["q_proj", "no_such_proj"], "no.*such"])
def test_targets_that_match_nothing_are_refused(targets):
    with pytest.raises(ValueError, match=r"no_such_proj|no\.\*such"):
        tuned_model(target_modules=targets)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"late_layers": 5}, ValueError, r"between 1 and 4 \(the model has 4 layers\), got 5"),
        ({"late_layers": [2, 3]}, ValueError, "must end at the final layer, which is 4"),
        ({"late_layers": 4}, ValueError, "`adapt='below'` leaves no layer to adapt"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        tuned_model(**options)
