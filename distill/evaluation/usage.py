"""What using a model costs, measured here: tokens per second, bytes held, and USD per million tokens.

    distill evaluate CHECKPOINT ... --usd-per-hour 0.35        -> models.<name>.cost in metrics.json
    measure_ahead(model, ahead, tokenizer, prompts, 80)        # where a module for a token further ahead lies beside it

A short fixed workload, so that models compare: one prompt of 512 tokens read (prefill; the median of three after a
warm-up), and the steps of one answer of 32 tokens written alone (decode at batch 1: what one waiting person gets; the
median step, which a slow one among the 32 does not move). Decode at the batch that the evaluation used is the
evaluation itself. Prices per token follow from those speeds and from what an hour of this device costs you; without
that price they are null, never a guess. Timings are of this machine and whatever else it was doing; nothing tests
them.
"""

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from distill.models.ahead import TokenAhead, decode_ahead
from distill.models.decode import Sampling, decode
from distill.models.hooks import Hooks
from distill.models.load import eos_ids

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
