"""Arithmetic word problems with worked solutions, made from a seed.

Each template draws its numbers and writes the question; the solution's steps are computed, not
typed, so they are right by construction.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from depthmix.files.drafts import write_whole

NUM_TRAINING, NUM_HELD_OUT = 4800, 300
"""Problems of an experiment, from one seed: what no run trains on comes last."""

NAMES = (
    *("Ada", "Ben", "Carla", "Dev", "Elif", "Farid", "Grace", "Hana", "Ivan", "Jun", "Kofi"),
    *("Lena", "Maya", "Noah", "Omar", "Priya", "Quinn", "Rosa", "Sam", "Tara", "Uma", "Zoe"),
)
THINGS = (
    *("apples", "pens", "cards", "shells", "marbles", "stickers", "buttons", "cookies"),
    *("stamps", "beads", "plums", "coins", "books", "candles", "cups", "tickets"),
)
PLACES = ("school", "bakery", "library", "market", "garden", "museum", "farm", "workshop")
OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a // b,
}


class Worksheet:
    """Draws the numbers of one problem and notes the steps of its solution."""

    def __init__(self, rng: random.Random) -> None:
        self.steps: list[str] = []
        self.draw = rng.randint
        self.pick = rng.choice
        self.name, self.other = rng.sample(NAMES, 2)
        self.thing, self.second = rng.sample(THINGS, 2)
        self.place = rng.choice(PLACES)

    def step(self, a: int, sign: str, b: int) -> int:
        """Compute `a sign b` and write it down."""
        result = OPERATIONS[sign](a, b)
        self.steps.append(f"{a} {sign} {b} = {result}")
        return result


def _change(w: Worksheet) -> str:
    count, price, left = w.draw(2, 9), w.draw(2, 9), w.draw(1, 20)
    paid = count * price + left
    w.step(paid, "-", w.step(count, "*", price))
    return (
        f"{w.name} buys {count} {w.thing} at ${price} each and pays with ${paid}. "
        "How many dollars of change are due?"
    )


def _sharing(w: Worksheet) -> str:
    friends, each, eaten = w.draw(2, 8), w.draw(2, 9), w.draw(1, 12)
    total = friends * each + eaten
    w.step(w.step(total, "-", eaten), "/", friends)
    return (
        f"{w.name} has {total} {w.thing}, keeps {eaten} and shares the rest equally among "
        f"{friends} friends. How many does each friend get?"
    )


def _rate(w: Worksheet) -> str:
    per_hour, hours, broken = w.draw(3, 12), w.draw(2, 9), w.draw(1, 6)
    w.step(w.step(per_hour, "*", hours), "-", broken)
    return (
        f"A machine makes {per_hour} {w.thing} per hour. It runs for {hours} hours, and {broken} "
        f"{w.thing} turn out broken. How many good ones are there?"
    )


def _events(w: Worksheet) -> str:
    start, given, found, lost = w.draw(20, 60), w.draw(2, 9), w.draw(2, 30), w.draw(2, 9)
    w.step(w.step(w.step(start, "-", given), "+", found), "-", lost)
    return (
        f"{w.name} has {start} {w.thing}, gives {given} to {w.other}, finds {found} more and then "
        f"loses {lost}. How many {w.thing} are left?"
    )


def _comparison(w: Worksheet) -> str:
    count, times, fewer = w.draw(3, 12), w.draw(2, 5), w.draw(1, 5)
    w.step(w.step(count, "*", times), "-", fewer)
    return (
        f"{w.other} has {count} {w.thing}. {w.name} has {fewer} fewer than {times} times as many. "
        f"How many {w.thing} does {w.name} have?"
    )


def _together(w: Worksheet) -> str:
    count, more = w.draw(5, 40), w.draw(2, 20)
    w.step(count, "+", w.step(count, "+", more))
    return (
        f"{w.name} has {count} {w.thing} and {w.other} has {more} more than {w.name}. "
        "How many do they have together?"
    )


def _days(w: Worksheet) -> str:
    weekday, weekend = w.draw(2, 9), w.draw(3, 12)
    w.step(w.step(weekday, "*", 5), "+", w.step(weekend, "*", 2))
    return (
        f"{w.name} reads {weekday} pages on each of 5 weekdays and {weekend} pages on each of "
        "2 weekend days. How many pages is that in a week?"
    )


def _unit_price(w: Worksheet) -> str:
    count, price, wanted = w.draw(2, 9), w.draw(2, 9), w.draw(2, 9)
    wanted += wanted >= count  # asking for the number already bought would be no question
    total = count * price
    w.step(w.step(total, "/", count), "*", wanted)
    return f"{count} {w.thing} cost ${total}. How many dollars do {wanted} {w.thing} cost?"


def _ages(w: Worksheet) -> str:
    age, older, years = w.draw(4, 15), w.draw(2, 12), w.draw(2, 9)
    w.step(w.step(age, "+", older), "+", years)
    return (
        f"{w.name} is {age} years old. {w.other} is {older} years older. "
        f"How old will {w.other} be in {years} years?"
    )


def _distance(w: Worksheet) -> str:
    speed, hours, more = w.draw(3, 12), w.draw(2, 6), w.draw(2, 20)
    w.step(w.step(speed, "*", hours), "+", more)
    return (
        f"{w.name} rides at {speed} miles per hour for {hours} hours and then walks {more} miles "
        f"to the {w.place}. How many miles is the whole trip?"
    )


def _perimeter(w: Worksheet) -> str:
    width, more = w.draw(3, 15), w.draw(2, 9)
    length = w.step(width, "+", more)
    w.step(w.step(width, "+", length), "*", 2)
    return (
        f"A field by the {w.place} is {width} meters wide and {more} meters longer than it is "
        "wide. What is its perimeter in meters?"
    )


def _leftovers(w: Worksheet) -> str:
    size, boxes = w.draw(3, 9), w.draw(2, 9)
    left = w.draw(1, size - 1)
    total = size * boxes + left
    w.step(total, "-", w.step(size, "*", boxes))
    return (
        f"{w.name} packs {total} {w.thing} into {boxes} boxes of {size} each. "
        f"How many {w.thing} are left over?"
    )


def _percentage(w: Worksheet) -> str:
    percent, total = w.pick((10, 20, 50)), 10 * w.draw(2, 20)
    w.step(total, "-", w.step(total, "/", w.step(100, "/", percent)))
    return (
        f"The {w.place} has {total} {w.thing} and sells {percent}% of them. "
        f"How many {w.thing} remain?"
    )


def _savings(w: Worksheet) -> str:
    weekly, weeks, spent = w.draw(3, 12), w.draw(2, 9), w.draw(1, 6)
    start = w.draw(2, 30)
    w.step(w.step(start, "+", w.step(weekly, "*", weeks)), "-", spent)
    return (
        f"{w.name} has ${start}, saves ${weekly} a week for {weeks} weeks and then spends "
        f"${spent}. How many dollars are left?"
    )


def _two_kinds(w: Worksheet) -> str:
    count, price, second_count, second_price = (w.draw(2, 9) for _ in range(4))
    w.step(w.step(count, "*", price), "+", w.step(second_count, "*", second_price))
    return (
        f"{w.name} buys {count} {w.thing} at ${price} each and {second_count} {w.second} at "
        f"${second_price} each. How many dollars is that?"
    )


def _rows(w: Worksheet) -> str:
    rows, seats, taken = w.draw(3, 9), w.draw(3, 9), w.draw(2, 9)
    w.step(w.step(rows, "*", seats), "-", taken)
    return (
        f"The {w.place} has {rows} rows of {seats} seats. {taken} seats are taken. "
        "How many seats are free?"
    )


Template = Callable[[Worksheet], str]
"""Writes a question, and notes the steps of its solution."""

TEMPLATES: tuple[Template, ...] = (
    *(_change, _sharing, _rate, _events, _comparison, _together, _days, _unit_price),
    *(_ages, _distance, _perimeter, _leftovers, _percentage, _savings, _two_kinds, _rows),
)


def make_problems(
    num_problems: int, seed: int, templates: Sequence[Template] = TEMPLATES
) -> list[dict[str, str]]:
    """Make word problems, no question twice.

    Args:
        num_problems: How many, drawn evenly from all templates.
        seed: The same seed gives the same problems, and the first of a longer list are those of
            a shorter one.
        templates: Which of the templates.

    Returns:
        Records with `prompt` ("Question: … Answer:"), `completion` (the worked steps and the
        answer) and `answer` (a non-negative whole number as text).
    """
    rng = random.Random(seed)
    problems: dict[str, dict[str, str]] = {}
    while len(problems) < num_problems:
        worksheet = Worksheet(rng)
        template = templates[len(problems) % len(templates)]
        prompt = f"Question: {template(worksheet)}\nAnswer:"
        answer = worksheet.steps[-1].rpartition(" ")[2]
        completion = f" {'. '.join(worksheet.steps)}. The answer is {answer}."
        problems.setdefault(prompt, {"prompt": prompt, "completion": completion, "answer": answer})
    return list(problems.values())


def make_splits(
    num_train: int, num_eval: int, seed: int
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Make training and held-out problems that share no question.

    Args:
        num_train: Training problems.
        num_eval: Held-out problems.
        seed: As in `make_problems`.

    Returns:
        Training and held-out records.
    """
    problems = make_problems(num_train + num_eval, seed)
    return problems[:num_train], problems[num_train:]


def make_unseen(num_problems: int, seed: int, seen: Collection[str]) -> list[dict[str, str]]:
    """Make problems none of which asks what others have asked.

    Args:
        num_problems: How many.
        seed: As in `make_problems`; best another one than that of the others.
        seen: The prompts of the others.

    Returns:
        Records as of `make_problems`.
    """
    taken = set(seen)
    # No question comes twice, so that at most as many fall away as there are others.
    problems = make_problems(num_problems + len(taken), seed)
    return [problem for problem in problems if problem["prompt"] not in taken][:num_problems]


def write_problems(folder: Path, split: str) -> Path:
    """Write an experiment's problems, once.

    Args:
        folder: Where the file goes.
        split: `train` or `test`; they share no question.

    Returns:
        The file.
    """
    path = folder / f"problems-{split}.jsonl"
    if path.is_file():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    training, held_out = make_splits(NUM_TRAINING, NUM_HELD_OUT, seed=0)
    records = training if split == "train" else held_out
    return write_whole(path, "".join(json.dumps(record) + "\n" for record in records))
