"""Exits put on a finished model, against a plain loop over the whole vocabulary."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn

from adapters import tuned_model
from depthmix import attach
from depthmix.depth import exit_training
from depthmix.depth.exit_training import draw_batches, train_exits
from depthmix.depth.lesson import read_lesson
from depthmix.method.parts import find_parts, new_exits
from models import random_ids, randomise, tiny_model


def make_sequences(*, labelled=True):
    """Make rows of different lengths, of which the last tokens count, and in two of them none."""
    rows = [{"input_ids": random_ids(length, seed=length).tolist()} for length in (7, 1, 4, 9, 5)]
    for number, row in enumerate(rows if labelled else []):
        num_given = 9 if number == 4 else number + 1
        row["labels"] = ([-100] * num_given + row["input_ids"][num_given:])[: len(row["input_ids"])]
    return rows


def make_kinds():
    """Models of every kind that exits are put on."""
    attached = tiny_model()
    randomise(attach(attached, late_layers=2).mixture, seed=3)
    lora = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"], r=2))
    randomise(lora, seed=4, only_trainable=True)
    return {
        "plain": tiny_model(),
        "attached": attached,
        "lora": lora.eval(),
        "mode_lora": tuned_model(),
        "gpt2": tiny_model("gpt2"),
        "opt": tiny_model("opt"),
        "gemma2": tiny_model("gemma2"),
        "cohere": tiny_model("cohere"),
        "granite": tiny_model("granite"),
        "bfloat16": tiny_model().bfloat16(),
    }


KINDS = list(make_kinds())
EVERYTHING = {"num_negatives": 61, "batch_size": 5}
"""All of the vocabulary, and all sequences in each step."""


def read_by_hand(model, sequences, layers):
    """Give each token's states, the model's own logits and the label, row by row, unpadded."""
    states, logits, targets = {layer: [] for layer in layers}, [], []
    for row in sequences:
        labels = row.get("labels", row["input_ids"])
        with torch.no_grad():
            output = model(torch.tensor([row["input_ids"]]), output_hidden_states=True)
        for t, label in enumerate(labels[1:]):
            if label != -100:
                for layer in layers:
                    states[layer].append(output.hidden_states[layer][0, t])
                logits.append(output.logits[0, t])
                targets.append(label)
    stacked = {layer: torch.stack(parts) for layer, parts in states.items()}
    return stacked, torch.stack(logits), torch.tensor(targets)


def train_by_hand(model, sequences, layers, *, num_steps, rank, seed=0, distillation=0.5):
    """Train exits by a plain loop with every logit."""
    backbone, norm = find_parts(model)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        exits = new_exits(backbone, norm, layers, rank=rank)
    states, logits, targets = read_by_hand(model, sequences, layers)
    teacher = logits.float().softmax(-1)
    optimizer = torch.optim.AdamW(exits.parameters(), weight_decay=0.0)
    losses = []
    for step in range(num_steps):
        means = {}
        for layer in layers:
            head = backbone.unembed(exits(layer, states[layer]).to(backbone.head_weight.dtype))
            log_probs = head.float().log_softmax(-1)
            hard = F.nll_loss(log_probs, targets)
            soft = -(teacher * log_probs).sum(-1).mean()
            means[layer] = (1 - distillation) * hard + distillation * soft
        fall = 1 - max(0, step - 4) / max(num_steps - 4, 1)
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 4) * fall
        optimizer.zero_grad()
        sum(means.values()).backward()
        optimizer.step()
        losses.append({layer: mean.item() for layer, mean in means.items()})
    model.zero_grad()
    return exits, losses


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_a_plain_loop_over_the_whole_vocabulary(kind):
    model, sequences = make_kinds()[kind], make_sequences()
    expected, losses = train_by_hand(model, sequences, (1, 3), num_steps=6, rank=4)
    seen = []
    exits = train_exits(
        model,
        sequences,
        layers=[1, 3],
        rank=4,
        num_steps=6,
        on_step=lambda step, means: seen.append((step, means)),
        **EVERYTHING,
    )
    assert [step for step, _ in seen] == [1, 2, 3, 4, 5, 6]
    loose = 0.03 if kind == "bfloat16" else 1e-3
    for (_, means), by_hand in zip(seen, losses, strict=True):
        assert means == pytest.approx(by_hand, rel=loose)
    if kind != "bfloat16":
        for name, weight in exits.state_dict().items():
            torch.testing.assert_close(
                weight, expected.state_dict()[name], rtol=1e-3, atol=2e-4, msg=name
            )


def test_without_labels_all_tokens_but_the_first_are_learnt():
    backbone, _ = find_parts(tiny_model())
    lesson = read_lesson(backbone, make_sequences(labelled=False), [2])
    assert len(lesson.targets) == 6 + 0 + 3 + 8 + 4
    assert len(read_lesson(backbone, make_sequences(), [2]).targets) == 6 + 0 + 1 + 5 + 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_stays_as_it_is(kind):
    model = make_kinds()[kind].train()
    next(model.modules()).eval()  # modes of its own
    for parameter in list(model.parameters())[::2]:
        parameter.requires_grad_(False)
    before = {
        "weights": copy.deepcopy(model.state_dict()),
        "modes": [module.training for module in model.modules()],
        "grads": [(p.requires_grad, p.grad) for p in model.parameters()],
        "hooks": [len(module._forward_pre_hooks) for module in model.modules()],
        "random": torch.get_rng_state(),
    }
    modes, inputs = [module.training for module in model.modules()], random_ids(2, 6)
    model.eval()
    with torch.no_grad():
        logits = model(inputs).logits
    for module, training in zip(model.modules(), modes, strict=True):
        module.training = training
    exits = train_exits(model, make_sequences(), layers=[1, 3], rank=4, num_steps=3)
    assert [module.training for module in model.modules()] == before["modes"]
    assert [(p.requires_grad, p.grad) for p in model.parameters()] == before["grads"]
    assert [len(m._forward_pre_hooks) for m in model.modules()] == before["hooks"]
    assert torch.equal(torch.get_rng_state(), before["random"])
    after = model.state_dict()
    assert after.keys() == before["weights"].keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before["weights"].items())
    with torch.no_grad():
        assert torch.equal(model.eval()(inputs).logits, logits)
    assert not any(p.requires_grad or p.grad is not None for p in exits.parameters())
    assert {p.dtype for p in exits.parameters()} == {torch.float32}
    assert not exits.training


def count_agreements(model, exits, sequences):
    """Share of tokens on which each exit's best is the model's own."""
    states, logits, _ = read_by_hand(model, sequences, exits.layers)
    backbone, _ = find_parts(model)
    return [
        float(
            (backbone.unembed(exits(i, states[i])).argmax(-1) == logits.argmax(-1)).float().mean()
        )
        for i in exits.layers
    ]


def test_exits_come_to_agree_with_the_model():
    model = tiny_model()
    sequences = [{"input_ids": random_ids(12, seed=seed).tolist()} for seed in range(8)]
    options = {"layers": [2, 3], "rank": 16, "batch_size": 8, "distillation": 1.0}
    first = train_exits(model, sequences, num_steps=1, learning_rate=1e-9, **options)
    trained = train_exits(model, sequences, num_steps=150, learning_rate=0.02, **options)
    before = count_agreements(model, first, sequences)
    after = count_agreements(model, trained, sequences)
    assert all(high > low + 0.2 for low, high in zip(before, after, strict=True))


def test_a_part_of_the_vocabulary_has_fewer_rivals():
    losses = {}
    for number in (4, 61):
        train_exits(
            tiny_model(),
            make_sequences(),
            layers=[2],
            num_steps=1,
            batch_size=5,
            distillation=0.0,
            num_negatives=number,
            on_step=lambda _, means, number=number: losses.update({number: means[2]}),
        )
    assert 0 < losses[4] < losses[61]


def test_the_seed_decides():
    options = {"layers": [2], "rank": 3, "num_steps": 2, "batch_size": 2, "num_negatives": 5}
    one, same, other = (
        train_exits(tiny_model(), make_sequences(), seed=seed, **options).state_dict()
        for seed in (1, 1, 2)
    )
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["by_layer.2.down.weight"], other["by_layer.2.down.weight"])


def test_each_row_comes_once_a_round_and_like_comes_with_like():
    lengths = random_ids(150, seed=2).tolist()
    batches = draw_batches(lengths, 4, torch.Generator().manual_seed(0))
    rounds = [[next(batches) for _ in range(38)] for _ in range(2)]
    for batch_list in rounds:
        assert sorted(i for batch in batch_list for i in batch) == list(range(150))
        padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in batch_list)
        assert padded < 1.15 * sum(lengths)
    assert rounds[0] != rounds[1]
    again = draw_batches(lengths, 4, torch.Generator().manual_seed(0))
    assert [next(again) for _ in range(38)] == rounds[0]
    few = draw_batches([3, 9, 4], 16, torch.Generator().manual_seed(0))
    assert [sorted(next(few)) for _ in range(2)] == [[0, 1, 2]] * 2


def test_pieces_make_the_same_exits(monkeypatch):
    options = {"layers": [1, 3], "rank": 3, "num_steps": 3}
    whole = train_exits(tiny_model(), make_sequences(), **options).state_dict()
    monkeypatch.setattr(exit_training, "CHUNK_LOGITS", 61 * 2)
    pieces = train_exits(tiny_model(), make_sequences(), **options).state_dict()
    for name, weight in whole.items():
        torch.testing.assert_close(pieces[name], weight, rtol=1e-3, atol=1e-5)


def test_a_quantised_head_predicts_all_tokens():
    class QuantisedLinear(nn.Linear):
        """As bitsandbytes has it: a weight in another type, and a forward of its own."""

        def __init__(self, linear):
            super().__init__(linear.in_features, linear.out_features, bias=False)
            self.original = linear.weight.detach().clone()
            packed = linear.weight.detach().flatten()[:, None].to(torch.int8)
            self.weight = nn.Parameter(packed, requires_grad=False)

        def forward(self, x):
            return F.linear(x, self.original)

    found = []
    for quantised in (False, True):
        model = tiny_model(tie_word_embeddings=False)
        if quantised:
            model.lm_head = QuantisedLinear(model.lm_head)
        options = {"layers": [2], "rank": 3, "num_steps": 3}
        # What is drawn counts for nothing where the head gives all tokens.
        options |= {"batch_size": 5, "num_negatives": 1 if quantised else 61}
        found.append(train_exits(model, make_sequences(), **options).state_dict())
    for name, weight in found[0].items():
        torch.testing.assert_close(found[1][name], weight, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("rank", [0, 3])
def test_a_norm_without_weights(rank):
    exits = train_exits(tiny_model("olmo"), make_sequences(), layers=[2], rank=rank, num_steps=2)
    assert len(list(exits.parameters())) == (2 if rank else 0)
    assert math.isfinite(float(exits(2, torch.ones(1, 16)).sum()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [4]}, "`layers` must name layers below the final one"),
        ({"rank": -1}, "`rank` must be at least 0"),
        ({"num_steps": 0}, "`num_steps` must be at least 1"),
        ({"batch_size": 0}, "`batch_size` must be at least 1"),
        ({"learning_rate": 0.0}, "`learning_rate` must be above 0"),
        ({"num_negatives": 0}, "`num_negatives` must be at least 1"),
        ({"distillation": -0.5}, "`distillation` must be at least 0"),
        ({"distillation": 1.5}, "`distillation` must be at most 1"),
        ({"final_norm": "model.nothing"}, "`final_norm` must name a module"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        train_exits(tiny_model(), make_sequences(), **{"layers": [2], **options})


def test_something_must_be_there_to_learn():
    rows = [{"input_ids": [5]}, {"input_ids": [5, 6], "labels": [5, -100]}]
    with pytest.raises(ValueError, match="`sequences` must hold tokens to predict, and the 2"):
        train_exits(tiny_model(), rows, layers=[2])


def test_a_loss_that_is_not_finite_stops():
    with pytest.raises(FloatingPointError, match=r"at step \d+ is not finite; lower `learning_r"):
        train_exits(tiny_model(), make_sequences(), layers=[2], learning_rate=1e36)


def test_a_prompt_that_a_pass_does_not_see_is_refused():
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="'default' changes what they are given"):
        train_exits(get_peft_model(tiny_model(), config), make_sequences(), layers=[2])
