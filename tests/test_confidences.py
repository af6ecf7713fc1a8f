"""What exits are recorded to say of a model's own texts, and the tokens they choose among."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import get_peft_model

from depthmix import MoDEConfig
from depthmix.depth.confidences import Continuation, record_confidences
from depthmix.depth.draft_vocabulary import fill_vocabulary, list_vocabularies
from depthmix.method.exits import Exits
from depthmix.method.parts import find_parts, new_exits
from models import random_ids, randomise, tiny_model


def make_exits(model, layers=(1, 3)) -> Exits:
    backbone, norm = find_parts(model)
    exits = new_exits(backbone, norm, layers, rank=3)
    randomise(exits, seed=4, only_trainable=True)
    return exits.eval()


def make_texts(*shapes: tuple[int, int]) -> list[Continuation]:
    return [
        Continuation(
            prompt=tuple(random_ids(given, seed=number).tolist()),
            tokens=tuple(random_ids(written, seed=50 + number).tolist()),
            ended=bool(number % 2),
        )
        for number, (given, written) in enumerate(shapes)
    ]


def tune(model):
    """A model with a mixture, whose layers are read below it."""
    config = MoDEConfig(target_modules=["q_proj"], r=2, late_layers=2)
    tuned = get_peft_model(model, config)
    randomise(tuned, seed=3, only_trainable=True)
    return tuned.eval()


@pytest.mark.parametrize(
    ("architecture", "wrap"), [("llama", None), ("gemma2", None), ("opt", None), ("llama", tune)]
)
def test_each_token_is_asked_where_it_is_to_come(architecture, wrap):
    model = tiny_model(architecture)
    model = model if wrap is None else wrap(model)
    backbone, _ = find_parts(model)
    exits, texts = make_exits(model), make_texts((3, 5), (6, 1), (2, 4), (4, 4))
    known = (2, 5, 9, 30, 44)
    everything, some = record_confidences(
        backbone, exits, texts, vocabularies=[None, known], batch_size=3
    )
    assert everything.layers == (1, 3)
    assert everything.lengths.tolist() == [5, 1, 4, 4]
    assert everything.ended.tolist() == [False, True, False, True]
    for text, own in enumerate(texts):
        ids = torch.tensor([[*own.prompt, *own.tokens]])
        for place, layer in enumerate(exits.layers):
            # The slow way: run the layer's states of this text alone, and look at each token.
            kept = []
            handle = backbone.layers[layer].register_forward_pre_hook(
                lambda _, args, kwargs, kept=kept: kept.append(
                    args[0] if args else kwargs["hidden_states"]
                ),
                with_kwargs=True,
            )
            with torch.no_grad():
                model(input_ids=ids)
            handle.remove()
            for number, token in enumerate(own.tokens):
                state = kept[0][0, len(own.prompt) - 1 + number]
                with torch.no_grad():
                    logits = backbone.unembed(exits(layer, state)).float()
                at = (place, text, number)
                assert everything.confidence[at] == pytest.approx(
                    float(logits.softmax(-1).max()), rel=1e-4
                )
                assert everything.agrees[at] == (int(logits.argmax()) == token)
                few = logits[list(known)]
                assert some.confidence[at] == pytest.approx(float(few.softmax(-1).max()), rel=1e-4)
                assert some.agrees[at] == (known[int(few.argmax())] == token)
    written = [token for text in texts for token in text.tokens]
    assert everything.coverage == 1
    assert some.coverage == np.mean([token in known for token in written])
    assert not everything.confidence[:, 1, 1:].any()


def test_recordings_of_some_texts_are_in_the_order_asked_for():
    model = tiny_model()
    backbone, _ = find_parts(model)
    texts = make_texts((3, 5), (6, 2), (2, 4))
    (recorded,) = record_confidences(backbone, make_exits(model), texts, vocabularies=[None])
    chosen = recorded.choose([2, 0])
    assert chosen.lengths.tolist() == [4, 5]
    assert np.array_equal(chosen.confidence[:, 0], recorded.confidence[:, 2])
    assert np.array_equal(chosen.agrees[:, 1], recorded.agrees[:, 0])


def test_texts_without_tokens_are_refused():
    model = tiny_model()
    text = Continuation(prompt=(3, 4), tokens=(), ended=False)
    with pytest.raises(ValueError, match="the 1 given hold none"):
        record_confidences(find_parts(model)[0], make_exits(model), [text], vocabularies=[None])


class TestVocabularies:
    def test_the_seen_tokens_come_first_and_then_those_of_low_numbers(self):
        assert fill_vocabulary({7, 5}, 0, 100) == (5, 7)
        assert fill_vocabulary({7, 1}, 5, 100) == (0, 1, 2, 3, 7)
        assert fill_vocabulary({7, 5, 9}, 2, 100) == (5, 7, 9)

    @pytest.mark.parametrize(("seen", "size"), [({3}, None), ({3}, 51), (set(range(51)), 0)])
    def test_half_of_all_tokens_are_all(self, seen, size):
        assert fill_vocabulary(seen, size, 100) is None

    def test_what_the_model_cannot_predict_is_left_out(self):
        assert fill_vocabulary({3, 100, 400}, 0, 100) == (3,)
        assert fill_vocabulary({100}, 0, 100) is None

    def test_each_is_tried_once(self):
        assert list(list_vocabularies({3}, 50_000)) == [0, 2048, 8192, None]
        assert list(list_vocabularies({3}, 100)) == [0, 2048]
        found = list_vocabularies(range(3000), 50_000)
        assert list(found) == [0, 8192, None]
        assert len(found[8192] or ()) == 8192
