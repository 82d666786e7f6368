"""Held-out problems answered by one model: rows with verdicts, and how long it took.

    rows, measured = answer_problems(model, tokenizer, problems, "student", section)     # recipe section `evaluate`

Greedy by default: the same model gives the same rows. With `temperature` and `samples` each problem is answered
several times; a row's random numbers come from (seed, problem, sample) alone, so the same seed gives the same
rows in any batch and after any interruption. Every problem leaves its rows; one that failed has an `error`, one
that ran out of tokens is `truncated`, and neither is silently a wrong answer.

Questions are cut into parts of like length, and the processes of a launch answer a share of them each. The parts are
the same for one process as for many, since logits move by a rounding with the rows beside them: so are the answers.
"""

import itertools
import math
import time
from typing import Any

from accelerate import PartialState

from distill import console
from distill.config.evaluation import Evaluate
from distill.devices import dealt
from distill.models.chat import prompt_ids, whole_turn
from distill.models.decode import Completion, Sampling, decode
from distill.models.load import eos_ids
from distill.tasks.verify import extract_answer, final_answer, judge

LEAST_PART = 32  # questions: fewer would waste a step of decoding


def answer_problems(
    model,
    tokenizer,
    problems: list[dict],
    name: str,
    section: Evaluate,
    bar: bool = True,
) -> tuple[list[dict], dict[str, Any]]:
    """(rows of ANSWER_SCHEMA, `section.samples` per problem in the order of `problems`; measurements).

    The measurements are seconds and tokens, as in `Cost` of metrics.json. `bar`: whether to show progress.
    """
    prompts = [prompt_ids(tokenizer, p["messages"]) for p in problems]
    asked = [(p, i) for p in range(len(problems)) for i in range(section.samples)]
    world, main = PartialState().num_processes, PartialState().is_main_process
    completions: list[Completion | None] = [None] * len(asked)
    start = time.perf_counter()
    with console.bar(total=len(asked), desc=f"evaluate {name}", unit="answer", main=bar and main) as shown:
        # The other processes are taken to be as fast as this one.
        def more(_row: int, _completion: Completion) -> None:
            shown.update(min(world, shown.total - shown.n))

        def answer(part: list[int]) -> list[Completion]:
            return decode(
                model,
                [prompts[asked[a][0]] for a in part],
                Sampling(section.temperature, section.top_p, max_new_tokens=section.max_new_tokens),
                eos_ids=eos_ids(model, tokenizer),
                pad_id=tokenizer.pad_token_id,
                keys=[_key(section.seed, problems[asked[a][0]], asked[a][1]) for a in part],
                batch_size=section.batch_size,
                on_finish=more,
                vocab_limit=len(tokenizer),
            )

        pieces = answer_parts([len(prompts[p]) for p, _ in asked], section.batch_size)
        for part, found in zip(pieces, dealt(pieces, answer)):
            for place, completion in zip(part, found):
                completions[place] = completion
    seconds = time.perf_counter() - start

    rows = [
        _row(name, problems[p], i, tokenizer, prompts[p], completion)
        for (p, i), completion in zip(asked, completions)
    ]
    tokens = sum(row["tokens"] for row in rows)
    measured = {
        "seconds": round(seconds, 3),
        "prompt_tokens": sum(len(prompts[p]) for p, _ in asked),
        "generated_tokens": tokens,
        "decode_tokens_per_second": round(tokens / seconds, 1),
        "batch_size": section.batch_size,
    }
    return rows, measured


def answer_parts(lengths: list[int], batch_size: int) -> list[list[int]]:
    """Places of questions of these lengths, longest first, in parts of one size that are decoded each by itself.

    At most `batch_size` in a part, and an even number of parts where that leaves them `LEAST_PART` questions: two
    processes then have the same work. Nothing here knows how many processes there are.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    count = max(1, math.ceil(len(order) / batch_size))
    if count % 2 and len(order) >= (count + 1) * LEAST_PART:
        count += 1
    ends = [len(order) * i // count for i in range(count + 1)]
    return [order[a:b] for a, b in itertools.pairwise(ends)]


def _key(seed: int, problem: dict, sample: int) -> tuple:
    return seed, problem["level"], problem["prompt_id"], sample


def _row(name: str, problem: dict, sample: int, tokenizer, prompt: list[int], completion: Completion) -> dict:
    generated = tokenizer.decode(completion.ids, skip_special_tokens=True)
    text = whole_turn(tokenizer, generated)  # a template may have opened the thinking
    reason, error = completion.finish_reason, completion.error
    return {
        "model": name,
        "prompt_id": problem["prompt_id"],
        "sample_idx": sample,
        "family": problem["family"],
        "level": problem["level"],
        "prompt": problem["messages"][-1]["content"],
        "reference": problem["answer"],
        "text": text,
        "answer": extract_answer(text),
        "final": final_answer(problem["verifier"], text) if reason == "stop" else None,
        "verdict": judge(problem["verifier"], text, problem["answer"], reason, error),
        "finish_reason": reason,
        "tokens": len(completion.ids),
        "thinking_tokens": thinking_tokens(tokenizer, prompt, completion.ids, generated),
        "logprob": sum(completion.logprobs),
        "completion_ids": completion.ids,
        "error": error,
    }


def thinking_tokens(tokenizer, prompt: list[int], ids: list[int], text: str) -> int:
    """How many of the tokens `ids`, whose text is `text`, come up to and with the last </think>.

    All of them where <think> was opened, here or by the chat template, and never closed.
    """
    head, closed, _ = text.rpartition("</think>")
    if not closed:
        lead = tokenizer.decode(prompt[-8:], skip_special_tokens=True)
        opened = "<think>" in text or "<think>" in lead.rpartition("</think>")[2]
        return len(ids) if opened else 0
    wanted = len(head) + len(closed)
    # The fewest tokens whose text reaches that far: longer prefixes have longer texts.
    low, high = 0, len(ids)
    while low < high:
        middle = (low + high) // 2
        reached = len(tokenizer.decode(ids[:middle], skip_special_tokens=True)) >= wanted
        low, high = (low, middle) if reached else (middle + 1, high)
    return low
