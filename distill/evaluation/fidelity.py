"""How closely a model follows its teacher, token by token: on the teacher's answers and on the model's own.

Accuracy and agreement diverge (arXiv 2505.15442): a student can be right by another route, or agree and be
wrong. So both are reported. Teacher-forced: both models read the same answer, and at every one of its tokens
their next-token distributions are compared. On the teacher's text a student stands where the teacher led it;
on its own text it stands where it led itself, which is where it will be used (the exposure gap that on-policy
distillation is about: GKD, arXiv 2306.13649).

    fidelity(student, teacher, rows, pad_id)
    # {"answers": 200, "tokens": 9041, "top1_agreement": 0.998, "top1_agreement_stderr": ..., "forward_kl": ...}

`read_rows` is the one pass behind it, which also brings the likelihood of the text, and `Reader` the teacher that
reads a text once for all its students.

Tokens of one answer are not independent, so standard errors and intervals have the answer as their unit.

Shapes: N tokens of a batch, G answers, V vocabulary.

Calibration asks whether a model's probability means what it says. Two questions with one measure. Tokens: on the
teacher's answers, is the most likely next token the one that the teacher wrote, as often as its probability
promises? Answers: is a greedy answer right as often as the probability of the whole text promises?

    counts = TokenCalibration(); counts.add(logits, targets); counts.result()
    answer_calibration(rows)

The expected calibration error is sum_b n_b/n |accuracy_b - confidence_b| over M = 15 bins of equal width
(Naeini et al., AAAI 2015; Guo et al. 2017, arXiv 1706.04599, equation 3 and their M). Equal width is chosen
because published numbers use it; most tokens are near-certain and share the last bin, so read the bins, which
are the reliability diagram, with their counts. The Brier score (Brier 1950) is a proper score: it also falls
when a model gets better, not only when it gets more honest.

Shapes: N tokens, V vocabulary, M bins.
"""

import math
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.data.batches import Batch, TokenRows
from distill.data.scoring import BATCH_LOGITS, CHUNK_LOGITS, length_batches
from distill.devices import dealt, even_size
from distill.evaluation.stats import ratio
from distill.models.hooks import AtHead, KeptLogits, at_places
from distill.training.losses.divergences import forward_kl, reverse_kl
from distill.training.losses.fused import match_vocabulary

BINS = 15
MOST_STATES = 2**28  # bytes that a reader remembers: 116,000 tokens of SmolLM2 in float32


class Reliability:
    """Counts, confidences and hits per bin of equal width: bin b holds confidences in (b/M, (b+1)/M]."""

    def __init__(self):
        self.n, self.confidence, self.hits = np.zeros(BINS), np.zeros(BINS), np.zeros(BINS)

    def add(self, confidence: np.ndarray, hit: np.ndarray) -> None:
        """confidence [N] in 0 to 1, hit [N] bool."""
        index = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
        self.n += np.bincount(index, minlength=BINS)
        self.confidence += np.bincount(index, weights=confidence, minlength=BINS)
        self.hits += np.bincount(index, weights=hit, minlength=BINS)

    @property
    def error(self) -> float | None:
        """Expected calibration error, 0 to 1; None without predictions."""
        total = self.n.sum()
        return float(np.abs(self.hits - self.confidence).sum() / total) if total else None

    def bins(self) -> list[dict[str, Any]]:
        return [
            {
                "low": b / BINS,
                "high": (b + 1) / BINS,
                "n": int(n),
                "confidence": float(confidence / n) if n else None,
                "accuracy": float(hits / n) if n else None,
            }
            for b, (n, confidence, hits) in enumerate(zip(self.n, self.confidence, self.hits))
        ]


class TokenCalibration:
    """Sums over tokens, so that no logits have to be kept. `merge` adds those of other tokens."""

    def __init__(self):
        self.reliability, self.tokens, self.brier, self.nll = Reliability(), 0, 0.0, 0.0

    def add(self, logits: Tensor, targets: Tensor) -> None:
        """Finite logits [N, V] and the tokens [N] that the text really has."""
        for part in range(0, len(logits), 1024):  # a float32 copy of all of them could be large
            chosen = targets[part : part + 1024]
            logs = logits[part : part + 1024].float().log_softmax(-1)
            p = logs.exp()
            own = logs.gather(1, chosen[:, None])[:, 0]
            top, index = p.max(-1)
            self.reliability.add(top.double().cpu().numpy(), (index == chosen).cpu().numpy())
            self.brier += float((p.square().sum(-1) - 2 * own.exp() + 1).double().sum())
            self.nll -= float(own.double().sum())
            self.tokens += len(chosen)

    def merge(self, other: "TokenCalibration") -> None:
        mine, theirs = self.reliability, other.reliability
        mine.n, mine.hits = mine.n + theirs.n, mine.hits + theirs.hits
        mine.confidence = mine.confidence + theirs.confidence
        self.tokens, self.brier, self.nll = (
            self.tokens + other.tokens, self.brier + other.brier, self.nll + other.nll,
        )  # fmt: skip

    def result(self) -> dict[str, Any]:
        """`Calibration` of metrics.json, but for `answers`."""
        n = self.tokens
        return {
            "tokens": n,
            "ece": self.reliability.error,
            "brier": self.brier / n if n else None,
            "nll": self.nll / n if n else None,
            "bins": self.reliability.bins(),
        }


def answer_calibration(rows: list[dict]) -> dict[str, Any] | None:
    """Probability of a whole answer against its verdict, over finished answers; None without any.

    For greedy rows: the probability of what a model was sure enough to write, not of what it drew.
    """
    finished = [row for row in rows if row["finish_reason"] == "stop" and row["error"] is None]
    if not finished:
        return None
    confidence = np.array([min(1.0, math.exp(row["logprob"])) for row in finished])
    hit = np.array([row["verdict"] == "correct" for row in finished])
    reliability = Reliability()
    reliability.add(confidence, hit)
    return {
        "n": len(finished),
        "ece": reliability.error,
        "brier": float(np.square(confidence - hit).mean()),
        "bins": reliability.bins(),
    }


_MEASURES = ("top1_agreement", "forward_kl", "reverse_kl")


class Reader:
    """A model that reads batches: logits [N, V] of their kept tokens.

    With `keep` it remembers the hidden states [N, d] that its head saw, up to MOST_STATES bytes, and the same batch
    costs the head alone when it comes again: the teacher reads its own answers once, whoever is compared with it. The
    logits are the same bits. Nothing is remembered of a model whose head is more than one matrix.
    """

    def __init__(self, model):
        self.model, self._at = model, AtHead(model)
        self._plain = self._at.fusable and self._at.head().plain
        self._states: dict[bytes, Tensor] = {}
        self._held = 0

    def __call__(self, batch: Batch, keep: bool = False) -> Tensor:
        if not self._plain:
            with KeptLogits(self.model) as kept:
                return kept(batch.input_ids, batch.attention_mask, batch.places)
        key = _content(batch) if keep or self._states else b""
        states = self._states.get(key)
        if states is None:
            states = self._at(lambda hidden: at_places(hidden, batch.places), **batch.inputs())
            if keep and self._held + states.nbytes <= MOST_STATES:
                self._states[key], self._held = states, self._held + states.nbytes
        return self._at.module(states)


def _content(batch: Batch) -> bytes:
    """What a batch says and which of it is kept, hashed."""
    said = blake2b(repr(tuple(batch.input_ids.shape)).encode(), digest_size=16)
    for part in (batch.input_ids, batch.attention_mask, batch.places):
        said.update(part.cpu().contiguous().numpy().tobytes())
    return said.digest()


@dataclass(frozen=True)
class Reading:
    """What one pass over R rows brought. Without a teacher `sums` and `counts` are 0."""

    logprobs: list[np.ndarray]  # of each row's completion tokens, natural log, float32
    sums: np.ndarray  # [3, R] of _MEASURES over the tokens at which both models' logits are finite
    counts: np.ndarray  # [R] how many those are

    def agreement(self, rows: TokenRows, measured: np.ndarray | None = None) -> dict[str, Any]:
        """`Agreement` of metrics.json over the rows `measured` [R] bool (all of them), with clustered errors."""
        chosen = np.ones(len(rows), dtype=bool) if measured is None else measured
        sums, counts = self.sums[:, chosen], self.counts[chosen]
        result: dict[str, Any] = {
            "answers": int(chosen.sum()),
            "tokens": int(counts.sum()),
            "not_finite": int(rows.completion_lengths[chosen].sum() - counts.sum()),
        }
        for name, totals in zip(_MEASURES, sums):
            mean, stderr, interval = ratio(totals, counts)
            top = 1.0 if name == "top1_agreement" else np.inf
            clipped = None if interval is None else [max(0.0, interval[0]), min(top, interval[1])]
            result |= {name: mean, f"{name}_stderr": stderr, f"{name}_ci95": clipped}
        return result


def fidelity(
    student,
    teacher,
    rows: TokenRows,
    pad_id: int,
    batch_size: int = 64,
    calibration: TokenCalibration | None = None,
) -> dict[str, Any]:
    """`Agreement` of metrics.json: means over the completion tokens of `rows`, with clustered errors.

    top1_agreement: share of tokens at which both models' most likely next token is the same.
    forward_kl: KL(teacher || student); reverse_kl: KL(student || teacher). In nats, both at temperature 1.
    Tokens at which either model's logits are not finite are left out and counted. `calibration`, where given,
    is fed the student's logits and the tokens of `rows`.
    """
    found = read_rows(student, rows, pad_id, Reader(teacher), batch_size, calibration=calibration)
    return found.agreement(rows)


@torch.inference_mode()
def read_rows(
    model,
    rows: TokenRows,
    pad_id: int,
    teacher: Reader | None = None,
    batch_size: int = 64,
    *,
    calibration: TokenCalibration | None = None,
    measured: np.ndarray | None = None,
    keep: bool = False,
) -> Reading:
    """One forward pass of `model` (or its `Reader`) over `rows`, and one of the teacher: all that is said of them.

    calibration: is fed the tokens of the rows `measured` [R] bool (all of them), where both models are finite. keep:
    the teacher, or `model` where there is none, remembers what it read. The two models hold BATCH_LOGITS each at most
    (512 MiB in float32; a longer answer goes alone), and are compared CHUNK_LOGITS at a time. Processes of a launch
    read a share each, and all get the same result.
    """
    reader = model if isinstance(model, Reader) else Reader(model)
    device = next(reader.model.parameters()).device
    vocabulary = reader.model.get_output_embeddings().weight.shape[0]
    wanted = np.ones(len(rows), dtype=bool) if measured is None else measured

    def read(picked: np.ndarray) -> tuple[Any, ...]:
        batch = rows.collate(picked, pad_id).to(device)
        q = reader(batch, keep and teacher is None)  # [N, V]
        p = match_vocabulary(teacher(batch, keep), q.shape[-1]) if teacher else None
        owners = np.repeat(picked, rows.completion_lengths[picked])  # [N]
        asked = torch.from_numpy(wanted[owners]).to(device)
        own, found, known, counted = [], [], [], TokenCalibration()
        for start in range(0, len(q), _chunk(vocabulary)):
            part = slice(start, start + _chunk(vocabulary))
            own.append(q[part].float().log_softmax(-1).gather(1, batch.targets[part, None])[:, 0])
            if p is None:
                continue
            values, finite = _compared(q[part], p[part])
            found.append(values)
            known.append(finite)
            if calibration:
                chosen = finite & asked[part]
                counted.add(q[part][chosen], batch.targets[part][chosen])
        logprobs = torch.cat(own).cpu().numpy()
        if p is None:
            return logprobs, owners[:0], np.zeros((3, 0)), counted
        return logprobs, owners[torch.cat(known).cpu().numpy()], torch.cat(found, 1).cpu().numpy(), counted

    sums, counts = np.zeros((3, len(rows))), np.zeros(len(rows))
    logprobs: list[np.ndarray] = [np.zeros(0, np.float32)] * len(rows)
    size = even_size(len(rows), batch_size)
    pieces = list(length_batches(rows, size, max(1, BATCH_LOGITS // vocabulary)))
    for picked, (own, answer, values, counted) in zip(pieces, dealt(pieces, read)):
        for i, part in zip(picked, np.split(own, rows.completion_lengths[picked].cumsum()[:-1])):
            logprobs[i] = part
        for into, column in zip([*sums, counts], [*values, np.ones(len(answer))]):
            into += np.bincount(answer, weights=column, minlength=len(rows))
        if calibration:
            calibration.merge(counted)
    return Reading(logprobs, sums, counts)


def read_further(
    model, rows: TokenRows, pad_id: int, teacher: Reader, known: TokenRows, read: Reading
) -> Reading:
    """`read_rows`, where the same two models have `read` the rows `known`: a row that is among them is not read again.

    A good student writes most of its answers as its teacher does (92 % of the demo's).
    """

    def content(of: TokenRows, i: int) -> tuple[bytes, bytes]:
        prompt, completion = of.row(i)
        return prompt.tobytes(), completion.tobytes()

    places = {content(known, i): i for i in range(len(known))}
    before = np.array([places.get(content(rows, i), -1) for i in range(len(rows))])
    fresh = np.flatnonzero(before < 0)
    logprobs = [read.logprobs[i] for i in before]
    sums, counts = read.sums[:, before], read.counts[before]
    if len(fresh):
        found = read_rows(model, rows.subset(fresh), pad_id, teacher)
        sums[:, fresh], counts[fresh] = found.sums, found.counts
        for i, part in zip(fresh, found.logprobs):
            logprobs[i] = part
    return Reading(logprobs, sums, counts)


def _compared(q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """(_MEASURES [3, n] of the rows whose logits are finite, which those are [N]) of logits [N, V]."""
    finite = q.logsumexp(-1).isfinite() & p.logsumexp(-1).isfinite()
    q, p = q[finite], p[finite]
    same = p.argmax(-1) == q.argmax(-1)
    return torch.stack([x.double() for x in (same, forward_kl(q, p), reverse_kl(q, p))]), finite


def _chunk(vocabulary: int) -> int:
    """Tokens compared at a time: what that takes is a few times as much as their logits."""
    return max(1, CHUNK_LOGITS // vocabulary)


def answer_rows(problems_ids: list[list[int]], answers: list[dict], limit: int) -> TokenRows | None:
    """The first `limit` answers (one per problem) as rows, cut-off ones included; None if there are none."""
    usable = [
        (prompt, answer["completion_ids"])
        for prompt, answer in zip(problems_ids, answers, strict=True)
        if answer["completion_ids"] and not answer["error"]
    ][:limit]
    return TokenRows([p for p, _ in usable], [c for _, c in usable]) if usable else None
