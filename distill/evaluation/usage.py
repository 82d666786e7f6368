"""Using a model: what it costs here, and what lower precision does to it.

What using a model costs, measured here: tokens per second, bytes held, and USD per million tokens.

    distill evaluate CHECKPOINT ... --usd-per-hour 0.35        -> models.<name>.cost in metrics.json
    measure_ahead(model, ahead, tokenizer, prompts, 80)        # where a module for a token further ahead lies beside it

A short fixed workload, so that models compare: one prompt of 512 tokens read (prefill; the median of three after a
warm-up), and the steps of one answer of 32 tokens written alone (decode at batch 1: what one waiting person gets; the
median step, which a slow one among the 32 does not move). Decode at the batch that the evaluation used is the
evaluation itself. Prices per token follow from those speeds and from what an hour of this device costs you; without
that price they are null, never a guess. Timings are of this machine and whatever else it was doing; nothing tests
them.

One checkpoint in several precisions: what each does to its loss, its answers and its routing (router flips).

Every precision reads the same rows of tokens, teacher-forced, with the same weights (as float32, whatever they
are stored in; bf16 and fp16 are autocast, as in training; float8 is `distill.models.fp8`), so that nothing but the
arithmetic differs. For a mixture of experts the decisions of every router are compared with those of
float32, token by token: a flip sends a token through other weights, which no small rounding error does.

    precision_sweep(model, rows, tokenizer.pad_token_id)
    # [{"precision": "fp32", "ran": True, "nll_per_token": ...}, {"precision": "bf16", ..., "flips": {...}}, ...]

Later layers mix flips of their own with what earlier layers hand on; only the first routed layer's are local. A
relative loss error says little where the loss itself is near 0, as on tasks that the model has solved.

Shapes: T tokens of all rows, N kept tokens of a batch, E experts, k experts per token.
"""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from distill.data.batches import TokenRows
from distill.errors import RunError, UserError
from distill.models.ahead import TokenAhead, decode_ahead
from distill.models.decode import Sampling, decode
from distill.models.fp8 import Fp8Report, fp8_emulated
from distill.models.hooks import Hooks, KeptLogits
from distill.models.load import eos_ids
from distill.models.precision import EMULATED, resolve_precision
from distill.models.routers import find_routers
from distill.moe.recording import LayerRecord, record_routing
from distill.training.losses.divergences import cross_entropy

PREFILL_TOKENS = 512
DECODE_TOKENS = 32
_DECODE_PROMPT = 16
_REPEATS = 3
AHEAD_PROMPTS = 32  # answers in which drafts are counted
_ALONE = 6  # of them are timed, one at a time


def usage_cost(
    model, tokenizer, described: dict, answering: dict, usd_per_hour: float | None, speed: bool = True
) -> dict[str, Any]:
    """Keys of `Cost` in metrics.json beyond the answering itself.

    described: of `describe_model`. answering: `decode_tokens_per_second` of the whole evaluation. `speed` off
    leaves the two timings out, and with them the price of input tokens.
    """
    timed = measure_speed(model, tokenizer) if speed else {}
    found = {
        "weight_bytes": described["weight_bytes"],
        "kv_bytes_per_token": described["kv_bytes_per_token"],
        **timed,
    }
    if usd_per_hour is not None:
        found |= {
            "usd_per_hour": usd_per_hour,
            "usd_per_million_input_tokens": usd_per_million(
                usd_per_hour, timed.get("prefill_tokens_per_second")
            ),
            "usd_per_million_output_tokens": usd_per_million(
                usd_per_hour, answering["decode_tokens_per_second"]
            ),
        }
    return found


def usd_per_million(usd_per_hour: float, tokens_per_second: float | None) -> float | None:
    """USD for a million tokens at this speed; None without a speed."""
    return usd_per_hour / 3600 / tokens_per_second * 1e6 if tokens_per_second else None


@torch.inference_mode()
def measure_speed(model, tokenizer) -> dict[str, Any]:
    """Prefill and batch-1 decode, tokens per second; shorter where the model's context is."""
    config = model.config.get_text_config(decoder=True)
    context = getattr(config, "max_position_embeddings", None) or PREFILL_TOKENS
    # Ordinary ids, all over the vocabulary: a mixture of experts routes a repeated token to the same experts.
    vocabulary = min(len(tokenizer), config.vocab_size)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (1, min(PREFILL_TOKENS, context)), generator=generator)
    device = model.get_input_embeddings().weight.device
    ids = ids.to(device)
    prefill = _seconds(lambda: model(input_ids=ids, use_cache=False, logits_to_keep=1), device)
    prompt = ids[0, : min(_DECODE_PROMPT, context // 2)].tolist()
    tokens = min(DECODE_TOKENS, context - len(prompt))

    return {
        "prefill_tokens": ids.shape[1],
        "prefill_tokens_per_second": round(ids.shape[1] / prefill, 1),
        "decode_tokens_per_second_batch_1": round(1 / _step_seconds(model, prompt, tokens), 1),
    }


def measure_ahead(
    model, ahead: TokenAhead, tokenizer, prompts: list[list[int]], max_new_tokens: int, speed: bool = True
) -> dict[str, Any]:
    """`Ahead` of metrics.json: how many drafts are taken in greedy answers to these prompts, and what that saves.

    With `speed`, some answers are written alone, with drafts and without: the same tokens either way.
    """
    ends, pad = eos_ids(model, tokenizer), tokenizer.pad_token_id
    given = {"eos_ids": ends, "pad_id": pad, "vocab_limit": len(tokenizer)}
    greedy = Sampling(max_new_tokens=max_new_tokens)
    answers, drafts = decode_ahead(model, ahead, prompts, greedy, **given)
    tokens = sum(len(answer.ids) for answer in answers)
    found = {
        "answers": len(prompts),
        "drafts": drafts.drafted,
        "acceptance": round(drafts.acceptance, 4),
        "tokens_per_pass": round(tokens / max(1, tokens - drafts.taken), 4),
    }
    if speed:
        device = model.get_input_embeddings().weight.device
        few = slice(None, None, max(1, len(prompts) // _ALONE))
        written = sum(len(answer.ids) for answer in answers[few])
        for key, write in (
            ("tokens_per_second", lambda p: decode_ahead(model, ahead, [p], greedy, **given)),
            ("tokens_per_second_without", lambda p: decode(model, [p], greedy, batch_size=1, **given)),
        ):
            seconds = _seconds(lambda write=write: [write(prompt) for prompt in prompts[few]], device)
            found[key] = round(written / seconds, 1)
    return found


def _step_seconds(model, prompt: list[int], tokens: int) -> float:
    """Median wall time of a decoding step: from one call of the model to the next, whatever lies between them.

    No end tokens: the answer has its full length whatever the model thinks of random ids.
    """
    calls: list[float] = []
    with Hooks() as hooks:
        hooks.before(model, lambda _model, _args: calls.append(time.perf_counter()))
        decode(model, [prompt], Sampling(max_new_tokens=tokens), eos_ids=set(), pad_id=0, batch_size=1)
    steps = [end - start for start, end in itertools.pairwise([*calls, time.perf_counter()])]
    return statistics.median(steps[1:] or steps)  # the first one reads the prompt


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Median wall time of `work`, after one call of it that is not measured."""
    times = []
    for _ in range(1 + _REPEATS):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


# ---- One checkpoint in several precisions ----

PRECISIONS = ("fp32", "bf16", "fp16", "fp8-emulated", "fp8-emulated-tensor")
_AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16} | dict.fromkeys(
    EMULATED, torch.bfloat16
)


def precision_sweep(
    model: nn.Module,
    rows: TokenRows,
    pad_id: int,
    precisions: tuple[str, ...] = PRECISIONS,
    answers: Callable[[nn.Module], dict[str, float]] | None = None,
    batch_size: int = 64,
) -> list[dict[str, Any]]:
    """One entry per precision, in the order asked; `model` is bitwise what it was afterwards.

    precision, ran; reason: how it ran, or why it did not (then nothing else is there).
    nll_per_token: nats per completion token of `rows`; None where it is not finite.
    relative_loss_error.fp32|bf16: signed (above 0: worse) and absolute, of nll_per_token; None without a reference.
    kl: KL from float32 to this precision, nats per completion token, over the first `kl_tokens` (as many as fit).
    float8_share: of all parameters, those that were multiplied in float8 (or four bits); weight_bytes: of all weights
    if those were stored in that format and the others in 16 bits.
    tasks: whatever `answers(model)` says, called with the precision in force; {level: score}.
    flips (MoE only, against float32): layers.<name> of
      slots: 1 - mean |A & B| / k, the share of assignments that changed; tokens: share with any change;
      margin_all, margin_flipped: mean distance of the k-th to the next selection score (bias included) under
      float32, over all tokens and over those that flipped; None where no token flipped, and where selection is not
      a top k of scores plus bias (group limits, hash tables, an unrecognised score function);
    flips.slots: mean over layers; flips.tokens: share of tokens that changed in any layer.
    Raises UserError for a precision that does not exist.
    """
    device = next(model.parameters()).device
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        reference, found, whole = None, {}, Reference()
        # float32 first, asked for or not: it is what the others are compared with.
        for name in dict.fromkeys(("fp32", *precisions)):
            reason, why_not = _can_run(model, name, device)
            if why_not:
                found[name] = {"precision": name, "ran": False, "reason": why_not}
                continue
            with running_in(model, name) as report:
                nll, decisions = _read(model, rows, pad_id, batch_size, device, whole)
                entry = {"precision": name, "ran": True, "reason": reason, "nll_per_token": nll}
                entry |= {"kl": whole.kl(), "kl_tokens": whole.tokens}
                if report:
                    entry["float8_share"] = report.share
                    entry["weight_bytes"] = report.weight_bytes
                if answers:
                    entry["tasks"] = answers(model)
            reference = reference or decisions
            if decisions and name != "fp32":
                entry["flips"] = routing_flips(reference, decisions)
            found[name] = entry
    finally:
        for module, training in modes.items():
            module.training = training
    for entry in found.values():
        if entry["ran"]:
            entry["relative_loss_error"] = {
                other: _relative(entry["nll_per_token"], found.get(other, {}).get("nll_per_token"))
                for other in ("fp32", "bf16")
            }
    return [found[name] for name in dict.fromkeys(precisions)]


def _can_run(model: nn.Module, name: str, device: torch.device) -> tuple[str, str | None]:
    """(how it runs, why it cannot)."""
    if getattr(model, "is_quantized", False):
        return "", "the checkpoint is stored in a quantised format, which fixes its arithmetic"
    if name not in _AUTOCAST and name in ("fp8", "fp8-te"):
        return "", "real float8 converts a model for training; fp8-emulated shows its arithmetic"
    if name not in _AUTOCAST:
        raise UserError(f"precision '{name}' does not exist; choose among {', '.join(_AUTOCAST)}")
    try:
        return resolve_precision(name, device).reason, None
    except UserError as error:
        return "", error.problems[0]


@contextmanager
def running_in(model: nn.Module, precision: str) -> Iterator[Fp8Report | None]:
    """Forward passes inside compute in `precision`; weights are float32 there, and as stored outside."""
    device, dtype = next(model.parameters()).device, _AUTOCAST[precision]
    emulation = fp8_emulated(model, EMULATED[precision]) if precision in EMULATED else nullcontext()
    with (
        _float32_weights(model),
        emulation as report,
        torch.autocast(device.type, dtype, enabled=bool(dtype)),
    ):
        yield report


@contextmanager
def _float32_weights(model: nn.Module) -> Iterator[None]:
    tensors = [*model.parameters(), *model.buffers()]
    stored = [(t, t.data) for t in tensors if t.is_floating_point() and t.dtype != torch.float32]
    for tensor, data in stored:
        tensor.data = data.float()
    try:
        yield
    finally:
        for tensor, data in stored:  # the very tensors that were there: nothing is rounded back
            tensor.data = data


# ---------------------------------------------------------------------- reading the rows


class Routed(NamedTuple):
    """One layer's decisions: indices [T, k], margin [T] or None where it is not defined."""

    indices: Tensor
    margin: Tensor | None


class Reference:
    """The first reading's log-probabilities of as many tokens as fit in memory, and how far later ones diverge."""

    def __init__(self, most_bytes: float = 256e6):
        self._left, self._kept, self._first = most_bytes, [], True
        self._place, self._sum, self.tokens = 0, 0.0, 0

    def add(self, logits: Tensor) -> None:
        """One batch [N, V], in the same order in every reading."""
        if self._first:
            fits = min(len(logits), int(self._left // (4 * logits.shape[1])))
            self._left = self._left - 4 * fits * logits.shape[1] if fits == len(logits) else 0
            self._kept.append(logits[:fits].log_softmax(-1).cpu())
        kept = self._kept[self._place].to(logits.device)
        self._place += 1
        other = logits[: len(kept)].log_softmax(-1)
        self._sum += float(
            torch.nn.functional.kl_div(other, kept, reduction="none", log_target=True).double().sum()
        )
        self.tokens += len(kept)

    def kl(self) -> float | None:
        """Nats per token of the reading that ends here; None where it is not finite or nothing was kept."""
        value = self._sum / self.tokens if self.tokens else math.nan
        self._first = False
        return value if math.isfinite(value) else None

    def begin(self) -> None:
        self._place, self._sum, self.tokens = 0, 0.0, 0


@torch.no_grad()
def _read(
    model: nn.Module, rows: TokenRows, pad_id: int, batch_size: int, device: torch.device, whole: Reference
) -> tuple[float | None, dict[str, Routed]]:
    """(nats per completion token, decisions by layer; none for a dense model). `whole` hears the logits."""
    whole.begin()
    order = np.argsort(rows.lengths, kind="stable")
    total, tokens = 0.0, 0
    recorder = record_routing(model) if find_routers(model) else nullcontext()
    with KeptLogits(model) as ask, recorder as recording:
        for start in range(0, len(order), batch_size):
            batch = rows.collate(order[start : start + batch_size], pad_id).to(device)
            logits = ask(batch.input_ids, batch.attention_mask, batch.places).float()  # [N, V]
            whole.add(logits)
            total += float(cross_entropy(logits, batch.targets).double().sum())
            tokens += len(logits)
    layers = recording.layers.items() if recording else ()
    decisions = {name: Routed(record.indices, _margin_of(record)) for name, record in layers}
    return (total / tokens if math.isfinite(total) else None), decisions


def _margin_of(record: LayerRecord) -> Tensor | None:
    try:
        scores = record.scores
    except RunError:  # no single score function explains the weights
        return None
    bias = record.router.bias
    return selection_margin(scores if bias is None else scores + bias.float().cpu(), record.indices)


def selection_margin(selection: Tensor, indices: Tensor) -> Tensor | None:
    """Least selection score [T, E] of the chosen experts [T, k] less the greatest of the others -> [T].

    None where a token did not choose its top k, so that this distance is not what decided, or chose every expert.
    """
    chosen = torch.zeros_like(selection, dtype=torch.bool).scatter_(1, indices, True)
    least = selection.masked_fill(~chosen, math.inf).amin(1)
    margin = least - selection.masked_fill(chosen, -math.inf).amax(1)
    return margin if bool(((margin > -1e-6) & margin.isfinite()).all()) else None


def routing_flips(reference: dict[str, Routed], other: dict[str, Routed]) -> dict[str, Any]:
    """What changed between two readings of the same tokens; see precision_sweep for the fields."""
    layers, anywhere = {}, []
    for name, (indices, margin) in reference.items():
        kept = (indices[:, :, None] == other[name].indices[:, None, :]).any(-1).sum(-1)  # [T] of k
        flipped = kept < indices.shape[1]
        anywhere.append(flipped)
        some = margin is not None and bool(flipped.any())
        layers[name] = {
            "slots": 1 - float(kept.double().mean()) / indices.shape[1],
            "tokens": float(flipped.double().mean()),
            "margin_all": None if margin is None else float(margin.double().mean()),
            "margin_flipped": float(margin[flipped].double().mean()) if some else None,
        }
    return {
        "layers": layers,
        "slots": sum(layer["slots"] for layer in layers.values()) / len(layers),
        "tokens": float(torch.stack(anywhere).any(0).double().mean()),
    }


def _relative(loss: float | None, reference: float | None) -> dict[str, float] | None:
    if loss is None or not reference:
        return None
    signed = (loss - reference) / reference
    return {"signed": signed, "absolute": abs(signed)}
