"""Held-out problems answered by one model: rows with verdicts, and what its routers did meanwhile.

    rows, routing = answer_problems(model, tokenizer, problems, name="student", max_new_tokens=96, batch_size=256)

Answers are greedy: the same model gives the same rows. Every problem leaves a row; one that failed has an
`error`, one that ran out of tokens is `truncated`, and neither is silently a wrong answer.
"""

import time
from typing import Any

from tqdm import tqdm

from distill.decode import Sampling, decode
from distill.models import eos_ids, prompt_ids
from distill.routing import find_routers, record_routing
from distill.stats import score
from distill.verify import extract_answer, judge


def answer_problems(
    model, tokenizer, problems: list[dict], name: str, max_new_tokens: int, batch_size: int
) -> tuple[list[dict], dict[str, Any]]:
    """(rows of ANSWER_SCHEMA in the order of `problems`, measurements: seconds, tokens, routing per layer)."""
    ids = [prompt_ids(tokenizer, p["messages"]) for p in problems]
    routed = bool(find_routers(model))
    bar = tqdm(total=len(problems), desc=f"evaluate {name}", unit="answer", mininterval=0.5)

    def answer() -> list:
        return decode(
            model,
            ids,
            Sampling(max_new_tokens=max_new_tokens),
            eos_ids=eos_ids(model, tokenizer),
            pad_id=tokenizer.pad_token_id,
            batch_size=batch_size,
            on_finish=lambda _row, _completion: bar.update(),
            vocab_limit=len(tokenizer),
        )

    start = time.perf_counter()
    with bar:
        if routed:
            # Padding and finished rows are masked by `decode`; pad_token_id would also drop real end tokens
            # of the chat template, since many tokenizers pad with their end token.
            with record_routing(model, keep="counts") as recording:
                completions = answer()
        else:
            completions = answer()
    seconds = time.perf_counter() - start

    rows = [
        _row(name, p, tokenizer.decode(c.ids, skip_special_tokens=True), c)
        for p, c in zip(problems, completions)
    ]
    tokens = sum(row["tokens"] for row in rows)
    measured: dict[str, Any] = {
        "seconds": round(seconds, 3),
        "prompt_tokens": sum(map(len, ids)),
        "generated_tokens": tokens,
        "decode_tokens_per_second": round(tokens / seconds, 1),
    }
    if routed:
        measured["moe"] = recording.summary()
    return rows, measured


def _row(name: str, problem: dict, text: str, completion) -> dict:
    return {
        "model": name,
        "prompt_id": problem["prompt_id"],
        "family": problem["family"],
        "level": problem["level"],
        "prompt": problem["messages"][-1]["content"],
        "reference": problem["answer"],
        "text": text,
        "answer": extract_answer(text),
        "verdict": judge(
            problem["verifier"], text, problem["answer"], completion.finish_reason, completion.error
        ),
        "finish_reason": completion.finish_reason,
        "tokens": len(completion.ids),
        "completion_ids": completion.ids,
        "error": completion.error,
    }


def summarise(rows: list[dict]) -> dict[str, Any]:
    """One score: accuracy never travels without n, its standard error, interval, and what went wrong."""
    correct = [row["verdict"] == "correct" for row in rows]
    base = score(correct)
    return {
        **base,
        "pass_at_k": {"1": base["accuracy"]},
        "truncated": sum(row["verdict"] == "truncated" for row in rows),
        "no_answer": sum(row["verdict"] == "no_answer" for row in rows),
        "errors": sum(row["verdict"] == "error" for row in rows),
        "mean_tokens": round(sum(row["tokens"] for row in rows) / len(rows), 2) if rows else None,
    }
