"""`distill doctor`: is this pair fit for this recipe? Asked of configs and tokenizers, before weights are loaded.

    distill doctor RECIPE [key=value ...] [--json]
    findings = examine(recipe)               # list of distill.findings.Finding

A line per check, OK, note, WARN or FAIL, with the fix. Exit code 2 with a FAIL, else 0. Every command that runs a
recipe asks the same checks of its part of it first (distill/preflight.py).
"""

from importlib.util import find_spec
from pathlib import Path

import torch

from distill import footprint, student_checks, token_checks
from distill.config import Recipe
from distill.devices import describe_device
from distill.endpoint import check_endpoint
from distill.errors import UserError
from distill.eval_sections import Evaluate
from distill.findings import FAIL, NOTE, OK, WARN, Finding, collect, failures
from distill.models import check_model, check_weights, resolve_model, tokenizer_fingerprint
from distill.pair import Pair, Side, base_of, model_side
from distill.signals import STORED, SignalFormat, signal_problems
from distill.terms import require


def examine(recipe: Recipe, command: str = "run", weights: bool = False) -> list[Finding]:
    """All findings, in the order of the report. `weights`: their absence is a FAIL rather than a warning.

    A mistake that several checks run into is told by the first of them.
    """
    return list({(f.state, f.text): f for f in reversed(_examine(recipe, command, weights))}.values())[::-1]


def _examine(recipe: Recipe, command: str, weights: bool) -> list[Finding]:
    pair = Pair(recipe, command)
    found = collect("device", _device, pair)
    if any(f.state == FAIL for f in found):
        return found  # nothing below can be judged for a device that is not there
    models = [f for side in pair.sides for f in collect("models", _model, side, weights)]
    found += models
    if recipe.teacher and recipe.teacher.endpoint:
        found += collect("models", _endpoint, pair)
    # Measuring trains nothing; and of a model that is not there nobody knows the terms.
    if command != "evaluate" and not any(f.state == FAIL for f in models):
        found += collect("terms", _terms, pair)
    if pair.does("train"):
        found += collect("precision", student_checks.precision, pair)
        found += collect("trackers", _trackers, pair)
    if any(f.state == FAIL for f in models):
        return found  # what follows reads both configs and tokenizers
    checks = [
        ("vocabulary", token_checks.vocabulary),
        ("chat template", token_checks.template),
        ("end of turn", token_checks.end_of_turn),
        ("context", token_checks.context),
        ("objectives", objectives),
    ]
    if pair.does("train"):
        checks += [("trained", student_checks.trained), ("experts", student_checks.experts)]
    checks.append(("memory", footprint.memory))
    for name, check in checks:
        found += collect(name, check, pair)
    return found


def examine_checkpoints(models: dict[str, str], section: Evaluate, device: torch.device) -> list[Finding]:
    """The same of checkpoints that are only measured, `models` by name: what each reads, its context, its memory."""
    found = []
    for name, path in models.items():
        side = model_side("checkpoint", path)
        loaded = collect("models", _model, side, True)
        found += loaded
        if any(f.state == FAIL for f in loaded):
            continue
        found += token_checks.missing_template(side)
        short = token_checks.fits(side, "--max-new-tokens", section.max_new_tokens, "held-out", None)
        found += [short] if short else []
        has, needs = footprint.device_memory(device), side.facts["weight_bytes"]
        if needs > has:
            text = f"{name}: weights of {footprint.gigabytes(needs)}, and the device has {footprint.gigabytes(has)}"
            found.append(Finding("memory", FAIL, text, "take a larger device or a smaller model"))
    return found


def _device(pair: Pair) -> list[Finding]:
    total = footprint.device_memory(pair.device)
    return [Finding("device", OK, f"{describe_device(pair.device)}, {footprint.gigabytes(total)} of memory")]


def _model(side: Side, weights: bool) -> list[Finding]:
    """That config and tokenizer can be read, and weights where they lie here."""
    found = []
    if side.name:
        folder = Path(resolve_model(side.name))
        empty = folder.is_dir() and not any(
            f.suffix in (".safetensors", ".bin", ".pt", ".pth") for f in folder.iterdir()
        )
        if empty and not weights:
            text = f"{side.label}: {folder} has no weights yet"
            found.append(Finding("models", WARN, text, "put *.safetensors there before a run"))
        elif folder.is_dir():
            check_model(side.name)
            check_weights(Path(base_of(side.name)))
    _ = side.tokenizer
    facts = side.facts
    size = f"{facts['parameters_total']:,} parameters"
    if facts["experts"]:
        size += f" ({facts['parameters_active']:,} active)"
    return [*found, Finding("models", OK, f"{side.label}: {facts['model_type']}, {size}")]


def _endpoint(pair: Pair) -> list[Finding]:
    recipe = pair.recipe
    answered = (recipe.path / "generations" / "manifest.json").is_file()
    if pair.does("generate") and not answered:
        check_endpoint(recipe.teacher.endpoint)
    return [
        Finding(
            "models", OK, f"teacher '{recipe.teacher.model}' answers at {recipe.teacher.endpoint.base_url}"
        )
    ]


def _terms(pair: Pair) -> list[Finding]:
    decision = require(pair.recipe)
    if decision is None:
        return [Finding("terms", OK, "no teacher, no terms")]
    if decision["acknowledged"]:
        return [Finding("terms", NOTE, f"{decision['reason']}; acknowledged: {decision['acknowledged']}")]
    return [Finding("terms", OK, decision["reason"])]


def _trackers(pair: Pair) -> list[Finding]:
    absent = [name for name in pair.recipe.train.trackers if find_spec(name) is None]
    if absent:
        raise UserError(
            f"train.trackers: {', '.join(absent)} not installed; pip install {' '.join(absent)}, or leave it out "
            "(metrics.jsonl is written in any case)"
        )
    return []


def objectives(pair: Pair) -> list[Finding]:
    """That what the objectives read will be there: a live teacher, stored signals, given text."""
    recipe = pair.recipe
    asked = recipe.train.objectives
    if recipe.teacher is None:
        found = [
            f"objective {o.name} needs a teacher, and the recipe has none; name one, or use cross_entropy"
            for o in asked
            if o.live or o.signal in STORED
        ]
    else:
        found = _signals(pair)
        live = [o.name for o in asked if o.live]
        if live and recipe.teacher.endpoint:
            found.append(
                f"objective {live[0]} needs the model itself, and the endpoint of '{recipe.teacher.model}' gives text "
                "alone; use train.objectives='[{name: cross_entropy}]' (distil the text), or a teacher loaded here"
            )
    if found:
        return failures("objectives", UserError(*found))
    return [Finding("objectives", OK, ", ".join(o.name for o in asked))]


def _signals(pair: Pair) -> list[str]:
    """What is wrong with keeping the teacher's signals, with scoring given text, or with training on either."""
    recipe = pair.recipe
    signal, given = recipe.generate.signal, recipe.prompts.completion_column
    found = signal_problems(signal.kind, signal.temperature, recipe.train.objectives)
    if recipe.teacher.endpoint:
        asked = {"generate.signal": signal.kind != "none", "prompts.completion_column": given}
        found += [
            f"{key} needs the logits of '{recipe.teacher.model}', and its endpoint gives text alone; leave it "
            "out, or load the teacher here"
            for key in (key for key, wanted in asked.items() if wanted)
        ]
    elif not found and any(o.signal in STORED for o in recipe.train.objectives):
        teacher = pair.teacher.tokenizer
        form = SignalFormat.from_recipe(signal, len(teacher), tokenizer_fingerprint(teacher))
        found += form.problems(tokenizer_fingerprint(pair.student.tokenizer))
    if given and recipe.prompts.source == "tasks":
        found.append(
            "prompts.completion_column names texts of a file; give the file as prompts.source, or leave it out"
        )
    if given and recipe.generate.samples != 1:
        found.append("prompts.completion_column gives one text to every prompt; set generate.samples=1")
    return found
