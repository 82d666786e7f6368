"""What a recipe will need, from configs alone: memory by phase, against what the device has, and for `--dry-run`.

    derived(recipe)                         # rows, steps, parameters, bytes and FLOPs; no weights are loaded
    for phase in phases(pair): print(phase.name, phase.parts, phase.held)

What must be held is counted: weights in the dtype they get, 16-bit copies that autocast keeps, a float32 gradient and
two Adam moments per trained parameter, logits as far as they exist at a time. The cache of keys and values is an upper
bound (every answer as long as allowed). On a CPU decoding holds its products' weights twice, where that fits
(distill/models/packed.py). Activations are what autograd keeps of a Llama block, tensor by tensor
(`_activations`). On a CPU the program itself counts too: Python with its libraries, and a kilobyte per token of every
tokenizer. What was forecast and what was measured, on two real models: docs/training.md, "Memory".
"""

import math
import os
from dataclasses import dataclass, field
from typing import Any

import torch

from distill.config.evaluation import Evaluate
from distill.config.recipe import Recipe
from distill.data.ledger import forecast
from distill.data.provenance import decide
from distill.data.scoring import BATCH_LOGITS, CHUNK_LOGITS
from distill.data.signals import SignalFormat
from distill.devices import device_memory, free_memory
from distill.doctor.pair import FAIL, NOTE, OK, WARN, Finding, Pair, Side
from distill.evaluation.answers import MOST_ON_CPU
from distill.models.decode import PACKED
from distill.models.describe import describe_config
from distill.models.load import load_config
from distill.models.packed import SHARE
from distill.models.precision import resolve_precision
from distill.models.student import student_config
from distill.storage import read_json
from distill.training.losses.fused import chunk_rows

_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


# A number in 4 bits with double quantisation: 0.5 + 8/64/8 + 4/(64*256) bytes; in 8 bits one scale per row besides.
_ROUNDED = {"4bit": 0.516, "8bit": 1.0}
_PROGRAM = 530e6  # torch, transformers, datasets and their libraries in a process of this project
_PER_TOKEN = 1000  # bytes of a tokenizer: its table, and the same again as a dictionary of Python
_COLUMNS = 64  # by which a cache of keys and values grows (distill/models/decode.py)
_COMPARED = 8 * CHUNK_LOGITS * 4  # what a pass over text takes besides its logits
_UNKNOWN_PROMPT = 256  # tokens, where prompts cannot be counted
HELD = (
    "program", "weights", "packed weights", "16-bit copies", "gradients", "optimizer", "adapter", "teacher weights",
)  # fmt: skip


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
    room = has / processes
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
        if free is not None and processes * most > free:
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
    name, size = max(phase.parts.items(), key=lambda part: part[1] if part[0] != "program" else 0)
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
    whole = min(facts["parameters_total"], tables + _experts(facts))
    return whole * min(each, 2) + (facts["parameters_total"] - whole) * _ROUNDED[quantize]


def _experts(facts: dict) -> float:
    """Parameters of the routed experts, all of them."""
    if not facts["experts"] or facts["experts_per_token"] >= facts["experts"]:
        return 0
    left_out = 1 - facts["experts_per_token"] / facts["experts"]
    return (facts["parameters_total"] - facts["parameters_active"]) / left_out


def _packed(side: Side, dtype: str, new: int, held: float) -> float:
    """Bytes of the second copy of what multiplies, while a CPU decodes answers of `new` tokens beside `held` bytes.

    As distill/models/packed.py makes it: with the head, whether or not it is the embedding, and without experts.
    """
    each = _weight_bytes(side, dtype)
    if new < PACKED or each < 2:
        return 0
    config = side.config.get_text_config(decoder=True)
    table = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    copy = each * (side.facts["parameters_total"] - table - _experts(side.facts))
    cpu = torch.device("cpu")
    free = min(device_memory(cpu), free_memory(cpu) or math.inf)
    return copy if copy <= SHARE * (free - held) else 0


def _program(pair: Pair, stage: Side) -> dict[str, float]:
    """The process itself, where it shares memory with the models: the checks' tokenizers, and the stage's own."""
    if pair.device.type != "cpu":
        return {}
    held = {id(side.tokenizer): len(side.tokenizer) for side in pair.sides}
    return {"program": _PROGRAM + _PER_TOKEN * (sum(held.values()) + len(stage.tokenizer))}


def _loading(side: Side, weights: float) -> float:
    """Bytes while weights are brought into another dtype: those of the files are in memory beside them."""
    stored = side.facts["weight_bytes"]
    return weights + stored if weights != stored else weights


def _cache(side: Side, tokens: int, each: float) -> float:
    """Of one row of so many tokens; sliding layers keep all of them here (distill/models/decode.py)."""
    facts = side.facts
    stored = facts["weight_bytes"] / facts["parameters_total"]
    columns = math.ceil(tokens / _COLUMNS) * _COLUMNS
    return facts["kv_bytes_per_token"] / stored * each * columns


def _activations(side: Side, tokens: int, low: float, layers: int) -> float:
    """Bytes that autograd keeps of so many tokens in so many layers; `low`: bytes of a number in products.

    Of a block of width d, with m in its MLP and r key heads for a query head (distill/training/memory.py): both norms
    keep their float32 input; the products behind them what the norms made of it, in 16 bits each of the five a cast of
    its own. Attention keeps queries, keys, values and its result in float32, the product behind it that result: 4 (2 +
    2 r) d + low d. The gated MLP: 3 low m.
    """
    facts, text = side.facts, side.config.get_text_config(decoder=True)
    width, depth = facts["hidden_size"], facts["layers"]
    body = facts["parameters_active"] - facts["vocab_size"] * width
    mlp = max(0.0, body / depth - 4 * width**2) / (3 * width)  # of a gated MLP with that many parameters
    heads = getattr(text, "num_attention_heads", None) or 1
    shared = (getattr(text, "num_key_value_heads", None) or heads) / heads
    norms = 2 * 4 * width + (5 * low if low < 4 else 2 * 4) * width
    attention = (4 * (2 + 2 * shared) + low) * width
    return tokens * layers * (norms + attention + 3 * low * mlp)


def _prompt(pair: Pair, side: Side, held_out: bool = False) -> int:
    lengths = pair.lengths(side, "held-out" if held_out else "training")
    return lengths.longest[0] if lengths else _UNKNOWN_PROMPT


def _of_passes(side: Side, tokens: int, models: int) -> float:
    """Bytes of logits while so many tokens of text are read at once by so many models, in float32."""
    return (
        models * 4 * side.rows * min(tokens, max(1, BATCH_LOGITS // side.rows)) + _COMPARED if tokens else 0
    )


def _generation(pair: Pair) -> Phase:
    teacher, recipe = pair.teacher, pair.recipe
    each = _weight_bytes(teacher, recipe.teacher.dtype)
    rows, new = recipe.generate.batch_size, recipe.generate.max_new_tokens
    cache = _cache(teacher, _prompt(pair, teacher) + new, each)
    logits = 24 * teacher.rows  # scores in float32, their sum in float64
    weights, guesser = _weights(teacher, recipe.teacher.dtype), 0.0
    if pair.draft:
        guesser = _weights(pair.draft, recipe.teacher.dtype)
        cache += _cache(
            pair.draft, _prompt(pair, teacher) + new, _weight_bytes(pair.draft, recipe.teacher.dtype)
        )
    packed = 0.0
    if pair.device.type == "cpu":
        twice = [side for side in (teacher, pair.draft) if side]
        packed = sum(_packed(side, recipe.teacher.dtype, new, weights + guesser) for side in twice)
    parts = {
        **_program(pair, teacher),
        "weights": weights + guesser,
        "packed weights": packed,
        "cache of keys and values": rows * cache,
        "logits": rows * logits,
    }
    scored = _of_passes(teacher, rows * new if recipe.generate.signal.kind != "none" else 0, 1)
    return _with_the_rest(
        Phase("generate", parts, "generate.batch_size", rows, cache + logits),
        scored, _loading(teacher, weights) - weights,
    )  # fmt: skip


def _with_the_rest(phase: Phase, *moments: float) -> Phase:
    """With what other moments than decoding's take beyond it: bytes besides the program and the weights as loaded."""
    now = sum(size for name, size in phase.parts.items() if name not in HELD or name == "packed weights")
    more = max(moments) - now
    if more > 0:
        phase.parts["text read at once, or files while they load"] = more
    return phase


def _training(pair: Pair) -> Phase:
    recipe, student, train = pair.recipe, pair.student, pair.recipe.train
    low = 4 if resolve_precision(train.precision, pair.device).name == "fp32" else 2
    facts = student.facts
    full = recipe.student.adapter == "full"
    trained = facts["parameters_total"] if full else pair.adapter_parameters
    dtype = "auto" if not full and low == 2 else "fp32"
    length = _row_length(pair)
    rows = min(train.micro_batch_size, train.batch_size)
    if train.micro_batch_tokens:
        rows = max(1, min(rows, train.micro_batch_tokens // length))
    layers = 2 if train.gradient_checkpointing else facts["layers"]
    kept_inputs = 4 * length * facts["layers"] * facts["hidden_size"] if train.gradient_checkpointing else 0
    per_row = _activations(student, length, low, layers) + kept_inputs
    live = pair.teacher and recipe.needs_live_teacher and not train.teachers.own_start
    head = 4 if train.head_precision == "fp32" else low
    chunk = chunk_rows(rows * length, student.rows, head, pair.device) * student.rows * head
    weights = _weights(student, dtype, recipe.student.quantize)
    cast = low == 2 and recipe.student.quantize == "none" and weights > 3 * facts["parameters_total"]
    # In the forward pass copies and activations come, in the backward pass they go and gradients come. With several
    # passes a step gradients are there before.
    copies = 2 * facts["parameters_total"] if cast else 0
    going = copies + rows * per_row
    alone = rows >= train.batch_size and not train.packing
    gradients = max(0.0, 4 * trained - going) if alone else 4 * trained
    parts = {
        **_program(pair, student),
        "weights": weights,
        "16-bit copies": copies,
        "adapter": 0 if full else 4 * trained,
        "gradients": gradients,
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
        tokens = (train.on_policy.context or _prompt(pair, student)) + train.on_policy.max_new_tokens
        parts["cache of keys and values"] = train.on_policy.batch_size * _cache(student, tokens, low)
        if pair.device.type == "cpu" and recipe.student.quantize == "none":
            kind, held = "fp32" if low == 4 else "bf16", sum(parts.values())
            parts["packed weights"] = _packed(student, kind, train.on_policy.max_new_tokens, held)
    return Phase("train", parts, "train.micro_batch_size", rows, per_row)


def _row_length(pair: Pair) -> int:
    """Tokens of the longest training row, as far as it can be known."""
    recipe = pair.recipe
    length = _prompt(pair, pair.student) + recipe.generate.max_new_tokens
    if recipe.prompts.documents:
        rollouts = recipe.train.on_policy
        length = max(
            recipe.prompts.window, rollouts.context + rollouts.max_new_tokens if rollouts.context else 0
        )
    limits = recipe.train.max_length, recipe.filter.max_tokens, pair.student.context
    return min(length, *(limit for limit in limits if limit))


def _evaluation(pair: Pair) -> Phase:
    """The student beside the teacher it is compared with; each model in the dtype it is stored in."""
    section = pair.recipe.evaluate
    tokens = _prompt(pair, pair.student, held_out=True) + section.max_new_tokens
    rows = min(section.batch_size, max(1, len(pair.test_rows or [])) * section.samples)
    if pair.test_rows is None or not section.source:  # on the hub, or looked at in part
        rows = section.batch_size
    return evaluation_phase(pair.sides, section, tokens, rows, _program(pair, pair.student))


def evaluation_phase(
    sides: list[Side], section: Evaluate, tokens: int, rows: int, program: dict[str, float]
) -> Phase:
    """Models that are in memory together, `rows` answers of `tokens` with their prompts at a time."""
    weights, per_row, fits = 0.0, 0.0, rows
    for side in sides:
        weights += _weights(side, "auto")
        each = side.facts["weight_bytes"] / side.facts["parameters_total"]
        cache, logits = _cache(side, tokens, each), 24 * side.rows
        if program:  # a CPU takes no more at a time (distill/evaluation/answers.py)
            fits = min(fits, max(1, int(MOST_ON_CPU // (2 * cache + logits))))
        per_row = max(per_row, cache + logits)
    packed = max(_packed(side, "auto", section.max_new_tokens, weights) for side in sides) if program else 0
    parts = {
        **program, "weights": weights, "packed weights": packed, "cache of keys and values": fits * per_row,
    }  # fmt: skip
    read = min(section.fidelity_rows, 64) * section.max_new_tokens if len(sides) > 1 else 0
    read = max(read, 16 * section.text_window if section.text else 0, 64 * 8 if section.likelihood else 0)
    passes = max(_of_passes(side, read, len(sides)) for side in sides)
    return _with_the_rest(Phase("evaluate", parts, "evaluate.batch_size", fits, per_row), passes)


# ==== what follows from a recipe, for --dry-run ====


def derived(recipe: Recipe) -> dict[str, Any]:
    """Rows, steps, parameters, bytes and FLOPs that follow from the recipe; no weights are loaded.

    Memory is what must be held for training: weights, and for trained parameters a float32 gradient and two
    Adam moments. Activations come on top and grow with micro_batch_size x length.
    """
    train = recipe.train
    student = describe_config(student_config(recipe.student))
    total = student["parameters_total"]
    trained = total if recipe.student.adapter == "full" else None
    values: dict[str, Any] = {
        "optimizer_steps": train.steps,
        "rows_per_step": train.batch_size,
        "micro_batches_per_step": -(-train.batch_size // train.micro_batch_size),
        "rows_trained": train.steps * train.batch_size,
        "student_parameters": total,
        "student_flops_per_token_forward": student["flops_per_token"],
        "student_weight_bytes_fp32": 4 * total,
    }
    if trained:
        moments = 2 if train.optimizer == "adamw" else 0
        values["training_bytes_without_activations"] = 4 * trained * (2 + moments)
    if recipe.prompts.source == "tasks":
        values["prompts"] = sum(recipe.prompts.levels.values())
    if recipe.teacher:
        teacher = None
        if not recipe.teacher.endpoint:
            teacher = describe_config(load_config(recipe.teacher.model))
            values["teacher_parameters"] = teacher["parameters_total"]
            values["teacher_parameters_active"] = teacher["parameters_active"]
        decision = decide(recipe.teacher, recipe.student)
        values["teacher_terms"] = decision["reason"] + ("" if decision["allowed"] else "; stops the run")
        values |= forecast(recipe)
        if teacher and "answer_tokens_at_most" in values:
            flops = teacher["flops_per_token"] * values["answer_tokens_at_most"]
            values["generation_flops_at_most"] = flops
            values |= _signal_bytes(recipe, values["answer_tokens_at_most"])
    manifest = recipe.path / "dataset" / "manifest.json"
    if manifest.is_file():
        counts = read_json(manifest)["counts"]
        values["dataset_rows"] = counts["rows"]
        values["epochs"] = round(values["rows_trained"] / counts["rows"], 2)
        values["trained_tokens_per_step"] = round(counts["tokens"] / counts["rows"] * train.batch_size)
    return values


def _signal_bytes(recipe: Recipe, tokens: int) -> dict[str, Any]:
    """Bytes of the teacher signals that so many tokens take on disk, at most."""
    if recipe.generate.signal.kind == "none":
        return {}
    text = load_config(recipe.teacher.model).get_text_config()
    form = SignalFormat.from_recipe(recipe.generate.signal, text.vocab_size, {}, text.hidden_size)
    return {"signal_bytes_at_most": round(tokens * form.bytes_per_token())}
