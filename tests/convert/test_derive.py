"""Models with fewer layers: the kept ones compute what they computed, in every family that has kinds of layers."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from distill.config.student_from import From
from distill.convert.derive import derived, derived_config, drop_layers, kept_layers
from distill.errors import UserError
from distill.models.layers import decoder_layers

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "vocab_size": 96, "max_position_embeddings": 64, "head_dim": 8,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES = {
    "llama": {"tie_word_embeddings": True},
    "qwen3": {"tie_word_embeddings": False},
    # Sliding and full attention with a rotation of its own each; the window is shorter than the text.
    "gemma3_text": {
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
        "tie_word_embeddings": True,
    },
    "qwen3_moe": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "mlp_only_layers": [0, 4],
    },
    "deepseek_v3": {
        "first_k_dense_replace": 2, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
        "n_group": 1, "topk_group": 1, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4,
    },
    "smollm3": {"no_rope_layers": [1, 1, 0, 1, 1, 0]},
}  # fmt: skip
KEEP = [0, 2, 4, 5]


def model_of(family: str):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family]})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_kept_layers_compute_what_they_computed(family, tmp_path, monkeypatch):
    """Against the whole model whose other layers hand on what they are given; its masks and kinds stay in place."""
    model = model_of(family)
    student = drop_layers(model, KEEP)
    student.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    for number, layer in enumerate(decoder_layers(model)[1]):
        if number not in KEEP:
            monkeypatch.setattr(layer, "forward", lambda hidden_states, *args, **kwargs: hidden_states)
    ids = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        for found in (student, again):
            torch.testing.assert_close(found(input_ids=ids, use_cache=False).logits, expected)
    assert student.config.num_hidden_layers == len(KEEP)
    tied = student.get_output_embeddings().weight is student.get_input_embeddings().weight
    assert tied == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)


@pytest.mark.parametrize(
    ("asked", "kept"), [(10, [0, 3, 6, 10, 13, 16, 19, 23, 26, 29]), (2, [0, 29]), (1, [0]), ((1, 4), [1, 4])]
)
def test_counts_are_taken_evenly_with_both_ends(asked, kept):
    assert kept_layers(asked, 30) == kept


@pytest.mark.parametrize("asked", [0, 31, (), (3, 1), (1, 1), (0, 30)])
def test_layers_that_are_not_there_are_refused(asked):
    with pytest.raises(UserError, match=r"student\.from\.layers"):
        kept_layers(asked, 30)


def test_the_config_alone_says_the_same():
    model = model_of("gemma3_text")
    section = From(model="x", layers=(1, 2, 5))
    config = derived_config(model.config, section)
    assert config.layer_types == ["sliding_attention", "full_attention", "full_attention"]
    assert config.to_dict() == derived(model, section).model.config.to_dict()
    assert model.config.num_hidden_layers == 6  # the model it is made from stays as it is


def test_a_config_that_cannot_say_it_is_refused():
    """Every second layer is a mixture, by a step in the config: layers 1, 2, 5 are none, one, one."""
    config = AutoConfig.for_model(
        "qwen3_moe", **{**SIZES, **FAMILIES["qwen3_moe"], "mlp_only_layers": [], "decoder_sparse_step": 2}
    )
    model = AutoModelForCausalLM.from_config(config)
    assert drop_layers(model, [0, 1, 4, 5]).config.num_hidden_layers == 4
    with pytest.raises(UserError, match="would become another one"):
        drop_layers(model, [1, 2, 5])
