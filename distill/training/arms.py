"""The training stages: `base/` where one is made, the student on the dataset, the control on answers only.

The stage `base/`: a student made from a model (`student.from`), as a folder that everything after it starts from.

    student: {from: {model: checkpoints/smollm2, layers: 10}, adapter: full}
    student: {from: {model: checkpoints/teacher, experts: {drop: 0.5, how: reap}}, adapter: full}

The folder is an ordinary checkpoint with card and manifest, and `student.model` of the recipe is its path: training,
evaluation (as `base`), the play page and provenance take it as they take any other. It is made before anything else,
in seconds; a choice by activation reads the recipe's prompts, which are drawn for it. `distill doctor` and `--dry-run`
look at a copy without weights (`planned_base`).

The training stages: the student on the dataset, and the control arm on answers only, in equal shares.

    distill train RECIPE        (or under `accelerate launch`; see distill/training/train.py)

Both arms start from the same weights, with the same adapter, prompts, optimizer steps and seed; they differ in
their targets alone. Without the control a gain could be more training rather than the teacher.
"""

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from distill.config.recipe import BASE_FOLDER, Recipe, resolved
from distill.config.training import LiveTeachers, Objective, OnPolicy
from distill.convert.calibrate import calibration_of
from distill.convert.derive import Made, derived, derived_config
from distill.data.batches import TokenRows
from distill.data.cards import student_card
from distill.data.prompts import source_hash
from distill.data.provenance import card_metadata, model_source
from distill.data.signals import HIDDEN, STORED, SignalFormat
from distill.devices import describe_device, from_all, main_decides, peak_memory, pick_device
from distill.errors import UserError
from distill.models.chat import check_prompts
from distill.models.describe import describe_model, format_trainable, logical_size, trainable_table
from distill.models.hooks import output_head
from distill.models.load import (
    check_model,
    eos_ids,
    load_config,
    load_model,
    load_tokenizer,
    resolve_model,
    tokenizer_fingerprint,
)
from distill.models.precision import Precision, lost_steps, matrices, resolve_precision
from distill.models.student import BuiltStudent, build_student, save_student, student_tokenizer
from distill.stages import Stage, input_fingerprint
from distill.storage import MANIFEST, read_json, read_rows
from distill.training.checkpoint import BEST, drop_states, whole_state_dict
from distill.training.log import split_rows
from distill.training.open_teachers import live_teachers, told
from distill.training.sources import OnPolicyRows, Source, StoredRows
from distill.training.train import compilation, make_accelerator, train_student

_KEPT = ("license", "license_name", "license_link", "language")  # of the card of the model it is made from


def make_base(recipe: Recipe, redo: bool = False) -> dict[str, Any]:
    """Run the stage; returns its manifest. Raises UserError for a model that cannot be cut so."""
    section = recipe.student.made_from
    for name in (section.model, *section.average):
        check_source(name)
    source, *others = (model_source(name) for name in (section.model, *section.average))
    config = {**recipe.base_identity, "source": source.get("files") or source.get("revision")}
    if others:
        config["averaged"] = [other.get("files") or other.get("revision") for other in others]
    if section.reads and recipe.prompts.source != "tasks":
        config["source_hash"] = source_hash(recipe.prompts.source)
    stage = Stage(recipe.path, BASE_FOLDER, config, inputs={})
    if stage.done(redo):
        return stage.manifest
    whole = load_model(section.model, "fp32", training=True)
    tokenizer = load_tokenizer(section.model, recipe.student.chat_template_kwargs)
    before = _parameters(whole)
    made = derived(whole, section, calibration_of(recipe, whole, tokenizer))
    del whole
    counts = {"rows": 0, "errors": 0, "parameters_before": before, "parameters": _parameters(made.model)}
    stage.begin(redo)
    save_student(
        made.model, tokenizer, stage.folder, base_card(recipe.path.name, section.model, made, counts)
    )
    return stage.finish(counts, device="cpu", base_source=source, did=made.did, **made.chosen)


def check_source(name: str) -> None:
    """A whole model, no adapter. Raises UserError."""
    if (Path(resolve_model(name)) / "adapter_config.json").is_file():
        raise UserError(f"student.from.model '{name}' is an adapter; merge it first (distill merge)")
    check_model(name)


@contextlib.contextmanager
def planned_base(recipe: Recipe) -> Iterator[Recipe]:
    """The recipe with a base that has config and tokenizer but no weights, where the real one is not there yet."""
    section = recipe.student.made_from
    if section is None or (recipe.path / BASE_FOLDER / "config.json").is_file():
        yield recipe
        return
    check_source(section.model)
    with tempfile.TemporaryDirectory(prefix="distill-") as folder:
        base = Path(folder) / BASE_FOLDER
        derived_config(load_config(section.model), section).save_pretrained(base)
        load_tokenizer(section.model, recipe.student.chat_template_kwargs).save_pretrained(base)
        student = recipe.student.model_copy(update={"model": str(base)})
        yield recipe.model_copy(update={"student": student})


def base_card(name: str, source: str, made: Made, counts: dict[str, int]) -> str:
    """The model card: what it was made from, how, and that it is not trained since."""
    given = card_metadata(source)
    front = {key: given[key] for key in _KEPT if key in given}
    front |= {"base_model": given.get("base_model", source), "library_name": "transformers"}
    front["pipeline_tag"] = "text-generation"
    share = counts["parameters"] / counts["parameters_before"]
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).strip(),
        "---",
        f"# {name}: base",
        "",
        f"Made from `{source}`: {'; '.join(made.did)}.",
        "",
        f"- parameters: {counts['parameters_before']:,} before, {counts['parameters']:,} after ({share:.0%})",
        *(f"- {key}: {shown}" for key, shown in _choices(made.chosen)),
        "- not trained since: what was left out is missing until it is",
        "- terms: those of the model that it was made from",
        "",
    ]
    return "\n".join(lines)


def _choices(chosen: dict[str, Any]) -> list[tuple[str, str]]:
    """What was kept, for the card."""
    found = [("layers kept", ", ".join(map(str, chosen["layers"])))] if "layers" in chosen else []
    for key in ("experts", "dense"):
        for layer, experts in chosen.get(key, {}).get("experts", {}).items():
            found.append((f"experts of {layer}", ", ".join(map(str, experts))))
    return found


def _parameters(model) -> int:
    return sum(p.numel() for p in model.parameters())


# ==== The training stages ====

# Keys of `train` that change how a run proceeds, not what it computes: they may differ on resume.
NOT_IDENTITY = {
    **dict.fromkeys(
        ("checkpoint_every", "trackers", "micro_batch_size", "micro_batch_tokens", "auto_micro_batch", "packing"), True
    ),
    **dict.fromkeys(("attention", "compile", "tf32", "deterministic"), True),
    "teachers": {"remember_gb"},
}  # fmt: skip

# Of `teacher`: how it writes and where it sits, which no score depends on.
_WRITING = {"terms", "device", "engine", "engine_options", "draft", "draft_tokens"}


def train_arms(recipe: Recipe, redo: bool = False, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Train what is not finished: `student/`, and `control/` where enabled. Returns manifests by arm."""
    pick_device(recipe.device, recipe.threads)
    arms = {"student": recipe}
    if recipe.control.enabled:
        # Answers only: there is no teacher, so every objective that needs one falls away.
        own = [o for o in recipe.train.objectives if o.signal in ("own_routers", "ahead")]
        text = [] if any(o.frozen for o in own) else [Objective(name="cross_entropy")]
        update = {
            "objectives": [*text, *own],
            "on_policy": OnPolicy(),
            "teachers": LiveTeachers(),
        }
        plain = recipe.train.model_copy(update=update)
        arms["control"] = recipe.model_copy(update={"train": plain})
    text = resolved(recipe)  # of the run, whichever arm begins
    return {arm: train_arm(arm_recipe, arm, redo, say, text) for arm, arm_recipe in arms.items()}


def train_arm(
    recipe: Recipe,
    arm: str,
    redo: bool = False,
    say: Callable[[str], None] = print,
    text: str | None = None,
) -> dict[str, Any]:
    """Train one arm into its folder; returns its manifest. On several processes, rank 0 keeps the folder.

    `text`: the run's resolved recipe, for its recipe.yaml.
    """
    device = pick_device(recipe.device, recipe.threads)
    precision = resolve_precision(recipe.train.precision, device)
    needs_teacher = any(o.live for o in recipe.train.objectives)  # itself, or its stored states
    data = recipe.path / "dataset" / ("control" if arm == "control" else "")
    inputs = {"dataset": input_fingerprint(recipe.path / "dataset", "filter RECIPE")}
    stage = Stage(recipe.path, arm, _identity(recipe, needs_teacher), inputs, text)
    accelerator = make_accelerator(recipe, precision, stage.folder)

    # ---- rank 0 decides whether there is anything to do, all processes follow ------------------------
    if main_decides(accelerator, lambda: stage.done(redo)):
        if accelerator.is_main_process:
            drop_states(stage.folder)  # where a kill came between the manifest and this line
        return stage.manifest
    student = build_student(recipe.student, precision.name, accelerator.device, recipe.seed)
    if any(o.frozen for o in recipe.train.objectives):
        student.model.requires_grad_(False)
    numerics = precision.prepare(student.model)
    ends = eos_ids(student.base, student.tokenizer)
    teacher = (
        live_teachers(recipe, student.model, student.tokenizer, ends, accelerator.device, precision.half)
        if needs_teacher
        else None
    )
    if teacher:
        numerics["teacher"] = sorted(str(dtype).removeprefix("torch.") for dtype in teacher.dtypes)
    rows, held_out = split_rows(training_rows(recipe, data), recipe.train.validation, recipe.seed)
    source = make_source(recipe, rows, student, ends)
    if accelerator.is_main_process:
        stage.begin(redo)
        for line in first_lines(recipe, student, precision, numerics):
            say(f"{arm}: {line}")
    accelerator.wait_for_everyone()

    # ---- train, save -----------------------------------------------------------------------------------
    size = {
        "parameters_trainable": sum(p.numel() for p in student.trainable.values()),
        "parameters_total": sum(logical_size(p) for p in student.model.parameters()),
    }
    whole = {"rows": len(rows), "tokens_read": int(rows.lengths.sum()), **size}
    per_token = training_flops(student, teacher, whole) / whole["tokens_read"]
    a_row = per_token * float(rows.lengths.mean())
    chosen = compilation(recipe, a_row, student, teacher, accelerator, lambda line: say(f"{arm}: {line}"))
    counts = train_student(
        chosen, accelerator, student, teacher, source, stage.folder, f"train {arm}", held_out, per_token
    )
    counts |= {"errors": 0, "compiled": chosen.train.compile, **size}
    trainable = trainable_table(student.model)
    state_dict = whole_state_dict(student.model)  # gathered by all processes where it is sharded
    if not accelerator.is_main_process:
        return {}
    as_trained = recipe.model_copy(
        update={"train": recipe.train.model_copy(update={"precision": precision.name})}
    )
    terms = None if arm == "control" else read_json(recipe.path / "dataset" / MANIFEST).get("terms")
    save_student(
        student.model,
        student.tokenizer,
        stage.folder,
        student_card(as_trained, arm, counts, terms),
        state_dict,
    )
    for state in student.states:
        state.keep(stage.folder)
    manifest = stage.finish(
        counts,
        without=(BEST,),
        terms=terms,
        base_source=model_source(recipe.student.model) if recipe.student.model else None,
        device=describe_device(accelerator.device, accelerator.num_processes),
        precision=numerics,
        trainable=trainable,
        peak_memory_bytes=peak_memory(accelerator.device),
        flops=training_flops(student, teacher, counts),
        final_loss=_final_loss(stage.folder),
    )
    drop_states(stage.folder)  # not before the manifest: a kill until then continues from the newest one
    return manifest


def _identity(recipe: Recipe, needs_teacher: bool) -> dict[str, Any]:
    """What of the recipe a finished arm depends on."""
    teacher = recipe.teacher if needs_teacher else None
    return {
        "student": recipe.student.identity(),
        "train": recipe.train.identity(exclude=NOT_IDENTITY),
        "teacher": teacher and teacher.identity(exclude=_WRITING),
        "seed": recipe.seed,
    }


def first_lines(
    recipe: Recipe, student: BuiltStudent, precision: Precision, numerics: dict[str, Any]
) -> list[str]:
    """What an arm says before its first step: what it computes in, what trains, and which updates would vanish."""
    computes = f"; the teacher computes in {', '.join(numerics['teacher'])}" if "teacher" in numerics else ""
    lines = [f"{precision.reason}{computes}\n{format_trainable(student.model)}"]
    section = recipe.student
    if section.quantize == "none":
        read = matrices(student.model, head=recipe.train.head_precision == "same")
        lora = section.lora if section.adapter == "lora" else None
        if lost := lost_steps(recipe.train, precision.half, read, lora):
            lines.append(f"{lost.text()}; {lost.fix}")
    return lines


def training_rows(recipe: Recipe, folder: Path) -> TokenRows:
    """The arm's rows, with what the recipe's objectives and teachers need to know of them besides tokens."""
    section = recipe.train.teachers
    columns = {"tags": section.by} if section.models or section.balance else {}
    if any(o.signal == "aligned" for o in recipe.train.objectives):
        columns["messages"] = "messages"
        theirs = load_tokenizer(recipe.teacher.model, recipe.teacher.chat_template_kwargs)
        check_prompts(theirs, read_rows(folder, ["prompt_id", "messages"]), "teacher")
    context = section.context
    if context:
        columns["messages"] = "messages"
    rows = TokenRows.from_folder(folder, stored_signals(recipe), columns)
    if context:
        tokenizer = student_tokenizer(recipe.student)
        answers = (tokenizer.decode(rows.row(i)[1], skip_special_tokens=True) for i in range(len(rows)))
        rows.messages = [told(messages, answer, context) for messages, answer in zip(rows.messages, answers)]
    return rows


def make_source(recipe: Recipe, rows: TokenRows, student: BuiltStudent, ends: set[int]) -> Source:
    """Stored text, or with `train.on_policy` text that the student writes while it trains."""
    train = recipe.train
    if not train.on_policy.fraction:
        return StoredRows(rows, train.batch_size, recipe.seed, train.teachers.balance)
    return OnPolicyRows(
        rows,
        train.batch_size,
        recipe.seed,
        train.on_policy,
        student.model,
        student.tokenizer,
        ends,
        gather=from_all,
        balance=train.teachers.balance,
    )


def stored_signals(recipe: Recipe) -> SignalFormat | None:
    """The format of the dataset's teacher signals, where an objective reads them.

    Raises UserError where there are none, or not for this student and these objectives.
    """
    if not recipe.reads_states and not any(o.signal in STORED for o in recipe.train.objectives):
        return None
    folder = recipe.path / "dataset"
    form = SignalFormat.from_manifest(read_json(folder / MANIFEST).get("signal"))
    if form is None or recipe.reads_states != (form.kind == HIDDEN):
        raise UserError(
            f"{folder} has no teacher signals that this student can read; set generate.signal and use a student "
            "with the teacher's tokenizer and chat template, then run generate and filter with --redo"
        )
    reader = tokenizer_fingerprint(student_tokenizer(recipe.student))
    if problems := form.problems(reader, recipe.train.objectives):
        raise UserError(*problems)
    return form


def training_flops(student: BuiltStudent, teacher, counts: dict[str, Any]) -> int:
    """FLOPs of the whole arm: 3 forward passes a token for full training (Kaplan et al. 2020, section 2.1).

    With frozen weights the gradient of the weights falls away, which leaves 2 and the adapter's own small
    share; where nothing of the student trains at all, 1. A live teacher adds one forward pass of its own. Text that the
    student writes while it trains costs one forward pass a token, prompts included (each token is read once, from the
    cache of those before it). So does the pass before a step that counts its loads (`whole_step`), but for the output
    head. What trains beside the student (projections, a module for a token further ahead) is not counted.
    """
    tokens, context = counts["tokens_read"], max(1, counts["tokens_read"] // (2 * counts["rows"]))
    passes = 3 if counts["parameters_trainable"] == counts["parameters_total"] else 2
    passes = passes if counts["parameters_trainable"] else 1
    flops = passes * describe_model(student.model, context)["flops_per_token"]
    if passes == 2:
        flops += 6 * counts["parameters_trainable"]
    if teacher:
        flops += teacher.flops_per_token(context)
    more = 0
    if sampled := counts.get("tokens_sampled", 0):
        more += sampled * describe_model(student.model, context)["flops_per_token"]
    if counted := counts.get("tokens_counted", 0):
        more += counted * body_flops(student, context)
    return int(flops * tokens + more)


def body_flops(student: BuiltStudent, context: int) -> int:
    """Forward FLOPs of a token on the way to the output head, which is not called."""
    head = output_head(student.base)
    return describe_model(student.model, context)["flops_per_token"] - 2 * logical_size(head.weight)


def _final_loss(folder: Path) -> float:
    lines = (folder / "metrics.jsonl").read_text().splitlines()[-20:]
    return round(sum(json.loads(line)["loss"] for line in lines) / len(lines), 5)
