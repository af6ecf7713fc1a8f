"""Answers in the terminal while they are generated."""

from __future__ import annotations

import math
import re
import unicodedata
from abc import ABC, abstractmethod
from collections import deque
from typing import Any

from jaxtyping import Float, Int
from rich.color import Color
from rich.console import Console
from rich.segment import Segment, Segments
from rich.style import Style
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TextStreamer
from transformers.generation import BaseStreamer

from depthmix.depth.colours import RAMP, blend, ink_on
from depthmix.method.mixture import Routes
from depthmix.method.norm import active_mixture, find_mixture_norm

SCALE = RAMP[1:]
"""Backgrounds from the first late layer to the last, darker with depth, so that grey says the same.

They bring the colour of their text with them, and so suit light and dark terminals."""

UNFINISHED = "\ufffd"
"""What a tokenizer writes for bytes that are no character, or not yet."""

JOINERS = "\u200c\u200d"
"""Invisible characters that writing and emoji need, and that move nothing."""

HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Categories of characters that command a terminal, turn text around or cannot be printed."""


def make_visible(text: str) -> str:
    r"""Write characters that could command a terminal by their number, as in `<U+001B>[2J`.

    Args:
        text: Text from a model.

    Returns:
        Text in which line breaks, tabs and joiners are the only invisible characters.
    """
    return "".join(
        f"<U+{ord(character):04X}>"
        if unicodedata.category(character) in HIDDEN and character not in f"\n\t{JOINERS}"
        else character
        for character in text
    )


class VisibleStreamer(TextStreamer):
    """Print an answer word by word, with nothing in it that a terminal obeys."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print what can no longer change."""
        super().on_finalized_text(make_visible(text), stream_end)


class ColouredStreamer(BaseStreamer, ABC):
    """Print an answer token by token, each in a colour of its own, and then say what they mean.

    A character that several tokens make has the mean of theirs. Generation must be in one row.

    Args:
        tokenizer: The model's tokenizer.
        console: Where to print; by default standard output, with the colours that it takes.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, console: Console | None = None) -> None:
        self.tokenizer = tokenizer
        self.console = Console(highlight=False) if console is None else console
        self._num_unread: int | None = None  # tokens of the prompt; None before it came
        self._ids: list[int] = []
        self._waiting: list[float] = []  # depths of tokens whose text is not whole yet
        self._num_printed = 0

    def put(self, value: Int[Tensor, " ..."]) -> None:
        """Take the prompt, then one token after the other, as `generate` gives them."""
        if self._num_unread is None:
            self._num_unread, self._num_printed = value.numel(), 0
            self._ids.clear()
            self._waiting.clear()
            self._begin()
            return
        self._ids += value.flatten().tolist()
        self._waiting.append(self._take())
        text = self._decode()
        whole = text.rstrip(UNFINISHED)
        if whole == text:
            self._print_from(whole)
            self._waiting.clear()
        elif self._print_from(whole):
            self._waiting = self._waiting[-1:]  # it also begins what is not whole yet

    def end(self) -> None:
        """Print what is left of the answer, and what all its colours come to."""
        self._print_from(self._decode())
        self._num_unread = None
        style = Style(dim=True) if self._has_colours else None
        ending = (Segment("\n"), Segment(self._summarise(), style), Segment("\n"))
        self.console.print(Segments(ending), crop=False)

    @abstractmethod
    def _begin(self) -> None:
        """Forget the last answer."""

    @abstractmethod
    def _take(self) -> float:
        """Give the depth of the newest token."""

    @abstractmethod
    def _share(self, depth: float) -> float:
        """Give a depth its place on the scale, 0 to 1."""

    @abstractmethod
    def _summarise(self) -> str:
        """Say what all tokens of an answer come to."""

    def _decode(self) -> str:
        """Decode the answer so far, in a way that what follows does not change."""
        text: Any = self.tokenizer.decode(
            self._ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def _print_from(self, text: str) -> bool:
        """Print what is new in a text, in the colour of the tokens that made it, if anything is."""
        new = text[self._num_printed :]
        if not new:
            return False
        self._num_printed = len(text)
        style = self._style(sum(self._waiting) / len(self._waiting)) if self._has_colours else None
        # A background across a line break would fill the line.
        parts = [part for part in re.split("(\n)", make_visible(new)) if part]
        segments = [Segment(part, style if part != "\n" else None) for part in parts]
        self.console.print(Segments(segments), crop=False)
        return True

    @property
    def _has_colours(self) -> bool:
        # The nearest ones of sixteen would not get steadily darker.
        return self.console.color_system in ("truecolor", "256") and not self.console.no_color

    def _style(self, depth: float) -> Style:
        """Give a depth its colours."""
        colour = blend(self._share(depth), SCALE)
        ink = "#000000" if ink_on(colour) == "black" else "#ffffff"  # not the terminal's own
        return Style(color=ink, bgcolor=Color.from_rgb(*(255 * channel for channel in colour)))


class DepthStreamer(ColouredStreamer):
    """Print an answer token by token, coloured by the mean depth `Σ G_i i` that each token used.

    A token's depth comes from the forward pass that predicted it. A character that several tokens
    make has the mean of theirs. After an answer stands how much each late layer counted in it,
    which is all that a terminal with sixteen colours, or none, shows.

    Generation must predict one token per pass, in one row.

    Args:
        model: A model with an active mixture, whose passes the streamer listens to from now on.
        tokenizer: Its tokenizer.
        console: Where to print; by default standard output, with the colours that it takes.

    Raises:
        ValueError: If the model has no active mixture.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        console: Console | None = None,
    ) -> None:
        norm, mixture = find_mixture_norm(model), active_mixture(model)
        if norm is None or mixture is None:
            raise ValueError(
                "`depth` needs a model with a mixture of depths, and this one has none; name a run "
                "that was trained with one, or leave `depth` out."
            )
        super().__init__(tokenizer, console)
        self.late_layers = mixture.late_layers
        self.weights: list[list[float]] = []  # of the answer's tokens, its end mark included
        self._passes: deque[Float[Tensor, " routes"]] = deque()  # whose token is still to come
        norm.listener = self._listen

    def print_legend(self) -> None:
        """Print what the colours mean, or nothing where there are none."""
        if not self._has_colours:
            return
        low, high = self.late_layers[0], self.late_layers[-1]
        places = [step / (len(SCALE) - 1) for step in range(len(SCALE))] if low < high else [1.0]
        depths = [high - (1 - place) ** 2 * (high - low) for place in places]
        bar = [Segment(f" {depth:.1f} ", self._style(depth)) for depth in depths]
        self.console.print(Segments([Segment("Mean depth "), *bar, Segment("\n")]), crop=False)

    def _begin(self) -> None:
        """Forget the last answer."""
        self.weights.clear()
        self._passes.clear()

    def _take(self) -> float:
        """Give the mean depth of the newest token."""
        self.weights.append(self._passes.popleft().tolist())
        return self._depth(self.weights[-1])

    def _listen(self, routes: Routes) -> None:
        """Keep the weights that predict the next token: those at the end of what was read."""
        if self._num_unread is None:
            return
        # A prompt may be read in pieces, of which only the last predicts a token.
        self._num_unread -= routes.weights.shape[1]
        if self._num_unread <= 0:
            self._passes.append(routes.weights[0, -1])

    def _depth(self, weights: list[float]) -> float:
        """Compute the mean depth `Σ G_i i`."""
        return sum(share * layer for share, layer in zip(weights, self.late_layers, strict=True))

    def _share(self, depth: float) -> float:
        """Give a depth its place on the scale, 0 to 1."""
        low, high = self.late_layers[0], self.late_layers[-1]
        # Routers stay near the final layer: the root tells small distances from it apart.
        missing = min(max((high - depth) / (high - low), 0.0), 1.0) if low < high else 0.0
        return 1 - math.sqrt(missing)

    def _summarise(self) -> str:
        """Say how deep an answer's tokens were on average, and the mean weight of each layer."""
        num_tokens = len(self.weights)
        if not num_tokens:
            return "no token"
        means = [sum(column) / num_tokens for column in zip(*self.weights, strict=True)]
        shares = ", ".join(
            f"{layer}: {100 * mean:.1f} %"
            for layer, mean in zip(self.late_layers, means, strict=True)
        )
        tokens = f"{num_tokens} token{'s' * (num_tokens != 1)}"
        return f"mean depth {self._depth(means):.2f} over {tokens} (layer {shares})"
