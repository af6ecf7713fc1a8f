"""lm-eval's model of the hub, mended where it would not measure what it says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from lm_eval.models.huggingface import HFLM
from torch import Tensor, nn

from depthmix.data.rendering import encode
from depthmix.models.continuation import pad_prompts


class HarnessModel(HFLM):
    """lm-eval's `HFLM`, with prompts as in training, and beam searches that the model ends.

    `HFLM` always stops at strings, at least at the text of the end-of-sequence token, and its
    criterion takes row i of a batch for request i. With beams the first rows all belong to the
    first request, and once they hold the string, the search ends for every request of the batch.
    Here a beam search ends by tokens and length alone. The text is cut at the strings afterwards,
    as always, so they only cost time.

    `HFLM` tokenises prompts as text. Prompts that were rendered before are known by their text and
    read as their tokens: what a chat template wrote gets no further special tokens.

    Args:
        prompts: Tokens of rendered prompts, by their text.
        continuations: Tokens of prompts and of texts that go on from them, by the text of both.
        options: As for `HFLM`.
    """

    def __init__(
        self,
        *,
        prompts: Mapping[str, Sequence[int]] | None = None,
        continuations: Mapping[tuple[str, str], tuple[Sequence[int], Sequence[int]]] | None = None,
        **options: Any,
    ) -> None:
        self._prompts = dict(prompts or {})
        self._continuations = dict(continuations or {})
        with _left_tied(options["pretrained"]):
            super().__init__(**options)

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **kwargs: Any,
    ) -> list[int]:
        """Give the tokens of a rendered prompt, or make those of any other text."""
        if add_special_tokens is not None or self.add_bos_token is not None:
            return super().tok_encode(string, add_special_tokens, left_truncate_len, **kwargs)
        ids = list(self._prompts.get(string) or encode(string, self.tokenizer))  # pyrefly: ignore[bad-argument-type]
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def tok_batch_encode(
        self,
        strings: Sequence[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Give the tokens of several prompts, padded on the left."""
        if padding_side != "left" or truncation or self.add_bos_token is not None:
            return super().tok_batch_encode(
                list(strings), padding_side, left_truncate_len, truncation
            )
        rows = [self.tok_encode(text, left_truncate_len=left_truncate_len) for text in strings]
        batch = pad_prompts(rows, self.tokenizer)  # pyrefly: ignore[bad-argument-type]
        return batch["input_ids"], batch["attention_mask"]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Give the tokens of a rendered prompt with its continuation, or make those of others."""
        known = self._continuations.get((context, continuation))
        if known is None:
            return super()._encode_pair(context, continuation)
        # Something must predict the first token.
        return list(known[0]) or [self.prefix_token_id], list(known[1])

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Measure continuations; those of rendered prompts by their tokens, also of empty ones."""
        pairs = [request.args for request in requests]
        if not all(pair in self._continuations for pair in pairs):
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        tokens = [(pair, *self._encode_pair(*pair)) for pair in pairs]
        longest = max(len(continuation) for _, _, continuation in tokens)
        if longest > self.max_length:
            raise ValueError(
                f"`records` must hold texts of at most {self.max_length} tokens, as many as the "
                f"model can read, and one has {longest}; shorten it, or remove the record."
            )
        return self._loglikelihood_tokens(tokens, disable_tqdm=disable_tqdm)

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> Tensor:
        """Generate, without stop strings where there are beams."""
        if generation_kwargs.get("num_beams", 1) > 1:
            stop = []
        return super()._model_generate(context, max_length, stop, **generation_kwargs)


@contextmanager
def _left_tied(model: nn.Module) -> Iterator[None]:
    """Let `HFLM` not tie weights again, which fails where an adapter trains some of them."""
    model.__dict__["tie_weights"] = lambda *_, **__: None
    try:
        yield
    finally:
        del model.__dict__["tie_weights"]
