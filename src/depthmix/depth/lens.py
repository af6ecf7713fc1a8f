"""What every layer predicts after every token of one text, as plain numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from depthmix.data.rendering import Prompt, tokenise_prompt
from depthmix.decoding.draft_plan import DraftPlan
from depthmix.depth.capture_all import capture_all
from depthmix.depth.distributions import Distribution, distribute, jensen_shannon, measure
from depthmix.depth.lens_drafts import Drafts, read_drafts
from depthmix.depth.lens_table import write_guesses
from depthmix.depth.token_texts import token_texts
from depthmix.method.architecture import evaluating, find_backbone
from depthmix.method.backbone import Backbone
from depthmix.method.config import Readout
from depthmix.method.exits import Exits
from depthmix.method.norm import active_mixture, find_mixture_norm

BLOCK_LOGITS = 2**25
"""Logits of one product with the head: 128 MiB in float32. Each product reads all of the head, so
products of less text cost up to twice as much per token."""

PIECE_LOGITS = 2**22
"""Logits that are measured at once: 16 MiB. Larger pieces leave a CPU's caches, and softmax and
divergences then take twice as long."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What one layer, or the ensemble, predicts after each token of a text.

    Fields have one entry per token. Those that say how the true next token fared have one less,
    since nothing follows the last token.
    """

    readout: Readout
    """Number of the layer, or `ensemble`."""

    top_tokens: tuple[tuple[str, ...], ...]
    """The likeliest next tokens as text, likeliest first."""

    top_probabilities: tuple[tuple[float, ...], ...]
    """Probabilities of `top_tokens`, 0 to 1."""

    entropy: tuple[float, ...]
    """Entropy of the prediction, nats."""

    kl_to_final: tuple[float, ...]
    """KL(P_i ‖ P_n) to the final layer's prediction, nats, 0 for that layer itself."""

    jsd_to_ensemble: tuple[float, ...] | None
    """Jensen-Shannon divergence to the ensemble, nats, at most ln 2; `None` where the layer is no
    late layer of a mixture."""

    loss: tuple[float, ...]
    """Cross-entropy of the true next token, nats."""

    probability: tuple[float, ...]
    """Probability of the true next token, 0 to 1."""

    rank: tuple[int, ...]
    """Place of the true next token among all by probability, 1 for the likeliest."""


@dataclass(frozen=True, kw_only=True)
class Routing:
    """How much each late layer counts after each token of a text."""

    late_layers: tuple[int, ...]
    """The layers of the ensemble."""

    weights: tuple[tuple[float, ...], ...]
    """For each token, one weight per late layer; they sum to one."""

    entropy: tuple[float, ...]
    """Entropy of a token's weights, nats: 0 for one layer alone, ln k for all alike."""

    mean_depth: tuple[float, ...]
    """Mean depth that a token uses, `Σ G_i i`, in layers."""


@dataclass(frozen=True, kw_only=True)
class Lens:
    """One text as a model sees it at each depth; `asdict` makes it ready for JSON."""

    tokens: tuple[str, ...]
    """The text's tokens, special ones included. Parts of a character are written `\\xf0`."""

    layers: tuple[Prediction, ...]
    """One per layer that was read out, in increasing order."""

    ensemble: Prediction
    """The model's own prediction; without a mixture that is the final layer's."""

    routing: Routing | None
    """Routing weights; `None` without a mixture."""

    drafts: Drafts | None = None
    """What exits would draft; `None` where none were given."""

    opening: int = 1
    """Token that a page shows first, counted from 0, such as an answer's first."""

    def _repr_html_(self) -> str:
        """Show the likeliest guess of each layer in a notebook, the deepest on top."""
        reads = [*([self.ensemble] if self.routing else []), *reversed(self.layers)]
        guesses = [(str(read.readout), read.top_tokens) for read in reads]
        return write_guesses(self.tokens, guesses, opening=self.opening)


@torch.no_grad()
def look(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    text: str | Prompt,
    *,
    layers: Sequence[int] | None = None,
    top: int = 5,
    drafting: tuple[Exits, DraftPlan] | None = None,
) -> Lens:
    r"""Read out layers and ensemble after every token of a text, in one forward pass.

    Late layers of a mixture predict by their own norm, $P_i = \mathrm{softmax}\,\phi(N_i(h_i))$,
    all others by the pretrained one (the logit lens). Logits are built layer by layer on blocks of
    the text; softmax and all measures are float32.

    Args:
        model: A decoder-only language model on the device where it is to run, with a mixture, with
            another adapter, or untuned.
        tokenizer: Its tokenizer, which adds the special tokens that it always adds, unless the text
            begins with one.
        text: What the model reads: a text, or a rendered prompt, whose tokens stand.
        layers: Layers to read out, from 1 to `num_hidden_layers`; `None` takes all.
        top: How many of the likeliest tokens to keep.
        drafting: The model's exits and how they draft, to be told what they would draft.

    Returns:
        The predictions, the routing weights of a mixture, and the drafts of exits.

    Raises:
        ValueError: If the text has no token or more than the model takes, there is no such layer,
            or a part of the model cannot be found.
        TypeError: If the model is no decoder-only language model.
    """
    prompt = tokenise_prompt(text, tokenizer) if isinstance(text, str) else text
    ids = torch.tensor(prompt.token_ids, dtype=torch.long)
    norm, mixture = find_mixture_norm(model), active_mixture(model)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    backbone = find_backbone(base) if norm is None else norm.backbone
    _check_length(backbone, len(ids))
    final = backbone.num_hidden_layers
    chosen = _check_layers(layers, final)
    vocabulary = backbone.vocab_size
    if not 1 <= top <= vocabulary:
        raise ValueError(
            f"`top` must be between 1 and {vocabulary:,} (the model knows {vocabulary:,} tokens), "
            f"got {top}; 5 is the default."
        )
    late_layers = () if mixture is None else mixture.late_layers
    depths = {*chosen, final, *(layer - 1 for layer in late_layers[:1])}
    depths |= set(() if drafting is None else drafting[1].exits)
    with evaluating(backbone.model):
        captured = capture_all(backbone, ids[None], depths=depths)
        states = captured.states
        pretrained = backbone.final_norm if norm is None else norm.base_layer
        normed: dict[Readout, Tensor] = {
            layer: norm.answer_alone(layer, states[layer])
            if norm is not None and layer in late_layers
            else pretrained(states[layer])
            for layer in (*chosen, final)
        }
    readouts: tuple[Readout, ...] = chosen if mixture is None else (*chosen, "ensemble")
    readouts = readouts if final in readouts else (*readouts, final)
    normed["ensemble"] = captured.answer
    measured = _measure_all(backbone, normed, readouts, ids, late_layers, top)
    known = {number for columns in measured.values() for number in columns["top"].unique().tolist()}
    texts = dict(zip(known, token_texts(tokenizer, list(known)), strict=True))
    predictions = {r: _to_prediction(r, columns, texts) for r, columns in measured.items()}
    return Lens(
        tokens=token_texts(tokenizer, ids.tolist()),
        layers=tuple(predictions[layer] for layer in chosen),
        ensemble=predictions.get("ensemble") or replace(predictions[final], readout="ensemble"),
        routing=None
        if mixture is None
        else _to_routing(late_layers, mixture.weigh(states[late_layers[0] - 1])[0].cpu()),
        drafts=None
        if drafting is None
        else read_drafts(backbone, *drafting, states, captured.answer, tokenizer),
    )


def _check_length(backbone: Backbone, num_tokens: int) -> None:
    """Refuse a text without tokens, or with more than the model takes."""
    config = backbone.model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or num_tokens
    if not 1 <= num_tokens <= limit:
        raise ValueError(
            f"`text` must have between 1 and {limit:,} tokens, which is what the model takes, got "
            f"{num_tokens:,}; pass another part of it."
        )


def _check_layers(layers: Sequence[int] | None, num_layers: int) -> tuple[int, ...]:
    """Put the layers in order, and refuse those that the model lacks."""
    chosen = tuple(sorted(set(range(1, num_layers + 1) if layers is None else layers)))
    if not chosen or not 1 <= chosen[0] <= chosen[-1] <= num_layers:
        raise ValueError(
            f"`layers` must be between 1 and {num_layers} (the model has {num_layers} layers), got "
            f"{list(chosen)}; leave it out for all of them."
        )
    return chosen


def _measure_all(
    backbone: Backbone,
    normed: dict[Readout, Float[Tensor, "1 seq hidden"]],
    readouts: Sequence[Readout],
    ids: Int[Tensor, " seq"],
    late_layers: Sequence[int],
    top: int,
) -> dict[Readout, dict[str, Tensor]]:
    """Measure each read-out's predictions, block by block of the text."""
    device = backbone.head_weight.device
    block = max(BLOCK_LOGITS // backbone.vocab_size, 1)
    pieces: dict[Readout, list[dict[str, Tensor]]] = {readout: [] for readout in readouts}
    for start in range(0, len(ids), block):
        states = {r: normed[r][0, start : start + block].to(device) for r in readouts}
        targets = ids[start + 1 : start + 1 + block].to(device)
        for readout, measured in _measure_block(backbone, states, targets, late_layers, top):
            pieces[readout] += measured
    return {
        readout: {name: torch.cat([piece[name] for piece in found]) for name in found[0]}
        for readout, found in pieces.items()
    }


def _measure_block(
    backbone: Backbone,
    states: dict[Readout, Float[Tensor, "tokens hidden"]],
    targets: Int[Tensor, " targets"],
    late_layers: Sequence[int],
    top: int,
) -> Iterator[tuple[Readout, list[dict[str, Tensor]]]]:
    """Measure read-outs in turn: one product with the head for each, and measures by pieces."""
    final = backbone.num_hidden_layers
    compared: tuple[Readout, ...] = (final, "ensemble")  # with others
    vocabulary = backbone.vocab_size
    length = max(PIECE_LOGITS // vocabulary, 1)
    spare = torch.empty(length, vocabulary, dtype=torch.float32, device=targets.device)

    def predict(readout: Readout) -> Iterator[Distribution]:
        # What no other is compared with is measured and forgotten, and shares memory.
        for piece in backbone.unembed(states[readout]).split(length):
            out = None if readout in compared else spare[: len(piece)]
            yield distribute(piece.float(), out)

    def measure_piece(readout: Readout, number: int, predicted: Distribution) -> dict[str, Tensor]:
        true = targets[number * length : (number + 1) * length]
        measures = measure(predicted, shared[final][number], true, top)
        if readout in late_layers:
            measures["jsd_to_ensemble"] = jensen_shannon(predicted, shared["ensemble"][number])
        return {name: value.cpu() for name, value in measures.items()}

    shared = {readout: list(predict(readout)) for readout in compared if readout in states}
    for readout in states:
        # What enumerates must not outlive this, since it would keep the last piece and its block.
        measured = [
            measure_piece(readout, number, predicted)
            for number, predicted in enumerate(shared.get(readout) or predict(readout))
        ]
        yield readout, measured


def _to_prediction(
    readout: Readout, columns: dict[str, Tensor], texts: dict[int, str]
) -> Prediction:
    """Turn measures into plain numbers and texts."""
    # An array lists its numbers many times faster than a tensor.
    plain = {name: column.numpy().tolist() for name, column in columns.items()}
    return Prediction(
        readout=readout,
        top_tokens=tuple(tuple(texts[number] for number in row) for row in plain.pop("top")),
        top_probabilities=tuple(map(tuple, plain.pop("top_probabilities"))),
        jsd_to_ensemble=tuple(jsd) if (jsd := plain.pop("jsd_to_ensemble", None)) else None,
        **{name: tuple(column) for name, column in plain.items()},
    )


def _to_routing(late_layers: tuple[int, ...], weights: Float[Tensor, "seq routes"]) -> Routing:
    """Turn routing weights into plain numbers."""
    layers = torch.tensor(late_layers, dtype=weights.dtype)
    return Routing(
        late_layers=late_layers,
        weights=tuple(map(tuple, weights.tolist())),
        entropy=tuple(torch.special.entr(weights).sum(-1).tolist()),
        mean_depth=tuple((weights @ layers).tolist()),
    )
