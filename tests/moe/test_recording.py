"""`distill.moe.recording`: which tokens count, which wrappers it sees through, what it sums up and what it refuses.

That the decisions themselves are right, in every family, is tested in test_routing_families.py.
"""

import json
import math

import numpy as np
import pytest
import routing_reference as reference
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DogeConfig,
    Gemma4TextConfig,
    LlamaConfig,
    MixtralConfig,
)

from distill.errors import RunError, UserError
from distill.models.routers import find_routers
from distill.moe import metrics
from distill.moe import recording as routing
from distill.moe.recording import record_routing

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 4, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
SIZES |= {"num_hidden_layers": 1}
MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
DEEPSEEK = DeepseekV3Config(
    **SIZES | MLA | {"num_hidden_layers": 3}, first_k_dense_replace=1, moe_intermediate_size=16,
    n_routed_experts=8, num_experts_per_tok=2, n_group=2, topk_group=1,
)  # fmt: skip
LAYERS = ["model.layers.1.mlp", "model.layers.2.mlp"]


def make(config, **kwargs):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, **kwargs).eval()
    for router in find_routers(model):  # as trained: distinct opinions, and a bias that matters
        router.router.weight.data.normal_(0, 0.3)
        if router.bias is not None:
            router.bias.uniform_(-0.3, 0.3)
    return model


@pytest.fixture
def model():
    return make(DEEPSEEK)


@pytest.fixture
def ids():
    return torch.randint(3, 64, (3, 9), generator=torch.Generator().manual_seed(1))


def dense(record) -> torch.Tensor:
    """[T, E] of applied weights: free of the order in which experts are listed."""
    return torch.zeros(record.tokens, record.router.num_experts).scatter_add_(
        1, record.indices, record.weights
    )


def same_decisions(a, b, atol=1e-5):
    assert a.layers.keys() == b.layers.keys()
    for name in a.layers:
        torch.testing.assert_close(dense(a.layers[name]), dense(b.layers[name]), atol=atol, rtol=1e-4)


def hooks_of(model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# ---------------------------------------------------------------------- what counts as a token


def test_padding_is_dropped_and_real_tokens_route_as_without_it(model, ids):
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    mask[2, :1] = 0
    with torch.no_grad(), record_routing(model) as padded:
        model(input_ids=ids, attention_mask=mask)
    with torch.no_grad(), record_routing(model) as alone:
        for row, keep in zip(ids, mask.bool()):
            model(input_ids=row[keep][None])
    assert padded.layers[LAYERS[0]].tokens == int(mask.sum()) == 22
    same_decisions(padded, alone)


def test_generate_records_each_fed_token_once_and_no_finished_row(model, ids):
    """Prompt and new tokens but the last, as a full forward pass over the same text routes them."""
    pad, eos, new = 0, 7, 6
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    ids = ids.masked_fill(mask == 0, pad)

    def finish_row_0(_ids, scores):  # row 0 ends with its second new token, the others never
        ending = torch.zeros_like(scores, dtype=torch.bool)
        ending[0] = _ids.shape[1] == ids.shape[1] + 1
        only_eos = torch.arange(scores.shape[1]) == eos
        return scores.masked_fill(only_eos ^ ending, -math.inf).masked_fill(
            torch.arange(64) == pad, -math.inf
        )

    with torch.no_grad(), record_routing(model, pad_token_id=pad) as recording:
        text = model.generate(
            ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=pad, eos_token_id=eos,
            logits_processor=[finish_row_0],
        )  # fmt: skip
    assert text.shape == (3, 9 + new) and text[0, 10] == eos and (text[0, 11:] == pad).all()
    fed = text[:, :-1]
    with torch.no_grad(), record_routing(model) as alone:
        for row in fed:
            model(input_ids=row[row != pad][None])
    record, other = recording.layers[LAYERS[1]], alone.layers[LAYERS[1]]
    assert record.tokens == other.tokens == (9 + 2) + (6 + new - 1) + (9 + new - 1)
    torch.testing.assert_close(
        dense(record).sort(0).values, dense(other).sort(0).values, atol=1e-5, rtol=1e-4
    )


def test_static_cache_needs_the_pad_token_and_then_agrees(model, ids):
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad(), record_routing(model) as dynamic:
        model.generate(ids, **options)
    options |= {"cache_implementation": "static", "disable_compile": True}
    with torch.no_grad(), record_routing(model, pad_token_id=0) as static:
        model.generate(ids, **options)
    same_decisions(dynamic, static)
    with pytest.raises(RunError, match="pass pad_token_id"), torch.no_grad(), record_routing(model):
        model.generate(ids, **options)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_counts_once(model, ids, reentrant):
    with torch.no_grad(), record_routing(model) as plain:
        model(input_ids=ids)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with record_routing(model) as recording:
        model(input_ids=ids, labels=ids).loss.backward()
    assert model.model.layers[1].mlp.gate.weight.grad is not None
    assert [record.calls for record in recording.layers.values()] == [1, 1]
    assert not recording.layers[LAYERS[0]].weights.requires_grad
    same_decisions(plain, recording)


# ---------------------------------------------------------------------- how the model is wrapped


LORA = {
    "attention": {"target_modules": ["q_b_proj", "o_proj"]},
    "experts": {
        "target_modules": [],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    },
    "router": {"target_modules": [], "target_parameters": ["mlp.gate.weight"]},
    "router copy": {"target_modules": ["q_b_proj"], "modules_to_save": ["gate"]},
}


@pytest.mark.parametrize("target", LORA)
def test_peft_changes_no_name_and_no_decision_until_trained(model, ids, target):
    with torch.no_grad(), record_routing(model) as plain:
        model(input_ids=ids)
    wrapped = get_peft_model(model, LoraConfig(r=2, **LORA[target]))
    assert [router.name for router in find_routers(wrapped)] == LAYERS
    assert all(router.bias is not None and router.num_experts == 8 for router in find_routers(wrapped))
    with torch.no_grad(), record_routing(wrapped) as recording:
        wrapped(input_ids=ids)
    same_decisions(plain, recording)


def test_trained_router_copy_is_the_one_that_is_read(model, ids):
    wrapped = get_peft_model(model, LoraConfig(r=2, **LORA["router copy"]))
    find_routers(wrapped)[0].bias.copy_(torch.tensor([9.0, 9, 0, 0, 0, 0, 0, 0]))
    with torch.no_grad(), record_routing(wrapped) as recording:
        wrapped(input_ids=ids)
    assert recording.layers[LAYERS[0]].counts.tolist() == [27, 27, 0, 0, 0, 0, 0, 0]


def test_data_parallel_and_headless_models(model, ids):
    with torch.no_grad(), record_routing(torch.nn.DataParallel(model)) as wrapped:
        model(input_ids=ids)
    with torch.no_grad(), record_routing(model) as headless:
        model.model(ids)
    with torch.no_grad(), record_routing(model.model) as backbone:
        model(input_ids=ids)
    same_decisions(wrapped, headless)
    assert list(backbone.layers) == ["layers.1.mlp", "layers.2.mlp"]
    assert torch.equal(backbone.layers["layers.1.mlp"].counts, wrapped.layers[LAYERS[0]].counts)


class WithoutAttention(torch.nn.Module):
    """Embeddings, the experts of one layer, and the head: a causal LM with nothing else to trace."""

    class Backbone(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.embed, self.mlp = model.embed_tokens, model.layers[0].mlp

        def forward(self, input_ids):
            return self.mlp(self.embed(input_ids))

    def __init__(self, whole):
        super().__init__()
        self.model, self.head = self.Backbone(whole.model), whole.lm_head

    def forward(self, input_ids, use_cache=False):
        return self.head(self.model(input_ids=input_ids))


@pytest.mark.parametrize("how", ["wrapper", "in place", "forward alone", "one layer"])
def test_hooks_reach_a_model_compiled_and_warmed_up_before(ids, how):
    """Without a reset, compiled code goes on without the new hooks, and nothing is recorded, in silence.

    Tracing attention takes seconds and says nothing here: one of the four ways has it.
    """
    model = make(MixtralConfig(**SIZES))
    if how != "one layer":
        model = WithoutAttention(model)
    with torch.no_grad(), record_routing(model) as plain:
        model(input_ids=ids, use_cache=False)
    compiled = torch.compile(model, backend="eager") if how == "wrapper" else model
    if how == "in place":
        model.compile(backend="eager")
    elif how == "forward alone":
        model.forward = torch.compile(model.forward, backend="eager")
    elif how == "one layer":
        model.model.layers[0].compile(backend="eager")
    with torch.no_grad():
        compiled(input_ids=ids, use_cache=False)
        with record_routing(compiled) as recording:
            for _ in range(2):
                compiled(input_ids=ids, use_cache=False)
        compiled(input_ids=ids, use_cache=False)
    (before,), (record,) = plain.layers.values(), recording.layers.values()
    assert record.calls == 2
    assert torch.equal(record.counts, 2 * before.counts)


# ---------------------------------------------------------------------- the recording itself


def test_counts_mode_equals_decisions_mode_in_one_flush_or_many(model, ids, monkeypatch):
    results = []
    for keep, held in (("decisions", 20), ("counts", 20), ("counts", 4096)):
        monkeypatch.setattr(routing, "_FLUSH", held)
        with torch.no_grad(), record_routing(model, keep=keep) as recording:
            for step in range(5):
                model(input_ids=ids[:, : 4 + step])
                assert all(record._held < held for record in recording.layers.values())
        results.append(recording)
    decisions, counts, at_once = (result.summary()["layers"][LAYERS[1]] for result in results)
    assert decisions == counts
    for number in ("tokens", "max_violation", "router_entropy", "confidence"):
        assert counts[number] == pytest.approx(at_once[number], rel=1e-9)
    assert results[0].layers[LAYERS[0]].indices.shape == (3 * (4 + 5 + 6 + 7 + 8), 2)
    with pytest.raises(UserError, match="decisions"):
        _ = results[1].layers[LAYERS[0]].indices


def test_summary_is_json_and_follows_from_the_decisions(model, ids):
    with torch.no_grad(), record_routing(model) as recording:
        model(input_ids=ids)
        partial = recording.layers[LAYERS[0]].tokens  # readable inside the context too
    summary = json.loads(json.dumps(recording.summary()))
    assert partial == 27 and list(summary["layers"]) == LAYERS
    record, got = recording.layers[LAYERS[0]], summary["layers"][LAYERS[0]]
    share = record.scores.double() / record.scores.double().sum(-1, keepdim=True)
    expected = {
        "tokens": 27,
        "experts": 8,
        "experts_per_token": 2,
        "router_entropy": float(-(share * share.log()).sum(-1).mean()),
        "confidence": float(share.gather(1, record.indices).sum(-1).mean()),
        "max_violation": float(record.counts.max()) / (54 / 8) - 1,
        "max_violation_noise_floor": metrics.max_violation_noise_floor(27, 8, 2),
        "dead_experts": int((record.counts == 0).sum()),
    }
    assert {key: got[key] for key in expected} == pytest.approx(expected, rel=1e-6)
    assert got["load"] == pytest.approx(np.bincount(record.indices.flatten(), minlength=8) / 54)
    assert {"load_entropy", "load_entropy_normalised", "effective_experts", "load_cv"} <= set(got)


# ---------------------------------------------------------------------- refusals


GEMMA = {"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8, "head_dim": 8}
DENSE = [LlamaConfig(**SIZES), DogeConfig(**SIZES), Gemma4TextConfig(**SIZES, **GEMMA)]


@pytest.mark.parametrize("config", DENSE, ids=lambda config: config.model_type)
def test_dense_model_has_no_routers_and_cannot_be_recorded(config):
    model = make(config)
    assert find_routers(model) == []
    with pytest.raises(UserError, match="dense model was asked for its routing"), record_routing(model):
        pass


def test_unknown_moe_structure_is_refused_not_called_dense(model):
    for layer in model.model.layers[1:]:
        layer.mlp.my_gate = layer.mlp.gate
        del layer.mlp.gate
    with pytest.raises(UserError, match="looks like a mixture of experts"):
        find_routers(model)


def test_expert_lists_and_bad_arguments_are_refused(model):
    with pytest.raises(UserError, match="keep is"), record_routing(model, keep="everything"):
        pass
    model.model.layers[1].mlp.experts = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    with pytest.raises(UserError, match="ModuleList"):
        find_routers(model)


def test_sampling_router_is_refused_in_train_mode():
    model = reference.build("phimoe").train()
    with pytest.raises(UserError, match=r"model\.eval\(\)"), record_routing(model):
        pass


def test_hooks_go_after_an_exception_and_a_silent_router_is_an_error(model, ids):
    before = hooks_of(model)
    with pytest.raises(ZeroDivisionError), record_routing(model):
        assert hooks_of(model) == before + 2 + 2 * 2
        raise ZeroDivisionError
    assert hooks_of(model) == before
    with record_routing(model) as recording:
        with pytest.raises(IndexError):
            model(
                input_ids=ids + 64
            )  # ends at the embedding; a block called after that is in no forward pass
        model.model.layers[1].mlp(torch.zeros(1, 1, 32))
        assert recording.layers[LAYERS[0]].calls == 0
        model(input_ids=ids)
    with record_routing(model) as nothing:
        pass
    with pytest.raises(RunError, match="no token was recorded"):
        nothing.summary()
    model.model.layers[2].mlp.forward = lambda x: x  # a block that someone has patched
    silent = r"no routing was seen at model\.layers\.2\.mlp"
    with pytest.raises(RunError, match=silent), torch.no_grad(), record_routing(model):
        model(input_ids=ids)
    assert hooks_of(model) == before
