r"""Likelihoods of given text: which option of a multiple choice is most probable, and how well text is predicted.

    distill evaluate CHECKPOINT --tasks mmlu:FILE --likelihood      -> models.<name>.likelihood in metrics.json

Asked of every problem whose verifier is `choice` (MMLU, GPQA, C-Eval, or a file's own), in two forms:

chat: the option is the model's answer to the prompt, through its template. The letter, as `Answer: B`, and where the
problem brings its choices as a list, their words.

plain: the option ends a text without a template, as lm-evaluation-harness writes its tasks. The letter, as ` B` after
question, lettered choices and `Answer:` (its mmlu); the words, after `Question: ...` and `Answer:` (its arc). The
tokens are the harness's too: context and option are one text, cut where the context's own tokens end.

Published numbers are mostly of the plain form. In the chat form a prompt that asks for reasoning first gets none: these
numbers stand beside written answers, they do not replace them.

Four scores, because the usual ones differ and none is right for all: the sum log p(option), which favours short options
(acc of the harness); per character (its acc_norm); per UTF-8 byte, which does not depend on the tokenizer (its
acc_bytes); per token. Of equal options the first is taken.

A prompt is read once, and every option behind it from its keys and values (a model without such a cache reads each
option from the beginning). Only the logits of option tokens are computed. Shapes: O options of all problems.

Of given text: nats per token, nats and bits per byte, perplexity.

    distill evaluate CHECKPOINT ... --text wiki.txt more.jsonl       -> models.<name>.text.<file> in metrics.json

Perplexity per token compares models of one tokenizer only: a tokenizer with longer tokens has fewer and harder
ones. Per byte the text is the same for all.

A document is read through a sliding window: each pass sees at most W tokens and scores the last W/2 of them
(the first pass: all), so every token is scored exactly once and, but for the document's beginning, with W/2
tokens or more before it. Before the first token stands the tokenizer's BOS token, or its end token where it
has none, as in lm-evaluation-harness. A .txt file is one document, a .jsonl file one per line (`text`); both are
UTF-8, and read as they are: bytes are those of the file (of a .txt file), line ends included, a byte-order mark not.

Shapes: W window, S stride.
"""

import math
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from distill.data.scoring import logprobs_behind, pieces
from distill.devices import dealt, even_size
from distill.errors import UserError
from distill.evaluation.stats import ratio, score
from distill.models.chat import completion_ids, prompt_ids
from distill.tasks.corpus import LETTERS
from distill.tasks.verify import letter

_LISTED = re.compile(r"(?m)^\s*\(?([A-Z])[.):、]")


def choice_problems(problems: list[dict]) -> list[dict]:
    return [p for p in problems if p["verifier"] == "choice"]


def likelihoods(model, tokenizer, problems: list[dict], batch_size: int = 64) -> dict[str, list[dict]]:
    """{task: [`LikelihoodScore` of metrics.json, one per kind of options]} of the multiple-choice problems."""
    asked = choice_problems(problems)
    found: dict[str, list[dict]] = {}
    for task in dict.fromkeys(p["level"] for p in asked):
        own = [p for p in asked if p["level"] == task]
        kinds = ("letter", "text") if all(p.get("choices") for p in own) else ("letter",)
        forms = [(kind, form) for kind in kinds for form in ("chat", "plain")]
        rows = {asked: [ROWS_OF[asked[1]](tokenizer, p, asked[0]) for p in own] for asked in forms}
        # Together: letters and words stand behind the same prompt, which is read once.
        every = [row for of_form in rows.values() for of_problem in of_form for row in of_problem]
        if not all(ids for _, ids, _ in every):
            raise UserError("likelihood: a choice without text cannot be scored; remove the problem")
        said = iter(_logprobs(model, tokenizer, *zip(*[row[:2] for row in every]), batch_size))
        found[task] = [
            {
                "form": form,
                "options": kind,
                **_scores(own, of_form, [sum(next(said)) for r in of_form for _ in r]),
            }
            for (kind, form), of_form in rows.items()
        ]
    return found


# A problem's options as rows: (context, tokens of the option, its text as lengths count it).
Rows = list[tuple[list[int], list[int], str]]


def _chat_rows(tokenizer, problem: dict, kind: str) -> Rows:
    """The option as the model's own answer. Where the template opens <think>, it stands behind its end."""
    prompt = prompt_ids(tokenizer, problem["messages"])
    texts = [f"Answer: {x}" for x in letters_of(problem)] if kind == "letter" else problem["choices"]
    return [(prompt, completion_ids(tokenizer, text) if text else [], text) for text in texts]


def _plain_rows(tokenizer, problem: dict, kind: str) -> Rows:
    """The option as the end of a text, with the tokenizer's own special tokens and no template."""
    question = question_of(problem)
    if kind == "letter":
        texts, context = list(letters_of(problem)), f"{question}\n{_listed(problem)}Answer:"
    else:
        texts, context = problem["choices"], f"Question: {question}\nAnswer:"
    before = tokenizer(context, verbose=False)["input_ids"]
    whole = [tokenizer(f"{context} {text}", verbose=False)["input_ids"] for text in texts]
    return [(before, ids[len(before) :] if text else [], text) for ids, text in zip(whole, texts)]


ROWS_OF = {"chat": _chat_rows, "plain": _plain_rows}


def question_of(problem: dict) -> str:
    """The question alone: without what a template puts around it and, where there is a list of choices, without it."""
    text = (problem.get("question") or problem["messages"][-1]["content"]).strip()
    if problem.get("choices"):
        text = text.removesuffix(_listed(problem).strip()).strip()
    return text


def _listed(problem: dict) -> str:
    """The lettered lines of a problem with a list of choices; "" where they are part of its question."""
    return "".join(f"{x}. {choice}\n" for x, choice in zip(LETTERS, problem.get("choices") or []))


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


def _scores(problems: list[dict], rows: list[Rows], sums: list[float]) -> dict[str, Any]:
    """Of one form: `sums` [O] are the options' log-probabilities, in the order of `rows`."""
    _, tokens, texts = zip(*(row for found in rows for row in found))
    starts = np.cumsum([0, *map(len, rows)]).tolist()
    sums = np.array(sums)
    per = {
        "sum": sums,
        "per_character": sums / [len(text) for text in texts],
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


def _logprobs(model, tokenizer, contexts, texts, batch_size: int) -> list[list[float]]:
    """Of every token of `texts` behind its context, row by row. The processes of a launch read a share each."""
    contexts, texts = list(map(list, contexts)), list(map(list, texts))
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    dealing = pieces(contexts, texts, even_size(len(texts), batch_size), vocabulary)

    def read(piece: np.ndarray) -> list[list[float]]:
        given = [contexts[i] for i in piece], [texts[i] for i in piece]
        return logprobs_behind(model, *given, pad_id=tokenizer.pad_token_id, vocabulary=vocabulary)

    found: list[list[float]] = [[] for _ in texts]
    for piece, scores in zip(dealing, dealt(dealing, read)):
        for i, logprobs in zip(piece, scores):
            found[i] = logprobs
    return found


def windows(tokens: list[int], first: int, window: int, stride: int) -> list[tuple[list[int], list[int]]]:
    """(context, scored) of every pass over one document; `first` stands before it. At most `window` together."""
    found = [([first], tokens[: window - 1])]
    for start in range(window - 1, len(tokens), stride):
        scored = tokens[start : start + stride]
        found.append((tokens[max(0, start + len(scored) - window) : start], scored))
    return found


def text_nll(model, tokenizer, documents: list[str], window: int, batch_size: int = 16) -> dict[str, Any]:
    """`TextScore` of metrics.json for texts read through a sliding window of at most the model's context."""
    rows, groups, view = text_rows(model, tokenizer, documents, window)
    size = sum(len(document.encode()) for document in documents)
    found = _score(model, tokenizer, rows, groups, batch_size)
    return _result(*found, size, len(documents)) | view


def text_rows(model, tokenizer, documents: list[str], window: int) -> tuple[list[tuple], list[int], dict]:
    """(context, scored tokens) of every pass, the unit of each (document, or pass where there is one), the window."""
    config = model.config.get_text_config(decoder=True)
    window = min(window, getattr(config, "max_position_embeddings", None) or window)
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    stride = max(1, window // 2)
    rows, owner = [], []
    for number, document in enumerate(documents):
        tokens = tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        passes = windows(tokens, first, window, stride)
        rows += passes
        owner += [number] * len(passes)
    groups = owner if len(documents) > 1 else list(range(len(rows)))
    return rows, groups, {"window": window, "stride": stride}


def answers_nll(
    model, tokenizer, problems: list[dict], answers: list[dict], same_tokens: bool, limit: int
) -> dict[str, Any] | None:
    """`TextScore` of the first `limit` finished answers of another model, each after its problem; None if none.

    same_tokens: score the very tokens that were written. Otherwise their text in this tokenizer, and its end
    token, which stands for no byte but for the decision to stop.
    """
    finished = [(p, a) for p, a in zip(problems, answers, strict=True) if a["finish_reason"] == "stop"]
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or math.inf
    rows, size = [], 0
    for problem, answer in finished[:limit]:
        if same_tokens:
            completion = answer["completion_ids"]
        else:
            completion = [*completion_ids(tokenizer, answer["text"]), tokenizer.eos_token_id]
        prompt = prompt_ids(tokenizer, problem["messages"])
        if len(prompt) + len(completion) > context:  # in this tokenizer; `documents` counts those that fit
            continue
        rows.append((prompt, completion))
        size += len(answer["text"].encode())
    if not rows:
        return None
    found = _score(model, tokenizer, rows, list(range(len(rows))), 64)
    return _result(*found, size, len(rows)) | {"window": None, "stride": None}


def solutions_nll(
    model, tokenizer, problems: list[dict], answers: list[dict], limit: int
) -> dict[str, dict[str, Any]]:
    """{level: `TextScore`} of the worked solutions of each level's first `limit` problems, end token included.

    A score without floor or ceiling: how likely the right working is, whatever the model would have written. The
    rows of `answers` get `solution_nats` and `solution_tokens` of theirs, so that two models can be compared
    problem by problem. Problems without a solution are left out.
    """
    first = {row["prompt_id"]: row for row in answers if row["sample_idx"] == 0}
    found = {}
    for level in dict.fromkeys(p["level"] for p in problems):
        chosen = [p for p in problems if p["level"] == level and p["solution"]][:limit]
        if not chosen:
            continue
        texts = [[*completion_ids(tokenizer, p["solution"]), tokenizer.eos_token_id] for p in chosen]
        rows = [(prompt_ids(tokenizer, p["messages"]), ids) for p, ids in zip(chosen, texts)]
        nats, counts, lost = _score(model, tokenizer, rows, list(range(len(rows))), 64)
        for problem, nll, tokens in zip(chosen, nats.tolist(), counts.tolist()):
            first[problem["prompt_id"]] |= {"solution_nats": nll, "solution_tokens": int(tokens)}
        size = sum(len(p["solution"].encode()) for p in chosen)
        score = _result(nats, counts, lost, size, len(rows))
        found[level] = score | {"window": None, "stride": None}
    return found


def _score(model, tokenizer, rows: list[tuple], groups: list[int], batch_size: int) -> tuple:
    """(nats per group, finite tokens per group, tokens that are not)."""
    return _summed(_logprobs(model, tokenizer, *zip(*rows), batch_size), groups)


def read_score(
    logprobs: Sequence[Sequence[float]], groups: list[int], size: int, documents: int
) -> dict[str, Any]:
    """`TextScore`, but for its window, of rows that were read already: the log-probabilities of each row's tokens.

    groups: the unit that each row belongs to, from 0; size: the text's bytes.
    """
    return _result(*_summed(logprobs, groups), size, documents)


def _summed(scored: Sequence[Sequence[float]], groups: list[int]) -> tuple:
    nats, counts, lost = np.zeros(groups[-1] + 1), np.zeros(groups[-1] + 1), 0
    for group, row in zip(groups, scored):
        values = np.array(row, dtype=np.float64)
        finite = np.isfinite(values)
        nats[group] -= values[finite].sum()
        counts[group] += finite.sum()
        lost += int((~finite).sum())
    return nats, counts, lost


def _result(nats: np.ndarray, counts: np.ndarray, lost: int, size: int, documents: int) -> dict[str, Any]:
    mean, stderr, _ = ratio(nats, counts)
    # Tokens that were lost have bytes too; what is left is no longer the whole text.
    per_byte = float(nats.sum() / size) if size and not lost and mean is not None else None
    return {
        "tokens": int(counts.sum()),
        "bytes": size,
        "documents": documents,
        "nll_per_token": mean,
        "nll_per_token_stderr": stderr,
        "nll_per_byte": per_byte,
        "bits_per_byte": None if per_byte is None else per_byte / math.log(2),
        "perplexity": None if mean is None or mean > 700 else math.exp(mean),
        "not_finite": lost,
    }


def text_names(paths: list[str]) -> list[str]:
    """How files are called in metrics.json: by name, or as given where names repeat."""
    names = [Path(path).name for path in paths]
    return names if len(set(names)) == len(names) else list(paths)
