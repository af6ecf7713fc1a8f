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
from depthmix.data.rendering import continue_prompt, encode, tokenise_prompt
from depthmix.evaluation.answers import is_correct
from depthmix.extras import require
from depthmix.models.continuation import pad_prompts
from depthmix.statistics.intervals import Interval, wilson_interval


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
            `prompt_ids` are the prompt's tokens; without them it is tokenised as text.
        max_new_tokens: Longest response, in tokens.
        batch_size: Prompts generated together; prompts of similar length share a batch.

    Returns:
        One judgement and response per record, in the order of `records`.

    Raises:
        ValueError: If there are no records, or one lacks a key.
    """
    _check_records(records, "prompt", "answer")
    prompts = [record["prompt"] for record in records]
    token_ids = [
        record.get("prompt_ids") or encode(record["prompt"], tokenizer) for record in records
    ]
    order = sorted(range(len(prompts)), key=lambda item: len(prompts[item]), reverse=True)
    responses = [""] * len(prompts)
    with prepared(model, tokenizer):
        generation_config = greedy(model, tokenizer, max_new_tokens)
        for start in range(0, len(order), batch_size):
            items = order[start : start + batch_size]
            batch = pad_prompts([token_ids[item] for item in items], tokenizer)
            batch = {name: value.to(model.device) for name, value in batch.items()}
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
            space) and `answer` (index of the right one). `prompt_ids` and `choice_ids` are their
            tokens; without them both are tokenised as text.
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
    require("eval", "`choice_likelihood`", "lm_eval")
    from depthmix.evaluation.harness_model import HarnessModel

    tokens = [_tokenise_choices(record, tokenizer) for record in records]
    requests = [
        ((record["prompt"], choice), *_as_asked(prompt_ids, ids, tokenizer))
        for record, (prompt_ids, choice_ids) in zip(records, tokens, strict=True)
        for choice, ids in zip(record["choices"], choice_ids, strict=True)
    ]
    with prepared(model, tokenizer):
        # In a dict, since lm-eval's annotations are narrower than what it takes.
        options: dict[str, Any] = {"pretrained": model, "tokenizer": tokenizer}
        scorer = HarnessModel(**options, batch_size=batch_size, softmax_dtype="float32")
        sums = iter(scorer._loglikelihood_tokens(requests, disable_tqdm=True))
    correct, correct_by_sum, responses, nll = [], [], [], []
    for record, (_, choice_ids) in zip(records, tokens, strict=True):
        choices, answer = record["choices"], record["answer"]
        log_probs = np.array([next(sums)[0] for _ in choices])
        preferred = int(np.argmax(log_probs / [len(choice.encode()) for choice in choices]))
        correct.append(preferred == answer)
        correct_by_sum.append(int(np.argmax(log_probs)) == answer)
        responses.append(choices[preferred])
        nll.append(-log_probs[answer] / len(choice_ids[answer]))
    measures = {"acc": correct_by_sum, "acc_bytes": correct, "nll": nll}
    return Evaluation(
        metric="choices",
        correct=tuple(correct),
        responses=tuple(responses),
        measures={name: float(np.mean(values)) for name, values in measures.items()},
    )


def _tokenise_choices(
    record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[list[int]]]:
    """Give the tokens of a prompt and of each choice, or make them where there are none."""
    if "prompt_ids" in record and "choice_ids" in record:
        return record["prompt_ids"], record["choice_ids"]
    prompt = tokenise_prompt(record["prompt"], tokenizer)
    choices = [list(continue_prompt(prompt, text, tokenizer)) for text in record["choices"]]
    return list(prompt.token_ids), choices


def _as_asked(
    prompt_ids: list[int], choice_ids: list[int], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    """Begin an empty prompt as lm-eval does, since something must predict the first token."""
    begin = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return prompt_ids or [begin], choice_ids


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
