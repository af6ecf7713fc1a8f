"""Adapters at work: generation, copies, harness, processes, compilation."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.multiprocessing
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig, pipeline

from adapters import INPUT_IDS, greedy, logits, tuned_model
from checkpoints import make_tokenizer, save_checkpoint
from depthmix.loss import block_gradients
from depthmix.method.norm import find_mixture_norm
from models import random_ids, tiny_model


def naive_greedy(model, input_ids=INPUT_IDS[:1], num_tokens=12):
    """Decode without a cache: the whole sequence anew for every token."""
    for _ in range(num_tokens):
        following = logits(model, input_ids)[:, -1].argmax(-1, keepdim=True)
        input_ids = torch.cat([input_ids, following], dim=1)
    return input_ids


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cache_implementation": "static"},
        *({"assistant_early_exit": layer} for layer in (1, 2, 3, 4)),
    ],
    ids=lambda options: " ".join(map(str, options.values())) or "dynamic",
)
def test_generated_tokens_are_those_without_a_cache(options):
    tuned = tuned_model()
    expected = naive_greedy(tuned)
    assert len(set(expected[0, 7:].tolist())) > 3
    assert not torch.equal(expected, naive_greedy(tiny_model()))
    assert torch.equal(greedy(tuned, **options), expected)


def test_beams_equal_the_sequence_scores_without_a_cache():
    tuned = tuned_model()
    options = {"num_beams": 3, "early_stopping": False}
    cached = greedy(tuned, use_cache=True, **options)
    assert torch.equal(cached, greedy(tuned, use_cache=False, **options))
    assert not torch.equal(cached, greedy(tuned))


def test_left_padded_batch_equals_its_rows_alone():
    tuned = tuned_model()
    rows = [INPUT_IDS[0, :4], INPUT_IDS[1]]
    padded = torch.stack([torch.cat([torch.zeros(7 - len(row), dtype=int), row]) for row in rows])
    together = greedy(tuned, padded, attention_mask=(padded != 0).long())
    for row, tokens in zip(rows, together, strict=True):
        alone = greedy(tuned, row[None])[0]
        assert torch.equal(tokens[7:], alone[len(row) :])


def test_continuous_batching():
    tuned = tuned_model()
    rows = [INPUT_IDS[0, :4].tolist(), INPUT_IDS[1].tolist()]
    settings = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    limits = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=16)
    merged = tuned.merge_and_unload()
    outputs = merged.generate_batch(
        rows, generation_config=settings, continuous_batching_config=limits
    )
    answers = {tuple(out.prompt_ids): out.generated_tokens for out in outputs.values()}
    for row in rows:
        ids = torch.tensor([row])
        assert answers[tuple(row)] == naive_greedy(merged, ids, 6)[0, len(row) :].tolist()


def test_pipeline_generates_the_same_text(tmp_path):
    save_checkpoint(tmp_path)
    tokenizer = make_tokenizer()
    tuned = tuned_model(AutoModelForCausalLM.from_pretrained(tmp_path))
    generator = pipeline("text-generation", model=tuned, tokenizer=tokenizer)
    answer = generator("Q: 1+1?", max_new_tokens=5, do_sample=False, return_full_text=False)
    ids = tokenizer("Q: 1+1?", return_tensors="pt").input_ids
    expected = naive_greedy(tuned, ids, 5)[0, ids.shape[1] :]
    assert answer[0]["generated_text"] == tokenizer.decode(expected, skip_special_tokens=True)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("merged", [False, True])
def test_copies_stand_alone(clone, merged):
    tuned = tuned_model()
    if merged:
        tuned = tuned.merge_and_unload()
    expected = logits(tuned)
    twin = clone(tuned)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.zero_()
    assert torch.equal(logits(twin), expected)
    norm = find_mixture_norm(twin)
    assert norm.backbone.model is (twin if merged else twin.get_base_model())
    assert norm.objective.norm is norm
    twin.train()
    with norm.objective.collecting() as steps:
        assert twin(INPUT_IDS, labels=INPUT_IDS).loss.isfinite()
    assert len(steps) == 1


def test_lm_eval_loglikelihood_is_the_sum_by_hand(tmp_path):
    save_checkpoint(tmp_path)
    tokenizer = make_tokenizer()
    tuned = tuned_model(AutoModelForCausalLM.from_pretrained(tmp_path))
    judge = HFLM(pretrained=tuned, tokenizer=tokenizer, batch_size=1)
    request = Instance("loglikelihood", doc={}, arguments=("Q: 1+1?", " 2."), idx=0)
    [(value, is_greedy)] = judge.loglikelihood([request], disable_tqdm=True)
    prompt, answer = tokenizer("Q: 1+1?").input_ids, tokenizer(" 2.").input_ids
    log_probs = logits(tuned, torch.tensor([prompt + answer]))[0].log_softmax(-1)
    by_hand = sum(log_probs[len(prompt) - 1 + i, token] for i, token in enumerate(answer))
    assert value == pytest.approx(float(by_hand), rel=1e-5)
    assert not is_greedy


def gradients_of(model, input_ids):
    model.zero_grad()
    model(input_ids=input_ids, labels=input_ids).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


TRAINED = {"": {"distillation_weight": 0.3}}
TRAINED[" with exits"] = {"exits": [1, 3], "exit_rank": 3, "exit_weight": 1.0}
TRAINED[" with exits"]["exit_vocabulary"] = None  # what is drawn depends on a process's labels


def work_in_one_of_two_processes(rank, folder):
    """Take one half of a batch through DDP and FSDP2, and compile; save what comes of it."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    half, found = random_ids(4, 7)[2 * rank : 2 * rank + 2], {}
    for name, options in TRAINED.items():
        tuned = tuned_model(**options).train()
        found[f"DDP{name}"] = gradients_of(DistributedDataParallel(tuned), half)
        tuned = tuned_model(**options).train()
        for layer in tuned.get_base_model().model.layers:
            fully_shard(layer)
        fully_shard(tuned.get_base_model().lm_head)  # gathered by the loss, not by the root's pass
        sharded = gradients_of(fully_shard(tuned), half)
        found[f"FSDP2{name}"] = {n: value.full_tensor() for n, value in sharded.items()}
    if rank == 0:  # compiled here, since dynamo cannot look through the tests' type checks
        tuned = tuned_model(**TRAINED[" with exits"])
        found["fullgraph"] = logits(torch.compile(tuned, fullgraph=True, backend="eager"))
    else:
        block_gradients.COMPILED_VOCAB_SIZE = 61  # compiles inside of what is compiled
        for name, options in TRAINED.items():
            compiled = torch.compile(tuned_model(**options).train(), backend="eager")
            found[f"compiled{name}"] = gradients_of(compiled, random_ids(4, 7))
        assert block_gradients._can_compile
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def work_of_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(work_in_one_of_two_processes, args=(str(folder),), nprocs=2)
    return torch.load(folder / "1.pt") | torch.load(folder / "0.pt")


@pytest.mark.parametrize(
    "way", ["DDP", "FSDP2", "compiled", "DDP with exits", "FSDP2 with exits", "compiled with exits"]
)
def test_gradients_are_those_of_one_process(way, work_of_processes):
    tuned = tuned_model(**TRAINED[" with exits" if "exits" in way else ""]).train()
    expected = gradients_of(tuned, random_ids(4, 7))
    gradients = {
        name.removeprefix("module.").removeprefix("_orig_mod."): value
        for name, value in work_of_processes[way].items()
    }
    assert gradients.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(gradients[name], value, rtol=1e-4, atol=1e-4)


def test_compiled_without_graph_breaks_is_the_same(work_of_processes):
    expected = logits(tuned_model(**TRAINED[" with exits"]))
    torch.testing.assert_close(work_of_processes["fullgraph"], expected)
