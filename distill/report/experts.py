"""What the dossier shows of a mixture of experts: its routing, what becomes of it when changed, and in low precision.

    moe_view("teacher", metrics["models"]["teacher"])       # None for a dense model
    changes_view("teacher", metrics["models"]["teacher"])   # None without interventions

Each function turns one block of metrics.json into figures and rows for templates/dossier_experts.html.j2. Of many
layers the figures show the first, the middle and the last; the tables have all.

Shapes: L routed layers, E experts, k experts per token, G groups of tokens.
"""

from typing import Any

import numpy as np
from markupsafe import Markup

from distill.config.evaluation import SEEN
from distill.report import drawing
from distill.report import figures as draw
from distill.report.drawing import expert_load, heat_map, layer_label, layer_labels, loss_map
from distill.report.pages import absent, called, mark, say

FIGURES = 3  # layers drawn of a model that has more
_SHOWN_ROWS = 12  # rows of a table of extremes
_GROUPINGS = {
    "family": mark("kind of problem"),
    "level": mark("level"),
    "token_class": mark("part of the text"),
}


def few(names: list[str]) -> list[str]:
    """First, middle and last of the layers, in order; all where there are no more."""
    if len(names) <= FIGURES:
        return names
    return [names[round(i * (len(names) - 1) / (FIGURES - 1))] for i in range(FIGURES)]


def _sorted(layers: dict) -> dict:
    return {name: layers[name] for name in drawing.in_order(layers)}


def moe_view(name: str, model: dict) -> dict[str, Any] | None:
    moe = model.get("moe") or {}
    layers = _sorted(moe.get("layers") or {})
    loaded = {layer: values for layer, values in layers.items() if values.get("load")}
    if not loaded:
        return None
    labels = dict(zip(layers, layer_labels(list(layers))))
    rows = []
    for layer, values in loaded.items():
        violation, floor = values.get("max_violation"), values.get("max_violation_noise_floor")
        rows.append((labels[layer], values, None if absent(violation) or not floor else violation / floor))
    figure = expert_load(name, {layer: values["load"] for layer, values in loaded.items()})
    return {
        "name": name,
        "labels": labels,
        "load": Markup(figure),
        "rows": rows,
        "drawn": [labels[layer] for layer in few(list(loaded))],
        "coactivation": _coactivation(loaded, labels),
        "specialisation": _specialisation(loaded, labels),
        "tokens": _favourites(loaded, labels),
        "drop": _drop(loaded, labels),
        "saturation": _saturation(moe.get("saturation") or {}),
    }


def _coactivation(layers: dict, labels: dict) -> dict[str, Any] | None:
    """Matrices of a few layers, and of every layer the strongest pair."""
    found = {name: values.get("coactivation") or {} for name, values in layers.items()}
    figures, pairs = [], []
    for name in few([name for name, block in found.items() if block.get("matrix")]):
        cells = 100 * np.array(found[name]["matrix"], dtype=float)
        np.fill_diagonal(cells, np.nan)
        if found[name].get("uniform"):  # with one expert per token there are no pairs
            title = say("%(layer)s: also at expert …", layer=labels[name])
            experts = [str(expert) for expert in range(len(cells))]
            uniform = 100 * found[name]["uniform"]
            figures.append(Markup(heat_map(title, experts, cells, uniform=uniform, what=say("expert"))))
    for name, block in found.items():
        if block.get("strongest"):
            first, second, share = block["strongest"][0]
            pairs.append((labels[name], first, second, share, _times(share, block.get("uniform"))))
    return {"figures": figures, "pairs": pairs} if figures or pairs else None


def _times(value: float, baseline: float | None) -> float | None:
    return value / baseline if baseline else None


def _specialisation(layers: dict, labels: dict) -> list[dict[str, Any]]:
    """Per way of grouping the tokens: heat maps of a few layers, and what passed the guard against chance."""
    shown = []
    for kind, words in _GROUPINGS.items():
        blocks = {name: (values.get("specialisation") or {}).get(kind) for name, values in layers.items()}
        # A single group differs from nothing.
        found = {name: block for name, block in blocks.items() if block and len(block["groups"]) > 1}
        if not found:
            continue
        figures, rows = [], []
        words = say(words)
        for name in few([name for name, block in found.items() if block.get("share")]):
            cells, baseline = 100 * np.array(found[name]["share"], dtype=float), 100 * found[name]["baseline"]
            groups = [str(group) for group in found[name]["groups"]]
            if kind == "level":
                places = [groups.index(group) for group in drawing.in_order(groups)]
                groups, cells = drawing.in_order(groups), cells[places]
            groups = [called(group) for group in groups]
            figures.append(Markup(heat_map(labels[name], groups, cells, uniform=baseline, what=words)))
        for name, block in found.items():
            for item in block.get("strongest") or []:
                times = _times(item["share"], block["baseline"])
                rows.append({"layer": labels[name], **item, "baseline": block["baseline"], "times": times})
        rows.sort(key=lambda row: -abs(row["share"] - row["baseline"]))
        more = max(0, len(rows) - _SHOWN_ROWS)
        unjudged = all(max(block["answers"], default=0) < SEEN for block in found.values())
        shown.append(
            {
                "words": words,
                "figures": figures,
                "rows": rows[:_SHOWN_ROWS],
                "more": more,
                "unjudged": unjudged,
            }
        )
    return shown


def _favourites(layers: dict, labels: dict) -> list[tuple]:
    """(layer, expert, token, share of that token's occurrences, n), the strongest of all layers."""
    rows = [
        (labels[name], item["expert"], item["token"], item["share"], item["n"])
        for name, values in layers.items()
        for item in (values.get("specialisation") or {}).get("token") or []
    ]
    return sorted(rows, key=lambda row: (-row[3], -row[4]))[:_SHOWN_ROWS]


def _drop(layers: dict, labels: dict) -> dict[str, Any] | None:
    """Rows (layer, [share dropped per capacity factor], [the same, each forward pass with its own capacity])."""
    found = {name: values["token_drop"] for name, values in layers.items() if values.get("token_drop")}
    if not found:
        return None
    factors = sorted({factor for drops in found.values() for factor in drops}, key=float)
    rows = []
    for name, drops in found.items():
        each = layers[name].get("token_drop_batch") or {}
        rows.append((labels[name], [drops.get(f) for f in factors], [each.get(f) for f in factors]))
    return {"factors": factors, "rows": rows}


def _saturation(saturation: dict) -> list[dict[str, Any]]:
    """Per other checkpoint its block, with layers as (label, values)."""
    found = []
    for other, block in saturation.items():
        layers = _sorted(block.get("layers") or {})
        found.append(
            {"other": other, **block, "layers": list(zip(layer_labels(list(layers)), layers.values()))}
        )
    return found


def precision_view(name: str, model: dict) -> dict[str, Any] | None:
    """Rows per precision and per (precision, layer); figures of the loss error and of the flips by layer."""
    entries = model.get("precision") or []
    if not entries:
        return None
    ran = {entry["precision"]: entry for entry in entries if entry.get("ran")}
    errors, lines, layers = {}, {}, []
    for precision, entry in ran.items():
        error = ((entry.get("relative_loss_error") or {}).get("fp32") or {}).get("absolute")
        if precision != "fp32" and not absent(error):
            errors[precision] = 100 * error
        by_layer = _sorted((entry.get("flips") or {}).get("layers") or {})
        labels = layer_labels(list(by_layer))
        layers += [(precision, label, values) for label, values in zip(labels, by_layer.values())]
        if by_layer:
            lines[precision] = (labels, [100 * values["tokens"] for values in by_layer.values()])
    figures = []
    if errors:
        title = say("%(model)s: loss error", model=drawing.short_name(name))
        figures.append(Markup(draw.log_dots(title, errors, say("%% of the fp32 loss"))))
    if lines:
        title = say("%(model)s: tokens rerouted", model=drawing.short_name(name))
        figures.append(Markup(draw.layer_lines(title, lines, say("tokens, %%"))))
    tasks = drawing.in_order({task for entry in ran.values() for task in entry.get("tasks") or {}})
    notes = [(entry["precision"], _how(entry)) for entry in entries]
    shown = {"entries": entries, "layers": layers, "figures": figures, "tasks": tasks, "notes": notes}
    return {"name": name, **shown}


_ARITHMETIC = {
    "fp32": mark("all arithmetic in float32."),
    "bf16": mark("matrix products in bfloat16, weights in float32."),
    "fp16": mark("matrix products in float16, weights in float32."),
    "fp8-emulated": mark(
        "inputs of linear layers are rounded to float8, one scale a block of numbers (emulated)."
    ),
    "fp8-emulated-tensor": mark("the same, with one scale for a whole tensor (emulated)."),
}
_FORMATS = {
    "mxfp4": mark(
        "rounded to MXFP4, 4 bits with a power of two as scale for 32 numbers (emulated): %(what)s."
    ),
    "nvfp4": mark("rounded to NVFP4, 4 bits with a float8 scale for 16 numbers (emulated): %(what)s."),
    "mxfp8": mark(
        "rounded to MXFP8, 8 bits with a power of two as scale for 32 numbers (emulated): %(what)s."
    ),
}
_ROUNDED = {
    "": mark("inputs and weights of linear layers"),
    "-weights": mark("weights of linear layers"),
    "-experts": mark("inputs and weights of routed experts"),
    "-expert-weights": mark("weights of routed experts"),
}


def _how(entry: dict) -> str:
    """A sentence on one precision. Why it did not run is a message of the machine, and stays as it is."""
    if not entry.get("ran"):
        return say("did not run: %(reason)s", reason=entry.get("reason") or "–")
    form, _, which = entry["precision"].partition("-emulated")
    if form in _FORMATS:
        return say(_FORMATS[form], what=say(_ROUNDED[which]))
    known = _ARITHMETIC.get(entry["precision"])
    return say(known) if known else entry.get("reason") or "–"


def changes_view(name: str, model: dict) -> dict[str, Any] | None:
    """Accuracy with other routing: against compute, without each expert, under controls."""
    entries = [
        {**entry, "label": _changed(entry)}
        for entry in model.get("interventions") or []
        if entry.get("tasks")
    ]
    if not entries:
        return None
    tasks = drawing.in_order({task for entry in entries for task in entry["tasks"]})
    whole = next((entry for entry in entries if entry["kind"] == "none"), None)
    drops = {entry["label"]: where for entry in entries if (where := _dropped(entry))}
    figures: dict[str, list] = {"compute": [], "without": _without(name, entries, drops), "controls": []}
    for task in tasks:
        measured = [e for e in entries if task in e["tasks"] and not absent(e["tasks"][task]["accuracy"])]
        points = [
            (str(e["experts_per_token"]), e["tasks"][task], e["flops_per_token"])
            for e in measured
            if e["kind"] in ("none", "top_k")
        ]
        if len(points) > 1:
            now = str(whole["experts_per_token"]) if whole else None
            figures["compute"].append(Markup(draw.compute_panel(task, points, now)))
        others = [e for e in measured if e["kind"] not in ("none", "top_k") and e["label"] not in drops]
        if others:
            scores = {e["label"]: e["tasks"][task] for e in [whole, *others] if e}
            reference = whole["label"] if whole else None
            figures["controls"].append(Markup(draw.score_dots(task, scores, reference)))
    rows = [entry for entry in entries if entry["label"] not in drops]
    single = [entry for entry in entries if entry["label"] in drops]
    single.sort(key=lambda entry: (entry["comparison"] or {}).get("difference") or 0)
    shown = rows + single[:_SHOWN_ROWS]
    return {
        "name": name,
        "figures": figures,
        "rows": shown,
        "more": len(entries) - len(shown),
        "tasks": tasks,
    }


def _changed(entry: dict) -> str:
    """What was changed, in words."""
    kind, value = entry["kind"], entry.get("value")
    if kind == "none":
        return called("as_is")
    if kind == "top_k":
        return say("%(k)s experts per token", k=value) if int(value) != 1 else say("1 expert per token")
    if kind == "route":
        return called(value)
    if kind != "drop":
        return entry["label"]
    places = [place.rpartition(":") for place in value.split("+")]
    gone = [
        say("expert %(e)s of %(layer)s", e=e, layer=layer_label(layer) if layer.isdecimal() else layer)
        for layer, _, e in places
    ]
    return say("without %(experts)s", experts=say(" and ").join(gone))


def _dropped(entry: dict) -> tuple[str, int] | None:
    """(layer, expert) of an entry that takes a single expert out; its value is LAYER:EXPERT, or several with +."""
    if entry["kind"] != "drop" or "+" in entry["value"]:
        return None
    layer, _, expert = entry["value"].rpartition(":")
    return layer, int(expert)


def _without(name: str, entries: list[dict], drops: dict[str, tuple[str, int]]) -> list[Markup]:
    """Heat map of the accuracy lost without each expert, all problems together; none for a few single drops."""
    lost = {
        drops[entry["label"]]: -100 * entry["comparison"]["difference"]
        for entry in entries
        if entry["label"] in drops
        and entry.get("comparison")
        and not absent(entry["comparison"].get("difference"))
    }
    layers = list(dict.fromkeys(layer for layer, _ in lost))
    if len(lost) < 2:
        return []
    cells = np.full((len(layers), 1 + max(expert for _, expert in lost)), np.nan)
    for (layer, expert), value in lost.items():
        cells[layers.index(layer), expert] = value
    labels = [layer_label(layer) if layer.isdecimal() else layer for layer in layers]
    title = say("%(model)s: points of accuracy lost without one expert", model=drawing.short_name(name))
    return [Markup(loss_map(title, labels, cells))]
