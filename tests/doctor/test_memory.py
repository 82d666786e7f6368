"""Forecast and measurement side by side: what a step keeps, what a cache holds, what counts beside them."""

from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from distill.config.evaluation import Evaluate
from distill.config.training import Objective
from distill.data.batches import TokenRows
from distill.doctor import memory
from distill.models.decode import PACKED, Decoder, Sampling
from distill.models.describe import describe_config
from distill.models.layers import attend_by_row, rows_apart
from distill.training.memory import Lean, saved_for_backward
from distill.training.step import StudentStep

CPU = torch.device("cpu")
CONFIG = LlamaConfig(
    hidden_size=96, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2, intermediate_size=256,
    vocab_size=300, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=0, dtype="float32",
    tie_word_embeddings=True,
)  # fmt: skip


def side() -> SimpleNamespace:
    return SimpleNamespace(
        config=CONFIG, facts=describe_config(CONFIG), rows=CONFIG.vocab_size, tokenizer=range(300)
    )


@pytest.mark.parametrize("low, length", [(4, 64), (2, 24), (2, 96)])
def test_what_a_step_keeps_is_what_was_forecast(low, length):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG.to_dict())).train()
    assert attend_by_row(model)
    step = StudentStep(model, [Objective(name="cross_entropy")])
    rows = TokenRows([[5]] * 8, [[7] * (length - 1)] * 8)
    batch = rows.collate(range(8), 0)
    with saved_for_backward(step) as saved, Lean(model), rows_apart(batch.rows):
        with torch.autocast("cpu", torch.bfloat16, enabled=low == 2):
            total, _ = step(batch, {})
        kept = saved()
    del total
    forecast = memory._activations(side(), 8 * length, low, 3)
    forecast += 2 * side().facts["parameters_total"] if low == 2 else 0
    assert forecast == pytest.approx(kept, rel=0.15)


def test_a_cache_is_what_was_forecast():
    model = LlamaForCausalLM(CONFIG).eval()
    prompts, new = [[5] * 70] * 4, 30
    decoder = Decoder(model, prompts, Sampling(max_new_tokens=new), {2}, 0, None, None, 4, None)
    batch = decoder.admit(list(range(4)), 4)
    while not bool((batch.made >= new - 1).all()):
        decoder.step(batch)
    held = sum(b.nbytes for layer in batch.cache.layers for b in layer.buffers)
    assert 4 * memory._cache(side(), 100, 4) == pytest.approx(held, rel=0.25)


@pytest.mark.parametrize("tied", [True, False])
def test_weights_packed_for_decoding_are_what_was_forecast(tied):
    """Every linear layer, the head among them; none on a GPU, for answers of a few tokens, or where memory is short."""
    config = LlamaConfig(**{**CONFIG.to_dict(), "tie_word_embeddings": tied})
    model = SimpleNamespace(config=config, facts=describe_config(config), rows=config.vocab_size)
    linear = [m for m in LlamaForCausalLM(config).modules() if isinstance(m, torch.nn.Linear)]
    forecast = memory._packed(model, "auto", PACKED, 0)
    assert forecast == pytest.approx(sum(m.weight.nbytes for m in linear), rel=0.01)
    assert memory._packed(model, "auto", PACKED - 1, 0) == memory._packed(model, "auto", PACKED, 1e15) == 0
    asked = [model, model], Evaluate(max_new_tokens=PACKED), 100, 4
    phase = memory.evaluation_phase(*asked, {"program": 1.0})
    assert phase.parts["packed weights"] == forecast and phase.held == 1 + phase.parts["weights"] + forecast
    assert not memory.evaluation_phase(*asked, {}).parts["packed weights"]


def test_an_evaluation_counts_what_is_read_at_once():
    """Two models of 300 tokens; 4 answers are nothing beside the logits of a text of 16 windows."""
    two = [side(), side()]
    short = {"max_new_tokens": PACKED - 1}  # no weights are packed for that
    plain = memory.evaluation_phase(two[:1], Evaluate(**short), 100, 4, {"program": 1.0})
    assert plain.total == 1 + plain.parts["weights"] + 4 * (memory._cache(side(), 100, 4) + 24 * 300)
    section = Evaluate(text=["a.txt"], text_window=256, fidelity_rows=4, **short)
    texts = memory.evaluation_phase(two, section, 100, 4, {"program": 1.0})
    both = 2 * 4 * 300 * 16 * 256 + memory._COMPARED
    assert texts.total == pytest.approx(1 + 2 * plain.parts["weights"] + both)
    # A CPU decodes as many at a time as 1.5 GB hold, whatever was asked for.
    many = memory.evaluation_phase(two[:1], Evaluate(), 256, 10**6, {"program": 1.0})
    assert 0.4e9 < many.parts["cache of keys and values"] < 1.5e9 and many.rows < 10**6
    gpu = memory.evaluation_phase(two[:1], Evaluate(), 256, 10**6, {})
    assert gpu.rows == 10**6
