"""Late layers chosen by a run: its tokens against TRL's, what is kept, and where it is refused."""

from __future__ import annotations

import json

import pytest
from peft import get_peft_model
from trl import SFTConfig, SFTTrainer

import depthmix_cli
from adapters import lora_targets
from checkpoints import make_model, make_tokenizer, save_checkpoint
from depthmix import MixtureConfig, MoDEConfig, attach, load_run_config, to_lora, train
from depthmix.data.templates import to_training_dataset
from depthmix.data.tokens import to_token_sequences
from depthmix.depth.layer_choice import _thin
from depthmix.libraries.releases import CHECKPOINTING
from depthmix.models.loading import load_model
from depthmix.models.spec import ModelSpec
from depthmix.training.folder import load_result
from models import tiny_model

SUMS = [{"prompt": f"{a} + {b} =", "completion": f" {a + b}"} for a in range(4) for b in (1, 20)]
CHAT = [
    {"messages": [{"role": "user", "content": f"{a}?"}, {"role": "assistant", "content": f"{a}."}]}
    for a in range(3)
]
INSTRUCTIONS = [{"instruction": "Say it.", "input": f"{a}", "output": f"It is {a}."} for a in "xyz"]


@pytest.mark.parametrize("records", [SUMS, CHAT, INSTRUCTIONS])
@pytest.mark.parametrize("max_length", [None, 11, 1024])
def test_tokens_are_those_that_the_trainer_makes(records, max_length, tmp_path):
    tokenizer = make_tokenizer()
    trainer = SFTTrainer(
        make_model(tokenizer),
        SFTConfig(
            str(tmp_path),
            use_cpu=True,
            bf16=False,
            report_to="none",
            max_length=max_length,
            **{CHECKPOINTING: True},
        ),
        train_dataset=to_training_dataset(records, "auto", tokenizer),
        processing_class=tokenizer,
    )
    found = to_token_sequences(records, "auto", tokenizer, max_length=max_length)
    learnt = [row for row in found if any(label != -100 for label in row["labels"])]
    assert learnt == [
        {name: row[name] for name in ("input_ids", "labels")} for row in trainer.train_dataset
    ]


def test_text_counts_as_a_whole():
    tokenizer = make_tokenizer()
    [row] = to_token_sequences([{"text": "So it is."}], "auto", tokenizer, max_length=4)
    assert row["input_ids"] == row["labels"] == tokenizer("So it")["input_ids"][:4]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([-100, 5, 6], [-100, 5, 6]),
        ([5, 6, 7], [-100, 6, 7]),
        ([-100, 5, 6, 7, 8], [-100, 5, -100, 7, -100]),
        ([-100, 5, -100, 7, 8, 9, 10], [-100, 5, -100, -100, 8, -100, 10]),
        ([-100, -100], [-100, -100]),
    ],
)
def test_tokens_are_spread_evenly(labels, expected, monkeypatch):
    monkeypatch.setattr("depthmix.depth.layer_choice.NUM_PROBED_TOKENS", 3)
    assert _thin(labels) == expected


@pytest.fixture
def run(tmp_path):
    """Give a function that trains with chosen layers, and the run's folder."""
    checkpoint = save_checkpoint(tmp_path / "base")
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, SUMS)))

    def start(**options):
        mode = {"late_layers": "auto", "target_modules": "q_proj,v_proj", **options.pop("mode", {})}
        sections = {
            "model": {"name": str(checkpoint)},
            "data": {"train": str(tmp_path / "train.jsonl")},
            "mode": mode,
            "training": {
                "output_dir": str(tmp_path / "out"),
                "max_steps": "1",
                "report_to": "none",
                "bf16": "false",
            },
        }
        return train(load_run_config(None, {**sections, **options}), overwrite=True)

    return start, tmp_path / "out"


@pytest.mark.parametrize(
    ("largest", "top_k", "chosen"), [(6, None, [2, 3, 4]), (2, None, [3, 4]), (2, 3, [2, 3, 4])]
)
def test_a_run_chooses_its_layers_and_says_why(largest, top_k, chosen, run, monkeypatch, capsys):
    monkeypatch.setattr("depthmix.depth.layer_choice.LARGEST_ENSEMBLE", largest)
    start, folder = run
    result = start(mode={} if top_k is None else {"top_k": str(top_k)})
    shown = capsys.readouterr().err
    assert f"takes {', '.join(map(str, chosen))}: the final layer and" in shown
    assert str(result.choice.probe) in shown
    assert list(result.choice.late_layers) == chosen
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["late_layers"] == chosen
    assert json.loads((folder / "run_config.json").read_text())["mode"]["late_layers"] == "auto"
    assert load_result(folder) == result
    kept = json.loads((folder / "results.json").read_text())["layer_choice"]
    assert kept["late_layers"] == chosen
    assert [reading["layer"] for reading in kept["probe"]["layers"]] == [1, 2, 3, 4]
    # One token per byte, the space and the end among them; prompts do not count.
    assert kept["probe"]["num_tokens"] == sum(len(record["completion"]) + 1 for record in SUMS)
    assert depthmix_cli.main(["generate", str(folder), "1 + 1 ="]) == 0


def test_lora_adapts_the_same_layers(run, monkeypatch):
    monkeypatch.setattr("depthmix.depth.layer_choice.LARGEST_ENSEMBLE", 2)
    start, folder = run
    mode = start()
    targets = lora_targets(load_model(ModelSpec(name=str(folder))))
    lora = start(method="lora")
    assert lora.choice == mode.choice
    assert lora.ledger.lora_below == mode.ledger.lora_below > 0
    assert lora_targets(load_model(ModelSpec(name=str(folder)))) == targets
    assert {name.split(".")[4] for name in targets} == {"0", "1"}


def test_a_run_with_given_layers_probes_nothing(run, monkeypatch):
    monkeypatch.setattr("depthmix.training.setup.choose_on_records", None)
    start, folder = run
    assert start(mode={"late_layers": "2"}).choice is None
    assert "layer_choice" not in json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize(
    "use",
    [
        lambda model: attach(model, late_layers="auto"),
        lambda model: get_peft_model(model, MoDEConfig(late_layers="auto")),
        lambda model: to_lora(MoDEConfig(late_layers="auto", target_modules=["q_proj"]), model),
        lambda model: MixtureConfig(late_layers="auto").num_routes,
    ],
)
def test_without_a_probe_nothing_is_chosen(use):
    with pytest.raises(ValueError, match=r"`late_layers='auto'` .*`late_layers=choose_late_layers"):
        use(tiny_model())


def test_top_k_is_checked_before_the_probe():
    with pytest.raises(ValueError, match="between 1 and the routes of `late_layers`, got 0"):
        MixtureConfig(late_layers="auto", top_k=0)


def test_info_shows_the_probe(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("depthmix.depth.layer_choice.LARGEST_ENSEMBLE", 2)
    checkpoint = str(save_checkpoint(tmp_path / "base"))
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "Some words."}))
    probed = ["info", checkpoint, "--probe", str(tmp_path / "text.jsonl")]
    assert depthmix_cli.main([*probed, "--mode.target-modules", "q_proj,v_proj"]) == 0
    shown = capsys.readouterr().out
    assert "2, 3, 4\n" in shown  # the default
    assert "takes 3, 4: " in shown
    assert "10 tokens of 1 sequences" in shown
    auto = ["--mode.late-layers", "auto", "--mode.target-modules", "q_proj,v_proj"]
    assert depthmix_cli.main([*probed, *auto]) == 0
    assert "late layers     3, 4\n" in capsys.readouterr().out
    assert depthmix_cli.main(["info", checkpoint, *auto]) == 1
    assert "give `depthmix info` a `probe`" in capsys.readouterr().err
    get_peft_model(load_model(ModelSpec(name=checkpoint)), MoDEConfig()).save_pretrained(
        tmp_path / "adapter"
    )
    assert depthmix_cli.main(["info", str(tmp_path / "adapter"), *probed[2:]]) == 1
    assert "`probe` must be left out for" in capsys.readouterr().err
