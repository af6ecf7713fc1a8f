"""What a table of a comparison must say beside its numbers."""

from __future__ import annotations

from pathlib import Path

from depthmix.comparison.scores import Comparison
from depthmix.statistics.resampling import NUM_RESAMPLES


def notes(comparison: Comparison) -> tuple[str, ...]:
    """Say in sentences how the numbers were made and what they cannot say."""
    scores = [score for row in comparison.rows for score in row.scores]
    single = list(dict.fromkeys(score.method for score in scores if score.num_seeds == 1))
    several = any(score.num_seeds > 1 for score in scores)
    sentences = [
        f"Metrics: {'; '.join(f'{row.task} {row.metric}' for row in comparison.tasks)}.",
        "Intervals are at 95 %: Wilson's for the right and wrong answers of one seed, percentiles "
        f"of {NUM_RESAMPLES:,} bootstrap resamples otherwise.",
    ]
    blind = [(row.task, row.blind_score) for row in comparison.tasks if row.blind_score is not None]
    if blind:
        shares = ", ".join(f"{100 * share:.1f} % on {task}" for task, share in blind)
        sentences.append(
            f"Without reading the items one scores {shares}: by guessing among the choices, or by "
            "the answer that is commonest among these items, whichever is more."
        )
    if comparison.num_tests:
        sentences += [
            f"Differences are from {comparison.methods[0].label}, on the same items; p is "
            "McNemar's exact test where both have one seed of right and wrong answers, the "
            "bootstrap's otherwise.",
            f"p (Holm) is corrected for all {comparison.num_tests} comparisons in the table."
            if comparison.num_tests > 1
            else "There is one comparison, and nothing to correct for.",
        ]
    if several:
        sentences.append(
            "With several seeds, seeds and items are resampled, and an item counts as solved if "
            "more than half of the seeds solve it."
        )
    if single:
        sentences.append(
            f"One seed means one seed: for {', '.join(single)}, nothing here says what another "
            "training seed would give."
        )
    if comparison.average is not None:
        sentences.append("The average gives each task the same weight.")
    if comparison.recoveries:
        sentences.append(
            "Recovered is (method - start of the gap) / (end - start of the gap), with an interval "
            "of the same resamples, where one whose gap is zero or reversed counts on both sides; "
            "it is undefined where the gap's own interval holds 0."
        )
    if any(row.is_loss for row in comparison.tasks):
        sentences.append(
            "Losses are in nats per token, a mean over each record's tokens and then over records: "
            "less is better, and a difference below zero is a gain."
        )
    left_out = [(row.task, row.num_left_out) for row in comparison.tasks if row.num_left_out]
    if left_out:
        counts = ", ".join(f"{number:,} of {task}" for task, number in left_out)
        sentences.append(f"Items left out, since at least one run has no rating of them: {counts}.")
    for aspect in ("model", "protocol", "dtype"):
        values = [(method.label, getattr(method, aspect)) for method in comparison.methods]
        # A model may lie in several places.
        if len({Path(value).name for _, value in values if value is not None}) > 1:
            listed = ", ".join(f"{value or 'unknown'} for {label}" for label, value in values)
            sentences.append(f"The methods differ in {aspect}: {listed}.")
    return tuple(sentences)
