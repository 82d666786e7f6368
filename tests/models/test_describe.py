"""Counts against published models, against what a forward pass touches, FlopCounterMode and a real cache."""

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch.utils.flop_counter import FlopCounterMode
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, DynamicCache

from distill.errors import UserError
from distill.models.describe import describe, describe_config, describe_model, format_description
from distill.models.load import cache_name

# The sizes in the models' own config.json files.
PUBLISHED = {
    "DeepSeek-V3": {
        "architectures": ["DeepseekV3ForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_deepseek.DeepseekV3Config",
            "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
        },
        "model_type": "deepseek_v3",
        "torch_dtype": "bfloat16",
        "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "num_nextn_predict_layers": 1,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "n_shared_experts": 1,
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 3,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "n_group": 8,
        "topk_group": 4,
        "max_position_embeddings": 163840,
        "tie_word_embeddings": False,
    },
    "Mixtral-8x7B": {
        "model_type": "mixtral",
        "torch_dtype": "bfloat16",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "tie_word_embeddings": False,
    },
    "OLMoE-1B-7B": {
        "model_type": "olmoe",
        "torch_dtype": "bfloat16",
        "vocab_size": 50304,
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "tie_word_embeddings": False,
    },
    "Qwen3-30B-A3B": {
        "model_type": "qwen3_moe",
        "torch_dtype": "bfloat16",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "tie_word_embeddings": False,
    },
    "gpt-oss-20b": {
        "model_type": "gpt_oss",
        "quantization_config": {"quant_method": "mxfp4"},
        "vocab_size": 201088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 24,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "sliding_window": 128,
        "tie_word_embeddings": False,
    },
}

T = 24
_SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
TINY = {
    "llama": {**_SMALL, "tie_word_embeddings": False},
    "qwen3": {**_SMALL, "tie_word_embeddings": True},
    "deepseek_v3": {
        **_SMALL,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
        "n_routed_experts": 6,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": 20,
        "kv_lora_rank": 12,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 10,
        "head_dim": 4,
        "v_head_dim": 6,
        "num_nextn_predict_layers": 1,
    },
    "qwen3_moe": {**_SMALL, "moe_intermediate_size": 16, "num_experts": 5, "num_experts_per_tok": 3},
    "gpt_oss": {
        **_SMALL,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}
FAMILIES = list(TINY)


def tiny_config(family, **changes):
    return AutoConfig.for_model(family, **{**TINY[family], **changes})


def tiny_model(family, **changes):
    torch.manual_seed(0)
    implementations = {"attn_implementation": "eager", "experts_implementation": "eager"}
    return AutoModelForCausalLM.from_config(
        tiny_config(family, **changes), dtype=torch.float32, **implementations
    ).eval()


def save_config(folder, config):
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return folder


# ------------------------------------------------------------------------------------------- published models


@pytest.mark.parametrize(
    "name, total, active, without_embeddings, experts, per_token",
    [
        ("DeepSeek-V3", 671.03e9, 37.55e9, 36.63e9, 256, 8),
        ("Mixtral-8x7B", 46.70e9, 12.88e9, 12.75e9, 8, 2),
        ("OLMoE-1B-7B", 6.92e9, 1.28e9, 1.18e9, 64, 8),
        ("Qwen3-30B-A3B", 30.53e9, 3.35e9, 3.04e9, 128, 8),
        ("gpt-oss-20b", 20.91e9, 4.19e9, 3.61e9, 32, 4),
    ],
)
def test_published_models(tmp_path, name, total, active, without_embeddings, experts, per_token):
    found = describe(save_config(tmp_path, PUBLISHED[name]))
    assert found["parameters_total"] == pytest.approx(total, rel=1e-3)
    assert found["parameters_active"] == pytest.approx(active, rel=5e-3)
    assert found["parameters_active_without_embeddings"] == pytest.approx(without_embeddings, rel=5e-3)
    assert (found["experts"], found["experts_per_token"]) == (experts, per_token)
    assert found["dtype"] == "bfloat16" and found["weight_bytes"] == 2 * found["parameters_total"]
    assert json.loads(json.dumps(found)) == found


# What is published of two small models whose head is their embedding.
TIED = {
    "SmolLM2-135M": (
        {"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
         "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True},
        134_515_008, 106_203_456,
    ),
    "Gemma 3 270M": (
        {"model_type": "gemma3_text", "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18,
         "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 262144,
         "tie_word_embeddings": True},
        268_098_176, 100_326_016,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TIED)
def test_tied_embeddings_are_left_out_once_and_multiplied_still(tmp_path, name):
    config, total, without = TIED[name]
    found = describe(save_config(tmp_path, config), context=1)
    assert (found["parameters_total"], found["parameters_active_without_embeddings"]) == (total, without)
    assert (
        found["tied"]
        and found["flops_per_token"] > 2 * without + config["vocab_size"] * config["hidden_size"]
    )
    assert "without embeddings (tied)" in format_description(found)


def test_deepseek_v3_cache_and_flops(tmp_path):
    found = describe(save_config(tmp_path, PUBLISHED["DeepSeek-V3"]) / "config.json", context=4096)
    assert found["kv_bytes_per_token"] == 61 * (512 + 64) * 2 == 70_272
    attention = 61 * 2 * 4096 * 128 * (192 + 128)
    assert found["flops_per_token"] == pytest.approx(2 * 36.63e9 + attention, rel=1e-3)


# -------------------------------------------------------------------- tiny models against what really happens


def parameters_touched_by_one_token(model, experts):
    """Whole tensors, but of stacked expert weights only the slices that got a gradient from one token."""
    model(input_ids=torch.tensor([[7]])).logits.logsumexp(-1).sum().backward()
    used = 0
    for name, parameter in model.named_parameters():
        routed = parameter.ndim == 3 or (".experts." in name and parameter.shape[0] == experts)
        slices = parameter.grad.flatten(1).abs().sum(1) > 0 if routed else None
        used += int(slices.sum()) * parameter[0].numel() if routed else parameter.numel()
    return used


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_match_the_tensors_and_what_a_token_uses(family):
    model = tiny_model(family)
    found = describe_model(model)
    storages = {p.data_ptr(): p.numel() for p in model.parameters()}
    assert found["parameters_total"] == sum(storages.values())
    assert found["parameters_active"] == parameters_touched_by_one_token(model, found["experts"])
    assert found["parameters_adapter"] == 0
    assert found["weight_bytes"] == sum(p.numel() * p.element_size() for p in model.parameters())
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    embedding = (
        model.get_input_embeddings().weight.numel()
    )  # one matrix, whether or not it is the head as well
    assert found["parameters_active"] - found["parameters_active_without_embeddings"] == embedding
    assert found["tied"] == tied


@pytest.mark.parametrize("family", FAMILIES)
def test_flops_match_the_flop_counter(family):
    model = tiny_model(family, **({"sliding_window": T} if family == "gpt_oss" else {}))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.arange(T)[None])  # eager attention: T keys for each of T queries
    assert describe_model(model, context=T)["flops_per_token"] * T == counter.get_total_flops()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tokens", [3, 7, 8, T])  # gpt_oss slides over 8
def test_cache_bytes_match_a_real_cache(family, tokens):
    model = tiny_model(family)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=torch.arange(tokens)[None], **{cache_name(model): cache, "use_cache": True})
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    found = describe_model(model, context=tokens)
    assert found["kv_bytes_at_context"] == held
    if tokens < 8:
        assert found["kv_bytes_per_token"] * tokens == held


def test_sliding_layers_stop_growing():
    at_window, far = (describe_config(tiny_config("gpt_oss"), context=c) for c in (8, 1000))
    per_layer = at_window["kv_bytes_per_token"] // 3
    assert far["kv_bytes_per_token"] == at_window["kv_bytes_per_token"]
    assert far["kv_bytes_at_context"] == per_layer * (1000 + 2 * 7)
    # One full layer and two of window 8: only the full one attends to the other 992 keys.
    assert far["flops_per_token"] - at_window["flops_per_token"] == 2 * 992 * 4 * (8 + 8)


# ---------------------------------------------------------------------------------------------------- scaling


@settings(max_examples=15, deadline=None)
@given(experts=st.integers(2, 40), data=st.data())
def test_more_experts_are_held_and_not_used(experts, data):
    k = data.draw(st.integers(1, experts))
    layers, width, inner = 3, 32, 16
    few, many, routed_more = (
        describe_config(tiny_config("qwen3_moe", num_experts=e, num_experts_per_tok=used))
        for e, used in ((experts, k), (experts + 3, k), (experts + 3, k + 1))
    )
    expert, router_row = 3 * width * inner, width
    total = many["parameters_total"] - few["parameters_total"]
    active = many["parameters_active"] - few["parameters_active"]
    assert total == layers * 3 * (expert + router_row)
    assert active == layers * 3 * router_row
    assert many["flops_per_token"] - few["flops_per_token"] == 2 * active
    assert many["kv_bytes_per_token"] == few["kv_bytes_per_token"]
    assert routed_more["parameters_total"] == many["parameters_total"]
    assert routed_more["parameters_active"] - many["parameters_active"] == layers * expert


def test_experts_without_an_experts_child():
    """jetmoe routes in the MLP and in attention, through stacked weights of the block itself."""
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 24, "vocab_size": 96}
    attention = {"num_key_value_heads": 2, "kv_channels": 8}
    config = AutoConfig.for_model("jetmoe", num_local_experts=4, num_experts_per_tok=2, **sizes, **attention)
    found = describe_config(config)
    mlp_expert, attention_expert = 32 * 2 * 24 + 24 * 32, 32 * 2 * 8 + 2 * 8 * 32
    idle = 2 * (4 - 2) * (mlp_expert + attention_expert)
    assert found["parameters_total"] - found["parameters_active"] == idle
    assert (found["experts"], found["experts_per_token"]) == (4, 2)


def test_a_dense_model_uses_all_it_holds():
    found = describe_config(tiny_config("llama"))
    assert found["parameters_active"] == found["parameters_total"]
    assert found["experts"] == found["experts_per_token"] == 0


@pytest.mark.parametrize("dtype, size", [("float32", 4), ("float16", 2), ("bfloat16", 2), (None, 2)])
def test_bytes_follow_the_dtype_of_the_config(dtype, size):
    found = describe_config(tiny_config("llama", dtype=dtype))
    assert found["dtype"] == (dtype or "bfloat16")
    assert found["weight_bytes"] == size * found["parameters_total"]
    assert found["kv_bytes_per_token"] == size * 3 * 2 * 2 * 8  # layers, keys and values, heads, width


def test_config_and_model_agree_and_neither_is_changed():
    config = tiny_config("deepseek_v3", dtype="float32")
    before = copy.deepcopy(vars(config))
    model = tiny_model("deepseek_v3")
    assert describe_config(config) == describe_model(model)
    assert vars(config) == before  # building a model from a config writes kernel choices into it
    assert model.config._attn_implementation == "eager"


# --------------------------------------------------------------------------------------------------- adapters


@pytest.mark.parametrize(
    "family, lora",
    [
        ("qwen3", {"target_modules": "all-linear"}),
        ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
        ("deepseek_v3", {"target_modules": ["kv_b_proj", "o_proj"]}),
        (
            "qwen3_moe",
            {"target_modules": [], "target_parameters": ["mlp.experts.down_proj", "mlp.gate.weight"]},
        ),
    ],
)
def test_adapters_are_counted_apart(family, lora):
    alone = describe_model(tiny_model(family))
    wrapped = get_peft_model(tiny_model(family), LoraConfig(r=2, task_type="CAUSAL_LM", **lora))
    found = describe_model(wrapped)
    saved = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    assert found.pop("parameters_adapter") == sum(tensor.numel() for tensor in saved.values()) > 0
    assert found == {key: value for key, value in alone.items() if key != "parameters_adapter"}


def test_a_model_that_holds_less_than_its_config_is_refused():
    model = tiny_model("llama")
    del model.model.layers[2]
    with pytest.raises(UserError, match="fewer than its config"):
        describe_model(model)


# -------------------------------------------------------------------------------------------- user's mistakes


@pytest.mark.parametrize(
    "config, message",
    [
        (None, "has no config.json"),
        ("{half a conf", "config.json is no JSON that can be read"),
        ({"hidden_size": 32}, "model_type None"),
        ({"model_type": "gpt-17"}, "'gpt-17', which this transformers does not know"),
        ({"model_type": "llama", "hidden_size": "wide"}, "hidden_size is wide, not a whole number"),
        ({"model_type": "llama", **_SMALL, "num_attention_heads": 0}, "num_attention_heads is 0, not"),
        ({"model_type": "t5"}, "no causal LM can be built from this t5 config"),
    ],
)
def test_what_cannot_be_described_is_one_clear_line(tmp_path, config, message):
    if config is not None:
        save_config(tmp_path, config)
    with pytest.raises(UserError, match=message) as caught:
        describe(tmp_path)
    assert len(caught.value.problems) == 1 and "\n" not in caught.value.problems[0]


def test_an_adapter_folder_is_named_as_such(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="describe the model it adapts"):
        describe(tmp_path)


def test_a_path_that_does_not_exist(tmp_path):
    with pytest.raises(UserError, match="name a model folder"):
        describe(tmp_path / "absent")


def test_code_in_a_checkpoint_is_refused_and_never_run(tmp_path):
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\n"
    for name in ("configuration_own", "modeling_own"):
        (tmp_path / f"{name}.py").write_text(code)
    auto_map = {"AutoConfig": "configuration_own.Own", "AutoModelForCausalLM": "modeling_own.Own"}
    with pytest.raises(UserError, match="needs code from its checkpoint"):
        describe(save_config(tmp_path, {"model_type": "own", "auto_map": auto_map}))
    # A family that transformers implements itself is read with its implementation, as DeepSeek-V3's is.
    found = describe(save_config(tmp_path, {"model_type": "llama", "auto_map": auto_map, **TINY["llama"]}))
    assert found["architecture"] == "LlamaForCausalLM"
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("context", [0, -5])
def test_context_is_at_least_one_token(context):
    with pytest.raises(UserError, match="at least 1 token"):
        describe_config(tiny_config("llama"), context=context)


# --------------------------------------------------------------------------------------------------- printing


def test_the_table_is_aligned_and_in_si_units(tmp_path):
    text = format_description(describe(save_config(tmp_path, PUBLISHED["DeepSeek-V3"])))
    title, *rows = text.splitlines()
    assert title == "DeepseekV3ForCausalLM (deepseek_v3)"
    for expected in ("671.03 B", "37.55 B", "36.63 B", "256, 8 of them per token", "70.27 kB", "1.34 TB"):
        assert expected in text
    column = rows[0].index("61,")
    assert all(row[column - 2 : column] == "  " and row[column] != " " for row in rows)


def test_the_table_of_a_dense_model_and_of_an_adapter():
    model = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    text = format_description(describe_model(model))
    assert "routed experts" in text and "none" in text and "384 parameters" in text


def test_layers_passed_several_times_multiply_and_cache_that_often():
    family = "inkling2_loop_text"
    if family not in CONFIG_MAPPING:
        pytest.skip("this transformers has no looped model")
    sizes = {"vocab_size": 64, "unpadded_vocab_size": 64, "hidden_size": 32, "moe_intermediate_size": 16}
    sizes |= {"num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    sizes |= {
        "swa_num_attention_heads": 2,
        "swa_num_key_value_heads": 1,
        "swa_head_dim": 16,
        "loop_gate_rank": 4,
    }
    sizes |= {"n_layers_per_attn_res_block": 1, "loop_layer_index_start": 1, "loop_layer_index_end": 2}
    sizes |= {"n_routed_experts": 8, "num_experts_per_tok": 2}
    found = [describe_config(AutoConfig.for_model(family, **sizes, loop_num_passes=n), T) for n in (1, 2, 4)]
    once, twice, four = (d["flops_per_token"] for d in found)
    assert len({d["parameters_total"] for d in found}) == 1
    assert [d["kv_bytes_per_token"] / found[0]["kv_bytes_per_token"] for d in found] == [1, 4 / 3, 2]
    assert four - once == 3 * (twice - once) > 0
    # Of the pass: 2 of 8 experts of 3 * 16 * 32, at least, and the whole layer at most.
    assert 2 * 2 * 3 * 16 * 32 < twice - once < once
