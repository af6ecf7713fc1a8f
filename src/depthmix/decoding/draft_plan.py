"""How exits draft: which of them, how sure they must be, and among which tokens they choose."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True, kw_only=True)
class DraftPlan:
    """How exits draft for the top of the model.

    A token is drafted at the first of `exits` that gives its best token a probability of at least
    its threshold, provided that the product of the pending drafts' probabilities, this one among
    them, is at least `joint_threshold`. Else it goes to the top, which verifies all that is
    pending. `depthmix calibrate` finds a plan for a model, its exits, a kind of text and a machine.
    """

    exits: tuple[int, ...]
    """Layers whose exits draft, increasing."""

    thresholds: tuple[float, ...]
    """Probability from which each of them drafts, in the order of `exits`."""

    joint_threshold: float = 0.5
    """Product of the pending drafts' probabilities below which nothing more is drafted. Where
    nothing verifies, nothing is pending, and neither this nor `max_drafts` counts."""

    max_drafts: int = 12
    """Tokens that may be pending at a time."""

    vocabulary: tuple[int, ...] | None = None
    """Token ids that may be drafted, increasing; `None` for all. The head's product with few of
    them is what makes an exit cheap. The top predicts among all tokens, whatever this says."""

    row_costs: tuple[float, ...] = (1.0, 1.6, 1.7, 2.0)
    """Cost of a layer at 1, 2, 4 and 8 positions in one pass, that at 1 being 1. By it drafting
    stops for a while where it does not pay."""

    stay_dense: bool = False
    """Whether drafting is not worth its cost, so that `generate` is the model's own."""

    exits_sha256: str | None = None
    """Hash of the exits' weights that it was found for, as `exits.json` has it; `None` fits any."""

    def __post_init__(self) -> None:
        if not self.exits or sorted(set(self.exits)) != list(self.exits):
            raise ValueError(f"`exits` must be layers in increasing order, got {self.exits}.")
        if len(self.thresholds) != len(self.exits):
            raise ValueError(
                f"`thresholds` must hold one for each of the {len(self.exits)} exits, got "
                f"{len(self.thresholds)}."
            )
        for name, values in (
            ("thresholds", self.thresholds),
            ("joint_threshold", (self.joint_threshold,)),
        ):
            for value in values:
                if not 0 <= value <= 1:
                    raise ValueError(f"`{name}` must be probabilities, 0 to 1, got {value}.")
        if self.max_drafts < 1:
            raise ValueError(f"`max_drafts` must be at least 1, got {self.max_drafts}.")
        if len(self.row_costs) != 4 or not all(0 < cost < math.inf for cost in self.row_costs):
            raise ValueError(
                "`row_costs` must hold four positive numbers, for 1, 2, 4 and 8 positions, got "
                f"{self.row_costs}."
            )
        known = self.vocabulary
        if known is not None and (not known or sorted(set(known)) != list(known) or known[0] < 0):
            raise ValueError(
                "`vocabulary` must hold token ids in increasing order, at least one; `None` "
                "drafts among all tokens."
            )

    @classmethod
    def for_all(
        cls, exits: tuple[int, ...], *, threshold: float = 0.8, **options: Any
    ) -> DraftPlan:
        """Let all of these exits draft from one threshold on.

        Args:
            exits: Layers, increasing.
            threshold: Probability from which each of them drafts.
            options: Other fields.
        """
        return cls(exits=tuple(exits), thresholds=(threshold,) * len(exits), **options)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DraftPlan:
        """Read what `to_dict` gave.

        Raises:
            ValueError: If a field is missing, unknown or of another form.
        """
        known = {field.name for field in fields(cls)}
        unknown = sorted(values.keys() - known)
        missing = sorted({"exits", "thresholds"} - values.keys())
        if unknown or missing:
            what = f"has no field {unknown[0]!r}" if unknown else f"needs a field {missing[0]!r}"
            raise ValueError(f"A plan of drafts {what}; write it by `depthmix calibrate`.")
        try:
            read: dict[str, Any] = {
                name: tuple(value) if isinstance(value, list) else value
                for name, value in values.items()
            }
            return cls(**read)
        except TypeError as error:
            raise ValueError(
                f"A plan of drafts cannot be read ({error}); write it by `depthmix calibrate`."
            ) from error

    def to_dict(self) -> dict[str, Any]:
        """Give the fields as JSON has them."""
        return {n: list(v) if isinstance(v, tuple) else v for n, v in asdict(self).items()}
