"""Teacher signals stored with the text: its view of every token, in a hundred bytes instead of V logits.

One typed signal, so that a loss never knows whether it came from a live model or from disk:

    Dense(logits [N, V])                    the live teacher, every logit
    TopK(ids [N, K], logprobs [N, K])       its K likeliest tokens
    Sampled(ids [N, K], weights [N, K])     K tokens drawn from it: unbiased (arXiv 2503.16870)
    States(states [N, d])                   its last hidden states: with its head, every logit again

A `SignalFormat` says how a stage's signals are written, and travels in its manifest; every row of text has
two binary columns. Integers are packed to the bit, most significant first; id_bits = ceil(log2 V).

    top_k     signal_ids: K ids a token, likeliest first. signal_values at 8 or 16 bits: for every token two
              float16 (the largest log-probability and the range below it), then K codes, uniform in the
              square root of the distance to the largest: likely tokens are the precise ones. At 32: float32.
    sampled   signal_ids: the distinct ids a token, ascending. signal_values: K bits a token, 1 where the next
              of its K sorted draws is a new id. Nothing is rounded.
    hidden    signal_ids: empty. signal_values: what the output head reads of every token. At 16 bits (also where
              8 are asked for): a float32 scale a token, the power of two above its largest number, then d float16
              divided by it. States computed in bfloat16 come back as they were (but for numbers below 2^-17 of
              the largest, which keep an absolute 2^-25 of it); of others 11 bits stay. At 32: d float32. The
              head lies once beside the rows (`distill.models.hooks.save_head`).

A signal belongs to one tokenizer and one chat template: `SignalFormat.problems` refuses any other reader.

Shapes: N kept tokens, V vocabulary, K stored tokens, T tokens of one row.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from distill.errors import UserError

FLOOR = -100.0  # log-probabilities below are stored as this: float16 has no room for -inf in a range


class _Signal:
    """What every signal can do: move to a device, and be the arguments of a loss of its form."""

    form: ClassVar[str]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(vars(self).values())

    def to(self, device, non_blocking: bool = False):
        return type(self)(*(t.to(device, non_blocking=non_blocking) for t in self.tensors))


@dataclass(frozen=True)
class Dense(_Signal):
    """logits [N, V]: for `distill.training.losses.divergences` that take the teacher's logits."""

    form = "dense"
    logits: Tensor


@dataclass(frozen=True)
class TopK(_Signal):
    """ids [N, K] int64, logprobs [N, K] natural logs at temperature 1: for `sparse_forward_kl`."""

    form = "sparse"
    ids: Tensor
    logprobs: Tensor


@dataclass(frozen=True)
class Sampled(_Signal):
    """ids [N, K] int64 (an id drawn twice stands twice), weights [N, K]: for `sampled_cross_entropy`.

    The expectation of the sum of weights at id i is the teacher's probability of i.
    """

    form = "sampled"
    ids: Tensor
    weights: Tensor


@dataclass(frozen=True)
class States(_Signal):
    """states [N, d] float32: what the teacher's output head reads. A teacher with that head makes logits of them."""

    form = "states"
    states: Tensor


# Forms that come from disk, and the kind of `generate.signal` that writes them.
STORED = {TopK.form: "top_k", Sampled.form: "sampled"}
HIDDEN = "hidden"  # the kind that any dense objective reads instead of a live teacher
HEAD = "head.safetensors"  # the teacher's output head, beside rows with signals of that kind


@dataclass(frozen=True)
class SignalFormat:
    """How stored signals are written, and whose they are.

    temperature: the teacher's softmax temperature that `sampled` tokens were drawn at (1 for the others, which the
    loss tempers). identity: `tokenizer_fingerprint` of the teacher's tokenizer and chat template.
    """

    kind: str  # "top_k", "sampled" or "hidden"
    k: int  # numbers a token: tokens, or of `hidden` the width of a state
    vocabulary: int
    temperature: float
    bits: int  # of a top_k value: 8, 16, or 32 for exact float32; of a number of a state: 16, or 32
    identity: dict[str, str]

    @classmethod
    def from_recipe(
        cls, section: Any, vocabulary: int, identity: dict[str, str], width: int = 0
    ) -> "SignalFormat":
        """What `generate.signal` (not of kind none) asks of a teacher with so many tokens and states so wide."""
        k = {"top_k": min(section.k, vocabulary), HIDDEN: width}.get(section.kind, section.k)
        bits = max(16, section.bits) if section.kind == HIDDEN else section.bits
        return cls(section.kind, k, vocabulary, section.temperature, bits, identity)

    @classmethod
    def from_manifest(cls, stored: dict[str, Any] | None) -> "SignalFormat | None":
        return cls(**{name: stored[name] for name in cls.__dataclass_fields__}) if stored else None

    def to_manifest(self) -> dict[str, Any]:
        return {**asdict(self), "id_bits": self.id_bits, "bytes_per_token_at_most": self.bytes_per_token()}

    @property
    def id_bits(self) -> int:
        return max(1, math.ceil(math.log2(self.vocabulary)))

    def bytes_per_token(self, distinct: float | None = None) -> float:
        """Bytes one token takes. `distinct` is the mean number of different ids among its K draws
        (`sampled` only); without it the most there can be, K. Every row rounds up to whole bytes, twice."""
        if self.kind == HIDDEN:
            return self.k * self.bits / 8 + (4 if self.bits < 32 else 0)
        if self.kind == "sampled":
            return ((self.k if distinct is None else distinct) * self.id_bits + self.k) / 8
        return self.k * (self.id_bits + self.bits) / 8 + (4 if self.bits < 32 else 0)

    def problems(self, reader: dict[str, str], objectives: Iterable[Any] = ()) -> list[str]:
        """Why a reader with this tokenizer_fingerprint and objectives cannot use them; [] if it can."""
        names = {"vocabulary": "vocabulary", "chat_template": "chat template", "eos": "end token"}
        changed = [text for key, text in names.items() if reader[key] != self.identity[key]]
        found = []
        if changed:
            found.append(
                f"the stored teacher signals belong to a tokenizer with another {' and '.join(changed)} than "
                "the student's, so they speak of other tokens; use a student with the teacher's tokenizer "
                "and chat template, or train.objectives='[{name: cross_entropy}]'"
            )
        return found + signal_problems(self.kind, self.temperature, objectives)


def signal_problems(kind: str, temperature: float, objectives: Iterable[Any]) -> list[str]:
    """What in a recipe's objectives does not fit signals of this kind, drawn at this temperature."""
    found = []
    for objective in objectives:
        if kind == HIDDEN and objective.signal in ("aligned", "hidden", "routers"):
            found.append(
                f"objective {objective.name} needs the live teacher, and generate.signal.kind={HIDDEN} stores what "
                "stands before its head alone; set generate.signal='{kind: none}', or leave the objective out"
            )
        if objective.signal not in STORED:
            continue
        wanted = STORED[objective.signal]
        if wanted != kind:
            found.append(
                f"objective {objective.name} reads stored teacher signals of kind {wanted}, and "
                f"generate.signal.kind is {kind}; set generate.signal='{{kind: {wanted}}}'"
            )
        elif kind == "sampled" and objective.options["temperature"] != temperature:
            found.append(
                f"objective {objective.name} has temperature {objective.options['temperature']:g} and the "
                f"signals were drawn at {temperature:g}, which cannot be changed afterwards; make them "
                "equal, by the objective's temperature or generate.signal.temperature (with --redo)"
            )
    return found


# ---- bits ---------------------------------------------------------------------------------------------


def pack(values: np.ndarray, bits: int) -> bytes:
    """Non-negative integers below 2**bits, `bits` each, rounded up to whole bytes at the end."""
    wide = np.unpackbits(values.astype(">u4").reshape(-1, 1).view(np.uint8), axis=1)
    return np.packbits(wide[:, 32 - bits :]).tobytes()


def unpack(blob: bytes, bits: int, count: int) -> np.ndarray:
    """The first `count` integers of `pack`, int64. Raises UserError for a blob of another length."""
    _check_size(blob, -(-count * bits // 8))
    wide = np.zeros((count, 32), dtype=np.uint8)
    flat = np.unpackbits(np.frombuffer(blob, dtype=np.uint8), count=count * bits)
    wide[:, 32 - bits :] = flat.reshape(count, bits)
    return np.packbits(wide, axis=1).view(">u4").reshape(-1).astype(np.int64)


def _check_size(blob: bytes, due: int) -> None:
    if len(blob) != due:
        raise UserError(
            f"a stored teacher signal has {len(blob)} bytes where {due} are due: it is damaged or of another "
            "format; run generate and filter with --redo"
        )


# ---- rows ---------------------------------------------------------------------------------------------


def encode_top_k(form: SignalFormat, ids: np.ndarray, logprobs: np.ndarray) -> tuple[bytes, bytes]:
    """(signal_ids, signal_values) of one row: ids [T, K], logprobs [T, K] float32, largest first."""
    packed = pack(ids, form.id_bits)
    if form.bits == 32:
        return packed, logprobs.astype("<f4").tobytes()
    logprobs = logprobs.astype(np.float32).clip(min=FLOOR)
    head = np.stack([logprobs[:, 0], logprobs[:, 0] - logprobs[:, -1]], axis=1).astype("<f2")
    largest, span = head.astype(np.float32).T[:, :, None]
    share = (largest - logprobs) / np.where(span > 0, span, 1)
    top = 2**form.bits - 1
    codes = np.rint(np.sqrt(share.clip(0, 1)) * top)
    return packed, head.tobytes() + pack(codes, form.bits)


def decode_top_k(form: SignalFormat, tokens: int, ids: bytes, values: bytes) -> tuple[np.ndarray, np.ndarray]:
    """(ids [T, K] int64, logprobs [T, K] float32) of one row of T tokens."""
    shape = tokens, form.k
    found = unpack(ids, form.id_bits, tokens * form.k).reshape(shape)
    if form.bits == 32:
        _check_size(values, 4 * tokens * form.k)
        return found, np.frombuffer(values, dtype="<f4").reshape(shape)
    head = np.frombuffer(values[: 4 * tokens], dtype="<f2").astype(np.float32)
    largest, span = head.reshape(tokens, 2).T[:, :, None]
    codes = unpack(values[4 * tokens :], form.bits, tokens * form.k).reshape(shape)
    logprobs = largest - span * (codes.astype(np.float32) / (2**form.bits - 1)) ** 2
    # Rounding must not make a distribution of more than 1: a loss would take it for logits.
    total = np.log(np.exp(logprobs).sum(1, keepdims=True))
    return found, logprobs - total.clip(min=0)


def encode_sampled(form: SignalFormat, ids: np.ndarray) -> tuple[bytes, bytes]:
    """(signal_ids, signal_values) of one row: ids [T, K], the draws of each token in ascending order."""
    new = np.ones(ids.shape, dtype=bool)
    new[:, 1:] = ids[:, 1:] != ids[:, :-1]
    return pack(ids[new], form.id_bits), np.packbits(new).tobytes()


def decode_sampled(
    form: SignalFormat, tokens: int, ids: bytes, values: bytes
) -> tuple[np.ndarray, np.ndarray]:
    """(ids [T, K] int64 with repeats, weights [T, K] float32, all 1 / K) of one row of T tokens."""
    new = unpack(values, 1, tokens * form.k)
    distinct = unpack(ids, form.id_bits, int(new.sum()))
    shape = tokens, form.k
    return distinct[new.cumsum() - 1].reshape(shape), np.full(shape, 1 / form.k, dtype=np.float32)


def encode_hidden(form: SignalFormat, states: np.ndarray) -> tuple[bytes, bytes]:
    """(signal_ids, signal_values) of one row: states [T, d] float32, finite."""
    if form.bits == 32:
        return b"", states.astype("<f4").tobytes()
    largest = np.abs(states).max(axis=1, initial=0)
    # A power of two: dividing by it rounds nothing. 1 for a row of zeros.
    scale = np.exp2(np.ceil(np.log2(np.where(largest > 0, largest, 1)))).astype("<f4")
    return b"", scale.tobytes() + (states / scale[:, None]).astype("<f2").tobytes()


def decode_hidden(form: SignalFormat, tokens: int, ids: bytes, values: bytes) -> tuple[np.ndarray]:
    """(states [T, d] float32,) of one row of T tokens."""
    _check_size(ids, 0)
    if form.bits == 32:
        _check_size(values, 4 * tokens * form.k)
        return (np.frombuffer(values, dtype="<f4").reshape(tokens, form.k).astype(np.float32),)
    _check_size(values, tokens * (4 + 2 * form.k))
    scale = np.frombuffer(values[: 4 * tokens], dtype="<f4").astype(np.float32)
    numbers = np.frombuffer(values[4 * tokens :], dtype="<f2").reshape(tokens, form.k)
    return (numbers.astype(np.float32) * scale[:, None],)


_KINDS = {
    "top_k": (decode_top_k, TopK),
    "sampled": (decode_sampled, Sampled),
    HIDDEN: (decode_hidden, States),
}


class StoredSignals:
    """The signal columns of a dataset, row by row as bytes; decoded when a batch asks for them."""

    def __init__(self, form: SignalFormat, ids: Sequence[bytes], values: Sequence[bytes]):
        self.form, self.ids, self.values = form, ids, values

    def take(self, rows: Sequence[int], lengths: Sequence[int]) -> TopK | Sampled | States:
        """The signal [N, ...] of all completion tokens of these rows, in order; lengths: their tokens."""
        decode, make = _KINDS[self.form.kind]
        found = [decode(self.form, int(n), self.ids[i], self.values[i]) for i, n in zip(rows, lengths)]
        return make(*(torch.from_numpy(np.concatenate(column)) for column in zip(*found)))
