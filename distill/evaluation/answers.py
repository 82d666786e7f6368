"""Held-out problems answered by one model, with verdicts and times, and the scores that follow.

Held-out problems answered by one model: rows with verdicts, and how long it took.

    rows, measured = answer_problems(model, tokenizer, problems, "student", section)     # recipe section `evaluate`

Greedy by default: the same model gives the same rows. With `temperature` and `samples` each problem is answered
several times; a row's random numbers come from (seed, problem, sample) alone, so the same seed gives the same
rows in any batch and after any interruption. Every problem leaves its rows; one that failed has an `error`, one
that ran out of tokens is `truncated`, and neither is silently a wrong answer.

Questions are cut into parts of like length, and the processes of a launch answer a share of them each. The parts are
the same for one process as for many, since logits move by a rounding with the rows beside them: so are the answers.

Scores from answer rows: of one model (accuracy, pass@k, lengths), and of several on the same problems.

    summarise(rows)["accuracy"]          # with n, standard error, interval, truncated, errors beside it
    by_problem(rows)                     # the rows of each problem together

A problem answered once is right or wrong, and the interval is Wilson's. Of one answered n times only the
share of right answers is known, the n answers are not independent, and every interval is a bootstrap that
draws whole problems (distill/evaluation/stats.py); k runs over 1, 2, 4, ... up to n.

Several models on the same problems are compared: who is better, and what was forgotten on the way.

    compare({"base": rows, "student": rows})      # every pair and task, `Comparison` of metrics.json
    forgetting(rows_of, base="base")              # of what the base solved, the share still solved

One rule for a verdict: BETTER or WORSE, by the sign of the difference, if the p-value, corrected for every
comparison in the file (Holm 1979), is below 1 - level; else INCONCLUSIVE. Problems answered once are compared
by McNemar's exact test with Tango's interval; problems answered several times by flipping the signs of the
per-problem differences, which is the same test with larger numbers, and a paired bootstrap. The bootstrap
interval stands beside either; it draws whole problems.
"""

import itertools
import math
import re
import time
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from accelerate import PartialState
from transformers import StopStringCriteria

from distill import console
from distill.config.evaluation import Evaluate
from distill.devices import dealt, even_size, free_memory
from distill.evaluation.stats import (
    bootstrap_interval,
    holm,
    majority_at_k,
    mean_stderr,
    paired_comparison,
    pass_at_k,
    score,
    sign_flip_p,
    wilson_interval,
)
from distill.models.chat import check_prompts, has_own_template, prompt_ids, whole_turn
from distill.models.decode import Completion, Sampling, decode
from distill.models.describe import describe_model
from distill.models.load import eos_ids
from distill.tasks.corpus import LETTERS
from distill.tasks.verify import extract_answer, final_answer, judge

RUNS_ON = ("\n\n", "\nUser:")  # what follows the answer of a model that was never taught to end one
MOST_ON_CPU = 1.5e9  # bytes of keys, values and logits
MOST_PADDING = 1.5  # times the tokens of two parts cut by length, for two whose work is alike
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

    How many is `even_size`'s word, which two processes share well. Nothing here knows how many processes there are. Of
    two parts, each takes every second question, so that their answers are as long, unless the padding of short
    questions beside long ones would cost more than that spares.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    count = max(1, math.ceil(len(order) / even_size(len(order), batch_size)))
    ends = [len(order) * i // count for i in range(count + 1)]
    parts = [order[a:b] for a, b in itertools.pairwise(ends)]
    if count == 2:
        mixed = [order[::2], order[1::2]]
        if _padded(mixed, lengths) <= MOST_PADDING * _padded(parts, lengths):
            return mixed
    return parts


def _padded(parts: list[list[int]], lengths: list[int]) -> int:
    """Tokens of all parts with padding; the first of a part is its longest."""
    return sum(len(part) * lengths[part[0]] for part in parts)


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


# ==== Scores from answer rows ====

_RIGHT = "\0right"  # no answer is spelled like this: right ones are one vote, however they are written


def by_problem(rows: list[dict]) -> list[list[dict]]:
    """Rows in their order, those of one problem together; a problem begins at sample 0."""
    groups: list[list[dict]] = []
    for row in rows:
        if row["sample_idx"] == 0:
            groups.append([])
        groups[-1].append(row)
    return groups


def right(rows: list[dict]) -> list[int]:
    """Per problem, how many of its answers are correct."""
    return [sum(row["verdict"] == "correct" for row in group) for group in by_problem(rows)]


def summarise(rows: list[dict], seed: int = 0) -> dict[str, Any]:
    """One score of metrics.json (`TaskScore` in distill/evaluation/schema.py) from rows of equal samples."""
    groups = by_problem(rows)
    samples = len(groups[0]) if groups else 1
    found = _sampled(groups, samples, seed) if samples > 1 else _single(rows)
    verdicts = [row["verdict"] for row in rows]
    finished = [row for row, verdict in zip(rows, verdicts) if verdict not in ("truncated", "error")]
    thinking = _mean([row["thinking_tokens"] for row in rows])
    tokens = _mean([row["tokens"] for row in rows])
    return {
        **found,
        "samples": samples,
        "truncated": verdicts.count("truncated"),
        "no_answer": verdicts.count("no_answer"),
        "unparsed": sum(row["final"] is None for row in finished),
        "errors": verdicts.count("error"),
        "mean_tokens": tokens,
        "mean_thinking_tokens": thinking,
        "mean_answer_tokens": None if tokens is None else round(tokens - thinking, 2),
    }


def _mean(values: list[int]) -> float | None:
    return round(sum(values) / len(values), 2) if values else None


def _single(rows: list[dict]) -> dict[str, Any]:
    base = score([row["verdict"] == "correct" for row in rows])
    return {**base, "interval": "wilson", "pass_at_k": {"1": base["accuracy"]}}


def _sampled(groups: list[list[dict]], samples: int, seed: int) -> dict[str, Any]:
    ks = [2**i for i in range(samples.bit_length())]
    counts = right([row for group in groups for row in group])
    passed = {k: [pass_at_k(samples, c, k) for c in counts] for k in ks}
    votes = [[_RIGHT if r["verdict"] == "correct" else r["final"] for r in group] for group in groups]
    elected = {k: [majority_at_k(vote, _RIGHT, k) for vote in votes] for k in ks}
    return {
        "n": len(groups),
        "accuracy": sum(passed[1]) / len(groups),
        "stderr": mean_stderr(passed[1]),
        "ci95": problem_interval(passed[1], seed),
        "interval": "bootstrap over problems",
        "pass_at_k": _per_k(passed, lambda values: sum(values) / len(values)),
        "pass_at_k_ci95": _per_k(passed, lambda values: problem_interval(values, seed)),
        "majority_at_k": _per_k(elected, lambda values: sum(values) / len(values)),
        "majority_at_k_ci95": _per_k(elected, lambda values: problem_interval(values, seed)),
    }


def _per_k(values: dict[int, list[float]], of: Callable) -> dict[str, Any]:
    return {str(k): of(v) for k, v in values.items()}


def problem_interval(values: list[float], seed: int = 0) -> list[float] | None:
    """95 % interval of the mean of per-problem values in 0 to 1, by bootstrap over problems.

    Where every problem has 0, or every one 1, resampling knows no doubt; Wilson's interval for that many
    independent problems stands in, which is the honest one.
    """
    if values and (set(values) == {0.0} or set(values) == {1.0}):
        return list(wilson_interval(int(sum(values)), len(values)))
    return bootstrap_interval(values, seed)


def names(rows: list[dict], key: str) -> list[str]:
    """Distinct values in order of difficulty where they are the embedded levels, else of first appearance."""
    found = list(dict.fromkeys(row[key] for row in rows))
    known = ["easy", "medium", "hard"]
    return sorted(found, key=lambda v: known.index(v) if v in known else len(known))


def compare(rows_of: dict[str, list[dict]], level: float = 0.95, seed: int = 0) -> list[dict[str, Any]]:
    """Every pair of models on the same problems, per task; the verdict is about b.

    `difference` is accuracy of b minus accuracy of a. Raises UserError where two models answered different
    numbers of problems.
    """
    models = list(rows_of)
    found = []
    for i, a in enumerate(models):
        for b in models[i + 1 :]:
            for task in names(rows_of[a], "level"):
                both = [[r for r in rows_of[m] if r["level"] == task] for m in (a, b)]
                found.append({"a": a, "b": b, "task": task, **_pair(*both, seed)})
    for item, corrected in zip(found, holm([item["p_value"] for item in found])):
        item |= {
            "p_value_holm": corrected,
            "correction": "holm",
            "family_size": len(found),
            "level": level,
            "verdict": "INCONCLUSIVE",
        }
        if corrected is not None and corrected < 1 - level:
            item["verdict"] = "BETTER" if item["difference"] > 0 else "WORSE"
    return found


def _pair(rows_a: list[dict], rows_b: list[dict], seed: int) -> dict[str, Any]:
    samples = len(by_problem(rows_a)[0])
    a, b = right(rows_a), right(rows_b)
    # It refuses lists of different lengths, and judges its first argument against its second.
    once = paired_comparison([c > 0 for c in b], [c > 0 for c in a])
    differences = [y - x for x, y in zip(a, b)]
    resampled = bootstrap_interval([d / samples for d in differences], seed)
    shared = {"n": len(a), "bootstrap_ci95": resampled}
    if samples == 1:
        kept = {key: once[key] for key in ("difference", "ci95", "p_value")}
        return {**shared, **kept, "interval": "tango", "test": "mcnemar exact"}
    return {
        **shared,
        "difference": sum(differences) / samples / len(a),
        "ci95": resampled,
        "interval": "bootstrap over problems",
        "p_value": sign_flip_p(differences),
        "test": "sign flips over problems, exact",
    }


def forgetting(rows_of: dict[str, list[dict]], base: str, seed: int = 0) -> dict[str, Any]:
    """`Forgetting` of metrics.json for every model of `rows_of` but the base.

    A problem counts as solved by the base if at least half of its answers there are right. A model that is
    merely as good as the base, with errors of its own, also loses some of these problems and gains others:
    read `kept` beside `gained`.
    """
    found: dict[str, dict] = {}
    for name, rows in rows_of.items():
        if name == base:
            continue
        tasks = {task: {task} for task in names(rows, "level")}
        if len(tasks) > 1:
            tasks["all"] = set(tasks)
        found[name] = {
            task: _kept(*([r for r in rows_of[m] if r["level"] in levels] for m in (base, name)), seed)
            for task, levels in tasks.items()
        }
    return {"base": base, "models": found}


def _kept(base_rows: list[dict], rows: list[dict], seed: int) -> dict[str, Any]:
    samples = len(by_problem(rows)[0])
    solved = [2 * c >= samples for c in right(base_rows)]
    shares = [c / samples for c in right(rows)]
    old = [share for share, before in zip(shares, solved) if before]
    new = [share for share, before in zip(shares, solved) if not before]
    interval = wilson_interval(int(sum(old)), len(old)) if samples == 1 else problem_interval(old, seed)
    return {
        "n": len(old),
        "kept": sum(old) / len(old) if old else None,
        "ci95": None if interval is None else list(interval),
        "gained": sum(new) / len(new) if new else None,
        "gained_n": len(new),
    }
