"""The mixture of the vLLM plug-in is depthmix's; what needs vLLM itself is tested beside it."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from depthmix.adapters.attach import attach, detach
from depthmix.adapters.merged import Parts, take_apart
from depthmix.exports.folders import MODEL_TYPE, write_vllm
from depthmix.exports.settings import describe_mixture
from depthmix.method.mixture import mix
from depthmix_vllm import MODEL_TYPE as PLUGIN_TYPE
from depthmix_vllm.config import DepthmixConfig
from depthmix_vllm.mixing import Mixture
from models import randomise, tiny_model

PLUGIN = Path(__file__).parent.parent / "vllm-plugin"

OPTIONS = [
    {},
    {"late_layers": [1, 4], "train_final_norm": True, "router_init": "identity"},
    {"train_late_norms": False, "router_input": "raw", "router_temperature": 0.5},
    {"top_k": 2},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2", "cohere"])
@torch.no_grad()
def test_it_mixes_as_depthmix(model_type, options):
    options = {"late_layers": 3, "router_init": "gaussian", **options}
    model = tiny_model(model_type)
    norm = attach(model, **options)
    randomise(norm.mixture, seed=3)
    norm.mixture.router.weight.mul_(0.2)
    mixture, final_norm = norm.mixture, norm.base_layer
    parts = Parts(norm.backbone, mixture)
    detach(model)
    states = {depth: 3 * torch.randn(1, 5, 16) for depth in range(5)}
    routes = mixture(states, final_norm)
    expected = mix(routes.states, routes.weights)

    settings = describe_mixture(parts)
    has_bias = getattr(final_norm, "bias", None) is not None
    own = Mixture(settings, 16, has_bias=has_bias)
    own.load_state_dict(mixture.state_dict())
    assert set(own.depths) <= {*mixture.depths, 4}
    read = {depth: states[depth] for depth in own.depths}
    found = own(read, final_norm(states[4]), final_norm)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert own(read, states[4].bfloat16(), final_norm).dtype == torch.bfloat16
    assert {parameter.dtype for parameter in own.parameters()} == {torch.float32}


def test_an_export_is_read_as_its_base_with_a_mixture(tmp_path):
    model = tiny_model()
    attach(model, late_layers=2)
    write_vllm(take_apart(model), tmp_path, torch.float32)
    config = DepthmixConfig.from_pretrained(tmp_path)
    assert type(config) is LlamaConfig
    assert config.model_type == "llama"
    assert config.architectures == ["DepthmixLlamaForCausalLM"]
    assert config.mixture_of_depths["late_layers"] == [3, 4]
    for settings in ({}, {"base_model_type": "llama"}, {"base_model_type": "no", "a": 1}):
        with pytest.raises(ValueError, match="must be that of an export by depthmix"):
            DepthmixConfig.from_dict(settings)


def test_the_package_needs_nothing_and_is_found_by_vllm():
    project = tomllib.loads((PLUGIN / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["dependencies"] == []
    assert project["entry-points"]["vllm.general_plugins"] == {"depthmix": "depthmix_vllm:register"}
    assert PLUGIN_TYPE == MODEL_TYPE
    code = "import sys, depthmix_vllm; sys.exit('torch' in sys.modules or 'vllm' in sys.modules)"
    command = [sys.executable, "-c", code]
    subprocess.run(command, env={"PYTHONPATH": str(PLUGIN / "src")}, check=True)
    for path in (PLUGIN / "src").rglob("*.py"):
        assert "depthmix." not in path.read_text("utf-8").replace("/depthmix.", "")


def test_a_mixture_of_all_layers_reads_each_once():
    settings = {"late_layers": [1, 2], "own_norms": [1, 2], "norm": None, "router_bias": False}
    own = Mixture(settings, 4, has_bias=True)
    assert own.depths == (0, 1, 2)
    assert isinstance(own.norms["1"], nn.Module)
    assert own.norms["1"].bias is not None
