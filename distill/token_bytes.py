"""The bytes of text behind each token id, for byte-level and SentencePiece-like tokenizers.

    text = TokenBytes(tokenizer); text.pieces(ids)        # [b"Hel", b"lo", ...], b"".join = the text in UTF-8

Why bytes and not characters: a token may end inside a character, so that no string of its own exists and
offsets in characters are ambiguous; a position in the bytes always exists. Why not `decode` of every prefix:
that is quadratic, and writes a replacement character for each half character.

Added tokens (special or not) count as the text of their name, as `decode` shows them.
"""

import json
import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from distill.errors import RunError, UserError

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "\u2581"  # how SentencePiece writes a space
_SAMPLE = "Ab  c\n12 \u00e9\u6f22\U0001f642"


def byte_level_alphabet() -> dict[str, int]:
    """Character -> byte, as byte-level tokenizers write bytes (GPT-2's `bytes_to_unicode`, inverted)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


class TokenBytes:
    """`pieces(ids)`: the bytes of each token; read once for the whole vocabulary."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        """Raises UserError for a tokenizer whose tokens do not stand for bytes (as WordPiece's do not)."""
        self.name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        kinds = _decoder_kinds(tokenizer)
        if "ByteLevel" in kinds:
            alphabet, read = byte_level_alphabet(), _byte_level
        elif kinds & {"Metaspace", "ByteFallback"}:
            alphabet, read = {}, _sentence_piece
        else:
            raise self._unreadable(f"its decoder is {', '.join(sorted(kinds)) or 'unknown'}")
        vocabulary = tokenizer.get_vocab()
        self._table: list[bytes | None] = [None] * (max(vocabulary.values()) + 1)
        for token, number in vocabulary.items():
            self._table[number] = read(token, alphabet)
        for number, added in tokenizer.added_tokens_decoder.items():
            # Byte-level decoding would take a character of a name for the byte it stands for elsewhere.
            self._table[number] = read(added.content, alphabet) if not alphabet else added.content.encode()
        self._strips = False
        self._strips = self._check(tokenizer)

    def pieces(self, ids: Sequence[int]) -> list[bytes]:
        """The bytes of each token of one text, without the space that some tokenizers put before every text.

        Raises RunError for an id that stands for no token.
        """
        found = [self._table[i] if 0 <= i < len(self._table) else None for i in ids]
        if None in found:
            raise RunError(f"id {ids[found.index(None)]} is no token of '{self.name}'; make these rows again")
        if self._strips and found and found[0].startswith(b" "):
            found[0] = found[0][1:]
        return found

    def _check(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Compare with the tokenizer's own decode; returns whether that drops a leading space."""
        ids = tokenizer(_SAMPLE, add_special_tokens=False)["input_ids"]
        text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        read = b"".join(self.pieces(ids)).decode(errors="replace")
        if read not in (text, " " + text):
            raise self._unreadable(f"it decodes to {text!r} what its tokens spell as {read!r}")
        return read != text

    def _unreadable(self, why: str) -> UserError:
        return UserError(
            f"the tokens of '{self.name}' cannot be read as bytes ({why}); text can still be distilled: use "
            "train.objectives=[{name: cross_entropy}]"
        )


def _decoder_kinds(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = json.loads(backend.to_str())["decoder"] if backend is not None else None
    parts = decoder.get("decoders", [decoder]) if decoder else []
    return {part["type"] for part in parts}


def _byte_level(token: str, alphabet: dict[str, int]) -> bytes:
    known = all(character in alphabet for character in token)
    return bytes(alphabet[character] for character in token) if known else token.encode()


def _sentence_piece(token: str, _alphabet: dict[str, int]) -> bytes:
    byte = _BYTE.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace(_SPACE, " ").encode()
