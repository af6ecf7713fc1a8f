"""LoRA alone, trained beside a run with the mixture by one flag."""

import json
from dataclasses import replace

import pytest

import depthmix_cli
from checkpoints import save_checkpoint
from depthmix import did_it_help, load_run_config
from depthmix.training import beside
from depthmix.training.beside import train_beside


@pytest.fixture
def run_file(tmp_path):
    base = save_checkpoint(tmp_path / "base")
    records = [{"prompt": f"{n} + {n} =", "completion": f" {2 * n}"} for n in range(8)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, records)))
    records = [{"prompt": f"{n} + 9 =", "completion": f" {n + 9}"} for n in range(8)]
    (tmp_path / "held.jsonl").write_text("\n".join(map(json.dumps, records)))
    path = tmp_path / "mine.toml"
    path.write_text(f"""
        [model]
        name = "{base}"
        [data]
        train = "train.jsonl"
        [mode]
        late_layers = 2
        target_modules = ["q_proj"]
        [training]
        output_dir = "{tmp_path / "mine"}"
        max_steps = 1
        seed = 3
        report_to = "none"
    """)
    return path


def test_one_flag_trains_both_and_says_whether_the_mixture_helped(run_file, tmp_path, capsys):
    measured = ["--evaluation.data", str(tmp_path / "held.jsonl"), "--evaluation.metric", "loss"]
    command = ["train", str(run_file), "--beside", "lora", *measured]
    assert depthmix_cli.main(command) == 0
    shown = capsys.readouterr()
    folder = tmp_path / "mine"
    assert "Run 2 of 2, LoRA alone" in shown.err
    answers = did_it_help([folder / "mode" / "pretrained", folder / "lora", folder / "mode"])
    assert [answer.question for answer in answers] == ["tuning", "mixture"]
    assert all(str(answer) in shown.out for answer in answers)
    assert f"depthmix compare {folder}/mode/pretrained {folder}/lora {folder}/mode" in shown.out
    mode, lora = (
        json.loads((folder / name / "run_config.json").read_text()) for name in ("mode", "lora")
    )
    assert (mode["method"], lora["method"]) == ("mode", "lora")
    assert mode["data"] == lora["data"]
    assert mode["training"]["seed"] == lora["training"]["seed"] == 3
    assert not (folder / "lora" / "pretrained").exists()
    assert depthmix_cli.main(command) == 1
    assert "already holds files" in capsys.readouterr().err


def test_where_nothing_is_measured_it_says_so(run_file, capsys):
    assert depthmix_cli.main(["train", str(run_file), "--beside", "lora"]) == 0
    assert "Nothing was measured" in capsys.readouterr().out


def test_what_holds_a_run_is_refused_before_the_first_is_trained(run_file, tmp_path, monkeypatch):
    (tmp_path / "mine" / "lora").mkdir(parents=True)
    (tmp_path / "mine" / "lora" / "notes.txt").write_text("mine")
    monkeypatch.setattr(beside, "train", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(FileExistsError, match="must be a new folder"):
        train_beside(load_run_config(run_file))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"method": "lora"},
            "`method` must be \"mode\" where LoRA is trained beside it, got 'lora';",
        ),
        ({"method": "lora", "preset": "fast"}, "got 'lora' by `preset=\"fast\"`;"),
        ({"training": {"output_dir": "x", "hub_model_id": "me/it"}}, "push to one place"),
    ],
)
def test_two_runs_that_cannot_be_are_refused(run_file, changes, message):
    with pytest.raises(ValueError, match=message):
        train_beside(replace(load_run_config(run_file), **changes))
