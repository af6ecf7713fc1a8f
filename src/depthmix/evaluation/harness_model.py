"""lm-eval's Hugging Face model, with a beam search that is one."""

from __future__ import annotations

from typing import Any

from lm_eval.models.huggingface import HFLM
from torch import Tensor


class HarnessModel(HFLM):
    """lm-eval's `HFLM`, whose beam searches end where the model ends them.

    `HFLM` always stops at strings, at least at the text of the end-of-sequence token, and its
    criterion takes row i of a batch for request i. With beams the first rows all belong to the
    first request, and once they hold the string, the search ends for every request of the batch.
    Here a beam search ends by tokens and length alone. The text is cut at the strings afterwards,
    as always, so they only cost time.
    """

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> Tensor:
        """Generate, without stop strings where there are beams."""
        if generation_kwargs.get("num_beams", 1) > 1:
            stop = []
        return super()._model_generate(context, max_length, stop, **generation_kwargs)
