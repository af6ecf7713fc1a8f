import json
import os
import subprocess
import sys
import types

import pytest

import depthmix_cli
from checkpoints import save_checkpoint
from depthmix.evaluation.identity import count_devices
from depthmix.evaluation.provenance import describe_adapter

IN_A_FRESH_PROCESS = """
import sys
import depthmix_cli
try:
    depthmix_cli.main(sys.argv[1:])
finally:
    heavy = {"torch", "transformers", "depthmix", "pydantic"} & set(sys.modules)
    assert not heavy, heavy
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("base"))


@pytest.fixture
def run_file(checkpoint, tmp_path):
    records = [
        {"prompt": f"{a} + {b} =", "completion": f" {a + b}"} for a in range(4) for b in (1, 2)
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, records)))
    path = tmp_path / "sums.toml"
    path.write_text(f"""
        [model]
        name = "{checkpoint}"
        [data]
        train = "train.jsonl"
        [mode]
        late_layers = 2
        target_modules = ["q_proj"]
        [training]
        output_dir = "{tmp_path / "out"}"
        max_steps = 2
        logging_steps = 1
        report_to = "none"
    """)
    return path


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--help"], ["train", "evaluate", "compare", "audit", "generate", "chat", "info", "lens"]),
        (["evaluate", "--help"], ["llm-adapters", "--limit", "--judge", "OPENAI_API_KEY"]),
        (["train", "--help"], ["MoDEConfig", "SFTConfig", "--mode", "exact_match", "--preset"]),
        (["generate", "--help"], ["GenerationConfig"]),
    ],
)
def test_help_is_quick_since_nothing_heavy_is_imported(arguments, words):
    command = [sys.executable, "-c", IN_A_FRESH_PROCESS, *arguments]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert all(word in shown for word in words)


def test_train_generate_and_continue(run_file, tmp_path, capsys):
    out = tmp_path / "out"
    assert depthmix_cli.main(["train", str(run_file), "--mode.late-layers", "3"]) == 0
    shown = capsys.readouterr().out
    assert "train_loss" in shown
    assert f"depthmix chat {out}" in shown
    assert json.loads((out / "run_config.json").read_text())["mode"]["late_layers"] == 3
    assert depthmix_cli.main(["generate", str(out), "1 + 1 =", "--generation.top-k=3"]) == 0
    capsys.readouterr()
    answers = []
    data = str(run_file.parent / "train.jsonl")
    adding = ["add-exits", str(out), "--data", data, "--num-steps", "2", "--layers", "2"]
    assert depthmix_cli.main(adding) == 0
    assert "Saved in" in capsys.readouterr().out
    for way in (["--no-lazy"], ["--lazy"], ["--fast"]):
        assert depthmix_cli.main(["generate", str(out), "1 + 1 =", "--top-k", "1", *way]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] == answers[2]
    assert depthmix_cli.main(["generate", str(out), "1 + 1 =", "--lazy", "--fast"]) == 1
    assert "`lazy` and `fast`" in capsys.readouterr().err
    assert depthmix_cli.main(["generate", str(out), "1 + 1 =", "--fast", "--no-verify"]) == 0
    capsys.readouterr()
    assert depthmix_cli.main(["info", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "default (MODE_LORA, r = " in shown
    assert "2, 3, 4" in shown
    assert "router" in shown
    assert depthmix_cli.main(["info", str(out), "--mode.r", "2"]) == 1
    assert "has its own options" in capsys.readouterr().err
    assert depthmix_cli.main(["train", str(run_file)]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert depthmix_cli.main(["train", str(out / "run_config.json"), "--overwrite"]) == 0


def test_evaluate_and_compare(checkpoint, tmp_path, capsys):
    rows = [{"prompt": f"{n} =", "choices": [f" {n}", " no"], "answer": 0} for n in range(3)]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    common = ["--records", str(tmp_path / "own.jsonl"), "--metric", "choices"]
    for layer in ("ensemble", "2"):
        options = ["--layer", layer, "--output", str(tmp_path / layer)]
        assert depthmix_cli.main(["evaluate", str(checkpoint), *common, *options]) == 0
        shown = capsys.readouterr().out
        assert "records" in shown
        assert f"Saved in {tmp_path / layer}." in shown
    runs = [str(tmp_path / "ensemble"), str(tmp_path / "2")]
    assert depthmix_cli.main(["compare", *runs, "--output", str(tmp_path / "tables")]) == 0
    assert "pretrained, layer 2" in capsys.readouterr().out
    kinds = {path.suffix for path in (tmp_path / "tables").iterdir()}
    assert kinds == {".json", ".csv", ".md", ".tex"}


def test_a_command_of_another_package_is_found_by_its_entry_point(tmp_path, monkeypatch, capsys):
    about = tmp_path / "more-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: more\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[depthmix.commands]\ncount = more_commands:count\n")
    (tmp_path / "more_commands.py").write_text(
        "def count(*, up_to: int):\n"
        '    """Count."""\n'
        "    if up_to < 0:\n"
        "        raise ValueError('`up_to` must be above.')\n"
        "    print(*range(up_to))\n"
    )
    code = "import sys, depthmix_cli; sys.exit(depthmix_cli.main())"
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")

    def run(*arguments):
        command = [sys.executable, "-c", code, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert run("count", "--up-to", "3").stdout == "0 1 2\n"
    assert "Count." in run("--help").stdout
    refused = run("count", "--up-to", "-1")
    assert refused.returncode == 1
    assert refused.stderr.endswith("must be above. On the command line: `--up-to`.\n")


def test_a_package_that_is_not_installed_is_named(monkeypatch, capsys):
    monkeypatch.setattr("depthmix_cli.additions.list_additions", dict)
    assert depthmix_cli.main(["reproduce", "table2"]) == 1
    assert capsys.readouterr().err == (
        "depthmix: `depthmix reproduce` is a package of its own, which is not installed: run "
        "`pip install -e replication` in a clone of depthmix.\n"
        "DEPTHMIX_DEBUG=1 shows where it came from.\n"
    )


def test_settings_reach_the_library(run_file, monkeypatch):
    seen = {}

    def train(config, *, overwrite=False, resume=False):
        seen.update(config=config, overwrite=overwrite, resume=resume)
        return types.SimpleNamespace(
            ledger="",
            metrics={},
            before=None,
            after=None,
            output_dir="out",
            added=None,
            calibration=None,
        )

    monkeypatch.setattr("depthmix.training.train.train", train)
    arguments = ["--training.learning-rate", "1e-3", "--mode.late-layers=[3,4]", "--method", "lora"]
    arguments += ["--mode.task-loss", "3"]
    assert depthmix_cli.main(["train", str(run_file), *arguments, "--resume"]) == 0
    assert (seen["overwrite"], seen["resume"]) == (False, True)
    assert seen["config"].training["learning_rate"] == 1e-3
    assert seen["config"].mode["late_layers"] == [3, 4]
    assert seen["config"].mode["task_loss"] == 3
    assert seen["config"].method == "lora"


@pytest.mark.parametrize("targets", ["q_proj", "q_proj,v_proj", ".*[qv]_proj", "all-linear"])
def test_info_names_parts_and_parameters(targets, checkpoint, capsys):
    options = ["--mode.late-layers", "2", "--mode.target-modules", targets]
    assert depthmix_cli.main(["info", str(checkpoint), *options]) == 0
    shown = capsys.readouterr().out
    for word in ("model.layers (4)", "model.norm", "lm_head", "3, 4"):
        assert word in shown


def test_chat_ends_with_the_input(checkpoint, monkeypatch, capsys):
    monkeypatch.setattr("builtins.input", lambda _prompt: "/exit")
    assert depthmix_cli.main(["chat", str(checkpoint)]) == 0
    assert "/exit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "`model.name` is missing"),
        (["train", "missing.toml"], "`config` must be an existing file"),
        (["info", "./missing"], "Cannot find model `./missing`"),
        (["generate", "./missing", "Hi", "--generation.top-z", "1"], "`generation.top_z` is not"),
    ],
)
def test_mistakes_become_one_sentence(arguments, message, capsys, monkeypatch):
    assert depthmix_cli.main(arguments) == 1
    shown = capsys.readouterr().err
    assert shown.startswith(f"depthmix: {message}")
    assert shown.count("\n") == 1
    monkeypatch.setenv("DEPTHMIX_DEBUG", "1")
    with pytest.raises((ValueError, OSError), match=message):
        depthmix_cli.main(arguments)


@pytest.mark.slow
def test_of_two_processes_one_tells_what_a_training_gave(run_file, tmp_path):
    # The batch of one device is divided between two; `use_cpu` lets them meet without GPUs.
    text = run_file.read_text()
    one, two = tmp_path / "out", tmp_path / "two"
    run_file.write_text(f"{text}use_cpu = true\nper_device_train_batch_size = 4")
    assert depthmix_cli.main(["train", str(run_file)]) == 0
    launched = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = ["train", str(run_file), "--training.output-dir", str(two)]
    command += ["--training.per-device-train-batch-size", "2"]
    shown = subprocess.run(
        [*launched, "-m", "depthmix_cli", *command],
        capture_output=True, text=True, check=True, cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    ).stdout  # fmt: skip
    assert shown.count(f"Saved in {two}") == 1
    assert [count_devices(folder) for folder in (one, two)] == [1, 2]
    first, second = (describe_adapter(folder)["settings"] for folder in (one, two))
    assert first == second


def test_python_m_runs_the_same_command():
    command = [sys.executable, "-m", "depthmix_cli", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "train" in shown
