"""Exits in their folder: the same again, whole or not there, and refused on another model."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from adapters import tuned_model
from depthmix.adapters import exit_files
from depthmix.adapters.exit_files import find_exits, load_exits, read_exit_settings, save_exits
from depthmix.method.parts import find_parts, new_exits
from models import tiny_model


def make_exits(model, *, layers=(1, 3), rank=4):
    backbone, norm = find_parts(model)
    exits = new_exits(backbone, norm, layers, rank=rank)
    for parameter in exits.parameters():
        nn.init.normal_(parameter)
    return exits


def rewrite(folder, change, **settings):
    """Change the weights, and let the settings say that these are they."""
    weights = load_file(folder / "exits.safetensors")
    change(weights)
    save_file(weights, folder / "exits.safetensors")
    content = json.loads((folder / "exits.json").read_text())
    digest = hashlib.sha256((folder / "exits.safetensors").read_bytes()).hexdigest()
    content |= {"sha256": digest, **settings}
    (folder / "exits.json").write_text(json.dumps(content))


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("make", [tiny_model, lambda: tiny_model("gpt2"), tuned_model])
def test_what_was_saved_is_loaded(tmp_path, make, rank):
    model = make()
    exits = make_exits(model, rank=rank)
    folder = save_exits(exits, tmp_path / "run" / "exits", model="tiny", seed=3)
    assert sorted(path.name for path in folder.iterdir()) == ["exits.json", "exits.safetensors"]
    for place in (folder, folder.parent, str(folder.parent)):
        loaded = load_exits(place, model)
        assert loaded.layers == exits.layers
        assert loaded.rank == rank
        own = exits.state_dict()
        assert loaded.state_dict().keys() == own.keys()
        assert all(torch.equal(own[name], value) for name, value in loaded.state_dict().items())
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
        assert not loaded.training
    settings = read_exit_settings(folder)
    assert settings["about"] == {"model": "tiny", "seed": 3}
    assert settings["layers"] == [1, 3]


def test_exits_alone_at_some_layers(tmp_path):
    model = tiny_model()
    exits = make_exits(model, layers=(1, 2, 3))
    kept = exits.only([1, 3])
    states = torch.randn(2, 16)
    assert kept.layers == (1, 3)
    assert torch.equal(kept(3, states), exits(3, states))
    assert exits.layers == (1, 2, 3)
    assert load_exits(save_exits(kept, tmp_path), model).layers == (1, 3)
    with pytest.raises(ValueError, match=r"`layers` must be among the exits' own, \[1, 3\], got"):
        kept.only([2])


def test_there_is_nothing_where_there_is_nothing(tmp_path):
    assert find_exits(tmp_path) is None
    with pytest.raises(FileNotFoundError, match=r"`folder` must hold exits, and .* holds neither"):
        load_exits(tmp_path, tiny_model())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_hidden_layers": 5}, r"\(of tiny\), with `num_hidden_layers` 4, and it has 5"),
        ({"hidden_size": 32, "head_dim": 16}, "with `hidden_size` 16, and it has 32"),
    ],
)
def test_exits_of_another_model_are_refused(tmp_path, options, message):
    save_exits(make_exits(tiny_model()), tmp_path, model="tiny")
    with pytest.raises(ValueError, match=message):
        load_exits(tmp_path, tiny_model(**options))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("by_layer.1.up.weight"), "lacks by_layer.1.up.weight; copy"),
        (lambda w: w.update(more=torch.ones(1)), "holds more, which the exits on this model do"),
        (lambda w: w["by_layer.3.norm.weight"].fill_(float("nan")), "NaN or infinite values in by"),
        (
            lambda w: w.update({"by_layer.3.norm.weight": torch.ones(7)}),
            "has by_layer.3.norm.weight in another shape or type",
        ),
        (
            lambda w: w.update({"by_layer.3.norm.weight": torch.ones(16).half()}),
            "has by_layer.3.norm.weight in another shape or type",
        ),
    ],
)
def test_weights_are_exactly_the_exits_own(tmp_path, change, message):
    save_exits(make_exits(tiny_model()), tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        load_exits(tmp_path, tiny_model())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format_version": 2}, "`format_version` in .* must be 1, got 2; update depthmix"),
        ({"layers": 3}, "does not say what the exits are"),
        ({"layers": [True]}, "does not say what the exits are"),
        ({"rank": "4"}, "does not say what the exits are"),
        ({"about": []}, "has no section `about`"),
        ({"layers": [1, 9]}, r"is damaged \(`exits` must name layers below .*\); copy the folder"),
        ({"layers": [1]}, "holds by_layer.3.down.weight, by_layer.3.norm.weight"),
        ({"rank": 3}, "has by_layer.1.down.weight, .* in another shape"),
    ],
)
def test_settings_are_checked(tmp_path, settings, message):
    save_exits(make_exits(tiny_model()), tmp_path)
    rewrite(tmp_path, lambda weights: None, **settings)
    with pytest.raises(ValueError, match=message):
        load_exits(tmp_path, tiny_model())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "exits.json").write_text("{"), "exits.json cannot be read"),
        (lambda f: (f / "exits.safetensors").unlink(), "exits.safetensors is missing"),
        (lambda f: (f / "exits.safetensors").write_bytes(b"x"), "is not the file that exits.json"),
    ],
)
def test_damage_is_told(tmp_path, spoil, message):
    save_exits(make_exits(tiny_model()), tmp_path)
    spoil(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_exits(tmp_path, tiny_model())


def test_what_is_no_file_of_tensors_is_told(tmp_path):
    save_exits(make_exits(tiny_model()), tmp_path)
    (tmp_path / "exits.safetensors").write_bytes(b"x")
    content = json.loads((tmp_path / "exits.json").read_text())
    content["sha256"] = hashlib.sha256(b"x").hexdigest()
    (tmp_path / "exits.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="holds no weights"):
        load_exits(tmp_path, tiny_model())


def test_exits_that_diverged_are_not_saved(tmp_path):
    exits = make_exits(tiny_model())
    nn.init.constant_(exits.by_layer["3"].up.weight, float("inf"))
    with pytest.raises(ValueError, match=r"`exits` must be finite, and 1 of their tensors"):
        save_exits(exits, tmp_path / "exits")
    assert not (tmp_path / "exits").exists()


def test_an_interruption_leaves_none_and_no_plan_of_others(tmp_path, monkeypatch):
    first, second = make_exits(tiny_model()), make_exits(tiny_model())
    save_exits(first, tmp_path)
    (tmp_path / "plan.json").write_text("{}")

    def write_whole(path, content):
        if path.name == "exits.json":
            raise KeyboardInterrupt
        path.write_bytes(content)

    with monkeypatch.context() as patch:
        patch.setattr(exit_files, "write_whole", write_whole)
        with pytest.raises(KeyboardInterrupt):
            save_exits(second, tmp_path)
    assert find_exits(tmp_path) is None
    assert not (tmp_path / "plan.json").exists()
    save_exits(second, tmp_path)
    loaded = load_exits(tmp_path, tiny_model()).state_dict()
    assert torch.equal(loaded["by_layer.1.up.weight"], second.by_layer["1"].up.weight)


def test_what_cannot_be_json_changes_nothing(tmp_path):
    save_exits(make_exits(tiny_model()), tmp_path)
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_exits(make_exits(tiny_model()), tmp_path, model=object())
    load_exits(tmp_path, tiny_model())
