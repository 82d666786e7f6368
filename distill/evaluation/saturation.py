"""How far the routing of one checkpoint is that of another: router saturation, on the same tokens.

    saturation_between(base, student, pairs, pad_id)       # {"overlap": 0.97, "top1": 0.96, "layers": {...}}

OLMoE (arXiv 2409.02060, section 5.1) compares checkpoints of one run with the last one: mean over tokens of
|S_a & S_b| / k, the share of a token's experts that both chose, and the same for the heaviest expert alone. Two
unrelated routers agree on k / E of the experts. It means something where expert i of one checkpoint *is* expert i
of the other, grown from the same weights; the shapes of two models cannot tell that, the caller must know.

`distill evaluate A B` does it by itself for all checkpoints with the same experts, on the answers of the last one.

Shapes: T tokens, E experts, k experts per token.
"""

from collections.abc import Callable, Sequence
from typing import Any

from distill.errors import UserError
from distill.evaluation.routing import finished, route_rows, token_pairs
from distill.models.routers import find_routers
from distill.moe.metrics import overlap
from distill.moe.recording import Decisions

_SHAPE = ("architecture", "layers", "hidden_size", "vocab_size", "experts", "experts_per_token")


def saturation(a: dict[str, Decisions], b: dict[str, Decisions]) -> dict[str, dict[str, float]]:
    """Per layer `overlap`, mean |S_a & S_b| / k, and `top1`, share of tokens with the same heaviest expert.

    a, b: decisions [T, k] on the same T tokens, heaviest weight first (`distill.evaluation.routing`). ValueError if the
    layers, the tokens or k differ.
    """
    if a.keys() != b.keys():
        raise ValueError(f"different routed layers: {', '.join(sorted(a.keys() ^ b.keys()))}")
    return {
        name: {
            "overlap": float(overlap(a[name].indices, b[name].indices).mean()),
            "top1": float((a[name].indices[:, 0] == b[name].indices[:, 0]).double().mean()),
        }
        for name in a
    }


def saturation_between(
    model_a, model_b, rows: Sequence[tuple[Sequence[int], Sequence[int]]], pad_id: int, batch_size: int = 64
) -> dict[str, Any]:
    """`saturation` of two models over `rows` of (prompt_ids, completion_ids), in bounded memory.

    `overlap` and `top1` are plain means over layers (all see the same tokens), `uniform` is k / E. Raises
    UserError if the two do not have the same routed layers.
    """
    shapes = [[(r.name, r.num_experts, r.top_k) for r in find_routers(model)] for model in (model_a, model_b)]
    if shapes[0] != shapes[1]:
        raise UserError(
            "saturation compares checkpoints of one model; these two have other layers or experts"
        )
    sums: dict[str, dict[str, float]] = {}
    tokens = 0
    both = (route_rows(model, rows, pad_id, batch_size) for model in (model_a, model_b))
    for a, b in zip(*both, strict=True):
        tokens += len(a.answer)
        for name, found in saturation(a.layers, b.layers).items():
            total = sums.setdefault(name, {"overlap": 0.0, "top1": 0.0})
            for key, value in found.items():
                total[key] += value * len(a.answer)
    layers = {name: {key: value / tokens for key, value in found.items()} for name, found in sums.items()}
    means = {key: sum(found[key] for found in layers.values()) / len(layers) for key in ("overlap", "top1")}
    uniform = sum(k / experts for _, experts, k in shapes[0]) / len(shapes[0])
    return {"tokens": tokens, **means, "uniform": uniform, "layers": layers}


def comparable(results: dict[str, dict], teacher: str | None = None) -> list[tuple[str, list[str]]]:
    """[(last, [others])] among evaluated checkpoints: groups with the same experts, by models.<name>.model.

    `results[name]["model"]` is what `describe_model` gives. A teacher is nobody's checkpoint and left out.
    """
    groups: dict[tuple, list[str]] = {}
    for name, result in results.items():
        if name != teacher and result["model"]["experts"]:
            groups.setdefault(tuple(result["model"][key] for key in _SHAPE), []).append(name)
    return [(names[-1], names[:-1]) for names in groups.values() if len(names) > 1]


def add_saturation(
    results: dict[str, dict],
    rows_of: dict[str, list[dict]],
    problems: list[dict],
    load: Callable[[str], tuple[Any, Any]],
    teacher: str | None = None,
    limit: int = 1000,
) -> None:
    """Put `moe.saturation.<last>` into the results of every checkpoint with the same experts as a later one.

    load: name -> (model, tokenizer). On at most `limit` answers of the last, which both read; those with another
    vocabulary are left out.
    """
    for last, others in comparable(results, teacher):
        answers = finished(rows_of[last], limit)
        if not answers:
            continue
        model, tokenizer = load(last)
        pairs = token_pairs(tokenizer, answers, problems)
        for name in others:
            other, other_tokenizer = load(name)
            if other_tokenizer.get_vocab() == tokenizer.get_vocab():
                found = saturation_between(other, model, pairs, tokenizer.pad_token_id)
                results[name].setdefault("moe", {"layers": {}}).setdefault("saturation", {})[last] = found
