"""Calibration: does a model's probability mean what it says?

Two questions with one measure. Tokens: on the teacher's answers, is the most likely next token the one that
the teacher wrote, as often as its probability promises? Answers: is a greedy answer right as often as the
probability of the whole text promises?

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
from torch import Tensor

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
    """Sums over tokens, so that no logits have to be kept."""

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
