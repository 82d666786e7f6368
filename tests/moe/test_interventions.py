"""Changed routing on every MoE family: what experts get is what was asked for, and afterwards all is as before.

Each change is held to something that shares no code with it: `use_top_k` to a model built with that k, a
replaced expert to the float64 reference, a silenced one to a model whose expert was set to zero.
"""

import copy
import functools
import inspect
from contextlib import contextmanager

import numpy as np
import pytest
import routing_reference as reference
import torch
from peft import LoraConfig, get_peft_model
from tiny_families import model_of
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, LlamaConfig, LlamaForCausalLM

from distill.errors import RunError, UserError
from distill.models.decode import Sampling, decode
from distill.models.routers import find_routers
from distill.moe.interventions import ROUTES, drop_experts, layer_number, route, sample_experts, use_top_k
from distill.moe.recording import record_routing

FAMILIES = list(reference.moe_families())
NO_TOP_K = {"deepseek_v4": "table", "phimoe": "sparsemixer", "jetmoe": "query heads", "zaya": "=1. only"}
NO_REPLACEMENT = {"phimoe": "sparsemixer", "doge": "product of keys"}
NO_CALL = ("llama4", "jetmoe", "doge")
IDS = torch.randint(3, 64, (2, 8), generator=torch.Generator().manual_seed(7))
MASK = torch.ones_like(IDS)
MASK[0, :3] = 0


@functools.cache
def built(family: str):
    """Shared by the tests: each of them shows that it gives the model back as it was."""
    return reference.build(family)


@functools.cache
def loud():
    """A model whose experts decide what it writes."""
    model = reference.build("mixtral")
    for router in find_routers(model):
        for parameter in router.experts.parameters():
            parameter.data *= 12
    return model


def built_with(family: str, k: int, monkeypatch):
    fields = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
    monkeypatch.setattr(reference, "SMALL", reference.SMALL | dict.fromkeys(fields, k))
    overrides = copy.deepcopy(reference.OVERRIDES)
    overrides["dbrx"]["ffn_config"]["moe_top_k"] = k
    monkeypatch.setattr(reference, "OVERRIDES", overrides)
    return reference.build(family)


@torch.no_grad()
def forward(model, ids=IDS, mask=MASK):
    with record_routing(model) as recording:
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return logits, list(recording.layers.values())


def state_of(model) -> dict:
    """All that a context could leave behind: hooks, attributes, config."""
    plain = (int, float, str, bool, tuple, type(None))
    found = {"config": model.config.to_dict()}
    for name, module in model.named_modules():
        hooks = {key: len(value) for key, value in vars(module).items() if "_hooks" in key}
        values = {key: value for key, value in vars(module).items() if isinstance(value, plain)}
        found[name] = (sorted(vars(module)), hooks, values)
    return found


@functools.cache
def untouched(model):
    """State, logits and decisions of a model before the first change."""
    return state_of(model), *forward(model)


@contextmanager
def given_back(model):
    before, logits, _ = untouched(model)
    yield
    assert state_of(model) == before
    assert torch.equal(forward(model)[0], logits)


# ---------------------------------------------------------------------- every family


@pytest.mark.parametrize("family", FAMILIES)
def test_top_k_is_that_of_a_model_built_with_it(family, monkeypatch):
    model = built(family)
    with given_back(model):
        if reason := NO_TOP_K.get(family):
            with pytest.raises(UserError, match=reason), use_top_k(model, 3):
                pass
            return
        with use_top_k(model, 3):
            logits, records = forward(model)
    other = built_with(family, 3, monkeypatch)
    assert not set(dict(other.named_parameters())) ^ set(dict(model.named_parameters()))
    expected, wanted = forward(other)
    assert torch.equal(logits, expected)
    for record, want in zip(records, wanted):
        assert record.indices.shape == (13, 3)
        assert torch.equal(record.indices, want.indices) and torch.equal(record.weights, want.weights)


@pytest.mark.parametrize("family", FAMILIES)
def test_dropped_expert_is_replaced_by_the_next_best_of_the_family(family):
    model, rule = built(family), reference.FAMILIES[family]
    with given_back(model):
        router = find_routers(model)[-1]
        if reason := NO_REPLACEMENT.get(family):
            with pytest.raises(UserError, match=reason), drop_experts(model, {router.name: [0]}):
                pass
            return
        before = untouched(model)[2]
        gone = int(before[-1].counts[: router.num_experts - router.null_experts].argmax())
        inputs = []
        watched = router.block.get_submodule(rule.weight.split(".")[0])
        with drop_experts(model, {router.name: [gone]}):
            hook = watched.register_forward_pre_hook(
                lambda _m, args, kwargs: inputs.append(_arrays(args, kwargs)), with_kwargs=True
            )
            _, records = forward(model)
            hook.remove()
    real, text = MASK.flatten().bool().numpy(), model.config.get_text_config()
    args = (router.block, text, inputs[-1], IDS.flatten().numpy())  # the last visit, of a looped layer
    _, weights, choices = reference.decide(rule, *args, dropped=[gone])
    applied = np.zeros_like(weights[real])
    np.put_along_axis(applied, records[-1].indices.numpy(), records[-1].weights.double().numpy(), axis=1)
    np.testing.assert_array_equal(records[-1].indices.sort(-1).values.numpy(), choices[real])
    np.testing.assert_allclose(applied, weights[real], atol=1e-5 * max(1.0, np.abs(weights).max()))
    assert records[-1].counts[gone] == 0 < before[-1].counts[gone]
    for record, same in zip(records, before):
        if layer_number(record.router.name) < layer_number(router.name):
            assert torch.equal(record.indices, same.indices)


@pytest.mark.parametrize("family", FAMILIES)
def test_silenced_expert_is_one_whose_output_is_zero(family):
    model = built(family)
    with given_back(model):
        router = find_routers(model)[-1]
        if family in NO_CALL:
            silenced = drop_experts(model, {router.name: [0]}, how="zero")
            with pytest.raises(UserError, match="hand indices and weights"), silenced:
                pass
            return
        _, plain, before = untouched(model)
        gone = int(before[-1].counts[: router.num_experts - router.null_experts].argmax())
        with drop_experts(model, {router.name: [gone]}, how="zero"):
            logits, records = forward(model)
    first, changed = (next(r for r in found if r.router.name == router.name) for found in (before, records))
    rows = first.indices == gone
    want = first.weights.masked_fill(rows, 0)  # a second visit sees what the first has made
    assert torch.equal(changed.weights, want) and rows.any()
    other = copy.deepcopy(model)
    for name, parameter in find_routers(other)[-1].experts.named_parameters():
        if name.endswith("w2"):  # dbrx stacks its experts along the rows
            parameter.data.view(reference.EXPERTS, -1)[gone] = 0
        elif "down_proj" in name:
            parameter.data[gone] = 0
    expected = forward(other)[0]
    torch.testing.assert_close(logits[MASK.bool()], expected[MASK.bool()], atol=1e-6, rtol=1e-5)
    assert not torch.equal(logits[MASK.bool()], plain[MASK.bool()])


@pytest.mark.parametrize("family", FAMILIES)
def test_controls_do_what_they_say(family):
    model = built(family)
    with given_back(model):
        if family in NO_CALL:
            with pytest.raises(UserError, match="hand indices and weights"), route(model, "random"):
                pass
            return
        before = untouched(model)[2]
        found = {}
        for how in ROUTES:
            with route(model, how, seed=3):
                found[how] = forward(model)[1]
        with route(model, "random", seed=3):
            alone = forward(model, IDS[:1, 3:], MASK[:1, 3:])[1]
    for record in found["uniform"]:
        spread = record.weights.amax(-1) - record.weights.amin(-1)
        assert spread.max() == 0
    first, same, real = before[0], found["uniform"][0], before[0].router
    assert torch.equal(same.indices, first.indices)
    torch.testing.assert_close(same.weights.sum(-1), first.weights.sum(-1))
    drawn = found["random"]
    assert all(len(set(row)) == real.top_k for record in drawn for row in record.indices.tolist())
    torch.testing.assert_close(drawn[0].weights, first.weights.sort(-1, descending=True).values)
    assert not torch.equal(drawn[0].indices.sort(-1).values, first.indices.sort(-1).values)
    assert (drawn[0].indices < real.num_experts - real.null_experts).all()
    for record, single in zip(drawn, alone):  # the row without its padding, alone: the same experts
        assert torch.equal(record.indices[:5], single.indices)
    rows = [_rows(record) for record in (first, found["shuffled"][0])]
    assert sorted(rows[0]) == sorted(rows[1]) and rows[0] != rows[1]


def test_a_token_that_skips_the_experts_goes_on_skipping_them():
    model = reference.build("zaya")
    bias = find_routers(model)[0].bias
    bias[8] = bias[:8].max() + 0.3
    _, (before, _) = forward(model)
    with route(model, "random"):
        _, (drawn, _) = forward(model)
    assert torch.equal(drawn.indices == 8, before.indices == 8)
    assert 0 < int((before.indices == 8).sum()) < 13


def _rows(record) -> list:
    return [(*i, *w) for i, w in zip(record.indices.tolist(), record.weights.tolist())]


def _arrays(args, kwargs) -> list[np.ndarray]:
    tensors = [x for x in [*args, *kwargs.values()] if isinstance(x, torch.Tensor) and x.is_floating_point()]
    return [x.detach().double().numpy().reshape(-1, x.shape[-1]) for x in tensors if x.ndim > 1]


# ---------------------------------------------------------------------- where they act


CHANGES = {
    "fewer": lambda model: use_top_k(model, 1),
    "more": lambda model: use_top_k(model, 3),
    "replace": lambda model: drop_experts(model, {0: [1, 4], "model.layers.1.mlp": [2]}),
    "zero": lambda model: drop_experts(model, {0: [1, 4], 1: [2]}, how="zero"),
    "random": lambda model: route(model, "random", seed=1),
    "uniform": lambda model: route(model, "uniform"),
}
PROMPTS = [[5, 9, 11], [7], [8, 3, 12, 40, 41, 6], [9, 9, 9, 9]]


def written(model, prompts, batch_size=3, new=5) -> list[list[int]]:
    options = {"eos_ids": set(), "pad_id": 0, "batch_size": batch_size}
    return [c.ids for c in decode(model, prompts, Sampling(max_new_tokens=new), **options)]


@torch.no_grad()
def greedy(model, prompt: list[int], new=5) -> list[int]:
    """One row, no cache, no padding."""
    ids = list(prompt)
    for _ in range(new):
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("change", CHANGES)
def test_batched_cached_decoding_agrees_with_whole_texts(change):
    model = loud()
    with given_back(model):
        with CHANGES[change](model):
            texts = [greedy(model, prompt) for prompt in PROMPTS]
            assert written(model, PROMPTS) == texts
            made = model.generate(torch.tensor([PROMPTS[2]]), max_new_tokens=5, do_sample=False)
            assert made[0, 6:].tolist() == texts[2]
        assert texts != [greedy(model, prompt) for prompt in PROMPTS]


def test_shuffling_exchanges_whole_decisions_among_real_tokens_and_needs_company():
    model = loud()
    with route(model, "shuffled", seed=1), torch.no_grad():
        # Each step of a single row has one token, and nothing to exchange.
        one = written(model, [PROMPTS[1]])
        several = written(model, PROMPTS, batch_size=4)
        again = written(model, PROMPTS, batch_size=4)
    assert one == written(model, [PROMPTS[1]])
    assert several == again != written(model, PROMPTS, batch_size=4)
    with route(model, "shuffled", seed=2):
        other = forward(model)[1][0]
    with route(model, "shuffled", seed=1):
        record = forward(model)[1][0]
    assert _rows(record) != _rows(other)


WRAPPED = {
    "attention": {"target_modules": ["q_proj"]},
    "experts": {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"]},
    "router": {"target_modules": [], "target_parameters": ["mlp.gate.weight"]},
    "router copy": {"target_modules": ["q_proj"], "modules_to_save": ["gate"]},
}


@pytest.mark.parametrize("target", WRAPPED)
def test_peft_is_seen_through(target):
    model = reference.build("mixtral")
    with pytest.MonkeyPatch.context():
        expected = {}
        for name, change in CHANGES.items():
            with change(model):
                expected[name] = forward(model)[0]
        wrapped = get_peft_model(model, LoraConfig(r=2, **WRAPPED[target])).eval()
        with given_back(wrapped):
            for name, change in CHANGES.items():
                with change(wrapped):
                    assert torch.equal(forward(wrapped)[0], expected[name]), name


def test_recording_that_was_there_before_hears_the_change():
    model = built("mixtral")
    with torch.no_grad(), record_routing(model) as recording, drop_experts(model, {0: [1]}, how="zero"):
        model(input_ids=IDS)
    record = recording.layers["model.layers.0.mlp"]
    assert (record.weights[record.indices == 1] == 0).all() and (record.indices == 1).any()


def test_random_experts_are_uniform_and_follow_seed_layer_token_and_position():
    model = built("mixtral")
    ids = torch.arange(64).repeat(40, 1).T[:, torch.randperm(40)]  # 64 rows, each of one token id
    found = []
    for seed in (1, 1, 2):
        with route(model, "random", seed=seed):
            found.append([r.indices for r in forward(model, ids, torch.ones_like(ids))[1]])
    assert torch.equal(found[0][0], found[1][0])
    for other in (found[2][0], found[0][1], found[0][0].roll(1, 0), found[0][0].roll(40, 0)):
        same = (found[0][0].sort(-1).values == other.sort(-1).values).all(-1).double().mean()
        assert same == pytest.approx(1 / 28, abs=0.02)  # pairs of 8 experts; sd 0.004
    counts = torch.bincount(found[0][0].flatten(), minlength=8).double()
    assert (counts / counts.sum()).tolist() == pytest.approx([1 / 8] * 8, abs=0.02)  # sd 0.004


# ---------------------------------------------------------------------- group limits


def grouped(tokens_share_shape: bool = True) -> DeepseekV3ForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 8, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 8, "kv_lora_rank": 8}
    sizes |= {"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4, "vocab_size": 64}
    sizes |= {"n_routed_experts": 16, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4}
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**sizes, first_k_dense_replace=0)).eval()
    model.model.layers[0].mlp.gate.weight.data.uniform_(-1, 1)
    return model


@pytest.mark.parametrize("tokens", [4, 9])  # 4 tokens x 4 groups has the shape of 4 groups x 4 experts
def test_dropped_experts_count_nothing_in_the_worth_of_their_group(tokens):
    model = grouped()
    ids = torch.randint(0, 64, (1, tokens), generator=torch.Generator().manual_seed(1))
    gone = [0, 1, 2, 7, 9]
    with drop_experts(model, {0: gone}):
        found = forward(model, ids, None)[0]
    find_routers(model)[0].bias[gone] = -torch.inf
    assert torch.equal(found, forward(model, ids, None)[0])


def test_too_few_experts_under_a_group_limit_are_refused():
    model = grouped()
    with drop_experts(model, {0: [0, 1, 4, 5]}):  # two of four left in two groups: still four to choose
        forward(model)
    for left, gone in {3: [0, 1, 2, 4, 5], 0: [0, 1, 2, 4, 5, 6, 8, 9, 10]}.items():
        dropped = drop_experts(model, {0: gone})
        with pytest.raises(UserError, match=f"{left} experts are left in the groups"), dropped:
            pass
    with pytest.raises(UserError, match="8 experts in the 2 of 4 groups"), use_top_k(model, 9):
        pass
    with use_top_k(model, 8):
        assert forward(model)[1][0].indices.shape[1] == 8


# ---------------------------------------------------------------------- refusals


def test_dense_compiled_and_sampling_models_are_refused():
    dense = LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=32, intermediate_size=8, num_hidden_layers=1)
    )
    for change in (use_top_k(dense, 1), drop_experts(dense, {0: [0]}), route(dense, "random")):
        with pytest.raises(UserError, match="dense model has no routing"), change:
            pass
    sampling = reference.build("phimoe").train()
    with pytest.raises(UserError, match=r"model\.eval\(\)"), route(sampling, "uniform"):
        pass
    compiled = torch.compile(reference.build("mixtral"), backend="eager")
    with pytest.raises(UserError, match="compiled"), route(compiled, "uniform"):
        pass


def test_what_is_not_there_is_named():
    model = built("mixtral")
    cases = {
        "use 1 to 8": use_top_k(model, 9),
        "there are 8 experts": use_top_k(model, 0),
        "layers with experts: 0, 1": drop_experts(model, {5: [0]}),
        "it has 0 to 7": drop_experts(model, {1: [8]}),
        "1 experts are left": drop_experts(model, {1: range(7)}),
        "how='gone'": drop_experts(model, {1: [0]}, how="gone"),
        "random, uniform, shuffled": route(model, "sideways"),
    }
    with given_back(model):
        for message, change in cases.items():
            with pytest.raises(UserError, match=message), change:
                pass
    several = r"several routers; name one of model\.layers\.0\.mlp, model"
    with pytest.raises(UserError, match=several), drop_experts(built("jetmoe"), {0: [1]}):
        pass
    with pytest.raises(UserError, match="longcat"), use_top_k(built("longcat_flash"), 1):
        pass
    with pytest.raises(UserError, match="hash routing"), drop_experts(built("deepseek_v4"), {0: [1]}):
        pass


def test_an_error_inside_leaves_the_model_as_it_was():
    model = built("mixtral")
    with given_back(model):
        for change in CHANGES.values():
            with pytest.raises(IndexError), change(model):
                model(input_ids=IDS + 64)
        few = drop_experts(model, {1: range(6)})
        with pytest.raises(UserError, match="2 experts are left, a token needs 3"), few, use_top_k(model, 3):
            forward(model)
        with pytest.raises(RunError, match="call the model with input_ids"), route(model, "random"):
            model(inputs_embeds=torch.zeros(1, 2, 32))
        with pytest.raises(RunError, match="route whole forward passes"), route(model, "random"):
            model.model.layers[0].mlp(torch.zeros(1, 2, 32))


def test_a_router_without_a_top_k_is_told_at_its_first_call(monkeypatch):
    model = built("mixtral")
    gate = type(model.model.layers[0].mlp.gate)
    source = inspect.getsource(gate.forward)
    assert "torch.topk" in source

    def forward_without(self, hidden):
        logits = hidden.reshape(-1, self.hidden_dim) @ self.weight.T
        order = logits.softmax(-1).sort(-1, descending=True)
        return logits, order.values[:, :2], order.indices[:, :2]

    monkeypatch.setattr(gate, "forward", forward_without)
    with pytest.raises(RunError, match="made no top-k over 8 scores"), drop_experts(model, {0: [1]}):
        forward(model)
    with pytest.raises(RunError, match="the router chose 2"), use_top_k(model, 3):
        forward_plain = model(input_ids=IDS)
        assert forward_plain is None


@pytest.mark.parametrize(
    ("name", "number"), [("model.layers.12.mlp", 12), ("layers.0.mlp", 0), ("backbone.mixer", None)]
)
def test_layer_numbers(name, number):
    assert layer_number(name) == number


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_experts_are_drawn_as_often_as_their_scores_say(family):
    """One expert a token: the share of draws is its score over the sum. What is drawn is weighed as the family does."""
    model, seeds = built(family), 30
    if (
        family == "deepseek_v3"
    ):  # without groups, which would rule experts out; with a bias, which is no score
        model = model_of(family)
        find_routers(model)[0].bias.copy_(torch.tensor([0.3, -0.3, 0.1, 0.0]))
    ids = torch.randint(3, 64, (10, 8), generator=torch.Generator().manual_seed(3))
    everyone = torch.ones_like(ids)
    scores = forward(model, ids, everyone)[1][0].scores  # what the first router reads, no expert changes
    drawn = []
    with use_top_k(model, 1):
        for seed in range(seeds):
            with sample_experts(model, seed):
                drawn.append(forward(model, ids, everyone)[1][0].indices[:, 0])
    counts = torch.stack(drawn)  # [seeds, tokens]
    share = torch.nn.functional.one_hot(counts, scores.shape[1]).float().mean((0, 1))
    expected = (scores / scores.sum(-1, keepdim=True)).mean(0)
    deviation = (expected * (1 - expected) / counts.numel()).sqrt()
    assert ((share - expected).abs() < 4.5 * deviation + 1e-3).all()
    assert len(counts[:, 0].unique()) > 1


def test_draws_are_a_function_of_seed_and_token_and_leave_nothing_behind():
    model = loud()
    plain, _ = forward(model)
    found = []
    for seed in (0, 0, 1):
        with sample_experts(model, seed):
            found.append(forward(model))
    (first, records), (same, _), (other, _) = found
    assert torch.equal(first, same) and not torch.equal(first, other) and not torch.equal(first, plain)
    assert torch.equal(forward(model)[0], plain)
    record = records[0]
    assert all(len(set(row)) == 2 for row in record.indices.tolist())  # nobody twice
    picked = record.scores.gather(1, record.indices)
    torch.testing.assert_close(record.weights, picked / picked.sum(1, keepdim=True), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("family", "says"), [("phimoe", "cannot be drawn"), ("jetmoe", "cannot be drawn")])
def test_families_without_scores_to_draw_by_are_refused(family, says):
    with pytest.raises(UserError, match=says), sample_experts(built(family).eval()):
        pass
