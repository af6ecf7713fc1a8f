"""What each layer predicts, against every layer's logits written out, and the page about it."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from torch.distributions import Categorical
from transformers import PreTrainedTokenizerFast

import depthmix_cli
from adapters import tuned_model
from checkpoints import make_tokenizer, save_checkpoint
from depthmix import attach, set_top_k
from depthmix.depth import lens as lens_module
from depthmix.depth.lens import Lens, Prediction, Routing, look
from depthmix.depth.token_texts import token_texts
from depthmix.loss.terms import divergence
from depthmix.method.norm import active_mixture, find_mixture_norm
from depthmix.models.loading import load_model
from depthmix.models.spec import ModelSpec
from depthmix.pages.lens_page import to_page_data, write_lens
from depthmix.pages.page import hash_text
from models import randomise, tiny_model

TOKENIZER = make_tokenizer()
TEXT = "To be, or not to be: 🦜\n"


def model_for(model_type="llama"):
    return tiny_model(model_type, vocab_size=len(TOKENIZER))


def tuned(**options):
    return tuned_model(model_for(), late_layers=3, **options)


def naive_logits(model):
    """Every layer's logits in full, from `output_hidden_states`; and the model's own."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    norm = find_mixture_norm(model)
    backbone = lens_module.find_backbone(base) if norm is None else norm.backbone
    last = []
    handle = backbone.layers[-1].register_forward_hook(lambda _m, _a, output: last.append(output))
    ids = TOKENIZER(TEXT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        output = model(input_ids=ids, output_hidden_states=True)
        handle.remove()
        last = last[0][0] if isinstance(last[0], tuple) else last[0]
        # The last entry of `hidden_states` is normed already.
        states = [*output.hidden_states[1:-1], last.view_as(output.hidden_states[0])]
        logits = {}
        for layer, state in enumerate(states, start=1):
            own = norm.active_mixture.norms if norm and norm.active_mixture else {}
            pretrained = norm.base_layer if norm else backbone.final_norm
            normed = own[str(layer)](state) if str(layer) in own else pretrained(state)
            logits[layer] = backbone.unembed(normed)[0]
    return logits, output.logits[0], output.hidden_states, ids[0]


def check(prediction, logits, final, ids, *, ensemble=None):
    own, close = Categorical(logits=logits), {"rtol": 1e-4, "atol": 2e-5}
    tensor = torch.tensor
    torch.testing.assert_close(tensor(prediction.entropy), own.entropy(), **close)
    kl = divergence(own.logits, final.log_softmax(-1))
    torch.testing.assert_close(tensor(prediction.kl_to_final), kl, rtol=1e-4, atol=1e-4)
    for t in range(len(ids)):
        shares, order = own.probs[t].sort(descending=True)
        torch.testing.assert_close(tensor(prediction.top_probabilities[t]), shares[:5], **close)
        assert prediction.top_tokens[t][0] == token_texts(TOKENIZER, [int(order[0])])[0]
        if t + 1 < len(ids):
            assert order[prediction.rank[t] - 1] == ids[t + 1]
            assert prediction.probability[t] == pytest.approx(float(own.probs[t, ids[t + 1]]), 1e-3)
            assert prediction.loss[t] == pytest.approx(-float(own.logits[t, ids[t + 1]]), 1e-3)
    for column in (prediction.rank, prediction.probability, prediction.loss):
        assert len(column) == len(ids) - 1
    if ensemble is None:
        assert prediction.jsd_to_ensemble is None
    else:
        jsd = divergence(own.logits, ensemble.log_softmax(-1), "jsd")
        torch.testing.assert_close(tensor(prediction.jsd_to_ensemble), jsd, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("block", "length"), [(5, 5), (5, 2), (7, 3), (1, 100), (100, 100)])
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "opt", "gpt2"])
def test_a_plain_model_is_read_out_layer_by_layer(model_type, block, length, monkeypatch):
    monkeypatch.setattr(lens_module, "BLOCK_LOGITS", block * len(TOKENIZER))
    monkeypatch.setattr(lens_module, "PIECE_LOGITS", length * len(TOKENIZER))
    model = model_for(model_type)
    lens = look(model, TOKENIZER, TEXT)
    logits, own, _, ids = naive_logits(model)
    assert [prediction.readout for prediction in lens.layers] == [1, 2, 3, 4]
    for layer, prediction in enumerate(lens.layers, start=1):
        check(prediction, logits[layer], logits[4], ids)
    check(lens.ensemble, own, own, ids)
    assert lens.ensemble == replace(lens.layers[-1], readout="ensemble")
    assert lens.routing is None
    assert json.loads(json.dumps(asdict(lens)))["tokens"] == list(lens.tokens)


@pytest.mark.parametrize("top_k", [None, 2])
def test_late_layers_answer_by_their_own_norms(top_k, monkeypatch):
    monkeypatch.setattr(lens_module, "BLOCK_LOGITS", 7 * len(TOKENIZER))
    monkeypatch.setattr(lens_module, "PIECE_LOGITS", 3 * len(TOKENIZER))
    model = tuned()
    set_top_k(model, top_k)
    model.train()
    lens = look(model, TOKENIZER, TEXT)
    assert model.training
    model.eval()
    logits, own, states, ids = naive_logits(model)
    for layer, prediction in enumerate(lens.layers, start=1):
        check(prediction, logits[layer], logits[4], ids, ensemble=own if layer > 1 else None)
    check(lens.ensemble, own, logits[4], ids)
    weights = active_mixture(model).weigh(states[1])[0]
    routing = lens.routing
    torch.testing.assert_close(torch.tensor(routing.weights), weights)
    assert routing.late_layers == (2, 3, 4)
    for t, row in enumerate(weights.tolist()):
        assert routing.mean_depth[t] == pytest.approx(2 * row[0] + 3 * row[1] + 4 * row[2])
        entropy = -sum(share * torch.tensor(share).log().item() for share in row if share)
        assert routing.entropy[t] == pytest.approx(entropy, abs=1e-5)


def test_a_text_that_begins_as_the_tokenizer_would_has_one_beginning():
    tokenizer = make_tokenizer()
    tokenizer.bos_token = "</s>"
    template = [("</s>", tokenizer.bos_token_id)]
    processor = TemplateProcessing(single="</s> $A", special_tokens=template)
    tokenizer.backend_tokenizer.post_processor = processor
    model = tuned()
    lens = look(model, tokenizer, "1 + 1")
    assert lens.tokens[:2] == ("</s>", "1")
    assert look(model, tokenizer, "</s>1 + 1") == lens
    assert look(model, tokenizer, "1</s>").tokens == ("</s>", "1", "</s>")


def test_only_the_layers_that_are_asked_for_are_read_out():
    model = tuned()
    every, some = look(model, TOKENIZER, TEXT), look(model, TOKENIZER, TEXT, layers=[3, 1, 3])
    assert some.layers == (every.layers[0], every.layers[2])
    assert (some.ensemble, some.routing) == (every.ensemble, every.routing)
    model = model_for()
    every, some = look(model, TOKENIZER, TEXT), look(model, TOKENIZER, TEXT, layers=[2], top=2)
    assert some.layers[0].loss == every.layers[1].loss
    assert {len(row) for row in some.layers[0].top_tokens} == {2}
    assert some.ensemble.loss == every.layers[3].loss


def test_adapters_count_and_may_be_switched_off():
    plain = get_peft_model(model_for(), LoraConfig(target_modules=["q_proj"]))
    randomise(plain, only_trainable=True)
    adapted = look(plain, TOKENIZER, TEXT)
    mixed = tuned()
    with plain.disable_adapter(), mixed.disable_adapter():
        base = look(plain, TOKENIZER, TEXT)
        assert look(mixed, TOKENIZER, TEXT) == base
    assert base == look(model_for(), TOKENIZER, TEXT)
    assert adapted != base
    model = model_for()
    attach(model, late_layers=2)
    assert look(model, TOKENIZER, TEXT).routing.late_layers == (3, 4)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, "`text` must have between 1 and 64 tokens"),
        ("a" * 65, {}, "got 65"),
        ("a", {"layers": [0]}, "`layers` must be between 1 and 4"),
        ("a", {"layers": [5]}, "`layers` must be between 1 and 4"),
        ("a", {"layers": []}, "`layers` must be between 1 and 4"),
        ("a", {"top": 0}, "`top` must be between 1 and"),
    ],
)
def test_what_cannot_be_shown_is_refused(text, options, message):
    with pytest.raises(ValueError, match=message):
        look(model_for(), TOKENIZER, text, **options)


def test_token_texts_are_faithful():
    ids = TOKENIZER("é\t</s>x 🦜")["input_ids"]
    shown = token_texts(TOKENIZER, ids)
    assert shown[:2] == (r"\xc3", r"\xa9")
    assert shown[2:6] == ("\t", "</s>", "x", " ")
    assert shown[6:] == (r"\xf0", r"\x9f", r"\xa6", r"\x9c")
    assert token_texts(TOKENIZER, [10_000]) == ("<unused 10000>",)


def test_sentence_pieces_keep_their_spaces_and_bytes():
    vocabulary = {"▁the": 0, "Ġx": 1, "<0xE2>": 2, "<0x41>": 3}
    core = Tokenizer(BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    core.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    assert token_texts(tokenizer, range(4)) == (" the", "Ġx", r"\xe2", "A")


HOSTILE = (
    "<s>", "</script><script>window.harm=1</script>", "<!--", "<script>", '"\'&amp;',
    "\u2028\u2029", "\u202eabc", "\u200b", "\u200d", "🦜", "\ud83d", "\u0301",
    "<img src=x onerror=harm=1>", " ",
    "\n", "\\xf0", "a" * 300, "\x00", "]]>", "${harm}", "{{ harm }}", "אב",
)  # fmt: skip


def hostile_lens(*, routed=True, num_layers=3, shift=0.0):
    """Make a lens whose every text is hostile."""
    size = len(HOSTILE)

    def predict(readout, jsd):
        return Prediction(
            readout=readout,
            top_tokens=tuple(
                tuple(HOSTILE[(t + k) % size] for k in range(1, 6)) for t in range(size)
            ),
            top_probabilities=((0.5, 0.3, 0.1, 0.05, 0.01),) * size,
            entropy=(1.0 + shift,) * size,
            kl_to_final=(0.25,) * size,
            jsd_to_ensemble=jsd,
            loss=tuple(0.5 * t + shift for t in range(size - 1)),
            probability=(0.1,) * (size - 1),
            rank=tuple(range(1, size)),
        )

    late = (0.125,) * size if routed else None
    weights = ((0.25,) * (num_layers - 1) + (1 - 0.25 * (num_layers - 1),)) * size
    rows = tuple(weights[t * num_layers : (t + 1) * num_layers] for t in range(size))
    routing = Routing(
        late_layers=tuple(range(1, num_layers + 1)),
        weights=rows,
        entropy=(0.9,) * size,
        mean_depth=tuple(2 + t / 50 for t in range(size)),
    )
    return Lens(
        tokens=HOSTILE,
        layers=tuple(predict(layer, late) for layer in range(1, num_layers + 1)),
        ensemble=predict("ensemble", None),
        routing=routing if routed else None,
    )


def read_data(page):
    (data,) = re.findall(
        r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL
    )
    return data, json.loads(data)


def test_texts_cannot_leave_the_data(tmp_path):
    path = write_lens({"<b>&": hostile_lens()}, tmp_path / "new" / "lens.html")
    page = path.read_text("utf-8")
    data, read = read_data(page)
    assert data.isascii()
    assert not set(data) & set("<>&'")
    texts = read["texts"]
    assert tuple(texts[place] for place in read["passages"][0]["lenses"][0]["tokens"]) == HOSTILE
    assert page.count("<script") == page.count("</script>") == 2
    assert "<b>" not in page
    assert read["passages"][0]["lenses"][0]["model"] == "<b>&"


def test_the_page_needs_nothing_else(tmp_path):
    page = write_lens({"m": hostile_lens()}, tmp_path / "lens.html").read_text("utf-8")
    assert not re.search(r"https?:|src=\"|href=|url\(|@import", page)
    (policy,) = re.findall(r'Content-Security-Policy" content="(.*?)"', page)
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    script = page.rpartition("<script>")[2].partition("</script>")[0]
    assert hash_text(script) in policy
    for danger in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert danger not in script


def test_numbers_are_rounded(tmp_path):
    lens = look(tuned(), TOKENIZER, TEXT)
    data, read = read_data(write_lens({"m": lens}, tmp_path / "lens.html").read_text("utf-8"))
    assert not re.search(r"\d\.\d{5}", data)
    (written,) = read["passages"][0]["lenses"]
    assert [readout["name"] for readout in written["readouts"]][-2:] == ["layer 4", "ensemble"]
    assert written["readouts"][0]["loss"] == pytest.approx(lens.layers[0].loss, abs=1e-4)
    assert written["routing"]["depth"] == pytest.approx(lens.routing.mean_depth, abs=1e-4)
    plain = look(model_for(), TOKENIZER, TEXT)
    _, read = read_data(write_lens({"m": plain}, tmp_path / "lens.html").read_text("utf-8"))
    assert [readout["layer"] for readout in read["passages"][0]["lenses"][0]["readouts"]] == [
        1,
        2,
        3,
        4,
    ]


def test_lenses_that_cannot_stand_on_one_page_are_refused(tmp_path, monkeypatch):
    lens = hostile_lens()
    with pytest.raises(ValueError, match="must be one or two"):
        write_lens({}, tmp_path / "lens.html")
    with pytest.raises(ValueError, match="must have the same tokens"):
        write_lens({"a": lens, "b": replace(lens, tokens=("x",))}, tmp_path / "lens.html")
    with pytest.raises(ValueError, match="all with the same models and layers, got 2 kinds"):
        to_page_data({"first": {"a": lens}, "second": {"b": lens}})
    monkeypatch.setattr("depthmix.pages.page.LARGEST_PAGE", 10_000)
    with pytest.raises(ValueError, match="must hold a page of at most 0 MB"):
        write_lens({"a": lens}, tmp_path / "lens.html")


def test_the_command_writes_a_page(tmp_path, capsys):
    base = save_checkpoint(tmp_path / "base")
    output = tmp_path / "lens.html"
    command = ["lens", str(base), "One, two", "--output", str(output)]
    assert depthmix_cli.main(command) == 0
    assert f"Written: {output}" in capsys.readouterr().out
    assert depthmix_cli.main([*command, "--layers", "2,4"]) == 0
    _, read = read_data(output.read_text("utf-8"))
    assert [readout["layer"] for readout in read["passages"][0]["lenses"][0]["readouts"]] == [2, 4]
    model = tuned_model(load_model(ModelSpec(name=str(base))))
    model.save_pretrained(tmp_path / "tuned")
    compare = ["--compare", str(tmp_path / "tuned"), "--layers", "late"]
    capsys.readouterr()
    assert depthmix_cli.main([*command, *compare]) == 0
    _, read = read_data(output.read_text("utf-8"))
    layers = [
        [readout["layer"] for readout in lens["readouts"]] for lens in read["passages"][0]["lenses"]
    ]
    assert layers == [[2, 3, 4], [2, 3, 4, None]]
    for options, message in (
        (["--layers", "late"], "only where a model has a mixture"),
        (["--layers", "deep"], "`layers` must be `all`, `late`, or numbers"),
        (["--compare", str(base)], "must be different models"),
    ):
        assert depthmix_cli.main([*command, *options]) == 1
        assert message in capsys.readouterr().err
