"""What a checkpoint is and costs: its parameters by purpose, and memory and FLOPs from config.json alone.

What the parameters of a model are for, and which of them train: a table by group, from structure alone.

    weight_groups(model)["model.layers.0.mlp.experts.down_proj"]          # "routed experts"
    print(format_trainable(model))                                       # for a manifest: trainable_table(model)

Works on dense and MoE causal LMs of transformers, with a PEFT adapter or without, quantised or not, and on the meta
device. No list of model families is kept: routers and experts are those that `distill.models.routers` finds.

What a checkpoint costs to hold and to run, from its config.json alone: no weights, no network, no GPU.

    distill describe MODEL_OR_CONFIG_DIR [--json]
    describe("checkpoints/teacher")["parameters_active"]
    describe_model(model)                    # an instantiated model; PEFT adapters are counted apart

The model is built on the meta device, so parameters are counted on the tensors that transformers would make
and not by a formula per family; routed experts are those of `distill.models.routers.find_routers`, found by
structure. What the keys mean, since published numbers mean different things:

- `parameters_total`: tied weights once. Not counted: buffers (DeepSeek's expert bias) and the head for
  multi-token prediction, which transformers does not build.
- `parameters_active`: all that is not a routed expert (attention, shared experts, routers, embedding, head)
  plus k/E of the routed experts. DeepSeek-V3: 37.55 B.
- `parameters_active_without_embeddings`: less the embedding (DeepSeek-V3: 36.63 B). The head multiplies at every
  token and stays; where it is the embedding (tied), that one matrix is left out, as published counts of small models
  do it (SmolLM2-135M: 106.2 M). `tied` says which; its product with every token is in the FLOPs all the same.
- `parameters_adapter`: what PEFT added. Part of no other number, since a merged adapter costs nothing.
- `flops_per_token`: forward. 2 per weight of the matrices that one token passes, plus attention, the sum over
  layers of 2 * T * n_heads * (d_qk + d_v) for T = `assumed_context` keys (a sliding layer: its window at
  most). A causal prefill of T tokens averages half of that second term; training is about three times the
  forward pass. Left out: norms, biases, softmax, linear-attention states, sparse-attention indexers.
- `kv_bytes_per_token`: what one more token adds to the cache. Per attention layer n_kv * (d_qk + d_v) values;
  with multi-head latent attention (kv_lora_rank + d_rope) (DeepSeek-V2, arXiv 2405.04434, section 2.1). A
  sliding layer adds them only until its window is full; `kv_bytes_at_context` is the cache of
  `assumed_context` tokens with that limit applied. Linear-attention layers add nothing.
- `weight_bytes`: `parameters_total` in `dtype`; a quantised file on disk is smaller.
- `experts`, `experts_per_token`: E and k; 0 for a dense model.

A model that goes through some layers several times (`loop_num_passes`) holds their weights once, multiplies with
them and caches once a pass; its message gates, which the first pass leaves out, are counted in each.

Known limit: falcon's and mimo_v2_flash's configs name their key-value heads in ways of their own, so their
cache sizes come out wrong. Some seventy other families agree with the cache that transformers fills.
"""

import copy
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from distill.errors import UserError
from distill.files import shown
from distill.models.folders import check_folder, refusing
from distill.models.routers import Router, bare, bare_model, find_routers
from distill.storage import find_file

GROUPS = (
    "attention",
    "mlp",
    "shared experts",
    "routed experts",
    "router",
    "embedding",
    "output head",
    "other",
)
LINEAR = (
    "attention",
    "mlp",
    "shared experts",
)  # plain linear layers, what `student.lora.targets` chooses from
_PREFIX = "base_model.model."  # what PEFT puts before every name


def weight_groups(model: nn.Module) -> dict[str, str]:
    """Every parameter of the bare model (adapters left out) -> its group, one of GROUPS, by structure.

    Tied weights count once, as the embedding. Norms, biases and whatever is no matrix of a layer are "other".
    Raises UserError for a MoE of unknown structure.
    """
    base = bare_model(model)
    linear = {plain_name(n) for n, m in base.named_modules() if isinstance(m, nn.Linear)}
    routers = find_routers(base)
    in_router, in_experts = set(), set()
    for router in routers:
        own, expert = _router_children(router)
        in_router |= {f"{router.name}.{child}." for child in own}
        in_experts |= {f"{router.name}.{child}." for child in expert}
    blocks = tuple(f"{router.name}." for router in routers)
    embedding, head = (
        {id(p) for p in m.parameters()} if m is not None else set()
        for m in (base.get_input_embeddings(), base.get_output_embeddings())
    )

    def group_of(name: str, parameter: nn.Parameter) -> str:
        module, _, leaf = name.rpartition(".")
        if id(parameter) in embedding:
            return "embedding"
        if id(parameter) in head:
            return "output head"
        if name.startswith(tuple(in_experts)):
            return "routed experts"
        if parameter.ndim < 2 or leaf.endswith(("bias", "biases")):
            return "other"
        if name.startswith(tuple(in_router)):
            return "router"
        if module not in linear:
            return "other"
        if "attn" in module or "attention" in module:
            return "attention"
        return "shared experts" if name.startswith(blocks) else "mlp"

    own = [(plain_name(n), p) for n, p in base.named_parameters() if ".lora_" not in n]
    return {name: group_of(name, parameter) for name, parameter in own}


def _router_children(router: Router) -> tuple[list[str], list[str]]:
    """Names of the block's children that decide, and of those that hold the routed experts."""
    names = {id(child): name for name, child in router.block.named_children()}
    deciding = [names[id(router.router)]] if router.router is not None else ["router_gate"]
    if router.experts is not None:
        return deciding, [names[id(router.experts)]]
    # jetmoe and doge keep the experts' weights in the block itself, in modules that are no nn.Linear.
    rest = [(n, c) for n, c in router.block.named_children() if n not in deciding]
    return deciding, [n for n, c in rest if not isinstance(bare(c), nn.Linear) and list(c.parameters())]


def plain_name(name: str) -> str:
    """A name without what PEFT's wrappers put into it."""
    return name.removeprefix(_PREFIX).replace(".base_layer", "")


def adapted_weights(model: nn.Module) -> dict[str, list[str]]:
    """Full name of each adapted weight of the bare model -> names of its adapter's parameters in `model`."""
    from peft.tuners.lora import LoraLayer

    found = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            own = [n for n, _ in module.named_parameters() if n.startswith("lora_")]
            weight = f"{plain_name(name)}.{getattr(module, 'parameter_name', 'weight')}"
            found[weight] = [f"{name}.{n}" for n in own]
    return found


def trainable_table(model: nn.Module) -> dict[str, dict[str, int]]:
    """Group -> {"tensors", "parameters" trained, "of": all the model has in that group}; empty groups left out.

    With LoRA the trained parameters are the adapter's, and `tensors` the weights that carry one.
    """
    groups = weight_groups(model)
    table = {group: {"tensors": 0, "parameters": 0, "of": 0} for group in GROUPS}
    adapted = adapted_weights(model) if hasattr(model, "peft_config") else {}
    owner = {name: weight for weight, names in adapted.items() for name in names}
    for name, parameter in model.named_parameters():
        row = table[groups[owner.get(name) or plain_name(name)]]
        if name not in owner:
            row["of"] += logical_size(parameter)
        if parameter.requires_grad:
            row["parameters"] += parameter.numel()
            row["tensors"] += name not in owner
    for weight in adapted:
        table[groups[weight]]["tensors"] += 1
    return {group: row for group, row in table.items() if row["of"]}


def format_trainable(model: nn.Module) -> str:
    """The table as text, for people: what trains, and which part of the model stays frozen."""
    table = trainable_table(model)
    rows = [("trains", "tensors", "parameters", "of")]
    rows += [(g, f"{r['tensors']:,}", f"{r['parameters']:,}", f"{r['of']:,}") for g, r in table.items()]
    lines = [f"{a:<15} {b:>8} {c:>15} {d:>17}" for a, b, c, d in rows]
    experts = table.get("routed experts")
    if experts and not experts["parameters"]:
        share = experts["of"] / sum(row["of"] for row in table.values())
        lines.append(
            f"the routed experts, {share:.0%} of the model, stay frozen (student.lora.experts: true)"
        )
    return "\n".join(lines)


def logical_size(parameter: nn.Parameter) -> int:
    """Numbers a parameter stands for: four-bit weights are stored two to a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else torch.Size(state.shape).numel()


# ==== What a checkpoint costs to hold and to run, from its config.json alone ====

DEFAULT_CONTEXT = 1024  # keys each token attends to where no other context is asked for
DEFAULT_DTYPE = torch.bfloat16  # where the config names none: what checkpoints are published and trained in


def describe(model_or_config_dir: str | Path, context: int = DEFAULT_CONTEXT) -> dict[str, Any]:
    """Describe a model folder, a config.json or a hub name by its config; keys as in the module docstring.

    context: tokens held in the cache when `flops_per_token` and `kv_bytes_at_context` are taken.
    Raises UserError for a folder without config.json, an adapter folder, an unknown or invalid config, a
    model that is no causal LM, or one that needs code from its checkpoint (which is never run).
    """
    return describe_config(_load_config(find_file(str(model_or_config_dir))), context)


def describe_config(config: PreTrainedConfig, context: int = DEFAULT_CONTEXT) -> dict[str, Any]:
    """Describe a transformers config. `dtype` is the config's own, or bfloat16. Raises UserError."""
    try:
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=False)
    except Exception as error:  # whatever a family raises for sizes that do not fit together
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"no causal LM can be built from this {config.model_type} config ({reason}); "
            "describe a causal LM, and check the sizes in its config.json"
        ) from error
    return _describe_skeleton(skeleton, config, _config_dtype(config), context)


def describe_model(
    model: nn.Module, context: int = DEFAULT_CONTEXT, experts_per_token: int | None = None
) -> dict[str, Any]:
    """Describe an instantiated transformers model, PEFT-wrapped or not; `dtype` is the base model's own.

    experts_per_token: count what is active as if each token used that many, instead of what the config says.

    Counted on a skeleton built anew from the model's config, so that no wrapper or adapter is mistaken for
    the model; `parameters_adapter` is what the instance holds beyond that skeleton.
    Raises UserError if it holds less (sharded weights). Bytes are those of `dtype`, also where weights are rounded.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    with torch.device("meta"):
        skeleton = type(base)(copy.deepcopy(base.config))
    result = _describe_skeleton(skeleton, base.config, base.dtype, context, experts_per_token)
    adapter = sum(logical_size(p) for p in model.parameters()) - result["parameters_total"]
    if adapter < 0:
        raise UserError(
            f"this {type(base).__name__} holds {-adapter:,} parameters fewer than its config describes "
            "(sharded?); describe its config folder instead"
        )
    result["parameters_adapter"] = adapter
    return result


# ----------------------------------------------------------------------------------------- reading the config


def _load_config(source: str | Path) -> PreTrainedConfig:
    path = Path(source)
    folder = path.parent if path.name == "config.json" else path
    if folder.is_dir() and not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise UserError(f"{folder} is an adapter without config.json; describe the model it adapts")
        raise UserError(f"{folder} has no config.json; name the folder of a saved model")
    check_folder(folder)
    with refusing(
        f"{shown(source)} has no config.json to read", "name a model folder or a hub name like org/name"
    ):
        raw, _ = PreTrainedConfig.get_config_dict(str(folder))
    family = raw.get("model_type")
    if family not in CONFIG_MAPPING:
        if raw.get("auto_map"):
            raise UserError(
                f"{source}: model_type {family!r} needs code from its checkpoint, which is never run; "
                "use a model that transformers implements"
            )
        raise UserError(
            f"{source}: config.json has model_type {family!r}, which this transformers does not know; "
            "correct it, or install a transformers release that has it"
        )
    try:
        return AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # each config class validates in its own way
        reason = " ".join(str(error).split())
        raise UserError(f"{source}: no valid {family} config ({reason}); correct config.json") from error


def _config_dtype(config: PreTrainedConfig) -> torch.dtype:
    dtype = config.dtype or config.get_text_config(decoder=True).dtype
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, None)
    return dtype or DEFAULT_DTYPE


# --------------------------------------------------------------------------------------------------- counting


def _describe_skeleton(
    skeleton: nn.Module, config: PreTrainedConfig, dtype: torch.dtype, context: int, k: int | None = None
) -> dict[str, Any]:
    if context < 1:
        raise UserError(f"context is {context}; give at least 1 token")
    text = config.get_text_config(decoder=True)
    routers = [router if k is None else replace(router, top_k=k) for router in find_routers(skeleton)]
    passes = _passes(text)
    counts = _count_parameters(skeleton, routers, passes)
    layers = [  # a looped layer has a cache of its own for each pass
        found for number, found in _attention_layers(text) for _ in range(passes.get(number, 1))
    ]
    attention = sum(2 * min(context, window) * width for width, _, window in layers)
    return {
        "architecture": type(skeleton).__name__,
        "model_type": config.model_type,
        "dtype": str(dtype).removeprefix("torch."),
        "layers": text.num_hidden_layers,
        "hidden_size": text.hidden_size,
        "vocab_size": text.vocab_size,
        "context_length": getattr(text, "max_position_embeddings", None),
        "parameters_total": counts["total"],
        "parameters_active": counts["active"],
        "parameters_active_without_embeddings": counts["active"] - counts["looked_up"] - counts["tied"],
        "tied": counts["tied"] > 0,
        "parameters_adapter": 0,
        "experts": max((router.num_experts - router.null_experts for router in routers), default=0),
        "experts_per_token": max((router.top_k for router in routers), default=0),
        "assumed_context": context,
        "flops_per_token": 2 * counts["multiplied"] + attention,
        "kv_bytes_per_token": dtype.itemsize * sum(values for _, values, _ in layers),
        # A sliding layer keeps window - 1 tokens: the next token completes its window.
        "kv_bytes_at_context": dtype.itemsize * sum(min(context, w - 1) * values for _, values, w in layers),
        "weight_bytes": counts["total"] * dtype.itemsize,
    }


def _passes(config: PreTrainedConfig) -> dict[int, int]:
    """{layer: how many times a token goes through it}, of the layers of a looped model."""
    passes = getattr(config, "loop_num_passes", None) or 1
    if passes == 1:
        return {}
    return dict.fromkeys(range(config.loop_layer_index_start, config.loop_layer_index_end), passes)


def _count_parameters(model: nn.Module, routers: list[Router], passes: dict[int, int]) -> dict[str, int]:
    """Parameters held (total), used by one token (active), of those looked up alone or looked up and multiplied (tied),
    and products per token (multiplied)."""
    share = {id(p): (r.top_k, r.num_experts) for r in routers for p in _routed_parameters(r)}
    head = model.get_output_embeddings()
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)} - share.keys()
    tied = tables & ({id(head.weight)} if head is not None else set())
    counts = {"total": 0, "active": 0, "looked_up": 0, "tied": 0, "multiplied": 0}
    for name, parameter in model.named_parameters():  # yields a tied weight once
        k, experts = share.get(id(parameter), (1, 1))
        used = parameter.numel() * k // experts
        counts["total"] += parameter.numel()
        counts["active"] += used
        if id(parameter) in tied:
            counts["tied"] += used
        if id(parameter) in tables - tied:
            counts["looked_up"] += used
        elif parameter.ndim > 1 and not name.endswith("bias"):  # stacked expert biases are 2-D: [E, width]
            layer = re.search(r"\.layers\.(\d+)\.", name)
            counts["multiplied"] += used * (passes.get(int(layer[1]), 1) if layer else 1)
    return counts


def _routed_parameters(router: Router) -> list[nn.Parameter]:
    if router.experts is not None:
        return list(router.experts.parameters())
    # Without an `experts` child (jetmoe, doge) the stacked weights are children of the block itself.
    children = [child for child in router.block.children() if child is not router.router]
    return [p for c in children for p in c.parameters() if p.ndim > 1 and p.shape[0] == router.num_experts]


def _attention_layers(config: PreTrainedConfig) -> list[tuple[int, tuple[int, int, int | float]]]:
    """(layer, (n_heads * (d_qk + d_v), values cached per token, window or inf)) of those with a key-value cache.

    Which layers have a cache, and which slide, is what transformers' own cache for this config says.
    """
    found = []
    layers = zip(DynamicCache(config=config).layers, config.per_layer_config)
    for number, (cache, layer) in enumerate(layers):
        heads = getattr(layer, "num_attention_heads", None)
        if heads and isinstance(cache, DynamicLayer):
            window = getattr(cache, "sliding_window", None) or float("inf")
            found.append((number, (*_attention_sizes(layer, heads), window)))
    return found


def _attention_sizes(config: PreTrainedConfig, heads: int) -> tuple[int, int]:
    if getattr(config, "kv_lora_rank", None):
        d_qk = config.qk_nope_head_dim + config.qk_rope_head_dim
        return heads * (d_qk + config.v_head_dim), config.kv_lora_rank + config.qk_rope_head_dim
    d_qk = getattr(config, "head_dim", None) or config.hidden_size // heads
    both = d_qk + (getattr(config, "v_head_dim", None) or d_qk)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return heads * both, kv_heads * both


# --------------------------------------------------------------------------------------------------- printing


def format_description(description: dict[str, Any]) -> str:
    """A short aligned table in SI units (k = 1,000) of what `describe` returns."""
    d = description
    experts = f"{d['experts']:,}, {d['experts_per_token']} of them per token" if d["experts"] else "none"
    at = f"at {d['assumed_context']:,} tokens of context"
    rows = [
        ("layers, width, vocabulary", f"{d['layers']}, {d['hidden_size']:,}, {d['vocab_size']:,}"),
        ("context length", f"{d['context_length']:,}" if d["context_length"] else "not limited"),
        ("parameters, total", _si(d["parameters_total"], "", "B")),
        ("parameters, active", _si(d["parameters_active"], "", "B")),
        (
            "  without embeddings" + (" (tied)" if d["tied"] else ""),
            _si(d["parameters_active_without_embeddings"], "", "B"),
        ),
        ("routed experts", experts),
        ("FLOPs per token, forward", f"{_si(d['flops_per_token'], 'FLOP')} {at}"),
        ("KV cache per token", _si(d["kv_bytes_per_token"], "B")),
        ("KV cache", f"{_si(d['kv_bytes_at_context'], 'B')} {at}"),
        ("weights", f"{_si(d['weight_bytes'], 'B')} in {d['dtype']}"),
    ]
    if d["parameters_adapter"]:
        rows.append(("adapter, not in the above", _si(d["parameters_adapter"], "", "B") + " parameters"))
    width = max(len(label) for label, _ in rows)
    title = f"{d['architecture']} ({d['model_type']})"
    return "\n".join([title, *(f"  {label:<{width}}  {value}" for label, value in rows)])


def _si(value: int, unit: str, giga: str = "G") -> str:
    for scale, prefix in ((1e12, "T"), (1e9, giga), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            return f"{value / scale:.2f} {prefix}{unit}"
    return f"{value} {unit}".rstrip()
