"""What a claim reads of a run folder, worked out by hand; names of what runs are compared by."""

import json

import pytest

from distill.bench.metrics import _in_precision as in_precision
from distill.bench.metrics import _measured, is_metric, metric, read_metrics, smoothed


def measured(**more) -> dict:
    task = lambda accuracy, tokens: {"accuracy": accuracy, "mean_tokens": tokens}  # noqa: E731
    return {
        "tasks": {"easy": task(1.0, 10), "hard": task(0.5, 30)},
        "model": {"parameters_total": 7, "parameters_active": 5, "flops_per_token": 11},
        "cost": {"flops_per_answer": 13, "usd_per_million_output_tokens": None, "usd_per_hour": 3.6},
        **more,
    }


def test_a_smoothed_curve_is_not_drawn_to_zero():
    """Weights 0.9 and 0.1 of the running mean and the newest loss, over the sum of the weights so far."""
    assert smoothed([2.0, 2.0, 2.0]) == pytest.approx([2, 2, 2])
    assert smoothed([1.0, 3.0], keep=0.9) == pytest.approx([1, (0.9 * 0.1 * 1 + 0.1 * 3) / 0.19])
    assert smoothed([]) == []


def test_what_an_evaluation_says():
    layers = {
        # Two experts a token. Family shares of their tokens: (1, 1, 0) is a load of (1/2, 1/2, 0).
        "a": {"max_violation": 0.5, "load_entropy": 0.9, "load": [0.5, 0.25, 0.25],
              "specialisation": {"family": {"share": [[1.0, 1.0, 0.0], [1.0, 0.5, 0.5]]}}},
        "b": {"max_violation": 2.0, "load_entropy": 0.7, "load": [1.0], "specialisation": {}},
    }  # fmt: skip
    swept = [
        {"kind": "none", "experts_per_token": 2, "tasks": {"easy": {"accuracy": 0.9}}, "flops_per_token": 4,
         "decode_tokens_per_second": 1000.0},
        {"kind": "top_k", "experts_per_token": 1, "tasks": {"easy": {"accuracy": 0.6}}, "flops_per_token": 2,
         "decode_tokens_per_second": 500.0},
        {"kind": "random", "experts_per_token": 3, "tasks": {"easy": {"accuracy": 0.1}}, "flops_per_token": 9},
    ]  # fmt: skip
    solutions = {"easy": {"nll_per_token": 0.25}}
    found = _measured(measured(moe={"layers": layers}, interventions=swept, solutions=solutions))
    assert found["accuracy.mean"] == 0.75 and found["tokens.answer"] == 20
    assert found["accuracy.easy"] == 1.0 and found["nll.easy"] == 0.25
    assert found["moe.max_violation"] == 2.0 and found["moe.load_entropy"] == pytest.approx(0.8)
    assert found["moe.family_spread"] == pytest.approx((0.25 + 0) / 2)
    assert (found["k2.accuracy.easy"], found["k1.accuracy.easy"], found["k1.cost.flops_per_token"]) == (
        0.9,
        0.6,
        2,
    )
    assert "k3.accuracy.easy" not in found, "another routing is not a number of experts"
    # 3.6 USD an hour at 500 tokens a second.
    assert found["k1.cost.usd_per_million"] == pytest.approx(3.6 / 3600 / 500 * 1e6)


def test_what_training_says(tmp_path):
    folder = tmp_path / "student"
    folder.mkdir()
    counts = {"parameters_trainable": 3, "tokens": 17, "steps": 3, "saved_bytes": 19}
    (folder / "manifest.json").write_text(json.dumps({"counts": counts, "flops": 23, "seconds": 1.5}))
    lines = [{"loss": 1.0}, {"loss": 1.0, "validation": 0.9}, {"loss": 1.0, "validation": 0.8}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = read_metrics(tmp_path)
    assert found == {
        "loss.train": pytest.approx(1.0), "loss.held_out": 0.8, "train.flops": 23, "train.tokens": 17,
        "train.seconds": 1.5, "train.steps": 3, "parameters.trainable": 3, "bytes.saved": 19,
        "bytes.training_state": 36,
    }  # fmt: skip


def test_what_another_precision_gave_has_names():
    entry = {
        "precision": "nvfp4-emulated-experts", "ran": True, "nll_per_token": 0.4, "kl": 0.02, "weight_bytes": 7,
        "flips": {"slots": 0.03, "tokens": 0.1}, "tasks": {"hard": {"accuracy": 0.5}},
    }  # fmt: skip
    found = in_precision(entry)
    name = "in.nvfp4-emulated-experts"
    assert found == {
        f"{name}.nll": 0.4, f"{name}.kl": 0.02, f"{name}.flips": 0.03, f"{name}.bytes": 7, f"{name}.accuracy.hard": 0.5,
    }  # fmt: skip
    assert all(is_metric(name) for name in found)
    assert metric(f"{name}.accuracy.hard").words == "hard problems solved in nvfp4-emulated-experts"
    assert metric(f"{name}.kl").unit == "nats/token" and metric(f"{name}.flips").unit == "%"
    assert in_precision({"precision": "fp16", "ran": False, "reason": "no"}) == {}
    dense = {"precision": "bf16", "ran": True, "nll_per_token": 1.0}
    assert in_precision(dense)["in.bf16.flips"] is None


@pytest.mark.parametrize("name", ["in.bf16", "in.bf16.loss", "in..nll", "inn.bf16.nll"])
def test_other_names_are_none(name):
    assert not is_metric(name)
