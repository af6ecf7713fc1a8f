"""Answers of a model on disk, so that an interrupted evaluation goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from depthmix.evaluation.answering import Generator
from depthmix.files.drafts import write_whole

SAMPLED_WEIGHTS = 64
"""Weights of each parameter, about, that `fingerprint` looks at."""


def fingerprint(model: Generator) -> str:
    """Tell a model from others by a sample of its weights.

    Args:
        model: Decoder, or `LazyDepth` around one.

    Returns:
        Sixteen hexadecimal digits, the same on every device. Training changes them; options that
        are no weights do not.
    """
    decoder = model if isinstance(model, nn.Module) else model.model
    digest = hashlib.sha256()
    for name, parameter in decoder.named_parameters():
        values = parameter.detach().reshape(-1)
        sample = values[:: max(1, len(values) // SAMPLED_WEIGHTS)].cpu().contiguous()
        digest.update(name.encode() + sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


class AnswerFile:
    """Answers on disk, one JSON line per item, all made under the same settings.

    A line is written when its item is done. A last line without its end, which an interruption
    leaves, counts for nothing.

    Args:
        path: The file; it and its folder are made with the first answer.
        settings: What the answers depend on, in JSON's types.

    Raises:
        ValueError: If the file holds answers made under other settings, or is damaged.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.settings = dict(settings)
        self.answers: dict[int, list[str]] = {}
        """The texts of an item's answer, one per turn, by the item's number."""
        if not path.is_file():
            return
        text = path.read_text("utf-8")
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            write_whole(path, whole)
        for number, line in enumerate(whole.split("\n")[:-1], start=1):
            try:
                entry = json.loads(line)
                self.answers[entry["item"]], made_under = entry["turns"], entry["settings"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"Line {number} of {path} is no answer of an earlier evaluation; remove the "
                    "file to generate anew."
                ) from error
            if made_under != self.settings:
                raise ValueError(
                    f"`output_dir` holds answers made under other settings, {made_under} in "
                    f"{path}, and this evaluation has {self.settings}; choose another folder, or "
                    "remove the file to generate anew."
                )

    def add(self, answers: Mapping[int, list[str]]) -> None:
        """Keep answers.

        Args:
            answers: The texts of each item, by its number.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            for item, turns in answers.items():
                entry = {"item": item, "turns": turns, "settings": self.settings}
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        self.answers |= answers
