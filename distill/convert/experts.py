"""Fewer experts in every routed layer of a mixture: left out, or merged into those that stay.

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

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from distill.config.student_from import Experts
from distill.convert.calibrate import Calibration, ExpertUse, expert_use
from distill.errors import UserError
from distill.models.routers import Router, bare, find_routers

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
