"""One rendering of a record: the same tokens in training and by every way of asking a model."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from checkpoints import CHAT_TEMPLATE, make_model, make_tokenizer
from depthmix.data.chat_templates import Conversation
from depthmix.data.forms import find_form, share_variables
from depthmix.data.rendering import (
    continue_prompt,
    encode,
    find_end,
    retokenise,
    tokenise_example,
    tokenise_prompt,
)
from depthmix.data.templates import render_prompt, to_training_dataset
from depthmix.data.tokens import to_token_sequences
from depthmix.evaluation.harness_model import HarnessModel
from depthmix.libraries.releases import CHECKPOINTING
from depthmix.models.spec import ModelSpec
from depthmix.models.template import (
    RunTemplate,
    learn_template,
    recall_template,
    save_template,
)
from depthmix.pages.passages import Passage

TEMPLATES = {
    "roles": CHAT_TEMPLATE,
    "bos": "{{ bos_token }}" + CHAT_TEMPLATE,
    "no end": "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}",
    "merging": "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}",
    "thought": "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>(nothing){% endif %}",
    "tools": "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if think is defined and not think %}"
    "(no){% endif %}{% endif %}",
}
"""Chat templates: with and without a BOS and an end, and with prompts that an answer changes."""

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def build_tokenizer(
    *, bos: bool = False, adds: str = "", merges: bool = False, template: str | None = None
) -> PreTrainedTokenizerFast:
    """Build a tokenizer by bytes, which may add special tokens around a text, or merge letters."""
    tokenizer = make_tokenizer(template)
    if merges:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        pairs = [(" ", "a"), ("Ġ", "a"), ("a", "b"), ("Ġ", "Ġ"), ("Ġa", "b"), (":", "Ġ")]
        pairs = [pair for pair in pairs if " " not in pair]
        vocabulary = {character: place for place, character in enumerate(alphabet)}
        for first, second in pairs:
            vocabulary.setdefault(first + second, len(vocabulary))
        core = Tokenizer(BPE(vocab=vocabulary, merges=pairs))
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        core.decoder = decoders.ByteLevel()
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=core,
            eos_token="</s>",
            additional_special_tokens=["<|user|>", "<|assistant|>", "<|system|>"],
        )
        tokenizer.chat_template = template
    if bos or "bos" in adds:
        tokenizer.add_special_tokens({"bos_token": "<s>"})
    if adds:
        single = f"{'<s> ' if 'bos' in adds else ''}$A{' </s>' if 'eos' in adds else ''}"
        known = [
            (token, tokenizer.convert_tokens_to_ids(token))
            for token in ("<s>", "</s>")
            if token in single
        ]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=single, special_tokens=known
        )
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


TOKENIZERS = st.builds(
    build_tokenizer,
    bos=st.booleans(),
    adds=st.sampled_from(["", "bos", "bos eos", "eos"]),
    merges=st.booleans(),
    template=st.sampled_from(list(TEMPLATES.values())),
)
WORDS = st.text(alphabet="ab :\n", min_size=1, max_size=8).filter(str.strip)
TEXT_RECORDS = st.one_of(
    st.fixed_dictionaries({"prompt": WORDS, "completion": WORDS}),
    st.fixed_dictionaries({"instruction": WORDS, "input": st.just(""), "output": WORDS}),
)
CHAT_RECORDS = st.builds(
    lambda asked, answered: {
        "messages": [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": answered},
        ]
    },
    WORDS,
    WORDS,
)


def to_question(record: dict) -> dict:
    """Take the answer from a record."""
    if "messages" in record:
        return {**record, "prompt": record["messages"][:-1]}
    return {name: record[name] for name in ("prompt", "instruction", "input") if name in record}


def given_ids(row: dict) -> list[int]:
    """Give the tokens of a training row that are not learnt."""
    return [
        token
        for token, learnt in zip(row["input_ids"], row["completion_mask"], strict=True)
        if not learnt
    ]


@given(
    TOKENIZERS,
    st.one_of(
        st.lists(TEXT_RECORDS, min_size=1, max_size=3),
        st.lists(CHAT_RECORDS, min_size=1, max_size=3),
    ),
    st.sampled_from(["auto", "plain", "chat", "alpaca"]),
)
def test_every_door_reads_the_tokens_of_training(tokenizer, records, template):
    if "messages" in records[0] and template in ("plain", "alpaca"):
        template = "auto"
    dataset = to_training_dataset(records, template, tokenizer)
    probed = to_token_sequences(records, template, tokenizer)
    asked = learn_template(records, template)
    for row, probe, record in zip(dataset, probed, records, strict=True):
        ids = given_ids(row)
        assert probe["input_ids"] == row["input_ids"]
        assert [label != -100 for label in probe["labels"]] == [*map(bool, row["completion_mask"])]
        prompt = render_prompt(to_question(record), template, tokenizer)
        assert list(prompt.token_ids) == ids
        if template != "auto" or asked.form != "prompt" or "prompt" in record:
            question = record.get("prompt") or record.get("instruction")
            question = question or record["messages"][0]["content"]
            found = asked.render(question, tokenizer)
            assert found == prompt or asked.form == "prompt"
        completion = row["completion"]
        text = completion if isinstance(completion, str) else completion[0]["content"]
        learnt = tokenizer.decode(row["input_ids"][len(ids) :], skip_special_tokens=False)
        assert text.strip() in learnt
        harness = HarnessDouble(tokenizer, {prompt.text: ids})
        assert harness.tok_encode(prompt.text) == ids
        padded, mask = harness.tok_batch_encode([prompt.text, prompt.text + " b"])
        assert padded[0][mask[0].bool()].tolist() == ids
        item = Passage(prompt=prompt.text, answer=text, prompt_ids=prompt.token_ids)
        assert item.render(tokenizer).token_ids[: len(ids)] == prompt.token_ids


@given(
    TOKENIZERS,
    st.one_of(
        st.lists(TEXT_RECORDS, min_size=1, max_size=3),
        st.lists(CHAT_RECORDS, min_size=1, max_size=3),
    ),
)
def test_where_no_token_spans_the_boundary_training_is_trls(tokenizer, records):
    for row, record in zip(to_training_dataset(records, "auto", tokenizer), records, strict=True):
        ids = given_ids(row)
        if isinstance(row["prompt"], list):
            options = {"tokenize": True, "return_dict": True}
            alone = tokenizer.apply_chat_template(
                row["prompt"], add_generation_prompt=True, **options
            )
            whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"], **options)
        else:
            end = "" if row["completion"].endswith("</s>") else "</s>"
            alone, whole = (
                tokenizer(row["prompt"]),
                tokenizer(row["prompt"] + row["completion"] + end),
            )
        alone, whole = alone["input_ids"], whole["input_ids"]
        if "</s>" in str(tokenizer.backend_tokenizer.post_processor) and isinstance(
            row["prompt"], str
        ):
            alone, whole = alone[:-1], whole[:-1]  # an end that the tokenizer adds to every text
        if whole[: len(alone)] == alone:
            assert row["input_ids"] == whole, record
        assert ids == alone


class HarnessDouble(HarnessModel):
    """lm-eval's model without a model: what it makes of texts."""

    tokenizer = None
    add_bos_token = None
    backend = "causal"

    def __init__(self, tokenizer, prompts, continuations=None):
        self.tokenizer = tokenizer
        self._prompts = prompts
        self._continuations = continuations or {}


def test_trl_leaves_the_tokens_as_they_are(tmp_path):
    tokenizer = build_tokenizer(adds="bos eos", merges=True)
    records = [{"prompt": "Sum: ", "completion": " ab"}, {"prompt": "a", "completion": "b"}]
    dataset = to_training_dataset(records, "auto", tokenizer)
    trained = SFTTrainer(
        make_model(tokenizer),
        SFTConfig(
            str(tmp_path),
            use_cpu=True,
            bf16=False,
            report_to="none",
            **{CHECKPOINTING: False},
        ),
        train_dataset=dataset,
        processing_class=tokenizer,
    ).train_dataset
    for row, expected in zip(trained, dataset, strict=True):
        assert row["input_ids"] == expected["input_ids"]
        marks = [label != -100 for label in row["labels"]]
        assert marks == [*map(bool, expected["completion_mask"])]


def test_special_tokens_stand_in_front_once_and_never_behind():
    tokenizer = build_tokenizer(adds="bos eos")
    bos = tokenizer.bos_token_id
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    assert list(encode("a", tokenizer)) == [bos, *plain]
    assert encode("<s>a", tokenizer) == encode("a", tokenizer)
    assert list(encode("", tokenizer)) == [bos]
    assert list(encode("a</s>", tokenizer)) == [bos, *plain, tokenizer.eos_token_id]
    [row] = to_training_dataset([{"prompt": "a", "completion": "b"}], "auto", tokenizer)
    assert row["input_ids"].count(tokenizer.eos_token_id) == 1
    chat = build_tokenizer(adds="bos", template=TEMPLATES["bos"])
    prompt = render_prompt({"prompt": "a"}, "chat", chat)
    assert prompt.token_ids.count(chat.bos_token_id) == 1
    assert retokenise(prompt, chat) == prompt


def test_a_continuation_leaves_the_prompt_as_it_is():
    tokenizer = build_tokenizer(merges=True)
    prompt = tokenise_prompt("x: ", tokenizer)
    joint = encode("x: ab", tokenizer)
    assert joint[: len(prompt.token_ids)] != prompt.token_ids
    ids = continue_prompt(prompt, "ab", tokenizer)
    assert tokenizer.decode([*prompt.token_ids, *ids]) == "x: ab"
    free = tokenise_prompt("x:", tokenizer)
    assert free.token_ids + continue_prompt(free, "ab", tokenizer) == encode("x:ab", tokenizer)


def test_a_template_that_begins_an_answer_otherwise_is_followed():
    tokenizer = build_tokenizer(template=TEMPLATES["thought"])
    given = Conversation(messages=[{"role": "user", "content": "a"}])
    found = tokenise_example(given, [{"role": "assistant", "content": "b"}], tokenizer)
    assert tokenizer.decode(found.token_ids) == "<|user|>a</s><|assistant|>(nothing)b</s>"
    assert found.token_ids[: found.num_given] == found.prompt.token_ids
    tokenizer.chat_template = TEMPLATES["thought"].replace(
        "{% for", "{{ messages | length }}{% for"
    )
    with pytest.warns(UserWarning, match="the model is asked after another one"):
        found = tokenise_example(given, [{"role": "assistant", "content": "b"}], tokenizer)
    assert found.num_given < len(found.prompt.token_ids)


@pytest.mark.parametrize(
    ("template", "text", "end"),
    [("roles", "b", "</s>"), ("no end", "b", None), ("merging", "b", "</s>")],
)
def test_the_end_is_what_stands_behind_an_answer(template, text, end):
    tokenizer = build_tokenizer(template=TEMPLATES[template])
    given = Conversation(messages=[{"role": "user", "content": "a"}])
    found = tokenise_example(given, [{"role": "assistant", "content": text}], tokenizer)
    number = find_end(found.token_ids[found.num_given :], tokenizer)
    assert number == (None if end is None else tokenizer.convert_tokens_to_ids(end))
    spaced = [*found.token_ids, *tokenizer("\n")["input_ids"]]
    assert find_end(spaced, tokenizer) == number
    assert find_end(tokenizer("\n")["input_ids"], tokenizer) is None


CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}
ASKED = [{"role": "user", "content": "1 + 1?"}]


def test_tools_and_variables_reach_the_template():
    tokenizer = build_tokenizer(template=TEMPLATES["tools"])
    other = {**CALL, "tool_calls": [{"function": {"name": "sub", "arguments": "{}"}}]}
    records = [
        {"messages": [*ASKED, CALL], "tools": [TOOL], "chat_template_kwargs": {"think": False}},
        {"messages": [*ASKED, other], "tools": json.dumps([TOOL]), "chat_template_kwargs": None},
    ]
    dataset = to_training_dataset(records, "auto", tokenizer)
    assert {"tools", "chat_template_kwargs"} <= set(dataset.column_names)
    assert dataset[0]["completion"] == [CALL]
    assert dataset[1]["completion"] == [other]
    first, second = (tokenizer.decode(row["input_ids"]) for row in dataset)
    assert first.startswith(json.dumps([TOOL])[:20])
    assert '<|assistant|>{"name": "add", "arguments": {"a": 1}}</s>' in first
    assert '{"name": "sub", "arguments": "{}"}' in second
    learnt = dataset[1]["input_ids"][dataset[1]["completion_mask"].index(1) :]
    assert tokenizer.decode(learnt) == '{"name": "sub", "arguments": "{}"}</s>'
    question = {"prompt": ASKED, "tools": [TOOL], "chat_template_kwargs": {"think": False}}
    assert render_prompt(question, "auto", tokenizer).text.endswith("<|assistant|>(no)")
    shared = render_prompt({"prompt": ASKED}, "auto", tokenizer, variables={"think": False})
    assert shared.text.endswith("<|assistant|>(no)")
    assert share_variables(records) == {}
    assert share_variables(records[:1] * 2) == {"think": False}


@pytest.mark.parametrize(
    ("record", "template", "message"),
    [
        ({"messages": [*ASKED, CALL]}, "roles", "`tool_calls` of the last message must be left"),
        ({"messages": [*ASKED, CALL, *ASKED, CALL]}, "roles", "`tool_calls` of a message must be"),
        ({"tools": [TOOL]}, "roles", "`tools` must be left out for this chat template"),
        ({"tools": {"a": 1}}, "tools", "`tools` must be a list of JSON schemas"),
        ({"chat_template_kwargs": {"other": 1}}, "tools", "variables that the chat .* `other`"),
        ({"chat_template_kwargs": {"tools": []}}, "tools", "variables that the chat .* `tools`"),
        ({"chat_template_kwargs": [1]}, "tools", "must be values by the name of a variable"),
        ({"chat_template_kwargs": "x"}, "tools", "must be values by the name of a variable"),
        (
            {"messages": [*ASKED, {"role": "assistant", "content": "b", "thinking": "Hm"}]},
            "tools",
            "`thinking` of the last message must be left out",
        ),
        (
            {"prompt": "a", "completion": "b", "tools": [TOOL]},
            "tools",
            "only a chat template",
        ),
    ],
)
def test_what_a_template_would_leave_out_is_refused(record, template, message):
    tokenizer = build_tokenizer(template=TEMPLATES[template])
    if not {"messages", "prompt"} & record.keys():
        record = {"messages": [*ASKED, {"role": "assistant", "content": "b"}], **record}
    with pytest.raises(ValueError, match=f"Record 1 .*{message}"):
        to_training_dataset([record], "auto", tokenizer)


def test_a_template_that_refuses_a_conversation_is_quoted():
    tokenizer = build_tokenizer(template="{{ raise_exception('Roles must alternate') }}")
    with pytest.raises(ValueError, match=r"cannot write this conversation \(Roles must alternate"):
        render_prompt({"prompt": ASKED}, "auto", tokenizer)


@pytest.mark.parametrize(
    ("template", "form", "text"),
    [
        ("auto", "prompt", "a"),
        ("plain", "prompt", "a"),
        ("lm-eval", "prompt", "a"),
        ("plain", "instruction", "a\n"),
        ("auto", "messages", "<|user|>a</s><|assistant|>"),
        ("chat", "prompt", "<|user|>a</s><|assistant|>"),
    ],
)
def test_bare_text_is_rendered_as_the_training_records(template, form, text):
    asked = RunTemplate(template=template, form=form)
    assert asked.render("a", build_tokenizer(template=CHAT_TEMPLATE)).text == text


def test_alpacas_conversations():
    asked, tokenizer = RunTemplate(form="instruction"), build_tokenizer()
    turns = [{"role": "user", "content": "a"}]
    first = asked.converse(turns, tokenizer)
    assert first == asked.render("a", tokenizer)
    turns += [{"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    second = asked.converse(turns, tokenizer).text
    assert second == f"{first.text}b\n\n### Instruction:\nc\n\n### Response:\n"
    plain = RunTemplate(template="plain")
    assert plain.converse(turns, tokenizer).text == "c"
    with pytest.raises(ValueError, match="`system` must be left out for this run"):
        plain.converse([{"role": "system", "content": "x"}, *turns], tokenizer)


def test_forms():
    assert find_form([{"messages": ASKED}]) == "messages"
    assert find_form([{"prompt": ASKED, "completion": "b"}]) == "messages"
    assert find_form([{"instruction": "a", "output": "b"}]) == "instruction"
    assert find_form([{"instruction": "a"}, {"prompt": "a"}]) == "prompt"


def test_what_a_run_remembers(tmp_path):
    run = tmp_path / "run"
    (run / "checkpoint-2").mkdir(parents=True)
    for folder in (run, run / "checkpoint-2"):
        adapter = {"peft_type": "LORA", "base_model_name_or_path": "b"}
        (folder / "adapter_config.json").write_text(json.dumps(adapter))
        weights = {"base_model.model.q_proj.lora_A.weight": torch.zeros(1, 1)}
        save_file(weights, folder / "adapter_model.safetensors")
    section = ModelSpec(name=str(run))
    assert recall_template(section, otherwise="plain") == RunTemplate(template="plain")
    config = {"model": {"name": "b"}, "data": {"template": "alpaca"}}
    (run / "run_config.json").write_text(json.dumps(config))
    assert recall_template(section) == RunTemplate(template="alpaca")
    found = RunTemplate(template="auto", form="messages", variables={"think": False})
    save_template(found, run)
    assert recall_template(section) == found
    assert recall_template(ModelSpec(name=str(run / "checkpoint-2"))) == found
    assert recall_template(section, "plain") == RunTemplate(
        template="plain", variables={"think": False}
    )
    (run / "template.json").write_text("[")
    with pytest.raises(ValueError, match=r"Cannot read .*template.json: JSONDecodeError"):
        recall_template(section)
