"""Which layers take part in an ensemble, chosen by a probe of the pretrained model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from depthmix.data.forms import Record
from depthmix.data.spec import TrainingTemplate
from depthmix.data.tokens import to_token_sequences
from depthmix.depth.probe import Probe, probe_layers
from depthmix.method.config import IGNORE_INDEX, MixtureConfig

JSD_THRESHOLD = math.log(2) / 2
"""Half of the largest divergence, in nats: a token drawn from one of two predictions then tells
half a bit about which of the two it came from."""

SMALLEST_ENSEMBLE = 2
"""Layers that are chosen at least; one alone is no ensemble."""

LARGEST_ENSEMBLE = 6
"""Layers that are chosen at most; each costs a head product each way in distillation."""

NUM_PROBED_RECORDS = 64
"""Records that are probed, from the start of the data."""

NUM_PROBED_TOKENS = 16
"""Tokens per record that are read out at most, spread evenly: every layer costs a head product."""

PROBED_LENGTH = 256
"""Tokens per record that are run where no training says otherwise (the paper's cut-off)."""


@dataclass(frozen=True, kw_only=True)
class LayerChoice:
    """Layers that a probe speaks for; `str` makes a printable table with the reason."""

    late_layers: tuple[int, ...]
    """Increasing layer numbers that end at the final layer."""

    reason: str
    """The rule that gave them."""

    probe: Probe
    """The readings of all layers."""

    def __str__(self) -> str:
        layers = ", ".join(map(str, self.late_layers))
        return f'{self.probe}\n`late_layers = "auto"` takes {layers}: {self.reason}.'


def choose_late_layers(
    probe: Probe,
    *,
    threshold: float = JSD_THRESHOLD,
    smallest: int = SMALLEST_ENSEMBLE,
    largest: int = LARGEST_ENSEMBLE,
) -> list[int]:
    """Choose the layers of an ensemble by how far they are from the final one.

    From the final layer down, layers are taken until one's divergence exceeds `threshold`. What is
    further away predicts something else: it would have to be trained before its vote helps. What is
    nearer is taken all the same, since the layers below it differ more, and an ensemble needs both.

    Args:
        probe: Readings of all layers.
        threshold: Largest mean Jensen-Shannon divergence to the final layer, in nats.
        smallest: Layers to take at least, however far they are, the final one among them.
        largest: Layers to take at most. The first layer is never taken beyond `smallest`: below it
            there would be nothing to adapt.

    Returns:
        Increasing layer numbers that end at the final layer, as `late_layers` takes them.

    Raises:
        ValueError: If `smallest` and `largest` leave no choice.
    """
    num_layers = len(probe.layers)
    if not 1 <= smallest <= min(largest, num_layers):
        raise ValueError(
            f"`smallest` must be between 1 and both `largest`, which is {largest}, and the model's "
            f"{num_layers} layers, got {smallest}."
        )
    near = [reading.jsd.mean <= threshold for reading in reversed(probe.layers)]
    num_near = near.index(False) if False in near else num_layers
    num_chosen = max(smallest, min(num_near, largest, num_layers - 1))
    return list(range(num_layers - num_chosen + 1, num_layers + 1))


def choose_on_records(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    config: MixtureConfig,
    *,
    template: TrainingTemplate = "auto",
    max_length: int | None = PROBED_LENGTH,
    keeps_end: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> LayerChoice:
    """Probe a pretrained model on the first of some records, and choose its late layers.

    Args:
        model: The model, on the device where it is to run.
        tokenizer: Its tokenizer.
        records: In a form of `to_token_sequences`. The first `NUM_PROBED_RECORDS` are run, and of
            each one's completion `NUM_PROBED_TOKENS` are read out at most.
        config: The mixture's options: its `top_k` asks for as many layers at least.
        template: How records become text.
        max_length: Tokens per record that are run; `None` runs all.
        keeps_end: Run the last of them instead of the first.
        variables: Further variables of the chat template, where a record sets no others.

    Returns:
        The layers, with the probe and the reason.

    Raises:
        ValueError: If a record or the model does not fit.
    """
    first = records[:NUM_PROBED_RECORDS]
    sequences = to_token_sequences(
        first,
        template,
        tokenizer,
        max_length=max_length,
        keeps_end=keeps_end,
        variables=variables,
    )
    thinned = [{**row, "labels": _thin(row["labels"])} for row in sequences]
    probe = probe_layers(
        model, thinned, final_norm=config.final_norm, decoder_layers=config.decoder_layers
    )
    smallest = max(SMALLEST_ENSEMBLE, config.top_k or 1)
    largest = max(LARGEST_ENSEMBLE, smallest)
    return LayerChoice(
        late_layers=tuple(choose_late_layers(probe, smallest=smallest, largest=largest)),
        reason=f"the final layer and those next to it whose divergence from it is at most "
        f"{JSD_THRESHOLD:.3f} nats, {smallest} to {largest} layers in all",
        probe=probe,
    )


def _thin(labels: Sequence[int]) -> list[int]:
    """Keep `NUM_PROBED_TOKENS` labels at most, evenly spread; the first token has no prediction."""
    places = [place for place, label in enumerate(labels) if place and label != IGNORE_INDEX]
    step = max(math.ceil(len(places) / NUM_PROBED_TOKENS), 1)
    kept = set(places[::step])
    return [label if place in kept else IGNORE_INDEX for place, label in enumerate(labels)]
