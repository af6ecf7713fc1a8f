"""Texts parted among those that choose a plan of drafts and those that tell what it gives."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

from depthmix.decoding.draft_plan import DraftPlan
from depthmix.depth.calibration import Expectation, choose_plan, expect
from depthmix.depth.confidences import Confidences, Continuation, record_confidences
from depthmix.depth.costs import Costs, measure_costs
from depthmix.depth.draft_vocabulary import fill_vocabulary, list_vocabularies
from depthmix.depth.unverified import Promise, choose_unverified
from depthmix.method.backbone import Backbone
from depthmix.method.exits import Exits

NUM_PARTS = 4
"""Parts of the texts, each every fourth one."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """A plan of drafts, and what texts say of it that have not chosen it."""

    plan: DraftPlan
    """The plan."""

    expected: Expectation
    """What it gives on these texts."""

    promise: Promise | None
    """What is promised of drafts that nothing verifies; `None` where the top verifies."""

    coverage: float
    """Share of these texts' tokens that may be drafted."""

    told_by: tuple[int, ...]
    """Places of these texts among all."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Calibrator:
    """Chooses plans of drafts by texts that a model wrote itself.

    The texts are parted in four, each every fourth one, so that parts are alike where the texts'
    order means something. What a part chooses is never judged by the same part.
    """

    backbone: Backbone
    """The model's parts."""

    exits: Exits
    """Its exits."""

    texts: Sequence[Continuation]
    """Texts that the model wrote, eight at least."""

    answers: Sequence[Collection[int]]
    """Tokens of the answers of records: first of those that gave the texts, then of others."""

    costs: Costs = field(init=False)
    """Times of the model's parts, measured when the calibrator is made."""

    def __post_init__(self) -> None:
        prompts = sorted((text.prompt for text in self.texts), key=len)
        every = range(len(self.texts))
        proposed = list_vocabularies(self._words(every), self.backbone.vocab_size).values()
        costs = measure_costs(
            self.backbone, self.exits, prompts[len(prompts) // 2], vocabularies=list(proposed)
        )
        object.__setattr__(self, "costs", costs)

    def choose(self) -> Found:
        """Choose a plan whose drafts the top verifies.

        The first part gives the tokens that may be drafted, and the second says how many others to
        add to them. Then both choose the plan, and the other half tells.
        """
        words, judges = self._part(0), self._part(1)
        proposed = list_vocabularies(self._words(words), self.backbone.vocab_size)
        speeds = {}
        for size, recorded in zip(
            proposed, self._record(judges, list(proposed.values())), strict=True
        ):
            speeds[size] = self._expect(recorded, self._choose_plan(recorded)).speed_up
        size = max(speeds, key=speeds.__getitem__)
        learnt, told = [*words, *judges], [*self._part(2), *self._part(3)]
        known = fill_vocabulary(self._words(learnt), size, self.backbone.vocab_size)
        plan = self._choose_plan(self._record(learnt, [known])[0])
        return self._tell(plan, told, promise=None)

    def choose_unverified(self, texts_unchanged: float) -> Found:
        """Choose a plan for drafts that nothing verifies, by `choose_unverified`.

        The first part gives the tokens that may be drafted and the exits; thresholds are tested on
        the second and third, and the fourth tells. Where no threshold passes, the plan stays dense.

        Args:
            texts_unchanged: Share of the texts that is to stay the same.
        """
        words, told = self._part(0), self._part(3)
        tested = list_tested(len(self.texts))
        known = fill_vocabulary(self._words(words), 0, self.backbone.vocab_size)
        plan, promise = choose_unverified(
            self._record(words, [known])[0],
            self._record(tested, [known])[0],
            self.costs,
            texts_unchanged=texts_unchanged,
            num_hidden_layers=self.backbone.num_hidden_layers,
        )
        return self._tell(plan, told, promise=promise)

    def _tell(self, plan: DraftPlan, told: Sequence[int], *, promise: Promise | None) -> Found:
        """Let texts tell what a plan gives that have had no part in it."""
        recorded = self._record(told, [plan.vocabulary])[0]
        expected = self._expect(recorded, plan, verify=promise is None)
        return Found(
            plan=replace(plan, row_costs=self.costs.row_costs),
            expected=expected,
            promise=promise,
            coverage=recorded.coverage,
            told_by=tuple(told),
        )

    def _part(self, number: int) -> list[int]:
        """List the texts of a part."""
        return list_part(number, len(self.texts))

    def _words(self, texts: Sequence[int]) -> set[int]:
        """Gather the tokens of some texts, of their records' answers, and of other records'."""
        written = [self.texts[number].tokens for number in texts]
        answered = [self.answers[number] for number in texts]
        return set().union(*written, *answered, *self.answers[len(self.texts) :])

    def _record(
        self, texts: Sequence[int], vocabularies: Sequence[tuple[int, ...] | None]
    ) -> list[Confidences]:
        """Ask exits about some of the texts."""
        chosen = [self.texts[number] for number in texts]
        return record_confidences(self.backbone, self.exits, chosen, vocabularies=vocabularies)

    def _choose_plan(self, recorded: Confidences) -> DraftPlan:
        """Choose the best plan of verified drafts."""
        layers = self.backbone.num_hidden_layers
        return choose_plan(recorded, self.costs, num_hidden_layers=layers)

    def _expect(
        self, recorded: Confidences, plan: DraftPlan, *, verify: bool = True
    ) -> Expectation:
        """Say what a plan gives on recorded texts."""
        layers = self.backbone.num_hidden_layers
        return expect(recorded, plan, self.costs, num_hidden_layers=layers, verify=verify)


def list_part(number: int, num_texts: int) -> list[int]:
    """List the places of a part of some texts."""
    return list(range(number, num_texts, NUM_PARTS))


def list_tested(num_texts: int) -> list[int]:
    """List the places of the texts on which thresholds of unverified drafts are tested."""
    return [*list_part(1, num_texts), *list_part(2, num_texts)]
