"""Router losses against loops over tokens in float64; taps against `record_routing` and plain gradients."""

import numpy as np
import pytest
import routing_reference as reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from distill.errors import RunError, UserError
from distill.moe.recording import record_routing
from distill.training.losses.routers import (
    RouterTap,
    batch_balance,
    over_layers,
    per_kept_token,
    router_distillation,
    sequence_balance,
)

# ------------------------------------------------------------------------------------------------ balance


def sequence_by_definition(scores, indices, mask):
    """DeepSeek-V3, equations 17 to 20, one token at a time."""
    values, experts, k = [], scores.shape[2], indices.shape[2]
    for s, chosen, real in zip(scores.tolist(), indices.tolist(), mask.tolist()):
        tokens = [t for t in range(len(real)) if real[t]]
        value = 0.0
        for i in range(experts):
            f = experts / (k * len(tokens)) * sum(i in chosen[t] for t in tokens) if tokens else 0.0
            p = sum(s[t][i] / sum(s[t]) for t in tokens) / len(tokens) if tokens else 0.0
            value += f * p
        values.append(value)
    return np.array(values)


def layer(seed, rows=3, time=5, experts=6, k=2, score="sigmoid"):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, time, experts, generator=generator, dtype=torch.float64)
    scores = logits.sigmoid() if score == "sigmoid" else logits.softmax(-1)
    bias = torch.randn(
        experts, generator=generator, dtype=torch.float64
    )  # decisions are not the scores' top k
    mask = (torch.rand(rows, time, generator=generator) < 0.7).long()
    return scores, (scores + bias).topk(k, -1).indices, mask


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 4),
    time=st.integers(1, 7),
    experts=st.integers(2, 9),
    k=st.integers(1, 2),
    score=st.sampled_from(["sigmoid", "softmax"]),
)
def test_sequence_balance_is_the_papers(seed, rows, time, experts, k, score):
    scores, indices, mask = layer(seed, rows, time, experts, k, score)
    loss = sequence_balance(scores, indices, mask)
    np.testing.assert_allclose(loss, sequence_by_definition(scores, indices, mask), rtol=1e-10, atol=1e-12)
    whole = batch_balance(scores, indices, mask)
    one = sequence_by_definition(*(x.flatten(0, 1)[None] for x in (scores, indices, mask)))
    np.testing.assert_allclose(whole, one.repeat(rows), rtol=1e-10, atol=1e-12)


def test_perfect_is_one_and_collapse_is_experts_over_k():
    experts, k = 4, 2
    indices = torch.tensor([[[0, 1], [2, 3], [1, 2], [3, 0]]])
    mask = torch.ones(1, 4)
    even = torch.full((1, 4, experts), 0.25)
    assert sequence_balance(even, indices, mask).item() == batch_balance(even, indices, mask).item() == 1
    peaked = torch.zeros(1, 4, experts).scatter(2, indices, 0.5)
    assert sequence_balance(peaked, indices, mask).item() == 1
    collapsed = torch.zeros(1, 4, experts).scatter(2, torch.zeros_like(indices[..., :1]), 1.0)
    assert sequence_balance(collapsed, torch.zeros(1, 4, 1).long(), mask).item() == experts
    pair = torch.tensor([0, 1]).expand(1, 4, 2)
    assert (
        sequence_balance(torch.zeros(1, 4, experts).scatter(2, pair, 0.5), pair, mask).item() == experts / k
    )


def test_two_collapsed_layers_are_not_called_even():
    """transformers pools the layers before multiplying: each uses one expert alone, and it sees perfection."""
    to_first = torch.tensor([20.0, -20.0]).expand(6, 2)
    pooled = load_balancing_loss_func((to_first, -to_first), num_experts=2, top_k=1)
    even = torch.stack([to_first[:3], -to_first[:3]], 1).flatten(0, 1)
    assert pooled.item() == pytest.approx(1) == load_balancing_loss_func((even, even), 2, 1).item()
    mask = torch.ones(2, 3)
    for balance in (sequence_balance, batch_balance):
        per_layer = [
            balance(z.softmax(-1).view(2, 3, 2), z.argmax(-1).view(2, 3, 1), mask)
            for z in (to_first, -to_first)
        ]
        torch.testing.assert_close(sum(per_layer), torch.full((2,), 4.0))  # perfect is 2, one a layer


@pytest.mark.parametrize("k", [1, 2, 3])
def test_one_layer_of_the_batch_form_is_that_of_transformers_over_k(k):
    logits = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(k))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    theirs = load_balancing_loss_func((logits.flatten(0, 1),), 6, k, attention_mask=mask)
    scores = logits.softmax(-1)
    torch.testing.assert_close(batch_balance(scores, scores.topk(k, -1).indices, mask), theirs.expand(3) / k)


def test_gradient_is_exact_and_pulls_the_overloaded_expert_down():
    scores, indices, mask = layer(2)
    for balance in (sequence_balance, batch_balance):
        assert torch.autograd.gradcheck(
            lambda s, b=balance: b(s, indices, mask), scores.clone().requires_grad_()
        )
    logits = torch.zeros(1, 4, 3, requires_grad=True)
    sequence_balance(logits.softmax(-1), torch.zeros(1, 4, 1).long(), torch.ones(1, 4)).sum().backward()
    assert (logits.grad[..., 0] > 0).all() and (logits.grad[..., 1:] < 0).all()


def test_padding_is_not_seen_whatever_it_holds():
    scores, indices, mask = layer(3)
    loss = sequence_balance(scores, indices, mask)
    spoiled = scores.masked_fill(mask[..., None] == 0, torch.nan).requires_grad_()
    again = sequence_balance(spoiled, indices.masked_fill(mask[..., None] == 0, 5), mask)
    torch.testing.assert_close(again, loss)
    again.sum().backward()
    assert spoiled.grad[mask.bool()].isfinite().all()
    empty = sequence_balance(scores, indices, torch.zeros_like(mask))
    assert torch.equal(empty, torch.zeros(3, dtype=torch.float64))


def test_splitting_a_batch_changes_nothing():
    scores, indices, mask = layer(4, rows=6)
    mask[:, 0] = 1
    keep = mask.bool() & (torch.arange(5) >= 2)
    keep[:, 1] = True
    whole = per_kept_token(sequence_balance(scores, indices, mask), keep)
    assert whole.shape == (int(keep.sum()),)
    weighted = (sequence_balance(scores, indices, mask) * keep.sum(1)).sum()
    torch.testing.assert_close(whole.sum(), weighted)
    for size in (1, 2, 4):
        parts = [slice(i, i + size) for i in range(0, 6, size)]
        pieces = [per_kept_token(sequence_balance(scores[p], indices[p], mask[p]), keep[p]) for p in parts]
        assert torch.equal(torch.cat(pieces), whole)
    by_hand = per_kept_token(torch.tensor([1.0, 2.0]), torch.tensor([[0, 1, 1], [1, 0, 0]]).bool())
    assert by_hand.tolist() == [1, 1, 2]


# ------------------------------------------------------------------------------------- the teacher's routing

SCORES = {
    "softmax": lambda z: np.exp(z),
    "sigmoid": lambda z: 1 / (1 + np.exp(-z)),
    "sqrtsoftplus": lambda z: np.sqrt(np.log1p(np.exp(z))),
}


@pytest.mark.parametrize("mine", SCORES)
@pytest.mark.parametrize("theirs", SCORES)
@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_router_distillation_is_the_forward_kl(mine, theirs, temperature):
    student, teacher = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    options = {"temperature": temperature, "student_score": mine, "teacher_score": theirs}
    loss = router_distillation(student, teacher, **options)
    p, q = SCORES[theirs](teacher.numpy() / temperature), SCORES[mine](student.numpy() / temperature)
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    np.testing.assert_allclose(loss, (p * np.log(p / q)).sum(1), rtol=1e-10)
    assert torch.autograd.gradcheck(
        lambda s: router_distillation(s, teacher, **options), student.requires_grad_()
    )


def test_router_distillation_at_agreement_and_without_a_gradient_to_the_teacher():
    z = torch.randn(3, 4, requires_grad=True)
    torch.testing.assert_close(router_distillation(z, z), torch.zeros(3))
    router_distillation(torch.zeros(3, 4, requires_grad=True), z).sum().backward()
    assert z.grad is None
    assert router_distillation(z.bfloat16(), z.bfloat16()).dtype == torch.float32
    probabilities = z.detach().softmax(-1)
    mixed = router_distillation(z, probabilities, teacher_score="probabilities")
    torch.testing.assert_close(mixed, torch.zeros(3), atol=1e-6, rtol=0)
    for wrong in ({"teacher_score": "relu"}, {"temperature": 0.0}):
        with pytest.raises(UserError):
            router_distillation(z, z, **wrong)
    with pytest.raises(UserError, match="as many experts"):
        router_distillation(z, z[:, :3])


def test_mistaken_shapes_are_named():
    with pytest.raises(UserError, match=r"\[B, T, E\]"):
        sequence_balance(torch.zeros(2, 3), torch.zeros(2, 1).long(), torch.ones(2))


# -------------------------------------------------------------------------------------------- hearing them

# One for each way decisions are read, each score function, null experts, hash layers, sampled experts.
FAMILIES = ["mixtral", "deepseek_v3", "llama4", "doge", "jetmoe", "zaya", "deepseek_v4", "gemma4", "phimoe"]


def batch():
    ids = torch.randint(3, 64, (2, 8), generator=torch.Generator().manual_seed(7))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return ids, mask


@pytest.mark.parametrize("family", FAMILIES)
def test_tap_hears_live_what_the_recorder_hears(family):
    model, (ids, mask) = reference.build(family).float(), batch()
    with torch.no_grad(), record_routing(model) as recording:
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    tap = RouterTap(model)
    model(input_ids=ids, attention_mask=mask, use_cache=False)
    layers = tap.take(mask)
    assert [heard.name for heard in layers] == list(recording.layers)
    for heard in layers:
        record = recording.layers[heard.name]
        assert heard.score == record.score_function and heard.logits.requires_grad
        torch.testing.assert_close(heard.scores[mask.bool()].detach(), record.scores)
        assert torch.equal(heard.indices[mask.bool()], record.indices)
    total = over_layers(sequence_balance, layers, mask)
    one_by_one = [sequence_by_definition(h.scores, h.indices, mask) for h in layers]
    np.testing.assert_allclose(total.detach(), sum(one_by_one), rtol=1e-4)


def gradients(family, checkpointing):
    model, (ids, mask) = reference.build(family).float().train(), batch()
    calls, tap = [], RouterTap(model, score="softmax" if family == "phimoe" else None)
    next(
        m for n, m in model.named_modules() if n.endswith((".gate", ".router", ".router_gate"))
    ).register_forward_hook(lambda *_: calls.append(1))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(0)
    model(input_ids=ids, attention_mask=mask, use_cache=False)
    over_layers(sequence_balance, tap.take(mask), mask).sum().backward()
    with pytest.raises(RunError, match="not heard"):
        tap.take(mask)  # the recomputation brought nothing
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, len(calls)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "jetmoe"])  # which cannot checkpoint
def test_balance_gradient_under_checkpointing_is_that_without(family):
    plain, once = gradients(family, False)
    again, twice = gradients(family, True)
    assert (once, twice) == (1, 2), "the router did not run twice: checkpointing was off"
    assert plain.keys() == again.keys() and any(g.any() for g in plain.values())
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient)


def test_gradient_is_that_of_output_router_logits():
    model, (ids, mask) = reference.build("mixtral").float(), batch()
    tap = RouterTap(model)
    out = model(input_ids=ids, attention_mask=mask, output_router_logits=True, use_cache=False)
    ours = torch.autograd.grad(
        over_layers(sequence_balance, layers := tap.take(mask), mask).sum(),
        model.model.layers[0].mlp.gate.weight,
    )[0]
    out = model(input_ids=ids, attention_mask=mask, output_router_logits=True, use_cache=False)
    pairs = zip(out.router_logits, layers)
    total = sum(
        sequence_balance(z.view(2, 8, -1).softmax(-1), heard.indices, mask).sum() for z, heard in pairs
    )
    theirs = torch.autograd.grad(total, model.model.layers[0].mlp.gate.weight)[0]
    assert theirs.any()
    torch.testing.assert_close(ours, theirs)


def test_tap_under_peft_trains_the_router_adapter():
    from peft import LoraConfig, get_peft_model

    base, (ids, mask) = reference.build("deepseek_v3").float().train(), batch()
    config = LoraConfig(
        r=2, target_modules=["o_proj"], target_parameters=["mlp.gate.weight"], task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, config)
    base.gradient_checkpointing_enable({"use_reentrant": False})
    base.enable_input_require_grads()
    tap = RouterTap(model)
    model(input_ids=ids, attention_mask=mask, use_cache=False)
    layers = tap.take(mask)
    assert len(layers) == 2
    over_layers(sequence_balance, layers, mask).sum().backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert {n.split(".layers.")[1][0] for n in trained if "gate" in n} == {"0", "1"}


def test_reentrant_checkpointing_is_refused():
    model, (ids, mask) = reference.build("mixtral").float().train(), batch()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    RouterTap(model)
    with pytest.raises(UserError, match="use_reentrant"):
        model(input_ids=ids, attention_mask=mask, use_cache=False)


def test_a_frozen_teacher_is_heard_without_gradient():
    model, (ids, mask) = reference.build("mixtral").float(), batch()
    tap = RouterTap(model)
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    layers = tap.take(mask)
    assert not any(heard.logits.requires_grad for heard in layers)
    tap.close()
    model(input_ids=ids, attention_mask=mask)
    with pytest.raises(RunError, match="not heard"):
        tap.take(mask)


def test_mistakes_are_named(hub):
    from distill.models.load import load_model

    with pytest.raises(UserError, match="dense"):
        RouterTap(load_model(hub["llama"], "fp32"))
    model, (ids, mask) = reference.build("mixtral").float(), batch()
    with pytest.raises(UserError, match="softmax"):
        RouterTap(model, score="relu")
    tap = RouterTap(model)
    with pytest.raises(RunError, match="before any forward pass"):
        tap.take(mask)
    model(input_ids=ids[:1])
    with pytest.raises(RunError, match="cannot be told"):
        tap.take(mask)
    for block in model.model.layers:
        block.mlp.gate.weight.data.zero_()
    model(input_ids=ids, attention_mask=mask)
    with pytest.raises(RunError, match="name it"):
        tap.take(mask)
    named = RouterTap(model, score="softmax")
    model(input_ids=ids, attention_mask=mask)
    assert {heard.score for heard in named.take(mask)} == {"softmax"}
