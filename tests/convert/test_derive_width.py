"""Narrower models: what computes nothing can go without a trace, and what is largest stays."""

import pytest
import torch
from tiny_families import model_of, random_ids
from transformers import AutoModelForCausalLM

from distill.config.section import From, Width
from distill.convert.calibrate import Calibration
from distill.convert.derive import derived, derived_config
from distill.errors import UserError
from distill.models.layers import decoder_layers


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_what_nobody_reads_is_left_out_and_the_rest_computes_the_same(family, tmp_path):
    """Half of the neurons and one of two key heads of every layer are silenced, others in each: those must go."""
    model, ids = model_of(family), random_ids()
    groups = model.config.num_attention_heads // model.config.num_key_value_heads
    for number, layer in enumerate(decoder_layers(model)[1]):
        layer.mlp.up_proj.weight.data[number % 2 :: 2] = 0
        dead = (number % 2) * groups * 8
        layer.self_attn.v_proj.weight.data[number % 2 * 8 : number % 2 * 8 + 8] = 0
        layer.self_attn.o_proj.weight.data[:, dead : dead + groups * 8] = 7.0  # large, and multiplied with 0
    made = derived(
        model, From(model="x", width=Width(intermediate=24, kv_heads=1)), Calibration(ids.tolist())
    )
    torch.testing.assert_close(logits(made.model, ids), logits(model, ids), rtol=0, atol=1e-5)
    assert made.did == ["24 of 48 neurons, 1 of 2 heads of keys"]
    made.model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again, ids), logits(made.model, ids))
    assert made.chosen["width"]["kept"]["1"]["heads of keys"] == [0]


def test_the_largest_channels_stay_in_every_layer_alike():
    model, ids = model_of("llama"), random_ids()
    loud = torch.tensor([1, 3, 4, 8, 13, 20, 22, 31])
    for name, module in model.named_modules():
        if name.endswith("layernorm"):
            module.weight.data[loud] = 10.0
    section = From(model="x", width=Width(hidden=8))
    made = derived(model, section, Calibration(ids.tolist()))
    assert made.chosen["width"]["kept"]["0"]["channels"] == loud.tolist()
    new, old = made.model.model.layers[2], model.model.layers[2]
    assert torch.equal(new.mlp.gate_proj.weight, old.mlp.gate_proj.weight[:, loud])
    assert torch.equal(new.self_attn.o_proj.weight, old.self_attn.o_proj.weight[loud])
    assert torch.equal(made.model.model.embed_tokens.weight, model.model.embed_tokens.weight[:, loud])
    assert made.model.lm_head.weight is made.model.model.embed_tokens.weight  # tied as before
    assert derived_config(model.config, section).to_dict() == made.model.config.to_dict()


@pytest.mark.parametrize(
    ("family", "width", "says"),
    [
        ("llama", {"intermediate": 49}, r"width\.intermediate=49: the model has 48"),
        ("llama", {"kv_heads": 3}, r"width\.kv_heads=3: the model has 2"),
        ("qwen3_moe", {"hidden": 8}, "is a mixture of experts"),
        ("phi3", {"hidden": 8}, "which weights of a phi3 model belong together is not known"),
    ],
)
def test_what_cannot_be_cut_is_refused_from_the_config_alone(family, width, says):
    with pytest.raises(UserError, match=says):
        derived_config(model_of(family).config, From(model="x", width=Width(**width)))
