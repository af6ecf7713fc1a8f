"""MT-Bench's two-turn conversations with a model, and how it answers them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from depthmix.data.forms import ALPACA_TURN, write_alpaca_turns
from depthmix.data.rendering import Prompt, tokenise_prompt
from depthmix.data.templates import render_prompt
from depthmix.evaluation.answer_file import AnswerFile
from depthmix.evaluation.answering import Generator, answer, derive_seed
from depthmix.options.types import check_number, checked_options

TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "stem": 0.1,
    "humanities": 0.1,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
}
"""FastChat's, by category."""


@checked_options
@dataclass(frozen=True, kw_only=True)
class MTBenchSpec:
    """How a model answers MT-Bench."""

    sampling: Literal["fastchat", "greedy"] = "fastchat"
    """`fastchat`: at FastChat's temperature of each category, among the 50 likeliest tokens, which
    is how the published numbers were made. `greedy` takes the likeliest token everywhere."""

    template: Literal["chat", "alpaca"] = "chat"
    """How a conversation becomes text: by the tokenizer's chat template, or as a series of Alpaca's
    prompts, for models tuned on those."""

    max_new_tokens: int = 1024
    """Tokens per answer at most."""

    batch_size: int = 16
    """Conversations that are run together."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size"):
            check_number(f"mt_bench.{name}", getattr(self, name), at_least=1)


def generate_conversations(
    model: Generator,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Mapping[str, Any]],
    *,
    file: AnswerFile,
    section: MTBenchSpec,
    seed: int,
) -> None:
    """Answer both turns of each question that the file lacks; the second sees the first's answer.

    Args:
        model: Decoder, or `LazyDepth` around one.
        tokenizer: Its tokenizer.
        questions: Records of `mt_bench`.
        file: Receives the answers, batch by batch.
        section: How the model answers.
        seed: Of sampling, together with each question's number.
    """
    missing = [question for question in questions if question["question_id"] not in file.answers]
    with tqdm(total=len(questions), initial=len(questions) - len(missing), desc="answered") as bar:
        for start in range(0, len(missing), section.batch_size):
            batch = missing[start : start + section.batch_size]
            turns: list[list[str]] = [[] for _ in batch]
            for turn in (1, 2):
                answers = answer(
                    model,
                    tokenizer,
                    [
                        render(question["turns"], given, section, tokenizer)
                        for question, given in zip(batch, turns, strict=True)
                    ],
                    max_new_tokens=section.max_new_tokens,
                    temperatures=[_temperature(question, section) for question in batch],
                    seeds=[derive_seed(seed, question["question_id"], turn) for question in batch],
                    stop_strings=[ALPACA_TURN] if section.template == "alpaca" else [],
                )
                turns = [[*given, text] for given, text in zip(turns, answers, strict=True)]
            ids = [question["question_id"] for question in batch]
            file.add(dict(zip(ids, turns, strict=True)))
            bar.update(len(batch))


def render(
    questions: Sequence[str],
    answers: Sequence[str],
    section: MTBenchSpec,
    tokenizer: PreTrainedTokenizerBase,
) -> Prompt:
    """Write the prompt after which the model gives its next answer.

    Args:
        questions: The user's turns.
        answers: What the model has answered so far.
        section: For its template.
        tokenizer: For its chat template.

    Returns:
        The conversation up to the next answer.

    Raises:
        ValueError: If the template is `chat` and the tokenizer has none.
    """
    if section.template == "alpaca":
        return tokenise_prompt(write_alpaca_turns(questions, answers), tokenizer)
    if tokenizer.chat_template is None:
        raise ValueError(
            "MT-Bench's `template` must not be `chat` for this model, whose tokenizer has no chat "
            "template; choose `alpaca`, or a model tuned for chat."
        )
    messages = [{"role": "user", "content": questions[0]}]
    for said, question in zip(answers, questions[1:], strict=False):
        messages.append({"role": "assistant", "content": said})
        messages.append({"role": "user", "content": question})
    return render_prompt({"prompt": messages}, "chat", tokenizer)


def _temperature(question: Mapping[str, Any], section: MTBenchSpec) -> float:
    """Choose the temperature for a question; 0 is greedy."""
    return TEMPERATURES[question["category"]] if section.sampling == "fastchat" else 0.0
