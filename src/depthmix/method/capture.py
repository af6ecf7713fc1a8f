"""What a forward pass leaves behind for a later part of the same pass."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

HOOKS = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks")
HOOKS += ("_forward_hooks_with_kwargs", "_forward_hooks_always_called")
"""Where a module holds its hooks on the forward pass."""


@contextmanager
def undoing_hooks(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Take the hooks away that a block has put onto modules, if it is interrupted.

    Args:
        modules: Those that the block may hook into.
    """
    held = [(own, dict(own)) for module in modules for own in (getattr(module, n) for n in HOOKS)]
    try:
        yield
    except BaseException:
        for own, before in held:
            own.clear()
            own.update(before)
        raise


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
    hands it over in the same form. A pass begins and ends with nothing kept, whatever became of the
    one before. A depth that is seen twice, or after a deeper one, is not handed over.
    """

    def __init__(self) -> None:
        self._depths: tuple[int, ...] = ()
        self._ids: dict[int | str, int] = {}
        self._handles: list[RemovableHandle] = []
        self._states = PassState()

    def watch(
        self,
        layers: nn.ModuleList,
        depths: set[int],
        *,
        trained: Collection[int] = (),
        within: nn.Module | None = None,
        begin: Callable[[], None] | None = None,
    ) -> None:
        """Watch these depths of `layers`, and no others from now on.

        Args:
            layers: The decoder layers, `L_1 … L_n`.
            depths: Numbers from 0 (the embeddings) to n - 1.
            trained: Others that are kept in training mode alone.
            within: A module that runs the layers and what takes their states; a pass begins when
                it is called, and else at the lowest depth.
            begin: Called when a pass begins there.
        """
        self.remove()
        self._trained = frozenset(trained) - depths
        self._depths = tuple(sorted(depths | self._trained))
        handles: dict[int | str, RemovableHandle] = {
            depth: layers[depth].register_forward_pre_hook(
                partial(self._keep, depth), with_kwargs=True
            )
            for depth in self._depths
        }
        if within is not None and self._depths:
            handles["begin"] = within.register_forward_pre_hook(partial(self._begin, begin))
            # Also after an exception, whose states would keep their memory.
            handles["end"] = within.register_forward_hook(self._end, always_call=True)
        self._ids = {place: handle.id for place, handle in handles.items()}
        self._handles = list(handles.values())

    def still_watches(self, layers: nn.ModuleList) -> bool:
        """Tell whether the layers above the watched depths are the ones that were there.

        One that has been wrapped is; a copy of one, or another one in its place, is not.

        Args:
            layers: The decoder layers, as they are now.
        """
        return all(
            depth < len(layers) and any(self._is_above(depth, m) for m in layers[depth].modules())
            for depth in self._depths
        )

    def take(self) -> dict[int, Float[Tensor, "batch seq hidden"]]:
        """Hand over the states of this thread's forward pass, by depth, and forget them."""
        states = self._states.take()
        return {depth: state for depth, state in states.items() if state is not None}

    def replace(self, states: Mapping[int, Float[Tensor, "batch seq hidden"]]) -> None:
        """Hand over these states at the end of this thread's pass, instead of those seen.

        Args:
            states: Residual streams by depth.
        """
        here = self._states.here
        here.clear()
        here.update(states)

    def remove(
        self, layers: Sequence[nn.Module] | nn.ModuleList = (), *, within: nn.Module | None = None
    ) -> None:
        """Stop watching.

        Args:
            layers: What a copied model has in the place of the layers; copies hold no handles.
            within: What it has in the place of the module that runs them.
        """
        for handle in self._handles:
            handle.remove()
        for place, hook_id in self._ids.items():
            below = place if isinstance(place, int) else None
            module = within if below is None else next(iter(layers[below : below + 1]), None)
            if module is None:
                continue
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                if self._is_ours(hooks.get(hook_id)):
                    del hooks[hook_id]
                    module._forward_pre_hooks_with_kwargs.pop(hook_id, None)
                    module._forward_hooks_always_called.pop(hook_id, None)
        self._ids, self._handles, self._depths = {}, [], ()

    def _begin(self, begin: Callable[[], None] | None, *_: Any) -> None:
        """Forget what a pass that did not come to its end has left."""
        self._states.take()
        if begin is not None:
            begin()

    def _end(self, *_: Any) -> None:
        self._states.take()

    def _keep(self, depth: int, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        """Keep the input of the layer above `depth`; the lowest depth begins a new pass."""
        states = self._states.here
        if depth == self._depths[0]:
            states.clear()
        if depth in self._trained and not layer.training:
            return
        in_order = all(below < depth for below in states)
        states[depth] = (args[0] if args else kwargs["hidden_states"]) if in_order else None

    def _is_above(self, depth: int, module: nn.Module) -> bool:
        """Tell whether our hook stands in front of this very module; copies have copies of it."""
        return depth in self._ids and self._is_ours(module._forward_pre_hooks.get(self._ids[depth]))

    def _is_ours(self, hook: Any) -> bool:
        return getattr(getattr(hook, "func", hook), "__self__", None) is self

    def __getstate__(self) -> dict[str, Any]:
        """Leave out handles: with them the copy of a layer would copy what hooks into the model."""
        return {**vars(self), "_handles": []}
