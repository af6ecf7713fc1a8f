"""The task loss on one late layer or on each, and each late layer's own loss in the log."""

from __future__ import annotations

import os

import pytest
import torch
import torch.multiprocessing
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import Trainer
from transformers.loss.loss_utils import ForCausalLMLoss
from trl import SFTTrainer

from adapters import OPTIONS
from depthmix import MixtureConfig, MoDEConfig, MoDESFTTrainer, MoDETrainer, attach, load
from depthmix.adapters.readout import reading_out
from depthmix.loss.batch import mixture_loss
from depthmix.loss.fused import fused_sums
from depthmix.method.norm import active_mixture
from models import random_ids, tiny_model
from references import reference_step
from test_fused_loss import Watch, draw_tokens, make_backbone
from test_losses import LABELS, label_mask, make_routes, naive_cross_entropy, naive_logits
from test_training import as_batch, make_dataset, make_trainer, train_once, tuned_model

TASK_LOSSES = [2, 3, 4, "layers"]
IDS = random_ids(3, 7)
BATCH = {"input_ids": IDS, "labels": IDS}


def expected_task(own, task_loss):
    """Take the layer's own loss, or the mean of all late layers', 2 to 4."""
    return sum(own) / 3 if task_loss == "layers" else own[task_loss - 2]


# The loss as a function.


@pytest.mark.parametrize("way", ["fused", "checkpointed", "plain"])
@pytest.mark.parametrize(
    ("model_type", "task_loss", "top_m"),
    [("llama", 2, None), ("llama", 4, 5), ("gemma2", 3, 5), ("cohere", "layers", None)],
)
def test_loss_and_gradients_are_the_naive_ones(model_type, task_loss, top_m, way):
    routes, backbone = make_routes(
        model_type, task_loss=task_loss, distillation_weight=0.3, distillation_top_m=top_m
    )
    backbone.model.requires_grad_(way != "fused")
    inputs = (*routes.states, routes.weights)
    loss = mixture_loss(routes, backbone, LABELS, plain=way == "plain")
    found = torch.autograd.grad(loss.total, inputs, materialize_grads=True)

    parts, mixed = naive_logits(routes, backbone)
    task = expected_task([naive_cross_entropy(part, LABELS) for part in parts], task_loss)
    if top_m is not None:  # the ensemble's likeliest entries, whatever the task loss is on
        kept = mixed.detach().topk(top_m).indices
        parts = [part.gather(-1, kept) for part in parts]
    *students, teacher = [part.log_softmax(-1)[label_mask(LABELS)] for part in parts]
    kl = sum((p.exp() * (p - teacher.detach())).sum(-1).mean() for p in students)
    expected = torch.autograd.grad(task + 0.3 * kl, inputs, materialize_grads=True)
    torch.testing.assert_close(loss.task.double(), task, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(loss.distillation.double(), kl, rtol=1e-4, atol=0.0)
    for ours, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-3, atol=1e-5)
    assert not found[-1].any()  # the router learns nothing


@pytest.mark.parametrize("task_loss", [3, "layers"])
def test_tokens_that_are_not_distilled_count_too(task_loss):
    routes, backbone = make_routes(
        task_loss=task_loss, distillation_weight=0.3, distillation_token_share=0.3
    )
    with torch.no_grad():
        own = [naive_cross_entropy(part, LABELS) for part in naive_logits(routes, backbone)[0]]
    loss = mixture_loss(routes, backbone, LABELS)
    assert float(loss.task) == pytest.approx(float(expected_task(own, task_loss)), rel=1e-5)
    assert loss.distillation > 0


@pytest.mark.parametrize("way", ["fused", "checkpointed"])
@pytest.mark.parametrize("task_loss", ["ensemble", *TASK_LOSSES])
def test_layer_losses_are_the_naive_ones(task_loss, way):
    options = {"task_loss": task_loss, "distillation_weight": 0.3}
    routes, backbone = make_routes("gemma2", log_layer_losses=True, **options)
    backbone.model.requires_grad_(way != "fused")
    loss = mixture_loss(routes, backbone, LABELS, num_items_in_batch=40)
    own = [naive_cross_entropy(part, LABELS) for part in naive_logits(routes, backbone)[0]]
    torch.testing.assert_close(loss.layer_losses.double(), torch.stack(own), rtol=1e-5, atol=0.0)
    assert not loss.layer_losses.requires_grad
    without, _ = make_routes("gemma2", **options)
    plain = mixture_loss(without, backbone, LABELS, num_items_in_batch=40)
    assert len(plain.layer_losses) == 0
    assert torch.equal(plain.total, loss.total)


@pytest.mark.parametrize("task_loss", [3, "layers"])
def test_no_label_token_gives_zero_and_zero_gradients(task_loss):
    routes, backbone = make_routes(task_loss=task_loss, log_layer_losses=True)
    loss = mixture_loss(routes, backbone, torch.full_like(LABELS, -100))
    assert (float(loss.task), float(loss.total)) == (0, 0)
    assert loss.layer_losses.tolist() == [0, 0, 0]
    loss.total.backward()
    assert all(not state.grad.any() for state in routes.states)


def test_without_gradients_the_fused_loss_takes_the_products_forward_alone():
    tokens, backbone = draw_tokens(20, k=3, num_distilled=0), make_backbone()
    products = []
    for has_gradients in (True, False):
        with Watch() as watch, torch.set_grad_enabled(has_gradients):
            sums = fused_sums(tokens, backbone, MixtureConfig())
        products.append(watch.calls.count("aten.mm.out"))
    assert products == [2, 1]
    with torch.no_grad():
        assert torch.equal(fused_sums(tokens, backbone, MixtureConfig()).task, sums.task)


# A training pass.


def train_pass(model, **kwargs):
    return model.train()(**{**BATCH, **kwargs}).loss


@pytest.mark.parametrize("task_loss", [2, 3, 4])
def test_training_loss_is_what_reading_out_the_layer_gives(task_loss):
    model = tuned_model(tiny_model(), task_loss=task_loss, distillation_weight=0.0)
    loss = train_pass(model)
    with reading_out(model.eval(), task_loss), torch.no_grad():
        torch.testing.assert_close(loss, model(**BATCH).loss)
    with torch.no_grad():
        ensemble = model(**BATCH).loss
    assert float(ensemble) == pytest.approx(reference_step(model, BATCH).task, rel=1e-4)
    assert abs(loss - ensemble) > 0.01


def test_each_adapter_has_its_own():
    model = get_peft_model(tiny_model(), MoDEConfig(**OPTIONS, task_loss=3))
    model.add_adapter("other", MoDEConfig(**{**OPTIONS, "late_layers": 2}, task_loss="layers"))
    for name in ("default", "other", "default"):
        model.set_adapter(name)
        truth = reference_step(model.eval(), BATCH)
        own = truth.layers[3] if name == "default" else sum(truth.layers.values()) / 2
        expected = own + 0.1 * truth.distillation
        assert float(train_pass(model)) == pytest.approx(expected, rel=1e-4)


def test_a_loss_of_its_own_is_refused():
    model = tiny_model().requires_grad_(False)
    attach(model, late_layers=3, task_loss=3)
    message = "`task_loss` must be 'ensemble' where a training pass keeps its own .*, got 3"
    for kwargs in ({"mixture_loss": False}, {"logits_to_keep": 0}, {"labels": None}):
        with pytest.raises(ValueError, match=message):
            train_pass(model, **kwargs)
    model.loss_function = lambda *args, **kwargs: 2 * ForCausalLMLoss(*args, **kwargs)
    with pytest.raises(ValueError, match=message):
        train_pass(model)
    assert model.eval()(**BATCH).loss > 0
    model.loss_function = ForCausalLMLoss
    assert train_pass(model) > 0


def test_expert_routers_loss_is_refused():
    model = tiny_model("mixtral").requires_grad_(False)
    attach(model, late_layers=3, task_loss="layers")
    with pytest.raises(ValueError, match=r"must be 'ensemble' .*, got 'layers'"):
        train_pass(model, output_router_logits=True)
    assert train_pass(model) > 0


# Options.


@pytest.mark.parametrize("task_loss", ["layers", 3])
def test_option_is_saved_and_loaded(task_loss, tmp_path):
    tuned = get_peft_model(tiny_model(), MoDEConfig(**OPTIONS, task_loss=task_loss))
    tuned.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter")
    model = tiny_model()
    attach(model, late_layers=3, task_loss=task_loss)
    model.save_pretrained(tmp_path / "model")
    for other in (loaded, load(tmp_path / "model")):
        assert active_mixture(other).config.task_loss == task_loss


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task_loss": True}, "'ensemble' or 'layers' or int, got True, which is bool"),
        ({"task_loss": 1}, r"one of the mixture's late layers 2, 3, 4 \(or 'ens.*, got 1"),
        (
            {"task_loss": 3, "late_layers": [2, 4]},
            "one of the mixture's late layers 2, 4 .*, got 3",
        ),
    ],
)
def test_what_is_no_late_layer_is_refused(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        attach(tiny_model(), **options)
    model = tiny_model()
    with pytest.raises((TypeError, ValueError), match=message):
        get_peft_model(model, MoDEConfig(**{**OPTIONS, **options}))
    assert not any("lora" in name for name, _ in model.named_parameters())


# Trainers.


@pytest.mark.parametrize(
    ("trainer_cls", "options"),
    [
        (Trainer, {"task_loss": 3, "top_k": 2}),
        (MoDETrainer, {"task_loss": 2}),
        (MoDETrainer, {"task_loss": "layers", "log_layer_losses": True}),
        (MoDESFTTrainer, {"task_loss": 4, "log_layer_losses": True}),
        (MoDESFTTrainer, {"task_loss": "layers"}),
        (MoDESFTTrainer, {"log_layer_losses": True}),
    ],
)
def test_loss_and_log_are_those_by_hand(trainer_cls, options, tmp_path):
    model = tuned_model(distillation_weight=0.3, **options)
    truth = reference_step(model, as_batch(make_dataset()))
    own = list(truth.layers.values())
    task_loss = options.get("task_loss")
    task = truth.task if task_loss is None else expected_task(own, task_loss)
    logs, gradients = train_once(trainer_cls, model, tmp_path)
    assert logs["loss"] == pytest.approx(task + 0.3 * truth.distillation, rel=1e-4)
    router = next(gradient for name, gradient in gradients.items() if "router" in name)
    assert router.any() == (task_loss is None)
    logged = {key: value for key, value in logs.items() if key.startswith("layer_loss/")}
    if trainer_cls is Trainer:
        return
    assert logs["task_loss"] == pytest.approx(task, rel=1e-4)
    expected = {f"layer_loss/layer_{layer}": loss for layer, loss in truth.layers.items()}
    assert logged == (pytest.approx(expected, rel=1e-4) if "log_layer_losses" in options else {})


@pytest.mark.filterwarnings("ignore:`label_smoothing_factor` is deprecated in `SFTTrainer`")
@pytest.mark.parametrize("trainer_cls", [Trainer, MoDETrainer, SFTTrainer, MoDESFTTrainer])
def test_label_smoothing_is_refused(trainer_cls, tmp_path):
    model = tuned_model(task_loss=3, distillation_weight=0.0)
    with pytest.raises(ValueError, match="`task_loss` must be 'ensemble' where"):
        train_once(trainer_cls, model, tmp_path, label_smoothing_factor=0.1)


def test_a_trainer_with_its_own_head_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`MoDESFTTrainer` instead of TRL's own"):
        train_once(SFTTrainer, tuned_model(task_loss=3), tmp_path)


def test_evaluation_loss_is_the_ensembles(tmp_path):
    model = tuned_model(task_loss=2)
    dataset = make_dataset()
    truth = reference_step(model, as_batch(dataset))
    options = {"dataset": dataset, "per_device_eval_batch_size": 4}
    trainer, _ = make_trainer(MoDESFTTrainer, model, tmp_path, **options)
    assert trainer.evaluate(dataset)["eval_loss"] == pytest.approx(truth.task, rel=1e-4)


# Accumulation and processes.

SPREAD = {"task_loss": 3, "log_layer_losses": True, "distillation_weight": 0.0, "adapt": "all"}


def saturated_model(**options):
    """Tune a model whose router gives many tokens next to no weight on some layer."""
    model = tuned_model(**options)
    router = active_mixture(model).router
    nn.init.normal_(router.weight, std=2.0, generator=torch.Generator().manual_seed(7))
    return model


def measured(logs):
    return {
        name: value
        for name, value in logs.items()
        if "/layer_" in name or name in ("loss", "task_loss", "routing_entropy")
    }


def train_in_one_of_two_processes(rank, folder):
    torch.set_num_threads(1)
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}  # asked for, not used
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    logs, _ = train_once(
        MoDETrainer,
        saturated_model(**SPREAD),
        folder,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        ddp_backend="gloo",
        ddp_find_unused_parameters=False,
    )
    if rank == 0:
        torch.save(logs, f"{folder}/logs.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("way", ["one batch", "micro-batches", "two processes"])
def test_routing_is_measured_over_all_label_tokens(way, tmp_path):
    truth = reference_step(saturated_model(**SPREAD), as_batch(make_dataset()))
    weights = truth.weights[:, :-1][as_batch(make_dataset())["labels"][:, 1:] != -100]
    if way == "two processes":
        torch.multiprocessing.spawn(train_in_one_of_two_processes, args=(str(tmp_path),), nprocs=2)
        logs = torch.load(tmp_path / "logs.pt")
    else:
        size = 4 if way == "one batch" else 1
        logs, _ = train_once(
            MoDETrainer,
            saturated_model(**SPREAD),
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=4 // size,
        )
    variance = weights.square().mean(0) - weights.mean(0).square()
    sparsity = (weights < 1e-5).double().mean(0)
    expected = {"loss": truth.layers[3], "task_loss": truth.layers[3]}
    expected["routing_entropy"] = float(torch.special.entr(weights).sum(-1).mean())
    for layer, place in ((2, 0), (3, 1), (4, 2)):
        expected[f"routing_weight/layer_{layer}"] = float(weights.mean(0)[place])
        expected[f"routing_variance/layer_{layer}"] = float(variance[place])
        expected[f"routing_sparsity/layer_{layer}"] = float(sparsity[place])
        expected[f"layer_loss/layer_{layer}"] = truth.layers[layer]
    assert measured(logs) == pytest.approx(expected, rel=1e-4, abs=1e-9)
    assert variance.min() > 0.01
    assert 0.1 < sparsity.max() < 0.9


def test_variance_of_weights_that_hardly_vary(tmp_path):
    """The identity start: E[G²] - E[G]² in float32 would be noise, even negative."""
    model = tuned_model()
    router = active_mixture(model).router
    nn.init.normal_(router.weight, std=1e-5, generator=torch.Generator().manual_seed(7))
    dataset = make_dataset()
    truth = reference_step(model, as_batch(dataset))
    weights = truth.weights[:, :-1][as_batch(dataset)["labels"][:, 1:] != -100]
    logs, _ = train_once(
        MoDETrainer,
        model,
        tmp_path,
        dataset=dataset,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
    )
    for layer, variance in zip((2, 3, 4), weights.var(0, correction=0).tolist(), strict=True):
        assert logs[f"routing_variance/layer_{layer}"] == pytest.approx(variance, rel=0.1)
