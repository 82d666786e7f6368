"""The check of a device, in small on this CPU: every part runs, and a device that computes wrongly does not pass."""

import json
import subprocess

import device
import pytest
import torch
from conftest import PYTHON, ROOT

CPU = torch.device("cpu")


@pytest.mark.parametrize("part", ["equality", "resume", "precision"])
def test_a_part_passes_here(part):
    assert device.PARTS[part](CPU, True)["ok"] is True


def test_a_device_that_computes_wrongly_fails(monkeypatch, tmp_path):
    """Its second reading of every batch is off by a thousandth of the loss."""
    real, calls = device.StudentStep.forward, []

    def wrong(self, *given, **named):
        calls.append(1)
        total, sums = real(self, *given, **named)
        return total * (1.001 if len(calls) % 2 == 0 else 1.0), sums

    monkeypatch.setattr(device.StudentStep, "forward", wrong)
    found = device.equality(CPU, True)
    assert found["worst"] > 5e-4 and not found["ok"]
    monkeypatch.setattr(device.StudentStep, "forward", lambda *_a, **_n: 1 / 0)
    device.one_part("equality", True, CPU, tmp_path / "equality.json")
    broken = json.loads((tmp_path / "equality.json").read_text())
    assert broken["error"].startswith("ZeroDivisionError") and "FAILED" in device.verdict(broken)


@pytest.mark.slow
def test_the_script_leaves_one_file(tmp_path):
    out = tmp_path / "device.json"
    command = [PYTHON, str(ROOT / "recipes" / "benchmarks" / "device.py"), "--quick", "--device", "cpu"]
    done = subprocess.run(
        [*command, "--out", str(out)], capture_output=True, text=True, cwd=ROOT, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    parts = json.loads(out.read_text())["parts"]
    assert parts.keys() == device.PARTS.keys()
    assert (
        parts["kd"]["full fused"]["tokens_per_second"] > 0
        and parts["decode"]["greedy"]["tokens_per_second"] > 0
    )
    assert parts["precision"]["fp16"] == {"ran": False, "why": "no CPU path"}
