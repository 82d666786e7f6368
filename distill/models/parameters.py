"""What the parameters of a model are for, and which of them train: a table by group, from structure alone.

    weight_groups(model)["model.layers.0.mlp.experts.down_proj"]          # "routed experts"
    print(format_trainable(model))                                       # for a manifest: trainable_table(model)

Works on dense and MoE causal LMs of transformers, with a PEFT adapter or without, quantised or not, and on the meta
device. No list of model families is kept: routers and experts are those that `distill.models.routers` finds.
"""

import torch
from torch import nn

from distill.models.routers import Router, bare, bare_model, find_routers

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
