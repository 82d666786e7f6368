"""The benchmark of estimators: its moments against numpy, and on tiny models what must hold of any."""

import sys

import numpy as np
import pytest
import torch
from conftest import ROOT


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(ROOT / "recipes" / "benchmarks"))
    try:
        import estimators
    finally:
        sys.path.pop(0)
    return estimators


def test_moments_are_those_of_all_vectors_together(script):
    vectors = np.random.default_rng(0).normal(3, 2, (9, 5))
    moments = script.Moments()
    for vector in vectors:
        moments.add(torch.tensor(vector))
    trace = vectors.var(0, ddof=1).sum()
    assert moments.trace == pytest.approx(trace)
    assert moments.signal == pytest.approx((vectors.mean(0) ** 2).sum() - trace / 9)


def test_the_whole_vocabulary_has_no_noise_on_a_text_and_one_token_has(script, hub, tmp_path, capsys):
    out = tmp_path / "found.json"
    given = ["--student", hub["llama"], "--teacher", hub["qwen3_moe"], "--rows", "4", "--repeats", "6",
             "--max-new-tokens", "5", "--out", str(out)]  # fmt: skip
    assert script.main(given) == 0
    assert "whole vocabulary" in capsys.readouterr().out
    import json

    found = json.loads(out.read_text())["estimators"]
    assert found["whole vocabulary"]["noise_on_a_text"] < 1e-9 < found["token drawn"]["noise_on_a_text"]
    assert found["whole vocabulary"]["cosine"] == pytest.approx(1.0)
    assert found["token drawn"]["noise"] > found["whole vocabulary"]["noise"]
    # Nothing has changed since the tokens were drawn: there is nothing to clip.
    for key in ("noise", "noise_on_a_text", "cosine"):
        assert found["token drawn, clipped"][key] == pytest.approx(found["token drawn"][key], rel=1e-3)
