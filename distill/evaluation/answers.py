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
import re
import time
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

from accelerate import PartialState
from transformers import StopStringCriteria

from distill import console
from distill.config.evaluation import Evaluate
from distill.devices import dealt, even_size, free_memory
from distill.models.chat import check_prompts, has_own_template, prompt_ids, whole_turn
from distill.models.decode import Completion, Sampling, decode
from distill.models.describe import describe_model
from distill.models.load import eos_ids
from distill.tasks.benchmarks import LETTERS
from distill.tasks.verify import extract_answer, final_answer, judge

RUNS_ON = ("\n\n", "\nUser:")  # what follows the answer of a model that was never taught to end one
MOST_ON_CPU = 1.5e9  # bytes of keys, values and logits
LOGIT_BYTES = 24  # of a row and a token: scores in float32, their sum in float64
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
    prompts = problem_prompts(tokenizer, problems, name)
    stop = stop_strings(tokenizer, section)
    batch = fitting_batch(model, len(tokenizer), prompts, section)
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
                batch_size=batch,
                stopping=StopStringCriteria(tokenizer, stop) if stop else None,
                on_finish=more,
                vocab_limit=len(tokenizer),
            )

        pieces = answer_parts([len(prompts[p]) for p, _ in asked], batch)
        for part, found in zip(pieces, dealt(pieces, answer)):
            for place, completion in zip(part, found):
                completions[place] = completion
    seconds = time.perf_counter() - start

    rows = [
        _row(name, problems[p], i, tokenizer, prompts[p], completion, stop)
        for (p, i), completion in zip(asked, completions)
    ]
    tokens = sum(row["tokens"] for row in rows)
    measured = {
        "seconds": round(seconds, 3),
        "prompt_tokens": sum(len(prompts[p]) for p, _ in asked),
        "generated_tokens": tokens,
        "decode_tokens_per_second": round(tokens / seconds, 1),
        "batch_size": batch,
    }
    return rows, measured


_LAST_READ: WeakKeyDictionary[Any, tuple[list[dict], list[list[int]]]] = WeakKeyDictionary()  # by tokenizer


def problem_prompts(tokenizer, problems: list[dict], name: str = "problems") -> list[list[int]]:
    """The prompt of every problem in ids, [P]. A tokenizer reads the same list once, whatever is measured with it.

    Raises UserError, beginning with `name`, for prompts that the template refuses.
    """
    known, prompts = _LAST_READ.get(tokenizer, (None, []))
    if known is not problems:
        check_prompts(tokenizer, problems, name)
        prompts = [prompt_ids(tokenizer, problem["messages"]) for problem in problems]
        _LAST_READ[tokenizer] = problems, prompts
    return prompts


def answer_parts(lengths: list[int], batch_size: int) -> list[list[int]]:
    """Places of questions of these lengths, longest first, in parts of one size that are decoded each by itself.

    How many is `even_size`'s word, which two processes share well. Nothing here knows how many processes there are.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    count = max(1, math.ceil(len(order) / even_size(len(order), batch_size)))
    ends = [len(order) * i // count for i in range(count + 1)]
    return [order[a:b] for a, b in itertools.pairwise(ends)]


def _key(seed: int, problem: dict, sample: int) -> tuple:
    return seed, problem["level"], problem["prompt_id"], sample


def stop_strings(tokenizer, section: Evaluate) -> list[str]:
    """Where an answer ends besides at an end token: what was asked for; of a model that has no turns, `RUNS_ON`."""
    return list(section.stop) or ([] if has_own_template(tokenizer) else list(RUNS_ON))


def fitting_batch(model, tokens: int, prompts: list[list[int]], section: Evaluate) -> int:
    """How many of these answers are decoded together: as many as memory holds the keys, values and logits of.

    Counted before anything is allocated: 256 rows of 1,174 tokens are 34 GB in a model of 0.6 billion parameters. On a
    CPU more than `MOST_ON_CPU` buys nothing.
    """
    device = model.get_input_embeddings().weight.device
    free = free_memory(device)
    longest = max(map(len, prompts), default=1) + section.max_new_tokens
    # A batch that loses its finished rows holds its cache twice for a moment.
    per_row = 2 * longest * describe_model(model)["kv_bytes_per_token"] + LOGIT_BYTES * tokens
    room = MOST_ON_CPU if device.type == "cpu" else math.inf
    room = min(room, free / 2) if free is not None else room
    fits = section.batch_size if math.isinf(room) else max(1, int(room // per_row))
    if fits < min(section.batch_size, len(prompts) * section.samples):
        console.say(
            f"evaluate: {fits} answers at a time, not {section.batch_size}: an answer of {longest:,} tokens holds "
            f"{per_row / 1e6:,.0f} MB"
        )
    return min(section.batch_size, fits)


def _row(
    name: str,
    problem: dict,
    sample: int,
    tokenizer,
    prompt: list[int],
    completion: Completion,
    stop: Sequence[str] = (),
) -> dict:
    generated = tokenizer.decode(completion.ids, skip_special_tokens=True)
    ends = [place for text in stop if (place := generated.find(text)) >= 0]
    generated = generated[: min(ends)] if ends else generated
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
