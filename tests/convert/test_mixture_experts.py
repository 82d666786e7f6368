"""Fewer experts: which stay is REAP's definition, and who stays computes what it computed."""

import pytest
import torch
from tiny_families import model_of, random_ids
from transformers import AutoModelForCausalLM

from distill.config.section import Experts, From
from distill.convert.calibrate import Calibration, expert_use
from distill.convert.derive import derived, derived_config
from distill.convert.mixture import joined, matched
from distill.errors import UserError
from distill.models.routers import find_routers
from distill.moe.interventions import drop_experts, layer_number

FAMILIES = ("qwen3_moe", "deepseek_v3", "mixtral")


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def model_with(family: str, experts: int = 6):
    name = {"qwen3_moe": "num_experts", "deepseek_v3": "n_routed_experts"}.get(family, "num_local_experts")
    # Without `norm_topk_prob` the weights of the chosen do not sum to 1, and fewer experts make them larger.
    model = model_of(family, norm_topk_prob=True, **{name: experts})
    for router in find_routers(model):
        router.router.weight.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(7))
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pruned_model_is_the_whole_one_that_never_chooses_the_others(family, tmp_path):
    model, ids = model_with(family), random_ids()
    if family == "deepseek_v3":
        for router in find_routers(model):  # a bias that decides, and must come along with its expert
            router.bias.copy_(torch.linspace(-0.2, 0.2, 6))
    section = From(model="x", experts=Experts(drop=0.5))
    made = derived(model, section, Calibration(ids.tolist()))
    assert derived_config(model.config, section).to_dict() == made.model.config.to_dict()
    kept = made.chosen["experts"]["experts"]
    gone = {layer_number(name): sorted(set(range(6)) - set(some)) for name, some in kept.items()}
    with drop_experts(model, gone):
        expected = logits(model, ids)
    torch.testing.assert_close(logits(made.model, ids), expected, rtol=0, atol=1e-5)
    made.model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again, ids), expected, rtol=0, atol=1e-5)


def test_reap_is_router_weight_times_norm_of_the_output_over_the_tokens_that_chose_it():
    """By hand, from one layer's own input, weights and matrices."""
    model, ids = model_with("qwen3_moe", 4), random_ids(2, 9)
    router = find_routers(model)[0]
    seen = []
    handle = router.block.register_forward_pre_hook(lambda _m, a: seen.append(a[0].reshape(-1, 32)))
    use = expert_use(model, Calibration(ids.tolist()))[router.name]
    handle.remove()
    sums, counts, weight_sums = torch.zeros(4), torch.zeros(4), torch.zeros(4)
    for states in seen[:2]:
        probabilities = (states @ router.router.weight.T).softmax(-1)
        weights, chosen = probabilities.topk(2)
        weights = weights / weights.sum(-1, keepdim=True) if router.router.norm_topk_prob else weights
        for token, state in enumerate(states):
            for slot in range(2):
                e = int(chosen[token, slot])
                gate, up = (router.experts.gate_up_proj[e] @ state).chunk(2)
                output = router.experts.down_proj[e] @ (torch.nn.functional.silu(gate) * up)
                sums[e] += weights[token, slot] * output.norm()
                weight_sums[e] += weights[token, slot]
                counts[e] += 1
    torch.testing.assert_close(use.mean_saliency, (sums / counts.clamp(min=1)).detach())
    torch.testing.assert_close(use.mean_weight, weight_sums.detach() / 18)
    assert use.tokens == 18 and torch.equal(use.chosen, counts)


def test_merging_copies_whose_neurons_stand_in_another_order_changes_nothing():
    """Experts 4 and 5 are 0 and 1 with shuffled neurons: merged, the model is the one without them."""
    model, ids = model_with("qwen3_moe"), random_ids()
    for router in find_routers(model):
        up, down = router.experts.gate_up_proj.data, router.experts.down_proj.data
        order = torch.randperm(24, generator=torch.Generator().manual_seed(5))
        for copy, of in ((4, 0), (5, 1)):
            up[copy], down[copy] = up[of][torch.cat([order, order + 24])], down[of][:, order]
            assert torch.equal(order[matched(up[of], down[of], up[copy], down[copy])], torch.arange(24))
    use = expert_use(model, Calibration(ids.tolist()), likeness=True)
    groups = joined(next(iter(use.values())), [0, 1, 2, 3])
    assert 4 in groups[0] and 5 in groups[1]
    section = From(model="x", experts=Experts(drop=1 / 3, how="merge"))
    merged = derived(model, section, Calibration(ids.tolist()))
    pruned = derived(model, From(model="x", experts=Experts(drop=1 / 3)), Calibration(ids.tolist()))
    assert merged.chosen["experts"]["experts"] == pruned.chosen["experts"]["experts"]
    for name, kept in merged.chosen["experts"]["experts"].items():
        if {0, 1} <= set(kept) and not {4, 5} & set(kept):
            a = merged.model.get_submodule(name).experts.down_proj
            torch.testing.assert_close(a, pruned.model.get_submodule(name).experts.down_proj)


def test_frequency_and_random_choose_as_they_say():
    model, ids = model_with("mixtral"), random_ids()
    use = expert_use(model, Calibration(ids.tolist()))
    often = derived(
        model, From(model="x", experts=Experts(drop=0.5, how="frequency")), Calibration(ids.tolist())
    )
    for name, kept in often.chosen["experts"]["experts"].items():
        assert min(use[name].chosen[kept]) >= max(use[name].chosen[[e for e in range(6) if e not in kept]])
    drawn = [
        derived(model, From(model="x", experts=Experts(drop=0.5, how="random")), Calibration([], seed)).chosen
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(
    ("family", "changes", "drop", "says"),
    [
        ("qwen3_moe", {}, 0.75, "1 of 4 experts would stay, and a token uses 2; give 0.5 or less"),
        ("deepseek_v3", {"n_group": 2, "topk_group": 1}, 0.5, "chooses experts in groups"),
    ],
)
def test_what_cannot_be_pruned_is_refused_from_the_config_alone(family, changes, drop, says):
    with pytest.raises(UserError, match=says):
        derived_config(model_of(family, **changes).config, From(model="x", experts=Experts(drop=drop)))
