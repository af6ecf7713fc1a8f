"""What is loaded is what was saved: an adapter's weights by every way of loading."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest
import torch
from accelerate import cpu_offload, init_empty_weights
from peft import (
    AutoPeftModelForCausalLM,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    prepare_model_for_kbit_training,
    set_peft_model_state_dict,
)
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from adapters import logits, tuned_model
from depthmix import MoDEConfig
from depthmix.method.norm import active_mixture, find_mixture_norm
from depthmix.models.loading import load_model
from depthmix.models.spec import ModelSpec
from models import tiny_model

NORM = "model.norm.lora_mode."


def load_base(folder, dtype=torch.float32, **options):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)


def load_into_plain(base, adapter, **options):
    base.load_adapter(adapter, **options)
    return base


def inject(base, adapter, **options):
    inject_adapter_in_model(PeftConfig.from_pretrained(adapter), base, **options)
    weights = load_file(adapter / "adapter_model.safetensors")
    set_peft_model_state_dict(base, weights, **options)
    return base


def load_second(base, adapter):
    tuned = get_peft_model(base, MoDEConfig(late_layers=2, target_modules=["q_proj"]))
    tuned.load_adapter(adapter, "second")
    tuned.set_adapter("second")
    return tuned


def load_over(base, adapter):
    """Load as a trainer does that resumes, or goes back to its best step."""
    tuned = get_peft_model(base, PeftConfig.from_pretrained(adapter))
    tuned.load_adapter(adapter, "default", is_trainable=True)
    return tuned


def load_into_narrow(base, adapter):
    tuned = get_peft_model(base, PeftConfig.from_pretrained(adapter)).to(torch.bfloat16)
    set_peft_model_state_dict(tuned, load_file(adapter / "adapter_model.safetensors"))
    return tuned


def load_given(base, adapter, **options):
    weights = load_file(adapter / "adapter_model.safetensors")
    config = PeftConfig.from_pretrained(adapter)
    base.load_adapter(peft_config=config, adapter_state_dict=weights, **options)
    return base


DOORS = {
    "PeftModel": PeftModel.from_pretrained,
    "low_cpu_mem_usage": lambda b, a: PeftModel.from_pretrained(b, a, low_cpu_mem_usage=True),
    "no autocast": lambda b, a: PeftModel.from_pretrained(b, a, autocast_adapter_dtype=False),
    "trainable": lambda b, a: PeftModel.from_pretrained(b, a, is_trainable=True),
    "second": load_second,
    "over": load_over,
    "into narrow": load_into_narrow,
    "load_adapter": load_into_plain,
    "load_adapter, trainable": lambda b, a: load_into_plain(b, a, is_trainable=True),
    "load_adapter, named": lambda b, a: load_into_plain(b, a, adapter_name="other"),
    "load_adapter, given": load_given,
    "inject": inject,
    "inject, low_cpu_mem_usage": lambda b, a: inject(b, a, low_cpu_mem_usage=True),
    "kbit": lambda b, a: PeftModel.from_pretrained(prepare_model_for_kbit_training(b), a),
}


def assert_equals_file(model, adapter):
    mixture = active_mixture(model)
    saved = load_file(adapter / "adapter_model.safetensors")
    for name, parameter in mixture.named_parameters():
        assert parameter.dtype == torch.float32
        assert parameter.device.type == "cpu"
        assert torch.equal(parameter, saved[f"base_model.model.{NORM}{name}"])
    return mixture


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("door", DOORS)
def test_a_narrow_base_does_not_round_the_mixture(door, dtype, base_dir, adapter):
    model = DOORS[door](load_base(base_dir, dtype), adapter[0])
    mixture = assert_equals_file(model, adapter[0])
    learnt = mixture.norms["3"].weight
    assert not torch.equal(learnt.to(dtype).float(), learnt)


@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoPeftModelForCausalLM])
@pytest.mark.parametrize("options", [{"dtype": torch.bfloat16}, {"dtype": "float16"}, {}])
def test_the_dtype_of_the_base_is_not_the_mixtures(auto, options, base_dir, adapter):
    assert_equals_file(auto.from_pretrained(adapter[0], **options), adapter[0])
    if options:
        options = {"dtype": str(options["dtype"]).removeprefix("torch.")}
    section = ModelSpec(name=str(adapter[0]), **options)
    assert_equals_file(load_model(section), adapter[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_door_gives_the_same_logits(dtype, base_dir, adapter):
    expected = logits(PeftModel.from_pretrained(load_base(base_dir, dtype), adapter[0]))
    plain = AutoModelForCausalLM.from_pretrained(adapter[0], dtype=dtype)
    assert torch.equal(logits(plain), expected)
    assert torch.equal(logits(inject(load_base(base_dir), adapter[0])), adapter[1])


@pytest.mark.parametrize("door", ["PeftModel", "low_cpu_mem_usage", "load_adapter", "inject"])
@pytest.mark.filterwarnings("ignore:for .* copying from a non-meta parameter")
def test_a_base_on_the_meta_device_gives_the_mixture_its_values(door, base_dir, adapter):
    with init_empty_weights():
        base = tiny_model()
    assert_equals_file(DOORS[door](base, adapter[0]), adapter[0])
    with torch.device("meta"):
        base = type(base)(base.config)
    assert_equals_file(DOORS[door](base, adapter[0]), adapter[0])


def test_a_narrow_file_is_widened(base_dir, adapter, tmp_path):
    shutil.copytree(adapter[0], tmp_path, dirs_exist_ok=True)
    weights = load_file(adapter[0] / "adapter_model.safetensors")
    narrow = {name: tensor.bfloat16() for name, tensor in weights.items()}
    save_file(narrow, tmp_path / "adapter_model.safetensors")
    for door in ("PeftModel", "low_cpu_mem_usage", "load_adapter"):
        mixture = find_mixture_norm(DOORS[door](load_base(base_dir), tmp_path)).active_mixture
        for name, parameter in mixture.named_parameters():
            assert parameter.dtype == torch.float32
            assert torch.equal(parameter, narrow[f"base_model.model.{NORM}{name}"].float())


def test_a_file_of_pickles_is_read_and_checked(base_dir, adapter, tmp_path):
    shutil.copy(adapter[0] / "adapter_config.json", tmp_path)
    weights = load_file(adapter[0] / "adapter_model.safetensors")
    torch.save(weights, tmp_path / "adapter_model.bin")
    for door in ("PeftModel", "load_adapter"):
        model = DOORS[door](load_base(base_dir), tmp_path)
        assert torch.equal(logits(model.eval()), adapter[1])
    torch.save(dict(list(weights.items())[1:]), tmp_path / "adapter_model.bin")
    for door in ("PeftModel", "load_adapter"):
        with pytest.raises(ValueError, match="lacks 1 of the adapter's tensors"):
            DOORS[door](load_base(base_dir), tmp_path)


def with_nan(weights):
    weights[f"base_model.model.{NORM}router.weight"][0, 0] = torch.nan


def with_infinity(weights):
    weights["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"][0, 0] = torch.inf


def with_a_norm_of_another_layer(weights):
    weights[f"base_model.model.{NORM}norms.1.weight"] = torch.zeros(16)


def with_an_adapter_of_another_layer(weights):
    name = "base_model.model.model.layers.{}.self_attn.q_proj.lora_A.weight"
    weights[name.format(3)] = weights[name.format(0)].clone()


def with_a_wide_router(weights):
    weights[f"base_model.model.{NORM}router.weight"] = torch.zeros(4, 16)


def without_a_norm(weights):
    del weights[f"base_model.model.{NORM}norms.2.weight"]


def without_anything(weights):
    weights.clear()


FAULTS = {
    with_nan: r"NaN or infinite values in 1 of its tensors \(the first is .*router.weight\)",
    with_infinity: r"NaN or infinite values in 1 .*q_proj.lora_A",
    with_a_norm_of_another_layer: r"holds 1 tensors that its settings do not use .*norms.1.weight",
    with_an_adapter_of_another_layer: r"holds 1 tensors that .*layers.3.self_attn.q_proj.lora_A",
    with_a_wide_router: r"router.weight in the shape \(4, 16\), and its settings make that \(3, 16",
    without_a_norm: r"lacks 1 of the adapter's tensors .*norms.2.weight",
    without_anything: r"lacks 7 of the adapter's tensors|holds no weights",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_weights_that_are_not_the_adapters_are_refused(fault, base_dir, adapter, tmp_path):
    shutil.copytree(adapter[0], tmp_path, dirs_exist_ok=True)
    weights = load_file(adapter[0] / "adapter_model.safetensors")
    fault(weights)
    save_file(weights, tmp_path / "adapter_model.safetensors")
    for door in ("PeftModel", "low_cpu_mem_usage", "over", "load_adapter", "inject"):
        with pytest.raises(ValueError, match=FAULTS[fault]):
            DOORS[door](load_base(base_dir), tmp_path)
    for auto in (AutoModelForCausalLM, AutoPeftModelForCausalLM):
        with pytest.raises(ValueError, match=FAULTS[fault]):
            auto.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=FAULTS[fault]):
        load_model(ModelSpec(name=str(tmp_path)))


def test_a_refused_file_leaves_a_plain_model_as_it_was(base_dir, adapter, tmp_path):
    shutil.copytree(adapter[0], tmp_path, dirs_exist_ok=True)
    weights = load_file(adapter[0] / "adapter_model.safetensors")
    with_nan(weights)
    save_file(weights, tmp_path / "adapter_model.safetensors")
    base = load_base(base_dir)
    plain = logits(base)
    with pytest.raises(ValueError, match="NaN"):
        base.load_adapter(tmp_path)
    assert torch.equal(logits(base), plain)
    base.load_adapter(adapter[0])
    assert torch.equal(logits(base), adapter[1])
    with pytest.raises(ValueError, match="NaN"):
        base.load_adapter(tmp_path, adapter_name="second")
    assert torch.equal(logits(base), adapter[1])


def test_a_mixture_under_another_methods_name_is_refused(base_dir, adapter, tmp_path):
    shutil.copytree(adapter[0], tmp_path, dirs_exist_ok=True)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"peft_type": "LORA"}))
    message = r"`peft_type` must be MODE_LORA in the adapter_config.json .* got LORA, .* dropped"
    for door in ("PeftModel", "second", "load_adapter"):
        with pytest.raises(ValueError, match=message):
            DOORS[door](load_base(base_dir), tmp_path)
    for auto in (AutoModelForCausalLM, AutoPeftModelForCausalLM):
        with pytest.raises(ValueError, match=message):
            auto.from_pretrained(tmp_path)


def test_swapping_weights_in_place_is_refused(base_dir, adapter):
    tuned = DOORS["PeftModel"](load_base(base_dir), adapter[0])
    with pytest.raises(ValueError, match="MODE_LORA was passed"):
        hotswap_adapter(tuned, adapter[0], "default")
    plain = DOORS["load_adapter"](load_base(base_dir), adapter[0])
    with pytest.raises(ValueError, match="only supported for LoRA"):
        plain.load_adapter(adapter[0], adapter_name="default", hotswap=True)


def test_what_unloading_leaves_reads_other_adapters_as_ever(base_dir, adapter):
    tuned = DOORS["PeftModel"](load_base(base_dir), adapter[0])
    assert "_load_pretrained_model" in vars(tuned.get_base_model())
    assert "_load_pretrained_model" not in vars(tuned.unload())


def test_a_vocabulary_that_grew_is_the_one_that_is_saved(tmp_path):
    tuned = tuned_model()
    tuned.get_base_model().resize_token_embeddings(64, mean_resizing=False)
    tuned.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_vocab_size"] == 64
    state = get_peft_model_state_dict(tuned)
    assert len([name for name in state if ".lora_mode." in name]) == 3


CPU = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu"}
CPU |= {"lm_head": "cpu", **{f"model.layers.{i}": "cpu" for i in range(4)}}


def hashes(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def offloaded(base_dir, adapter, tmp_path, monkeypatch):
    """Load a base, named by a relative path, with one part on disk."""
    shutil.copytree(base_dir, tmp_path / "base")
    shutil.copytree(adapter[0], tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = "base"
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    monkeypatch.chdir(tmp_path)

    def options(part):
        return {"device_map": {**CPU, part: "disk"}, "offload_folder": "offloaded"}

    return options


@pytest.mark.parametrize("part", ["model.norm", "lm_head", "model.layers.2"])
def test_parts_on_disk_without_adapters(part, offloaded, adapter):
    loaded = AutoModelForCausalLM.from_pretrained("adapter", **offloaded(part)).eval()
    assert torch.equal(logits(loaded), adapter[1])
    loaded = load_base("base", **offloaded(part))
    loaded.load_adapter("adapter")
    assert torch.equal(logits(loaded), adapter[1])


@pytest.mark.parametrize("part", ["model.norm", "lm_head", "model.layers.0", "model.layers.2"])
def test_peft_writes_to_no_file_of_the_base(part, offloaded, tmp_path):
    base = load_base("base", **offloaded(part))
    before = hashes(tmp_path)
    message = f"`device_map` must put nothing on disk where PEFT loads .*{part} lies there"
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(base, "adapter", offload_folder="again")
    with pytest.raises(ValueError, match=message):
        AutoPeftModelForCausalLM.from_pretrained("adapter", **offloaded(part))
    assert hashes(tmp_path) == before


def test_adapters_on_disk_are_refused(offloaded, adapter):
    message = r"offload nothing that an adapter changes, and model.layers.0.\S* is offloaded"
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained("adapter", **offloaded("model.layers.0"))
    base = load_base("base", **offloaded("model.layers.0"))
    plain = logits(base)
    with pytest.raises(ValueError, match=message):
        base.load_adapter("adapter")
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, PeftConfig.from_pretrained("adapter"))
    config = MoDEConfig(late_layers=2, target_modules=[], modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match="lm_head is offloaded"):
        get_peft_model(load_base("base", **offloaded("lm_head")), config)
    assert torch.equal(logits(base), plain)


@pytest.mark.parametrize("door", ["PeftModel", "low_cpu_mem_usage", "load_adapter", "inject"])
def test_adapters_beside_weights_on_the_cpu_are_refused(door, base_dir, adapter):
    base = load_base(base_dir)
    plain = logits(base)
    cpu_offload(base, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"and model.layers.0.self_attn.q_proj is offloaded"):
        DOORS[door](base, adapter[0])
    assert torch.equal(logits(base), plain)


def test_a_mixture_of_an_offloaded_model(base_dir):
    model = load_base(base_dir)
    tuned = tuned_model(model, target_modules=[])
    expected = logits(tuned)
    cpu_offload(model, torch.device("cpu"))
    assert torch.equal(logits(tuned), expected)
    offloaded = load_base(base_dir)
    cpu_offload(offloaded, torch.device("cpu"))
    assert torch.equal(logits(tuned_model(offloaded, target_modules=[])), expected)


@pytest.mark.parametrize("device_map", ["cpu", "auto", CPU])
def test_a_device_map_without_disk(device_map, base_dir, adapter):
    base = load_base(base_dir, device_map=device_map)
    assert torch.equal(logits(PeftModel.from_pretrained(base, adapter[0])), adapter[1])
    plain = AutoModelForCausalLM.from_pretrained(adapter[0], device_map=device_map)
    assert torch.equal(logits(plain), adapter[1])
