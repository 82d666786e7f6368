"""Routing decisions against a slow float64 reference, on every MoE causal LM of the installed transformers.

A family that cannot be built fails here by name, with what its constructor said. Each is built with a random
expert bias and two groups where it knows them, and the test shows that it would notice their absence.
"""

import dataclasses

import numpy as np
import pytest
import routing_reference as reference
import torch

from distill.errors import RunError
from distill.models.routers import find_routers
from distill.moe.recording import record_routing
from distill.moe.totals import ScoreTotals


def test_discovery_is_not_empty_and_the_reference_knows_every_family():
    found = reference.moe_families()
    assert len(found) >= 50
    assert set(found) <= set(reference.FAMILIES), f"new families: {set(found) - set(reference.FAMILIES)}"


def built(family: str):
    try:
        return reference.build(family)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        pytest.fail(f"{family} ({reference.moe_families()[family]}) cannot be built: {reason}", pytrace=False)


def test_a_family_that_cannot_be_built_is_named_with_the_reason(monkeypatch):
    monkeypatch.setitem(reference.SMALL, "num_attention_heads", "four")
    with pytest.raises(
        pytest.fail.Exception, match=r"mixtral \(MixtralForCausalLM\) cannot be built: \w+: .*four"
    ):
        built("mixtral")


@pytest.mark.parametrize("family", reference.moe_families())
def test_every_family_matches_the_reference(family):
    rule, model = reference.FAMILIES[family], built(family)
    ids = torch.randint(3, 64, (2, 8), generator=torch.Generator().manual_seed(7))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    routers, inputs = find_routers(model), {}

    def remember(name):
        return lambda _m, args, kwargs: inputs.setdefault(name, []).append(_arrays(args, kwargs))

    handles = [
        r.block.get_submodule(rule.weight.split(".")[0]).register_forward_pre_hook(
            remember(r.name), with_kwargs=True
        )
        for r in routers
    ]
    with torch.no_grad(), record_routing(model) as recording:
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    for handle in handles:
        handle.remove()

    real = mask.flatten().bool().numpy()
    text = model.config.get_text_config()
    wrong = _rules_without_one_part(rule, text)
    noticed = dict.fromkeys(wrong, False)
    assert routers
    assert len(recording.layers) == sum(map(len, inputs.values())) >= len(routers)
    for name, record in recording.layers.items():
        router, (own_name, _, visit) = record.router, name.partition(" pass ")
        args = (router.block, text, inputs[own_name][int(visit or 1) - 1], ids.flatten().numpy())
        scores, weights, choices = reference.decide(rule, *args)
        assert record.tokens == real.sum() == record.counts.sum() / router.top_k
        assert record.score_function == ("probabilities" if family == "gemma4" else rule.score)
        applied = np.zeros_like(weights[real])
        np.put_along_axis(applied, record.indices.numpy(), record.weights.double().numpy(), axis=1)
        scale = max(1.0, np.abs(weights).max())
        np.testing.assert_allclose(record.scores.numpy(), scores[real], atol=1e-5)
        np.testing.assert_allclose(applied, weights[real], atol=1e-5 * scale)
        np.testing.assert_array_equal(record.indices.sort(-1).values.numpy(), choices[real])
        np.testing.assert_array_equal(
            record.counts, np.bincount(choices[real].ravel(), minlength=len(scores[0]))
        )
        for part, other in wrong.items():
            without = reference.decide(other, *args)[1][real]
            noticed[part] |= np.abs(applied - without).max() > 1e-3
        own = reference.bias_of(rule, router.block)
        assert (router.bias is None) == (own is None)
        assert own is None or router.bias.data_ptr() == own.data_ptr()
    assert all(noticed.values()), f"a reference without {noticed} gives the same decisions: the test is blind"


@pytest.mark.parametrize(
    "peaked", [1, 20]
)  # sharp routers leave weights that half precision has few digits for
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["deepseek_v3", "mixtral", "qwen3_moe"])
def test_score_function_is_found_in_half_precision(family, dtype, peaked):
    model = reference.build(family)
    for router in find_routers(model):
        router.router.weight.data.mul_(peaked)
    with torch.no_grad(), record_routing(model.to(dtype), keep="counts") as recording:
        model(input_ids=torch.arange(64)[None])
    assert {record.score_function for record in recording.layers.values()} == {
        reference.FAMILIES[family].score
    }


def test_nearly_alike_functions_are_told_apart_by_many_rounded_ratios():
    """Narrow logits in bf16: sqrt(softplus) is off by little more than rounding, as in a base of the claims' grid."""
    model = reference.build("glm4_moe")
    gate = next(m for m in model.modules() if type(m).__name__ == "Glm4MoeMoE").gate
    gate.e_score_correction_bias.zero_()
    router = next(iter(find_routers(model)))
    torch.manual_seed(0)
    cases = [
        (0.024, 4096, "sigmoid"),
        *((size, 4096, None) for size in (0.002, 0.005, 0.01)),
    ]
    for size, tokens, found in cases:
        logits = size * torch.randn(tokens, gate.weight.shape[0]) - 1.0
        scores, indices = logits.sigmoid().topk(2)
        weights = (scores / scores.sum(-1, keepdim=True)).bfloat16()
        totals = ScoreTotals(router)
        for part in range(0, tokens, 256):
            totals.add(*(x[part : part + 256] for x in (logits, weights, indices)))
        best, rival = sorted(totals._spread().values())[:2]
        if found:
            assert 1.5 * best < rival < 3 * best and totals.verdict() == found
            continue
        with pytest.raises(RunError, match="cannot tell"):  # the smallest: what is rounded is nothing but 0.5
            totals.verdict()


@pytest.mark.parametrize("case", ["equal logits", "one expert with weight 1", "another function"])
def test_undecidable_score_function_raises_and_counts_survive(case):
    model = reference.build("mixtral")
    gate = model.model.layers[0].mlp.gate
    if case == "equal logits":
        gate.weight.data.zero_()
    elif case == "another function":  # near softmax, but not it
        gate.register_forward_hook(lambda _m, _a, out: (out[0], out[1] ** 1.1, out[2]))
    else:
        gate.top_k = 1
    with torch.no_grad(), record_routing(model) as recording:
        model(input_ids=torch.arange(30)[None])
    record = recording.layers["model.layers.0.mlp"]
    assert record.counts.sum() == 30 * gate.top_k
    for read in (recording.summary, lambda: record.scores):
        with pytest.raises(RunError, match="cannot tell the score function"):
            read()


def _rules_without_one_part(rule, config) -> dict:
    """The negative controls: the reference without the bias, the group limit, the renormalisation it has."""
    norm = getattr(config, rule.norm) if isinstance(rule.norm, str) else rule.norm
    parts = {"bias": (rule.bias, None), "groups": (rule.groups, None), "norm": (norm, False)}
    return {part: dataclasses.replace(rule, **{part: off}) for part, (on, off) in parts.items() if on}


def _arrays(args, kwargs) -> list[np.ndarray]:
    tensors = [x for x in [*args, *kwargs.values()] if isinstance(x, torch.Tensor) and x.is_floating_point()]
    return [x.detach().double().numpy().reshape(-1, x.shape[-1]) for x in tensors if x.ndim > 1]
