"""Distil from a teacher with another tokenizer: where both predict from the same text, and by what loss.

    view = TeacherView(student_tokenizer, teacher_tokenizer)
    rows = [view.row(messages, completion_ids) for ...]              # once per dataset row
    theirs = view.collate(rows)                                      # beside the student's own batch
    logits = KeptLogits(teacher)(theirs.input_ids, theirs.attention_mask, theirs.keep)          # [M, V']
    loss = theirs.spread(uld_rows(student_logits[theirs.rows], logits))                         # [N]

The teacher reads the row's `messages` through its own chat template, and then the completion's text in its
own tokens. The student's prompt decoded to text would show it markup that is no markup to it, split into
characters, and its own turn would never begin. What both share is the question and the bytes of the answer.

A student position has a counterpart where some teacher position has read exactly the same bytes of the
answer; positions inside a token of the other model have none, and cost nothing. The end of turn of one is the
end of turn of the other. The original method pairs the t-th token with the t-th, whatever they spell.

Shapes: B rows, N kept tokens of the student's batch, M <= N of them with a counterpart, V, V' vocabularies.

`TokenBytes` gives the bytes of text behind each token id, for byte-level and SentencePiece-like tokenizers.

    text = TokenBytes(tokenizer); text.pieces(ids)        # [b"Hel", b"lo", ...], b"".join = the text in UTF-8

Why bytes and not characters: a token may end inside a character, so that no string of its own exists and
offsets in characters are ambiguous; a position in the bytes always exists. Why not `decode` of every prefix:
that is quadratic, and writes a replacement character for each half character.

Added tokens (special or not) count as the text of their name, as `decode` shows them.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from distill.errors import RunError, UserError
from distill.models.chat import continuation, opening, prompt_ids, text_ids

# ------------------------------------------------------------------------------------------- which positions


def align(student: Sequence[bytes], teacher: Sequence[bytes]) -> np.ndarray:
    """Pairs (student position, teacher position) [M, 2] that have read the same bytes, both increasing.

    Both are one text in the pieces of two tokenizers, an end of turn being b"" as the last piece. Position j
    predicts piece j from the pieces before it. Where the texts part (a teacher that normalises, a completion
    cut inside a character), pairs stop at the last common byte. Of several positions at one byte the last
    counts.
    """
    agreed = _common_bytes(b"".join(student), b"".join(teacher))
    starts = [np.cumsum([0, *map(len, pieces)])[:-1] for pieces in (student, teacher)]
    # Reversed, because intersect1d returns first places.
    both, mine, theirs = np.intersect1d(starts[0][::-1], starts[1][::-1], return_indices=True)
    pairs = np.stack([len(student) - 1 - mine, len(teacher) - 1 - theirs], axis=1)
    return pairs[both <= agreed].astype(np.int64)


def _common_bytes(a: bytes, b: bytes) -> int:
    length = min(len(a), len(b))
    differ = np.frombuffer(a[:length], np.uint8) != np.frombuffer(b[:length], np.uint8)
    return int(differ.argmax()) if differ.any() else length


# ----------------------------------------------------------------------------------------- the teacher's rows


@dataclass(frozen=True)
class TeacherRow:
    """One row in the teacher's tokens: ids [prompt + completion], `pairs` [M, 2] of completion positions."""

    ids: np.ndarray
    prompt_tokens: int
    pairs: np.ndarray
    student_tokens: int  # of the student's completion


@dataclass
class TeacherBatch:
    """The teacher's side of a batch, rows in the same order."""

    input_ids: Tensor  # [B, T'] right-padded
    attention_mask: Tensor  # [B, T']
    keep: Tensor  # [B, T'] bool: M positions with a counterpart
    rows: Tensor  # [M] which of the student's N kept tokens each is, increasing
    kept: int  # N

    def to(self, device) -> "TeacherBatch":
        moved = (self.input_ids, self.attention_mask, self.keep, self.rows)
        return TeacherBatch(*(t.to(device, non_blocking=True) for t in moved), self.kept)

    def spread(self, values: Tensor) -> Tensor:
        """Losses [M] of the aligned tokens -> [N], 0 for the others; differentiable."""
        return values.new_zeros(self.kept).index_copy(0, self.rows, values)


def aligned_share(rows: Iterable[TeacherRow]) -> float:
    """Share of the student's completion tokens that have a counterpart, 0 to 1; the rest carry no loss."""
    rows = list(rows)
    return sum(len(row.pairs) for row in rows) / max(sum(row.student_tokens for row in rows), 1)


class TeacherView:
    """Rows of a student's dataset as another tokenizer's model reads them.

    `ends`: ids that end the student's turn, besides its tokenizer's end token. The teacher's turn ends with
    its tokenizer's end token. Raises UserError for a tokenizer that `TokenBytes` cannot read.
    """

    def __init__(
        self, student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, ends: Iterable[int] = ()
    ):
        self._mine, self._theirs = TokenBytes(student), TokenBytes(teacher)
        self._ends = {student.eos_token_id, *ends}
        self._teacher = teacher
        self._opened = opening(student), opening(teacher)

    def completion(self, completion_ids: Sequence[int]) -> tuple[list[int], np.ndarray]:
        """(the completion in the teacher's tokens, pairs [M, 2] of positions in the two completions).

        A completion that ends its turn ends the teacher's too; one that was cut short ends neither.
        """
        ids = [int(i) for i in completion_ids]
        content = len(ids)
        while content and ids[content - 1] in self._ends:
            content -= 1
        mine = self._mine.pieces(ids[:content])
        # Both as whole turns, so that what one template opens and the other leaves to its model falls into place.
        turn = self._opened[0] + b"".join(mine).decode(errors="replace")
        said = continuation(turn, self._opened[1])
        translated = text_ids(self._teacher, said) if said else []
        theirs = self._theirs.pieces(translated)
        lead = [[opened.encode()] if opened else [] for opened in self._opened]
        if content < len(ids):
            mine, theirs = [*mine, b""], [*theirs, b""]
            translated = [*translated, self._teacher.eos_token_id]
        pairs = align([*lead[0], *mine], [*lead[1], *theirs]) - [len(lead[0]), len(lead[1])]
        return list(translated), pairs[(pairs >= 0).all(1)]

    def row(self, messages: list[dict], completion_ids: Sequence[int]) -> TeacherRow:
        """`messages` and `completion_ids` of a dataset row. UserError where the template refuses them."""
        try:
            prompt = prompt_ids(self._teacher, messages)
        except UserError as error:
            raise UserError(
                f"teacher: {error}; leave out prompts.system, or take a teacher whose template knows these roles"
            ) from None
        completion, pairs = self.completion(completion_ids)
        ids = np.asarray([*prompt, *completion], dtype=np.int32)
        return TeacherRow(ids, len(prompt), pairs, len(completion_ids))

    def collate(self, rows: Sequence[TeacherRow]) -> TeacherBatch:
        """One right-padded batch; the last token of a row is never an input, as in the student's batch."""
        width = max(max(len(row.ids) for row in rows) - 1, 1)
        pad = self._teacher.pad_token_id
        ids = np.full((len(rows), width), self._teacher.eos_token_id if pad is None else pad, dtype=np.int64)
        mask = np.zeros((len(rows), width), dtype=np.int64)
        keep = np.zeros((len(rows), width), dtype=bool)
        counterpart, start = [], 0
        for b, row in enumerate(rows):
            length = len(row.ids) - 1
            ids[b, :length], mask[b, :length] = row.ids[:-1], 1
            keep[b, row.prompt_tokens - 1 + row.pairs[:, 1]] = True
            counterpart.append(start + row.pairs[:, 0])
            start += row.student_tokens
        arrays = (ids, mask, keep, np.concatenate(counterpart))
        return TeacherBatch(*map(torch.from_numpy, arrays), start)


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
