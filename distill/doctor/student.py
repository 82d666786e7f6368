"""Checks of the student's training before its weights are loaded: precision, what LoRA will train, which experts.

The student is built from its config on the meta device and the adapter is really put on it, so that what is listed is
what PEFT does and not what was asked of it (distill/models/student.py on the families where it silently trains others).
"""

from contextlib import nullcontext
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from distill.doctor.pair import FAIL, NOTE, OK, WARN, Finding, Pair, Side, base_of, failures, model_side
from distill.errors import UserError
from distill.models.describe import LINEAR, trainable_table, weight_groups
from distill.models.fp8 import emulate_fp8
from distill.models.precision import EMULATED, FEW_STEPS, lost_steps, resolve_precision, stored_matrices
from distill.models.routers import find_routers
from distill.models.student import check_start, student_skeleton
from distill.moe.interventions import sample_experts, use_top_k
from distill.training.losses.routers import ExpertBiasBalancer

_ROUTER_SIGNALS = ("own_routers", "routers")


def precision(pair: Pair) -> list[Finding]:
    """The precision of training, and the teacher's dtype, on this device."""
    choice = resolve_precision(pair.recipe.train.precision, pair.device)
    slow = "emulated: this CPU" in choice.reason
    fix = "train.precision=auto, which takes fp32 here" if slow else None
    found = [Finding("precision", WARN if slow else OK, f"{choice.name}: {choice.reason}", fix)]
    if choice.name in EMULATED:
        try:
            report = emulate_fp8(student_skeleton(pair.recipe.student), EMULATED[choice.name])
            found.append(Finding("precision", OK, report.lines()[0]))
        except UserError as error:
            found += failures("precision", error)
    return [*found, *_teacher_dtype(pair)]


def rounding(pair: Pair) -> list[Finding]:
    """Updates that are too small for the 16 bits of products, in a sample of the weights where they lie here."""
    section, train = pair.recipe.student, pair.recipe.train
    start = section.made_from.model if section.made_from else section.model
    if start is None or section.quantize != "none" or not Path(base_of(start)).is_dir():
        return []
    low, lora, names = resolve_precision(train.precision, pair.device).half, None, None
    if section.adapter == "lora":
        lora, names = section.lora, set(pair.adapted[0].weights)
    skeleton = _skeleton(model_side("student", start))
    stored = stored_matrices(Path(base_of(start)), skeleton, train.head_precision == "same", names)
    lost = lost_steps(train, low, stored, lora)
    if lost is None:
        return []
    return [Finding("precision", WARN if lost.steps > FEW_STEPS else NOTE, lost.text(), lost.fix)]


def _teacher_dtype(pair: Pair) -> list[Finding]:
    """Weights that stay in 16 bits compute in 16 bits, and not every device can."""
    if pair.teacher is None:
        return []
    dtype = pair.recipe.teacher.dtype
    if dtype == "auto":
        dtype = {"bfloat16": "bf16", "float16": "fp16"}.get(pair.teacher.facts["dtype"], "fp32")
    if dtype == "fp32":
        return []
    try:
        slow = "emulated: this CPU" in resolve_precision(dtype, pair.device).reason
    except UserError as error:
        instead = "fp16" if pair.device.type == "cuda" else "fp32"
        reason = error.problems[0].partition(";")[0].removeprefix(f"precision {dtype}: ")
        return [
            Finding(
                "precision", WARN, f"the teacher computes in {dtype}: {reason}", f"teacher.dtype={instead}"
            )
        ]
    if slow:
        text = f"the teacher computes in {dtype}, which this CPU has no units for"
        return [Finding("precision", WARN, text, "teacher.dtype=fp32 (twice the memory)")]
    return []


def trained(pair: Pair) -> list[Finding]:
    """What will train, by group of weights, from the adapter on a skeleton; with the traps that were stepped around."""
    section, student = pair.recipe.student, pair.student
    choice = resolve_precision(pair.recipe.train.precision, pair.device)
    check_start(section, choice.name, pair.device)
    if section.adapter == "full":
        return [
            Finding("trained", OK, f"all {student.facts['parameters_total']:,} parameters of the student")
        ]
    plan, model = pair.adapted
    groups = weight_groups(model)
    table = trainable_table(model)
    parts = [f"{row['tensors']} {group}" for group, row in table.items() if row["tensors"]]
    count = sum(row["parameters"] for row in table.values())
    share = count / student.facts["parameters_total"]
    text = f"LoRA on {', '.join(parts)} tensors: {count:,} parameters ({share:.1%}), names compared with what was asked"
    found = [Finding("trained", OK, text)]
    moved = [w for w in plan.weights if groups[w] in LINEAR and w.endswith(plan.parameters)]
    if moved:
        found.append(
            Finding(
                "trained",
                NOTE,
                f"left to itself PEFT would put the adapters of {moved[0]} (and {len(moved) - 1} more) on other "
                f"weights of a {student.facts['model_type']} model, silently; they are named as bare parameters",
            )
        )
    return found


def expert_findings(pair: Pair) -> list[Finding]:
    """Which experts the teacher has, and which of the student's are reached by training."""
    found = []
    train = pair.recipe.train
    asked = [o.name for o in train.objectives if o.signal in _ROUTER_SIGNALS]
    sizes: dict[str, set[tuple[int, int]]] = {}
    for side in pair.sides:
        skeleton = _skeleton(side)
        routers = find_routers(skeleton)
        sizes[side.role] = {(r.num_experts - r.null_experts, r.top_k) for r in routers}
        if not routers:
            continue
        table = trainable_table(skeleton)
        shared = table.get("shared experts", {}).get("of", 0)
        ((number, k), *_) = sorted(sizes[side.role])
        text = f"{side.label}: {len(routers)} layers of {number} routed experts, {k} per token"
        text += ", with shared experts" if shared else ", no shared experts"
        found.append(Finding("experts", OK, text))
        if side.role == "student":
            found += _reached(pair, table)
    if pair.teacher and (train.teachers.experts_per_token or train.teachers.routings):
        found += _asked_otherwise(pair)
    if not sizes["student"]:
        wants = [*asked, *(["train.expert_bias_step"] if train.expert_bias_step else [])]
        if wants:
            text = f"{wants[0]} needs a mixture-of-experts student, and this one is dense"
            return [*found, Finding("experts", FAIL, text, "leave it out, or take a MoE student")]
        return found or [Finding("experts", OK, "both are dense")]
    found += _balanced(pair)
    if any(o.signal == "routers" for o in train.objectives) and pair.teacher:
        found += _routers_match(sizes)
    return found


def _asked_otherwise(pair: Pair) -> list[Finding]:
    """Whether every teacher is a mixture that can be asked with other experts than its own."""
    section, found = pair.recipe.train.teachers, []
    sides = [pair.teacher, *(model_side("teacher", name) for name in section.models.values())]
    for side in sides:
        skeleton = _skeleton(side).eval()
        k, drawn = section.experts_per_token, section.routings
        try:
            with (
                use_top_k(skeleton, k) if k else nullcontext(),
                sample_experts(skeleton) if drawn else nullcontext(),
            ):
                pass  # entering is what checks
        except UserError as error:
            found += failures("experts", error)
    return found


def _skeleton(side: Side) -> torch.nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(side.config)


def _reached(pair: Pair, table: dict) -> list[Finding]:
    section = pair.recipe.student
    routed, total = table["routed experts"]["of"], sum(row["of"] for row in table.values())
    if section.adapter == "full":
        return [Finding("experts", OK, "all of the student's experts and routers train")]
    if section.lora.experts:
        router = "and the routers train" if section.lora.router else "train, the routers stay as they are"
        return [Finding("experts", OK, f"the student's routed experts {router}")]
    return [
        Finding(
            "experts",
            NOTE,
            f"the student's routed experts, {routed / total:.0%} of it, stay frozen"
            + (", its routers train" if section.lora.router else ", and so do its routers"),
            "student.lora.experts=true to train them (each with its own rank)",
        )
    ]


def _balanced(pair: Pair) -> list[Finding]:
    """That what is asked to balance the experts can: routers that stay frozen, and biases that nobody saves, cannot."""
    section, train, found = pair.recipe.student, pair.recipe.train, []
    if train.expert_bias_step:
        try:
            ExpertBiasBalancer(student_skeleton(section))
        except UserError as error:
            found += failures("experts", error)
        if section.adapter == "lora":
            text = (
                "train.expert_bias_step does nothing for the student that is saved: it moves a bias of the frozen "
                "base, which no adapter carries, so the student would be used with other routing than it trained with"
            )
            found.append(Finding("experts", FAIL, text, "set it to 0, or student.adapter=full"))
    names = [o.name for o in train.objectives if o.signal == "own_routers"]
    if names and section.adapter == "lora" and not section.lora.router:
        text = f"{' and '.join(names)} balances nothing: the routers stay frozen, and it only bends what they read"
        found.append(Finding("experts", WARN, text, "student.lora.router=true, or leave it out"))
    return found


def _routers_match(sizes: dict[str, set[tuple[int, int]]]) -> list[Finding]:
    teacher, student = ({number for number, _ in sizes[role]} for role in ("teacher", "student"))
    if not teacher:
        text = "router_distillation needs a mixture-of-experts teacher, and this one is dense"
        return [Finding("experts", FAIL, text, "leave it out")]
    if teacher != student:
        text = f"router_distillation compares experts by number, and there are {sorted(teacher)} and {sorted(student)}"
        return [
            Finding(
                "experts", FAIL, text, "leave it out, or a student whose experts descend from the teacher's"
            )
        ]
    return []
