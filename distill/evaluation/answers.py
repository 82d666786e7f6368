"""Held-out problems answered by one model: rows with verdicts, and how long it took.

    rows, measured = answer_problems(model, tokenizer, problems, "student", section)     # recipe section `evaluate`

Greedy by default: the same model gives the same rows. With `temperature` and `samples` each problem is answered
several times; a row's random numbers come from (seed, problem, sample) alone, so the same seed gives the same
rows in any batch and after any interruption. Every problem leaves its rows; one that failed has an `error`, one
that ran out of tokens is `truncated`, and neither is silently a wrong answer.
"""

import itertools
import re
import time
from typing import Any

from distill import console
from distill.config.evaluation import Evaluate
from distill.models.chat import prompt_ids, whole_turn
from distill.models.decode import Completion, Sampling, decode
from distill.models.load import eos_ids
from distill.tasks.benchmarks import LETTERS
from distill.tasks.verify import extract_answer, final_answer, judge

_OPTION = re.compile(r"(?m)^\s*\(?([A-Z])[.):、]\s*(\S.*?)\s*$")


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
    start = time.perf_counter()
    with console.bar(total=len(asked), desc=f"evaluate {name}", unit="answer", main=bar) as shown:
        completions = decode(
            model,
            [prompts[p] for p, _ in asked],
            Sampling(section.temperature, section.top_p, max_new_tokens=section.max_new_tokens),
            eos_ids=eos_ids(model, tokenizer),
            pad_id=tokenizer.pad_token_id,
            keys=[(section.seed, problems[p]["level"], problems[p]["prompt_id"], i) for p, i in asked],
            batch_size=section.batch_size,
            on_finish=lambda _row, _completion: shown.update(),
            vocab_limit=len(tokenizer),
        )
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
        "verdict": judge(
            problem["verifier"], text, problem["answer"], reason, error, options=options_of(problem)
        ),
        "finish_reason": reason,
        "tokens": len(completion.ids),
        "thinking_tokens": thinking_tokens(tokenizer, prompt, completion.ids, generated),
        "logprob": sum(completion.logprobs),
        "completion_ids": completion.ids,
        "error": error,
    }


def options_of(problem: dict) -> list[str] | None:
    """The words of a multiple choice: its list of choices, else the lines `A. ...` of its prompt, from A on."""
    if problem["verifier"] != "choice":
        return None
    if problem.get("choices"):
        return problem["choices"]
    listed = dict(_OPTION.findall(problem["messages"][-1]["content"]))
    found = list(itertools.takewhile(listed.__contains__, LETTERS))
    return [listed[letter] for letter in found] if len(found) > 1 else None


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
