"""Answers in the terminal, each token in the colour of the layer at which it was drafted."""

from __future__ import annotations

from collections import Counter

from rich.console import Console
from rich.segment import Segment, Segments
from transformers import PreTrainedTokenizerBase

from depthmix.decoding.fast_generation import FastGeneration
from depthmix.models.streamers import ColouredStreamer


class DraftStreamer(ColouredStreamer):
    """Print an answer token by token, coloured by the exit that drafted each, or by the top.

    After an answer stands how many tokens each exit drafted, and how many drafts were refused.

    Args:
        fast: What generates.
        tokenizer: The model's tokenizer.
        console: Where to print; by default standard output, with the colours that it takes.
    """

    def __init__(
        self,
        fast: FastGeneration,
        tokenizer: PreTrainedTokenizerBase,
        console: Console | None = None,
    ) -> None:
        super().__init__(tokenizer, console)
        self.fast = fast
        self.layers = (*fast.plan.exits, fast.backbone.num_hidden_layers)
        self.origins: list[int] = []  # of the answer's tokens, its end mark included
        self._num_drafted = self._num_accepted = 0  # before this answer

    def print_legend(self) -> None:
        """Print what the colours mean, or nothing where there are none."""
        if self.fast.plan.stay_dense:
            self.console.print("The plan says that drafting is not worth it: nothing is drafted.")
        elif self._has_colours:
            styles = (self._style(float(place)) for place in range(len(self.layers)))
            bar = [Segment(f" {n} ", style) for n, style in zip(self.layers, styles, strict=True)]
            words = (Segment("Drafted at layer "), *bar, Segment(" (the top)\n"))
            self.console.print(Segments(words), crop=False)

    def _begin(self) -> None:
        """Forget the last answer."""
        self.origins.clear()
        self._num_drafted = self.fast.num_drafted.total()
        self._num_accepted = self.fast.num_accepted.total()

    def _take(self) -> float:
        """Give the place of the newest token's layer among all that there are."""
        layer = self.layers[-1] if self.fast.plan.stay_dense else self.fast.origins[0][-1]
        self.origins.append(layer)
        return float(self.layers.index(layer))

    def _share(self, depth: float) -> float:
        """Give a place its place on the scale, 0 to 1."""
        return depth / (len(self.layers) - 1)

    def _summarise(self) -> str:
        """Say how many tokens each exit drafted, and how many drafts were refused."""
        counts = Counter(self.origins)
        *exits, top = self.layers
        drafted = ", ".join(f"{counts[layer]} drafted at layer {layer}" for layer in exits)
        refused = self.fast.num_drafted.total() - self._num_drafted
        refused -= self.fast.num_accepted.total() - self._num_accepted
        tokens = f"{len(self.origins)} token{'s' * (len(self.origins) != 1)}"
        return f"{tokens}: {drafted}, {counts[top]} by the top; {refused} drafts not used"
