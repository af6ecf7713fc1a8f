"""A language model as judge, behind any endpoint that speaks OpenAI's chat completions."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tqdm.auto import tqdm

from depthmix.files.drafts import write_whole
from depthmix.libraries.extras import require
from depthmix.options.types import check_number, checked_options

CHARACTERS_PER_TOKEN = 4
"""Of English text, for the estimate: the judge's own tokenizer is not known here."""

Conversation = Sequence[Mapping[str, str]]
"""Messages to the judge, each with `role` and `content`."""


class JudgeError(OSError):
    """The judge cannot be asked, or not any more."""


@checked_options
@dataclass(frozen=True, kw_only=True)
class JudgeSpec:
    """Which model judges, and how it is asked. The key is no option: it stays in its variable."""

    model: str
    """Name of the model, as the endpoint knows it."""

    base_url: str = "https://api.openai.com/v1"
    """Address of the endpoint, up to `/chat/completions`."""

    key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the key. If it is not set, requests carry none, which is
    what servers on this machine want."""

    max_retries: int = 8
    """Repetitions of a request after 429, 5xx, a lost connection or a timeout, with growing
    pauses."""

    timeout: float = 120.0
    """Seconds to wait for one answer."""

    concurrency: int = 8
    """Requests under way at once."""

    max_attempts: int = 3
    """Answers to ask for until one holds a rating; after that the item stays unrated."""

    temperature: float | None = 0.0
    """Temperature of the judge; `None` leaves it to the endpoint, for models that refuse one."""

    max_tokens: int | None = 2048
    """Longest answer of the judge; `None` leaves it to the endpoint."""

    input_price: float | None = None
    """Price of a million prompt tokens, in any currency."""

    output_price: float | None = None
    """Price of a million tokens of answers, in the same currency."""

    def __post_init__(self) -> None:
        address = urlsplit(self.base_url)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise ValueError(
                "`judge.base_url` must be an address that begins with http:// or https://, got "
                f"{self.base_url.rpartition('@')[2]!r}."
            )
        # The address is saved with the results.
        if address.username or address.password or address.query or address.fragment:
            raise ValueError(
                "`judge.base_url` must be a plain address without a user or a query, in which "
                "secrets may stand; put the key into the variable that `judge.key_variable` names."
            )
        if not self.key_variable.isidentifier():  # may be a key, which must not be shown
            raise ValueError(
                "`judge.key_variable` must be the name of an environment variable that holds the "
                "key, such as OPENAI_API_KEY, got something else; the key itself is no option."
            )
        for name in ("concurrency", "max_attempts", "max_tokens"):
            check_number(f"judge.{name}", getattr(self, name), at_least=1)
        for name in ("max_retries", "temperature", "input_price", "output_price"):
            check_number(f"judge.{name}", getattr(self, name), at_least=0)
        check_number("judge.timeout", self.timeout, above=0)


@dataclass(frozen=True, kw_only=True)
class Rating:
    """What the judge said on one conversation."""

    value: float | None
    """The rating; `None` if no answer held one."""

    text: str
    """The answer with the rating, or the last one without."""


class Judge:
    """The judge of a section, and the folder that keeps its answers.

    An answer is kept under the hash of the request's body, which holds the model's name but not
    the address: the same model may be asked at another place later.

    Args:
        section: Which model judges.
        cache_dir: Folder for its answers; made with the first one.

    Raises:
        MissingExtraError: If the package `openai` is not installed.
        ValueError: If the key cannot stand in a header.
    """

    def __init__(self, section: JudgeSpec, cache_dir: Path) -> None:
        require("judge", "A judge")
        import openai

        self.section = section
        self.cache_dir = cache_dir
        self._key = os.environ.get(section.key_variable, "").strip()
        if not (self._key.isascii() and self._key.replace(" ", "\n").isprintable()):
            raise ValueError(
                f"The variable {section.key_variable} must hold a key of printable ASCII "
                "characters without spaces, and holds others; copy the key again."
            )
        self._client = openai.OpenAI(
            api_key=self._key or "none",  # it must have one; `_complete` leaves it out
            base_url=section.base_url,
            timeout=section.timeout,
            max_retries=section.max_retries,
        )

    def ask(
        self, conversations: Sequence[Conversation], read: Callable[[str], float | None]
    ) -> list[Rating]:
        """Let the judge answer conversations, after telling how much that is.

        Answers of an earlier call are taken from the folder. On an error or an interruption the
        requests under way are waited for and kept, since they are paid for.

        Args:
            conversations: What to judge.
            read: Finds the rating in an answer; gives `None` if there is none.

        Returns:
            One rating per conversation, in their order.

        Raises:
            JudgeError: If the endpoint refuses, or stays silent after all repetitions.
        """
        bodies = [self._body(conversation) for conversation in conversations]
        files = [self._file(body) for body in bodies]
        # Equal requests are asked once.
        pending = {
            file: body for file, body in zip(files, bodies, strict=True) if self._lacks(file, read)
        }
        print(
            self.describe(list(pending.values()), num_kept=len(set(files)) - len(pending)),
            flush=True,
        )
        pool = ThreadPoolExecutor(self.section.concurrency)
        try:
            futures = [pool.submit(self._settle, *item, read) for item in pending.items()]
            for future in tqdm(as_completed(futures), total=len(futures), desc="judged"):
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)
        return [_decide(_read_answers(file), read) for file in files]

    def describe(self, bodies: Sequence[Mapping[str, Any]], *, num_kept: int = 0) -> str:
        """Say how many requests come, how long they are and what they cost.

        Args:
            bodies: Requests to make.
            num_kept: Requests answered already.

        Returns:
            One line. Tokens are estimated at four characters each. The cost counts prompts by that
            estimate and answers as long as they may be.
        """
        section = self.section
        characters = sum(len(m["content"]) for body in bodies for m in body["messages"])
        num_tokens = characters // CHARACTERS_PER_TOKEN
        kept = f" ({num_kept:,} more are kept from before)" if num_kept else ""
        plural = "" if len(bodies) == 1 else "s"
        line = (
            f"Judge {section.model} at {section.base_url}: {len(bodies):,} request{plural}{kept}, "
            f"about {num_tokens:,} prompt tokens"
        )
        if section.input_price is None and section.output_price is None:
            return f"{line}; no price is set."
        cost = num_tokens * (section.input_price or 0) / 1e6
        if section.max_tokens is None:
            return f"{line}; cost about {cost:,.2f} for the prompts, and more for the answers."
        num_answer_tokens = len(bodies) * section.max_tokens
        cost += num_answer_tokens * (section.output_price or 0) / 1e6
        return f"{line}, up to {num_answer_tokens:,} answer tokens; cost up to about {cost:,.2f}."

    def _body(self, conversation: Conversation) -> dict[str, Any]:
        """Write the request for a conversation."""
        body: dict[str, Any] = {"model": self.section.model}
        body["messages"] = [dict(message) for message in conversation]
        options = {"temperature": self.section.temperature, "max_tokens": self.section.max_tokens}
        return body | {name: value for name, value in options.items() if value is not None}

    def _file(self, body: Mapping[str, Any]) -> Path:
        """Name the file that keeps the answers to a request."""
        text = json.dumps(body, sort_keys=True)
        return self.cache_dir / f"{hashlib.sha256(text.encode()).hexdigest()}.json"

    def _lacks(self, file: Path, read: Callable[[str], float | None]) -> bool:
        """Tell whether a request is to be made, once more or for the first time."""
        answers = _read_answers(file)
        unrated = _decide(answers, read).value is None
        return unrated and len(answers) < self.section.max_attempts

    def _settle(
        self, file: Path, body: Mapping[str, Any], read: Callable[[str], float | None]
    ) -> None:
        """Ask until there is a rating, and keep each answer at once."""
        while self._lacks(file, read):
            answers = [*_read_answers(file), self._complete(body)]
            self.cache_dir.mkdir(parents=True, exist_ok=True)
            write_whole(file, json.dumps({"request": body, "answers": answers}, indent=1))

    def _complete(self, body: Mapping[str, Any]) -> str:
        """Make one request, with the client's own repetitions."""
        import openai

        headers = {} if self._key else {"Authorization": openai.omit}
        try:
            response = self._client.chat.completions.create(**body, extra_headers=headers)
            return (response.choices[0].message.content or "").replace(*self._mask)
        except (openai.OpenAIError, AttributeError, IndexError, TypeError, ValueError) as error:
            # A server may answer 200 with a page that is no completion.
            reason = " ".join(f"{type(error).__name__}: {error}".replace(*self._mask).split())
        # Raised out here, so that the client's exception and the request in it, which holds the
        # key, are not part of ours.
        raise JudgeError(
            f"The judge at {self.section.base_url} cannot be asked ({reason:.500}); see to "
            "`judge.base_url`, `judge.model` and the key, then run the same again: "
            f"answers so far are kept in {self.cache_dir}."
        )

    @property
    def _mask(self) -> tuple[str, str]:
        """What to replace in texts from the server, which may echo the key, and by what."""
        return (self._key, "[key]") if self._key else ("\0", "\0")


def _read_answers(file: Path) -> list[str]:
    """Read the answers kept for a request."""
    return json.loads(file.read_text("utf-8"))["answers"] if file.is_file() else []


def _decide(answers: Sequence[str], read: Callable[[str], float | None]) -> Rating:
    """Take the first answer that holds a rating."""
    for text in answers:
        if (value := read(text)) is not None:
            return Rating(value=value, text=text)
    return Rating(value=None, text=answers[-1] if answers else "")
