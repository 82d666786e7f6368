"""The model card (README.md) that every trained folder carries: what it is, from what, how it was made, how good.

Cards state the teacher and what its terms say of training on its outputs (`distill/data/provenance.py`). They name a
licence only where all of the model is this project's own: weights from scratch on its procedural problems.

    student_card(recipe, "student", counts, terms)         # at the end of training: all but the scores
    refresh_cards(run_dir, usd_per_device_hour)            # after evaluation: scores, fidelity, training, cost

A card is not among the files a manifest hashes, so writing it again leaves the folder whole.
"""

from pathlib import Path
from typing import Any

import yaml

from distill.config.recipe import Recipe
from distill.console import parameters
from distill.data.ledger import run_ledger
from distill.data.provenance import in_card, terms_lines
from distill.storage import MANIFEST, read_json, write_atomic
from distill.tasks.corpus import text_version

OWN_LICENCE = "mit"
MEASURED_HEADING = "\n## Measured\n"  # where the part begins that `refresh_cards` writes anew


def student_card(recipe: Recipe, arm: str, counts: dict, terms: dict[str, Any] | None = None) -> str:
    """Markdown with the front matter the hub reads. `terms`: the decision recorded with the dataset."""
    base = in_card(recipe.student.model or f"random weights ({recipe.student.config['model_type']})")
    losses = " + ".join(f"{o.weight:g} x {o.name}" for o in recipe.train.objectives)
    if recipe.prompts.documents:
        taught = f" against the next-token distributions of the teacher `{in_card(recipe.teacher.model)}`"
        live = recipe.teacher and any(o.live for o in recipe.train.objectives)
        how = taught if live else ", without a teacher"
        origin = f"Trained on plain text ({in_card(text_version(recipe.prompts.source))}){how}."
        terms_apply = "\n".join(terms_lines(terms)) + "\n" if terms and live else ""
        licence = (
            f"{terms_apply}Terms of the text: those of its source; check them before sharing this model."
        )
    elif recipe.teacher and arm != "control":
        origin = (
            f"Trained on outputs of the teacher `{in_card(recipe.teacher.model)}`, filtered by a verifier."
        )
        unrecorded = "The teacher's terms were not recorded: check them before sharing this model."
        licence = "\n".join(terms_lines(terms)) if terms else unrecorded
    elif recipe.prompts.solutions:
        origin = "Trained on procedurally generated problems with worked steps (`distill/tasks/problems.py`)."
        licence = "Terms: no third-party data or model outputs were used."
        if recipe.prompts.source != "tasks":
            origin = f"Trained on the given solutions of `{in_card(recipe.prompts.source)}`."
            licence = "Terms: those of that file's texts; check them before sharing this model."
    else:
        origin = "Control arm: trained on questions and final answers, without a teacher."
        licence = "Terms: no model outputs were used."
    own = recipe.prompts.solutions and recipe.student.config and recipe.student.tokenizer == "embedded"
    lines = [
        "---",
        *([f"license: {OWN_LICENCE}"] if own else []),
        *([_front_matter("base_model", recipe.student.model)] if recipe.student.model else []),
        "library_name: peft" if recipe.student.adapter == "lora" else "library_name: transformers",
        "pipeline_tag: text-generation",
        "---",
        f"# {in_card(recipe.path.name)}: {arm}",
        "",
        origin,
        "",
        f"- starts from: `{base}`",
        f"- parameters: {_size(recipe, counts)}",
        f"- fine-tuning: {_fine_tuning(recipe)}, {counts['parameters_trainable']:,} parameters trained",
        f"- objective: {losses}",
        f"- steps: {counts['steps']:,} of {recipe.train.batch_size} rows, {counts['tokens']:,} trained tokens",
        f"- precision: {recipe.train.precision}; seed {recipe.seed}",
        "",
        licence,
        "",
    ]
    if recipe.teacher and arm != "control":
        lines += [
            "Flaws of the teacher (wrong rules, refusals, bias) can be inherited; measure before relying on it.",
            "",
        ]
    return "\n".join([*lines, *_recipe(recipe)])


def _size(recipe: Recipe, counts: dict) -> str:
    """Base and adapter apart, as in every table; an adapter is all that LoRA trains."""
    total, trained = counts["parameters_total"], counts["parameters_trainable"]
    if recipe.student.adapter != "lora":
        return parameters(total)
    return f"{parameters(total - trained)} + {parameters(trained)} adapter"


def _recipe(recipe: Recipe) -> list[str]:
    """What differs from the defaults, as a recipe is written; without the server, which is nobody else's business."""
    parts = {"seed", "prompts", "generate", "filter", "student", "train"}
    values = recipe.model_dump(mode="json", include=parts, exclude_defaults=True)
    text = yaml.dump(values, Dumper=_CardDumper, sort_keys=False).strip()
    text = text.replace("<", "\\x3c").replace("`", "\\x60")  # within double quotes alone, see _CardDumper
    return ["<details><summary>Recipe</summary>", "", "```yaml", text, "```", "", "</details>", ""]


class _CardDumper(yaml.SafeDumper):
    """Texts with a tag or a backtick in double quotes, where YAML has escapes for them."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = '"' if set("<`") & set(text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_CardDumper.add_representer(str, _text)


def _fine_tuning(recipe: Recipe) -> str:
    student, lora = recipe.student, recipe.student.lora
    if student.adapter == "full":
        return "full"
    kind = "DoRA" if lora.dora else "rsLoRA" if lora.rslora else "LoRA"
    targets = lora.targets if isinstance(lora.targets, str) else in_card(", ".join(lora.targets))
    parts = [targets, "routed experts" if lora.experts else "", "router" if lora.router else ""]
    on = " and ".join(filter(None, parts))
    base = (
        ""
        if student.quantize == "none"
        else f" over a {student.quantize} base (it loads on the base as stored)"
    )
    return f"{kind} rank {lora.rank} on {on}{base}"


def _front_matter(key: str, value: str) -> str:
    return yaml.safe_dump({key: value}).strip()


# ---- after evaluation --------------------------------------------------------------------------------


def refresh_cards(run_dir: Path, usd_per_device_hour: float | None = None) -> list[Path]:
    """Write what was measured into the cards of `student/` and `control/`; returns the cards written.

    Reads the run folder alone: manifests and eval/metrics.json. May be called again: the part is replaced. A
    finished arm that the evaluation does not know is left as it is. Raises UserError without an evaluation.
    """
    metrics = read_json(run_dir / "eval" / "metrics.json")
    prices = {"usd_per_device_hour": usd_per_device_hour} if usd_per_device_hour else None
    ledger = run_ledger(run_dir, prices)
    written = []
    for arm in ("student", "control"):
        card, manifest = run_dir / arm / "README.md", run_dir / arm / MANIFEST
        if arm in metrics["models"] and manifest.is_file() and card.is_file():
            lines = _measured(arm, metrics, read_json(manifest), ledger)
            text = unmeasured(card.read_text(encoding="utf-8"))
            write_atomic(card, f"{text}{MEASURED_HEADING}\n" + "\n".join(lines) + "\n")
            written.append(card)
    return written


def unmeasured(card: str) -> str:
    """A card without the part that `refresh_cards` adds."""
    return card.partition(MEASURED_HEADING)[0].rstrip("\n") + "\n"


def _measured(arm: str, metrics: dict, manifest: dict, ledger: dict) -> list[str]:
    model = metrics["models"][arm]
    lines = [
        "| held-out problems | n | accuracy | 95 % interval |" + _against_header(arm, metrics),
        "|---|---|---|---|" + "---|" * len(_others(arm, metrics)),
    ]
    for task, score in model["tasks"].items():
        cells = [task, str(score["n"]), _percent(score["accuracy"]), _interval(score["ci95"])]
        cells += [_against(metrics, other, arm, task) for other in _others(arm, metrics)]
        lines.append("| " + " | ".join(cells) + " |")
    if close := model.get("fidelity"):
        lines += [
            "",
            f"On the teacher's own answers ({close['tokens']:,} tokens) its most likely next token is the teacher's in "
            f"{_percent(close['top1_agreement'])}; forward KL {close['forward_kl']:.4f}, reverse KL "
            f"{close['reverse_kl']:.4f} nats per token.",
        ]
    return [*lines, "", *_training(arm, manifest, ledger), "", *_origin(manifest)]


def _others(arm: str, metrics: dict) -> list[str]:
    """The models this arm is compared with: base, and for the student the control."""
    return [c for c in ("base", "control") if c != arm and c in metrics["models"]]


def _against_header(arm: str, metrics: dict) -> str:
    return "".join(f" against {other} |" for other in _others(arm, metrics))


def _against(metrics: dict, other: str, arm: str, task: str) -> str:
    """Difference, its interval and the verdict on `arm`, from the evaluation's comparisons."""
    for item in metrics["comparisons"]:
        if (item["a"], item["b"], item["task"]) == (other, arm, task) and item["difference"] is not None:
            low, high = (100 * x for x in item["ci95"])
            return f"{100 * item['difference']:+.1f} points ({low:+.1f} to {high:+.1f}): {item['verdict']}"
    return "-"


def _training(arm: str, manifest: dict, ledger: dict) -> list[str]:
    """What training used, as far as it was recorded; money only at a price that was given."""
    stage, counts = ledger["stages"][arm], manifest["counts"]
    peak = manifest.get("peak_memory_bytes") or counts.get("peak_memory_bytes")
    facts = [
        ("trained tokens", counts.get("tokens"), ",.0f", ""),
        ("tokens read", counts.get("tokens_read"), ",.0f", ""),
        ("time", stage["seconds"], ",.0f", f" s on {manifest.get('device')}"),
        ("compute", stage["flops"], ".2e", " FLOPs"),
        ("peak memory", peak and peak / 1e9, ".2f", " GB"),
        ("cost of this arm", stage["usd"], ".4f", " USD"),
        ("cost of the run so far, teacher's answers included", ledger["totals"]["usd"], ".4f", " USD"),
    ]
    return [f"- {name}: {value:{form}}{unit}" for name, value, form, unit in facts if value is not None]


def _origin(manifest: dict) -> list[str]:
    """What the arm was made from, by hash, as `distill provenance` follows it."""
    lines = [f"- made from {name}: `{value}`" for name, value in sorted(manifest["inputs"].items())]
    source = manifest.get("base_source") or {}
    lines += [
        f"- base weights {n}: `{entry['hash']}`" for n, entry in sorted(source.get("files", {}).items())
    ]
    lines += [f"- base revision: `{source['revision']}`"] if source.get("revision") else []
    return [*lines, f"- this folder: `{manifest['fingerprint']}` (`distill provenance` checks the chain)"]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _interval(ends: list[float] | None) -> str:
    return "-" if ends is None else f"{ends[0]:.1%} to {ends[1]:.1%}"


# ---- a merged model ----------------------------------------------------------------------------------


# The readings of distill/training/merge.py that are compared with the adapter on its base in fp32.
COMPARISONS = {
    "fp32": "merged, fp32",
    "stored": "written and loaded again",
    "stored_in_fp32": "the same, computing in fp32",
    "unmerged": "adapter on its base, that dtype",
}


def merged_card(name: str, manifest: dict[str, Any], adapter_card: str) -> str:
    """Card of a model that `distill merge` wrote; `adapter_card` is the adapter's own, "" where it has none.

    The adapter's account of its origin and terms goes along; its scores do not, they were measured unmerged.
    """
    front, body = {}, adapter_card
    if adapter_card.startswith("---\n"):
        matter, _, body = adapter_card.removeprefix("---\n").partition("\n---\n")
        front = yaml.safe_load(matter) or {}
    kept = {
        key: front[key]
        for key in ("license", "license_name", "license_link", "tags", "language")
        if key in front
    }
    front = {**kept, "base_model": manifest["config"]["student"]["model"], "library_name": "transformers"}
    front["pipeline_tag"] = "text-generation"
    story = "\n".join(line for line in unmeasured(body).splitlines() if not line.startswith("# ")).strip()
    merge, config = manifest["merge"], manifest["config"]
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).strip(),
        "---",
        f"# {in_card(name)}",
        "",
        f"`{in_card(config['student']['model'])}` with the adapter `{in_card(config['adapter'])}` merged into its "
        "weights, in fp32, "
        f"then stored as {config['dtype'] if config['dtype'] != 'auto' else 'the base is'}.",
        "",
        "## Merge error",
        "",
        f"Against the adapter on its base in fp32, over {merge['fp32']['tokens']:,} tokens:",
        "",
        "| | max logit difference | mean | same top-1 | router choices moved | tokens rerouted |",
        "|---|---|---|---|---|---|",
    ]
    for key, title in COMPARISONS.items():
        found = merge[key]
        moved = [f"{found[k]:.2%}" if k in found else "-" for k in ("router_flip_rate", "tokens_rerouted")]
        cells = [
            f"{found['max_abs']:.2e}",
            f"{found['mean_abs']:.2e}",
            f"{found['top1_agreement']:.2%}",
            *moved,
        ]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    lines += [
        "",
        "Scores of the adapter are in its own card; `distill evaluate` measures this folder.",
        "",
        *(["## The adapter", "", story, ""] if story else []),
    ]
    return "\n".join(lines)
