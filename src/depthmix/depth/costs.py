"""What layers, head and exits cost on this machine, by the positions that are run together."""

from __future__ import annotations

import copy
import statistics
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import DynamicCache, GenerationConfig

from depthmix.decoding.drafting import DraftHead
from depthmix.decoding.few_rows import multiply_few
from depthmix.method.architecture import evaluating
from depthmix.method.backbone import Backbone
from depthmix.method.exits import Exits

MEASURED_ROWS = (1, 2, 4, 8)
"""Positions in one pass whose time is measured; times between them are interpolated."""

NUM_REPETITIONS = 15
"""Passes of each kind, in turn; their median counts, which one slow pass does not move."""

NUM_GENERATED = 8
"""Tokens of a generation whose time tells what the decoding loop adds to its passes."""


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Times of a model's parts on one machine, in seconds; `to_dict` makes it ready for JSON."""

    rows: tuple[int, ...]
    """Positions of a pass that were measured, increasing from 1."""

    layer: tuple[float, ...]
    """Time of one layer, the mean of all, at each of `rows`."""

    head: tuple[float, ...]
    """Time of what stands above the layers, final norm (or mixture) and head, at each of `rows`."""

    vocabulary_sizes: tuple[int, ...]
    """Numbers of tokens that an exit chose among, increasing."""

    exit: tuple[float, ...]
    """Time of an exit's prediction at one position, at each of `vocabulary_sizes`."""

    step: float
    """Time per generated token that is neither layers nor head: the decoding loop."""

    prompt: float
    """Time of the pass over a prompt of `num_prompt_tokens`."""

    num_prompt_tokens: int
    """Tokens before the measured positions."""

    device: str
    """Kind of the device, with the number of threads where it is a CPU."""

    dtype: str
    """Type of the weights."""

    def __post_init__(self) -> None:
        for name, sizes, times in (
            ("layer", self.rows, self.layer),
            ("head", self.rows, self.head),
            ("exit", self.vocabulary_sizes, self.exit),
        ):
            if not sizes or len(sizes) != len(times) or sorted(set(sizes)) != list(sizes):
                raise ValueError(
                    f"`{name}` must hold a time for each of some increasing sizes, got {times} "
                    f"for {sizes}; measure anew by `measure_costs`."
                )
            if min(times) <= 0:
                raise ValueError(f"`{name}` must be times above 0 seconds, got {min(times)}.")

    def layer_seconds(self, rows: int | Int[np.ndarray, "*any"]) -> Float[np.ndarray, "*any"]:
        """Time of one layer over so many positions, interpolated; beyond the last, extended."""
        return _interpolate(rows, self.rows, self.layer)

    def head_seconds(self, rows: int | Int[np.ndarray, "*any"]) -> Float[np.ndarray, "*any"]:
        """Time of final norm and head over so many positions, in the same way."""
        return _interpolate(rows, self.rows, self.head)

    def exit_seconds(self, num_tokens: int) -> float:
        """Time of an exit's prediction among so many tokens, in the same way."""
        return float(_interpolate(num_tokens, self.vocabulary_sizes, self.exit))

    @property
    def row_costs(self) -> tuple[float, ...]:
        """Time of a layer at 1, 2, 4 and 8 positions, that at 1 being 1, for `DraftPlan`."""
        times = self.layer_seconds(np.array(MEASURED_ROWS))
        return tuple((times / times[0]).tolist())

    def dense_seconds(self, num_tokens: int, num_hidden_layers: int) -> float:
        """Time of the model's own generation of so many tokens, beside the prompt's pass."""
        per_token = num_hidden_layers * self.layer_seconds(1) + self.head_seconds(1) + self.step
        return float(num_tokens * per_token)

    def to_dict(self) -> dict[str, Any]:
        """Give the fields as JSON has them."""
        return {n: list(v) if isinstance(v, tuple) else v for n, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Costs:
        """Read what `to_dict` gave."""
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items()
        }
        return cls(**fields)


@torch.no_grad()
def measure_costs(
    backbone: Backbone,
    exits: Exits,
    prompt: Sequence[int],
    *,
    vocabularies: Sequence[tuple[int, ...] | None],
    rows: Sequence[int] = MEASURED_ROWS,
    num_repetitions: int = NUM_REPETITIONS,
) -> Costs:
    """Time a model's parts where it lies, on positions behind a prompt.

    One pass of the model at each number of rows gives layers and head; passes of all kinds take
    turns, so that a machine which slows down for a while does so for all of them.

    Args:
        backbone: The model's parts; a mixture in the final norm's place counts as head.
        exits: Its exits.
        prompt: Token ids that stand before the positions, of a length as in use.
        vocabularies: Token ids that an exit may choose among, of several sizes; `None` for all.
        rows: Positions of a pass to measure, increasing from 1.
        num_repetitions: Passes of each kind.

    Returns:
        Medians.
    """
    model, device = backbone.model, backbone.model.device
    ids = torch.tensor([[*prompt, *[prompt[-1]] * max(rows)]], device=device)
    given = ids[:, : len(prompt)]
    known = {len(one or range(backbone.vocab_size)): one for one in vocabularies}
    # Any state does: no time depends on what is in it.
    states = torch.ones(1, backbone.hidden_size, device=device)
    heads = {size: DraftHead(backbone, known[size]) for size in sorted(known)}
    times: dict[Any, list[float]] = defaultdict(list)
    with evaluating(model), torch.inference_mode(), _Stopwatch(backbone) as stopwatch:
        cache = DynamicCache(config=model.config)
        model(input_ids=given, past_key_values=cache, use_cache=True)
        for turn in range(num_repetitions + 1):
            for number in rows:
                positions = ids[:, len(prompt) : len(prompt) + number]
                layers, head = stopwatch.run(positions, past_key_values=copy.deepcopy(cache))
                times["layer", number].append(layers / backbone.num_hidden_layers)
                times["head", number].append(head)
            for size, draft_head in heads.items():
                ask = partial(_ask, exits, draft_head, states)
                times["exit", size].append(_time(ask, device))
            if turn % 3 == 0:
                short, long = (
                    _time(partial(_generate, backbone, given, number), device)
                    for number in (1, 1 + NUM_GENERATED)
                )
                times["prompt"].append(short)
                times["token"].append((long - short) / NUM_GENERATED)
    # The first turn warms up.
    medians = {kind: statistics.median(own[1:] or own) for kind, own in times.items()}
    one = backbone.num_hidden_layers * medians["layer", rows[0]] + medians["head", rows[0]]
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return Costs(
        rows=tuple(rows),
        layer=tuple(medians["layer", number] for number in rows),
        head=tuple(medians["head", number] for number in rows),
        vocabulary_sizes=tuple(heads),
        exit=tuple(medians["exit", size] for size in heads),
        step=max(medians["token"] - one, 0.0),
        prompt=medians["prompt"],
        num_prompt_tokens=len(prompt),
        device=f"{device.type}{threads}",
        dtype=str(backbone.head_weight.dtype).removeprefix("torch."),
    )


class _Stopwatch:
    """Passes of a model with the times at which layers, norm and head are reached."""

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self.moments: list[float] = []
        self._handles: list[RemovableHandle] = []
        self._head: Any = backbone.head
        self._own: Any = None

    def __enter__(self) -> _Stopwatch:
        self._own = self._head.forward
        self._head.forward = self._multiply  # as fast generation multiplies what it verifies
        stages = (self.backbone.layers[0], self.backbone.final_norm)
        self._handles = [one.register_forward_pre_hook(self._note) for one in stages]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        del self._head.forward
        if self._head.forward != self._own:  # it was another module's work, such as accelerate's
            self._head.forward = self._own

    def _multiply(self, states: Float[Tensor, "*batch hidden"], *args: Any, **options: Any) -> Any:
        logits = multiply_few(self._head, states)
        return self._own(states, *args, **options) if logits is None else logits

    def run(self, input_ids: Int[Tensor, "1 rows"], **options: Any) -> tuple[float, float]:
        """Run the model once, and give the seconds of its layers and of its head."""
        self.moments = []
        self.backbone.model(input_ids=input_ids, use_cache=True, **options)
        self._note()
        below, above, end = self.moments
        return above - below, end - above

    def _note(self, *_: Any) -> None:
        _wait(self.backbone.model.device)
        self.moments.append(time.perf_counter())


def _ask(exits: Exits, head: DraftHead, states: Float[Tensor, "1 hidden"]) -> tuple[float, int]:
    """Ask an exit for its best token, and how sure it is of it."""
    best = head(exits(exits.layers[0], states)).softmax(-1).max(-1)
    return float(best.values), int(best.indices)


def _generate(backbone: Backbone, input_ids: Int[Tensor, "1 seq"], num_tokens: int) -> None:
    """Let the model's own loop write a number of tokens."""
    settings = GenerationConfig(
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        use_cache=True,
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        pad_token_id=0,
    )
    backbone.model.generate(  # pyrefly: ignore[not-callable]
        input_ids, attention_mask=torch.ones_like(input_ids), generation_config=settings
    )


def _time(call: Any, device: torch.device) -> float:
    """Time a call."""
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    """Let the device come to the end of what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _interpolate(
    at: int | Int[np.ndarray, "*any"], sizes: Sequence[int], times: Sequence[float]
) -> Float[np.ndarray, "*any"]:
    """Read a time off the line through measured ones; it goes on beyond the last, never down."""
    places = np.asarray(at)
    values = np.interp(places, sizes, times)
    if len(sizes) > 1:
        slope = max(times[-1] - times[-2], 0.0) / (sizes[-1] - sizes[-2])
        values = values + slope * np.maximum(places - sizes[-1], 0)
    return np.asarray(values)
