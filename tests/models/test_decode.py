"""Decoding against transformers' own single-row `generate`, a brute force of the filters, and invariances."""

import math
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DeepseekV32Config,
    DeepseekV32ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from distill.errors import UserError
from distill.models.decode import Sampling, choose, decode, row_seed, uniforms

V, PAD, EOS = 64, 0, {5, 6, 7, 8}
MLA = {
    "num_key_value_heads": 4, "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 16,
    "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
}  # fmt: skip
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
# Windows shorter than most prompts, in all layers and in every second one.
WINDOW = {"sliding_window": 6, "head_dim": 8}
# Caches that are not plain attention: recurrent states, and a sparse-attention indexer.
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"], "shared_expert_intermediate_size": 16,
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "head_dim": 8,
}  # fmt: skip
SPARSE = {"index_n_heads": 2, "index_head_dim": 8, "index_topk": 4}
FAMILIES = {
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 8}),
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "qwen3_moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig, {"head_dim": 8, **MOE}),
    "deepseek_v3": (DeepseekV3ForCausalLM, DeepseekV3Config, MLA),
    "mistral": (MistralForCausalLM, MistralConfig, WINDOW),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig, {**WINDOW, "sliding_window_pattern": 2}),
    "qwen3_next": (Qwen3NextForCausalLM, Qwen3NextConfig, {**LINEAR, **MOE}),
    "deepseek_v32": (DeepseekV32ForCausalLM, DeepseekV32Config, {**MLA, **SPARSE}),
}


def tiny(family="qwen3", **changes):
    model_class, config_class, extra = FAMILIES[family]
    base = {
        "vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "pad_token_id": PAD, "bos_token_id": None, "eos_token_id": None, "tie_word_embeddings": False,
        # Wide weights: a random model with the default 0.02 repeats one token and tests nothing.
        "initializer_range": 0.3,
    }  # fmt: skip
    torch.manual_seed(0)
    return model_class(config_class(**{**base, **extra, **changes})).eval()


@pytest.fixture(params=["drop", "refill"])
def exchange(request, monkeypatch):
    """Both fates of a finished row's slot: dropped (on a CPU), taken by a waiting prompt (on CUDA)."""
    monkeypatch.setattr("distill.models.decode._REFILL", {"cpu": request.param == "refill"})
    return request.param


def ragged(count=11, longest=20, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(9, V, rng.integers(1, longest + 1)).tolist() for _ in range(count)]


@cache
def alone(family, prompts, new_tokens):
    """What `generate` answers to each of `prompts`, a tuple of tuples; every fate of a slot is held against it."""
    model = tiny(family)
    found = {prompt: generate_alone(model, prompt, new_tokens) for prompt in dict.fromkeys(prompts)}
    return [found[prompt] for prompt in prompts]


def generate_alone(model, prompt, new_tokens):
    ids = torch.tensor([prompt])
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new_tokens,
        eos_token_id=sorted(EOS), pad_token_id=PAD,
    )  # fmt: skip
    return out[0, len(prompt) :].tolist()


def count_down(model):
    """Make the model answer t with t - 1, and 10 with an end: a prompt ending in 9 + n yields n tokens."""

    def replace(module, args, kwargs, output):
        newest = kwargs["input_ids"][:, -1:]
        output.logits[:, -1].scatter_(1, torch.where(newest > 10, newest - 1, 5), 1e4)

    model.register_forward_hook(replace, with_kwargs=True)
    return model


# ----------------------------------------------------------------------------------------- the model's side


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_generate_row_by_row(family, exchange):
    model, prompts = tiny(family), ragged()
    expected = alone(family, tuple(map(tuple, prompts)), 20)
    assert any(row[-1] in EOS for row in expected) and len({len(row) for row in expected}) > 2
    for batch_size in (1, 4, 16):
        rows = decode(
            model, prompts, Sampling(max_new_tokens=20), eos_ids=EOS, pad_id=PAD, batch_size=batch_size
        )
        assert [row.ids for row in rows] == expected
        assert all(row.error is None for row in rows)
        assert all(row.finish_reason == ("stop" if row.ids[-1] in EOS else "length") for row in rows)


def test_peft_model_equals_its_own_generate():
    model = get_peft_model(
        tiny(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    model.eval()
    prompts = ragged(6)
    expected = [generate_alone(model, prompt, 12) for prompt in prompts]
    rows = decode(model, prompts, Sampling(max_new_tokens=12), eos_ids=EOS, pad_id=PAD, batch_size=4)
    assert [row.ids for row in rows] == expected
    with model.disable_adapter():
        base = decode(model, prompts, Sampling(max_new_tokens=12), eos_ids=EOS, pad_id=PAD, batch_size=4)
    assert [row.ids for row in base] != expected


@pytest.mark.parametrize("family", ["qwen3", "deepseek_v3", "mistral"])
def test_logprobs_are_those_of_a_full_forward_at_temperature_one(family, exchange):
    # 90 tokens cross the growth of the cache buffer; lengths differ, so rows leave and join on the way.
    model, prompts = tiny(family), ragged(7)
    sampling = Sampling(temperature=0.6, top_p=0.9, top_k=30, max_new_tokens=90)
    keys = [(3, row) for row in range(len(prompts))]
    rows = decode(model, prompts, sampling, eos_ids={5}, pad_id=PAD, keys=keys, batch_size=3)
    assert max(len(row.ids) for row in rows) > 70 and len({len(row.ids) for row in rows}) > 2
    for prompt, row in zip(prompts, rows):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + row.ids])).logits[0, len(prompt) - 1 : -1]
        expected = logits.double().log_softmax(-1).gather(1, torch.tensor(row.ids)[:, None])[:, 0]
        assert len(row.logprobs) == len(row.ids)
        np.testing.assert_allclose(row.logprobs, expected.numpy(), atol=2e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_prompts_share_is_read_once_and_changes_nothing(family, exchange):
    """A common beginning longer than the windows, ragged ends, and some prompts asked several times."""
    model, rng = tiny(family), np.random.default_rng(3)
    beginning = rng.integers(9, V, 24).tolist()
    prompts = [beginning + rng.integers(9, V, n).tolist() for n in (1, 9, 4, 2, 9, 7, 12)]
    prompts = [prompt for i, prompt in enumerate(prompts) for _ in range(1 + i % 3)]
    fed = []
    model.register_forward_pre_hook(
        lambda _m, _a, named: fed.append(named["input_ids"].numel()), with_kwargs=True
    )
    expected = alone(family, tuple(map(tuple, prompts)), 12)
    rows = decode(model, prompts, Sampling(max_new_tokens=12), eos_ids=EOS, pad_id=PAD, batch_size=16)
    assert [row.ids for row in rows] == expected
    plain = family not in ("qwen3_next", "deepseek_v32")  # those keep a cache that cannot be cut
    assert not plain or fed[:2] == [24, 7 * 12]  # the beginning, and seven ends as long as the longest


def test_samples_of_a_prompt_are_drawn_as_from_a_prefill_of_their_own(monkeypatch):
    model, rng = tiny(initializer_range=0.15), np.random.default_rng(4)
    beginning = rng.integers(9, V, 30).tolist()
    prompts = [beginning + rng.integers(9, V, 1 + n % 5).tolist() for n in range(6)]
    asked, keys = [p for p in prompts for _ in range(4)], [(0, i, s) for i in range(6) for s in range(4)]
    sampling = Sampling(temperature=1.0, top_p=0.9, max_new_tokens=15)
    common = {"eos_ids": EOS, "pad_id": PAD, "keys": keys, "batch_size": 10}
    together = decode(model, asked, sampling, **common)
    assert len({tuple(row.ids) for row in together[:4]}) > 1
    monkeypatch.setattr("distill.models.decode._SHARED", 10**9)
    apart = [decode(model, [p], sampling, **{**common, "keys": [k]})[0] for p, k in zip(asked, keys)]
    assert [row.ids for row in together] == [row.ids for row in apart]
    for a, b in zip(together, apart):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)


def test_bfloat16_model_keeps_its_dtype_and_gives_float_logprobs():
    model = tiny().to(torch.bfloat16)
    rows = decode(model, ragged(5), Sampling(max_new_tokens=6), eos_ids=set(), pad_id=PAD, batch_size=5)
    assert all(len(row.ids) == 6 and all(p <= 0 for p in row.logprobs) for row in rows)
    assert model.dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------- random numbers


def brute_force(logits, sampling):
    """Token probabilities in float64, one token at a time: temperature, top-k, top-p, min-p."""
    scaled = [float(x) / sampling.temperature for x in logits]
    order = sorted(range(len(scaled)), key=lambda i: -scaled[i])
    if sampling.top_k:
        order = order[: sampling.top_k]
    weight = {i: math.exp(scaled[i] - scaled[order[0]]) for i in order}
    kept, mass = [], 0.0
    for i in order:
        if mass >= sampling.top_p * sum(weight.values()):
            break
        kept.append(i)
        mass += weight[i]
    kept = [i for i in kept if weight[i] >= sampling.min_p]
    total = sum(weight[i] for i in kept)
    return np.array([weight[i] / total if i in kept else 0.0 for i in range(len(scaled))])


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.3, 1.0, 1.7]),
    st.sampled_from([0, 1, 3, 8, 40, 100]),
    st.sampled_from([0.05, 0.5, 0.9, 0.999, 1.0]),
    st.sampled_from([0.0, 0.05, 0.5]),
)
def test_choice_follows_the_filtered_distribution(seed, temperature, top_k, top_p, min_p):
    sampling = Sampling(temperature, top_p, top_k, min_p)
    logits = (np.random.default_rng(seed).normal(size=40) * 2).astype(np.float32)
    n = 4000
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n  # evenly spread, so counts are exact to one or two
    tokens = choose(torch.from_numpy(logits).expand(n, -1).contiguous(), sampling, u)
    counts = np.bincount(tokens.numpy(), minlength=40)
    expected = brute_force(logits, sampling) * n
    assert (counts[expected == 0] == 0).all()
    np.testing.assert_allclose(counts, expected, atol=1.5)


@pytest.mark.parametrize(
    "filters",
    [
        {"top_p": 0.9},
        {"top_k": 40},
        {"top_k": 40, "top_p": 0.8},
        {"min_p": 0.02},
        {"top_p": 0.999, "min_p": 0.001},
        {},
    ],
)
@pytest.mark.parametrize("temperature", [0.3, 1.0])
def test_leaving_out_what_no_filter_keeps_changes_no_draw(filters, temperature, monkeypatch):
    """A large vocabulary is cut to its candidates before it is sorted; the draws are those of the whole of it."""
    rng = np.random.default_rng(5)
    scores = torch.from_numpy((rng.normal(size=(48, 6000)) * 4).astype(np.float32))
    scores[:, 100:160] = scores[:, 99:100]  # ties
    scores[::3, ::2] = -math.inf  # forbidden tokens
    scores[1] = torch.linspace(-200, 0, 6000)  # exp underflows
    scores[2] = 0.0  # all the same
    u = torch.from_numpy(rng.random((40, 48)))
    u[0], u[1] = 0.0, 1 - 2.0**-53
    sampling = Sampling(temperature, **filters)
    found = [choose(scores, sampling, row) for row in u]
    monkeypatch.setattr("distill.models.decode._WIDE", 10**9)
    slow = [choose(scores, sampling, row) for row in u]
    assert torch.equal(torch.stack(found), torch.stack(slow))
    assert scores.gather(1, torch.stack(found).T).isfinite().all()


def test_choice_at_the_ends_of_the_unit_interval_is_never_a_filtered_token():
    scores = torch.tensor([[-1.0, 3.0, 2.0, -1.0, -50.0]]).expand(3, -1)
    u = torch.tensor([0.0, 1 - 2.0**-53, 0.5], dtype=torch.float64)
    assert choose(scores, Sampling(temperature=1.0, top_k=2), u).tolist() == [1, 2, 1]


def test_tokens_tied_with_the_last_kept_one_are_kept():
    scores = torch.tensor([[2.0, 1.0, 1.0, 0.0]]).expand(200, -1)
    u = torch.arange(200, dtype=torch.float64) / 200
    assert set(choose(scores, Sampling(temperature=1.0, top_k=2), u).tolist()) == {0, 1, 2}


def test_uniforms_are_splitmix64():
    # First outputs for seed 1234567, as published with the reference implementation.
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    drawn = uniforms(torch.full((4,), 1234567), torch.arange(4))
    assert drawn.tolist() == [(x >> 12) * 2.0**-52 for x in published]


def test_uniforms_of_neighbouring_keys_and_steps_are_uniform_and_unrelated():
    seeds = torch.tensor([row_seed((0, row, 0)) for row in range(300)])
    u = torch.stack(
        [uniforms(seeds, torch.full_like(seeds, step)) for step in range(200)]
    ).numpy()  # [steps, keys]
    counts = np.histogram(u, bins=50, range=(0, 1))[0]
    chi_square = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    assert 15 < chi_square < 100  # 49 degrees of freedom
    noise = 1 / math.sqrt(u[1:].size)
    assert abs(np.corrcoef(u[1:].ravel(), u[:-1].ravel())[0, 1]) < 4 * noise
    assert abs(np.corrcoef(u[:, 1:].ravel(), u[:, :-1].ravel())[0, 1]) < 4 * noise


def test_row_seed_is_stable_and_separates_keys():
    assert row_seed((0, "train-1", 2)) == 5971079024847224300
    assert len({row_seed(key) for key in [(0, 1, 2), (0, 12), (0, "12"), ("0", 12), (1, 0, 2)]}) == 5


def test_sampled_first_tokens_follow_the_model():
    model, prompt, n = tiny(initializer_range=0.15), [9, 20, 33], 3000
    sampling = Sampling(temperature=0.8, top_p=0.95, max_new_tokens=1)
    rows = decode(
        model,
        [prompt] * n,
        sampling,
        eos_ids=EOS,
        pad_id=PAD,
        keys=[(1, 0, i) for i in range(n)],
        batch_size=1000,
    )
    counts = np.bincount([row.ids[0] for row in rows], minlength=V)
    with torch.no_grad():
        expected = brute_force(model(input_ids=torch.tensor([prompt])).logits[0, -1].numpy(), sampling) * n
    assert (counts[expected == 0] == 0).all()
    likely = expected > 5
    chi_square = ((counts - expected)[likely] ** 2 / expected[likely]).sum()
    freedom = likely.sum() - 1
    assert freedom > 8 and chi_square < freedom + 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("family", ["qwen3", "deepseek_v3", "qwen3_next"])
def test_a_row_depends_on_its_key_and_not_on_the_batch(family, exchange):
    model, prompts = tiny(family), ragged(12)
    sampling = Sampling(temperature=1.0, top_p=0.95, max_new_tokens=16)
    keys = [(7, f"p{row}", row % 3) for row in range(12)]

    def run(order, batch_size, keys=keys):
        rows = decode(
            model, [prompts[i] for i in order], sampling, eos_ids=EOS, pad_id=PAD,
            keys=[keys[i] for i in order], batch_size=batch_size,
        )  # fmt: skip
        return {i: row.ids for i, row in zip(order, rows)}

    expected = run(range(12), 12)
    assert run(range(12), 1) == expected
    assert run(range(11, -1, -1), 5) == expected
    assert run([3, 8, 1], 2) == {i: expected[i] for i in (3, 8, 1)}
    assert run(range(12), 12, [(8, *key[1:]) for key in keys]) != expected


# ----------------------------------------------------------------------------------- rows ending or failing


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_non_finite_logits_end_their_row_only(poison, exchange):
    model, prompts = tiny(), [[9 + n] for n in (4, 20, 7, 30, 2)]
    count_down(model)

    def spoil(module, args, kwargs, output):
        output.logits[(kwargs["input_ids"][:, -1] == 9 + 25), -1, 3] = poison

    model.register_forward_hook(spoil, with_kwargs=True)
    for batch_size in (2, 5):
        rows = decode(
            model,
            [*prompts, [9 + 25]],
            Sampling(max_new_tokens=40),
            eos_ids={5},
            pad_id=PAD,
            batch_size=batch_size,
        )
        assert [len(row.ids) for row in rows] == [4, 20, 7, 5, 2, 0]
        assert [row.finish_reason for row in rows] == ["stop", "stop", "stop", "error", "stop", "error"]
        assert [row.error for row in rows] == [None] * 3 + ["non-finite logits", None, "non-finite logits"]
        assert len(rows[3].logprobs) == 5


def test_prompts_that_cannot_be_decoded_are_errors_on_their_rows():
    model = tiny(max_position_embeddings=32)
    prompts = [[9] * 22, [], [9] * 23, [9]]
    rows = decode(model, prompts, Sampling(max_new_tokens=10), eos_ids=set(), pad_id=PAD, batch_size=4)
    assert [len(row.ids) for row in rows] == [10, 0, 0, 10]
    assert "empty" in rows[1].error and rows[1].finish_reason == "error"
    for part in ("23 tokens", "max_new_tokens 10", "32"):
        assert part in rows[2].error


def test_nothing_to_decode():
    assert decode(tiny(), [], Sampling(), eos_ids=EOS, pad_id=PAD, batch_size=4) == []


def test_ids_beyond_the_vocabulary_limit_are_never_produced():
    model = tiny()
    with torch.no_grad():
        model.lm_head.weight[50:] *= 20
    keys = [(0, row) for row in range(8)]
    for sampling in (Sampling(max_new_tokens=12), Sampling(temperature=2.0, max_new_tokens=12)):
        run = {"eos_ids": set(), "pad_id": PAD, "keys": keys, "batch_size": 8}
        free = decode(model, ragged(8), sampling, **run)
        held = decode(model, ragged(8), sampling, vocab_limit=50, **run)
        assert max(max(row.ids) for row in free) >= 50 > max(max(row.ids) for row in held)


def test_any_end_token_stops_and_no_end_token_runs_to_the_length():
    model = count_down(tiny())
    prompts = [[9 + n] for n in (3, 9, 5)]
    ends = decode(model, prompts, Sampling(max_new_tokens=8), eos_ids={5, 12}, pad_id=PAD, batch_size=3)
    assert [row.ids for row in ends] == [[11, 10, 5], [17, 16, 15, 14, 13, 12], [13, 12]]
    assert [row.finish_reason for row in ends] == ["stop"] * 3
    free = decode(model, prompts, Sampling(max_new_tokens=8), eos_ids=set(), pad_id=PAD, batch_size=3)
    assert [(len(row.ids), row.finish_reason) for row in free] == [(8, "length")] * 3


# ----------------------------------------------------------------------------------------------- the engine


def test_few_slots_are_spent_on_finished_rows(exchange):
    model = count_down(tiny())
    lengths = np.random.default_rng(0).integers(2, 54, 64).tolist()
    fed = steps = 0

    def tally(module, args, kwargs):
        nonlocal fed, steps
        fed, steps = fed + len(kwargs["input_ids"]), steps + 1

    model.register_forward_pre_hook(tally, with_kwargs=True)
    for batch_size in (8, 64):
        fed = steps = 0
        prompts = [
            [9 + i // 8, 9 + i % 8, 9 + n] for i, n in enumerate(lengths)
        ]  # no two alike: each is read
        run = {"eos_ids": {5}, "pad_id": PAD, "batch_size": batch_size}
        rows = decode(model, prompts, Sampling(max_new_tokens=60), **run)
        assert [len(row.ids) for row in rows] == lengths
        # Batches of 8 that wait for their slowest row would feed 1.7 times the useful tokens.
        assert sum(lengths) <= fed <= 1.25 * sum(lengths)
        if exchange == "refill" and batch_size == 8:
            assert steps < 1.3 * sum(lengths) / batch_size


def test_on_finish_reports_every_row_once_and_outside_inference_mode():
    seen = {}

    def on_finish(row, completion):
        assert row not in seen and not torch.is_inference_mode_enabled()
        seen[row] = completion

    prompts = [*ragged(9), []]
    rows = decode(
        tiny(),
        prompts,
        Sampling(max_new_tokens=12),
        eos_ids=EOS,
        pad_id=PAD,
        batch_size=4,
        on_finish=on_finish,
    )
    assert [seen[row] for row in range(10)] == rows


@pytest.mark.parametrize("failing", [False, True])
def test_the_mode_of_every_module_is_restored(failing):
    model = tiny()
    model.train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]

    def on_finish(row, completion):
        assert not model.training
        if failing:
            raise KeyboardInterrupt

    run = {"eos_ids": EOS, "pad_id": PAD, "batch_size": 2, "on_finish": on_finish}
    if failing:
        with pytest.raises(KeyboardInterrupt):
            decode(model, ragged(3), Sampling(max_new_tokens=4), **run)
    else:
        decode(model, ragged(3), Sampling(max_new_tokens=4), **run)
    assert [module.training for module in model.modules()] == before


def test_wrong_arguments_are_all_named():
    model = tiny()
    with pytest.raises(UserError, match=r"(?s)needs keys.*batch_size=0"):
        decode(model, [[9]], Sampling(temperature=1.0), eos_ids=EOS, pad_id=PAD, batch_size=0)
    with pytest.raises(UserError, match="1 keys for 2 prompts"):
        decode(model, [[9], [9]], Sampling(), eos_ids=EOS, pad_id=PAD, keys=[(1,)], batch_size=2)
    with pytest.raises(UserError, match=r"(?s)temperature=-1.*top_p=0.*top_k=-1.*min_p=1.*max_new_tokens=0"):
        Sampling(temperature=-1, top_p=0, top_k=-1, min_p=1, max_new_tokens=0)
    mamba = MambaForCausalLM(MambaConfig(vocab_size=V, hidden_size=16, num_hidden_layers=1, state_size=4))
    gpt = OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=V, n_embd=16, n_layer=1, n_head=2))
    for model in (mamba, gpt):  # one has a cache of another kind, one has none
        with pytest.raises(UserError, match=f"{type(model).__name__} keeps no keys and values"):
            decode(model, [[9]], Sampling(), eos_ids=EOS, pad_id=PAD, batch_size=1)


def test_stop_strings_end_a_row_at_the_token_that_completes_them(tmp_path):
    """Every row equals the unstopped one up to, and including, the first token that completes the string."""
    from conftest import byte_tokenizer, save_model
    from transformers import StopStringCriteria

    from distill.models.load import load_model, load_tokenizer

    save_model(tmp_path, {"model_type": "llama"}, byte_tokenizer(None))
    model, tokenizer = load_model(str(tmp_path), "fp32"), load_tokenizer(str(tmp_path))
    prompts = [[10 + i, 40, 50 + i][: 1 + i % 3] for i in range(12)]
    common = {"eos_ids": {1}, "pad_id": 0, "keys": [(0, i) for i in range(12)], "batch_size": 5}
    free = decode(model, prompts, Sampling(temperature=1.5, max_new_tokens=60), **common)
    stops = ["e", "q9"]
    cut = decode(
        model, prompts, Sampling(temperature=1.5, max_new_tokens=60), **common,
        stopping=StopStringCriteria(tokenizer, stops),
    )  # fmt: skip
    stopped = 0
    for whole, short in zip(free, cut):
        text = lambda ids: tokenizer.decode(ids)  # noqa: E731
        ends = [n for n in range(1, len(whole.ids) + 1) if any(s in text(whole.ids[:n]) for s in stops)]
        expected = whole.ids[: ends[0]] if ends else whole.ids
        assert short.ids == expected
        assert short.finish_reason == ("stop" if ends else whole.finish_reason)
        stopped += bool(ends)
    assert stopped >= 2, "the case occurs"


def test_finished_rows_are_padding_to_routing_statistics():
    """Rows that end early wait in the batch; what they are fed meanwhile must not be counted as load."""
    from decoding import _FIRST, count_down
    from transformers import AutoConfig, AutoModelForCausalLM

    from distill.moe.recording import record_routing

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen3_moe", hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        intermediate_size=32, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, vocab_size=391,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    model.register_forward_hook(count_down, with_kwargs=True)
    lengths = [1, 2, 3, 9, 9, 9, 9, 9, 14, 20]
    prompts = [[5 + i] * (1 + i % 4) + [_FIRST + n - 1] for i, n in enumerate(lengths)]  # no two alike
    with record_routing(model, keep="counts") as recording:
        found = decode(model, prompts, Sampling(max_new_tokens=30), eos_ids={1}, pad_id=0, batch_size=10)
    assert [len(c.ids) for c in found] == lengths
    fed = sum(len(p) + n - 1 for p, n in zip(prompts, lengths))
    assert {layer["tokens"] for layer in recording.summary()["layers"].values()} == {fed}
