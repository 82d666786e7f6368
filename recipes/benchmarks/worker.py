"""One measured process of the training-speed benchmark: one method, one objective, one precision, one allocator.

    python recipes/benchmarks/worker.py '{"do": "step", "setting": {...}, "runner": "module:function", ...}'

prints one JSON object. `training` starts these, one at a time; a process of its own is what makes peak
memory, page faults and the allocator's settings (read when a process starts) those of one method. "do" is "step"
(time optimizer steps of a method), "loop" (time `distill train` itself) or "rates" (matmul rates at the shapes).

A runner is `runner(work, objective, precision) -> forward_backward`: `work` is a `Workload`, and every call of
`forward_backward()` leaves the gradient of the mean loss of the kept tokens in the student and returns that loss.
Clipping, AdamW and zeroing are done here, the same for everyone, and so is the clock.

Shapes: B rows, P prompt tokens, C completion tokens, N = B C kept tokens, V vocabulary, K stored tokens.
"""

import contextlib
import importlib
import itertools
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from cases import Setting
from torch import Tensor, nn

STORED = 64  # K
_LEARNING_RATE = 1e-4


@dataclass
class Workload:
    """What is trained on what. All rows are of one length, so nobody pays for padding."""

    teacher: nn.Module | None  # None where stored signals are read: then no teacher is in memory
    student: nn.Module
    prompts: Tensor  # [B, P]
    completions: Tensor  # [B, C]

    @property
    def kept(self) -> int:
        return self.completions.numel()

    @property
    def ids(self) -> Tensor:
        return torch.cat([self.prompts, self.completions], dim=1)  # [B, P + C]


def make_model(setting: Setting, width: int, layers: int, seed: int) -> nn.Module:
    """A Qwen3 model, or a Llama model where the setting names its heads: tied embeddings, random weights, float32.

    The embedding is scaled so that logits have a standard deviation of a few, as those of a trained model, and the
    last norm flips signs, or tied weights would make every model predict its own input.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

    heads, shared, head, mlp = setting.attention_of(width)
    torch.manual_seed(seed)
    config = (LlamaConfig if setting.attention else Qwen3Config)(
        vocab_size=setting.vocabulary, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=shared, head_dim=head, intermediate_size=mlp,
        max_position_embeddings=setting.tokens, tie_word_embeddings=True, use_cache=False,
        pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(10)
        model.model.norm.weight.mul_(torch.randint(0, 2, (width,)) * 2 - 1)
    return model


def make_workload(setting: dict[str, Any], live: bool, precision: str) -> Workload:
    """Models and batch of a setting (fields of `cases.Setting`), the same in every process.

    Under bf16 the frozen teacher's weights are bfloat16, and the student's are float32 masters under autocast.
    """
    shape = Setting(**setting)
    student = make_model(shape, *shape.student, seed=1).train()
    teacher = None
    if live:
        teacher = make_model(shape, *shape.teacher, seed=2).eval().requires_grad_(False)
        if precision == "bf16":
            teacher = teacher.to(torch.bfloat16)
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(2, shape.vocabulary, (shape.rows, shape.tokens), generator=generator)
    prompt = shape.tokens // 2
    return Workload(teacher, student, ids[:, :prompt], ids[:, prompt:])


def stored_top_k(kept: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Ids [N, K] and log-probabilities [N, K] that a teacher might have left: made up, since only time is read."""
    generator = torch.Generator().manual_seed(4)
    k = min(STORED, vocabulary // 2)
    first = torch.randint(0, vocabulary, (kept, 1), generator=generator)
    ids = (first + 997 * torch.arange(k)) % vocabulary  # 997 is prime: no id twice in a row
    scores = torch.randn(kept, k, generator=generator).sort(-1, descending=True).values
    return ids, F.log_softmax(2 * scores, dim=-1) - 0.1


# ------------------------------------------------------------------------------------------------ the methods


def distill_step_runner(work: Workload, objective: dict[str, Any], precision: str) -> Callable[[], float]:
    """This toolkit's step, as `distill train` makes it: live teacher, or stored signals where there is none."""
    from distill.training.live_teachers import FrozenTeacher

    teacher = FrozenTeacher(work.teacher) if work.teacher is not None else None
    return _forward_backward(work, objective, precision, collated(work), teacher)


def attend_as_training(work: Workload) -> None:
    """Both models attend as `distill train` has them attend."""
    from distill.models.layers import attend_by_row

    for model in (work.student, work.teacher):
        if model is not None:
            attend_by_row(model)


def _forward_backward(
    work: Workload, objective: dict[str, Any], precision: str, batch: Any, teacher: Any
) -> Callable[[], float]:
    from accelerate import Accelerator

    from distill.config.training import Train
    from distill.models.layers import decoder_layers, rows_apart
    from distill.training.memory import Lean
    from distill.training.step import StudentStep

    attend_as_training(work)
    compiled = decoder_layers(work.student)[1][0]._compiled_call_impl is not None
    lean = contextlib.nullcontext() if compiled else Lean(work.student)
    accelerator = Accelerator(mixed_precision="bf16" if precision == "bf16" else "no", cpu=True)
    model = accelerator.prepare(
        StudentStep(work.student, Train(objectives=[objective], steps=100).objectives)
    )

    def forward_backward() -> float:
        with lean, rows_apart(batch.rows):
            total, sums = model(batch, teacher(batch) if teacher else {})
            accelerator.backward(total / work.kept)
        return float(sums.sum()) / work.kept

    return forward_backward


def distill_hidden_runner(work: Workload, objective: dict[str, Any], precision: str) -> Callable[[], float]:
    """The same with the teacher's last hidden states as they are stored (16 bits): of it, the head alone is left."""
    from distill.data.signals import SignalFormat, States, decode_hidden, encode_hidden
    from distill.training.live_teachers import FrozenTeacher, StoredTeacher

    batch = collated(work)
    asked = FrozenTeacher(work.teacher)(batch)["dense"]
    head, states = asked.head, asked.hidden.float().numpy()
    form = SignalFormat("hidden", states.shape[1], asked.vocabulary, 1.0, 16, {})
    batch.signal = States(torch.from_numpy(decode_hidden(form, len(states), *encode_hidden(form, states))[0]))
    work.teacher = None
    del asked
    forget_peak()
    return _forward_backward(work, objective, precision, batch, StoredTeacher(head))


def distill_lora_runner(work: Workload, objective: dict[str, Any], precision: str) -> Callable[[], float]:
    """The same with LoRA on all linear layers; the student's own weights are frozen."""
    from distill.config.training import Lora
    from distill.models.student import add_lora

    work.student = add_lora(work.student, Lora()).train()
    return distill_step_runner(work, objective, precision)


def distill_compiled_runner(work: Workload, objective: dict[str, Any], precision: str) -> Callable[[], float]:
    """The toolkit's step with `train.compile=true`; what compiling takes is in the warm-up, not in the time."""
    from distill.models.layers import compile_layers

    attend_as_training(work)  # first: it is tried on rows of its own
    compile_layers(work.student, work.teacher)
    return distill_step_runner(work, objective, precision)


def naive_runner(work: Workload, objective: dict[str, Any], precision: str) -> Callable[[], float]:
    """What a careful user writes by hand: logits of the kept tokens only, the definition, autograd."""
    ids, prompt = work.ids[:, :-1], work.prompts.shape[1]

    def logits(model: nn.Module) -> Tensor:
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        return model.lm_head(hidden[:, prompt - 1 :].flatten(0, 1))

    def divergence(p: Tensor, q: Tensor) -> Tensor:
        if objective["name"] == "forward_kl":
            return F.kl_div(q, p, reduction="sum", log_target=True)
        if objective["name"] == "reverse_kl":
            return F.kl_div(p, q, reduction="sum", log_target=True)
        m = torch.logsumexp(torch.stack([p, q]), dim=0) - torch.log(torch.tensor(2.0))
        both = [F.kl_div(m, a, reduction="sum", log_target=True) for a in (p, q)]
        return (both[0] + both[1]) / 2

    def forward_backward() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            with torch.no_grad():
                p = F.log_softmax(logits(work.teacher).float(), dim=-1)
            q = F.log_softmax(logits(work.student).float(), dim=-1)
        loss = divergence(p, q) / work.kept
        loss.backward()
        return loss.item()

    return forward_backward


def token_rows(work: Workload, copies: int = 1):
    """The batch as a dataset of the toolkit's, with stored signals where there is no teacher."""
    from distill.data.batches import TokenRows
    from distill.data.signals import SignalFormat, StoredSignals, encode_top_k

    prompts, completions = (list(part.numpy()) * copies for part in (work.prompts, work.completions))
    signals = None
    if work.teacher is None:
        vocabulary = work.student.get_input_embeddings().num_embeddings
        ids, logprobs = (x.numpy() for x in stored_top_k(work.kept, vocabulary))
        form = SignalFormat("top_k", ids.shape[1], vocabulary, 1.0, 16, {})
        of_rows = [slice(b * len(c), (b + 1) * len(c)) for b, c in enumerate(work.completions)]
        encoded = [encode_top_k(form, ids[rows], logprobs[rows]) for rows in of_rows] * copies
        signals = StoredSignals(form, *zip(*encoded))
    return TokenRows(prompts, completions, signals)


def collated(work: Workload):
    """The whole batch through the toolkit's collator."""
    rows = token_rows(work)
    return rows.collate(list(range(len(rows))), 0)


# ------------------------------------------------------------------------------------------------ measurement


def memory() -> tuple[int, int]:
    """(bytes resident now, most so far) of this process.

    Not `ru_maxrss` where Linux tells better: that one begins with the size of the process that started this one.
    """
    status = Path("/proc/self/status")
    if not status.is_file():
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return peak, peak
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
    now, most = (int(lines[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    return now, most


def forget_peak() -> None:
    """From here on the peak is that of what is left: freed memory goes back first. Linux only; elsewhere nothing."""
    import ctypes
    import gc

    gc.collect()
    reset = Path("/proc/self/clear_refs")
    if reset.exists():
        ctypes.CDLL(None).malloc_trim(0)
        reset.write_text("5")


def time_steps(step: Callable[[], Any], warm_up: int, timed: int, patience: float) -> dict[str, Any]:
    """Wall and CPU seconds of each of at most `timed` steps (none begins after `patience` seconds of them), and
    of all together the system's share of the CPU seconds and the page faults."""
    for _ in range(warm_up):
        step()
    before, seconds, cpu_seconds = resource.getrusage(resource.RUSAGE_SELF), [], []
    while len(seconds) < timed and sum(seconds) < patience:
        start, cpu_start = time.perf_counter(), time.process_time()
        step()
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    after = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "user_seconds": after.ru_utime - before.ru_utime,
        "system_seconds": after.ru_stime - before.ru_stime,
        "page_faults": after.ru_minflt - before.ru_minflt,
    }


def measure_step(spec: dict[str, Any]) -> dict[str, Any]:
    """One method: loss and gradient norm of the first step, then the clock over whole optimizer steps."""
    for name in ("transformers.models.qwen3.modeling_qwen3", "accelerate", *spec["imports"]):
        importlib.import_module(name)
    module, _, function = spec["runner"].partition(":")
    runner = getattr(importlib.import_module(module), function)
    after_imports, _ = memory()
    if spec["precision"] == "medium":
        torch.set_float32_matmul_precision("medium")
    work = make_workload(spec["setting"], spec["live"], spec["precision"])
    forward_backward = runner(work, spec["objective"], spec["precision"])
    parameters = [p for p in work.student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=_LEARNING_RATE, fused=True)
    losses, norms = [], []

    def step() -> None:
        losses.append(float(forward_backward()))
        norms.append(float(nn.utils.clip_grad_norm_(parameters, 1.0)))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    found = time_steps(step, spec["warm_up"], spec["timed"], spec["patience"])
    return {
        **found,
        "losses": losses,
        "gradient_norms": norms,
        "memory_after_imports": after_imports,
        "memory_peak": memory()[1],
        "versions": {"torch": torch.__version__, **_versions("transformers", "trl")},
    }


def measure_loop(spec: dict[str, Any]) -> dict[str, Any]:
    """Seconds per step of `distill train`'s own loop, and of the bare step before it in the same process."""
    from distill.config.recipe import Recipe
    from distill.models.precision import resolve_precision
    from distill.models.student import BuiltStudent
    from distill.training.live_teachers import FrozenTeacher
    from distill.training.sources import StoredRows
    from distill.training.train import make_accelerator, train_student

    found = measure_step({**spec, "imports": ["distill.training.train"]})
    work = make_workload(spec["setting"], spec["live"], spec["precision"])
    rows, clock = token_rows(work, copies=4), []
    collate = rows.collate

    def clocked(*arguments):  # once a step: from one call to the next is a whole step
        clock.append((time.perf_counter(), time.process_time()))
        return collate(*arguments)

    rows.collate = clocked
    with tempfile.TemporaryDirectory() as folder:
        recipe = Recipe(
            run_dir=folder, device="cpu", threads=1, prompts={"solutions": True},
            student={"config": {"model_type": "qwen3"}, "adapter": "full"},
            train={"steps": spec["warm_up"] + spec["timed"] + 1, "warmup_steps": 0, "batch_size": len(work.prompts),
                   "micro_batch_size": len(work.prompts), "precision": spec["precision"], "checkpoint_every": 0,
                   "objectives": [spec["objective"]]},
        )  # fmt: skip
        accelerator = make_accelerator(
            recipe, resolve_precision(spec["precision"], torch.device("cpu")), Path(folder)
        )
        teacher = FrozenTeacher(work.teacher) if work.teacher is not None else None
        student = BuiltStudent(work.student, SimpleNamespace(pad_token_id=0))
        source = StoredRows(rows, recipe.train.batch_size, recipe.seed)
        train_student(recipe, accelerator, student, teacher, source, Path(folder), "loop")
    walls, cpus = zip(*clock[spec["warm_up"] :])
    return {**found, "loop_seconds": _differences(walls), "loop_cpu_seconds": _differences(cpus)}


def _differences(times: Sequence[float]) -> list[float]:
    return [b - a for a, b in itertools.pairwise(times)]


# ------------------------------------------------------------------------------------------------ matmul rates


def measure_rates(spec: dict[str, Any]) -> dict[str, Any]:
    """FLOP/s of the matmuls of a step by part, each at its best number of rows; "PART bf16" where bf16 is faster."""
    rates: dict[str, float] = {}
    setting = Setting(**spec["setting"])
    width = setting.student[0]
    shape = [(min(64, setting.kept), width, min(setting.vocabulary, 16384))]
    rates["fp32"] = best_rate(shape, torch.float32)
    rates["bf16"] = best_rate(shape, torch.bfloat16)
    usual = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    rates["medium"] = best_rate(shape, torch.float32)
    torch.set_float32_matmul_precision(usual)
    rates |= rates_of_parts(setting, torch.float32)
    if rates["bf16"] > rates["fp32"]:
        rates |= {f"{part} bf16": rate for part, rate in rates_of_parts(setting, torch.bfloat16).items()}
    from distill.devices import describe_device

    return {"rates": rates, "device": describe_device(torch.device("cpu"))}


def rates_of_parts(setting: Setting, dtype: torch.dtype) -> dict[str, float]:
    """{part of `cases.counted_work`: FLOP/s}."""
    tokens, kept, vocabulary = setting.rows * setting.tokens, setting.kept, setting.vocabulary
    rates: dict[str, float] = {}
    chunks = [n for n in (64, 128, 256, 512, 1024) if n <= kept and n * vocabulary <= 2**26] or [kept]
    for who, width in (("teacher", setting.teacher[0]), ("student", setting.student[0])):
        rates[f"{who}_body"] = best_rate([(tokens, width, setting.attention_of(width)[3])], dtype)
        rates[f"{who}_head"] = best_rate([(n, width, vocabulary) for n in chunks], dtype)
    width = setting.student[0]
    rates["student_head_back"] = max(
        best_rate([(n, vocabulary, width) for n in chunks], dtype),
        best_rate([(vocabulary, n, width) for n in chunks], dtype),
    )
    return rates


def best_rate(shapes: list[tuple[int, int, int]], dtype: torch.dtype, repeats: int = 4) -> float:
    """Most FLOP/s of [m, k] @ [k, n] over the shapes (m, k, n), into memory that is already there.

    Of CPU seconds (one thread), so that a shared core does not lower the floor of everybody.
    """
    best = 0.0
    for m, k, n in shapes:
        a, b = torch.randn(m, k, dtype=dtype), torch.randn(n, k, dtype=dtype)
        out = torch.zeros(m, n, dtype=dtype)
        for _ in range(repeats):
            start = time.process_time()
            torch.mm(a, b.t(), out=out)
            best = max(best, 2 * m * k * n / max(time.process_time() - start, 1e-9))
    return best


def _versions(*names: str) -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def main(argument: str) -> None:
    # A method may want tens of gigabytes: if memory runs out, this process is the one to go.
    guard = Path("/proc/self/oom_score_adj")
    if guard.is_file():
        guard.write_text("1000")
    torch.set_num_threads(1)
    spec = json.loads(argument)
    measure = {"step": measure_step, "loop": measure_loop, "rates": measure_rates}[spec["do"]]
    print("\n" + json.dumps(measure(spec)))


if __name__ == "__main__":
    main(sys.argv[1])
