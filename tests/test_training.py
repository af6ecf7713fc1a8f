"""Trainers: the loss by hand, accumulation, checkpointing, resume, logs and reach of gradients."""

from __future__ import annotations

import importlib
import math
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from checkpoints import make_model, make_tokenizer, save_checkpoint
from depthmix import MoDEConfig
from depthmix.libraries.releases import CHECKPOINTING
from depthmix.models.loading import load_model
from depthmix.models.sources import find_base
from depthmix.models.spec import ModelSpec
from depthmix.training.config import load_run_config
from depthmix.training.train import train
from depthmix.training.trainers.mixin import MoDESFTTrainer, MoDETrainer, MoDETrainerMixin
from models import random_ids, randomise, tiny_model
from references import reference_step

TRAINERS = [Trainer, MoDETrainer, MoDESFTTrainer]
TOKENIZER = make_tokenizer()
GOLDEN_LOSSES = [
    6.9951286,
    6.6014838,
    6.6966157,
    6.7366271,
    6.4659452,
    6.7384515,
    6.2301245,
    6.5024767,
    6.4389896,
    6.3347359,
]
"""Losses of `test_golden_run`; a change that moves them says so and explains it."""


def tuned_model(model=None, **options):
    """Put LoRA and a mixture with random weights on a tiny Llama."""
    options = {"router_init": "gaussian", "late_layers": 3, **options}
    config = MoDEConfig(**{"target_modules": ["q_proj", "up_proj"], "r": 2, **options})
    tuned = get_peft_model(model or make_model(TOKENIZER), config)
    randomise(tuned, seed=5, only_trainable=True)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "router" in name:
                parameter.mul_(0.02)  # keeps every route alive
            elif "lora_A" in name or "lora_B" in name:
                parameter.mul_(0.2)
    return tuned


def make_dataset(num_rows=4, *, length=8, equal=False, vocab_size=61):
    """Make rows whose prompts, and in general whose numbers of label tokens, differ."""
    ids = random_ids(num_rows, length, vocab_size=vocab_size)
    labels = ids.clone()
    for row in range(num_rows):
        labels[row, : 3 if equal else 1 + row % 4] = -100
    return Dataset.from_dict(
        {
            "input_ids": ids.tolist(),
            "labels": labels.tolist(),
            "attention_mask": torch.ones_like(ids).tolist(),
        }
    )


def as_batch(dataset):
    return {name: torch.tensor(dataset[name]) for name in dataset.column_names}


class KeptGradients(TrainerCallback):
    """Keep the gradients of the first optimiser step."""

    def __init__(self):
        self.gradients = {}

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if not self.gradients:
            self.gradients = {
                name: parameter.grad.clone()
                for name, parameter in kwargs["model"].named_parameters()
                if parameter.grad is not None
            }


def make_trainer(trainer_cls, model, output_dir, *, dataset=None, **options):
    """Build a trainer for a few quiet steps on the CPU."""
    is_sft = issubclass(trainer_cls, SFTTrainer)
    settings = {
        "output_dir": str(output_dir),
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": 4,
        "max_steps": 1,
        "logging_steps": 1,
        "max_grad_norm": 0.0,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        CHECKPOINTING: False,
        "dataloader_pin_memory": False,
        "logging_nan_inf_filter": False,
        **({"dataset_kwargs": {"skip_prepare_dataset": True}} if is_sft else {}),
        **options,
    }
    kept = KeptGradients()
    trainer = trainer_cls(
        model=model,
        args=(SFTConfig if is_sft else TrainingArguments)(**settings),
        train_dataset=dataset or make_dataset(),
        callbacks=[kept],
        **({"processing_class": TOKENIZER} if is_sft else {}),
    )
    return trainer, kept


def train_once(trainer_cls, model, output_dir, **options):
    """Train one step; give its loss, its gradients and its log."""
    trainer, kept = make_trainer(trainer_cls, model, output_dir, **options)
    trainer.train()
    return trainer.state.log_history[0], kept.gradients


def assert_same_gradients(gradients, expected, **tolerance):
    assert gradients.keys() == expected.keys()
    assert any(value.abs().max() > 1e-3 for value in expected.values())
    for name, value in expected.items():
        torch.testing.assert_close(
            gradients[name], value, **tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


CASES = [
    (trainer_cls, kind, reduction)
    for trainer_cls in TRAINERS
    for kind in ("reverse_kl", "forward_kl", "jsd")
    for reduction in ("mean", "batchmean", "sum")
    if trainer_cls is MoDETrainer
    or (kind, reduction) in {("reverse_kl", "mean"), ("jsd", "batchmean"), ("forward_kl", "sum")}
]


@pytest.mark.parametrize(("trainer_cls", "kind", "reduction"), CASES)
def test_loss_is_the_objective_by_hand(trainer_cls, kind, reduction, tmp_path):
    model = tuned_model(distillation_weight=0.3, divergence=kind, reduction=reduction)
    truth = reference_step(model, as_batch(make_dataset()), kind=kind, reduction=reduction)
    logs, _ = train_once(trainer_cls, model, tmp_path)
    assert truth.distillation > 0.1
    assert logs["loss"] == pytest.approx(truth.task + 0.3 * truth.distillation, rel=1e-4)


@pytest.mark.parametrize("trainer_cls", [MoDETrainer, MoDESFTTrainer])
@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum"])
def test_logged_measurements(trainer_cls, reduction, tmp_path):
    model = tuned_model(distillation_weight=0.3, reduction=reduction)
    dataset = make_dataset()
    batch = as_batch(dataset)
    truth = reference_step(model, batch, reduction=reduction)
    logs, _ = train_once(trainer_cls, model, tmp_path, dataset=dataset)
    mask = batch["labels"][:, 1:] != -100
    weights = truth.weights[:, :-1][mask]
    logged_weights = [logs[f"routing_weight/layer_{layer}"] for layer in (2, 3, 4)]
    assert sum(key.startswith("routing_weight/") for key in logs) == 3
    assert sum(logged_weights) == pytest.approx(1, abs=1e-5)
    assert logged_weights == pytest.approx(weights.mean(0).tolist(), rel=1e-4)
    entropy = -(weights * weights.log()).sum(-1).mean()
    assert logs["routing_entropy"] == pytest.approx(float(entropy), rel=1e-4)
    assert logs["task_loss"] == pytest.approx(truth.task, rel=1e-4)
    assert logs["distillation_loss"] == pytest.approx(truth.distillation, rel=1e-4)
    weighted = 0.3 * logs["distillation_loss"]
    assert logs["distillation_share"] == pytest.approx(weighted / (logs["task_loss"] + weighted))
    assert logs["loss"] == pytest.approx(logs["task_loss"] + weighted, rel=1e-4)
    per_token = 0.3 * {"mean": 1, "batchmean": mask.sum() / 4, "sum": mask.sum()}[reduction]
    assert logs["distillation_weight_per_token"] == pytest.approx(float(per_token), rel=1e-6)


@pytest.mark.parametrize(
    ("trainer_cls", "reduction", "equal"),
    [
        (Trainer, "mean", False),
        (Trainer, "batchmean", True),
        *(
            (trainer_cls, reduction, False)
            for trainer_cls in (MoDETrainer, MoDESFTTrainer)
            for reduction in ("mean", "batchmean", "sum")
        ),
    ],
)
def test_accumulated_batches_equal_one_batch(trainer_cls, reduction, equal, tmp_path):
    options = {"distillation_weight": 3.0, "reduction": reduction}
    dataset = make_dataset(equal=equal)
    whole_logs, whole = train_once(trainer_cls, tuned_model(**options), tmp_path, dataset=dataset)
    logs, gradients = train_once(
        trainer_cls,
        tuned_model(**options),
        tmp_path,
        dataset=dataset,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
    )
    assert_same_gradients(gradients, whole, rtol=1e-4, atol=1e-3)
    for measured in (logs, whole_logs):
        for name in ("tokens_per_second", "memory_gib"):
            measured.pop(name, None)
    assert logs == pytest.approx(whole_logs, rel=1e-4)


@pytest.mark.parametrize("trainer_cls", [MoDETrainer, MoDESFTTrainer])
@pytest.mark.parametrize("tuned", [True, False])
def test_pace_is_tokens_over_the_seconds_of_steps(trainer_cls, tuned, tmp_path, monkeypatch):
    ticks = iter(range(0, 10_000, 4))
    monkeypatch.setattr(
        "depthmix.training.trainers.watch.time", SimpleNamespace(perf_counter=lambda: next(ticks))
    )
    batch = as_batch(make_dataset())
    batch["attention_mask"][1, -3:], batch["labels"][1, -3:] = 0, -100  # padding does not count
    rows = {name: table.tolist() for name, table in batch.items()}
    if trainer_cls is MoDESFTTrainer:  # pads for itself
        rows = {name: [*table[:1], table[1][:-3], *table[2:]] for name, table in rows.items()}
    dataset = Dataset.from_dict(rows)
    model = tuned_model() if tuned else tiny_model(vocab_size=len(TOKENIZER))
    logs, _ = train_once(trainer_cls, model, tmp_path, dataset=dataset)
    assert logs["tokens_per_second"] == pytest.approx((32 - 3) / 4)
    assert 0.01 < logs["memory_gib"] < 100


@pytest.mark.parametrize("trainer_cls", TRAINERS)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(trainer_cls, use_reentrant, tmp_path):
    plain = train_once(trainer_cls, tuned_model(distillation_weight=0.3), tmp_path)[1]
    gradients = train_once(
        trainer_cls,
        tuned_model(distillation_weight=0.3),
        tmp_path,
        **{CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": use_reentrant}},
    )[1]
    assert_same_gradients(gradients, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("trainer_cls", [MoDETrainer, MoDESFTTrainer])
def test_bfloat16_autocast_is_near_float32(trainer_cls, tmp_path):
    def logs(**options):
        model = tiny_model(vocab_size=len(TOKENIZER), initializer_range=0.1)
        model = tuned_model(model, distillation_weight=0.3)
        return train_once(trainer_cls, model, tmp_path, **options)[0]

    plain, low = logs(), logs(bf16=True)
    for name in ("loss", "task_loss", "distillation_loss", "routing_entropy"):
        assert low[name] == pytest.approx(plain[name], rel=0.03)
        assert low[name] != plain[name]


def test_resumed_run_ends_at_the_same_weights(tmp_path):
    def run(folder, checkpoint=None):
        model = tuned_model(distillation_weight=0.3, lora_dropout=0.1)
        trainer, _ = make_trainer(
            MoDESFTTrainer,
            model,
            folder,
            dataset=make_dataset(16),
            max_steps=4,
            save_strategy="steps",
            save_steps=2,
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        return model, trainer.state.log_history

    first, history = run(tmp_path / "whole")
    second, resumed = run(tmp_path / "resumed", str(tmp_path / "whole" / "checkpoint-2"))
    weights = dict(second.named_parameters())
    for name, parameter in first.named_parameters():
        torch.testing.assert_close(weights[name], parameter, rtol=1e-6, atol=1e-6)
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert [entry["loss"] for entry in resumed if "loss" in entry] == pytest.approx(
        losses, rel=1e-5
    )
    assert losses[3] != losses[1]


@pytest.mark.parametrize(
    ("options", "lora_layers", "norms"),
    [
        ({"distillation_weight": 0.0}, {0}, {2, 3}),
        ({"distillation_weight": 0.3}, {0}, {2, 3}),
        ({"distillation_weight": 0.3, "adapt": "all"}, {0, 1, 2, 3}, {2, 3}),
        ({"train_late_norms": False}, {0}, set()),
        ({"train_final_norm": True}, {0}, {2, 3, 4}),
        ({"train_late_norms": False, "train_final_norm": True}, {0}, {4}),
        ({"late_layers": [2, 4], "distillation_weight": 0.0}, {0}, {2}),
        ({"target_modules": []}, set(), {2, 3}),
    ],
)
def test_exactly_the_intended_parameters_receive_gradients(options, lora_layers, norms, tmp_path):
    _, gradients = train_once(MoDESFTTrainer, tuned_model(**options), tmp_path)
    root = "base_model.model.model"
    expected = {
        f"{root}.layers.{layer}.{module}.lora_{side}.default.weight"
        for layer in lora_layers
        for module in ("self_attn.q_proj", "mlp.up_proj")
        for side in "AB"
    }
    expected |= {f"{root}.norm.lora_mode.default.norms.{layer}.weight" for layer in norms}
    expected.add(f"{root}.norm.lora_mode.default.router.weight")
    assert {name for name, gradient in gradients.items() if gradient.abs().max() > 0} == expected


@pytest.mark.parametrize("trainer_cls", TRAINERS)
def test_evaluation_loss_has_no_distillation(trainer_cls, tmp_path):
    model = tuned_model(distillation_weight=100.0)
    dataset = make_dataset()
    truth = reference_step(model, as_batch(dataset))
    trainer, _ = make_trainer(
        trainer_cls, model, tmp_path, dataset=dataset, per_device_eval_batch_size=4
    )
    loss = trainer.evaluate(dataset)["eval_loss"]
    assert loss == pytest.approx(truth.task, rel=1e-4)


class Poison(TrainerCallback):
    """Spoil a weight, or the gradients that reach it, in the middle of the third step."""

    def __init__(self, *, gradient):
        self.gradient = gradient

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step != 2:
            return
        parameter = next(p for n, p in kwargs["model"].named_parameters() if "router" in n)
        if self.gradient:
            parameter.register_hook(lambda gradient: gradient * math.inf)
        else:
            parameter.data[0, 0] = math.nan


@pytest.mark.parametrize(
    ("gradient", "message"),
    [(False, "loss became nan"), (True, "gradient.* not finite")],
)
def test_divergence_stops_the_run_and_keeps_the_last_checkpoint(gradient, message, tmp_path):
    trainer, _ = make_trainer(
        MoDESFTTrainer,
        tuned_model(distillation_weight=0.3),
        tmp_path,
        dataset=make_dataset(16),
        max_steps=4,
        save_strategy="steps",
        save_steps=1,
    )
    trainer.add_callback(Poison(gradient=gradient))
    with pytest.raises(FloatingPointError, match=f"{message}; .*checkpoint-2"):
        trainer.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-1",
        "checkpoint-2",
    ]
    kept = load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors")
    assert all(bool(value.isfinite().all()) for value in kept.values())


@pytest.mark.filterwarnings("ignore:`label_smoothing_factor` is deprecated in `SFTTrainer`")
@pytest.mark.parametrize("trainer_cls", [MoDETrainer, MoDESFTTrainer])
def test_labels_kept_back_are_refused(trainer_cls, tmp_path):
    options = {"label_smoothing_factor": 0.1}
    with pytest.raises(RuntimeError, match="needs `labels` in the model's forward pass"):
        train_once(trainer_cls, tuned_model(), tmp_path, **options)
    logs, _ = train_once(trainer_cls, tuned_model(distillation_weight=0.0), tmp_path, **options)
    assert math.isfinite(logs["loss"])


class OwnLoss(Trainer):
    """A loss of one's own, made from logits."""

    num_passes = 1

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = [model(**inputs, mixture_loss=False) for _ in range(self.num_passes)]
        loss = sum(output.logits.square().mean() for output in outputs)
        return (loss, outputs[0]) if return_outputs else loss


class MixedOwnLoss(MoDETrainerMixin, OwnLoss):
    pass


class MixedTwoPasses(MoDETrainerMixin, OwnLoss):
    num_passes = 2


def test_a_loss_of_ones_own_gets_the_term_once(tmp_path):
    model = tuned_model(distillation_weight=0.3)
    truth = reference_step(model, as_batch(make_dataset()))
    own = float(truth.logits.square().mean())
    logs, _ = train_once(MixedOwnLoss, model, tmp_path)
    weighted = 0.3 * truth.distillation
    assert logs["loss"] == pytest.approx(own + weighted, rel=1e-4)
    assert logs["distillation_share"] == pytest.approx(weighted / (own + weighted), rel=1e-4)
    with pytest.raises(RuntimeError, match="one loss takes 2 passes with labels, as OwnLoss's"):
        train_once(MixedTwoPasses, tuned_model(distillation_weight=0.3), tmp_path)
    logs, _ = train_once(MixedTwoPasses, tuned_model(distillation_weight=0.0), tmp_path)
    assert logs["loss"] == pytest.approx(2 * own, rel=1e-4)


@pytest.mark.parametrize("trainer_cls", TRAINERS)
def test_auxiliary_loss_of_mixture_of_experts_is_kept(trainer_cls, tmp_path):
    settings = {"output_router_logits": True, "router_aux_loss_coef": 0.5}
    model = tiny_model("qwen3_moe", vocab_size=len(TOKENIZER), **settings)
    model = tuned_model(model, target_modules=["q_proj"], distillation_weight=0.3)
    dataset = make_dataset()
    truth = reference_step(model, as_batch(dataset))
    with torch.no_grad():
        auxiliary = model(**as_batch(dataset)).aux_loss
    logs, _ = train_once(trainer_cls, model, tmp_path, dataset=dataset)
    expected = truth.task + 0.3 * truth.distillation + 0.5 * float(auxiliary)
    assert logs["loss"] == pytest.approx(expected, rel=1e-4)
    assert auxiliary > 0.1


@pytest.mark.parametrize("trainer_cls", [MoDETrainer, MoDESFTTrainer])
@pytest.mark.parametrize("num_micro_batches", [1, 2])
def test_batch_without_label_tokens_moves_nothing(trainer_cls, num_micro_batches, tmp_path):
    """Four rows of which only the last two count, or none does."""
    rows = make_dataset().to_dict()
    num_empty = 4 if num_micro_batches == 1 else 2
    rows["labels"][:num_empty] = [[-100] * 8] * num_empty
    dataset = Dataset.from_dict(rows)
    logs, gradients = train_once(
        trainer_cls,
        tuned_model(),
        tmp_path,
        dataset=dataset,
        per_device_train_batch_size=4 // num_micro_batches,
        gradient_accumulation_steps=num_micro_batches,
    )
    assert all(math.isfinite(value) for value in logs.values())
    assert all(bool(gradient.isfinite().all()) for gradient in gradients.values())
    assert any(bool(gradient.any()) for gradient in gradients.values()) == (num_micro_batches == 2)


def test_golden_run(tmp_path):
    model = tiny_model(vocab_size=len(TOKENIZER), initializer_range=0.3)
    model = tuned_model(model, distillation_weight=0.3, router_input="raw")
    trainer, _ = make_trainer(
        MoDESFTTrainer, model, tmp_path, dataset=make_dataset(16), max_steps=10
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses == pytest.approx(GOLDEN_LOSSES, abs=1e-4)


def run_on(data, checkpoint, output_dir, *, revision=None, mode=None):
    """Train two steps on a named data set; give the prepared records as text, and the result."""
    prepared = []
    setup = importlib.import_module("depthmix.training.setup")

    def keep(dataset, numbers):
        for ids, labels in zip(dataset["input_ids"], dataset["labels"], strict=True):
            learnt = [label for label in labels if label != -100]
            prepared.append((TOKENIZER.decode(ids), TOKENIZER.decode(learnt)))
        assert len(prepared) == len(numbers)

    config = load_run_config(
        None,
        {
            "model": {"name": str(checkpoint), "revision": revision},
            "data": {"train": data},
            "mode": {"late_layers": 2, "target_modules": ["q_proj"], **(mode or {})},
            "training": {
                "output_dir": str(output_dir),
                "max_steps": 2,
                "max_length": 1024,
                "logging_steps": 1,
                "report_to": "none",
            },
        },
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "check_label_tokens", keep)
        return prepared, train(config)


@pytest.mark.parametrize(
    ("data", "asked", "learnt"),
    [
        (
            "math7k",
            "### Instruction:\nAnn sold 48/2 clips. And then?\n\n### Response:\n",
            "48/2 = 24 clips.\nIt is 1,024.\nThe answer is 1024.",
        ),
        (
            "arc_easy",
            "What do fish breathe with?\n\nAnswer1: gills Answer2: lungs Answer3: skin\n\n"
            "Answer format: answer1/answer2/answer3\n\n### Response:\n",
            "the correct answer is answer1",
        ),
    ],
)
def test_named_data_sets_are_trained_on_as_instructions(
    data, asked, learnt, small_data, tmp_path, monkeypatch
):
    monkeypatch.setenv("DEPTHMIX_DATA", str(small_data))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r".* training records ask a question of a test set")
        prepared, result = run_on(data, save_checkpoint(tmp_path / "base"), tmp_path / "out")
    whole, answer = prepared[0]
    assert whole.startswith("Below is an instruction")
    assert f"{asked}{learnt}" in whole
    assert answer.removesuffix("</s>") == learnt
    assert result.metrics["train_loss"] > 0
    if data == "math7k":
        assert "Answer Choices: (A) 1 (B) 2 km" in prepared[1][0]
        assert prepared[1][1].removesuffix("</s>") == "Add.\nDone.\nThe answer is C."


@pytest.mark.parametrize("is_main", [True, False])
def test_only_the_main_process_warns_of_leaks(is_main, small_data, tmp_path, monkeypatch):
    monkeypatch.setenv("DEPTHMIX_DATA", str(small_data))
    monkeypatch.setattr(MoDESFTTrainer, "is_world_process_zero", lambda self: is_main)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run_on("arc_easy", save_checkpoint(tmp_path / "base"), tmp_path / "out")
    texts = [str(warning.message) for warning in caught]
    assert any("ask a question of a test set (1 arc_easy" in text for text in texts) == is_main


def test_a_run_knows_which_revision_is_under_its_adapter(small_data, tmp_path, monkeypatch):
    monkeypatch.setenv("DEPTHMIX_DATA", str(small_data))
    base, run = save_checkpoint(tmp_path / "base"), tmp_path / "out"
    with pytest.raises(ValueError, match=r"`mode.revision` must be left out, got 'v2'"):
        run_on("arc_easy", base, run, revision="v1", mode={"revision": "v2"})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r".* training records ask a question of a test set")
        run_on("arc_easy", base, run, revision="v1")
    assert MoDEConfig.from_pretrained(run).revision == "v1"
    section = ModelSpec(name=str(run))
    assert find_base(section) == ModelSpec(name=str(base), adapter=str(run), revision="v1")
    assert find_base(replace(section, revision="v2")).revision == "v2"
    asked = []
    load = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        "depthmix.models.loading.AutoModelForCausalLM.from_pretrained",
        lambda *names, **options: asked.append(options["revision"]) or load(*names, **options),
    )
    load_model(section)
    assert asked == ["v1"]
