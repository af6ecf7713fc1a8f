"""Runs whose tokenizer TRL's options change: asked with the tokens of training, by every door."""

from __future__ import annotations

import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationMixin
from trl import clone_chat_template

import depthmix.depth.layer_choice as layer_choice
import depthmix.models.subjects as lens_subjects
import depthmix_cli
from checkpoints import CHAT_TEMPLATE, make_tokenizer, save_checkpoint
from depthmix import MoDEConfig, load_run_config, train
from depthmix.models.generation import chat, generate
from depthmix.models.loading import load_model, load_tokenizer
from depthmix.models.spec import ModelSpec
from depthmix.models.template import recall_template
from depthmix.training import material as gathering
from depthmix.training import setup as preparation
from depthmix.training.tokenizer import adopt_options, find_template_source
from models import tiny_model
from test_rendering import TEMPLATES, build_tokenizer, given_ids

NEW_TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]<think>{% endif %}"
)
CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}
TEXT = {"prompt": "hi", "completion": "yes"}
INSTRUCTION = {"instruction": "hi", "output": "yes"}


def write_source(folder):
    """Save a tokenizer with a template, an end and a token that the model lacks."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<think>"])
    tokenizer.add_special_tokens({"eos_token": "<|end|>"})
    tokenizer.chat_template = NEW_TEMPLATE
    tokenizer.save_pretrained(folder)
    return str(folder)


def write_base(folder, *, tied=False, **options):
    """Save a tiny model whose tokenizer is built with some options."""
    tokenizer = build_tokenizer(**options)
    model = tiny_model(
        "llama",
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        tie_word_embeddings=tied,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def run(folder, record, *, base=None, template="auto", method="mode", **options):
    """Train one step, and evaluate before and after on the same question."""
    base = base or str(save_checkpoint(folder / "base"))
    (folder / "train.jsonl").write_text(json.dumps(record))
    question = {k: v for k, v in record.items() if k in ("prompt", "instruction")}
    if "messages" in record:
        question = {**record, "prompt": record["messages"][:1]}
    (folder / "test.jsonl").write_text(json.dumps({**question, "answer": "yes"}))
    sections = {
        "model": {"name": base, "dtype": "float32"},
        "data": {"train": str(folder / "train.jsonl"), "template": template},
        "mode": {"late_layers": "auto", "r": 2, "target_modules": ["q_proj"]},
        "method": method,
        "evaluation": {
            "data": str(folder / "test.jsonl"),
            "metric": "exact_match",
            "max_new_tokens": 2,
        },
        "training": {
            "output_dir": str(folder / "run"),
            "max_steps": 1,
            "report_to": [],
            "save_strategy": "no",
            **options,
        },
    }
    train(load_run_config(None, sections))
    return folder / "run"


def slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("record", "setup"),
    [
        slow(CHAT, {}),
        slow(CHAT, {"file": True}),
        (CHAT, {"source": True}),
        slow(CHAT, {"source": True, "tied": True}),
        slow(CHAT, {"adds": "bos", "template": TEMPLATES["bos"]}),
        (CHAT, {"adds": "bos", "template": CHAT_TEMPLATE}),
        (
            {**CHAT, "chat_template_kwargs": {"think": False}},
            {"template": TEMPLATES["tools"], "adds": "bos"},
        ),
        slow(TEXT, {"adds": "bos", "template": CHAT_TEMPLATE}),
        slow(TEXT, {"eos_token": "<|user|>"}),
        (TEXT, {"pad_token": "<|user|>", "adds": "bos eos"}),
        slow(TEXT, {"data": "chat", "adds": "bos", "template": CHAT_TEMPLATE}),
        slow(TEXT, {"data": "alpaca", "adds": "bos"}),
        slow(INSTRUCTION, {"adds": "bos"}),
        (INSTRUCTION, {"data": "plain"}),
    ],
)
@pytest.mark.filterwarnings("ignore:No token ends the completions")
def test_a_run_is_asked_as_it_was_trained(record, setup, tmp_path, monkeypatch, capsys):
    options = {name: setup[name] for name in ("eos_token", "pad_token") if name in setup}
    if "file" in setup:
        (tmp_path / "new.jinja").write_text(TEMPLATES["no end"])
        options["chat_template_path"] = str(tmp_path / "new.jinja")
    if "source" in setup:
        options["chat_template_path"] = write_source(tmp_path / "source")
    built = {name: setup[name] for name in ("adds", "template", "tied") if name in setup}
    base = write_base(tmp_path / "base", **({"template": CHAT_TEMPLATE} | built))
    seen = {"trained": [], "probed": [], "asked": [], "looked": []}
    check, probe = preparation.check_label_tokens, layer_choice.probe_layers
    look = lens_subjects.read_out
    answer = GenerationMixin.generate

    def keep_trained(dataset, numbers):
        for row in dataset:
            pairs = zip(row["input_ids"], row["labels"], strict=True)
            seen["trained"].append([token for token, label in pairs if label < 0])
        return check(dataset, numbers)

    def keep_probed(model, rows, **rest):
        seen["probed"] += [row["input_ids"] for row in rows]
        return probe(model, rows, **rest)

    def keep_asked(model, *args, **rest):
        ids = rest["input_ids"] if "input_ids" in rest else rest.get("inputs", *args)
        seen["asked"].append(ids[0].tolist())
        return answer(model, *args, **rest)

    def keep_looked(model, tokenizer, prompt, **rest):
        seen["looked"].append(list(prompt.token_ids))
        return look(model, tokenizer, prompt, **rest)

    monkeypatch.setattr(preparation, "check_label_tokens", keep_trained)
    monkeypatch.setattr(layer_choice, "probe_layers", keep_probed)
    monkeypatch.setattr(GenerationMixin, "generate", keep_asked)
    monkeypatch.setattr(lens_subjects, "read_out", keep_looked)
    folder = run(tmp_path, record, base=base, template=setup.get("data", "auto"), **options)
    (ids,) = seen["trained"]
    assert seen["probed"][0][: len(ids)] == ids
    assert seen["asked"] == [ids, ids]  # before and after
    section = ModelSpec(name=str(folder))
    generate(section, ["hi"], options={"max_new_tokens": 1})
    replies = iter(["hi", "/exit"])
    monkeypatch.setattr("builtins.input", lambda _: next(replies))
    chat(section, options={"max_new_tokens": 1})
    records = str(tmp_path / "test.jsonl")
    assert depthmix_cli.main(["evaluate", str(folder), "--records", records]) == 0
    assert seen["asked"] == [ids] * 5
    page = str(tmp_path / "lens.html")
    assert depthmix_cli.main(["lens", str(folder), "hi", "--output", page]) == 0
    assert seen["looked"] == [ids]
    assert depthmix_cli.main(["report", str(folder)]) == 0
    capsys.readouterr()


def test_generation_stops_where_training_ends(tmp_path):
    folder = run(tmp_path, TEXT, eos_token="<|user|>", save_strategy="steps", save_steps=1)
    tokenizer = make_tokenizer()
    ends = [tokenizer.convert_tokens_to_ids(token) for token in ("<|user|>", "</s>")]
    for place in (folder, folder / "checkpoint-1"):
        section = ModelSpec(name=str(place))
        assert load_model(section).generation_config.eos_token_id == ends
        assert load_tokenizer(section).eos_token == "<|user|>"
        assert recall_template(section).form == "prompt"
    (folder / "generation_config.json").unlink()  # as in a run of an earlier version
    assert load_model(ModelSpec(name=str(folder))).generation_config.eos_token_id == ends
    (folder / "generation_config.json").write_text("[")
    with pytest.raises(ValueError, match=r"Cannot read .*generation_config.json"):
        load_model(ModelSpec(name=str(folder)))


def test_a_template_may_end_its_answers_otherwise_than_the_tokenizer(tmp_path):
    (tmp_path / "new.jinja").write_text(CHAT_TEMPLATE.replace("</s>", "<|system|>\n"))
    folder = run(tmp_path, CHAT, chat_template_path=str(tmp_path / "new.jinja"))
    tokenizer = make_tokenizer()
    ends = [tokenizer.convert_tokens_to_ids(token) for token in ("<|system|>", "</s>")]
    assert load_model(ModelSpec(name=str(folder))).generation_config.eos_token_id == ends


def test_a_template_without_an_end_is_told(tmp_path):
    (tmp_path / "new.jinja").write_text(TEMPLATES["no end"])
    with pytest.warns(UserWarning, match="No token ends the completions"):
        run(tmp_path, CHAT, chat_template_path=str(tmp_path / "new.jinja"))


def test_new_tokens_of_a_tied_head_need_the_mixtures_loss(tmp_path):
    base, source = write_base(tmp_path / "base", tied=True), write_source(tmp_path / "source")
    with pytest.raises(ValueError, match=r"must bring no new tokens \(it brings"):
        run(tmp_path, CHAT, base=base, method="lora", chat_template_path=source)


@pytest.mark.parametrize(("tied", "method"), [(False, "mode"), (True, "mode"), (False, "lora")])
def test_tokens_of_another_tokenizer_come_back(tied, method, tmp_path, monkeypatch):
    base = write_base(tmp_path / "base", tied=tied, template=CHAT_TEMPLATE)
    source, trainers = write_source(tmp_path / "source"), []
    make = preparation.MoDESFTTrainer
    monkeypatch.setattr(
        preparation, "MoDESFTTrainer", lambda **o: trainers.append(make(**o)) or trainers[-1]
    )
    folder = run(
        tmp_path, CHAT, base=base, method=method, chat_template_path=source, learning_rate=0.1
    )
    trained = trainers[0].model.eval()
    _, expected, added = clone_chat_template(
        AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base), source
    )
    section = ModelSpec(name=str(folder))
    tokenizer = load_tokenizer(section)
    assert tokenizer.get_vocab() == expected.get_vocab()
    assert tokenizer.chat_template == expected.chat_template
    assert tokenizer.eos_token == expected.eos_token == "<|end|>"
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["trainable_token_indices"] == {"embed_tokens": added}
    assert settings["modules_to_save"] == (None if tied else ["lm_head"])
    ids = torch.tensor([[3, *added[:2], 4]])
    for model in (load_model(section), AutoPeftModelForCausalLM.from_pretrained(folder)):
        with torch.no_grad():
            found, logits = model(ids).logits, trained(ids).logits
        torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-4)


def test_an_adapter_without_the_values_of_its_tokens_is_refused(tmp_path):
    save_checkpoint(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    tokenizer.add_tokens(["<a>", "<b>"])
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    last = len(tokenizer) - 1
    config = MoDEConfig(
        late_layers=2, r=2, target_modules=["q_proj"], trainable_token_indices=[last]
    )
    tuned = get_peft_model(model, config).eval()
    tuned.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with pytest.raises(ValueError, match=r"`model.adapter` must hold the embeddings of all tokens"):
        load_model(ModelSpec(name=str(tmp_path / "adapter")))
    tuned.save_pretrained(tmp_path / "whole")
    found = load_model(ModelSpec(name=str(tmp_path / "whole"))).eval()
    ids = torch.tensor([[3, last]])
    torch.testing.assert_close(found(ids).logits, tuned(ids).logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eos_token": "<|usr|>"}, r"`training.eos_token` must be a token .* did you mean"),
        ({"pad_token": "[PAD]"}, r"`training.pad_token` must be a token of the model's vocabulary"),
        ({"chat_template_path": "no.jinja"}, r"`training.chat_template_path` must be an existing"),
    ],
)
def test_options_of_the_tokenizer_that_cannot_be(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, TEXT, **options)
    assert not (tmp_path / "run").exists()


def test_two_ends_are_refused(tmp_path):
    source = write_source(tmp_path / "source")
    with pytest.raises(ValueError, match=r"`training.eos_token` must be left out where"):
        run(tmp_path, CHAT, chat_template_path=source, eos_token="<|user|>")


def test_the_tokens_of_the_assistant_are_marked():
    marked = CHAT_TEMPLATE.replace(
        "{{ message.content }}</s>",
        "{% generation %}{{ message.content }}</s>{% endgeneration %}",
    )
    tokenizer = make_tokenizer(marked)
    adopt_options(tokenizer, {"assistant_only_loss": True})
    assert tokenizer.chat_template == marked
    records = [{"messages": [*CHAT["messages"], *CHAT["messages"]]}]
    options = {"marks_assistant": True}
    (row,) = gathering.to_training_dataset(records, "auto", tokenizer, **options)
    pairs = list(zip(row["input_ids"], row["assistant_masks"], strict=True))
    assert tokenizer.decode([token for token, mask in pairs if mask]).endswith("yes</s>")
    assert len(given_ids(row)) == len(pairs) - len("yes") - 1
    assert find_template_source({"chat_template_path": "owner/name"}) == "owner/name"
