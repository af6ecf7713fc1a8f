"""TRL's trainers of other losses: the mixture trains, and their reference is the base."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trl import (
    DistillationConfig,
    DistillationTrainer,
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
)
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.trainer.utils import add_fused_lm_head

from checkpoints import make_model, make_tokenizer
from depthmix import MoDEConfig, MoDESFTTrainer, MoDETrainerMixin, attach, load
from depthmix.libraries.releases import CHECKPOINTING
from depthmix.method.norm import find_mixture_norm
from models import randomise
from references import reference_step
from test_training import KeptGradients

TOKENIZER = make_tokenizer()
PAIRS = [
    {"prompt": "2+2=", "chosen": "4", "rejected": "five"},
    {"prompt": "Say: ", "chosen": "yes, I do", "rejected": "no"},
    {"prompt": "A", "chosen": "b", "rejected": "c"},
    {"prompt": "1, 2, ", "chosen": "3, 4", "rejected": "1"},
]
UNPAIRED = [
    {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
    for pair in PAIRS
    for side in ("chosen", "rejected")
]
PROMPTS = [{"prompt": pair["prompt"]} for pair in PAIRS]
CHATS = [
    {
        "messages": [
            {"role": "user", "content": pair["prompt"]},
            {"role": "assistant", "content": pair["chosen"]},
        ]
    }
    for pair in PAIRS
]
SAMPLING = {"num_generations": 2, "max_completion_length": 4, "steps_per_generation": 1}
HOSTS = {
    "dpo": (DPOTrainer, DPOConfig, PAIRS, {"max_length": 32}),
    "kto": (KTOTrainer, KTOConfig, UNPAIRED, {"max_length": 32}),
    "grpo": (GRPOTrainer, GRPOConfig, PROMPTS, {**SAMPLING, "beta": 0.1}),
    "rloo": (RLOOTrainer, RLOOConfig, PROMPTS, {**SAMPLING, "beta": 0.1}),
    "orpo": (ORPOTrainer, ORPOConfig, PAIRS, {"max_length": 32}),
    "cpo": (CPOTrainer, CPOConfig, PAIRS, {"max_length": 32}),
    "gkd": (GKDTrainer, GKDConfig, CHATS, {"max_length": 64, "max_new_tokens": 4, "lmbda": 0.0}),
}
OTHERS = {
    "online dpo": (OnlineDPOTrainer, OnlineDPOConfig, PROMPTS, {"max_new_tokens": 4}),
    "distill": (DistillationTrainer, DistillationConfig, PROMPTS, {"max_completion_length": 4}),
    "reward": (RewardTrainer, RewardConfig, PAIRS, {}),
}
LABELLED = ["dpo", "kto", "grpo", "rloo"]
"""Trainers whose passes have labels, and whose loss has a reference."""


def padded_tokenizer():
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def reward_later_ones(completions, **_others):
    """Reward each answer to a prompt differently, whatever was drawn: equals earn no gradient."""
    return [float(number) for number, _ in enumerate(completions)]


def make_mode(**options):
    options = {"late_layers": 3, "router_init": "gaussian", "distillation_weight": 0.3, **options}
    return MoDEConfig(target_modules=["q_proj", "up_proj"], r=2, **options)


def make_trainer(kind, output_dir, model, *, mixed=True, tuner=None, extra=None, **options):
    """Build a trainer for one quiet step on the CPU, with the mixin or without it."""
    host, config, rows, settings = {**HOSTS, **OTHERS}[kind]
    quiet = {
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
        **({} if kind in OTHERS else {"remove_unused_columns": False}),
    }
    given = dict(extra or {})
    if kind in ("grpo", "rloo", "online dpo"):
        given["reward_funcs"] = reward_later_ones
    if kind in ("gkd", "distill"):
        given["teacher_model"] = make_model(TOKENIZER)
    return (type("Mixed", (MoDETrainerMixin, host), {}) if mixed else host)(
        model=model,
        args=config(output_dir=str(output_dir), **{**quiet, **settings, **options}),
        train_dataset=Dataset.from_list(rows),
        processing_class=padded_tokenizer(),
        peft_config=tuner,
        **given,
    )


def trained_parameters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def train(trainer):
    """Train; give the first log, and the names of the gradients that were not zero."""
    kept = KeptGradients()
    trainer.add_callback(kept)
    trainer.train()
    reached = {name for name, gradient in kept.gradients.items() if gradient.abs().max() > 0}
    return trainer.state.log_history[0], reached


ADAPTED = {
    f"base_model.model.model.layers.0.{module}.lora_{side}.default.weight"
    for module in ("self_attn.q_proj", "mlp.up_proj")
    for side in "AB"
}
MIXED = {
    f"base_model.model.model.norm.lora_mode.default.{part}.weight"
    for part in ("norms.2", "norms.3", "router")
}


@pytest.mark.parametrize("kind", HOSTS)
@pytest.mark.parametrize("mixed", [True, False])
def test_the_mixture_trains(kind, mixed, tmp_path):
    weight = 0.3 if mixed and kind in LABELLED else 0.0
    tuned = get_peft_model(make_model(TOKENIZER), make_mode(distillation_weight=weight))
    randomise(tuned, seed=5, only_trainable=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*distillation")
        trainer = make_trainer(kind, tmp_path, tuned, mixed=mixed)
        frozen = {n: p.detach().clone() for n, p in tuned.named_parameters() if not p.requires_grad}
        before = trained_parameters(tuned)
        logs, reached = train(trainer)
    assert before.keys() == reached == ADAPTED | MIXED
    after = dict(tuned.named_parameters())
    assert not any(torch.equal(after[name], value) for name, value in before.items())
    assert all(torch.equal(after[name], value) for name, value in frozen.items())
    assert math.isfinite(logs["loss"])
    assert ("distillation_share" in logs) == (mixed and kind in LABELLED)


@pytest.mark.parametrize("kind", HOSTS)
def test_an_attached_mixture_trains(kind, tmp_path):
    make_model(TOKENIZER).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base").requires_grad_(False)
    attach(model, late_layers=3, distillation_weight=0.3 if kind in LABELLED else 0.0)
    before = trained_parameters(model)
    trainer = make_trainer(kind, tmp_path, model)
    _, reached = train(trainer)
    parts = ("norms.2.weight", "norms.3.weight", "router.weight", "router.bias")
    assert before.keys() == reached == {f"model.norm.mixture.{part}" for part in parts}
    if kind in LABELLED:
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").state_dict()
        reference = trainer.ref_model.state_dict()
        assert reference.keys() == base.keys()
        assert all(torch.equal(reference[name], value) for name, value in base.items())


def keep_references(model, adapter=None):
    """Keep the inputs and log-probabilities of passes with this adapter alone, or with none."""
    norm, kept = find_mixture_norm(model), []

    def keep(_model, _args, kwargs, output):
        active = None if norm.disable_adapters else norm.active_adapters[0]
        if active == adapter and kwargs.get("fused_lm_head"):
            kept.append((kwargs["input_ids"], kwargs["attention_mask"], output.log_probs))

    norm.backbone.model.register_forward_hook(keep, with_kwargs=True)
    return kept


def assert_references_are(model, kept):
    """Compare kept log-probabilities with a model's, bit for bit."""
    assert kept
    add_fused_lm_head(model)
    for input_ids, attention_mask, log_probs in kept:
        labels = input_ids.masked_fill(attention_mask == 0, -100)
        with torch.no_grad():
            expected = model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                labels=labels,
                fused_lm_head=True,
            ).log_probs
        scored = log_probs != 0
        assert scored.any()
        assert torch.equal(log_probs[scored], expected[scored])


@pytest.mark.parametrize("kind", LABELLED)
def test_the_reference_of_a_new_adapter_is_the_base(kind, tmp_path):
    trainer = make_trainer(kind, tmp_path, make_model(TOKENIZER), tuner=make_mode(), max_steps=2)
    kept = keep_references(trainer.model)
    trainer.train()
    assert_references_are(make_model(TOKENIZER), kept)


@pytest.mark.parametrize("kind", LABELLED)
def test_the_reference_of_a_trained_adapter_is_its_start(kind, tmp_path):
    def make_policy():
        tuned = get_peft_model(make_model(TOKENIZER), make_mode())
        randomise(tuned, seed=5, only_trainable=True)
        return tuned.eval()

    policy = make_policy()
    trainer = make_trainer(kind, tmp_path, policy, max_steps=2)
    start = trained_parameters(policy)
    kept = keep_references(policy, "ref")
    trainer.train()
    parameters = dict(policy.named_parameters())
    for name, value in start.items():
        assert torch.equal(parameters[name.replace(".default.", ".ref.")], value)
        assert not torch.equal(parameters[name], value)
    assert_references_are(make_policy().get_base_model(), kept)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("dpo", {"precompute_ref_log_probs": True}, "`precompute_ref_log_probs` must be False"),
        ("kto", {"precompute_ref_log_probs": True}, "`precompute_ref_log_probs` must be False"),
        ("dpo", {"sync_ref_model": True}, "`sync_ref_model` must be False"),
        ("grpo", {"sync_ref_model": True}, "`sync_ref_model` must be False"),
    ],
)
def test_references_that_no_attached_mixture_has(kind, options, message, tmp_path):
    model = make_model(TOKENIZER)
    attach(model, late_layers=3)
    with pytest.raises(ValueError, match=message):
        make_trainer(kind, tmp_path, model, **options)


def test_a_reference_without_its_mixture_is_refused(tmp_path):
    model = make_model(TOKENIZER)
    attach(model, late_layers=3)
    model.save_pretrained(tmp_path / "tuned")
    remedy = {"dpo": "`ref_model=depthmix.load", "grpo": "`beta=0`"}
    for kind, words in remedy.items():
        with pytest.raises(ValueError, match=f"loads that folder without the mixture.*{words}"):
            make_trainer(kind, tmp_path, load(tmp_path / "tuned"))
    reference = load(tmp_path / "tuned")
    trainer = make_trainer(
        "dpo", tmp_path, load(tmp_path / "tuned"), extra={"ref_model": reference}
    )
    logs, _ = train(trainer)
    without = logs["loss"] * (1 - logs["distillation_share"])
    assert without == pytest.approx(math.log(2), abs=1e-5)
    make_trainer("grpo", tmp_path, load(tmp_path / "tuned"), beta=0.0)


def test_an_adapter_over_a_loaded_mixture_has_it_in_its_reference(tmp_path):
    model = make_model(TOKENIZER)
    attach(model, late_layers=3)
    model.save_pretrained(tmp_path / "tuned")
    lora = LoraConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM")
    policy = load(tmp_path / "tuned")
    options = {"precompute_ref_log_probs": True, "max_length": 64}
    trainer = make_trainer("dpo", tmp_path, policy, mixed=True, tuner=lora, **options)
    logs, _ = train(trainer)
    without = logs["loss"] * (1 - logs["distillation_share"])
    assert without == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.parametrize("kind", ["dpo", "grpo"])
def test_exits_are_trained_along_by_what_the_model_says_itself(kind, tmp_path):
    losses = []
    for kappa in (0.0, 1.0):  # labels that DPO rejects are nothing to learn
        mode = make_mode(distillation_weight=0.0, exits=[1, 3], exit_distillation=kappa)
        tuned = get_peft_model(make_model(TOKENIZER), mode)
        randomise(tuned, seed=5, only_trainable=True)
        logs, reached = train(make_trainer(kind, tmp_path, tuned))
        assert {name for name in reached if ".exits." in name} == {
            f"base_model.model.model.norm.lora_mode.default.exits.by_layer.{layer}.{part}.weight"
            for layer in (1, 3)
            for part in ("norm", "down", "up")
        }
        assert logs["exit_loss/layer_1"] > 0
        assert 0 <= logs["exit_agreement/layer_3"] <= 1
        losses.append(logs["loss"])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("kind", ["orpo", "cpo", "gkd"])
def test_a_trainer_that_passes_no_labels_is_named(kind, tmp_path):
    trainer = make_trainer(kind, tmp_path, make_model(TOKENIZER), tuner=make_mode())
    name = HOSTS[kind][0].__name__
    with pytest.raises(RuntimeError, match=f"{name} calls the model without them; .*weight=0"):
        trainer.train()
    trainer = make_trainer(kind, tmp_path, make_model(TOKENIZER), tuner=make_mode(), mixed=False)
    with pytest.warns(UserWarning, match="left out of a training pass without `labels`"):
        trainer.train()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("online dpo", "must be 0 in OnlineDPOTrainer, which makes its loss without"),
        ("distill", "DistillationTrainer never calls the whole model in training"),
    ],
)
def test_a_trainer_without_a_place_for_the_term_is_named(kind, message, tmp_path):
    trainer = make_trainer(kind, tmp_path, make_model(TOKENIZER), tuner=make_mode())
    with pytest.raises(RuntimeError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0
    mode = make_mode(distillation_weight=0.0, exits=[2])
    trainer = make_trainer(kind, tmp_path, make_model(TOKENIZER), tuner=mode)
    message = message.replace("must be 0", "must be left out")
    with pytest.raises(RuntimeError, match=message):
        trainer.train()
    without = make_mode(distillation_weight=0.0)
    trainer = make_trainer(kind, tmp_path, make_model(TOKENIZER), tuner=without)
    _, reached = train(trainer)
    assert reached >= MIXED


def test_a_classifier_has_no_mixture(tmp_path):
    config = make_model(TOKENIZER).config
    config.num_labels, config.pad_token_id = 1, TOKENIZER.eos_token_id
    model = AutoModelForSequenceClassification.from_config(config)
    with pytest.raises(TypeError, match="LlamaForSequenceClassification cannot generate text"):
        make_trainer("reward", tmp_path, model, tuner=make_mode())


@pytest.mark.parametrize("kind", LABELLED)
def test_a_plain_trainer_is_told_of_the_mixin(kind, tmp_path):
    trainer = make_trainer(kind, tmp_path, make_model(TOKENIZER), tuner=make_mode(), mixed=False)
    with pytest.warns(UserWarning, match="put `MoDETrainerMixin` before it"):
        trainer.train()


def test_the_mixin_stands_before_the_trainer():
    with pytest.raises(TypeError, match=r"class Late\(MoDETrainerMixin, DPOTrainer\)"):
        type("Late", (DPOTrainer, MoDETrainerMixin), {})


@pytest.mark.parametrize("num_batches", [1, 2])
@pytest.mark.parametrize("kind", LABELLED)
def test_the_share_is_of_the_loss_that_is_minimised(kind, num_batches, tmp_path):
    """A term on top is a mean over batches, as the host's loss is."""

    def logs(weight):
        tuner = make_mode(distillation_weight=weight)
        options = {
            "gradient_accumulation_steps": num_batches,
            "per_device_train_batch_size": 4 // num_batches,
        }
        trainer = make_trainer(kind, tmp_path, make_model(TOKENIZER), tuner=tuner, **options)
        return train(trainer)[0]

    whole, rest = logs(0.3), logs(0.0)
    term = whole["loss"] - rest["loss"]
    assert term == pytest.approx(0.3 * whole["distillation_loss"], rel=0.2)
    if num_batches == 1:
        assert term == pytest.approx(0.3 * whole["distillation_loss"], rel=1e-4)
        share = term / (term + abs(rest["loss"]))
        assert whole["distillation_share"] == pytest.approx(share, rel=1e-4)
    assert 0 < whole["distillation_share"] <= 1
    assert rest["distillation_share"] == 0


SFT_DATA = {
    "prompts": [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in PAIRS],
    "texts": [{"text": pair["prompt"] + pair["chosen"]} for pair in PAIRS],
    "chats": CHATS,
}
MARKED_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}</s>{% endgeneration %}{% else %}"
    "{{ message.content }}</s>{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("data", "options"),
    [
        ("prompts", {}),
        ("prompts", {"completion_only_loss": False}),
        ("prompts", {"padding_free": True, "max_length": None}),
        ("texts", {"packing": True, "packing_strategy": "wrapped"}),
        ("texts", {"packing": True, "packing_strategy": "bfd"}),
        ("chats", {"assistant_only_loss": True}),
        ("prompts", {"loss_type": "dft"}),
    ],
)
def test_the_options_of_sft_leave_the_objective_whole(data, options, tmp_path):
    tokenizer = padded_tokenizer()
    tokenizer.chat_template = MARKED_TEMPLATE
    tuned = get_peft_model(make_model(TOKENIZER), make_mode())
    randomise(tuned, seed=5, only_trainable=True)
    trainer = MoDESFTTrainer(
        model=tuned,
        args=SFTConfig(
            output_dir=str(tmp_path),
            use_cpu=True,
            bf16=False,
            per_device_train_batch_size=4,
            max_steps=1,
            logging_steps=1,
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
            **{CHECKPOINTING: False, "max_length": 24, **options},
        ),
        train_dataset=Dataset.from_list(SFT_DATA[data]),
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    truth = reference_step(tuned.eval(), {k: v for k, v in batch.items() if v is not None})
    logs, reached = train(trainer)
    assert reached == ADAPTED | MIXED
    assert logs["task_loss"] == pytest.approx(truth.task, rel=1e-4)
    assert logs["distillation_loss"] == pytest.approx(truth.distillation, rel=1e-4)
    weighted = 0.3 * truth.distillation
    assert logs["distillation_share"] == pytest.approx(weighted / logs["loss"], rel=1e-4)
    is_nll = options.get("loss_type") != "dft"
    assert (logs["loss"] == pytest.approx(truth.task + weighted, rel=1e-4)) == is_nll
