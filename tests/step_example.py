"""A student with its objectives, and rows of unequal length, for tests of one forward pass."""

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from distill.config.training import Objective
from distill.data.batches import TokenRows

V = 61
SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "intermediate_size": 48, "vocab_size": V, "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": 1,
    "bos_token_id": 2,
}  # fmt: skip
FAMILIES = {
    "qwen3": {},
    "qwen3 tied": {"tie_word_embeddings": True},
    "gemma2": {"final_logit_softcapping": 3.0},
    "granite": {"logits_scaling": 7.0},
    "cohere": {"logit_scale": 0.2},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "gpt2": {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "attn_pdrop": 0,
        "embd_pdrop": 0,
        "resid_pdrop": 0,
    },
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0},
}
MIXED = [
    Objective(name="cross_entropy", weight=0.5),
    Objective(name="forward_kl", temperature=2.0, temperature_squared=True),
    Objective(name="skew_reverse_kl", weight=0.25),
]


def build(family: str, seed: int = 0):
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family.split()[0], **{**SIZES, **FAMILIES[family]})
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").train()


def mla(experts: int = 4):
    """A tiny DeepSeek-V3: latent attention, and routers with a selection bias."""
    config = AutoConfig.for_model(
        "deepseek_v3", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, vocab_size=V,
        intermediate_size=48, moe_intermediate_size=16, n_routed_experts=experts, num_experts_per_tok=2,
        n_shared_experts=1, n_group=1, topk_group=1, first_k_dense_replace=0, q_lora_rank=16, kv_lora_rank=16,
        qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def rows(seed: int = 0, n: int = 7) -> TokenRows:
    rng = np.random.default_rng(seed)
    draw = lambda: rng.integers(3, V, rng.integers(1, 9)).tolist()  # noqa: E731
    return TokenRows([draw() for _ in range(n)], [draw() for _ in range(n)])


def gradients(model) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_close(a: dict, b: dict, tolerance: float = 1e-4):
    assert a.keys() == b.keys()
    for name in a:
        assert float((a[name] - b[name]).norm() / b[name].norm().clamp(min=1e-4)) < tolerance, name
