"""The comparison of precisions over a training run: its arithmetic by hand, and two real steps of each."""

import json

import pytest
from precisions import PRECISIONS, main, relative_errors, summary

from distill.bench.metrics import smoothed


def test_smoothing_by_hand():
    """Weights 0.9^age, divided by their sum: the first value is itself, a constant stays what it is."""
    assert smoothed([4.0, 2.0, 1.0])[0] == 4.0
    assert smoothed([4.0, 2.0, 1.0])[2] == pytest.approx((0.81 * 4 + 0.9 * 2 + 1) / (0.81 + 0.9 + 1))
    assert smoothed([3.0] * 50) == pytest.approx([3.0] * 50)


def test_errors_are_signed_per_seed_and_over_the_last_steps():
    reference = [[9.0, 2.0, 2.0], [9.0, 4.0, 4.0]]
    curves = [[9.0 * 1.5, 2.0 * 1.01, 2.0 * 1.01], [9.0, 4.0, 4.0]]
    alone = relative_errors(curves[:1], reference[:1], last=1)
    expected = smoothed(curves[0])[-1] / smoothed(reference[0])[-1] - 1
    assert alone == {"per_seed": [pytest.approx(expected)], "mean": pytest.approx(expected), "stderr": None,
                     "largest": pytest.approx(expected)}  # fmt: skip
    both = relative_errors(curves, reference, last=1)
    assert both["mean"] == pytest.approx(expected / 2) and both["stderr"] == pytest.approx(expected / 2)
    lower = relative_errors([[1.0, 1.0]], [[2.0, 2.0]], last=2)
    assert lower["mean"] == -0.5 and lower["largest"] == 0.5


def test_verdict_against_the_papers_bound():
    curves = {"bf16": [[2.0]], "a": [[2.0 * 1.0024]], "b": [[2.0 * 0.997]]}
    found = summary(curves, last=1)
    assert [found[name]["below_paper_bound"] for name in curves] == [True, True, False]


def test_two_steps_of_every_precision(tmp_path, capsys):
    small = [
        "threads=1", "prompts.levels={easy: 12}",
        "student.config.hidden_size=32", "student.config.intermediate_size=32",
        "student.config.moe_intermediate_size=16", "student.config.kv_lora_rank=16",
    ]  # fmt: skip
    out = tmp_path / "fp8.json"
    command = ["--steps", "2", "--seeds", "1", "--work", str(tmp_path / "work"), "--out", str(out)]
    assert main([*command, *small]) == 0
    results = json.loads(out.read_text())
    assert list(results["precisions"]) == list(PRECISIONS)
    final = [result["final_loss"][0] for result in results["precisions"].values()]
    assert len(set(final)) == len(final), "each precision computes something of its own"
    assert all(loss == pytest.approx(final[0], rel=0.05) for loss in final)
    assert results["precisions"]["fp8-emulated"]["float8_share"] > 0.3
    assert results["precisions"]["bf16"]["relative_loss_error"]["largest"] == 0
    assert "fp8-emulated-tensor" in capsys.readouterr().out
    assert main([*command, *small, "train.precison=fp32"]) == 2, "a mistake of the user, without a traceback"
    assert "precision" in capsys.readouterr().err
