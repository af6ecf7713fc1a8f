"""Exits in trainers and runs: log, learning rates, interruptions, and what drafts with them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers import Trainer

from adapters import tuned_model as tuned_adapter
from checkpoints import save_checkpoint
from depthmix import (
    ModelSpec,
    load_model,
    load_run_config,
    train,
)
from depthmix.decoding.draft_plan import DraftPlan
from depthmix.decoding.fast_generation import FastGeneration
from depthmix.method.found_exits import find_exits
from depthmix.method.norm import find_mixture_norm
from depthmix.models.fast import prepare_fast
from depthmix.models.sources import find_base
from depthmix.training.trainers.mixin import MoDESFTTrainer, MoDETrainer
from models import random_ids
from test_training import (
    as_batch,
    assert_same_gradients,
    make_dataset,
    make_trainer,
    train_once,
    tuned_model,
)

IDS = random_ids(3, 7)
BATCH = {"input_ids": IDS, "labels": IDS}
EXITS = {"exits": [1, 3], "exit_rank": 3, "exit_weight": 0.7}
EXITS |= {"exit_distillation": 0.3, "exit_vocabulary": 20}


def exit_weights(model):
    return {name: value.clone() for name, value in find_exits(model).state_dict().items()}


def tuned_with_exits(**options):
    """Put LoRA, a mixture and exits with random weights on a tiny Llama."""
    return tuned_adapter(**{**EXITS, **options})


# Trainers.

TRAINED = {**EXITS, "distillation_weight": 0.3}


@pytest.mark.parametrize("num_batches", [1, 4])
def test_the_log_has_each_exits_loss_and_agreement(num_batches, tmp_path):
    model = tuned_model(**{**TRAINED, "exit_vocabulary": None})
    batch = as_batch(make_dataset())
    counted = batch["labels"][:, 1:] != -100
    norm, targets = find_mixture_norm(model), batch["labels"][:, 1:][counted]
    with torch.no_grad():
        output = model(input_ids=batch["input_ids"], output_hidden_states=True)
        best = output.logits[:, :-1][counted].argmax(-1)
        by_hand = {}
        for layer in (1, 3):
            state = output.hidden_states[layer][:, :-1][counted]
            logits = norm.backbone.unembed(find_exits(model)(layer, state))
            by_hand[f"exit_loss/layer_{layer}"] = float(F.cross_entropy(logits, targets))
            by_hand[f"exit_agreement/layer_{layer}"] = float(
                (logits.argmax(-1) == best).float().mean()
            )
    logs, gradients = train_once(
        MoDETrainer,
        model,
        tmp_path,
        per_device_train_batch_size=4 // num_batches,
        gradient_accumulation_steps=num_batches,
    )
    assert {n: v for n, v in logs.items() if n.startswith("exit_")} == pytest.approx(
        by_hand, rel=1e-4
    )
    twin = tuned_model(**{**TRAINED, "exit_vocabulary": None})
    _, whole = train_once(MoDETrainer, twin, tmp_path / "whole")
    assert sum(".exits." in name for name in gradients) == 6
    assert_same_gradients(gradients, whole, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("trainer_cls", [Trainer, MoDESFTTrainer])
def test_exits_are_trained_by_any_trainer(trainer_cls, tmp_path):
    model = tuned_model(**TRAINED, lora_dropout=0.1)
    before = exit_weights(model)
    logs, _ = train_once(trainer_cls, model, tmp_path)
    assert all(not torch.equal(before[n], v) for n, v in find_exits(model).state_dict().items())
    assert any("exit_loss/layer_3" in name for name in logs) == (trainer_cls is MoDESFTTrainer)


@pytest.mark.parametrize("trainer_cls", [Trainer, MoDETrainer])
def test_a_resumed_run_ends_at_the_same_weights(trainer_cls, tmp_path):
    """Also what is drawn for the exits' loss goes on, by trainers that know nothing of it."""

    def run(folder, checkpoint=None):
        model = tuned_model(
            **TRAINED, lora_dropout=0.1, exit_learning_rate_factor=FACTORS[trainer_cls]
        )
        options = {"dataset": make_dataset(16), "max_steps": 4, "save_steps": 2}
        trainer, _ = make_trainer(trainer_cls, model, folder, save_strategy="steps", **options)
        trainer.train(resume_from_checkpoint=checkpoint)
        return model, trainer

    first, _ = run(tmp_path / "whole")
    second, _ = run(tmp_path / "resumed", str(tmp_path / "whole" / "checkpoint-2"))
    weights = dict(second.named_parameters())
    for name, parameter in first.named_parameters():
        assert torch.equal(weights[name], parameter), name


FACTORS = {Trainer: 1.0, MoDETrainer: 5.0}


def rates(trainer, model):
    """Give the learning rates of the optimiser's parameters, by part."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {}
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            part = next((p for p in ("exits", "router", "norms", "lora_A") if f"{p}." in name), "?")
            found.setdefault(part, set()).add((group["lr"], group["weight_decay"]))
    return found


def test_parts_have_learning_rates_of_their_own(tmp_path):
    options = {"exit_learning_rate_factor": 10.0, "router_learning_rate_factor": 0.5}
    model = tuned_model(**TRAINED, **options)
    schedule = {"lr_scheduler_type": "linear", "max_steps": 4, "weight_decay": 0.1}
    trainer, _ = make_trainer(MoDETrainer, model, tmp_path, **schedule)
    trainer.create_optimizer_and_scheduler(4)
    found = rates(trainer, model)
    assert {part: {lr for lr, _ in pairs} for part, pairs in found.items()} == {
        "exits": {0.1}, "router": {0.005}, "norms": {0.01}, "lora_A": {0.01}, "?": {0.01}
    }  # fmt: skip
    assert {decay for _, decay in found["lora_A"]} == {0.1}
    assert {decay for _, decay in found["exits"]} == {0.0}  # as all that stands for a norm
    assert sum(len(group["params"]) for group in trainer.optimizer.param_groups) == len(
        [p for p in model.parameters() if p.requires_grad]
    )
    trainer.train()
    assert {lr for lr, _ in rates(trainer, model)["exits"]} == {0.0}
    plain = tuned_model(**TRAINED)
    trainer, _ = make_trainer(MoDETrainer, plain, tmp_path)
    host, _ = make_trainer(Trainer, tuned_model(**TRAINED), tmp_path)
    groups = [len(t.create_optimizer().param_groups) for t in (trainer, host)]
    assert groups[0] == groups[1]


def test_rates_of_an_optimizer_that_is_given_are_refused(tmp_path):
    model = tuned_model(**TRAINED, exit_learning_rate_factor=10.0)
    trainer, _ = make_trainer(MoDETrainer, model, tmp_path)
    trainer.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"`exit_learning_rate_factor` must be 1 .* `optimizers`"):
        trainer.train()
    find_exits(model).requires_grad_(False)
    trainer, _ = make_trainer(MoDETrainer, model, tmp_path)
    with pytest.raises(ValueError, match=r"`exit_learning_rate_factor` must be 1 .* frozen"):
        trainer.create_optimizer()


def test_a_plain_trainer_is_told_that_it_knows_no_rates(tmp_path):
    model = tuned_model(**TRAINED, exit_learning_rate_factor=10.0)
    with pytest.warns(UserWarning, match="`exit_learning_rate_factor` acts .*MoDETrainerMixin"):
        train_once(Trainer, model, tmp_path)


def test_smoothed_labels_are_refused(tmp_path):
    model = tuned_model(**{**TRAINED, "distillation_weight": 0.0})
    with pytest.raises(RuntimeError, match=r"exits' loss needs `labels` .* or leave out `exits`"):
        train_once(MoDETrainer, model, tmp_path, label_smoothing_factor=0.1)


# Drafting with them.


def test_a_runs_exits_draft(tmp_path):
    save_checkpoint(tmp_path / "base")
    rows = [{"prompt": f"{n} + {n} =", "completion": f" {2 * n}"} for n in range(8)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    quiet = {"max_steps": 2, "report_to": "none", "disable_tqdm": True, "learning_rate": 1e-2}
    config = load_run_config(
        overrides={
            "model": {"name": str(tmp_path / "base"), "dtype": "float32"},
            "data": {"train": str(tmp_path / "sums.jsonl")},
            "mode": {"target_modules": ["q_proj"], "late_layers": 1, "exits": "1,3"},
            "training": {**quiet, "output_dir": str(tmp_path / "run")},
        }
    )
    result = train(config)
    assert result.ledger.exits > 0
    model = load_model(str(tmp_path / "run"))
    exits = find_exits(model)
    assert exits.layers == (1, 3)
    assert any(value.any() for name, value in exits.state_dict().items() if "up" in name)
    prompt = {"input_ids": random_ids(1, 5), "max_new_tokens": 8, "do_sample": False}
    fast = prepare_fast(model, find_base(ModelSpec(name=str(tmp_path / "run"))))
    assert fast.exits is exits
    assert torch.equal(fast.generate(**prompt), model.generate(**prompt))


def test_they_draft_where_no_others_are_given():
    model = tuned_with_exits().eval()
    fast = FastGeneration(model)
    assert fast.exits is find_exits(model)
    prompt = {"input_ids": random_ids(2, 5), "max_new_tokens": 9, "do_sample": False}
    plan = replace(DraftPlan.for_all((1, 3)), thresholds=(0.0, 0.0), joint_threshold=0.0)
    fast = FastGeneration(model, plan=plan)
    expected = model.generate(**prompt, eos_token_id=None)
    assert torch.equal(fast.generate(**prompt, eos_token_id=None), expected)
    assert fast.num_drafted.total() > 0
