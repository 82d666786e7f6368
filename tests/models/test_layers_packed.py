"""Packed rows attend one by one: the padded loss and gradients, in less time than padding takes."""

import time

import numpy as np
import pytest
import torch
from conftest import ROOT
from step_example import SIZES, build, gradients, mla
from transformers import AutoConfig, AutoModelForCausalLM

from distill.config.training import Objective
from distill.data.batches import TokenRows, check_packing
from distill.errors import UserError
from distill.models import layers
from distill.models.layers import EXACT, NAMES, attend_by_row, choose_attention, rows_apart
from distill.training.step import StudentStep


def ragged(n: int, low: int, high: int, vocabulary: int = 60) -> TokenRows:
    rng = np.random.default_rng(0)
    draw = lambda: rng.integers(5, vocabulary, rng.integers(low, high)).tolist()  # noqa: E731
    return TokenRows([draw() for _ in range(n)], [draw() for _ in range(n)])


WINDOWED = {  # of 4 tokens, where rows have up to 22
    "mistral": {},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},  # its own attention, with sinks
}
CHUNKED = {
    "llama4_text": {
        "attention_chunk_size": 4,
        "num_local_experts": 2,
        "intermediate_size_mlp": 32,
        "layer_types": ["chunked_attention", "full_attention"],
    }
}


def model_of(family: str, **more):
    if family == "deepseek_v3":
        model = mla()
    elif family in WINDOWED | CHUNKED:
        torch.manual_seed(0)
        config = AutoConfig.for_model(
            family, **{**SIZES, "sliding_window": 4, **(WINDOWED | CHUNKED)[family], **more}
        )
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    else:
        model = build(family)
    if family not in ("gpt_oss", "gemma2"):  # which have no other than eager
        model.set_attn_implementation("sdpa")
    return model.train()


def taken(step: StudentStep, batch) -> tuple[float, dict]:
    with rows_apart(batch.rows):
        total, _ = step(batch, {})
        total.backward()
    return float(total.detach()), gradients(step.model)


@pytest.mark.parametrize(
    "family, checkpointing",
    [(f, False) for f in ("olmoe", "deepseek_v3", "gemma2", *WINDOWED)]
    + [("qwen3 tied", True), ("mistral", True)],
)
def test_packed_rows_are_the_padded_ones(family, checkpointing):
    model, rows = model_of(family), ragged(9, 1, 12)
    plain = model.config._attn_implementation
    step = StudentStep(model, [Objective(name="cross_entropy")])
    order = np.argsort(rows.lengths, kind="stable")
    padded, expected = taken(step, rows.collate(order, 0))
    assert attend_by_row(model) and model.config._attn_implementation == NAMES[plain]
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


def test_a_window_cuts_off_what_it_should():
    """Else the equality above would hold for two models that both see everything."""
    rows = ragged(9, 1, 12)
    batch = rows.pack(np.arange(9))
    losses = []
    for window in (4, 64):
        model = model_of("mistral", sliding_window=window)
        assert attend_by_row(model)
        losses.append(taken(StudentStep(model, [Objective(name="cross_entropy")]), batch)[0])
    assert abs(losses[0] - losses[1]) > 1e-3


def test_other_attention_is_left_alone():
    chunked = model_of("mistral")
    chunked.config.layer_types = ["chunked_attention", "full_attention"]
    assert not attend_by_row(chunked) and chunked.config._attn_implementation == EXACT
    both_ways = model_of("mistral")
    both_ways.config.use_bidirectional_attention = True
    assert not attend_by_row(both_ways)
    eager = model_of("mistral")
    eager.set_attn_implementation("eager")
    eager.config.layer_types = ["chunked_attention", "full_attention"]
    assert not attend_by_row(eager) and eager.config._attn_implementation == "eager"


def test_a_model_with_masks_of_its_own_attends_in_float32_where_it_learns(monkeypatch):
    """A CPU's 16-bit kernel is slow on the way back; the masks, the loss and the gradients are what they were."""
    rows = ragged(9, 1, 12)
    batch = rows.collate(np.arange(9), 0)
    seen = []
    usual = layers.sdpa_attention_forward

    def watched(module, query, *given, **named):
        seen.append((torch.is_grad_enabled(), query.dtype))
        return usual(module, query, *given, **named)

    monkeypatch.setattr(layers, "sdpa_attention_forward", watched)
    model = model_of("llama4_text")
    step = StudentStep(model, [Objective(name="cross_entropy")])
    before, expected = taken(step, batch)
    assert not seen and not attend_by_row(model)
    seen.clear()
    after, found = taken(step, batch)
    assert after == pytest.approx(before, rel=1e-6) and set(seen) == {(True, torch.float32)}
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-6, msg=name)
    seen.clear()
    with torch.autocast("cpu", torch.bfloat16):
        taken(step, batch)
        with torch.no_grad():
            model(torch.ones(1, 4, dtype=torch.long))
    assert set(seen) == {(True, torch.float32), (False, torch.bfloat16)}


def test_attention_is_chosen_or_refused():
    model = model_of("qwen3 tied")
    choose_attention(model, "eager")
    assert model.config._attn_implementation == "eager"
    for kind in ("flash_attention_2", "flash_attention_3"):
        with pytest.raises(
            UserError, match=rf"train.attention={kind}: .* cannot attend so \(it runs on GPUs only\)"
        ):
            choose_attention(model, kind)
    with pytest.raises(UserError, match=r"train.attention=sdpa: Gemma2ForCausalLM cannot attend so"):
        choose_attention(model_of("gemma2"), "sdpa")


@pytest.mark.parametrize("family", ["qwen3 tied", "mistral", "gpt_oss"])
def test_padded_rows_need_no_mask(family):
    """Without it the kept tokens' loss and gradients are what they were; what would see padding keeps its mask."""
    model, rows = model_of(family), ragged(9, 1, 12)
    step = StudentStep(model, [Objective(name="cross_entropy")])
    batch = rows.collate(np.argsort(rows.lengths, kind="stable"), 0)
    usual, expected = taken(step, batch)
    assert attend_by_row(model)
    found, gradient = taken(step, batch)
    assert found == pytest.approx(usual, rel=1e-5)
    for name, value in expected.items():
        torch.testing.assert_close(gradient[name], value, rtol=0, atol=2e-5, msg=name)


def test_a_model_with_a_mask_of_its_own_keeps_it(monkeypatch):
    """The trial, not the config, has the last word: here every token sees the last real one."""
    model = model_of("qwen3 tied")
    inner = model.model.forward

    def sees_the_end(*given, attention_mask=None, **named):
        found = inner(*given, attention_mask=attention_mask, **named)
        gone = 0.0 if attention_mask is None else (layers._rows is not None) * 5.0
        found.last_hidden_state = found.last_hidden_state + gone
        return found

    monkeypatch.setattr(model.model, "forward", sees_the_end)
    assert not attend_by_row(model) and model.config._attn_implementation == EXACT


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
