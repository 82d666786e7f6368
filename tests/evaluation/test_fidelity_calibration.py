"""Calibration against counting by hand, and on models whose honesty is known."""

import math

import numpy as np
import pytest
import torch

from distill.evaluation.fidelity import BINS, Reliability, TokenCalibration, answer_calibration


def test_bins_and_error_by_hand():
    """Two bins of the fifteen in use: |0.5 - 0.9| with weight 2/3, |1 - 0.4| with weight 1/3."""
    found = Reliability()
    found.add(np.array([0.9, 0.9, 0.4]), np.array([True, False, True]))
    assert found.error == pytest.approx(2 / 3 * 0.4 + 1 / 3 * 0.6)
    used = [b for b in found.bins() if b["n"]]
    assert [(b["n"], b["accuracy"]) for b in used] == [(1, 1.0), (2, 0.5)]
    assert used[1]["confidence"] == pytest.approx(0.9) and used[1]["low"] < 0.9 <= used[1]["high"]
    assert len(found.bins()) == BINS == 15 and Reliability().error is None


def test_edges_belong_to_the_lower_bin():
    found = Reliability()
    found.add(np.array([0.0, 1 / 15, 1.0, np.nextafter(1 / 15, 1)]), np.ones(4, dtype=bool))
    assert [b["n"] for b in found.bins()][:2] == [2, 1] and found.bins()[-1]["n"] == 1


def test_token_measures_are_the_definitions():
    generator = torch.Generator().manual_seed(0)
    logits, targets = (
        torch.randn(2500, 7, generator=generator) * 2,
        torch.randint(7, (2500,), generator=generator),
    )
    found = TokenCalibration()
    for part in (slice(0, 1300), slice(1300, None)):
        found.add(logits[part], targets[part])
    result = found.result()
    p = logits.double().softmax(-1).numpy()
    y = np.eye(7)[targets.numpy()]
    assert result["tokens"] == 2500
    assert result["brier"] == pytest.approx(((p - y) ** 2).sum(-1).mean(), rel=1e-5)
    assert result["nll"] == pytest.approx(-np.log((p * y).sum(-1)).mean(), rel=1e-5)
    top, hit = p.max(-1), p.argmax(-1) == targets.numpy()
    error = 0.0
    for b in range(15):
        inside = (top > b / 15) & (top <= (b + 1) / 15)
        if inside.any():
            error += inside.mean() * abs(hit[inside].mean() - top[inside].mean())
    assert result["ece"] == pytest.approx(error, rel=1e-4)
    assert sum(b["n"] for b in result["bins"]) == 2500


def test_an_honest_model_has_no_error_and_a_boastful_one_has():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(40_000, 5, generator=generator)
    drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    errors = []
    for scale in (1.0, 3.0):
        found = TokenCalibration()
        found.add(scale * logits, drawn)
        errors.append(found.result()["ece"])
    assert errors[0] < 0.01 < 0.2 < errors[1]


def row(probability: float, right: bool, reason: str = "stop", error: str | None = None) -> dict:
    verdict = "correct" if right else "wrong"
    return {"logprob": math.log(probability), "verdict": verdict, "finish_reason": reason, "error": error}


def test_answers():
    rows = [
        row(0.9, True),
        row(0.9, False),
        row(0.3, False),
        row(0.8, True, "length"),
        row(0.8, True, "error", "x"),
    ]
    found = answer_calibration(rows)
    assert found["n"] == 3
    assert found["ece"] == pytest.approx(2 / 3 * 0.4 + 1 / 3 * 0.3)
    assert found["brier"] == pytest.approx((0.01 + 0.81 + 0.09) / 3)
    assert answer_calibration(rows[3:]) is None
