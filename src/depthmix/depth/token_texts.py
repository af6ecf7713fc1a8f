"""The text of single tokens, also where a token is only a part of a character."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Sequence

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

BYTES = {character: byte for byte, character in bytes_to_unicode().items()}
"""What a byte-level vocabulary writes for each byte."""

BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
"""A SentencePiece vocabulary's token for one byte."""

PARTS = re.compile(r"(?:\\x[0-9a-f]{2})+|.", re.DOTALL)
r"""Characters, and parts of one that other tokens complete, as `\xf0`."""

UNSEEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs")
"""Categories of characters without a shape of their own."""

MARKS = {"\n": "↵", "\t": "⇥"}
"""Signs for what everyone knows by its sign."""


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> tuple[str, ...]:
    r"""Write each token as the text that it stands for, its spaces included.

    Decoding a token by itself loses its leading space in SentencePiece vocabularies, and gives the
    same replacement character for every part of a character.

    Args:
        tokenizer: A tokenizer with a byte-level or SentencePiece vocabulary.
        ids: Token ids; heads may be wider than the vocabulary.

    Returns:
        One text per id. A byte that is no character without its neighbours is written `\xf0`, an id
        without a token `<unused 50000>`.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    is_byte_level = backend is not None and "ByteLevel" in repr(backend.decoder)
    special = {number: token.content for number, token in tokenizer.added_tokens_decoder.items()}
    texts = []
    for number, piece in zip(ids, tokenizer.convert_ids_to_tokens(list(ids)), strict=True):
        byte = BYTE_TOKEN.fullmatch(piece or "")
        if number in special:
            texts.append(special[number])
        elif piece is None:
            texts.append(f"<unused {number}>")
        elif is_byte_level and BYTES.keys() >= set(piece):
            texts.append(_read(bytes(BYTES[character] for character in piece)))
        elif byte is not None:
            texts.append(_read(bytes.fromhex(byte[1])))
        else:
            texts.append(piece.replace("▁", " "))
    return tuple(texts)


def visible_text(text: str, *, dots: bool = True, unwritable: Collection[str] = frozenset()) -> str:
    r"""Write a token's text so that nothing of it is hidden or moves its neighbours.

    Args:
        text: Text as `token_texts` gives it.
        dots: Write spaces as `·`.
        unwritable: Further characters to write by their number.

    Returns:
        The text, with `⟨F0 9F⟩` for parts of a character, `⟨U+200B⟩` for what is not seen, `↵` and
        `⇥` for line breaks and tabs, and a circle under a mark that begins the text.
    """
    shown = ["◌"] if text and unicodedata.category(text[0]).startswith("M") else []
    for part in PARTS.findall(text):
        if part == " ":
            shown.append("·" if dots else " ")
        elif len(part) > 1:
            numbers = part.upper().split("\\X")
            shown.append(f"⟨{' '.join(numbers[1:])}⟩")
        elif part in MARKS:
            shown.append(MARKS[part])
        elif unicodedata.category(part) in UNSEEN or part in unwritable:
            shown.append(f"⟨U+{ord(part):04X}⟩")
        else:
            shown.append(part)
    return "".join(shown)


def _read(data: bytes) -> str:
    r"""Read bytes as text, and write those that are no whole character as `\xf0`."""
    return data.decode("utf-8", errors="backslashreplace")
