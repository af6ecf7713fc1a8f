"""Records as token sequences, before there is a trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from depthmix.data.forms import Record
from depthmix.data.rendering import encode
from depthmix.data.spec import TrainingTemplate
from depthmix.data.templates import render_records


def to_token_sequences(
    records: Sequence[Record],
    template: TrainingTemplate,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    keeps_end: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> list[dict[str, list[int]]]:
    """Turn records into tokens, with those of the completion as labels.

    They are those of `to_training_dataset`, before there is a trainer.

    Args:
        records: In one of the forms of `to_training_dataset`; or with a `text`, all of whose tokens
            count.
        template: How they become text.
        tokenizer: The model's.
        max_length: Tokens of a sequence that are kept; `None` keeps all.
        keeps_end: Keep the last tokens instead of the first.
        variables: As for `to_training_dataset`.

    Returns:
        Rows with `input_ids` and `labels`, which are `IGNORE_INDEX` on a prompt's tokens.

    Raises:
        ValueError: If a record has not the fields of any form, or nothing to learn.
    """
    if records and all(isinstance(record.get("text"), str) for record in records):
        texts = [list(encode(record["text"], tokenizer)) for record in records]
        rows = [(ids, ids) for ids in texts]
    else:
        rendered = render_records(records, template, tokenizer, variables=variables)
        rows = [(list(one.token_ids), one.labels) for _, _, one in rendered]
    kept = slice(-max_length, None) if keeps_end and max_length else slice(max_length)
    return [{"input_ids": ids[kept], "labels": labels[kept]} for ids, labels in rows]
