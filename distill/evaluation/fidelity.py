"""How closely a model follows its teacher, token by token: on the teacher's answers and on the model's own.

Accuracy and agreement diverge (arXiv 2505.15442): a student can be right by another route, or agree and be
wrong. So both are reported. Teacher-forced: both models read the same answer, and at every one of its tokens
their next-token distributions are compared. On the teacher's text a student stands where the teacher led it;
on its own text it stands where it led itself, which is where it will be used (the exposure gap that on-policy
distillation is about: GKD, arXiv 2306.13649).

    fidelity(student, teacher, rows, pad_id)
    # {"answers": 200, "tokens": 9041, "top1_agreement": 0.998, "top1_agreement_stderr": ..., "forward_kl": ...}

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
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.data.batches import TokenRows
from distill.data.scoring import BATCH_LOGITS, CHUNK_LOGITS, length_batches
from distill.devices import dealt
from distill.evaluation.stats import ratio
from distill.models.head import KeptLogits
from distill.training.losses.divergences import forward_kl, reverse_kl
from distill.training.losses.fused import match_vocabulary

BINS = 15


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


@torch.inference_mode()
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
    is fed the student's logits and the tokens of `rows`. The two models hold BATCH_LOGITS each at most (512 MiB in
    float32; a longer answer goes alone), and are compared CHUNK_LOGITS at a time. Processes of a launch read a share
    each, and all get the same result.
    """
    ask_student, ask_teacher = KeptLogits(student), KeptLogits(teacher)
    device = next(student.parameters()).device
    vocabulary = student.get_output_embeddings().weight.shape[0]

    def read(picked: np.ndarray) -> tuple[np.ndarray, np.ndarray, TokenCalibration]:
        batch = rows.collate(picked, pad_id).to(device)
        q = ask_student(batch.input_ids, batch.attention_mask, batch.places)  # [N, V]
        p = match_vocabulary(ask_teacher(batch.input_ids, batch.attention_mask, batch.places), q.shape[-1])
        owners = np.repeat(picked, rows.completion_lengths[picked])  # [N]
        found, known, counted = [], [], TokenCalibration()
        for start in range(0, len(q), _chunk(vocabulary)):
            part = slice(start, start + _chunk(vocabulary))
            values, finite = _compared(q[part], p[part])
            found.append(values)
            known.append(finite)
            if calibration:
                counted.add(q[part][finite], batch.targets[part][finite])
        kept = torch.cat(known).cpu().numpy()
        values = torch.cat(found, 1).cpu().numpy()
        return owners[kept], values, counted

    sums, counts = np.zeros((3, len(rows))), np.zeros(len(rows))
    pieces = list(length_batches(rows, batch_size, max(1, BATCH_LOGITS // vocabulary)))
    with ask_student, ask_teacher:
        for answer, values, counted in dealt(pieces, read):
            for into, column in zip([*sums, counts], [*values, np.ones(len(answer))]):
                into += np.bincount(answer, weights=column, minlength=len(rows))
            if calibration:
                calibration.merge(counted)
    result: dict[str, Any] = {
        "answers": len(rows),
        "tokens": int(counts.sum()),
        "not_finite": int(rows.completion_lengths.sum() - counts.sum()),
    }
    for name, totals in zip(_MEASURES, sums):
        mean, stderr, interval = ratio(totals, counts)
        top = 1.0 if name == "top1_agreement" else np.inf
        clipped = None if interval is None else [max(0.0, interval[0]), min(top, interval[1])]
        result |= {name: mean, f"{name}_stderr": stderr, f"{name}_ci95": clipped}
    return result


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
