"""Precisions compared on equal terms: losses and flips against slow references, the model untouched."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from distill.data.batches import TokenRows
from distill.errors import UserError
from distill.evaluation.usage import PRECISIONS, Routed, precision_sweep, routing_flips, selection_margin
from distill.models.decode import Sampling, decode
from distill.models.fp8 import fp8_emulated
from distill.models.load import load_model
from distill.moe.recording import record_routing

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12]]
COMPLETIONS = [[11, 1], [12, 13, 14, 1], [15, 16, 1]]
ROWS = TokenRows(PROMPTS, COMPLETIONS)


def sharp(model: nn.Module) -> nn.Module:
    """Wide logits and even routers, so that precisions differ where a test looks."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.02 if "gate.weight" in name else 0.3)
    return model


@pytest.fixture
def moe(hub):
    return sharp(load_model(hub["qwen3_moe"], "fp32"))


def slow_nll(model: nn.Module) -> float:
    """Row by row without padding, float64 after the logits."""
    total, count = 0.0, 0
    for prompt, completion in zip(PROMPTS, COMPLETIONS):
        ids = torch.tensor([[*prompt, *completion]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0].double()
        for t, token in enumerate(completion, start=len(prompt)):
            total -= float(logits[t - 1].log_softmax(-1)[token])
            count += 1
    return total / count


def test_losses_and_their_relative_errors(moe):
    plain = slow_nll(moe)
    with fp8_emulated(moe, "tiles"), torch.autocast("cpu", torch.bfloat16):
        emulated = slow_nll(moe)
    found = {entry["precision"]: entry for entry in precision_sweep(moe, ROWS, pad_id=0)}
    assert list(found) == list(PRECISIONS)
    assert found["fp32"]["nll_per_token"] == pytest.approx(plain, rel=1e-6)
    assert found["fp8-emulated"]["nll_per_token"] == pytest.approx(emulated, rel=2e-3)
    assert emulated != pytest.approx(plain, rel=2e-3)
    losses = {name: entry["nll_per_token"] for name, entry in found.items() if entry["ran"]}
    assert len(set(losses.values())) == 4, "every precision computes something of its own"
    for name, entry in found.items():
        for reference in ("fp32", "bf16") if entry["ran"] else ():
            signed = (losses[name] - losses[reference]) / losses[reference]
            expected = {"signed": pytest.approx(signed), "absolute": pytest.approx(abs(signed))}
            assert entry["relative_loss_error"][reference] == expected
    json.dumps(list(found.values()), allow_nan=False)


def test_what_cannot_run_says_why(moe):
    sweep = precision_sweep(moe, ROWS, 0, ("fp16", "fp8", "bf16"))
    assert [entry["precision"] for entry in sweep] == ["fp16", "fp8", "bf16"]
    assert set(sweep[0]) == {"precision", "ran", "reason"} and not sweep[0]["ran"]
    assert "no CPU path" in sweep[0]["reason"] and "fp8-emulated" in sweep[1]["reason"]
    assert sweep[2]["relative_loss_error"]["fp32"], "float32 is the reference, asked for or not"
    with pytest.raises(UserError, match="'int4' does not exist; choose among fp32, bf16"):
        precision_sweep(moe, ROWS, 0, ("int4",))
    moe.is_quantized = True
    assert not precision_sweep(moe, ROWS, 0, ("fp32",))[0]["ran"]


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_the_model_is_bitwise_the_same_afterwards(moe, stored):
    """Also one stored in bf16, whose weights are float32 inside, and one whose answers fail halfway."""
    model = moe.to(stored).train()
    model.model.layers[0].eval()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pointers = [t.data_ptr() for t in model.state_dict().values()]
    modes = [(type(m), m.training, len(m._forward_pre_hooks)) for m in model.modules()]
    seen = []

    def answers(inside):
        seen.append((next(inside.parameters()).dtype, inside.training))
        if len(seen) == 3:
            raise ValueError("stop")
        return {"easy": 0.5}

    precision_sweep(model, ROWS, 0)
    with pytest.raises(ValueError, match="stop"):
        precision_sweep(model, ROWS, 0, answers=answers)
    assert seen == [(torch.float32, False)] * 3
    assert [(type(m), m.training, len(m._forward_pre_hooks)) for m in model.modules()] == modes
    assert [t.data_ptr() for t in model.state_dict().values()] == pointers
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == state[name].dtype and torch.equal(tensor, state[name]), name


def test_weights_stored_in_bf16_are_read_as_float32(moe):
    wide = moe.bfloat16().float()
    expected = precision_sweep(wide, ROWS, 0, ("fp32", "bf16"))
    found = precision_sweep(wide.bfloat16(), ROWS, 0, ("fp32", "bf16"))
    for a, b in zip(found, expected):
        assert a["nll_per_token"] == b["nll_per_token"]


def test_answers_are_asked_for_in_the_precision(moe):
    """`answers` runs with the arithmetic in force: greedy decoding works in every one, and its scores are kept."""
    logits = []

    def answers(model):
        with torch.no_grad():
            logits.append(model(input_ids=torch.tensor([PROMPTS[0]])).logits.float())
        done = decode(model, PROMPTS, Sampling(max_new_tokens=4), eos_ids={1}, pad_id=0)
        return {"easy": sum(answer.error is None for answer in done) / 3}

    sweep = precision_sweep(moe, ROWS, 0, ("fp32", "bf16", "fp8-emulated"), answers)
    assert all(entry["tasks"] == {"easy": 1.0} for entry in sweep)
    assert not torch.equal(logits[0], logits[1]) and not torch.equal(logits[1], logits[2])


# ---------------------------------------------------------------------- routing


def slow_flips(model: nn.Module) -> dict[str, dict[str, float]]:
    """float32 against emulated float8, token by token with Python sets, margins from sorted scores."""
    batch = ROWS.collate(np.arange(3), 0)
    recorded = []
    for emulate in (False, True):
        with record_routing(model) as recording, torch.no_grad():
            inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
            if emulate:
                with fp8_emulated(model, "tiles"), torch.autocast("cpu", torch.bfloat16):
                    model(**inputs)
            else:
                model(**inputs)
        recorded.append({n: (layer.indices.tolist(), layer.scores) for n, layer in recording.layers.items()})
    layers = {}
    for name, (indices, scores) in recorded[0].items():
        other = recorded[1][name][0]
        kept = [len(set(a) & set(b)) / len(a) for a, b in zip(indices, other)]
        ranked = [sorted(row, reverse=True) for row in scores.tolist()]
        k = len(indices[0])
        margins = [row[k - 1] - row[k] for row in ranked]
        flipped = [m for m, share in zip(margins, kept) if share < 1]
        layers[name] = {
            "slots": 1 - sum(kept) / len(kept),
            "tokens": len(flipped) / len(kept),
            "margin_all": sum(margins) / len(margins),
            "margin_flipped": sum(flipped) / len(flipped) if flipped else None,
        }
    return layers


def test_flips_of_a_model(moe):
    expected = slow_flips(moe)
    assert any(layer["tokens"] > 0 for layer in expected.values()), "the test needs flips"
    fp32, emulated = precision_sweep(moe, ROWS, 0, ("fp32", "fp8-emulated"))
    assert "flips" not in fp32
    found = emulated["flips"]
    assert found["layers"].keys() == expected.keys()
    for name, layer in expected.items():
        assert found["layers"][name] == {
            k: v if v is None else pytest.approx(v, abs=1e-6) for k, v in layer.items()
        }
    assert found["slots"] == pytest.approx(np.mean([layer["slots"] for layer in expected.values()]))
    assert found["tokens"] >= max(layer["tokens"] for layer in expected.values())


def test_a_dense_model_has_no_flips(hub):
    sweep = precision_sweep(load_model(hub["llama"], "fp32"), ROWS, 0)
    assert all("flips" not in entry for entry in sweep)


def test_flips_by_hand():
    """Four tokens, two of three experts: order is no flip; two layers flip different tokens."""
    before = torch.tensor([[0, 1], [0, 1], [1, 2], [0, 2]])
    margin = torch.tensor([0.4, 0.1, 0.2, 0.3])
    first = torch.tensor([[1, 0], [0, 2], [1, 2], [0, 2]])  # token 1 changes one of its two
    second = torch.tensor([[0, 1], [0, 1], [1, 2], [1, 2]])  # token 3
    found = routing_flips(
        {"a": Routed(before, margin), "b": Routed(before, None)},
        {"a": Routed(first, None), "b": Routed(second, None)},
    )
    assert found["layers"]["a"] == pytest.approx(
        {"slots": 1 / 8, "tokens": 1 / 4, "margin_all": 0.25, "margin_flipped": 0.1}
    )
    assert found["layers"]["b"] == {
        "slots": 1 / 8,
        "tokens": 1 / 4,
        "margin_all": None,
        "margin_flipped": None,
    }
    assert found["slots"] == 1 / 8 and found["tokens"] == 2 / 4


def test_margin_is_of_the_scores_that_select():
    """With the bias; and undefined where the choice was not a top k, or was all there is."""
    scores, bias = torch.tensor([[0.5, 0.4, 0.3], [0.1, 0.6, 0.2]]), torch.tensor([0.0, 0.0, 0.25])
    chosen = torch.tensor([[2], [1]])
    assert selection_margin(scores + bias, chosen).tolist() == pytest.approx([0.05, 0.15])
    assert selection_margin(scores, chosen) is None, "expert 2 is not the top of the bare scores"
    assert selection_margin(scores[:, :2], torch.tensor([[0, 1], [1, 0]])) is None


def test_the_bias_of_a_deepseek_v3_is_in_its_margin(tmp_path):
    sizes = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "vocab_size": 64, "moe_intermediate_size": 16, "n_routed_experts": 4,
        "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": None,
        "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "pad_token_id": None,
    }  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("deepseek_v3", **sizes)).float().eval()
    sharp(model).model.layers[1].mlp.gate.e_score_correction_bias.copy_(torch.tensor([5.0, 3.0, 0.0, -2.0]))
    (entry,) = precision_sweep(model, ROWS, 0, ("bf16",))
    layer = entry["flips"]["layers"]["model.layers.1.mlp"]
    assert 2.5 < layer["margin_all"] < 3.5 and layer["tokens"] == 0


def test_a_loss_that_overflows_is_said_not_hidden(moe):
    with torch.no_grad():
        moe.lm_head.weight[3] = math.nan
    (entry,) = precision_sweep(moe, ROWS, 0, ("fp32",))
    assert entry["ran"] and entry["nll_per_token"] is None and entry["relative_loss_error"]["fp32"] is None


def test_four_bits_are_measured_beside_the_others(moe):
    """KL against the same model in fp32, by hand; bytes; experts alone flip less than everything."""
    sweep = precision_sweep(moe, ROWS, 0, ("fp32", "mxfp4-emulated", "mxfp4-emulated-experts"))
    fp32, everything, experts = sweep
    assert fp32["kl"] == pytest.approx(0, abs=1e-9) and fp32["kl_tokens"] == 9
    total, count = 0.0, 0
    for prompt, completion in zip(PROMPTS, COMPLETIONS):
        ids = torch.tensor([[*prompt, *completion]])
        with torch.no_grad():
            plain = moe(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            with fp8_emulated(moe, "mxfp4-experts"), torch.autocast("cpu", torch.bfloat16):
                other = moe(input_ids=ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        total += float((plain.exp() * (plain - other)).sum())
        count += len(completion)
    assert experts["kl"] == pytest.approx(total / count, rel=0.02)
    assert experts["kl"] < everything["kl"] and experts["float8_share"] < everything["float8_share"]
    assert everything["weight_bytes"] < experts["weight_bytes"]
