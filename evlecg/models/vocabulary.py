"""What the tokens of a vocabulary spell, in bytes: what two tokenizers are compared by."""

from __future__ import annotations

import json
import re
from typing import Any

from evlecg.losses.bridge import END
from evlecg.models.encode import Encoder, Turn
from evlecg.models.kinds import ANSWERS
from evlecg.models.load import Loaded
from evlecg.models.views import AnyEncoder

METASPACE = "\u2581"
FALLBACK = re.compile(r"<0x[0-9A-F]{2}>")  # a byte that no piece of text covers


def token_bytes(loaded: Loaded, encoder: AnyEncoder | None) -> tuple[bytes | None, ...]:
    """Bytes of every row of a model's head: those of its tokenizer, or the two answers of a classifier."""
    if not isinstance(encoder, Encoder):
        return tuple(answer.encode() for answer in ANSWERS)
    return spelt_tokens(encoder, loaded.checkpoint.vocab_size)


def spelt_tokens(encoder: Encoder, vocab_size: int) -> tuple[bytes | None, ...]:
    """Bytes of every row of the output head.

    None where a row stands for no text (special tokens, rows beyond the tokenizer); the mark that ends an answer in
    the model's own chat template is `END`.

    Args:
        encoder: the model's encoder, whose tokenizer is of the fast kind.
        vocab_size: rows of the output head.
    """
    tokenizer = encoder.tokenizer
    spell = _speller(tokenizer)
    added = tokenizer.added_tokens_decoder  # their names are their text
    silent = {*tokenizer.all_special_ids, *(place for place, token in added.items() if token.special)}
    found: list[bytes | None] = [None] * vocab_size
    for token, place in tokenizer.get_vocab().items():
        if place >= vocab_size:
            continue
        if FALLBACK.fullmatch(token):
            found[place] = bytes([int(token[3:5], 16)])
        elif place not in silent:
            found[place] = token.encode() if place in added else spell(token)
    end = end_of_turn(encoder)
    if end is not None and end < vocab_size:
        found[end] = END
    return tuple(found)


def _speller(tokenizer: Any) -> Any:
    """How a token's name becomes bytes: byte-level BPE, metaspace with byte fallback, or WordPiece."""
    kinds = set(_types(json.loads(tokenizer.backend_tokenizer.to_str())))
    if "ByteLevel" in kinds:
        table = _byte_level_table()
        return lambda token: bytes(table[char] for char in token) if all(c in table for c in token) else token.encode()
    if "WordPiece" in kinds:
        return lambda token: token.removeprefix("##").encode() if token.startswith("##") else b" " + token.encode()
    return lambda token: token.replace(METASPACE, " ").encode()


def _types(tree: Any) -> Any:
    """Every "type" in a tokenizer's description, its model, pre-tokenizers and decoders included."""
    if isinstance(tree, dict):
        if isinstance(tree.get("type"), str):
            yield tree["type"]
        for key, value in tree.items():
            if key not in ("vocab", "merges", "added_tokens"):
                yield from _types(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from _types(value)


def _byte_level_table() -> dict[str, int]:
    """Character -> byte of byte-level BPE: printable bytes stand for themselves, the others for 256 and up (GPT-2)."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in own}
    others = [byte for byte in range(256) if byte not in own]
    return table | {chr(256 + place): byte for place, byte in enumerate(others)}


def end_of_turn(encoder: Encoder) -> int | None:
    """The token that follows an answer in the chat template, None where nothing does."""
    with_end = encoder.answer_ids(Turn("Is it?", "yes"))
    without = encoder.answer_ids(Turn("Is it?", "yes", ends=False))
    rest = with_end[len(without) :]
    return rest[0] if rest and with_end[: len(without)] == without else None
