"""How good a model's answers are.

`exact_match` generates and compares the final number, `choice_likelihood` compares the
probabilities of given choices. Both return an `Evaluation`, which keeps right or wrong for each
item, so that two models can be compared on the same items.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from depthmix.data.items import check_choices
from depthmix.evaluation.answers import is_correct
from depthmix.evaluation.statistics import Interval, wilson_interval


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The outcome of one metric, item by item."""

    metric: Literal["exact_match", "choices"]
    """How the items were judged; for `choices`, right means right by `acc_bytes`."""

    correct: tuple[bool, ...]
    """Whether each item was answered rightly, in the order of the records."""

    responses: tuple[str, ...]
    """What the model answered: the generated text, or the choice it prefers."""

    measures: Mapping[str, float] = field(default_factory=dict)
    """Further numbers. `choices`: `acc` (accuracy by summed log-probabilities), `acc_bytes` (by
    sums per UTF-8 byte of the choice) and `nll` (of the right choice, mean nats per token)."""

    @property
    def num_items(self) -> int:
        """Number of items judged."""
        return len(self.correct)

    @property
    def accuracy(self) -> float:
        """Share of items answered rightly, between 0 and 1."""
        return sum(self.correct) / self.num_items

    @property
    def interval(self) -> Interval:
        """Wilson's interval of the accuracy."""
        return wilson_interval(sum(self.correct), self.num_items)


def exact_match(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Mapping[str, Any]],
    *,
    max_new_tokens: int = 128,
    batch_size: int = 16,
) -> Evaluation:
    """Generate an answer to each prompt, greedily, and compare it with the reference.

    Args:
        model: Decoder; stays in the training or evaluation mode it is in.
        tokenizer: Its tokenizer; its padding stays as it is.
        records: Each with `prompt` and `answer`; `answers.is_correct` says what counts as right.
        max_new_tokens: Longest response, in tokens.
        batch_size: Prompts generated together; prompts of similar length share a batch.

    Returns:
        One judgement and response per record, in the order of `records`.

    Raises:
        ValueError: If there are no records, or one lacks a key.
    """
    _check_records(records, "prompt", "answer")
    prompts = [record["prompt"] for record in records]
    order = sorted(range(len(prompts)), key=lambda item: len(prompts[item]), reverse=True)
    responses = [""] * len(prompts)
    with prepared(model, tokenizer):
        generation_config = greedy(model, tokenizer, max_new_tokens)
        for start in range(0, len(order), batch_size):
            items = order[start : start + batch_size]
            texts = [prompts[item] for item in items]
            batch = tokenizer(
                texts,
                padding=True,
                return_tensors="pt",
                return_token_type_ids=False,
                # A rendered chat begins with its own marker.
                add_special_tokens=not texts[0].startswith(tokenizer.bos_token or "\0"),
            ).to(model.device)
            with torch.no_grad():
                # pyrefly: ignore[not-callable]  (every model with a head generates)
                output = model.generate(**batch, generation_config=generation_config)
            new_tokens = output[:, batch["input_ids"].shape[1] :]
            decoded = tokenizer.batch_decode(new_tokens, skip_special_tokens=True)
            for item, response in zip(items, decoded, strict=True):
                responses[item] = response
    answers = [str(record["answer"]) for record in records]
    return Evaluation(
        metric="exact_match",
        correct=tuple(is_correct(*pair) for pair in zip(responses, answers, strict=True)),
        responses=tuple(responses),
    )


def choice_likelihood(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Mapping[str, Any]],
    *,
    batch_size: int = 16,
) -> Evaluation:
    """Let the model choose the answer to which it gives the highest likelihood.

    The log-likelihoods are lm-eval's, with the softmax in float32, and so are the two accuracies:
    `acc` compares their sums, `acc_bytes` their sums per UTF-8 byte of the choice. `correct` and
    `responses` follow `acc_bytes`, which long choices do not put at a disadvantage.

    Args:
        model: Decoder; stays in the training or evaluation mode it is in.
        tokenizer: Its tokenizer; its padding stays as it is.
        records: Each with `prompt`, `choices` (texts that continue the prompt, with their leading
            space) and `answer` (index of the right one).
        batch_size: Sequences scored together.

    Returns:
        One judgement and preferred choice per record, with `acc`, `acc_bytes` and `nll`.

    Raises:
        ValueError: If there are no records, one lacks a key, or its answer is no index of a choice.
        RuntimeError: If lm-eval is not installed.
    """
    _check_records(records, "prompt", "choices", "answer")
    check_choices(records, "`records`")
    for record in records:
        if record["answer"] not in range(len(record["choices"])):
            raise ValueError(
                f"`answer` must be the index of one of the {len(record['choices'])} choices, "
                f"counted from 0, got {record['answer']!r}."
            )
    try:
        from lm_eval.api.instance import Instance
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise RuntimeError(
            "`choice_likelihood` needs lm-eval, which is not installed: run "
            "`pip install -e '.[eval]'`."
        ) from error
    pairs = [(record["prompt"], choice) for record in records for choice in record["choices"]]
    with prepared(model, tokenizer):
        # In a dict, since lm-eval's annotations are narrower than what it takes.
        options: dict[str, Any] = {"pretrained": model, "tokenizer": tokenizer}
        scorer = HFLM(**options, batch_size=batch_size, softmax_dtype="float32")
        requests = [
            Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=idx)
            for idx, pair in enumerate(pairs)
        ]
        sums = iter(scorer.loglikelihood(requests, disable_tqdm=True))
    correct, correct_by_sum, responses, nll = [], [], [], []
    for record in records:
        prompt, choices, answer = record["prompt"], record["choices"], record["answer"]
        log_probs = np.array([next(sums)[0] for _ in choices])
        preferred = int(np.argmax(log_probs / [len(choice.encode()) for choice in choices]))
        correct.append(preferred == answer)
        correct_by_sum.append(int(np.argmax(log_probs)) == answer)
        responses.append(choices[preferred])
        # lm-eval counts spaces at the end of the prompt to the choice.
        prompt_tokens = tokenizer(prompt.rstrip())["input_ids"]
        num_tokens = len(tokenizer(prompt + choices[answer])["input_ids"]) - len(prompt_tokens)
        nll.append(-log_probs[answer] / num_tokens)
    measures = {"acc": correct_by_sum, "acc_bytes": correct, "nll": nll}
    return Evaluation(
        metric="choices",
        correct=tuple(correct),
        responses=tuple(responses),
        measures={name: float(np.mean(values)) for name, values in measures.items()},
    )


@contextmanager
def prepared(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase
) -> Iterator[None]:
    """Put the model in evaluation mode and pad on the left; afterwards, put all of it back."""
    training = [module for module in model.modules() if module.training]
    padding_side, pad_token = tokenizer.padding_side, tokenizer.pad_token
    model.eval()
    tokenizer.padding_side = "left"
    if pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    try:
        yield
    finally:
        tokenizer.padding_side, tokenizer.pad_token = padding_side, pad_token
        for module in training:
            module.training = True


def greedy(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int
) -> GenerationConfig:
    """Describe plain greedy decoding, whatever the model's own defaults are."""
    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    # What is left at None would be filled in from the model's own generation_config.
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        use_cache=True,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=sorted({*ends, tokenizer.eos_token_id} - {None}) or None,
    )


def _check_records(records: Sequence[Mapping[str, Any]], *keys: str) -> None:
    """Check that there are records and that each has the keys of the metric."""
    if not records:
        raise ValueError("`records` must hold at least one item to evaluate, got none.")
    for number, record in enumerate(records):
        if missing := [key for key in keys if key not in record]:
            raise ValueError(
                f"`records` must have the keys {', '.join(keys)} for this metric, but record "
                f"{number} lacks {', '.join(missing)}; it has {', '.join(record)}."
            )
