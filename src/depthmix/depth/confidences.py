"""How sure exits are of the tokens that a model writes, and whether it writes them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from depthmix.depth.capture_all import capture_all
from depthmix.method.architecture import evaluating
from depthmix.method.backbone import Backbone
from depthmix.method.exits import Exits

CHUNK_LOGITS = 2**24
"""Logits of one exit that are in memory at once: 64 MiB, and a handful of buffers of that size."""


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """A prompt, and what the model itself wrote after it, greedily."""

    prompt: tuple[int, ...]
    """Token ids that were given."""

    tokens: tuple[int, ...]
    """Token ids that the model wrote, the end of the text among them where it came to one."""

    ended: bool
    """Whether it came to one, and was not cut off."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Confidences:
    """What exits say of each token of some texts. Beyond a text's end, confidences are 0."""

    layers: tuple[int, ...]
    """Layers of the exits."""

    vocabulary: tuple[int, ...] | None
    """Token ids that the exits chose among; `None` for all."""

    confidence: Float[np.ndarray, "exits texts tokens"]
    """Probability of each exit's best token among `vocabulary`."""

    agrees: Bool[np.ndarray, "exits texts tokens"]
    """Whether that is the token that the model wrote."""

    lengths: Int[np.ndarray, " texts"]
    """Tokens of each text."""

    ended: Bool[np.ndarray, " texts"]
    """Whether the model ended it, and it was not cut off."""

    coverage: float
    """Share of the tokens that are in `vocabulary`."""

    def choose(self, texts: Sequence[int]) -> Confidences:
        """Keep some of the texts.

        Args:
            texts: Their places.

        Returns:
            What exits say of them. The coverage stays that of all.
        """
        places = np.asarray(texts, dtype=int)
        return replace(
            self,
            confidence=self.confidence[:, places],
            agrees=self.agrees[:, places],
            lengths=self.lengths[places],
            ended=self.ended[places],
        )


@torch.no_grad()
def record_confidences(
    backbone: Backbone,
    exits: Exits,
    texts: Sequence[Continuation],
    *,
    vocabularies: Sequence[Sequence[int] | None],
    batch_size: int = 8,
) -> list[Confidences]:
    r"""Ask each exit after each token of texts that the model wrote, in one pass over each text.

    An exit's confidence is the largest of the probabilities $\\mathrm{softmax}\\,\\phi(E_i(h_i))$
    among the tokens of a vocabulary, as in generation.

    Args:
        backbone: The model's parts.
        exits: Its exits.
        texts: Prompts with the model's own continuations.
        vocabularies: Sets of token ids that exits may choose among, increasing; `None` for all.
        batch_size: Texts that are run together.

    Returns:
        One recording per vocabulary, with the texts in the order given.

    Raises:
        ValueError: If no text has a token.
    """
    if not any(text.tokens for text in texts):
        raise ValueError(
            f"`texts` must hold tokens that the model wrote, and the {len(texts)} given hold none."
        )
    lengths = np.array([len(text.tokens) for text in texts])
    shape = (len(vocabularies), len(exits.layers), len(texts), int(lengths.max()))
    confidence, agrees = np.zeros(shape, dtype=np.float32), np.zeros(shape, dtype=bool)
    # Like with like in a batch.
    order = sorted(range(len(texts)), key=lambda n: len(texts[n].prompt) + len(texts[n].tokens))
    with evaluating(backbone.model), evaluating(exits):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            _record_batch(backbone, exits, texts, batch, vocabularies, confidence, agrees)
    written = [token for text in texts for token in text.tokens]
    return [
        Confidences(
            layers=exits.layers,
            vocabulary=None if known is None else tuple(known),
            confidence=confidence[number],
            agrees=agrees[number],
            lengths=lengths,
            ended=np.array([text.ended for text in texts]),
            coverage=1.0 if known is None else float(np.isin(written, known).mean()),
        )
        for number, known in enumerate(vocabularies)
    ]


def _record_batch(
    backbone: Backbone,
    exits: Exits,
    texts: Sequence[Continuation],
    batch: Sequence[int],
    vocabularies: Sequence[Sequence[int] | None],
    confidence: Float[np.ndarray, "vocabularies exits texts tokens"],
    agrees: Bool[np.ndarray, "vocabularies exits texts tokens"],
) -> None:
    """Write down what exits say of the tokens of some texts."""
    rows = [torch.tensor([*texts[n].prompt, *texts[n].tokens]) for n in batch]
    input_ids = pad_sequence(rows, batch_first=True)
    attention_mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    states = capture_all(
        backbone, input_ids, attention_mask=attention_mask, depths=exits.layers
    ).states
    places = [
        (row, n, len(texts[n].prompt) - 1, number)
        for row, n in enumerate(batch)
        for number in range(len(texts[n].tokens))
    ]
    row, text, before, number = np.array(places).reshape(-1, 4).T
    written = torch.tensor([texts[n].tokens[i] for n, i in zip(text, number, strict=True)])
    for place, layer in enumerate(exits.layers):
        state = states[layer]
        asked = state[torch.from_numpy(row), torch.from_numpy(before + number)]  # (tokens, hidden)
        done = 0
        for logits in _predict(backbone, exits, layer, asked):
            these = slice(done, done + len(logits))
            done += len(logits)
            for kind, known in enumerate(vocabularies):
                best, chosen = _choose_best(logits, known)
                at = (kind, place, text[these], number[these])
                confidence[at] = best.cpu().numpy()
                agrees[at] = (chosen.cpu() == written[these]).numpy()


def _predict(
    backbone: Backbone, exits: Exits, layer: int, states: Float[Tensor, "tokens hidden"]
) -> Iterator[Float[Tensor, "some vocab"]]:
    """Give an exit's logits, some tokens at a time."""
    for part in states.split(max(CHUNK_LOGITS // backbone.vocab_size, 1)):
        normed = exits(layer, part).to(backbone.head_weight.device)
        yield backbone.unembed(normed.to(backbone.head_dtype(states.dtype))).float()


def _choose_best(
    logits: Float[Tensor, "tokens vocab"], vocabulary: Sequence[int] | None
) -> tuple[Float[Tensor, " tokens"], Int[Tensor, " tokens"]]:
    """Give the best token of a vocabulary, and its probability within it."""
    if vocabulary is None:
        best = logits.softmax(-1).max(-1)
        return best.values, best.indices
    known = torch.tensor(vocabulary, device=logits.device)
    best = logits[:, known].softmax(-1).max(-1)
    return best.values, known[best.indices]
