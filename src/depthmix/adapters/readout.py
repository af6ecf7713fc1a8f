"""Which depth of a model answers: the ensemble, the final layer, or one late layer alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from depthmix.adapters.attach import attach, detach
from depthmix.method.config import Readout
from depthmix.method.norm import find_mixture_norm

_TURN = threading.Lock()


@contextmanager
def reading_out(
    model: nn.Module,
    readout: Readout,
    *,
    final_norm: str | None = None,
    decoder_layers: str | None = None,
) -> Iterator[None]:
    r"""Let one layer alone predict for a while, $\ell_i = \phi(N_i(h_i))$ (method, section 1).

    A late layer of the mixture answers with its own norm $N_i$, the final layer with $N_p$ unless
    it has one of its own. A model without a mixture answers with its pretrained norm at any layer
    (the logit lens), one whose adapter is disabled at the final one alone. All layers run.

    Args:
        model: A language model, with or without a mixture; put back as it was afterwards.
        readout: Layer that predicts, from 1 to `num_hidden_layers`; `final` is the last one, and
            `ensemble` changes nothing.
        final_norm: Name of the final norm of a model without a mixture, where it cannot be found by
            itself.
        decoder_layers: Name of its `ModuleList` of layers, likewise.

    Raises:
        RuntimeError: If another thread reads the model out meanwhile.
        ValueError: If the mixture does not hold that layer, or the model has no such layer.
    """
    if readout == "ensemble":
        yield
        return
    norm = find_mixture_norm(model)
    if norm is not None and norm.active_mixture is not None:
        late_layers = norm.active_mixture.late_layers
        layer = late_layers[-1] if readout == "final" else readout
        if layer not in late_layers:
            choices = ", ".join(map(str, late_layers))
            raise ValueError(
                f"`layer` must be one of the mixture's late layers {choices} (or `final` or "
                f"`ensemble`), got {readout}."
            )
        before = None
        try:
            with _TURN:
                if norm.readout is not None and norm.reader != threading.get_ident():
                    raise RuntimeError(_read_elsewhere(norm.readout))
                before = norm.readout, norm.reader
                norm.readout, norm.reader = layer, threading.get_ident()
            yield
        finally:
            if before is not None:
                norm.readout, norm.reader = before
        return
    if norm is not None and readout not in ("final", norm.backbone.num_hidden_layers):
        raise ValueError(
            f"`layer` must be `final` or `ensemble` while the adapter is disabled, got {readout}; "
            "load the base model by itself to read it out at any layer."
        )
    decoder = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(decoder, PreTrainedModel)
    num_layers = decoder.config.get_text_config().num_hidden_layers
    if readout in ("final", num_layers):
        yield
        return
    if readout not in range(1, num_layers):
        raise ValueError(
            f"`layer` must be between 1 and {num_layers} (the model has {num_layers} layers), "
            f"got {readout}."
        )
    assert isinstance(readout, int)
    attached = False
    try:
        with _TURN:
            if find_mixture_norm(decoder) is not None:
                raise RuntimeError(_read_elsewhere(None))
            attached = True  # an interrupt may come before `attach` returns
            lens = attach(
                decoder,
                late_layers=[readout, num_layers],
                train_late_norms=False,
                final_norm=final_norm,
                decoder_layers=decoder_layers,
            )
            lens.readout, lens.reader = readout, threading.get_ident()
        yield
    finally:
        if attached and find_mixture_norm(decoder) is not None:
            detach(decoder)


def _read_elsewhere(layer: int | None) -> str:
    where = "" if layer is None else f" at layer {layer}"
    return (
        f"`model` is read out{where} by another thread, for all who use it; wait until that has "
        "ended, or use a copy of the model."
    )
