"""Names of what runs are compared by: each known one has a unit and words, and is read from what a run holds."""

import pytest

from distill.bench.metrics import _in_precision as in_precision
from distill.bench.metrics import is_metric, metric


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
