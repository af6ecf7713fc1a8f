"""What a run's exits and their calibration say of its speed, in words for the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from depthmix.adapters.exit_files import (
    CALIBRATION_NAMES,
    PLAN_NAME,
    find_exits,
    read_exit_settings,
)
from depthmix.decoding.draft_plan import DraftPlan
from depthmix.files.json import read_object
from depthmix.models.fast import read_plan

ANEW = "calibrate again by `depthmix calibrate`"
"""What helps where a file is damaged."""


SHARES = {"agreement": "agreement", "confident": "confident", "confident_agreement": "right"}
"""What was read of an exit, and the field of its row."""


@dataclass(frozen=True, kw_only=True)
class ExitRow:
    """One exit, in words."""

    layer: str
    """Number of its layer."""

    drafts: bool
    """Whether the plan lets it draft."""

    threshold: str
    """Confidence from which it drafts; a dash where it does not."""

    agreement: str
    """How often its likeliest token is the model's own."""

    confident: str
    """On how many tokens it is sure."""

    right: str
    """How often it agrees there; a dash where it never is sure."""


@dataclass(frozen=True, kw_only=True)
class SpeedSection:
    """A section of the report."""

    rows: tuple[ExitRow, ...]
    """The exits that there are, lowest first."""

    cards: tuple[tuple[str, str, str], ...]
    """Name, value and a note of what was measured, and of what was expected."""

    sentence: str
    """What follows from it."""


def read_speed(run: Path) -> SpeedSection | None:
    """Read what a run's exits and their calibration say.

    Args:
        run: Folder of a run.

    Returns:
        The section; `None` where exits or a calibration of verified drafts is missing.

    Raises:
        ValueError: If one of their files is damaged.
    """
    folder = find_exits(run)
    if folder is None:
        return None
    about, plan = read_exit_settings(folder)["about"], read_plan(folder)
    if plan is None:
        return None
    path = folder / CALIBRATION_NAMES[PLAN_NAME]
    found = read_object(path, way_out=ANEW)
    try:
        return _put(plan, found["found"]["expected"], found["measured"], about.get("readings", ()))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error!r}); {ANEW}.") from error


def _put(
    plan: DraftPlan,
    expected: Mapping[str, Any],
    measured: Mapping[str, Any],
    readings: Any,
) -> SpeedSection:
    """Put exits, what was expected and what was measured into words."""
    known = {reading["layer"]: reading for reading in readings}
    chosen = dict(zip(plan.exits, plan.thresholds, strict=True))
    rows = []
    for layer in sorted(known.keys() | chosen):
        reading, threshold = known.get(layer), chosen.get(layer)
        shares = {name: None if reading is None else reading[name] for name in SHARES}
        rows.append(
            ExitRow(
                layer=str(layer),
                drafts=threshold is not None,
                threshold="-" if threshold is None else f"{threshold:g}",
                **{field: _to_percent(shares[name]) for name, field in SHARES.items()},
            )
        )
    same, all_texts = measured["num_same"], measured["num_texts"]
    cards = (
        (
            "measured",
            f"{measured['speed_up']:.2f} times",
            f"{measured['dense_tokens_per_second']:.1f} tokens/s by generate, "
            f"{measured['fast_tokens_per_second']:.1f} fast; {same} of {all_texts} texts the same",
        ),
        (
            "expected",
            f"{expected['speed_up']:.2f} times",
            f"{expected['layers_per_token']:.1f} layers a token, "
            f"{_to_percent(expected['drafted'])} of the tokens drafted, "
            f"{_to_percent(expected['acceptance'])} of the drafts right",
        ),
    )
    sentence = "Ask for it by --fast, in depthmix generate and depthmix chat."
    if plan.stay_dense:
        sentence = "That is not worth it: the plan says to stay dense, and --fast does."
    return SpeedSection(rows=tuple(rows), cards=cards, sentence=sentence)


def _to_percent(share: float | None) -> str:
    """Write a share, or a dash where there is none."""
    return "-" if share is None else f"{100 * share:.1f} %"
