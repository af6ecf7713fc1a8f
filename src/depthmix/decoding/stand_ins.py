"""Functions that stand in front of a model's own while one call of `generate` runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

Claim = tuple[nn.Module, str, Callable[..., Any]]
"""A module, a function's name in what the module itself holds, and what is called in its place with
the module's own function as the first argument."""

_CLAIMING = threading.RLock()


class StandIn:
    """A function in front of a module's own, for the turn of one call in one thread.

    Within a pass of that turn it acts; whoever else calls it gets what it stands in front of. When
    its turn is over it takes itself away, as soon as it is called. Copies of it never had a turn.

    Args:
        module: Whose function it is.
        name: The function's name in what the module itself holds.
        own: What the module held under that name, or None.
        original: What the module did when it was called by that name.
        function: Called in its place, with `original` before the arguments.
        turn: The turn in which it acts.
        begins_pass: Whether it acts outside of passes, too.
    """

    def __init__(
        self,
        module: nn.Module,
        name: str,
        own: Any,
        original: Callable[..., Any],
        function: Callable[..., Any] | None = None,
        turn: Turn | None = None,
        *,
        begins_pass: bool = False,
    ) -> None:
        self.module, self.name, self.own = module, name, own
        self.function, self.turn, self.begins_pass = function, turn, begins_pass
        self.__wrapped__ = original  # `inspect.signature` looks there

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Act within the turn, and else be the module's own function."""
        turn = self.turn
        if turn is None or not turn.is_taken:
            self.put_back()
        elif self.function is not None and turn.is_here and (turn.in_pass or self.begins_pass):
            return self.function(self.__wrapped__, *args, **kwargs)
        return self.__wrapped__(*args, **kwargs)

    def __reduce__(self) -> tuple:
        return StandIn, (self.module, self.name, self.own, self.__wrapped__)

    @property
    def is_in_place(self) -> bool:
        """Whether the module holds it still."""
        return vars(self.module).get(self.name) is self

    def put_back(self) -> None:
        """Let the module hold what it held, unless somebody has put another function there."""
        with _CLAIMING:
            if not self.is_in_place:
                return
            if self.own is None:
                vars(self.module).pop(self.name, None)
            else:
                vars(self.module)[self.name] = self.own


class Turn:
    """The claim of one call of `generate` on a model's functions, in the thread that makes it.

    Args:
        name: What errors call this way of generating.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.in_pass = False
        self._thread: threading.Thread | None = None
        self._stand_ins: list[StandIn] = []

    @property
    def is_taken(self) -> bool:
        """Whether it has begun and not ended."""
        return self._thread is not None

    @property
    def is_here(self) -> bool:
        """Whether it is this thread's."""
        return self._thread is threading.current_thread()

    def take(self, claims: Sequence[Claim]) -> None:
        """Stand in front of all of these functions.

        Args:
            claims: The first is the one that begins a pass.

        Raises:
            RuntimeError: If another turn has one of them, in whatever thread.
        """
        with _CLAIMING:
            for module, name, _ in claims:
                standing = vars(module).get(name)
                if isinstance(standing, StandIn):
                    if standing.turn is not None and standing.turn.is_taken:
                        raise RuntimeError(self._refusal(standing.turn))
                    standing.put_back()
            self._thread = threading.current_thread()
            for i, (module, name, function) in enumerate(claims):
                own = vars(module).get(name)
                # The final norm answers to another name than it is replaced by.
                original = getattr(module, name.removeprefix("_replaced_"))
                stand_in = StandIn(module, name, own, original, function, self, begins_pass=i == 0)
                self._stand_ins.append(stand_in)  # before it stands there: an interrupt may come
                vars(module)[name] = stand_in

    def check(self) -> None:
        """Refuse to go on where something else was put in a stand-in's place.

        Raises:
            RuntimeError: If a function was replaced meanwhile.
        """
        for stand_in in self._stand_ins:
            if not stand_in.is_in_place:
                raise RuntimeError(
                    f"{self.name} cannot go on, because the {stand_in.name.lstrip('_')} of a "
                    f"{type(stand_in.module).__name__} was replaced while it generates; add and "
                    "remove hooks and wrappers before or after."
                )

    @contextmanager
    def passing(self, *, ours: bool) -> Iterator[None]:
        """Let the stand-ins act for a while, or be the modules' own functions.

        Args:
            ours: Whether a pass is the decoding loop's.
        """
        before = self.in_pass
        try:
            self.in_pass = ours
            yield
        finally:
            self.in_pass = before

    def end(self) -> None:
        """Put everything back; to do so twice does no harm, and completes what was interrupted."""
        self._thread = None  # from here on whatever is left standing does nothing
        for stand_in in self._stand_ins:
            stand_in.put_back()

    def _refusal(self, other: Turn) -> str:
        holder = other._thread
        where = "another thread"
        if holder is threading.current_thread():
            where = "this thread (its streamer, processor or criterion is calling)"
        elif holder is not None:
            where = f"thread {holder.name!r}"
        return (
            f"{self.name} cannot begin while {other.name.lower()} generates with the same model in "
            f"{where}; wait until that call has ended, call the model's own `generate`, or use a "
            "copy of the model."
        )
