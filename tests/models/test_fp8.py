"""Emulated float8: every number against a slow float64 reference, every layer accounted for, the model given back."""

import copy
import math

import numpy as np
import pytest
import routing_reference
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from distill.errors import UserError
from distill.models import fp8
from distill.models.fp8 import (
    VARIANTS,
    Tile,
    emulate_fp8,
    fp8_emulated,
    fp8_linear,
    layers_of,
    quantise,
    restore,
    round_trip,
)

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
WHOLE = 10**9

# ---------------------------------------------------------------------- the reference


def grid(exponent_bits: int, mantissa_bits: int, largest: float) -> np.ndarray:
    """Every non-negative finite number of the format, from its definition; index parity is mantissa parity."""
    bias, steps = 2 ** (exponent_bits - 1) - 1, 2**mantissa_bits
    numbers = [m / steps * 2.0 ** (1 - bias) for m in range(steps)]
    for e in range(1, 2**exponent_bits):
        numbers += [(1 + m / steps) * 2.0 ** (e - bias) for m in range(steps)]
    return np.array([x for x in numbers if x <= largest])


GRIDS = {E4M3: (grid(4, 3, 448), 448.0), E5M2: (grid(5, 2, 57344), 57344.0)}


def slow_round_trip(matrix: torch.Tensor, tile: tuple) -> np.ndarray:
    """One tile after the other in float64: to the nearest number of the grid, ties to the even mantissa."""
    rows, columns, dtype = tile
    numbers, largest = GRIDS[dtype]
    x = matrix.double().numpy()
    out = np.zeros_like(x)
    for top in range(0, x.shape[0], min(rows, x.shape[0])):
        for left in range(0, x.shape[1], min(columns, x.shape[1])):
            part = x[top : top + rows, left : left + columns]
            if not (amax := np.abs(part).max()):
                continue
            scale = float(np.float32(amax) / np.float32(largest))
            scaled = np.float32(np.abs(part)) / np.float32(
                scale
            )  # the rounding of the division is part of it
            distance = np.abs(scaled[..., None].astype(np.float64) - numbers)
            best = distance.argmin(-1)
            upper = np.minimum(best + 1, len(numbers) - 1)
            tie = np.take_along_axis(distance, upper[..., None], -1)[..., 0] == distance.min(-1)
            best = np.where(tie & (best % 2 == 1), upper, best)
            out[top : top + rows, left : left + columns] = np.sign(part) * numbers[best] * scale
    return out


TILES = [(1, 128, E4M3), (128, 1, E4M3), (128, 128, E4M3), (WHOLE, WHOLE, E4M3), (WHOLE, WHOLE, E5M2)]


def random_matrix(seed: int, rows: int, columns: int, spread: float) -> torch.Tensor:
    """Magnitudes over `spread` powers of ten, so that tiles differ and small numbers go subnormal."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, columns, generator=generator)
    return matrix * 10 ** (spread * (torch.rand(rows, columns, generator=generator) - 0.5))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6), st.integers(1, 300), st.integers(1, 300), st.floats(0, 8), st.sampled_from(TILES)
)
@example(0, 1, 1, 0.0, TILES[0])
@example(1, 129, 257, 6.0, TILES[2])
@example(2, 128, 128, 6.0, TILES[1])
def test_round_trip_is_the_slow_one(seed, rows, columns, spread, tile):
    matrix = random_matrix(seed, rows, columns, spread)
    matrix[: rows // 2, : columns // 3] = 0
    found = round_trip(matrix, Tile(*tile)).double().numpy()
    np.testing.assert_allclose(found, slow_round_trip(matrix, tile), rtol=3e-7, atol=0)


def test_ties_and_ends_by_hand():
    """A tile whose largest number is 448 has scale 1: 17 lies between 16 and 18, 500 would not fit."""
    row = torch.tensor([[448.0, -17.0, 19.0, 2**-9, 2**-11, 0.3, 0.0]])
    expected = torch.tensor([[448.0, -16.0, 20.0, 2**-9, 0.0, 0.3125, 0.0]])
    assert torch.equal(round_trip(row, Tile(1, 128)), expected)


@pytest.mark.parametrize("value", [0.0, 1e-44, 1e-38, 1e-35, 3e38])
def test_tiles_of_zeros_and_extreme_numbers_stay_finite(value):
    found = round_trip(torch.full((3, 130), value), Tile(1, 128))
    assert bool(found.isfinite().all())
    torch.testing.assert_close(found, torch.full((3, 130), value), rtol=0.07, atol=1e-38)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_what_is_not_finite_is_not_hidden(bad, dtype):
    """The cast alone makes 448 of an infinity. The tile that holds it is NaN, its neighbours are what they were."""
    matrix = random_matrix(0, 4, 300, 1.0)
    clean = round_trip(matrix, Tile(1, 128, dtype))
    matrix[2, 130] = bad
    found = round_trip(matrix, Tile(1, 128, dtype))
    assert bool(found[2, 128:256].isnan().all())
    found[2, 128:256] = clean[2, 128:256]
    assert torch.equal(found, clean)


def test_quantised_numbers_are_one_byte_and_one_scale_a_tile():
    values, scales = quantise(torch.randn(200, 300), Tile(128, 128))
    assert values.dtype == E4M3 and values.shape == (2, 128, 3, 128)
    assert scales.dtype == torch.float32 and scales.numel() == 6


# ---------------------------------------------------------------------- the three products

OPERANDS = {  # from the paper, not from the code: (x, W, dy for dx, dy for dW, x for dW)
    "tiles": [(1, 128, E4M3), (128, 128, E4M3), (1, 128, E4M3), (128, 1, E4M3), (128, 1, E4M3)],
    "gradient-blocks": [(1, 128, E4M3), (128, 128, E4M3), (128, 128, E4M3), (128, 128, E4M3), (128, 1, E4M3)],
    "tensor": [*[(WHOLE, WHOLE, E4M3)] * 2, *[(WHOLE, WHOLE, E5M2)] * 2, (WHOLE, WHOLE, E4M3)],
}


@pytest.mark.parametrize("variant", OPERANDS)
def test_forward_and_both_gradients_are_the_slow_ones(variant):
    x, weight = random_matrix(1, 150, 200, 2.0), random_matrix(2, 140, 200, 2.0)
    dy, bias = random_matrix(3, 150, 140, 3.0), torch.randn(140)
    x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()
    y = fp8_linear(x.view(3, 50, 200), weight, bias, VARIANTS[variant])
    y.backward(dy.view(3, 50, 140))

    a, w, g, g_of_w, a_of_w = OPERANDS[variant]
    slow_x, slow_w = slow_round_trip(x.detach(), a), slow_round_trip(weight.detach(), w)
    expected = {
        "y": (y.view(150, 140), slow_x @ slow_w.T + bias.detach().double().numpy()),
        "dx": (x.grad, slow_round_trip(dy, g) @ slow_w),
        "dw": (
            weight.grad,
            slow_round_trip(dy, g_of_w).T @ slow_round_trip(torch.tensor(slow_x).float(), a_of_w),
        ),
        "db": (bias.grad, dy.double().sum(0).numpy()),
    }
    for name, (found, slow) in expected.items():
        error = np.abs(found.detach().double().numpy() - slow).max() / np.abs(slow).max()
        assert error < 2e-6, f"{name}: {error}"


def relative(found, exact) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def test_why_tiles():
    """An outlier channel takes the digits of one scale per matrix; outlier tokens take those of gradient blocks."""
    torch.manual_seed(0)
    x, weight, dy = torch.randn(256, 512), torch.randn(256, 512) / 23, torch.randn(256, 256)
    x[:, 7] *= 3e4
    weight[:, 7] = 0  # the outlier says nothing about the output, and yet costs everything else its digits
    dy[::16] *= 1e6  # gradients are imbalanced among tokens (appendix B.2)
    small = torch.arange(256) % 16 > 0
    y, dx = x.double() @ weight.double().T, dy.double() @ weight.double()
    forward, backward = {}, {}
    for name in OPERANDS:
        variant = VARIANTS[name]
        probe = x.clone().requires_grad_()
        out = fp8_linear(probe, weight, None, variant)
        out.backward(dy)
        forward[name], backward[name] = relative(out.detach(), y), relative(probe.grad[small], dx[small])
    assert forward["tiles"] == forward["gradient-blocks"] < 0.5 * forward["tensor"]
    assert backward["tiles"] < 0.05 < 0.5 < backward["gradient-blocks"]


def test_types_under_autocast():
    """bf16 comes out, as V3's kernels emit it; the sums before are float32, and so are gradients of weights."""
    x, layer = torch.randn(4, 256), nn.Linear(256, 128)
    variant = VARIANTS["tiles"]
    exact = fp8_linear(x, layer.weight, None, variant)
    with torch.autocast("cpu", torch.bfloat16):
        y = fp8_linear(x, layer.weight, None, variant)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, exact.bfloat16()), "one rounding, at the end"
    y.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    assert fp8_linear(x.bfloat16(), layer.weight, layer.bias, variant).dtype == torch.bfloat16
    with torch.inference_mode():
        assert torch.equal(fp8_linear(x, layer.weight, None, variant), exact)


# ---------------------------------------------------------------------- whole models


def tiny(model_type: str = "deepseek_v3", **changes) -> nn.Module:
    sizes = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 64, "moe_intermediate_size": 24,
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
        "first_k_dense_replace": 1, "q_lora_rank": None, "kv_lora_rank": 16, "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16, "v_head_dim": 16, "max_position_embeddings": 64, "pad_token_id": None,
        "bos_token_id": None, "eos_token_id": None, "initializer_range": 0.2,
    }  # fmt: skip
    known = AutoConfig.for_model(model_type).to_dict()
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{k: v for k, v in sizes.items() if k in known} | changes)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


IDS = torch.randint(0, 64, (3, 11), generator=torch.Generator().manual_seed(0))


def loss_and_gradients(model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_which_layers_of_a_deepseek_v3():
    """By name: what V3's section 3.3.1 keeps high is high, every other matrix is float8, nothing is left out."""
    model = tiny()
    report = emulate_fp8(model, "tiles")
    attention = {"q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
    mlp = {"gate_proj", "up_proj", "down_proj"}
    assert set(report.float8) == (
        {f"model.layers.*.self_attn.{name}" for name in attention}
        | {f"model.layers.*.mlp.{name}" for name in mlp}
        | {f"model.layers.*.mlp.shared_experts.{name}" for name in mlp}
        | {"model.layers.*.mlp.experts"}
    )
    assert {reason: set(names) for reason, names in report.high.items()} == {
        "embedding": {"model.embed_tokens"},
        "output head": {"lm_head"},
        "router": {"model.layers.*.mlp.gate"},
        "norms and vectors": {
            "model.norm", "model.layers.*.input_layernorm", "model.layers.*.post_attention_layernorm",
            "model.layers.*.self_attn.kv_a_layernorm",
        },
    }  # fmt: skip
    counted = report.parameters + sum(n for names in report.high.values() for _, n in names.values())
    assert counted == sum(p.numel() for p in model.parameters())
    assert report.float8["model.layers.*.mlp.experts"] == [1, 4 * (2 * 24 * 32 + 32 * 24)]
    assert "deepseek" not in str(report.as_dict()), "plain JSON, no model in it"
    assert len(report.lines()) == 5


def test_the_model_is_given_back_exactly():
    model = tiny()
    before = copy.deepcopy(model.state_dict())
    tensors = {n: p.data_ptr() for n, p in model.named_parameters()}
    classes = [type(m) for m in model.modules()]
    plain, gradients = loss_and_gradients(model)
    with pytest.raises(RuntimeError, match="stop"), fp8_emulated(model, "tensor"):
        inside, _ = loss_and_gradients(model)
        assert model.state_dict().keys() == before.keys()
        raise RuntimeError("stop")
    assert not torch.equal(inside, plain), "emulation must do something"
    assert [type(m) for m in model.modules()] == classes
    assert {n: p.data_ptr() for n, p in model.named_parameters()} == tensors
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    again, same = loss_and_gradients(model)
    assert torch.equal(again, plain) and all(torch.equal(same[n], gradients[n]) for n in gradients)
    restore(model)  # nothing to take back


@pytest.mark.parametrize(
    "family", ["deepseek_v3", "qwen3_moe", "gpt_oss", "aria", "nemotron_h", "laguna", "inkling2"]
)
def test_experts_without_rounding_are_the_familys_own(family, monkeypatch):
    """Transposed, interleaved, with biases, without a gate: forward and gradients agree where nothing is rounded."""
    model = routing_reference.build(family)
    ids = IDS % 60

    def run():
        model.zero_grad()
        out = model(input_ids=ids, use_cache=False).logits
        out.square().mean().backward()
        return out.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    own, own_gradients = run()
    monkeypatch.setattr(fp8, "fp8_linear", lambda x, weight, bias, variant: F.linear(x, weight, bias))
    with fp8_emulated(model) as report:
        assert any("experts" in name for name in report.float8)
        out, gradients = run()
    torch.testing.assert_close(out, own, rtol=1e-5, atol=1e-6)
    assert gradients.keys() == own_gradients.keys()
    for name, gradient in own_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_experts_multiply_in_float8_each_with_its_own_tokens():
    """One MoE layer by hand: for each expert its tokens, both products in emulated float8, weighted and summed."""
    model = tiny()
    experts = model.model.layers[1].mlp.experts
    torch.manual_seed(1)
    hidden, weights = torch.randn(9, 32), torch.rand(9, 2)
    indices = torch.stack([torch.randperm(3)[:2] for _ in range(9)])  # expert 3 gets nothing
    expected = torch.zeros(9, 32)
    for e in range(4):
        tokens, slots = torch.where(indices == e)
        if len(tokens):
            inner = fp8_linear(hidden[tokens], experts.gate_up_proj[e], None, VARIANTS["tensor"])
            gate, up = inner.chunk(2, -1)
            out = fp8_linear(F.silu(gate) * up, experts.down_proj[e], None, VARIANTS["tensor"])
            expected.index_add_(0, tokens, out * weights[tokens, slots, None])
    plain = experts(hidden, indices, weights)
    with fp8_emulated(model, "tensor"):
        found = experts(hidden, indices, weights)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert relative(found.detach(), plain.detach()) > 5e-3


@pytest.mark.parametrize("family", ["llama4", "jetmoe", "dbrx", "longcat_flash"])
def test_experts_of_another_make_are_named_as_high(family):
    model = routing_reference.build(family)
    with fp8_emulated(model) as report:
        high = {r: names for r, names in report.high.items() if "experts" in r or "not a Linear" in r}
        assert sum(n for names in high.values() for _, n in names.values()) > 1000
        assert not any("experts" in name for name in report.float8)


@pytest.mark.parametrize("family", ["qwen2_moe", "jamba", "doge", "zaya"])
def test_gates_of_any_make_stay_high(family):
    """Linear routers, gates of shared experts, product keys."""
    layers = {layer.name: layer.reason for layer in layers_of(routing_reference.build(family))}
    gates = [
        n for n in layers if n.rpartition(".")[2] in ("gate", "router", "shared_expert_gate", "router_gate")
    ]
    assert gates and all(layers[name] == "router" for name in gates)
    assert "lm_head" not in layers or layers["lm_head"] == "output head"


def test_under_lora_the_frozen_layer_is_float8_and_the_adapter_is_not():
    torch.manual_seed(0)
    targets = ["q_proj", "o_proj"]
    model = get_peft_model(tiny(), LoraConfig(r=16, target_modules=targets, init_lora_weights=False))
    before, _ = loss_and_gradients(model)
    report = emulate_fp8(model)
    assert report.float8["model.layers.*.self_attn.q_proj.base_layer"][0] == 2
    adapters = report.high["adapter"]
    assert {name.rpartition(".lora_")[2] for name in adapters} == {"A.default", "B.default"}
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(n for _, n in adapters.values()) == trained
    inside, gradients = loss_and_gradients(model)
    assert gradients and all("lora_" in name for name in gradients)
    assert all(bool(g.isfinite().all()) and float(g.abs().sum()) > 0 for g in gradients.values())
    restore(model)
    assert torch.equal(loss_and_gradients(model)[0], before) and not torch.equal(inside, before)


def test_lora_on_experts_is_emulated_with_the_adapted_weight():
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(r=2, target_modules=[], target_parameters=parameters, init_lora_weights=False)
    torch.manual_seed(0)
    model = get_peft_model(tiny(), config)
    emulate_fp8(model, "tensor")
    with_adapter, gradients = loss_and_gradients(model)
    assert len(gradients) == 4 and all(float(g.abs().sum()) > 0 for g in gradients.values())
    restore(model)
    merged = model.merge_and_unload()
    emulate_fp8(merged, "tensor")
    with torch.no_grad():
        loss = merged(input_ids=IDS, labels=IDS).loss
    torch.testing.assert_close(loss, with_adapter, rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_changes_nothing():
    model = tiny().train()
    emulate_fp8(model)
    plain, gradients = loss_and_gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again, same = loss_and_gradients(model)
    assert torch.equal(plain, again) and all(torch.equal(gradients[n], same[n]) for n in gradients)


def test_a_compiled_layer_rounds_alike():
    """Tracing into the quantiser fails on its sizes; it is a break in the graph instead."""
    mlp = tiny("qwen3").model.layers[0].mlp
    model = nn.ModuleDict({"layers": nn.ModuleList([mlp])})
    emulate_fp8(nn.ModuleDict({"model": model}))
    x = torch.randn(5, 32)
    assert torch.equal(torch.compile(mlp, backend="eager", dynamic=True)(x), mlp(x))


def test_an_infinity_inside_reaches_the_loss():
    model = tiny()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 5] = math.inf
    emulate_fp8(model)
    assert not bool(model(input_ids=IDS, labels=IDS).loss.isfinite())


def test_refusals():
    model = tiny()
    with pytest.raises(UserError, match="'blocks' is unknown; choose one of tiles"):
        emulate_fp8(model, "blocks")
    emulate_fp8(model)
    with pytest.raises(UserError, match=r"already.*restore"):
        emulate_fp8(model, "tensor")
    with pytest.raises(UserError, match=r"no layer that float8 emulation knows.*bf16"):
        emulate_fp8(nn.Sequential(nn.Embedding(4, 4)))


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4-weights", "mxfp8"])
def test_a_block_format_rounds_the_forward_product_and_lets_gradients_through(name):
    """Both operands along the inner dimension, or weights alone; gradients of the rounded product, unrounded."""
    from distill.formats import BLOCKS

    form = BLOCKS[name.partition("-")[0]]
    torch.manual_seed(2)
    x, weight, dy = (
        torch.randn(7, 48, requires_grad=True),
        torch.randn(24, 48, requires_grad=True),
        torch.randn(7, 24),
    )
    y = fp8_linear(x, weight, None, VARIANTS[name])
    y.backward(dy)
    inputs = x.detach() if name.endswith("-weights") else form.round_trip(x.detach())
    rounded = form.round_trip(weight.detach())
    torch.testing.assert_close(y, inputs @ rounded.T)
    torch.testing.assert_close(x.grad, dy @ rounded)
    torch.testing.assert_close(weight.grad, dy.T @ inputs)
    assert relative(y.detach(), (x @ weight.T).detach()) > 5e-3


def test_experts_alone_are_rounded():
    model = tiny()
    with fp8_emulated(model, "mxfp4-experts") as report:
        assert report.float8 and all("experts" in name and "shared" not in name for name in report.float8)
        assert "no routed expert" in report.high
        assert report.lines()[0].startswith("mxfp4 (mxfp4-experts): ")
        total = sum(p.numel() for p in model.parameters())
        assert report.weight_bytes == int((report.parameters * 4.25 + (total - report.parameters) * 16) / 8)
    dense = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            "llama",
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            vocab_size=60,
        )
    )
    with pytest.raises(UserError, match="no layer that mxfp4 emulation knows"):
        emulate_fp8(dense, "mxfp4-experts")
