"""Evaluation losses are means over label tokens, whatever the batches and the processes."""

from __future__ import annotations

import os

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from checkpoints import make_model
from depthmix.training.trainers.evaluation_loss import TokenMeans, without_repeats
from depthmix.training.trainers.mixin import MoDESFTTrainer, MoDETrainer
from references import cross_entropy, reference_step
from test_training import TOKENIZER, as_batch, make_dataset, make_trainer, tuned_model

ROWS = make_dataset(7, length=9)
"""Seven rows with 5 to 8 label tokens, but for the last, which has none."""


def uneven_dataset():
    table = ROWS.to_dict()
    table["labels"][3] = [-100] * 8 + table["labels"][3][8:]
    table["labels"][6] = [-100] * 9
    return Dataset.from_dict(table)


def evaluate(trainer_cls, model, output_dir, batch_size, **options):
    trainer, _ = make_trainer(
        trainer_cls, model, output_dir, per_device_eval_batch_size=batch_size, **options
    )
    return trainer.evaluate(uneven_dataset())


@pytest.mark.parametrize("trainer_cls", [MoDETrainer, MoDESFTTrainer])
@pytest.mark.parametrize("kind", ["mixture", "plain", "trained head"])
def test_the_batch_size_changes_no_evaluation_loss(trainer_cls, kind, tmp_path):
    if kind == "plain":
        model = make_model(TOKENIZER)
        with torch.no_grad():
            batch = as_batch(uneven_dataset())
            truth = cross_entropy(model(batch["input_ids"]).logits.double(), batch["labels"])
    else:
        model = tuned_model(modules_to_save=["lm_head"] if kind == "trained head" else None)
        truth = reference_step(model.eval(), as_batch(uneven_dataset())).task
    found = [evaluate(trainer_cls, model, tmp_path, size) for size in (1, 2, 3, 8)]
    for metrics in found:
        assert metrics["eval_loss"] == pytest.approx(truth, rel=1e-5)
    for name in ("eval_entropy", "eval_mean_token_accuracy"):
        assert (name in found[0]) == (trainer_cls is MoDESFTTrainer)
        if name in found[0]:
            values = [metrics[name] for metrics in found]
            assert values == pytest.approx([values[-1]] * 4, rel=1e-5)


def evaluate_in_one_of_two_processes(rank, folder):
    torch.set_num_threads(1)
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}  # asked for, not used
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    found = [
        evaluate(trainer_cls, tuned_model(), folder, 2, ddp_backend="gloo")
        for trainer_cls in (MoDETrainer, MoDESFTTrainer)
    ]
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_a_row_that_fills_up_a_batch_of_two_processes_counts_once(tmp_path):
    truth = reference_step(tuned_model(), as_batch(uneven_dataset())).task
    torch.multiprocessing.spawn(evaluate_in_one_of_two_processes, args=(str(tmp_path),), nprocs=2)
    for metrics in torch.load(tmp_path / "found.pt"):
        assert metrics["eval_loss"] == pytest.approx(truth, rel=1e-5)


def test_predictions_have_the_same_loss(tmp_path):
    trainer, _ = make_trainer(MoDETrainer, tuned_model(), tmp_path, per_device_eval_batch_size=2)
    truth = reference_step(trainer.model.eval(), as_batch(uneven_dataset())).task
    output = trainer.predict(uneven_dataset())
    assert output.metrics["test_loss"] == pytest.approx(truth, rel=1e-5)
    assert output.label_ids.tolist() == uneven_dataset()["labels"]


def test_nothing_to_average_leaves_the_hosts_number(tmp_path):
    table = {**ROWS.to_dict(), "labels": [[-100] * 9] * 7}
    trainer, _ = make_trainer(MoDESFTTrainer, tuned_model(), tmp_path)
    assert trainer.evaluate(Dataset.from_dict(table))["eval_loss"] == 0


def twice(outputs, labels, num_items_in_batch=None):
    return 2 * outputs.logits.float().mean()


@pytest.mark.parametrize("way", ["function", "loss of the model"])
def test_losses_of_another_kind_stay_as_they_are(way, tmp_path):
    model = make_model(TOKENIZER)
    trainer, _ = make_trainer(MoDETrainer, model, tmp_path, per_device_eval_batch_size=7)
    if way == "function":
        trainer.compute_loss_func = twice
    else:
        model.loss_function = lambda logits, *_args, **_kwargs: 2 * logits.float().mean()
    with torch.no_grad():
        expected = 2 * model(as_batch(uneven_dataset())["input_ids"]).logits.mean()
    found = trainer.evaluate(uneven_dataset())["eval_loss"]
    assert found == pytest.approx(float(expected), rel=1e-5)


@given(num_rows=st.integers(1, 12), num_ranks=st.integers(1, 4), batch_size=st.integers(1, 4))
def test_each_row_is_scored_once(num_rows, num_ranks, batch_size):
    total = num_ranks * batch_size
    num_rows = (num_rows - 1) % total + 1
    filled = torch.arange(total) % num_rows + 1
    seen = []
    for rank in range(num_ranks):
        mine = filled[rank * batch_size : (rank + 1) * batch_size, None].expand(-1, 3)
        kept = without_repeats(mine, rank=rank, num_rows=num_rows)
        seen += [int(row[0]) for row in kept if (row != -100).all()]
    assert seen == list(range(1, num_rows + 1))


def test_a_batch_without_tokens_counts_nothing():
    means = TokenMeans()
    assert not means
    means.add(torch.tensor(3.0), torch.tensor(2), torch.tensor(2))
    means.add(torch.tensor(torch.nan), torch.tensor(0), torch.tensor(0))
    loss, counts = means.reduce(lambda values: values)
    assert loss == 3
    assert counts.tolist() == [2, 0]
