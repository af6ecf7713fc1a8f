"""`depthmix export`: a folder that is whole and right, or none; and what it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from inspect import unwrap
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import depthmix
from adapters import redrawn
from checkpoints import make_model, make_tokenizer
from depthmix import MoDEConfig, export
from depthmix.exports import export as module
from depthmix.exports.checking import ExportCheck, Reference, check_right, compare
from depthmix.exports.folders import write_transformers
from depthmix_cli import main
from fresh import run_fresh

RECORDS = [{"prompt": f"{n} + {n} =", "completion": f" {2 * n}"} for n in range(6)]

WITHOUT_DEPTHMIX = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, text = sys.argv[1:]
sys.modules["depthmix"] = None
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
ids = tokenizer(text, return_tensors="pt").input_ids
print(model(ids).logits.double().sum().item())
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run in which each late layer has a say, with records, over a tiny base."""
    folder = tmp_path_factory.mktemp("export")
    tokenizer = make_tokenizer()
    make_model(tokenizer).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    model = depthmix.load_model(folder / "base")
    options = {"late_layers": [2, 3, 4], "r": 2, "target_modules": ["q_proj", "up_proj"]}
    config = MoDEConfig(**options, router_init="gaussian", task_type="CAUSAL_LM")
    tuned = redrawn(get_peft_model(model, config), seed=5)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_mode" in name:
                parameter.copy_(1 + 0.1 * parameter if "norms" in name else parameter)
    tuned.save_pretrained(folder / "run")
    tokenizer.save_pretrained(folder / "run")
    (folder / "held-out.jsonl").write_text("\n".join(map(json.dumps, RECORDS)))
    return folder


@pytest.fixture(autouse=True)
def in_its_folder(run, monkeypatch):
    monkeypatch.chdir(run)


def unchecked(monkeypatch):
    """Let the check alone, which takes a process of its own."""
    answer = {}

    def remember(model, tokenizer, **options):
        reference = ask_run(model, tokenizer, **options)
        answer["tokens"] = reference.tokens
        answer.update({f"logits_{n}": one for n, one in enumerate(reference.logits)})
        return reference

    ask_run = module.ask_run
    monkeypatch.setattr(module, "ask_run", remember)
    monkeypatch.setattr(module, "ask_folder", lambda *_: answer)


class TestTheWholeOfIt:
    def test_a_folder_that_transformers_runs_without_depthmix(self, run, capsys):
        assert main(["export", "run", "out", "--form", "transformers"]) == 0
        said = capsys.readouterr().out
        assert "96 of 96 greedy tokens are the run's" in said
        assert "Exits are left out" in said
        assert said.endswith("Saved in out.\n")
        names = {path.name for path in (run / "out").iterdir()}
        assert {"README.md", "check.json", "modeling_depthmix.py", "tokenizer.json"} <= names
        assert str(run) not in "".join(
            (run / "out" / name).read_text() for name in ("config.json", "README.md")
        )
        environment = {**os.environ, "HF_MODULES_CACHE": str(run / "modules")}
        command = [sys.executable, "-c", WITHOUT_DEPTHMIX, "out", "1 + 1 ="]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        model, tokenizer = depthmix.load_model("run"), depthmix.load_tokenizer("run")
        ids = tokenizer("1 + 1 =", return_tensors="pt").input_ids
        with torch.no_grad():
            expected = model.eval()(ids).logits.double().sum().item()
        assert float(done.stdout) == pytest.approx(expected, abs=1e-2)
        check = json.loads((run / "out" / "check.json").read_text())
        assert len(check["tokens"][0]) == len(check["logprobs"][0]) == 32

    @pytest.mark.slow
    @pytest.mark.parametrize("options", [{"form": "vllm"}, {"form": "layer", "layer": 3}])
    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_other_forms_and_types(self, run, options, dtype):
        name = f"{options['form']}-{dtype}"
        exported = export("run", name, data="held-out.jsonl", dtype=dtype, **options)
        assert exported.check.is_right
        assert exported.check.logit_difference > 0
        weights = [load_file(path) for path in (run / name).glob("model*.safetensors")]
        assert {str(one.dtype) for one in weights[0].values()} == {f"torch.{dtype}"}

    def test_another_model_is_an_error_and_removes_nothing(self, run, monkeypatch):
        (run / "mine").mkdir()
        (run / "mine" / "notes.txt").write_text("mine")

        def spoil(parts, folder, dtype):
            write_transformers(parts, folder, dtype)
            path = folder / "model.safetensors"
            weights = load_file(path)
            weights["mixture.router.weight"] = weights["mixture.router.weight"] + 1
            weights["mixture.norms.2.weight"] = -weights["mixture.norms.2.weight"]
            save_file(weights, path, metadata={"format": "pt"})

        monkeypatch.setattr(module, "write_transformers", spoil)
        before = sorted(run.iterdir())
        with pytest.raises(RuntimeError, match="is another model than the run, so nothing is kept"):
            export("run", "mine", form="transformers", overwrite=True)
        assert sorted(run.iterdir()) == before
        assert (run / "mine" / "notes.txt").read_text() == "mine"

    def test_what_cannot_be_loaded_is_an_error(self, run, monkeypatch):
        def spoil(parts, folder, dtype):
            write_transformers(parts, folder, dtype)
            (folder / "modeling_depthmix.py").write_text("1 / 0\n")

        monkeypatch.setattr(module, "write_transformers", spoil)
        with pytest.raises(RuntimeError, match=r"process of its own \(ZeroDivisionError"):
            export("run", "broken", form="transformers")
        assert not (run / "broken").exists()


class TestWhatIsLost:
    def test_a_layer_says_what_it_loses(self, monkeypatch, capsys):
        unchecked(monkeypatch)
        options = ["--layer", "3", "--data", "held-out.jsonl", "--dtype", "float32"]
        assert main(["export", "run", "out-3", "--form", "layer", *options]) == 0
        said = capsys.readouterr().out
        assert "Lost on 6 records" in said
        assert "the same as the run's in" in said
        assert "Lost on 6 records" in Path("out-3/README.md").read_text()

    def test_losses_are_those_of_training(self, monkeypatch):
        unchecked(monkeypatch)
        exported = export("run", "out-4", form="layer", layer="final", data="held-out.jsonl")
        model, tokenizer = depthmix.load_model("run").eval(), depthmix.load_tokenizer("run")
        total, count = 0.0, 0
        for record in RECORDS:
            prompt = tokenizer(record["prompt"]).input_ids
            rest = tokenizer(record["completion"] + tokenizer.eos_token).input_ids
            ids = torch.tensor([prompt + rest])
            with torch.no_grad():
                log_probs = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            total -= float(log_probs.gather(-1, torch.tensor(rest)[:, None]).sum())
            count += len(rest)
        assert exported.layer == 4
        assert exported.loss.num_tokens == count
        assert exported.loss.run_loss == pytest.approx(total / count, rel=1e-5)
        assert exported.loss.own_loss != pytest.approx(exported.loss.run_loss, abs=1e-3)
        assert 0 <= exported.loss.agreement <= 1

    def test_plain_is_refused_unseen_or_at_too_high_a_price(self, run, monkeypatch):
        unchecked(monkeypatch)
        with pytest.raises(ValueError, match="`data` must name records for the form `plain`"):
            export("run", "plain", form="plain")
        with pytest.raises(ValueError, match=r"`max_lost` allows -9 nats a token"):
            export("run", "plain", form="plain", data="held-out.jsonl", max_lost=-9.0)
        assert not (run / "plain").exists()
        exported = export(
            "run", "plain", form="plain", data="held-out.jsonl", max_lost=float("inf")
        )
        assert "nats a token" in str(exported)

    def test_without_a_mixture_nothing_is_lost(self, run, monkeypatch):
        unchecked(monkeypatch)
        exported = export("base", "plain-base", form="plain")
        assert exported.loss is None
        with pytest.raises(ValueError, match="`form` must be `plain` for a model without"):
            export("base", "x", form="vllm")
        with pytest.raises(
            ValueError, match="`layer` must be `final` or one of the late layers 4,"
        ):
            export("base", "x", form="layer", layer=2)


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "match"),
        [
            (
                {"form": "onnx"},
                "`form` must be one of transformers, vllm, layer, plain, got 'onnx'",
            ),
            ({"form": "layer"}, "`layer` must be `final` or one of the late layers 2, 3, 4"),
            ({"form": "layer", "layer": 1}, "which have learnt to answer, got 1"),
            ({"form": "vllm", "layer": 3}, "`layer` must be left out for the form 'vllm', got 3"),
        ],
    )
    def test_options_that_do_not_fit(self, run, options, match):
        with pytest.raises(ValueError, match=match):
            unwrap(export)("run", "x", **options)  # past the check of types
        assert not (run / "x").exists()
        assert not [path for path in run.iterdir() if path.name.startswith(".x")]

    def test_a_folder_that_is_there_stays(self, run):
        (run / "taken").mkdir()
        (run / "taken" / "a").write_text("a")
        (run / "file").write_text("a")
        with pytest.raises(FileExistsError, match="`overwrite=True` replaces it"):
            export("run", "taken", form="transformers")
        with pytest.raises(FileExistsError, match="choose another name"):
            export("run", "file", form="transformers", overwrite=True)
        assert (run / "taken" / "a").read_text() == (run / "file").read_text() == "a"


class TestComparing:
    def test_ties_are_told_and_other_tokens_refused(self):
        logits = torch.tensor([[0.0, 5.0, 4.99], [9.0, 0.0, 1.0]])
        reference = Reference([[1]], torch.tensor([[1, 0]]), [logits], 0)
        answer = {"tokens": torch.tensor([[2, 0]]), "logits_0": logits + 0.01}
        tie = compare(reference, answer, torch.bfloat16)
        assert tie.is_right
        assert (tie.num_equal, tie.num_tokens) == (0, 2)
        assert "two best were 0.01 apart" in str(tie)
        answer = {"tokens": torch.tensor([[1, 1]]), "logits_0": logits}
        other = compare(reference, answer, torch.bfloat16)
        assert isinstance(other, ExportCheck)
        assert not other.is_right
        with pytest.raises(RuntimeError, match="1 of 2 greedy tokens"):
            check_right(other, "plain")


def test_the_process_that_checks_knows_no_depthmix():
    code = """
import sys, importlib.util
spec = importlib.util.spec_from_file_location("reading", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert not any(name.partition(".")[0] == "depthmix" for name in sys.modules)
"""
    from depthmix.exports import fresh_reading

    run_fresh(code, fresh_reading.__file__)


def test_an_export_is_no_adapter(run):
    assert isinstance(depthmix.load_model("run"), PeftModel)
