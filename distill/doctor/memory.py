"""Memory that a recipe needs, phase by phase, from configs alone, against what the device has.

    for phase in phases(pair): print(phase.name, phase.parts, phase.held)

What must be held is counted: weights in the dtype they get, 16-bit copies that autocast keeps, a float32 gradient and
two Adam moments per trained parameter, the chunk of logits that exists at a time. The cache of keys and values is an
upper bound (every answer as long as allowed). Activations are an order of magnitude, after Korthikanti et al. 2022
(arXiv 2205.05198, section 4.1) without the attention matrix: per token and layer 8 hidden vectors and 4 of the MLP's
width. On a CPU everything shares main memory with the program itself.
"""

import os
from dataclasses import dataclass, field

from distill.devices import device_memory, free_memory
from distill.doctor.findings import FAIL, NOTE, OK, WARN, Finding
from distill.doctor.pair import Pair, Side
from distill.models.precision import resolve_precision
from distill.training.losses.fused import chunk_rows

_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


# A number in 4 bits with double quantisation: 0.5 + 8/64/8 + 4/(64*256) bytes; in 8 bits one scale per row besides.
_ROUNDED = {"4bit": 0.516, "8bit": 1.0}
_PROGRAM = 700e6  # torch, transformers and their libraries in a process of this project
_UNKNOWN_PROMPT = 256  # tokens, where prompts cannot be counted
HELD = ("weights", "16-bit copies", "gradients", "optimizer", "adapter", "teacher weights")


def gigabytes(amount: float) -> str:
    """1.4 GB, 0.35 GB: two digits that matter."""
    value = amount / 1e9
    return f"{value:,.0f} GB" if value >= 10 else f"{value:.1f} GB" if value >= 1 else f"{value:.2g} GB"


@dataclass
class Phase:
    """`parts`: bytes by what holds them. `rows` at a time, of which each takes `per_row` bytes; `key` sets them."""

    name: str
    parts: dict[str, float] = field(default_factory=dict)
    key: str = ""
    rows: int = 0
    per_row: float = 0.0

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    @property
    def held(self) -> float:
        """What no smaller batch would spare."""
        return sum(size for name, size in self.parts.items() if name in HELD)


def phases(pair: Pair) -> list[Phase]:
    """The stages that this command runs, each on its own: nothing of one stays for the next."""
    found = []
    if pair.teacher and pair.does("generate") and not pair.recipe.prompts.documents:
        found.append(_generation(pair))
    if pair.does("train"):
        found.append(_training(pair))
    if pair.does("evaluate"):
        found.append(_evaluation(pair))
    return found


def memory(pair: Pair) -> list[Finding]:
    """Every phase against the device; what does not fit whatever the batch is a FAIL."""
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        return [Finding("memory", NOTE, "sharded over processes: not estimated")]
    has, found = device_memory(pair.device), []
    on_cpu = pair.device.type == "cpu"
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if on_cpu else 1
    room = has / processes - (_PROGRAM if on_cpu else 0)
    needed = phases(pair)
    for phase in needed:
        finding = _judge(phase, room, has, pair)
        found += [finding] if finding else []
    if not needed:
        return []
    most = max(phase.total for phase in needed)
    if not found:
        each = "; ".join(f"{p.name} {gigabytes(p.total)} ({_largest(p)})" for p in needed)
        found = [Finding("memory", OK, f"{each}; the device has {gigabytes(has)}")]
        free = free_memory(pair.device)
        if free is not None and processes * (most + (_PROGRAM if on_cpu else 0)) > free:
            text = f"{gigabytes(most)} fit into {gigabytes(has)}, but only {gigabytes(free)} are free at this moment"
            found.append(Finding("memory", WARN, text, "end what else runs on this device"))
    return found


def _judge(phase: Phase, room: float, has: float, pair: Pair) -> Finding | None:
    """A finding where the phase does not fit."""
    shown = ", ".join(
        f"{name} {gigabytes(size)}" for name, size in phase.parts.items() if size > 0.01 * phase.total
    )
    if phase.held > room:
        text = f"{phase.name} holds {gigabytes(phase.held)} whatever the batch ({shown}) of {gigabytes(has)} there are"
        return Finding("memory", FAIL, text, _smaller(phase, pair))
    if phase.total > room:
        fit = int((room - phase.held) // phase.per_row) if phase.per_row else 0
        fix = f"{phase.key}={fit}" if fit >= 1 else _smaller(phase, pair)
        if phase.name == "train" and not pair.recipe.train.gradient_checkpointing:
            fix += " or train.gradient_checkpointing=true"
        text = f"{phase.name} may need {gigabytes(phase.total)} ({shown}); the device has {gigabytes(has)}"
        return Finding("memory", WARN, text, fix)
    return None


def _largest(phase: Phase) -> str:
    name, size = max(phase.parts.items(), key=lambda part: part[1])
    return f"{name} {gigabytes(size)}"


def _smaller(phase: Phase, pair: Pair) -> str:
    """What makes the held part smaller, in the order of what it costs."""
    recipe, fixes = pair.recipe, []
    if phase.name == "train":
        if recipe.student.adapter == "full":
            fixes.append("student.adapter=lora")
        elif recipe.student.quantize == "none":
            fixes.append("student.quantize=4bit")
        if "teacher weights" in phase.parts:
            fixes += ["teacher.quantize=4bit"] if recipe.teacher.quantize == "none" else []
            fixes += ["teacher.device=cpu"] if pair.device.type == "cuda" else []
            fixes.append("train.objectives='[{name: cross_entropy}]' (no teacher in memory)")
        return " or ".join([*fixes, "a smaller student"])
    if phase.name == "generate":
        narrow = " or teacher.dtype=bf16" if _weight_bytes(pair.teacher, recipe.teacher.dtype) >= 4 else ""
        return f"a smaller teacher, or one behind a server (teacher.endpoint){narrow}"
    return "smaller models, or evaluate.fidelity_rows=0"


# ---- the phases ----------------------------------------------------------------------------------------


def _weight_bytes(side: Side, dtype: str) -> float:
    """Of one parameter as it is loaded; "auto" is as stored."""
    if dtype != "auto":
        return _BYTES[dtype]
    return side.facts["weight_bytes"] / side.facts["parameters_total"]


def _weights(side: Side, dtype: str, quantize: str = "none") -> float:
    """Bytes of a model's weights. Rounding takes linear layers alone: embedding, head and fused experts stay."""
    facts, each = side.facts, _weight_bytes(side, dtype)
    if quantize == "none":
        return facts["parameters_total"] * each
    config = side.config.get_text_config(decoder=True)
    tables = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    experts = 0
    if facts["experts"]:
        share = facts["experts_per_token"] / facts["experts"]
        experts = (facts["parameters_total"] - facts["parameters_active"]) / (1 - share) if share < 1 else 0
    whole = min(facts["parameters_total"], tables + experts)
    return whole * min(each, 2) + (facts["parameters_total"] - whole) * _ROUNDED[quantize]


def _cache(side: Side, tokens: int, each: float) -> float:
    """Of one row of so many tokens; sliding layers keep all of them here (distill/models/decode.py)."""
    facts = side.facts
    stored = facts["weight_bytes"] / facts["parameters_total"]
    return facts["kv_bytes_per_token"] / stored * each * tokens


def _activations(side: Side, tokens: int, each: float, layers: int) -> float:
    """Bytes kept of so many tokens in so many layers."""
    facts = side.facts
    width, depth = facts["hidden_size"], facts["layers"]
    body = facts["parameters_active"] - facts["vocab_size"] * width
    mlp = max(0.0, body / depth - 4 * width**2) / (3 * width)  # of a gated MLP with that many parameters
    return tokens * layers * each * (8 * width + 4 * mlp)


def _prompt(pair: Pair, side: Side, held_out: bool = False) -> int:
    lengths = pair.lengths(side, "held-out" if held_out else "training")
    return lengths.longest[0] if lengths else _UNKNOWN_PROMPT


def _generation(pair: Pair) -> Phase:
    teacher, recipe = pair.teacher, pair.recipe
    each = _weight_bytes(teacher, recipe.teacher.dtype)
    rows = recipe.generate.batch_size
    tokens = _prompt(pair, teacher) + recipe.generate.max_new_tokens
    cache = _cache(teacher, tokens, each)
    logits = 24 * teacher.rows  # scores in float32, their sum in float64
    parts = {
        "weights": _weights(teacher, recipe.teacher.dtype),
        "cache of keys and values": rows * cache,
        "logits": rows * logits,
    }
    return Phase("generate", parts, "generate.batch_size", rows, cache + logits)


def _training(pair: Pair) -> Phase:
    recipe, student, train = pair.recipe, pair.student, pair.recipe.train
    low = 4 if resolve_precision(train.precision, pair.device).name == "fp32" else 2
    facts = student.facts
    full = recipe.student.adapter == "full"
    trained = facts["parameters_total"] if full else pair.adapter_parameters
    dtype = "auto" if not full and low == 2 else "fp32"
    length = _prompt(pair, student) + recipe.generate.max_new_tokens
    if recipe.prompts.documents:
        length = recipe.prompts.window
    length = min(
        length, train.max_length or length, recipe.filter.max_tokens or length, student.context or length
    )
    rows = min(train.micro_batch_size, train.batch_size)
    if train.micro_batch_tokens:
        rows = max(1, min(rows, train.micro_batch_tokens // length))
    layers = 2 if train.gradient_checkpointing else facts["layers"]
    per_row = _activations(student, length, low, layers)
    live = pair.teacher and recipe.needs_live_teacher and not train.teachers.own_start
    chunk = chunk_rows(rows * length, student.rows, low, pair.device) * student.rows * low
    parts = {
        "weights": _weights(student, dtype, recipe.student.quantize),
        "16-bit copies": 2 * facts["parameters_total"] if full and low == 2 else 0,
        "adapter": 0 if full else 4 * trained,
        "gradients": 4 * trained,
        "optimizer": 8 * trained if train.optimizer == "adamw" else 0,
        "logits": chunk * (2 if live else 1) + (4 * student.rows * facts["hidden_size"] if full else 0),
        "activations": rows * per_row,
    }
    if live and not (pair.device.type == "cuda" and recipe.teacher.device == "cpu"):
        teachers = 1 + len(set(train.teachers.models.values()) - {recipe.teacher.model})
        parts["teacher weights"] = teachers * _weights(
            pair.teacher, recipe.teacher.dtype, recipe.teacher.quantize
        )
    if train.teachers.own_start and full:
        parts["teacher weights"] = parts["weights"]
    if train.on_policy.fraction:
        tokens = _prompt(pair, student) + train.on_policy.max_new_tokens
        parts["cache of keys and values"] = train.on_policy.batch_size * _cache(student, tokens, low)
    return Phase("train", parts, "train.micro_batch_size", rows, per_row)


def _evaluation(pair: Pair) -> Phase:
    """The student beside the teacher it is compared with; each model in the dtype it is stored in."""
    recipe = pair.recipe
    tokens = _prompt(pair, pair.student, held_out=True) + recipe.evaluate.max_new_tokens
    rows = min(recipe.evaluate.batch_size, max(1, len(pair.test_rows or [])) * recipe.evaluate.samples)
    if pair.test_rows is None or not recipe.evaluate.source:  # on the hub, or looked at in part
        rows = recipe.evaluate.batch_size
    parts, per_row = {"weights": 0.0}, 0.0
    for side in pair.sides:
        parts["weights"] += _weights(side, "auto")
        each = side.facts["weight_bytes"] / side.facts["parameters_total"]
        per_row = max(per_row, _cache(side, tokens, each) + 24 * side.rows)
    parts["cache of keys and values"] = rows * per_row
    return Phase("evaluate", parts, "evaluate.batch_size", rows, per_row)
