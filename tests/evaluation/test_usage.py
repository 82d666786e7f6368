"""Cost of use: arithmetic of prices, bytes as described, and FLOPs per token against torch's own counter."""

import pytest
import torch
from conftest import QWEN3_MOE
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from distill.evaluation.usage import measure_speed, usage_cost, usd_per_million
from distill.models.describe import describe_model
from distill.models.load import cache_name, load_model, load_tokenizer

DRAWN = True  # speeds are measured as they are


def test_price_of_a_million_tokens():
    """One USD an hour at 1,000 tokens a second: 3.6 million tokens for a dollar."""
    assert usd_per_million(1.0, 1000.0) == pytest.approx(1 / 3.6)
    assert usd_per_million(2.0, 500.0) == pytest.approx(4 / 3.6)
    assert usd_per_million(1.0, None) is None and usd_per_million(0.0, 10.0) == 0.0


def test_usage_of_a_model(hub):
    model, tokenizer = load_model(hub["qwen3_moe"]), load_tokenizer(hub["qwen3_moe"])
    described = describe_model(model, context=64)
    found = usage_cost(model, tokenizer, described, {"decode_tokens_per_second": 100.0}, 0.36)
    assert found["prefill_tokens"] == 512 and found["prefill_tokens_per_second"] > 0
    assert found["weight_bytes"] == sum(p.numel() * p.element_size() for p in model.parameters())
    assert found["usd_per_million_output_tokens"] == pytest.approx(1.0)
    expected = 0.36 / 3600 / found["prefill_tokens_per_second"] * 1e6
    assert found["usd_per_million_input_tokens"] == pytest.approx(expected)
    without = usage_cost(model, tokenizer, described, {"decode_tokens_per_second": 100.0}, None, speed=False)
    assert set(without) == {"weight_bytes", "kv_bytes_per_token"}


def test_a_short_context_shortens_the_workload(hub):
    model, tokenizer = load_model(hub["llama"]), load_tokenizer(hub["llama"])
    model.config.max_position_embeddings = 40
    found = measure_speed(model, tokenizer)
    assert found["prefill_tokens"] == 40 and found["decode_tokens_per_second_batch_1"] > 0


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_flops_per_token_are_what_torch_counts(family):
    """Of one token after T - 1 others, eager attention and eager experts, where the counter sees every product."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
             "intermediate_size": 48, "vocab_size": 64, "head_dim": 8}  # fmt: skip
    own = QWEN3_MOE if family == "qwen3_moe" else {"model_type": "llama"}
    config = AutoConfig.for_model(**{**sizes, **own})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    model.set_experts_implementation("eager")
    context = 24
    ids = torch.randint(64, (1, context))
    with torch.no_grad():
        cache = model(ids[:, :-1], use_cache=True)[cache_name(model)]
        with FlopCounterMode(display=False) as counter:
            model(ids[:, -1:], **{cache_name(model): cache, "use_cache": True})
    assert counter.get_total_flops() == describe_model(model, context=context)["flops_per_token"]
