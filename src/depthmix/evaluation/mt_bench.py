"""MT-Bench: two-turn conversations, each answer rated from 1 to 10 by a judge."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from depthmix.data.catalog import load_split
from depthmix.evaluation.answer_file import AnswerFile, fingerprint
from depthmix.evaluation.answering import Generator
from depthmix.evaluation.conversations import MTBenchSpec, generate_conversations, render
from depthmix.evaluation.judge import Judge, JudgeSpec, Rating
from depthmix.evaluation.judged import JudgedEvaluation, make_sample, mean_rating

TASK = "mt_bench"

REFERENCE_CATEGORIES = ("math", "reasoning", "coding")
"""Categories that are judged beside a reference answer."""

RATINGS = (re.compile(r"\[\[(\d+\.?\d*)\]\]"), re.compile(r"\[(\d+\.?\d*)\]"))
"""Where a rating stands, in FastChat's order: the first match of the first that matches."""


def evaluate_mt_bench(
    model: Generator,
    tokenizer: PreTrainedTokenizerBase,
    *,
    judge: JudgeSpec,
    output_dir: Path,
    section: MTBenchSpec | None = None,
    data_dir: Path | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> JudgedEvaluation:
    """Generate answers to MT-Bench's questions, and let a judge rate each from 1 to 10.

    `output_dir` receives `mt_bench_answers.jsonl`, the judge's answers in `judge_cache`, and at the
    end `samples_mt_bench.jsonl`. What is there already is neither generated nor judged again.

    Args:
        model: Decoder, or `LazyDepth` around one.
        tokenizer: Its tokenizer.
        judge: Which model judges.
        output_dir: Folder of this evaluation of this model.
        section: How the model answers; `None` for the defaults.
        data_dir: Folder of data sets; `None` takes the environment variable `DEPTHMIX_DATA`.
        limit: Use this many questions from the start; `None` uses all.
        seed: Of sampling, together with each question's number.

    Returns:
        Metrics `turn_1`, `turn_2`, `score` (mean of an item's rated turns) and `score_<category>`,
        each out of 10.

    Raises:
        RuntimeError: If the package `openai` is not installed.
        ValueError: If the tokenizer has no chat template and `chat` is asked for, or if
            `output_dir` holds answers of another model or made under other settings.
        JudgeError: If the judge cannot be asked.
        OSError: If the data cannot be found.
    """
    section = section or MTBenchSpec()
    rater = Judge(judge, output_dir / "judge_cache")  # first, since it may lack something
    questions = load_split(TASK, data_dir=data_dir)[:limit]
    rows = load_split(TASK, "judge_prompts", data_dir=data_dir)
    judge_prompts = {row["name"]: row for row in rows}
    settings = asdict(section) | {"seed": seed, "model": fingerprint(model)}
    settings.pop("batch_size")  # changes no answer
    file = AnswerFile(output_dir / "mt_bench_answers.jsonl", settings)
    generate_conversations(model, tokenizer, questions, file=file, section=section, seed=seed)
    conversations = [
        write_judge_prompt(question, file.answers[question["question_id"]], turn, judge_prompts)
        for question in questions
        for turn in (1, 2)
    ]
    rated = rater.ask(conversations, read_rating)
    pairs = list(zip(rated[::2], rated[1::2], strict=True))
    samples = []
    for number, (question, pair) in enumerate(zip(questions, pairs, strict=True)):
        answers = file.answers[question["question_id"]]
        prompts = [
            render(question["turns"], answers[:turn], section, tokenizer).text for turn in (0, 1)
        ]
        samples.append(
            make_sample(
                number,
                question,
                target=question.get("reference"),
                prompts=prompts,
                answers=answers,
                judgments={f"turn_{turn}": rating.text for turn, rating in enumerate(pair, 1)},
                ratings=_rate(pair),
            )
        )
    evaluation = JudgedEvaluation(
        task=TASK,
        metrics=_summarise(questions, [_rate(pair) for pair in pairs]),
        samples=tuple(samples),
        settings=settings | {"judge": asdict(judge)},
    )
    evaluation.save_samples(output_dir)
    return evaluation


def write_judge_prompt(
    question: Mapping[str, Any],
    answers: Sequence[str],
    turn: Literal[1, 2],
    judge_prompts: Mapping[str, Mapping[str, str]],
) -> list[dict[str, str]]:
    """Ask for a single rating of one turn, in FastChat's words.

    Args:
        question: Record of `mt_bench`.
        answers: The model's answers to both turns.
        turn: Which one to rate. The judge sees the first turn alone, or both.
        judge_prompts: FastChat's prompts by name.

    Returns:
        System message and user message.

    Raises:
        ValueError: If a reference answer is needed and missing.
    """
    fields = {}
    has_reference = question["category"] in REFERENCE_CATEGORIES
    if has_reference:
        reference = question.get("reference")
        if not reference:
            raise ValueError(
                f"Question {question['question_id']} must have `reference` answers to be judged "
                f"in the category {question['category']}, and has none."
            )
        fields = {"ref_answer_1": reference[0], "ref_answer_2": reference[1]}
    name = "single-math-v1" if has_reference else "single-v1"
    if turn == 1:
        fields |= {"question": question["turns"][0], "answer": answers[0]}
    else:
        name += "-multi-turn"
        fields |= {"question_1": question["turns"][0], "answer_1": answers[0]}
        fields |= {"question_2": question["turns"][1], "answer_2": answers[1]}
    prompt = judge_prompts[name]
    return [
        {"role": "system", "content": prompt["system_prompt"]},
        {"role": "user", "content": prompt["prompt_template"].format(**fields)},
    ]


def read_rating(text: str) -> float | None:
    """Find the rating in a judge's answer, by FastChat's rules.

    Args:
        text: The answer.

    Returns:
        The number in the first `[[n]]`, or else in the first `[n]`; `None` if there is none, and,
        unlike FastChat, if it is not between 1 and 10.
    """
    for pattern in RATINGS:
        if found := pattern.search(text):
            rating = float(found[1])
            return rating if 1 <= rating <= 10 else None
    return None


def _rate(pair: tuple[Rating, Rating]) -> dict[str, float | None]:
    """Rate one question by its turns."""
    turns = {f"turn_{turn}": rating.value for turn, rating in enumerate(pair, start=1)}
    rated = [value for value in turns.values() if value is not None]
    return turns | {"score": sum(rated) / len(rated) if rated else None}


def _summarise(
    questions: Sequence[Mapping[str, Any]], ratings: Sequence[Mapping[str, float | None]]
) -> dict[str, Any]:
    """Average the ratings, over all questions and over those of each category."""
    metrics = {
        name: mean_rating([rating[name] for rating in ratings])
        for name in ("turn_1", "turn_2", "score")
    }
    for category in dict.fromkeys(question["category"] for question in questions):
        metrics[f"score_{category}"] = mean_rating(
            [
                rating["score"]
                for question, rating in zip(questions, ratings, strict=True)
                if question["category"] == category
            ]
        )
    return metrics
