"""Output head and loss in one: no tensor of [tokens, vocabulary] exists, for student or teacher.

At V = 151,936 the logits of 1,024 tokens are 0.6 GB, for each model, once more for every gradient, and the time
goes into page faults rather than arithmetic. Here the head is applied to a chunk of kept hidden states, the
chunk's losses and their gradient with respect to the logits are formed while it is there, and only
d loss / d hidden [N, d] and (if the head trains) d loss / d weight [V, d] stay for `backward`:

    head = Head(weight, bias)                                   # student's; a live teacher brings its own
    total, sums = fused_loss(hidden, head, terms, {"targets": Targets(ids), "dense": Projected(states, head_t)})
    (total / tokens_in_step).backward()

Equal to autograd through the whole logits (tests/training/losses/test_fused.py), for tied and untied heads, frozen
heads (no head gradient is computed), autocast, accumulation, and under DDP and FSDP2 where it runs inside the
wrapped forward. The loss must be used linearly: there are no second derivatives. The idea of forming the head's
gradient in the forward pass is that of Liger Kernel (arXiv 2410.10989, section 3.2).

Memory beside inputs and results: a chunk of logits of the student, one of a live teacher, and float32 temporaries of a
piece [m, V] of it: forward and reverse KL 5.2, JSD 7.2, cross-entropy and stored signals 3.2, others, by autograd, 4.2
to 13.4. On an accelerator a chunk has 256 MiB and a piece 64: forward KL in bfloat16 takes 0.83 GiB, whatever V, where
temporaries of whole chunks took 3.0 at V = 151,936 (counted: tests/launches/test_accelerator.py).

Shapes: N kept tokens, V vocabulary, d hidden size, n rows of a chunk, m rows of a piece that fits the cache.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from distill.models.hooks import Head
from distill.training import losses
from distill.training.losses.rowwise import ACCELERATOR_CHUNK, CPU_CHUNK, MakeGradient, RowFormula, closed
from distill.training.losses.sparse import already_checked, check_sampled, check_stored

# Bytes of a chunk of logits. Every chunk reads the whole head again: at V = 151,936 float32 products of 96 rows take
# 1.06 times as long as those of 147, which are as fast as more (on another CPU 110 rows 1.2 times 205). As many rows
# may take twice the room.
HEAD_CHUNK, ENOUGH_ROWS, LEAST_ROWS, MOST_ROWS = 3 * 2**24, 147, 64, 8192
# Rows of the head whose gradient is made at once where it is summed in wider numbers: they stay in the cache.
HEAD_SLICE = 4096
HEAD_CHUNK_ON_ACCELERATORS = 2**28
CHECKS = {"sparse": check_stored, "sampled": check_sampled}  # of stored signals, by form


class Scratch:
    """Memory for a chunk of logits, kept from step to step: fresh pages cost a CPU a quarter of a product's time.

    One owner, one chunk at a time. Accelerators, whose allocators keep what is freed, get new memory.
    """

    def __init__(self):
        self._flat: Tensor | None = None

    def take(self, rows: int, like: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
        """[rows, columns] with anything in it, on the device of `like`."""
        if like.device.type != "cpu":
            return like.new_empty(rows, columns, dtype=dtype)
        if self._flat is None or self._flat.dtype != dtype or len(self._flat) < rows * columns:
            self._flat = None  # first, or both are in memory for a moment
            self._flat = like.new_empty(rows * columns, dtype=dtype)
        return self._flat[: rows * columns].view(rows, columns)


@dataclass
class Term:
    """One objective of the sum: its name in `distill.training.losses`, the signal form it reads, weight, options."""

    name: str
    form: str
    weight: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        self.closed = closed(self.name, self.options)
        # What the gradients below are still to be multiplied by, the same for every row.
        self.factor = self.weight * (self.closed.factor if self.closed else 1.0)

    def formula(self, rows: RowFormula) -> tuple[Tensor, Tensor]:
        """(value [m], its gradient [m, V]) by autograd through the objective's formula."""
        function = getattr(losses, self.name)
        with torch.enable_grad():
            student = rows.student.detach().requires_grad_()
            value = function(student, *rows.given[self.form], **self.options)
            return value.detach(), torch.autograd.grad(value.sum(), student)[0]

    def __call__(self, rows: RowFormula) -> tuple[Tensor, MakeGradient]:
        """(value [m], what makes the gradient [m, V] of weight times value, but for `factor`)."""
        if self.closed is not None:
            value, make = self.closed(rows)
            # -inf in a logit: the formula knows what it is worth. (Where there can be none, it is a NaN.)
            if rows.sure or math.isfinite(value.sum()):
                return value, make
        value, gradient = self.formula(rows)
        return value, lambda out=None: torch.mul(gradient, self.weight / self.factor, out=out)


# ---- what the teacher says of N tokens, readable a chunk at a time ----------------------------------------


@dataclass(frozen=True)
class Given:
    """Tensors of N rows as they are: targets, dense logits, ids with log-probabilities or weights.

    checked: whether stored signals were held to `CHECKS` already, on the host.
    """

    tensors: tuple[Tensor, ...]
    checked: bool = False

    def chunk(self, part: slice, _like: Tensor) -> tuple[Tensor, ...]:
        return tuple(t[part] for t in self.tensors)


@dataclass(frozen=True)
class Drawn:
    """A teacher's dense signal beside the tokens [N] that the student drew and their log-probabilities [N] then."""

    dense: Any
    targets: Tensor
    logprobs: Tensor

    def chunk(self, part: slice, like: Tensor) -> tuple[Tensor, ...]:
        return *self.dense.chunk(part, like), self.targets[part], self.logprobs[part]


@dataclass(frozen=True)
class WholeLogits:
    """A teacher's logits [N, V'] that exist already: its head is not one plain matrix."""

    logits: Tensor

    def chunk(self, part: slice, like: Tensor | None) -> tuple[Tensor, ...]:
        logits = self.logits[part]
        return (logits if like is None else match_vocabulary(logits, like.shape[1]),)


class Projected:
    """A live teacher's logits, made a chunk at a time from its hidden states [N, d'] and its head."""

    def __init__(self, hidden: Tensor, head: Head, scratch: Scratch | None = None):
        self.hidden, self.head = hidden.detach(), head
        self._scratch = scratch or Scratch()
        self._weight = head.weight.detach().to(hidden.dtype)
        self.vocabulary = len(head.weight)

    @property
    def finite(self) -> bool:
        return self.head.finite

    def chunk(self, part: slice, like: Tensor | None) -> tuple[Tensor, ...]:
        """The teacher's logits for a student chunk `like` [n, V]: cut, or padded with -inf, to its V.

        They last until the next chunk. Without `like` they keep the teacher's own vocabulary.
        """
        hidden = self.hidden[part]
        out = self._scratch.take(len(hidden), hidden, len(self._weight), hidden.dtype)
        logits = self.head.raw(hidden, out, self._weight)
        logits = self.head.transform(logits)
        return (logits if like is None else match_vocabulary(logits, like.shape[1]),)


def match_vocabulary(logits: Tensor, vocabulary: int) -> Tensor:
    """Teacher logits [N, V'] cut, or padded with -inf, to the student's V.

    For two tokenizers that are equal by content: rows beyond them are padding of the embedding (151,936
    against 152,064 in the Qwen family) and stand for no token.
    """
    missing = vocabulary - logits.shape[-1]
    if missing > 0:
        return torch.nn.functional.pad(logits, (0, missing), value=float("-inf"))
    return logits[:, :vocabulary]


# ---- the loss ---------------------------------------------------------------------------------------------


def fused_loss(
    hidden: Tensor,
    head: Head,
    terms: list[Term],
    signals: dict[str, Any],
    scratch: Scratch | None = None,
    leave: Callable[[Tensor], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """(sum over N tokens of the weighted terms, each term's own sum [terms]) for student states [N, d].

    `signals` by form: objects with `chunk(slice, student_chunk) -> tensors`; with "from_teacher" [N], tokens
    that are 0 there count for no objective on targets: nobody but the student said them; with "weights" [N], every
    term of a token is multiplied by its weight. The first result is differentiable in `hidden` and, where it requires
    grad, in the head's weight and bias; both results are float32 (the terms float64). Products run in autocast's dtype
    where autocast is on, else in `hidden`'s; everything elementwise in float32 (float64 for float64 states). `scratch`
    is for a caller of many steps; `leave` is given the gradient of the head's weight in the backward pass, which
    autograd then hears nothing of.
    """
    if (
        not terms
    ):  # every objective is on the way to the logits; a gradient of 0 still reaches the head (DDP waits)
        nothing = [t.sum() for t in (hidden, head.weight, head.bias) if t is not None and t.requires_grad]
        return sum(nothing, hidden.new_zeros(())).float() * 0, hidden.new_zeros(0, dtype=torch.float64)
    # The closed forms take stored signals as they are: they are looked at here, once, and not row by row.
    for form in signals.keys() & CHECKS.keys():
        if not signals[form].checked:
            CHECKS[form]((len(hidden), len(head.weight)), *signals[form].tensors)
    dtype = hidden.dtype
    if torch.is_autocast_enabled(hidden.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(hidden.device.type)
    with torch.autocast(hidden.device.type, enabled=False):
        grad = torch.is_grad_enabled()
        return _FusedLoss.apply(
            hidden if grad else hidden.detach(), head.weight if grad else head.weight.detach(), head.bias,
            head, terms, signals, dtype, scratch or Scratch(), leave,
        )  # fmt: skip


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, head: Head, terms, signals, dtype, scratch: Scratch, leave):
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        sums = [torch.zeros((), dtype=torch.float64, device=hidden.device) for _ in terms]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        weight_low = weight.detach().to(dtype)
        d_hidden = torch.empty(hidden.shape, dtype=wide, device=hidden.device) if wants_hidden else None
        fresh = torch.empty if len(hidden) else torch.zeros  # the first chunk fills it, where there is one
        d_weight = fresh(weight.shape, dtype=wide, device=weight.device) if wants_weight else None
        d_bias = torch.zeros(len(weight), dtype=wide, device=weight.device) if wants_bias else None
        wants = wants_hidden or wants_weight or wants_bias
        size = chunk_rows(len(hidden), len(weight), dtype.itemsize, hidden.device)
        buffer = scratch.take(size, hidden, len(weight), dtype)
        known = _ours(head, terms, signals)
        for start in range(0, len(hidden), size):
            part = slice(start, min(start + size, len(hidden)))
            states = hidden[part].detach().to(dtype)
            logits = head.raw(states, buffer[: len(states)], weight_low)
            given = {form: signal.chunk(part, logits) for form, signal in signals.items()}
            with already_checked():
                scales = _pieces(logits, given, head, terms, sums, known, wants)
            if not wants:
                continue
            # From here on `logits` holds d loss / d raw logits, divided by the first factor and each row by its scale.
            if d_hidden is not None:
                d_hidden[part] = _unscaled(torch.mm(logits, weight_low), scales, wide)
            if d_weight is not None:
                rows, largest = states, None
                if scales is not None:  # 1 at most: a float16 below 6e-8 is 0
                    largest = scales.max()
                    rows = states * (scales / largest)[:, None].to(dtype)
                _add_products(d_weight, logits, rows, largest, first=start == 0)
            if d_bias is not None:
                d_bias += _unscaled(logits, scales, wide).sum(0)
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.dtypes = hidden.dtype, weight.dtype, bias.dtype if bias is not None else None
        ctx.factor, ctx.leave = terms[0].factor, leave
        total = sum(t.weight * s for t, s in zip(terms, sums))
        sums = torch.stack(sums)
        ctx.mark_non_differentiable(sums)
        return total.to(wide), sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream, _sums):
        found = [None if saved is None else saved.mul_(upstream * ctx.factor) for saved in ctx.saved_tensors]
        if ctx.leave is not None and found[1] is not None:
            ctx.leave(found[1])
            found[1] = None
        found = [None if f is None else f.to(dtype) for f, dtype in zip(found, ctx.dtypes)]
        return *found, None, None, None, None, None, None


def _add_products(into: Tensor, logits: Tensor, rows: Tensor, times: Tensor | None, first: bool) -> None:
    """into [V, d] += logits [n, V]' rows [n, d], times a number if there is one; or = where it is the first."""
    if into.dtype == rows.dtype:
        into.addmm_(logits.t(), rows, beta=0 if first else 1)
        return
    for start in range(0, len(into), HEAD_SLICE):
        part = slice(start, start + HEAD_SLICE)
        product = torch.mm(logits[:, part].t(), rows)
        if times is not None:
            product = product * times.expand(1)  # of one dimension, and so float32 with it
        if first:
            into[part] = product
        else:
            into[part] += product


def _ours(head: Head, terms: list[Term], signals: dict[str, Any]) -> dict[str, Any]:
    """What `RowFormula` may know. Of "student" and "dense": which logits are made here, so that they may be shifted,
    and which of those one objective reads, so that it may write over them; whether any can be -inf or is padded.

    Nothing is written over where a logit may be -inf: the formula must see it as it was.
    """
    finite = {"student"} if head.finite else set()
    finite |= {
        form for form, signal in signals.items() if isinstance(signal, Projected) and signal.head.finite
    }
    readers = {"student": len(terms), "dense": sum(term.form == "dense" for term in terms)}
    all_finite = "student" in finite and (not readers["dense"] or "dense" in finite)
    alone = {who for who in finite if all_finite and readers[who] == 1}
    dense = signals.get("dense")
    sure = head.finite and (not readers["dense"] or getattr(dense, "finite", False))
    width = getattr(dense, "vocabulary", None)
    padded = None if width is None else width < len(head.weight)
    return {"ours": frozenset(finite), "alone": frozenset(alone), "sure": sure, "padded": padded}


def chunk_rows(rows: int, vocabulary: int, itemsize: int, device: torch.device) -> int:
    """Rows of logits that exist at a time, of `rows` altogether: chunks of one size rather than a small last one."""
    row = vocabulary * itemsize
    room = HEAD_CHUNK_ON_ACCELERATORS // row
    if device.type == "cpu":
        room = max(HEAD_CHUNK // row, min(ENOUGH_ROWS, 2 * HEAD_CHUNK // row))
    chunks = max(1, math.ceil(rows / min(max(room, LEAST_ROWS), MOST_ROWS)))
    return max(1, math.ceil(rows / chunks))


def _pieces(
    logits: Tensor,
    given: dict[str, tuple[Tensor, ...]],
    head: Head,
    terms: list[Term],
    sums: list[Tensor],
    known: dict[str, Any],
    wants: bool,
) -> Tensor | None:
    """Losses of a chunk [n, V] of raw logits, a few rows at a time: small temporaries, and in the cache of a CPU.

    Adds to `sums`, and overwrites `logits` with d loss / d logits / the first term's factor. A float16 gradient would
    vanish (the loss scaler multiplies it only in `backward`), so its rows are divided by their largest entry too,
    which is returned. `known`: of `_ours`.
    """
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    scales = logits.new_empty(len(logits), dtype=wide) if logits.dtype == torch.float16 else None
    elements = CPU_CHUNK if logits.device.type == "cpu" else ACCELERATOR_CHUNK
    rows = max(1, elements // logits.shape[1])
    for start in range(0, len(logits), rows):
        part = slice(start, start + rows)
        said = {form: tuple(t[part] for t in ts) for form, ts in given.items()}
        # A call of its own: what it made is gone before the next piece begins.
        gradient, values = _piece(
            logits[part].to(wide), said, head, terms, known, wants, wide == logits.dtype
        )
        for total, value in zip(sums, values):
            total += value
        if gradient is None:  # not asked for, or it stands where the logits did
            continue
        if scales is not None:
            scales[part] = gradient.abs().amax(-1).clamp(min=torch.finfo(wide).tiny)
            gradient = gradient / scales[part, None]
        logits[part] = gradient
        del gradient
    return scales


def _piece(
    raw: Tensor,
    said: dict[str, tuple[Tensor, ...]],
    head: Head,
    terms: list[Term],
    known: dict[str, Any],
    wants: bool,
    in_place: bool,
) -> tuple[Tensor | None, list[Tensor]]:
    """(d loss / d raw logits / the first term's factor [m, V], each term's sum) of raw logits [m, V].

    None for the first where nobody wants it, and where `in_place` lets it take the place of `raw`, and the head too.
    """
    piece, makers, values = RowFormula(head.transform(raw), said, **known), [], []
    for term in terms:
        value, make = term(piece)
        for weights in _row_weights(term, said):
            value, make = value * weights, _masked(make, weights)
        values.append(value.sum())
        makers.append(make)
    if not wants:
        return None, values
    # All losses are known: the first gradient may take the place of the logits.
    in_place = in_place and head.plain
    gradient = makers[0](raw if in_place else None)
    for term, make in zip(terms[1:], makers[1:]):
        gradient.add_(make(), alpha=term.factor / terms[0].factor)
    return None if in_place else head.pull_back(gradient, raw), values


def _row_weights(term: Term, said: dict[str, tuple[Tensor, ...]]) -> Iterator[Tensor]:
    """What the term's losses [m] are multiplied by, row by row."""
    if term.form == "targets" and "from_teacher" in said:
        yield from said["from_teacher"]
    yield from said.get("weights", ())


def _masked(make: MakeGradient, rows: Tensor) -> MakeGradient:
    """The same gradient times `rows` [m]."""
    return lambda out=None: make(out).mul_(rows[:, None])


def _unscaled(rows: Tensor, scales: Tensor | None, wide: torch.dtype) -> Tensor:
    return rows.to(wide) if scales is None else rows.to(wide) * scales[:, None]


def whole_loss(logits: Tensor, terms: list[Term], signals: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The same two results from logits [N, V] that exist already: for heads that are not one matrix."""
    part, total = slice(0, len(logits)), logits.new_zeros((), dtype=torch.float32)
    sums = []
    for term in terms:
        function: Callable[..., Tensor] = getattr(losses, term.name)
        value = function(logits, *signals[term.form].chunk(part, logits), **term.options)
        for weights in _row_weights(
            term, {form: s.tensors for form, s in signals.items() if isinstance(s, Given)}
        ):
            value = value * weights
        value = value.sum()
        total = total + term.weight * value
        sums.append(value.detach().double())
    return total, torch.stack(sums)
