"""Sizes of models are read without what would run them, and are what transformers says."""

from __future__ import annotations

import json

import numpy as np
import pytest
from gguf import GGUFWriter
from transformers import AutoConfig, AutoModelForCausalLM

from depthmix_replication.gguf_header import read_header
from depthmix_replication.sizes import NUM_RECORDS, count_layers, count_parameters
from depthmix_replication.toy import write_toy_model, write_toy_records

OF_A_SIZE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "vocab_size": 99}
OF_A_SIZE |= {"num_attention_heads": 4}


def save(folder, model_type="llama", **options):
    config = AutoConfig.for_model(model_type, **OF_A_SIZE | options)
    config.save_pretrained(folder)
    return config


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("llama", {"num_key_value_heads": 2}),
        ("llama", {"tie_word_embeddings": True}),
        ("qwen3", {"head_dim": 32, "num_key_value_heads": 1}),
        ("mixtral", {"num_local_experts": 3}),
    ],
)
def test_parameters_are_counted_from_the_configuration(tmp_path, model_type, options):
    config = save(tmp_path, model_type, **options)
    model = AutoModelForCausalLM.from_config(config)
    expected = sum(parameter.numel() for parameter in model.parameters())
    assert count_parameters(str(tmp_path)) == pytest.approx(expected, rel=0.02)
    assert count_layers(str(tmp_path)) == 3


def test_a_configuration_of_other_names_is_read_by_transformers(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "gpt2", "n_layer": 5, "n_embd": 64, "n_head": 4})
    )
    assert count_layers(str(tmp_path)) == 5
    assert count_parameters(str(tmp_path)) > 50257 * 64


def test_a_model_that_sees_has_the_layers_of_its_language_model(tmp_path):
    inner = {**OF_A_SIZE, "model_type": "llama"}
    settings = {"model_type": "llava", "text_config": inner, "num_hidden_layers": 99}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert count_layers(str(tmp_path)) == 3


def test_a_model_that_is_not_there_is_told(tmp_path):
    with pytest.raises(OSError, match="there is no such folder"):
        count_layers(str(tmp_path / "none.gguf"))


def test_the_toy_model_is_as_large_as_is_said(tmp_path):
    folder = write_toy_model(tmp_path / "toy")
    assert count_layers("toy") == count_layers(str(folder))
    assert count_parameters("toy") == count_parameters(str(folder))
    path = write_toy_records(tmp_path, "choices", "test")
    assert len(path.read_text().splitlines()) == NUM_RECORDS


@pytest.fixture
def gguf_file(tmp_path):
    path = tmp_path / "model.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(7)
    writer.add_float64("a.double", 0.5)
    writer.add_bool("a.switch", True)
    writer.add_token_list(["a", "bc", "def"])
    writer.add_array("a.list", [1, 2, 3])
    writer.add_array("a.nested", [[1, 2], [3]])
    writer.add_string("a.text", "é")
    writer.add_tensor("one", np.zeros((2, 3), np.float32))
    writer.add_tensor("two", np.zeros(5, np.float32))
    for step in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{step}_to_file")()
    writer.close()
    return path


def test_a_gguf_file_says_its_size(gguf_file):
    header = read_header(gguf_file)
    assert header.num_weights == 2 * 3 + 5
    assert header.fields["general.architecture"] == "llama"
    assert header.fields["a.text"] == "é"
    assert (header.fields["a.double"], header.fields["a.switch"]) == (0.5, True)
    assert {"a.list", "a.nested", "tokenizer.ggml.tokens"}.isdisjoint(header.fields)
    assert count_layers(str(gguf_file)) == 7
    assert count_parameters(str(gguf_file)) == 11


def test_a_damaged_gguf_file_is_told(gguf_file):
    content = gguf_file.read_bytes()
    for damaged in (content[:40], b"GGML" + content[4:]):
        gguf_file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"model.gguf is no GGUF file that can be read"):
            read_header(gguf_file)
    gguf_file.write_bytes(content.replace(b"block_count", b"block_cound"))
    with pytest.raises(ValueError, match="does not say how many layers"):
        count_layers(str(gguf_file))
