"""What fast generation takes for a user's own prompts, beside dense generation if that is asked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Int
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from depthmix.decoding.fast_generation import FastGeneration
from depthmix.models.continuation import continue_tokens
from depthmix.models.turns import Turns, Way


@dataclass(frozen=True, kw_only=True)
class FastSpeed:
    """What fast generation took; `str` says it in a line."""

    num_texts: int
    """Texts that were generated."""

    num_tokens: int
    """Their new tokens, each text's up to its end."""

    seconds: float
    """Wall time, prompts included."""

    num_hidden_layers: int
    """Layers that dense generation runs for a token."""

    layers_per_token: float
    """Layers that ran for the mean token."""

    drafted: float
    """Share of the tokens that exits drafted, 0 to 1."""

    acceptance: float | None
    """Share of the drafts that are among the tokens; `None` where nothing was drafted."""

    stays_dense: bool
    """Whether the plan says that drafting is not worth it, so that this was the model's own
    `generate`."""

    dense_seconds: float | None
    """Wall time of the same prompts by the model's own `generate`; `None` unless it was asked."""

    num_dense_tokens: int | None
    """Its new tokens."""

    num_same: int | None
    """Texts that were the same in both ways, token by token."""

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second, of all rows together."""
        return self.num_tokens / self.seconds

    @property
    def speed_up(self) -> float | None:
        """Dense generation's time over this one's; `None` unless it was asked."""
        return None if self.dense_seconds is None else self.dense_seconds / self.seconds

    def __str__(self) -> str:
        return " ".join(self._describe())

    def _describe(self) -> Iterator[str]:
        """Say in words what was measured."""
        pace = f"{self.tokens_per_second:.1f} tokens/s"
        if self.stays_dense:
            yield f"Dense, as the plan says that drafting is not worth it here: {pace}."
        else:
            right = "nothing was drafted"
            if self.acceptance is not None:
                right = f"{self.drafted:.0%} of the tokens drafted"
                right += f", {self.acceptance:.0%} of the drafts accepted"
            layers = f"{self.layers_per_token:.1f} of {self.num_hidden_layers} layers a token"
            yield f"Fast: {pace}, {layers}, {right}."
        if self.dense_seconds is None or self.stays_dense:
            return
        assert self.num_dense_tokens is not None  # measured together
        own = f"{self.num_dense_tokens / self.dense_seconds:.1f} tokens/s"
        if self.num_same == self.num_texts:
            same = "the text is the same" if self.num_texts == 1 else "all texts are the same"
        else:
            same = f"{self.num_same} of {self.num_texts} texts are the same"
        yield f"{self.speed_up:.2f} times as fast as dense generation ({own}); {same}."


class SpeedMeter:
    """Generates fast, and counts tokens, seconds and layers.

    Against dense generation, each batch is generated in both ways by turns (`Turns`), and the first
    one once before, to warm up. What is handed back is fast generation's.

    Args:
        fast: What generates.
        tokenizer: The model's tokenizer.
        settings: Keyword arguments of `GenerationConfig`.
        against_dense: Whether dense generation is measured, too.
    """

    def __init__(
        self,
        fast: FastGeneration,
        tokenizer: PreTrainedTokenizerBase,
        settings: Mapping[str, Any],
        *,
        against_dense: bool = False,
    ) -> None:
        self.fast, self.against_dense = fast, against_dense and not fast.plan.stay_dense
        self.model: PreTrainedModel | PeftModel = fast.model
        self._tokenizer, self._settings = tokenizer, settings
        ways = {"fast": self._by(fast)}
        if self.against_dense:
            ways["dense"] = self._by(self.model)
        ends = settings.get("eos_token_id", fast.model.generation_config.eos_token_id)
        ends = {ends} if isinstance(ends, int) else set(ends or ())
        self._turns = Turns(ways, device=self.model.device, ends=ends)
        self._num_drafted = 0

    def run(self, inputs: Mapping[str, Tensor]) -> Int[Tensor, "batch new"]:
        """Generate after a batch of prompts, and count it.

        Args:
            inputs: `input_ids` and `attention_mask`, padded on the left.

        Returns:
            The new tokens of each row.
        """
        fast = self.fast
        if self.against_dense and not self._turns.num_texts:
            other = FastGeneration(self.model, fast.exits, fast.plan, verify=fast.verify)
            self._turns.warm_up(inputs, [self._by(other), self._by(self.model)])
        found = self._turns.run(inputs)
        top = fast.backbone.num_hidden_layers
        self._num_drafted += sum(layer < top for row in fast.origins for layer in row)
        return found["fast"]

    def read(self) -> FastSpeed:
        """Say what all batches so far have taken."""
        fast, turns, has_dense = self.fast, self._turns, self.against_dense
        num_layers = fast.backbone.num_hidden_layers
        dense = fast.plan.stay_dense
        return FastSpeed(
            num_texts=turns.num_texts,
            num_tokens=turns.num_tokens["fast"],
            seconds=sum(turns.seconds["fast"]),
            num_hidden_layers=num_layers,
            layers_per_token=float(num_layers) if dense else fast.layers_per_token,
            drafted=self._num_drafted / max(turns.num_tokens["fast"], 1),
            acceptance=fast.acceptance_rate if fast.num_drafted.total() else None,
            stays_dense=dense,
            dense_seconds=sum(turns.seconds["dense"]) if has_dense else None,
            num_dense_tokens=turns.num_tokens["dense"] if has_dense else None,
            num_same=turns.num_same if has_dense else None,
        )

    def _by(self, decoder: FastGeneration | PreTrainedModel | PeftModel) -> Way:
        """Generate by a decoder."""

        def way(inputs: Mapping[str, Tensor]) -> Int[Tensor, "batch new"]:
            return continue_tokens(decoder, self._tokenizer, inputs, self._settings)

        return way
