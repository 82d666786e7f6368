"""What a finished run is compared by: names for numbers that its manifests and metrics.json already hold.

    read_metrics(Path("checkpoints/claims/student-0"))     # {"accuracy.hard": 0.61, "train.flops": 1.3e12, ...}

A metric a run does not have (routing of a dense model, training of a checkpoint) is absent. Each has a unit for
tables; shares are 0 to 1 in files and per cent on pages.
"""

import json
import re
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.report.pages import called, lookup, mark, say
from distill.storage import MANIFEST, read_json


@dataclass(frozen=True)
class Metric:
    unit: str  # "%" for shares
    words: str

    @property
    def label(self) -> str:
        """For an axis or the head of a column."""
        if not self.unit or self.unit.rstrip("s") in self.words:
            return self.words
        return say("%(words)s, %(unit)s", words=self.words, unit=unit_words(self.unit, True))


_UNITS = (mark("nats/token"), mark("tokens"), mark("s"))  # the others are the same in every language


def unit_words(unit: str, relative: bool) -> str:
    """A unit as a reader calls it. A difference of shares is in points, a relative one in %."""
    if unit == "%":
        return "%" if relative else say("points")
    return lookup(unit) if unit in _UNITS else unit


METRICS = {
    "accuracy.easy": Metric("%", mark("easy problems solved")),
    "accuracy.medium": Metric("%", mark("medium problems solved")),
    "accuracy.hard": Metric("%", mark("hard problems solved")),
    "accuracy.mean": Metric("%", mark("problems solved, mean of the levels")),
    "nll.easy": Metric("nats/token", mark("worked solutions of easy test problems, read after the question")),
    "nll.medium": Metric(
        "nats/token", mark("worked solutions of medium test problems, read after the question")
    ),
    "nll.hard": Metric("nats/token", mark("worked solutions of hard test problems, read after the question")),
    "tokens.answer": Metric("tokens", mark("mean length of an answer")),
    "loss.train": Metric("nats/token", mark("training loss, smoothed")),
    "loss.held_out": Metric("nats/token", mark("loss on held-out rows")),
    "moe.max_violation": Metric("", mark("MaxVio, the worst layer (0 is perfect balance)")),
    "moe.load_entropy": Metric("", mark("load entropy over its maximum, mean of the layers")),
    "moe.family_spread": Metric("%", mark("how far a family's expert load is from the overall one, mean")),
    "train.flops": Metric("FLOPs", mark("training FLOPs")),
    "train.tokens": Metric("tokens", mark("completion tokens trained on")),
    "train.tokens_sampled": Metric(
        "tokens", mark("tokens that the student read and wrote to make its own rows")
    ),
    "train.seconds": Metric("s", mark("training seconds")),
    "train.steps": Metric("", mark("optimizer steps")),
    "parameters.total": Metric("", mark("parameters")),
    "parameters.active": Metric("", mark("parameters active per token")),
    "parameters.trainable": Metric("", mark("parameters that train")),
    "bytes.training_state": Metric("B", mark("gradients and Adam moments of what trains")),
    "bytes.saved": Metric("B", mark("what a micro-batch's forward pass keeps for its backward pass")),
    "ahead.acceptance": Metric("%", mark("drafts of the module that were the model's own next token")),
    "ahead.tokens_per_pass": Metric("", mark("tokens that a pass of the model brings, 1 without drafts")),
    "cost.flops_per_answer": Metric("FLOPs", mark("FLOPs per answer")),
    "cost.flops_per_token": Metric("FLOPs", mark("forward FLOPs per token")),
    "cost.usd_per_million": Metric("USD", mark("USD per million tokens written, as measured in this run")),
}
_WITH_K = re.compile(r"k(\d+)\.(accuracy\.(?:easy|medium|hard)|cost\.(?:flops_per_token|usd_per_million))")
_OF_TEXT = re.compile(r"text\.(.+)\.(nll|kl|agreement)")
_IN = re.compile(r"in\.([a-z0-9-]+)\.(nll|kl|flips|bytes|accuracy\.\w+)")
_PRECISION = {
    "nll": Metric("nats/token", mark("completions, read in %(precision)s")),
    "kl": Metric("nats/token", mark("KL from the model in fp32 to itself in %(precision)s")),
    "flips": Metric("%", mark("expert choices that %(precision)s changes")),
    "bytes": Metric("B", mark("weights in %(precision)s, the others in 16 bits")),
    "accuracy": Metric("%", mark("%(level)s problems solved in %(precision)s")),
}
_TEXT = {
    "nll": Metric("nats/token", mark("the text %(text)s, read by the model")),
    "kl": Metric("nats/token", mark("KL from the teacher to the model on the text %(text)s")),
    "agreement": Metric(
        "%", mark("tokens of the text %(text)s of which model and teacher find the same one likeliest")
    ),
}
MODEL = "student"  # the name under which every run's model is measured
TEACHER = "teacher"  # and of what it is compared with, where `evaluate.models` asks for it


def metric(name: str) -> Metric:
    """One of METRICS; `flaw.NAME`, the share of probes that show a flaw; `kN.NAME`, with N experts per token;
    `text.NAME.nll`, `.kl` and `.agreement` of a text (`evaluate.text`); `in.PRECISION.nll`, `.kl`, `.flips`, `.bytes`,
    `.accuracy.LEVEL` in another precision (`evaluate.precisions`). KeyError for another."""
    if name.startswith("flaw."):
        return Metric("%", say("probes that show %(flaw)s", flaw=called(name[5:]).replace("_", " ")))
    if found := _WITH_K.fullmatch(name):
        of = METRICS[found[2]]
        return Metric(of.unit, say("%(words)s, %(n)s experts per token", words=lookup(of.words), n=found[1]))
    if found := _OF_TEXT.fullmatch(name):
        of = _TEXT[found[2]]
        return Metric(of.unit, lookup(of.words) % {"text": found[1]})
    if found := _IN.fullmatch(name):
        kind, _, level = found[2].partition(".")
        of = _PRECISION[kind]
        return Metric(of.unit, lookup(of.words) % {"level": called(level), "precision": found[1]})
    return Metric(METRICS[name].unit, lookup(METRICS[name].words))


def is_metric(name: str) -> bool:
    known = name in METRICS or name.startswith("flaw.")
    return known or any(p.fullmatch(name) for p in (_WITH_K, _OF_TEXT, _IN))


def read_metrics(run: Path) -> dict[str, float]:
    """All metrics of METRICS that this run folder has."""
    found: dict[str, float] = {}
    if (run / "eval" / "metrics.json").is_file():
        found |= _measured(read_json(run / "eval" / "metrics.json")["models"][MODEL])
    if (run / "student" / MANIFEST).is_file():
        found |= _trained(run / "student")
    if (run / "probes.json").is_file():
        found |= {
            f"flaw.{name}": flaw["share"] for name, flaw in read_json(run / "probes.json")["flaws"].items()
        }
    return {name: value for name, value in found.items() if value is not None}


def _measured(model: dict[str, Any]) -> dict[str, float | None]:
    from distill.evaluation.usage import usd_per_million

    tasks, about, cost = model["tasks"], model["model"], model["cost"]
    scores = {f"accuracy.{level}": score["accuracy"] for level, score in tasks.items()}
    found = {
        **scores,
        **{f"nll.{level}": score["nll_per_token"] for level, score in (model.get("solutions") or {}).items()},
        "accuracy.mean": statistics.fmean(scores.values()),
        "tokens.answer": statistics.fmean(score["mean_tokens"] for score in tasks.values()),
        "parameters.total": about["parameters_total"],
        "parameters.active": about["parameters_active"],
        "cost.flops_per_token": about["flops_per_token"],
        "cost.flops_per_answer": cost["flops_per_answer"],
        "cost.usd_per_million": cost.get("usd_per_million_output_tokens"),
    }
    for key in ("acceptance", "tokens_per_pass"):
        found[f"ahead.{key}"] = (cost.get("ahead") or {}).get(key)
    for entry in model.get("interventions") or []:
        if entry["kind"] in ("none", "top_k"):
            k = f"k{entry['experts_per_token']}"
            found |= {f"{k}.accuracy.{level}": score["accuracy"] for level, score in entry["tasks"].items()}
            found[f"{k}.cost.flops_per_token"] = entry["flops_per_token"]
            if price := cost.get("usd_per_hour"):
                speed = entry.get("decode_tokens_per_second")
                found[f"{k}.cost.usd_per_million"] = usd_per_million(price, speed)
    for name, text in (model.get("text") or {}).items():
        found[f"text.{name}.nll"] = text["nll_per_token"]
        if beside := text.get("teacher"):
            found[f"text.{name}.kl"] = beside["forward_kl"]
            found[f"text.{name}.agreement"] = beside["top1_agreement"]
    for entry in model.get("precision") or []:
        found |= _in_precision(entry)
    layers = list(model.get("moe", {}).get("layers", {}).values())
    if layers:
        found["moe.max_violation"] = max(layer["max_violation"] for layer in layers)
        found["moe.load_entropy"] = statistics.fmean(layer["load_entropy"] for layer in layers)
        found["moe.family_spread"] = _family_spread(layers)
    return found


def _in_precision(entry: dict[str, Any]) -> dict[str, float | None]:
    if not entry["ran"]:
        return {}
    name = f"in.{entry['precision']}"
    return {
        f"{name}.nll": entry["nll_per_token"],
        f"{name}.kl": entry.get("kl"),
        f"{name}.flips": entry.get("flips", {}).get("slots"),
        f"{name}.bytes": entry.get("weight_bytes"),
        **{f"{name}.accuracy.{level}": score["accuracy"] for level, score in entry.get("tasks", {}).items()},
    }


def _family_spread(layers: list[dict]) -> float | None:
    """Total variation between a task family's load and that of all tokens, mean over families and layers."""
    distances = []
    for layer in layers:
        groups = layer.get("specialisation", {}).get("family")
        for share in groups["share"] if groups else []:
            routed = sum(share)  # k: a group's shares are of its tokens, each of which goes to k experts
            distances.append(sum(abs(s / routed - load) for s, load in zip(share, layer["load"])) / 2)
    return statistics.fmean(distances) if distances else None


def _trained(folder: Path) -> dict[str, float | None]:
    manifest = read_json(folder / MANIFEST)
    counts = manifest["counts"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    held_out = [line["validation"] for line in lines if line.get("validation") is not None]
    trainable = counts["parameters_trainable"]
    return {
        "loss.train": smoothed([line["loss"] for line in lines])[-1],
        "loss.held_out": held_out[-1] if held_out else None,
        "train.flops": manifest["flops"],
        "train.tokens": counts["tokens"],
        "train.tokens_sampled": counts.get("tokens_sampled"),
        "train.seconds": manifest["seconds"],
        "train.steps": counts["steps"],
        "parameters.trainable": trainable,
        "bytes.saved": counts.get("saved_bytes"),
        "bytes.training_state": 12 * trainable,  # float32: one gradient, two moments
    }


SMOOTHING = 0.9


def smoothed(losses: list[float], keep: float = SMOOTHING) -> list[float]:
    """Exponential average, each step weighing `keep` times the next; the first ones are not biased to 0."""
    average, weight, curve = 0.0, 0.0, []
    for loss in losses:
        average, weight = keep * average + (1 - keep) * loss, keep * weight + (1 - keep)
        curve.append(average / weight)
    return curve
