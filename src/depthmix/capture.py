"""What a forward pass leaves behind for a later part of the same pass."""

from __future__ import annotations

import threading
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn


class PassState:
    """Entries for the forward pass that is under way in this thread.

    Several threads may run one model, so each sees its own entries. While `torch.compile` traces,
    the entries are kept in a plain dictionary, which it can follow. Copies start empty.
    """

    def __init__(self) -> None:
        self._traced: dict = {}
        self._threads = threading.local()

    @property
    def here(self) -> dict:
        """The entries of this thread's pass."""
        if torch.compiler.is_compiling():
            return self._traced
        if not hasattr(self._threads, "entries"):
            self._threads.entries = {}
        return self._threads.entries

    def take(self) -> dict:
        """Hand over the entries of this thread's pass and forget them."""
        here = self.here
        taken = {**self._traced, **here}  # a graph break may part the writer from the reader
        self._traced.clear()
        here.clear()
        return taken

    def __reduce__(self) -> tuple:
        return PassState, ()


class HiddenStateCapture:
    """Keep the residual stream `h_j` at chosen depths until the final norm takes it.

    `h_j` is read as the input of layer j + 1, so that depth 0 is the embeddings and every model
    hands it over in the same form.
    """

    def __init__(self) -> None:
        self._depths: tuple[int, ...] = ()
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._states = PassState()

    def watch(self, layers: nn.ModuleList, depths: set[int]) -> None:
        """Watch these depths of `layers`, and no others from now on.

        Args:
            layers: The decoder layers, `L_1 … L_n`.
            depths: Numbers from 0 (the embeddings) to n - 1.
        """
        self.remove()
        self._depths = tuple(sorted(depths))
        self._handles = [
            layers[depth].register_forward_pre_hook(partial(self._keep, depth), with_kwargs=True)
            for depth in self._depths
        ]

    def take(self) -> dict[int, Float[Tensor, "batch seq hidden"]]:
        """Hand over the states of this thread's forward pass, by depth, and forget them."""
        return self._states.take()

    def remove(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._depths = ()

    def _keep(self, depth: int, _layer: nn.Module, args: tuple, kwargs: dict) -> None:
        """Keep the input of the layer above `depth`; the lowest depth begins a new pass."""
        states = self._states.here
        if depth == self._depths[0]:
            states.clear()
        states[depth] = args[0] if args else kwargs["hidden_states"]
