r"""Multiple choice by likelihood: which option does the model find most probable, without writing anything?

    distill evaluate CHECKPOINT --tasks mmlu:FILE --likelihood      -> models.<name>.likelihood in metrics.json

Asked of every problem whose verifier is `choice` (MMLU, GPQA, C-Eval, or a file's own). Two kinds of options:
the letter, as `Answer: B` after the prompt, and where the problem brings its choices as a list, their words.
The prompt is what the model would answer, so a prompt that asks for reasoning first gets none: these numbers
stand beside written answers, they do not replace them.

Three scores, because the usual ones differ and none is right for all: the sum log p(option), which favours
short options; per token; per UTF-8 byte, which does not depend on the tokenizer (lm-evaluation-harness calls
the first acc and a per-byte one acc_norm). Of equal options the first is taken.

Only the logits of option tokens are computed. Shapes: O options of all problems.
"""

import re
from itertools import pairwise
from typing import Any

import numpy as np

from distill.data import TokenRows
from distill.errors import UserError
from distill.models import prompt_ids
from distill.presets import LETTERS
from distill.scoring import score_rows
from distill.stats import score
from distill.verify import letter

_LISTED = re.compile(r"(?m)^\s*\(?([A-Z])[.):、]")


def choice_problems(problems: list[dict]) -> list[dict]:
    return [p for p in problems if p["verifier"] == "choice"]


def likelihoods(model, tokenizer, problems: list[dict], batch_size: int = 64) -> dict[str, list[dict]]:
    """{task: [`LikelihoodScore` of metrics.json, one per kind of options]} of the multiple-choice problems."""
    asked = choice_problems(problems)
    found: dict[str, list[dict]] = {}
    for task in dict.fromkeys(p["level"] for p in asked):
        own = [p for p in asked if p["level"] == task]
        kinds = {"letter": [[f"Answer: {x}" for x in letters_of(p)] for p in own]}
        if all(p.get("choices") for p in own):
            kinds["text"] = [p["choices"] for p in own]
        found[task] = [
            {"options": kind, **_scores(model, tokenizer, own, options, batch_size)}
            for kind, options in kinds.items()
        ]
    return found


def letters_of(problem: dict) -> str:
    """The letters a problem offers: one per choice, else those that begin lines of its prompt, A, B, ...

    Raises UserError where there are fewer than two.
    """
    if problem.get("choices"):
        return LETTERS[: len(problem["choices"])]
    listed = set(_LISTED.findall(problem["messages"][-1]["content"]))
    count = next((i for i, x in enumerate(LETTERS) if x not in listed), len(LETTERS))
    if count < 2:
        raise UserError(
            f"likelihood: problem {problem['prompt_id']} offers no choices; give a list column `choices`, "
            "or prompts with lines 'A. ...', 'B. ...'"
        )
    return LETTERS[:count]


def _scores(model, tokenizer, problems, options: list[list[str]], batch_size: int) -> dict[str, Any]:
    prompts, texts, starts = [], [], [0]
    for problem, offered in zip(problems, options):
        prompt = prompt_ids(tokenizer, problem["messages"])
        prompts += [prompt] * len(offered)
        texts += offered
        starts.append(len(texts))
    tokens = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    empty = [text for text, ids in zip(texts, tokens) if not ids]
    if empty:
        raise UserError("likelihood: a choice without text cannot be scored; remove the problem")
    scored = score_rows(
        model,
        TokenRows(prompts, tokens),
        None,
        keys=[(i,) for i in range(len(tokens))],
        pad_id=tokenizer.pad_token_id,
        vocabulary=model.config.get_text_config(decoder=True).vocab_size,
        batch_size=batch_size,
    )
    sums = np.array([sum(s.logprobs) for s in scored])
    per = {
        "sum": sums,
        "per_token": sums / [len(ids) for ids in tokens],
        "per_byte": sums / [len(text.encode()) for text in texts],
    }
    spans = [slice(a, b) for a, b in pairwise(starts)]
    finite = [bool(np.isfinite(sums[span]).all()) for span in spans]
    result: dict[str, Any] = {"mean_options": len(texts) / len(problems), "errors": finite.count(False)}
    for name, values in per.items():
        best = [LETTERS[int(values[span].argmax())] if ok else None for span, ok in zip(spans, finite)]
        result[name] = score([b is not None and b == letter(p["answer"]) for b, p in zip(best, problems)])
    return result
