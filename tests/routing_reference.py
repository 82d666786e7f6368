"""Tiny random models of every MoE `*ForCausalLM` of the installed transformers, and a slow reference.

Families are discovered from the source text of transformers, not by `distill.moe.recording`: a family that the
code under test does not recognise must fail by name, not vanish. The reference decides one token at a time
in float64, from the router's input, its weights, the bias and the config; it shares nothing with the code
under test. FAMILIES says what each family does, read from its source.
"""

import dataclasses
import functools
import importlib
import math
import pathlib
import re

import numpy as np
import torch
import transformers

EXPERTS, TOP_K = 8, 2
# One value for each config field that sets a size, whatever family it is in.
SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "linear_head_dim": 8, "linear_num_heads": 4, "max_position_embeddings": 64, "zero_expert_num": 2,
    "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8, "n_shared_experts": 1,
    "n_group": 2, "num_expert_group": 2, "topk_group": 1, "first_k_dense_replace": 0, "num_dense_layers": 0,
    "mlp_only_layers": [], "mlp_layer_types": ["sparse", "sparse"],
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
SMALL |= dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS)
SMALL |= dict.fromkeys(
    ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"), TOP_K
)
# What a family needs beyond that: a switch that turns its experts on, or a size tied to another.
OVERRIDES = {
    "dbrx": {
        "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64,
        "attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0, "kv_n_heads": 2},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": EXPERTS, "moe_top_k": TOP_K},
    },
    "deepseek_v2": {"topk_method": "group_limited_greedy"},
    "deepseek_v4": {"mlp_layer_types": ["hash_moe", "moe"]},
    "doge": {"is_moe": True, "num_experts": 16},
    "gemma4_text": {"enable_moe_block": True},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8},
    "inkling2_loop_text": {  # the second layer twice
        "unpadded_vocab_size": 64, "n_layers_per_attn_res_block": 1,
        "loop_layer_index_start": 1, "loop_layer_index_end": 2, "loop_num_passes": 2,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"num_layers": 2, "ffn_hidden_size": 32, "expert_ffn_hidden_size": 16},
    "mimo_v2_flash": {"head_dim": 16, "num_key_value_heads": 2},
    "mistral4": {"qk_head_dim": 16, "head_dim": 16},
    "zaya": {"num_experts_per_tok": 1, "num_attention_heads": 4, "num_key_value_heads": 2},
}  # fmt: skip


@functools.cache
def moe_families() -> dict[str, str]:
    """Folder -> class name, for every `*ForCausalLM` in a file that also defines a router or experts.

    Read from the folders, not from the auto mapping: Mistral4ForCausalLM is missing there.
    """
    found = {}
    for path in sorted(pathlib.Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        source = path.read_text()
        name = re.search(r"^class (\w+ForCausalLM)\(", source, re.M)
        if name and re.search(r"^class \w*(Router|Experts|CDMoE)\w*\(", source, re.M):
            found[path.parent.name] = name[1]
    return found


def build(family: str):
    """A tiny random model in eval mode with random expert biases; raises whatever its constructor raises."""
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    model_class = getattr(module, moe_families()[family])
    config_class = model_class.config_class
    fields = set(config_class().to_dict()) | set(getattr(config_class, "attribute_map", {}))
    small = {k: v for k, v in SMALL.items() if k in fields}
    torch.manual_seed(0)
    model = model_class(config_class(**small | OVERRIDES.get(config_class.model_type, {}))).eval()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if re.search(r"\.(gate|router|router_gate)\.|expert_bias$|e_score_correction_bias$", name):
            _randomise(name, tensor.data)
    return model


def _randomise(name: str, tensor: torch.Tensor) -> None:
    """Routers as checkpoints have them: opinions that differ, a bias strong enough to change decisions."""
    if name.endswith("tid2eid"):  # a table of distinct experts for each token id
        tensor.copy_(torch.rand(len(tensor), EXPERTS).argsort(-1)[:, : tensor.shape[1]])
    elif tensor.is_floating_point():
        tensor.uniform_(-0.5, 0.5)


# ---------------------------------------------------------------------- what each family does


@dataclasses.dataclass(frozen=True)
class Rule:
    """How one family turns logits into decisions. Strings name config fields; paths start at the block."""

    score: str  # softmax | sigmoid | sqrtsoftplus
    norm: bool | str = False  # weights divided by their sum
    scale: str | None = None
    bias: str | None = None  # path of the selection-only bias
    groups: str | None = None  # a group is worth its "top2" sum or its "max"
    weight: str = "gate.weight"
    select_on: str = "scores"  # what the bias is added to
    special: str | None = None


BIAS = "gate.e_score_correction_bias"
DEEPSEEK_V3 = Rule("sigmoid", "norm_topk_prob", "routed_scaling_factor", BIAS, "top2")
RENORMALISED = dataclasses.replace(DEEPSEEK_V3, norm="moe_renormalize")
SOFTMAX_NORM_IF = Rule("softmax", "norm_topk_prob")
SOFTMAX_NORM = Rule("softmax", True)
SOFTMAX_OF_TOP = Rule(
    "softmax", True, weight="router.weight"
)  # softmax over the chosen logits is the same thing
FAMILIES = {
    "afmoe": Rule("sigmoid", True, "route_scale", "expert_bias", weight="router.gate.weight"),
    "aria": SOFTMAX_OF_TOP,
    "axk1": DEEPSEEK_V3,
    "axk2": DEEPSEEK_V3,
    "bailing_hybrid": RENORMALISED,
    "beam": dataclasses.replace(DEEPSEEK_V3, scale=None),
    "cohere2_moe": SOFTMAX_NORM,
    "dbrx": Rule("softmax", True, weight="router.layer.weight"),
    "deepseek_v2": Rule("softmax", False, "routed_scaling_factor", groups="max"),
    "deepseek_v3": DEEPSEEK_V3,
    "deepseek_v32": DEEPSEEK_V3,
    "deepseek_v4": Rule("sqrtsoftplus", True, "routed_scaling_factor", BIAS, special="hash"),
    "doge": Rule("softmax", True, weight="router_gate.weight", special="product_keys"),
    "dots1": DEEPSEEK_V3,
    "dots3_note": DEEPSEEK_V3,
    "ernie4_5_moe": Rule("softmax", True, bias="gate.moe_statics.e_score_correction_bias"),
    "exaone_moe": DEEPSEEK_V3,
    "flex_olmo": SOFTMAX_NORM_IF,
    "flint": Rule("sigmoid", "norm_topk_prob"),
    "gemma4": Rule("softmax", True, weight="router.proj.weight", special="gemma4"),
    "glm4_moe": DEEPSEEK_V3,
    "glm4_moe_lite": DEEPSEEK_V3,
    "glm_moe_dsa": DEEPSEEK_V3,
    "gpt_oss": dataclasses.replace(SOFTMAX_OF_TOP, special="linear_bias"),
    "granitemoe": SOFTMAX_OF_TOP,
    "granitemoe_swa": SOFTMAX_OF_TOP,
    "granitemoehybrid": SOFTMAX_OF_TOP,
    "granitemoeshared": SOFTMAX_OF_TOP,
    "hunyuan_v1_moe": Rule("softmax", True, weight="gate.wg.weight"),
    "hy_v3": Rule("sigmoid", True, "router_scaling_factor", "e_score_correction_bias"),
    "hy_v4": DEEPSEEK_V3,
    "inkling": Rule("sigmoid", True, "route_scale", BIAS, special="shared_in_norm"),
    "inkling2": Rule("sigmoid", True, "route_scale", BIAS),
    "inkling2_loop": Rule("sigmoid", True, "route_scale", BIAS),
    "jamba": Rule("softmax", False, weight="router.weight"),
    "jetmoe": Rule("softmax", True, weight="router.layer.weight"),
    "kimi_linear": RENORMALISED,
    "kolibri1": Rule("sigmoid", "norm_topk_prob", bias=BIAS, select_on="logits"),
    "laguna": Rule("sigmoid", True, bias=BIAS),
    "lara_mini": SOFTMAX_NORM_IF,
    "lfm2_moe": Rule("sigmoid", "norm_topk_prob", "routed_scaling_factor", "expert_bias"),
    "llama4": Rule("sigmoid", False, weight="router.weight"),
    "longcat_flash": Rule(
        "softmax",
        False,
        "routed_scaling_factor",
        "router.e_score_correction_bias",
        weight="router.classifier.weight",
    ),
    "mellum": SOFTMAX_NORM_IF,
    "mimo_v2_flash": DEEPSEEK_V3,
    "minimax": SOFTMAX_NORM,
    "minimax_m2": Rule("sigmoid", True, bias="e_score_correction_bias"),
    "minimax_m3_vl": Rule("sigmoid", True, bias=BIAS),
    "mistral4": Rule("softmax", "norm_topk_prob", "routed_scaling_factor", groups="top2"),
    "mixtral": SOFTMAX_NORM,
    "nemotron_h": DEEPSEEK_V3,
    "olmoe": SOFTMAX_NORM_IF,
    "phimoe": Rule("softmax", weight="router.weight", special="sparsemixer"),
    "qwen2_moe": SOFTMAX_NORM_IF,
    "qwen3_5_moe": SOFTMAX_NORM,
    "qwen3_moe": SOFTMAX_NORM_IF,
    "qwen3_next": SOFTMAX_NORM_IF,
    "qwen4_exp": SOFTMAX_NORM_IF,
    "solar_open": DEEPSEEK_V3,
    "zaya": Rule(
        "softmax", False, bias="gate.balancing_biases", weight="gate.down_proj.weight", special="zaya"
    ),
}


def bias_of(rule: Rule, block) -> torch.Tensor | None:
    """The bias where the rule says it is; None if the rule has none, or the layer (hash layers) lacks it."""
    try:
        return functools.reduce(getattr, rule.bias.split("."), block) if rule.bias else None
    except AttributeError:
        return None


def array(block, path: str) -> np.ndarray:
    return functools.reduce(getattr, path.split("."), block).detach().double().numpy()


def score(name: str, logits: np.ndarray) -> np.ndarray:
    if name == "softmax":
        e = np.exp(logits - logits.max())
        return e / e.sum()
    return 1 / (1 + np.exp(-logits)) if name == "sigmoid" else np.sqrt(np.log1p(np.exp(logits)))


def decide(rule: Rule, block, config, inputs: list[np.ndarray], input_ids: np.ndarray, dropped=()):
    """Reference decisions of one block: scores [N, E], weights as a dense [N, E], sorted choices [N, k].

    Nobody chooses the experts in `dropped`. `inputs` are the positional and keyword arrays that the router was
    called with, flattened to [N, ...].
    """
    x, k = inputs[0], 1 if rule.special == "zaya" else TOP_K
    logits = _logits(rule, block, inputs)
    shared = logits[:, EXPERTS:] if rule.special == "shared_in_norm" else None
    if shared is not None:
        logits = logits[:, :EXPERTS]
    scores, weights = np.stack([score(rule.score, row) for row in logits]), np.zeros_like(logits)
    choices = []
    for t in range(len(x)):
        key = (logits if rule.select_on == "logits" else scores)[t].copy()
        if (bias := bias_of(rule, block)) is not None:
            key = key + bias.double().numpy().reshape(-1)
        key[list(dropped)] = -np.inf
        if rule.groups:
            rows = np.sort(key.reshape(2, -1))
            worth = rows[:, -2:].sum(1) if rule.groups == "top2" else rows[:, -1]
            key.reshape(2, -1)[int(worth.argmin())] = -np.inf
        chosen = list(np.argsort(-key)[:k])
        if rule.special == "hash" and hasattr(block.gate, "tid2eid"):
            chosen = block.gate.tid2eid[input_ids[t]].tolist()
        choices.append(sorted(chosen))
        if rule.special == "sparsemixer":
            weights[t] = _sparsemixer(logits[t], block.router.router_jitter_noise)
            continue
        weights[t, chosen] = scores[t, chosen]
        if getattr(config, rule.norm) if isinstance(rule.norm, str) else rule.norm:
            weights[t] /= weights[t].sum() + (score("sigmoid", shared[t]).sum() if shared is not None else 0)
        weights[t] *= getattr(config, rule.scale) if rule.scale else 1
        if rule.special == "gemma4":
            weights[t] *= array(block, "router.per_expert_scale")
        if rule.special == "shared_in_norm":
            weights[t] *= array(block, "gate.global_scale")
        if rule.special == "zaya":
            weights[t, EXPERTS] = 0  # the skip is not applied
    return scores, weights, np.array(choices)


def _logits(rule: Rule, block, inputs: list[np.ndarray]) -> np.ndarray:
    x, matrix = inputs[0], array(block, rule.weight)
    if rule.special == "gemma4":
        x = (
            x
            / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
            * array(block, "router.scale")
            * x.shape[-1] ** -0.5
        )
    if rule.special == "product_keys":  # the family splits the two halves across tokens, not within one
        half = (x @ matrix.T).reshape(2, len(x), -1)
        return np.stack([(a[:, None] + b[None, :]).reshape(-1) for a, b in zip(half[0], half[1])])
    logits = x @ matrix.T
    if rule.special == "linear_bias":
        logits = logits + array(block, "router.bias")
    if rule.special == "zaya":
        h = logits + array(block, "gate.down_proj.bias")
        if len(inputs) > 1:
            h = h + inputs[1] * array(block, "gate.router_states_scale")
        h = h / np.sqrt((h**2).mean(-1, keepdims=True) + 1e-5) * array(block, "gate.router_mlp.norm.weight")
        for layer in ("fc1", "fc2"):
            h = h @ array(block, f"gate.router_mlp.{layer}.weight").T + array(
                block, f"gate.router_mlp.{layer}.bias"
            )
            h = h * (1 + np.vectorize(math.erf)(h / math.sqrt(2))) / 2
        logits = h @ array(block, "gate.router_mlp.out_proj.weight").T
    return logits


def _sparsemixer(logits: np.ndarray, jitter: float) -> np.ndarray:
    """Eval mode: argmax, weighted by its softmax among experts within the jitter; then again without it."""
    weights, left = np.zeros_like(logits), set(range(len(logits)))
    for _ in range(TOP_K):
        best = max(left, key=lambda e: logits[e])
        top = logits[best]
        near = [e for e in left if (top - logits[e]) / max(abs(logits[e]), top) <= 2 * jitter]
        weights[best] = 1 / sum(math.exp(logits[e] - top) for e in near)
        left.remove(best)
    return weights
