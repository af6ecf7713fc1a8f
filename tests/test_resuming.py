"""A run that is interrupted at any moment ends as if it had not been."""

from __future__ import annotations

import errno
import importlib
import json
import shutil
import zipfile

import pytest
import torch

from checkpoints import save_checkpoint
from depthmix import load_run_config
from depthmix.training.trainers.checkpoints import list_checkpoints
from depthmix.training.trainers.mixin import MoDESFTTrainer

training = importlib.import_module("depthmix.training.train")
CLOCK = ("runtime", "per_second", "memory_gib", "seconds")
RUNS = {
    "steps": {
        "training": {"max_steps": 5, "save_steps": 2, "logging_steps": 3},
        "evaluation": {"data": "items.jsonl", "metric": "choices"},
    },
    "epochs of LoRA": {
        "method": "lora",
        "training": {
            "num_train_epochs": 2,
            "gradient_accumulation_steps": 2,
            "per_device_train_batch_size": 2,
            "save_steps": 3,
            "logging_strategy": "epoch",
            "eval_strategy": "epoch",
        },
        "data": {"eval": "sums.jsonl"},
    },
    "best": {
        "training": {
            "max_steps": 6,
            "save_steps": 2,
            "eval_steps": 2,
            "eval_strategy": "steps",
            "load_best_model_at_end": True,
            "save_total_limit": 1,
            "learning_rate": 0.3,
        },
        "data": {"eval": "sums.jsonl"},
    },
    "exits": {
        "mode": {"exits": [1, 3], "exit_vocabulary": 20, "exit_learning_rate_factor": 2.0},
        "training": {"max_steps": 4, "save_steps": 2, "logging_steps": 3},
    },
    "auto": {
        "mode": {"late_layers": "auto"},
        "training": {"max_steps": 3, "save_steps": 1, "logging_steps": 2},
    },
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    save_checkpoint(folder / "base")
    rows = [{"prompt": f"{n} + {n} =", "completion": f" {2 * n}"} for n in range(12)]
    items = [{"prompt": f"{n} =", "choices": [f" {n}", " no"], "answer": 0} for n in range(3)]
    for name, records in {"sums": rows, "items": items}.items():
        text = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(text)
    return folder


def run(inputs, output_dir, name="steps", *, changed=None, **options):
    """Train by one of the configurations, with other settings of the training where given."""
    sections = json.loads(json.dumps(RUNS[name]))
    for section, option in (("data", "eval"), ("evaluation", "data")):
        if option in sections.get(section, {}):
            sections[section][option] = str(inputs / sections[section][option])
    data = {"train": str(inputs / "sums.jsonl"), **sections.get("data", {})}
    defaults = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "report_to": "none",
        "disable_tqdm": True,
    }
    mode = {"late_layers": 2, "target_modules": ["q_proj"], "lora_dropout": 0.2}
    config = load_run_config(
        overrides={
            **sections,
            "model": {"name": str(inputs / "base"), "dtype": "float32"},
            "data": data,
            "mode": {**mode, **sections.get("mode", {})},
            "training": {**defaults, **sections["training"], **(changed or {})},
        }
    )
    return training.train(config, **options)


def outcome(folder):
    """Read what an interruption must not change."""

    def untimed(entry):
        return {name: entry[name] for name in entry if not any(word in name for word in CLOCK)}

    content = json.loads((folder / "results.json").read_text())
    content["log_history"] = [untimed(entry) for entry in content["log_history"]]
    content["metrics"] = untimed(content["metrics"])
    measured = [
        (folder / content[moment] / "samples_records.jsonl").read_text()
        for moment in ("before", "after")
        if moment in content
    ]
    return content, measured, (folder / "adapter_model.safetensors").read_bytes()


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the library catches it."""


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """Each run without an interruption, made when it is asked for."""
    made = {}

    def make(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("whole") / "run"
            run(inputs, made[name], name)
        return made[name]

    return make


@pytest.fixture
def interrupted(whole, tmp_path):
    """A copy of a run that was killed in its final evaluation."""

    def make(name="steps"):
        folder = tmp_path / "run"
        shutil.copytree(whole(name), folder)
        for file in ("results.json", "adapter_model.safetensors", "adapter_config.json"):
            (folder / file).unlink()
        return folder

    return make


@pytest.mark.parametrize(
    ("name", "step"),
    [("steps", 1), ("steps", 3), ("steps", 5), ("epochs of LoRA", 3), ("epochs of LoRA", 4),
     ("epochs of LoRA", 6), ("best", 4), ("best", 6), ("auto", 2), ("exits", 3)],
)  # fmt: skip
def test_a_run_ends_as_if_nothing_had_been(name, step, inputs, whole, tmp_path, monkeypatch):
    folder = tmp_path / "run"

    def kill(self, *args, **kwargs):
        if self.state.global_step == step:
            raise Killed
        return log_or_save(self, *args, **kwargs)

    log_or_save = MoDESFTTrainer._maybe_log_save_evaluate
    with monkeypatch.context() as patch:
        patch.setattr(MoDESFTTrainer, "_maybe_log_save_evaluate", kill)
        with pytest.raises(Killed):
            run(inputs, folder, name)
    run(inputs, folder, name, resume=True)
    assert outcome(folder) == outcome(whole(name))


def test_an_incomplete_checkpoint_is_skipped_and_said(interrupted, inputs, whole, capsys):
    folder = interrupted()
    (folder / "checkpoint-4" / "trainer_state.json").write_text("{")
    shutil.rmtree(folder / "checkpoint-5")
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "optimizer.pt").write_text("")
    run(inputs, folder, resume=True)
    assert outcome(folder) == outcome(whole("steps"))
    said = capsys.readouterr().err
    assert "checkpoint-4 is skipped" in said
    assert "checkpoint-5 is skipped" in said
    assert f"goes on from {folder / 'checkpoint-2'}." in said
    assert [path.name for path in list_checkpoints(folder).whole] == [
        "checkpoint-2",
        "checkpoint-4",
        "checkpoint-5",
    ]


@pytest.mark.parametrize("name", ["steps", "epochs of LoRA", "auto"])
def test_after_the_last_step_a_run_only_finishes(name, interrupted, inputs, whole, monkeypatch):
    folder = interrupted(name)

    def step(*args, **kwargs):
        raise AssertionError("a step was trained")

    monkeypatch.setattr(MoDESFTTrainer, "training_step", step)
    run(inputs, folder, name, resume=True)
    assert outcome(folder) == outcome(whole(name))


@pytest.mark.parametrize("left", ["nothing", "an empty folder", "a configuration", "a part"])
def test_before_a_checkpoint_a_run_begins_again(left, interrupted, inputs, whole, capsys):
    folder = interrupted()
    for path in list(folder.iterdir()):
        kept = path.name == "run_config.json" and left in ("a configuration", "a part")
        if not kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if left == "nothing":
        folder.rmdir()
    if left == "a part":
        (folder / "checkpoint-2").mkdir()
        (folder / ".run_config.9.json.tmp").write_text("{")
    run(inputs, folder, resume=True)
    assert outcome(folder) == outcome(whole("steps"))
    assert "the run begins with its first step" in capsys.readouterr().err
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        *((name, None, f"{name} is missing") for name in (
            "optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.safetensors",
            "adapter_config.json",
        )),
        *((name, 0, rf"{name} is damaged \(.+\); put it back, remove the folder .*checkpoint-5 to "
           r"go on from checkpoint-4, or start") for name in (
            "optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.safetensors",
            "adapter_config.json",
        )),
        *((name, 0.5, rf"{name} is damaged") for name in (
            "optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.safetensors",
        )),
        ("optimizer.pt", b"no pickle", "optimizer.pt is damaged"),
        ("adapter_config.json", b"[]", r"adapter_config.json is damaged \(it holds no settings"),
    ],
)  # fmt: skip
def test_what_a_checkpoint_lacks_is_refused(file, content, message, interrupted, inputs):
    folder = interrupted()
    path = folder / "checkpoint-5" / file
    if content is None:
        path.unlink()
    else:
        whole = path.read_bytes()
        path.write_bytes(
            content if isinstance(content, bytes) else whole[: int(len(whole) * content)]
        )
    before = {one: one.stat().st_mtime_ns for one in folder.rglob("*")}
    with pytest.raises(ValueError, match=f"`resume` needs {file} in .*checkpoint-5, .*{message}"):
        run(inputs, folder, resume=True)
    assert {one: one.stat().st_mtime_ns for one in folder.rglob("*")} == before


def test_a_changed_byte_is_noticed(interrupted, inputs):
    path = interrupted() / "checkpoint-5" / "optimizer.pt"
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        weights = archive.read(max(archive.infolist(), key=lambda one: one.file_size))
    content[content.index(weights) + len(weights) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"optimizer.pt is damaged"):
        run(inputs, path.parent.parent, resume=True)


def test_state_that_was_not_saved_on_purpose_is_done_without(inputs, tmp_path, capsys):
    folder = tmp_path / "run"
    run(inputs, folder, changed={"save_only_model": True})
    (folder / "results.json").unlink()
    shutil.rmtree(folder / "checkpoint-5")
    run(inputs, folder, changed={"save_only_model": True}, resume=True)
    said = capsys.readouterr().err
    assert "checkpoint-4 has no optimizer.pt, scheduler.pt, rng_state.pth, because" in said
    assert "at other weights than without the interruption" in said
    assert (folder / "results.json").is_file()
    shutil.rmtree(folder / "checkpoint-5")
    with pytest.raises(ValueError, match=r"optimizer.pt is missing"):
        run(inputs, folder, resume=True)


def test_random_numbers_of_other_processes_are_done_without(interrupted, inputs, capsys):
    folder = interrupted()
    checkpoint = folder / "checkpoint-5"
    (checkpoint / "rng_state.pth").rename(checkpoint / "rng_state_0.pth")
    run(inputs, folder, resume=True)
    assert "is of another number of processes" in capsys.readouterr().err


def test_the_best_checkpoint_must_be_there(interrupted, inputs, whole, tmp_path):
    folder = interrupted("best")
    (best,) = list_checkpoints(folder).whole  # the last one, at which no run ends, is removed
    assert best.name != "checkpoint-6"
    state = json.loads((best / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] != str(best)  # moved
    run(inputs, folder, "best", resume=True)
    assert outcome(folder) == outcome(whole("best"))
    later = folder / "checkpoint-7"
    shutil.copytree(best, later)
    state["global_step"] = 7
    (later / "trainer_state.json").write_text(json.dumps(state))
    shutil.rmtree(best)
    with pytest.raises(ValueError, match="since the best weights so far, at which the run may end"):
        run(inputs, folder, "best", resume=True)


@pytest.mark.parametrize("name", ["run_config.json", "beginning.json"])
@pytest.mark.parametrize("content", ["", '{"model": ', "[]"])
def test_a_damaged_file_of_a_run_is_named(name, content, interrupted, inputs):
    folder = interrupted()
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=rf"run.{name} .*; (put it back|copy the run again)"):
        run(inputs, folder, resume=True)


def test_other_records_are_refused(interrupted, inputs, tmp_path):
    folder, other = interrupted(), tmp_path / "other"
    shutil.copytree(inputs, other)
    lines = (other / "sums.jsonl").read_text().splitlines(keepends=True)
    original = inputs / "sums.jsonl"
    kept = original.read_bytes()
    try:
        original.write_text("".join(lines[::-1]))
        with pytest.raises(ValueError, match=r"`data.train` must hold the records with which"):
            run(inputs, folder, resume=True)
    finally:
        original.write_bytes(kept)


def test_the_layers_that_were_chosen_are_kept(interrupted, inputs, whole, monkeypatch):
    folder = interrupted("auto")
    shutil.rmtree(folder / "checkpoint-3")
    monkeypatch.setattr(
        "depthmix.training.setup.choose_on_records", lambda *_, **__: pytest.fail("probed")
    )
    run(inputs, folder, "auto", resume=True)
    assert outcome(folder) == outcome(whole("auto"))


@pytest.mark.parametrize("moment", ["optimizer.pt", "training_args.bin", "results.json"])
def test_a_full_disk_is_said_and_the_run_goes_on(moment, inputs, whole, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        if moment == "results.json":
            patch.setattr("depthmix.training.folder.write_whole", _no_room)
        else:
            save = torch.save

            def save_some(content, path, **options):
                if str(path).endswith(moment) and "checkpoint-2" not in str(path):
                    open(path, "wb").close()
                    _no_room()
                save(content, path, **options)

            patch.setattr(torch, "save", save_some)
        message = r"`training.output_dir` must be .* \(No space left on device\); .* by `resume`"
        with pytest.raises(OSError, match=message):
            run(inputs, folder)
    run(inputs, folder, resume=True)
    assert outcome(folder) == outcome(whole("steps"))


def _no_room(*args):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "min_lr"),
        ({"per_device_train_batch_size": 0}, "batch_size"),
    ],
)
def test_a_refused_run_leaves_nothing(changed, message, inputs, tmp_path):
    with pytest.raises((ValueError, ZeroDivisionError), match=f"(?i){message}|zero"):
        run(inputs, tmp_path / "run", changed=changed)
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_refused_does_not_replace_another(whole, inputs, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole("steps"), folder)
    with pytest.raises(ValueError, match=r"(?i)min_lr"):
        run(inputs, folder, changed={"lr_scheduler_type": "cosine_with_min_lr"}, overwrite=True)
    assert outcome(folder) == outcome(whole("steps"))


def test_what_is_overwritten_counts_for_nothing(interrupted, inputs, whole, monkeypatch, capsys):
    folder = interrupted()
    rmtree = shutil.rmtree

    def remove(path, *args):
        rmtree(path, *args)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("depthmix.training.start.shutil.rmtree", remove)
        with pytest.raises(Killed):
            run(inputs, folder, overwrite=True, changed={"learning_rate": 0.5})
    assert list_checkpoints(folder).whole
    run(inputs, folder, resume=True)  # under the settings of neither
    assert outcome(folder) == outcome(whole("steps"))
    assert "was being overwritten: the run begins" in capsys.readouterr().err


def test_only_a_run_is_gone_on_with(inputs, tmp_path):
    (tmp_path / "checkpoint-2").mkdir()
    with pytest.raises(FileExistsError, match=r"`resume` needs a run, and .* holds other files"):
        run(inputs, tmp_path, resume=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match=r"`training.output_dir` must be a folder"):
        run(inputs, tmp_path / "file")
    with pytest.raises(ValueError, match=r"exclude each other"):
        run(inputs, tmp_path, resume=True, overwrite=True)
    with pytest.raises(ValueError, match=r"`training.resume_from_checkpoint` must be left out"):
        run(inputs, tmp_path / "new", changed={"resume_from_checkpoint": "checkpoint-2"})
