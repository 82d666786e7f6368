"""Packed rows attend one by one: the padded loss and gradients, in less time than padding takes."""

import time

import numpy as np
import pytest
import torch
from conftest import ROOT
from step_example import build, gradients, mla
from transformers import AutoModelForCausalLM

from distill.config.training import Objective
from distill.data.batches import TokenRows, check_packing
from distill.models.layers import NAME, attend_by_row, rows_apart
from distill.training.step import StudentStep


def ragged(n: int, low: int, high: int, vocabulary: int = 60) -> TokenRows:
    rng = np.random.default_rng(0)
    draw = lambda: rng.integers(5, vocabulary, rng.integers(low, high)).tolist()  # noqa: E731
    return TokenRows([draw() for _ in range(n)], [draw() for _ in range(n)])


def sdpa(family: str):
    model = mla() if family == "deepseek_v3" else build(family)
    model.set_attn_implementation("sdpa")
    return model.train()


def taken(step: StudentStep, batch) -> tuple[float, dict]:
    with rows_apart(batch.rows):
        total, _ = step(batch, {})
        total.backward()
    return float(total.detach()), gradients(step.model)


@pytest.mark.parametrize("family", ["qwen3 tied", "olmoe", "deepseek_v3"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_rows_are_the_padded_ones(family, checkpointing):
    model, rows = sdpa(family), ragged(9, 1, 12)
    step = StudentStep(model, [Objective(name="cross_entropy")])
    order = np.argsort(rows.lengths, kind="stable")
    padded, expected = taken(step, rows.collate(order, 0))
    assert attend_by_row(model) and model.config._attn_implementation == NAME
    check_packing(model, 60)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    packed, found = taken(step, rows.pack(order))
    assert packed == pytest.approx(padded, rel=1e-5)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=2e-5, msg=name)
    again, _ = taken(
        step, rows.collate(order, 0)
    )  # ordinary batches are what they were: validation, sampling
    assert again == pytest.approx(padded, rel=1e-6)


def test_other_attention_is_left_alone():
    windowed = build("qwen3")
    windowed.config.sliding_window, windowed.config.use_sliding_window = 8, True
    windowed.set_attn_implementation("sdpa")
    assert not attend_by_row(windowed) and windowed.config._attn_implementation == "sdpa"
    assert not attend_by_row(build("qwen3"))  # eager


def test_a_packed_step_is_no_slower_than_a_padded_one():
    """At the demo's lengths; with the mask of the whole sequence it took three times as long."""
    model = AutoModelForCausalLM.from_pretrained(ROOT / "checkpoints" / "base", dtype=torch.float32).train()
    rows = ragged(32, 12, 48, 300)
    step = StudentStep(model, [Objective(name="cross_entropy")])
    order = np.argsort(rows.lengths, kind="stable")
    assert attend_by_row(model)
    seconds = {}
    for name, batch in (("padded", rows.collate(order, 0)), ("packed", rows.pack(order))):
        seconds[name] = []
        for _ in range(4):
            start = time.process_time()
            taken(step, batch)
            seconds[name].append(time.process_time() - start)
    assert min(seconds["packed"]) <= 1.05 * min(seconds["padded"]), seconds
