"""Hidden-state losses by hand in float64; taps against `output_hidden_states`, checkpointing and PEFT."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import set_checkpoint_early_stop
from transformers import AutoConfig, AutoModelForCausalLM

from distill.errors import RunError, UserError
from distill.models.hooks import Gate, KeptLogits
from distill.models.layers import decoder_layers
from distill.training.losses.hidden import (
    HiddenTap,
    Projection,
    hidden_cosine,
    hidden_mse,
    layer_pairs,
    over_pairs,
    projections,
)

FAMILIES = {
    "llama": {"num_key_value_heads": 2},
    "gpt2": {"n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 32},
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 16, "max_position_embeddings": 32},
    "bert": {"is_decoder": True, "intermediate_size": 32, "max_position_embeddings": 32},
}
SIZES = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
    "num_attention_heads": 4, "pad_token_id": 0,
}  # fmt: skip


def build(family="llama", **sizes):
    torch.manual_seed(0)
    names = set(AutoConfig.for_model(family).to_dict()) | set(FAMILIES[family])
    config = {k: v for k, v in {**SIZES, **FAMILIES[family], **sizes}.items() if k in names}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **config))
    return model.eval()


@pytest.fixture
def batch():
    ids = torch.randint(1, 40, (2, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    keep = torch.zeros(2, 6, dtype=torch.bool)
    keep[0, 2:6], keep[1, 1:4] = True, True
    return ids, mask, keep


# ------------------------------------------------------------------------------------------------- losses


def states(seed, tokens=5, width=7):
    return torch.randn(2, tokens, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6), tokens=st.integers(0, 6), width=st.integers(1, 20), scale=st.floats(0.01, 100)
)
def test_values_are_the_definitions(seed, tokens, width, scale):
    a, b = states(seed, tokens, width)
    a = a * scale
    x, y = a.numpy(), b.numpy()
    cosine = 1 - (x * y).sum(1) / np.sqrt((x * x).sum(1) * (y * y).sum(1))
    np.testing.assert_allclose(hidden_cosine(a, b), cosine, atol=1e-9)
    np.testing.assert_allclose(hidden_mse(a, b, normalise=False), ((x - y) ** 2).mean(1), rtol=1e-10)
    unit = x / np.sqrt((x * x).mean(1, keepdims=True)), y / np.sqrt((y * y).mean(1, keepdims=True))
    np.testing.assert_allclose(
        hidden_mse(a, b, normalise=True), ((unit[0] - unit[1]) ** 2).mean(1), atol=1e-9
    )
    np.testing.assert_allclose(hidden_mse(a, b, normalise=True), 2 * cosine, atol=1e-9)
    assert hidden_cosine(a.bfloat16(), b.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(
    "loss",
    [
        hidden_cosine,
        lambda a, b: hidden_mse(a, b, normalise=False),
        lambda a, b: hidden_mse(a, b, normalise=True),
    ],
)
def test_gradcheck_identity_and_frozen_teacher(loss):
    a, b = states(1, 3, 4)
    assert torch.autograd.gradcheck(lambda s: loss(s, b), a.requires_grad_())
    torch.testing.assert_close(loss(b, b), torch.zeros(3, dtype=torch.float64))
    loss(a, b.requires_grad_()).sum().backward()
    assert b.grad is None and a.grad.any()
    zero = torch.zeros(1, 4, requires_grad=True)
    loss(zero, torch.ones(1, 4)).sum().backward()
    assert zero.grad.isfinite().all()


def test_cosine_by_hand():
    a = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    b = torch.tensor([[5.0, 0.0], [0.0, 2.0], [-3.0, 0.0]])
    torch.testing.assert_close(hidden_cosine(a, b), torch.tensor([0.0, 1.0, 2.0]))


def test_other_widths_are_refused():
    with pytest.raises(UserError, match="Projection"):
        hidden_cosine(torch.zeros(2, 3), torch.zeros(2, 4))


# ---------------------------------------------------------------------------------------- widths and layers


@pytest.mark.parametrize("width, teacher_width", [(6, 10), (10, 6)])
def test_projection_starts_near_an_isometry_and_from_its_seed(width, teacher_width):
    one, same, other = (Projection(width, teacher_width, seed) for seed in (3, 3, 4))
    assert torch.equal(one.weight, same.weight) and not torch.equal(one.weight, other.weight)
    x = torch.randn(4000, width, generator=torch.Generator().manual_seed(0))
    ratio = one(x).square().sum(1) / x.square().sum(1)
    if teacher_width > width:
        torch.testing.assert_close(ratio, torch.ones(4000))
    assert ratio.mean().item() == pytest.approx(1, abs=0.03)
    with torch.autocast("cpu", torch.bfloat16):
        out = one(x.bfloat16())
    assert out.shape == (4000, teacher_width) and out.dtype == torch.float32
    assert [name for name, p in one.named_parameters() if p.requires_grad] == ["weight"]


def test_equal_widths_have_no_projection():
    with pytest.raises(UserError, match="without a Projection"):
        Projection(8, 8, 0)
    assert projections([(0, 1)], 8, 8, 0) is None
    maps = projections([(0, 1), (1, 3)], 4, 8, 0)
    assert len(maps) == 2 and not torch.equal(maps[0].weight, maps[1].weight)


@settings(max_examples=60, deadline=None)
@given(student=st.integers(1, 40), teacher=st.integers(1, 80))
def test_uniform_pairs_are_even_and_end_together(student, teacher):
    pairs = layer_pairs(student, teacher)
    mine, theirs = zip(*pairs)
    assert list(mine) == list(range(student)) and pairs[-1] == (student - 1, teacher - 1)
    gaps = np.diff([-1, *theirs])
    assert theirs[0] >= 0 and gaps.max() - gaps.min() <= 1
    if student == teacher:
        assert mine == theirs


def test_pairs_by_hand_and_their_mistakes():
    assert layer_pairs(4, 12) == [(0, 2), (1, 5), (2, 8), (3, 11)]
    assert layer_pairs(4, 12, "last") == [(3, 11)]
    assert layer_pairs(4, 12, [[0, 0], (-1, -1)]) == [(0, 0), (3, 11)]
    with pytest.raises(UserError) as error:
        layer_pairs(4, 12, [(4, 0), (0, 12), (1, 1), (1, 1)])
    assert len(error.value.problems) == 3
    for which in ([], "every"):
        with pytest.raises(UserError):
            layer_pairs(4, 12, which)


def test_over_pairs_is_the_mean_and_trains_its_maps():
    student, teacher = (
        {0: states(1)[0], 2: states(2)[0]},
        {1: states(3, width=9)[0], 5: states(4, width=9)[0]},
    )
    pairs, maps = [(0, 1), (2, 5)], projections([(0, 1), (2, 5)], 7, 9, 0).double()
    loss = over_pairs(hidden_cosine, student, teacher, pairs, maps)
    by_hand = [hidden_cosine(student[s] @ m.weight.T, teacher[t]) for (s, t), m in zip(pairs, maps)]
    torch.testing.assert_close(loss, (by_hand[0] + by_hand[1]) / 2)
    loss.sum().backward()
    assert all(m.weight.grad.any() for m in maps)


# ---------------------------------------------------------------------------------------------------- taps


@pytest.mark.parametrize("family", FAMILIES)
def test_tap_hears_what_the_model_reports(family, batch):
    ids, mask, keep = batch
    model = build(family)
    backbone, layers = decoder_layers(model)
    assert len(layers) == 3 and backbone is not model
    tap = HiddenTap(model, [0, 1, 1])
    with torch.no_grad():
        reported = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    taken = tap.take(keep)
    assert list(taken) == [0, 1]
    for layer, heard in taken.items():
        torch.testing.assert_close(heard, reported[layer + 1][keep])
    tap.close()
    model(input_ids=ids)
    with pytest.raises(RunError, match="not heard"):
        tap.take(keep)


def gradients(batch, around: str | None = None, reentrant: bool = False):
    """Parameter gradients of a loss on taps and logits, and how often layer 0 was called.

    around: "forward" checkpoints as transformers does, "call" as torch's wrapper does, hooks inside.
    """
    ids, mask, keep = batch
    model, calls = build().train(), []
    tap = HiddenTap(model, [0, 2])
    layers = decoder_layers(model)[1]
    layers[0].mlp.register_forward_hook(lambda *_: calls.append("inside"))
    layers[0].register_forward_hook(lambda *_: calls.append("layer"))
    if around == "forward":
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    elif around == "call":
        apply_activation_checkpointing(model, check_fn=lambda module: module in [*layers])
    with set_checkpoint_early_stop(False):
        logits = KeptLogits(model)(ids, mask, keep)
        taken = tap.take(keep)
    (taken[0].square().sum() + taken[2].pow(3).sum() + logits.square().sum()).backward()
    with pytest.raises(RunError, match="not heard"):
        tap.take(keep)  # the recomputation brought nothing
    name = "_checkpoint_wrapped_module."
    found = {n.replace(name, ""): p.grad for n, p in model.named_parameters() if p.grad is not None}
    return found, calls


def test_gradient_under_checkpointing_is_that_without(batch):
    plain, calls = gradients(batch)
    assert sorted(calls) == ["inside", "layer"] and len(plain) == 3 * 9 + 3
    cases = [("forward", False, 3), ("forward", True, 3), ("call", False, 4)]
    for around, reentrant, expected in cases:
        again, calls = gradients(batch, around, reentrant)
        assert len(calls) == expected, f"{around}: {calls}: the layer was not run twice"
        assert plain.keys() == again.keys()
        for name, gradient in plain.items():
            torch.testing.assert_close(again[name], gradient)


def test_the_tapped_loss_alone_reaches_the_layers_below_and_none_above(batch):
    ids, mask, keep = batch
    for checkpointing in (False, True):
        model = build().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        tap = HiddenTap(model, [1])
        model(input_ids=ids, attention_mask=mask, use_cache=False)
        tap.take(keep)[1].square().sum().backward()
        moved = {i for i, layer in enumerate(model.model.layers) if layer.mlp.up_proj.weight.grad is not None}
        assert moved == {0, 1}
        with pytest.raises(RunError, match="not heard"):
            tap.take(keep)  # the recomputation during backward brought nothing


def test_reentrant_checkpointing_around_the_call_is_refused(batch):
    ids, mask, _ = batch
    model = build().train()
    model.enable_input_require_grads()
    HiddenTap(model, [1])
    wrapper = partial(checkpoint_wrapper, checkpoint_impl=CheckpointImpl.REENTRANT)
    layers = [*decoder_layers(model)[1]]
    apply_activation_checkpointing(model, checkpoint_wrapper_fn=wrapper, check_fn=lambda m: m in layers)
    with pytest.raises(UserError, match="use_reentrant"):
        model(input_ids=ids, attention_mask=mask, use_cache=False)


def test_tap_under_peft_and_a_wrapper_called_module(batch):
    from peft import LoraConfig, get_peft_model

    ids, mask, keep = batch
    base = build().train()
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    model.base_model.model.enable_input_require_grads()
    kept = KeptLogits(model)

    class Wrapper(nn.Module):  # as DistributedDataParallel: the model is its `module`
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *args):
            return self.module(*args)

    tap = HiddenTap(Wrapper(kept), [2])
    Wrapper(kept)(ids, mask, keep)
    heard = tap.take(keep)[2]
    heard.square().sum().backward()
    assert heard.shape == (7, 16)
    lora = {n: p for n, p in model.named_parameters() if "lora_B" in n}
    assert len(lora) == 3 and all(p.grad.any() for p in lora.values())


def test_mistakes_are_named(batch):
    ids, _, keep = batch
    model = build()
    with pytest.raises(UserError, match="0 to 2"):
        HiddenTap(model, [0, 3])
    with pytest.raises(UserError, match="decoder layers"):
        decoder_layers(nn.Linear(2, 2))
    tap = HiddenTap(model, [0])
    with pytest.raises(RunError, match="before any forward pass"):
        tap.take(keep)
    model(input_ids=ids[:1])
    with pytest.raises(RunError, match="token by token"):
        tap.take(keep)


def test_layers_spread_over_several_lists_are_refused():
    xlm = AutoConfig.for_model("xlm", vocab_size=40, emb_dim=16, n_layers=2, n_heads=2)
    with pytest.raises(UserError, match="decoder layers"):
        decoder_layers(AutoModelForCausalLM.from_config(xlm))


def test_a_pass_that_fails_shuts_the_gate(batch):
    model = build()
    gate = Gate(decoder_layers(model)[0])
    with pytest.raises(IndexError):
        model(input_ids=torch.tensor([[999]]))
    assert gate.passes == 1 and not gate.running


def test_a_pass_between_replaces_what_was_held(batch):
    ids, mask, keep = batch
    model = build()
    tap = HiddenTap(model, [1])
    model(input_ids=ids.flip(1), attention_mask=mask)
    model(input_ids=ids, attention_mask=mask)
    second = tap.take(keep)[1]
    model(input_ids=ids, attention_mask=mask)
    assert torch.equal(tap.take(keep)[1], second)
