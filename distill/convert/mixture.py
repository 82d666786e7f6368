"""Experts made, left out and merged: dense to mixture, mixture to dense, and fewer experts in every layer.

Dense to mixture and mixture to dense: the same attention, another kind of MLP.

    student = as_mixture(model, Mixture(experts=4, experts_per_token=2), seed=0)      # sparse upcycling
    student, facts = as_dense(model, Dense(how="concatenate"), calibration)

*To a mixture* (Komatsuzaki et al., arXiv 2212.05055, section 2.1): every expert is a copy of the layer's MLP and the
router is random. The weights of a token's experts sum to 1 in every family used here, so the mixture computes what the
dense model computed, whatever the router says; experts become different as they see different tokens. With a shared
expert, it and the chosen ones count one half each. Every new model is held against the old one before it is kept.

*To a dense model* (arXiv 2605.28207): experts are set side by side as one wide MLP, or averaged into one. Without a
router nothing says how much each counts for a token, so each counts as much as it did on average on the recipe's
prompts, scaled so that all weights together are what they were; shared experts count whole. It is no longer the same
function: training with the mixture as the teacher repairs it.

Which family takes which is a table: the one whose attention, norms and head are the same. Others are refused.

Fewer experts in every routed layer of a mixture: left out, or merged into those that stay.

    student, chosen = fewer_experts(model, Experts(drop=0.5, how="reap"), calibration)

Which stay is asked of the recipe's prompts, layer by layer, as many in each:

- `reap`: the largest mean of router weight times norm of the expert's output, over the tokens that chose it (Lasby et
  al., arXiv 2510.13999, equation 9);
- `frequency`: the most chosen; `random`: drawn by the seed, the control;
- `merge`: those of `reap`, into which the others are averaged, in the manner of REAM (Jha et al., arXiv 2604.04356). An
  expert joins the one whose outputs for the same tokens are likest; its neurons are matched to that one's first, since
  their order means nothing, and weights are averaged by saliency. The paper's likeness also counts router logits, and
  it reads the prompts again behind every merged layer; here both are left out.

The router keeps its rows of those that stay, bias included, and goes on as the family's own code has it.
"""

import copy
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from distill.config.section import Dense, Experts, Mixture
from distill.convert.calibrate import Calibration, ExpertUse, expert_use
from distill.errors import UserError
from distill.models.layers import decoder_layers
from distill.models.routers import Router, bare, find_routers

# dense family: (mixture without a shared expert, mixture with one)
_MIXTURES = {
    "llama": ("mixtral", "glm4_moe"),
    "mistral": ("mixtral", None),
    "qwen3": ("qwen3_moe", "glm4_moe"),
    "qwen2": (None, "qwen2_moe"),
}
_DENSE = {
    "mixtral": "mistral",
    "qwen3_moe": "qwen3",
}  # others of their own family, where its config can say it
_OWN = ("model_type", "architectures", "transformers_version", "_name_or_path", "auto_map")
_MLP = ("gate_proj", "up_proj", "down_proj")
_ROUTER_SCALE = 0.02  # standard deviation of a new router's weights, as in the paper (appendix A)
_SHARED = ("shared_experts", "shared_expert")


# ---------------------------------------------------------------------- to a mixture


def as_mixture(model: PreTrainedModel, section: Mixture, seed: int) -> PreTrainedModel:
    """A mixture that computes what `model` computes; the router is drawn by `seed`. Raises UserError."""
    config = mixture_config(model.config, section)
    _check_mlps(model)
    with torch.device(model.device):
        student = AutoModelForCausalLM.from_config(config).to(model.dtype)
    layers = {router.name: router for router in find_routers(student)}
    old, new = dict(model.state_dict()), {}
    draw = torch.Generator().manual_seed(seed)
    half = 0.5 if section.shared else 1.0
    for name, like in student.state_dict().items():
        block = next((b for b in layers if name.startswith(f"{b}.")), None)
        if block is None:
            _same(name, old.get(name), like, model.config.model_type, config.model_type)
            new[name] = old[name]
        elif like.device.type != "meta":
            new[name] = _of_block(name.removeprefix(f"{block}."), like, _mlp_of(model, block), half, draw)
    if model.device.type != "meta":
        student.load_state_dict(new)
        student.generation_config = copy.deepcopy(model.generation_config)
        student.eval()
        _check_equal(model, student)
    return student.eval()


def mixture_config(config: PreTrainedConfig, section: Mixture) -> PreTrainedConfig:
    """The config of the mixture. Raises UserError for a family that has no partner."""
    plain, shared = _MIXTURES.get(config.model_type, (None, None))
    family = shared if section.shared else plain
    if family is None:
        known = sorted(name for name, pair in _MIXTURES.items() if pair[section.shared])
        hint = "; with `shared: true` it is known" if shared and not plain else ""
        raise UserError(
            f"student.from.mixture: no mixture of experts is known whose other parts are those of a "
            f"{config.model_type} model{hint}; known with shared: {str(section.shared).lower()} are {', '.join(known)}"
        )
    size = config.intermediate_size
    sizes: dict[str, Any] = {
        "mixtral": {"num_local_experts": section.experts},
        "qwen3_moe": {"num_experts": section.experts, "moe_intermediate_size": size, "norm_topk_prob": True,
                      "decoder_sparse_step": 1, "mlp_only_layers": []},
        "qwen2_moe": {"num_experts": section.experts, "moe_intermediate_size": size, "norm_topk_prob": True,
                      "decoder_sparse_step": 1, "mlp_only_layers": [], "shared_expert_intermediate_size": size},
        "glm4_moe": {"n_routed_experts": section.experts, "moe_intermediate_size": size, "n_shared_experts": 1,
                     "first_k_dense_replace": 0, "norm_topk_prob": True, "routed_scaling_factor": 1.0, "n_group": 1,
                     "topk_group": 1, "use_qk_norm": config.model_type == "qwen3"},
    }[family]  # fmt: skip
    return _as_family(config, family, {**sizes, "num_experts_per_tok": section.experts_per_token})


def _as_family(config: PreTrainedConfig, family: str, values: dict[str, Any]) -> PreTrainedConfig:
    """A config of another family with all that both know."""
    known = CONFIG_MAPPING[family]().to_dict()
    given = {key: value for key, value in config.to_dict().items() if key in known and key not in _OWN}
    if family in ("glm4_moe",) and isinstance(given.get("rope_parameters"), dict):
        given["rope_parameters"] = {**given["rope_parameters"], "partial_rotary_factor": 1.0}
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return CONFIG_MAPPING[family](**{**given, "head_dim": head, **values})


def _mlp_of(model: nn.Module, block: str) -> nn.Module:
    number = next(int(part) for part in block.split(".") if part.isdigit())
    return decoder_layers(model)[1][number].get_submodule("mlp")


def _check_mlps(model: PreTrainedModel) -> None:
    for layer in decoder_layers(model)[1]:
        mlp = getattr(layer, "mlp", None)
        names = {name for name, _ in mlp.named_parameters()} if mlp is not None else set()
        if names != {f"{name}.weight" for name in _MLP}:
            raise UserError(
                f"student.from.mixture: the MLP of this {model.config.model_type} model is not gate_proj, up_proj and "
                "down_proj without biases, which experts have; choose another model"
            )


def _same(name: str, old: Tensor | None, new: Tensor, before: str, after: str) -> None:
    if old is None or old.shape != new.shape:
        raise UserError(
            f"student.from: a {after} model needs {name} as {list(new.shape)}, which this {before} model has not; "
            "choose another model"
        )


def _of_block(name: str, like: Tensor, mlp: nn.Module, half: float, draw: torch.Generator) -> Tensor:
    """One tensor of a routed block, from the MLP that stood there."""
    gate, up, down = (getattr(mlp, leaf).weight.detach() for leaf in _MLP)
    if name == "experts.gate_up_proj":
        return torch.cat([gate, up]).expand(len(like), -1, -1)
    if name == "experts.down_proj":
        return (half * down).expand(len(like), -1, -1)
    if name.startswith(_SHARED) and name.split(".")[1] in _MLP:
        # qwen2_moe halves its shared expert itself: the sigmoid of a gate whose weights are 0.
        whole = name.startswith("shared_expert.")
        weight = getattr(mlp, name.split(".")[1]).weight.detach()
        return weight if whole or "down_proj" not in name else half * weight
    if name == "shared_expert_gate.weight" or name.endswith("e_score_correction_bias"):
        return torch.zeros_like(like)
    if name == "gate.weight":
        return (torch.randn(like.shape, generator=draw) * _ROUTER_SCALE).to(like)
    raise UserError(f"student.from.mixture: what {name} should be is not known; choose another model")


@torch.no_grad()
def _check_equal(model: PreTrainedModel, student: PreTrainedModel) -> None:
    """Raises UserError where the two do not compute the same."""
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.randint(vocabulary, (2, 48), generator=torch.Generator().manual_seed(0)).to(model.device)
    before, after = (m(input_ids=ids, use_cache=False).logits.float() for m in (model, student))
    apart, size = float((before - after).abs().max()), float(before.abs().max())
    bound = 1e-4 if model.dtype == torch.float32 else 0.05
    if not apart <= bound * max(1.0, size):
        raise UserError(
            f"student.from: as {student.config.model_type} this {model.config.model_type} model would compute "
            f"something else (logits differ by {apart:.3g}); choose another model"
        )


# ---------------------------------------------------------------------- to a dense model


def as_dense(
    model: PreTrainedModel, section: Dense, calibration: Calibration | None
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """(the dense model, how it was made). Without calibration every expert counts the same. Raises UserError."""
    routers = {router.name: router for router in find_routers(model)}
    _check_experts(model, routers)
    use = expert_use(model, calibration) if calibration and model.device.type != "meta" else {}
    mlps, facts = {}, {"how": section.how, "experts": {}}
    for name, router in routers.items():
        total = router.num_experts
        weights = use[name].mean_weight if use else torch.full((total,), 1.0 / total)
        some = section.experts or router.top_k
        if some > total:
            raise UserError(f"student.from.dense.experts={some}: a layer has {total}; give 1 to {total}")
        kept = (
            list(range(total))
            if section.how == "average"
            else weights.topk(some).indices.sort().values.tolist()
        )
        facts["experts"][name] = kept
        mlps[name] = _one_mlp(router, kept, weights, section.how)
    own = [
        tuple(getattr(layer.mlp, leaf).weight.detach() for leaf in _MLP)
        if hasattr(layer.mlp, "gate_proj")
        else None
        for layer in decoder_layers(model)[1]
    ]
    wide = max(len(gate) for gate, _, _ in [*mlps.values(), *filter(None, own)])
    config = _dense_config(model.config, wide)
    with torch.device(model.device):
        student = AutoModelForCausalLM.from_config(config).to(model.dtype)
    facts["intermediate"] = wide
    old, new = dict(model.state_dict()), {}
    by_layer = {int(next(p for p in name.split(".") if p.isdigit())): mlp for name, mlp in mlps.items()}
    place = next(n for n, m in student.named_modules() if m is decoder_layers(student)[1])
    for name, like in student.state_dict().items():
        number, _, rest = name.removeprefix(f"{place}.").partition(".")
        if name.startswith(f"{place}.") and rest.startswith("mlp."):
            weights = by_layer.get(int(number)) or own[int(number)]
            new[name] = _padded(weights[_MLP.index(rest.split(".")[1])], like)
        else:
            _same(name, old.get(name), like, model.config.model_type, config.model_type)
            new[name] = old[name]
    if model.device.type != "meta":
        student.load_state_dict(new)
        student.generation_config = copy.deepcopy(model.generation_config)
    return student.eval(), facts


def _check_experts(model: PreTrainedModel, routers: dict) -> None:
    kind = model.config.model_type
    if not routers:
        raise UserError(f"student.from.dense: this {kind} model is dense already; leave it out")
    for router in routers.values():
        names = {name for name, _ in bare(router.experts).named_parameters()}
        beside = {name for name, _ in router.block.named_children()} - {"gate", "router", "experts", *_SHARED}
        transposed = getattr(bare(router.experts), "is_transposed", False)
        if names != {"gate_up_proj", "down_proj"} or transposed or beside - {"act_fn"}:
            odd = sorted(beside or names)[0]
            raise UserError(
                f"student.from.dense: the experts of a {kind} model are not MLPs that can be set side by side ({odd}); "
                "choose another model"
            )


def _dense_config(config: PreTrainedConfig, wide: int) -> PreTrainedConfig:
    if hasattr(config, "first_k_dense_replace"):
        config = copy.deepcopy(config)
        config.first_k_dense_replace, config.intermediate_size = config.num_hidden_layers, wide
        return config
    family = _DENSE.get(config.model_type)
    if family is None:
        raise UserError(
            f"student.from.dense: no dense family is known whose other parts are those of a {config.model_type} model; "
            f"known are {', '.join(sorted(_DENSE))} and those with `first_k_dense_replace` (deepseek_v3, glm4_moe, ...)"
        )
    return _as_family(config, family, {"intermediate_size": wide})


def _one_mlp(router, kept: list[int], weights: Tensor, how: str) -> tuple[Tensor, Tensor, Tensor]:
    """(gate [I, d], up [I, d], down [d, I]) for a routed block: its experts, and its shared ones as they are."""
    experts = bare(router.experts)
    up, down = experts.gate_up_proj.detach(), experts.down_proj.detach()  # [E, 2I, d], [E, d, I]
    counts = (weights[kept] * weights.sum() / weights[kept].sum()).to(down)  # together as much as all experts
    if how == "average":
        shares = counts / counts.sum()
        gate, upper = torch.einsum("e,eid->id", shares, up[kept]).chunk(2)
        lower = torch.einsum("e,edi->di", shares, down[kept]) * counts.sum()
    else:
        gates, uppers = zip(*(up[e].chunk(2) for e in kept))
        gate, upper = torch.cat(gates), torch.cat(uppers)
        lower = torch.cat([down[e] * count for e, count in zip(kept, counts)], dim=1)
    for name in _SHARED:
        if (shared := getattr(router.block, name, None)) is not None:
            gate = torch.cat([gate, shared.gate_proj.weight.detach()])
            upper = torch.cat([upper, shared.up_proj.weight.detach()])
            lower = torch.cat([lower, shared.down_proj.weight.detach()], dim=1)
    return gate, upper, lower


def _padded(weight: Tensor, like: Tensor) -> Tensor:
    """A narrower MLP's matrix in a wider one: new neurons as `like` was initialised, and nobody reads them yet."""
    if weight.shape == like.shape:
        return weight
    new = like.clone()
    if weight.shape[0] == like.shape[0]:  # down [d, I]: columns
        new[:, weight.shape[1] :] = 0
        new[:, : weight.shape[1]] = weight
    else:
        new[: len(weight)] = weight
    return new


# ==== Fewer experts in every routed layer of a mixture ====

_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")  # names in configs


def fewer_experts(
    model: PreTrainedModel, section: Experts, calibration: Calibration | None
) -> tuple[PreTrainedModel, dict]:
    """(the model with fewer experts, what was kept). Without calibration the first ones. Raises UserError."""
    routers = find_routers(model)
    count = _check(model, routers, section)
    real = calibration is not None and model.device.type != "meta"
    use: dict[str, ExpertUse] = {}
    if real and section.how != "random":
        use = expert_use(model, calibration, likeness=section.how == "merge")
    draw = torch.Generator().manual_seed(calibration.seed if calibration else 0)
    keep = {}
    for router in routers:
        if use:
            score = use[router.name].chosen if section.how == "frequency" else use[router.name].mean_saliency
        else:
            score = (
                torch.rand(router.num_experts, generator=draw)
                if real
                else -torch.arange(float(router.num_experts))
            )
        keep[router.name] = score.topk(count).indices.sort().values.tolist()
    student = _skeleton(model, routers[0].num_experts, count)
    if model.device.type != "meta":
        old = dict(model.state_dict())
        groups = {}
        if section.how == "merge":
            for router in routers:
                groups[router.name] = joined(use[router.name], keep[router.name])
                old |= _merged(router, groups[router.name], use[router.name].saliency)
        new = {name: taken(name, old[name], like, keep) for name, like in student.state_dict().items()}
        student.load_state_dict(new)
        student.generation_config = copy.deepcopy(model.generation_config)
    return student.eval(), {"how": section.how, "kept": count, "of": routers[0].num_experts, "experts": keep}


def _check(model: PreTrainedModel, routers: list[Router], section: Experts) -> int:
    """How many experts stay. Raises UserError."""
    kind = model.config.model_type
    if not routers:
        raise UserError(
            f"student.from.experts: this {kind} model is dense; leave it out, or give a mixture of experts"
        )
    sizes = {r.num_experts for r in routers}
    if len(sizes) > 1 or any(r.source != "experts" or r.null_experts for r in routers):
        raise UserError(
            f"student.from.experts: the experts of a {kind} model cannot be told apart; keep all of them"
        )
    if any((getattr(bare(r.router), "num_group", 1) or 1) > 1 for r in routers):
        raise UserError(
            f"student.from.experts: this {kind} model chooses experts in groups, which would not be groups any more; "
            "keep all of them"
        )
    total = sizes.pop()
    count = total - max(1, round(total * section.drop))
    most = max(r.top_k for r in routers)
    if count < most:
        raise UserError(
            f"student.from.experts.drop={section.drop}: {max(count, 0)} of {total} experts would stay, and a token "
            f"uses {most}; give {1 - most / total:g} or less"
        )
    if section.how == "merge" and (reason := _not_merged(routers)):
        raise UserError(f"student.from.experts.how=merge: {reason}; use reap")
    return count


def _not_merged(routers: list[Router]) -> str | None:
    for router in routers:
        experts = bare(router.experts)
        names = {name for name, _ in experts.named_parameters()}
        if names != {"gate_up_proj", "down_proj"} or getattr(experts, "is_transposed", False):
            return f"{router.name}: the neurons of its experts cannot be matched ({', '.join(sorted(names))})"
    return None


def _skeleton(model: PreTrainedModel, before: int, after: int) -> PreTrainedModel:
    config = copy.deepcopy(model.config)
    text: PreTrainedConfig = config.get_text_config(decoder=True)
    named = [name for name in _COUNTS if getattr(text, name, None) == before]
    if not named:
        raise UserError(
            f"student.from.experts: the config of this {config.model_type} model does not say how many experts it has"
        )
    for name in named:
        setattr(text, name, after)
    with torch.device(model.device):
        return type(model)(config).to(model.dtype)


def taken(name: str, old: Tensor, like: Tensor, keep: dict[str, list[int]]) -> Tensor:
    """One tensor of the new model: the kept experts along the axis that became shorter. Others as they are."""
    if old.shape == like.shape:
        return old
    router = next(r for r in keep if name.startswith(f"{r}."))
    axis = next(a for a in range(old.ndim) if old.shape[a] != like.shape[a])
    return old.index_select(axis, torch.tensor(keep[router], device=old.device))


# ---------------------------------------------------------------------- merging


def joined(use: ExpertUse, keep: list[int]) -> dict[int, list[int]]:
    """{expert that stays: it and those that join it}: the one whose outputs are likest, from the most salient on."""
    groups = {expert: [expert] for expert in keep}
    rest = [e for e in use.mean_saliency.argsort(descending=True).tolist() if e not in groups]
    for expert in rest:
        groups[max(keep, key=lambda k: float(use.likeness[expert, k]))].append(expert)
    return groups


def _merged(router: Router, groups: dict[int, list[int]], saliency: Tensor) -> dict[str, Tensor]:
    """The router's expert weights, each that stays being the mean of its group."""
    experts = bare(router.experts)
    up, down = (
        experts.gate_up_proj.detach().clone(),
        experts.down_proj.detach().clone(),
    )  # [E, 2I, d], [E, d, I]
    for stays, group in groups.items():
        shares = saliency[group].clamp(min=1e-12)
        shares = (shares / shares.sum()).tolist()
        new_up, new_down = 0, 0
        for expert, share in zip(group, shares):
            order = matched(experts.gate_up_proj[stays], experts.down_proj[stays], up[expert], down[expert])
            half = len(order)
            new_up = new_up + share * experts.gate_up_proj[expert].detach()[torch.cat([order, order + half])]
            new_down = new_down + share * experts.down_proj[expert].detach()[:, order]
        up[stays], down[stays] = new_up, new_down
    return {f"{router.name}.experts.gate_up_proj": up, f"{router.name}.experts.down_proj": down}


def matched(up: Tensor, down: Tensor, other_up: Tensor, other_down: Tensor) -> Tensor:
    """[I]: for every neuron of an expert (gate_up [2I, d], down [d, I]) the neuron of the other that is likest.

    Likest in the weights that make it and the ones that read it; each is used once (Hungarian method).
    """

    def neurons(a: Tensor, b: Tensor) -> Tensor:
        gate, upper = a.detach().float().chunk(2)
        return torch.nn.functional.normalize(torch.cat([gate, upper, b.detach().float().T], dim=1), dim=1)

    likeness = neurons(up, down) @ neurons(other_up, other_down).T
    _, columns = linear_sum_assignment(likeness.cpu().numpy(), maximize=True)
    return torch.from_numpy(columns).to(up.device)
