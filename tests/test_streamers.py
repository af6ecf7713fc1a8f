"""Answers in the terminal: each token in the colour of its depth, and nothing a terminal obeys."""

from __future__ import annotations

import io
import re

import pytest
import torch
from rich._palettes import EIGHT_BIT_PALETTE
from rich.console import Console
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import depthmix_cli
from adapters import tuned_model
from calibrations import make_calibrated
from checkpoints import make_model, make_tokenizer, save_checkpoint
from depthmix.decoding.draft_plan import DraftPlan
from depthmix.decoding.fast_generation import FastGeneration
from depthmix.method.mixture import Routes
from depthmix.method.norm import active_mixture, find_mixture_norm
from depthmix.models.continuation import continue_inputs
from depthmix.models.draft_streamer import DraftStreamer
from depthmix.models.streamers import DepthStreamer, VisibleStreamer, make_visible

TOKENIZER = make_tokenizer()
GREEDY = {"do_sample": False, "max_new_tokens": 24}
COLOURED = re.compile(r"\x1b\[([\d;]+)m([^\x1b]*)\x1b\[0m|([^\x1b]+)")
"""A piece of text with colours, or without."""

SHALLOW, DEEP = "48;2;230;240;200", "48;2;33;63;136"
MIDDLE = "48;2;150;206;189"  # 1 - sqrt(1/2) of the way


def make_console(**options):
    """Make a terminal that keeps what it is given."""
    options = {"force_terminal": True, "color_system": "truecolor", "_environ": {}, **options}
    return Console(file=io.StringIO(), width=20, **options)


def tuned(**options):
    return tuned_model(make_model(TOKENIZER), **options)


def answer(model, streamer, text="To be, or not", **options):
    inputs = TOKENIZER(text, return_tensors="pt", return_token_type_ids=False)
    (told,) = continue_inputs(model, TOKENIZER, inputs, {**GREEDY, **options}, streamer)
    return told, inputs["input_ids"]


def naive_weights(model, ids):
    """Give the routing weights of a whole text, from one pass over it."""
    mixture = active_mixture(model)
    with torch.no_grad():
        states = model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
        return mixture.weigh(states[mixture.late_layers[0] - 1])[0]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prefill_chunk_size": 5},
        {"use_cache": False},
        {"do_sample": True, "temperature": 9.0, "min_new_tokens": 9},
    ],
)
@pytest.mark.parametrize("late_layers", [1, 3])
def test_every_token_has_the_depth_of_a_full_pass(late_layers, options):
    torch.manual_seed(0)
    model = tuned(late_layers=late_layers)
    console, given = make_console(force_terminal=False, color_system=None), []
    streamer = DepthStreamer(model, TOKENIZER, console)
    put = streamer.put
    streamer.put = lambda value: (given.append(value.flatten()), put(value))
    for text in ("To be, or not", "Die Größe 🦜"):  # the second after the first, as in a chat
        given.clear()
        told, prompt = answer(model, streamer, text, **options)
        whole = torch.cat(given)[None]
        assert torch.equal(whole[:, : prompt.shape[1]], prompt)
        expected = naive_weights(model, whole)[prompt.shape[1] - 1 : -1]
        assert len(expected) > 4
        torch.testing.assert_close(torch.tensor(streamer.weights), expected, rtol=1e-4, atol=1e-5)
        if late_layers > 1:
            assert expected.std(0).min() > 1e-3  # tokens differ
        layers = active_mixture(model).late_layers
        depth = float((expected @ torch.tensor(layers, dtype=torch.float)).mean())
        printed, _, summary = console.file.getvalue().rstrip("\n").rpartition("\n")
        assert summary.startswith(f"mean depth {depth:.2f} over {len(expected)} tokens (layer ")
        assert summary.endswith(f"{layers[-1]}: {100 * float(expected[:, -1].mean()):.1f} %)")
        assert printed.endswith(make_visible(told))
        assert told


def test_a_prefill_comes_in_pieces():
    model, seen = tuned(), []
    norm = find_mixture_norm(model)
    norm.listener = lambda routes: seen.append(routes.weights.shape[1])
    answer(model, None, prefill_chunk_size=5, max_new_tokens=2)
    assert seen == [5, 5, 3, 1]


def say(tokens, console, tokenizer=TOKENIZER):
    """Let a model with the late layers 2 to 4 say tokens, each by one of them; split the output."""
    model = tuned()
    streamer, norm = DepthStreamer(model, tokenizer, console), find_mixture_norm(model)
    streamer.put(torch.tensor([[1, 2, 3]]))
    for place, (number, layer) in enumerate(tokens):
        weights = torch.zeros(1, 1 if place else 3, 3)
        weights[..., layer - 2] = 1.0
        norm.listener(Routes((), weights, norm.active_mixture))
        streamer.put(torch.tensor([number]))
    streamer.end()
    pieces = COLOURED.findall(console.file.getvalue())
    return [(text or plain, codes.partition(";")[2]) for codes, text, plain in pieces]


def spell(text, *layers):
    ids = TOKENIZER(text)["input_ids"]
    return list(zip(ids, layers * len(ids) if len(layers) == 1 else layers, strict=True))


def after_ink(codes):
    """Take the background out of codes for ink and background."""
    return codes[codes.index("48;") :] if "48;" in codes else codes


def test_a_character_has_the_mean_colour_of_its_tokens():
    tokens = [*spell("a", 2), *spell("🦜", 2, 2, 4, 4), *spell("b", 4)]
    tokens += [*spell("</s>", 2), *spell("c", 4), *spell("\n", 2), *spell("é", 4, 4)]
    said = [(text, after_ink(codes)) for text, codes in say(tokens, make_console())]
    assert said[:4] == [("a", SHALLOW), ("🦜", MIDDLE), ("b", DEEP), ("c", DEEP)]
    assert said[4:6] == [("\n", ""), ("é", DEEP)]
    assert said[-2][0] == "mean depth 3.09 over 11 tokens (layer 2: 45.5 %, 3: 0.0 %, 4: 54.5 %)"


def test_bytes_that_stay_no_character_are_shown():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: place for place, piece in enumerate([*alphabet, "að"])}  # a and F0
    core = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    both = vocabulary["að"]
    assert tokenizer.decode([both]) == "a\ufffd"
    said = [
        (text, after_ink(codes))
        for text, codes in say([(both, 2), (both, 4)], make_console(), tokenizer)
    ]
    assert said[:3] == [("a", SHALLOW), ("\ufffda", MIDDLE), ("\ufffd", DEEP)]


def test_a_model_cannot_command_the_terminal():
    hostile = "\x1b[2J\r\x08\x07\x9b31m\u202eabc\u2028\x7f"
    console = make_console()
    said = say(spell(hostile, 3), console)
    shown = "".join(text for text, _ in said)
    assert shown.startswith(
        "<U+001B>[2J<U+000D><U+0008><U+0007><U+009B>31m<U+202E>abc<U+2028><U+007F>\n"
    )
    assert COLOURED.sub("", console.file.getvalue()) == ""
    assert make_visible("a\n\tb\u200d é 🦜 אב") == "a\n\tb\u200d é 🦜 אב"


def test_plain_chat_cannot_command_it_either(capsys):
    streamer = VisibleStreamer(TOKENIZER, skip_special_tokens=True)
    for number, _ in spell("\x1b[2J ok</s>", 1):
        streamer.put(torch.tensor([number]))
    streamer.end()
    assert capsys.readouterr().out == "<U+001B>[2J ok\n"


@pytest.mark.parametrize(
    "options",
    [
        {"force_terminal": False, "color_system": "auto"},
        {"color_system": "auto", "_environ": {"NO_COLOR": "1", "TERM": "xterm-256color"}},
        {"color_system": "auto", "_environ": {"TERM": "dumb"}},
        {"color_system": "auto", "_environ": {"TERM": "xterm"}},  # sixteen colours
    ],
)
def test_without_colours_the_text_is_plain(options):
    console = make_console(**options)
    DepthStreamer(tuned(), TOKENIZER, console).print_legend()
    say([*spell("Größe\n", 2), *spell(" 🦜", 4)], console)
    assert console.file.getvalue() == (
        "Größe\n 🦜\nmean depth 2.77 over 13 tokens (layer 2: 61.5 %, 3: 0.0 %, 4: 38.5 %)\n"
    )


def luminance(colour):
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    return sum(part * c for part, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def read_colours(codes):
    """Give the luminance of ink and background."""
    numbers = [int(code) for code in codes.split(";")]
    found = []
    while numbers:
        _place, kind, *rest = numbers
        colour = rest[:3] if kind == 2 else EIGHT_BIT_PALETTE[rest[0]]
        numbers = rest[3 if kind == 2 else 1 :]
        found.append(luminance([channel / 255 for channel in colour]))
    return found


@pytest.mark.parametrize("environment", [{"COLORTERM": "truecolor"}, {"TERM": "xterm-256color"}])
def test_deeper_is_darker_and_every_ink_has_contrast(environment):
    console = make_console(color_system="auto", _environ=environment)
    DepthStreamer(tuned(), TOKENIZER, console).print_legend()
    pieces = COLOURED.findall(console.file.getvalue())
    (*_, label), *bar, (*_, end) = pieces
    assert (label, end) == ("Mean depth ", "\n")
    depths = [" 2.0 ", " 2.7 ", " 3.3 ", " 3.7 ", " 3.9 ", " 4.0 "]
    assert [text for _, text, _ in bar] == depths
    colours = [read_colours(codes) for codes, *_ in bar]
    backgrounds = [background for _, background in colours]
    assert backgrounds == sorted(backgrounds, reverse=True)
    assert len(set(backgrounds)) == 6
    for ink, background in colours:
        light, dark = max(ink, background), min(ink, background)
        assert (light + 0.05) / (dark + 0.05) >= 4.5


def test_one_late_layer_has_one_colour():
    console = make_console()
    streamer = DepthStreamer(tuned(late_layers=1), TOKENIZER, console)
    streamer.print_legend()
    assert [text or plain for _, text, plain in COLOURED.findall(console.file.getvalue())] == [
        "Mean depth ", " 4.0 ", "\n",
    ]  # fmt: skip
    assert DEEP in console.file.getvalue()


def test_chat_shows_depth(tmp_path, capsys, monkeypatch):
    base = save_checkpoint(tmp_path / "base")
    model = tuned_model(AutoModelForCausalLM.from_pretrained(base))
    model.save_pretrained(tmp_path / "tuned")
    command = ["--depth", "--generation.max-new-tokens", "6"]
    said = iter(["Hi", "And?", "/exit"])
    monkeypatch.setattr("builtins.input", lambda _prompt: next(said))
    assert depthmix_cli.main(["chat", str(tmp_path / "tuned"), *command]) == 0
    assert len(re.findall(r"^mean depth [23]\.\d+ over \d", capsys.readouterr().out, re.M)) == 2
    for folder, options, message in (
        ("base", [], "`depth` needs a model with a mixture of depths, and this one has none"),
        ("tuned", ["--generation.prompt-lookup-num-tokens=3"], "needs one forward pass per token"),
    ):
        assert depthmix_cli.main(["chat", str(tmp_path / folder), *command, *options]) == 1
        assert message in capsys.readouterr().err


def test_chat_shows_where_tokens_were_drafted(tmp_path, capsys, monkeypatch):
    folder = make_calibrated(tmp_path / "model")
    command = ["chat", str(folder), "--generation.max-new-tokens", "9"]
    answers = []
    for options in ([], ["--fast"], ["--fast", "--depth"]):
        said = iter(["Hi", "/exit"])
        monkeypatch.setattr("builtins.input", lambda _prompt, said=said: next(said))
        assert depthmix_cli.main([*command, *options]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]
    *_, summary = answers[2].splitlines()
    assert answers[2].startswith(answers[0].rstrip("\n"))
    found = re.fullmatch(
        r"(\d+) tokens: (\d+) drafted at layer 1, (\d+) drafted at layer 2, (\d+) drafted at layer "
        r"3, (\d+) by the top; \d+ drafts not used",
        summary,
    )
    total, *parts = map(int, found.groups())
    assert total == sum(parts) > 1
    assert depthmix_cli.main([*command, "--no-verify"]) == 1
    assert "needs `fast`, which drafts" in capsys.readouterr().err


@pytest.mark.parametrize("stay_dense", [False, True])
def test_a_drafted_token_has_the_colour_of_its_exit(stay_dense):
    model = tuned().eval()
    plan = DraftPlan.for_all((2, 3), threshold=0.0, joint_threshold=0.0, stay_dense=stay_dense)
    fast, console = FastGeneration(model, plan=plan), make_console()
    streamer = DraftStreamer(fast, TOKENIZER, console)
    streamer.print_legend()
    answer(fast, streamer)
    shown = console.file.getvalue()
    assert len(streamer.origins) > 4
    if stay_dense:
        assert "nothing is drafted." in " ".join(shown.split())
        assert set(streamer.origins) == {4}
        return
    assert streamer.origins == fast.origins[0]
    assert shown.startswith("Drafted at layer ")
    for colour in (SHALLOW, DEEP):
        assert colour in shown
