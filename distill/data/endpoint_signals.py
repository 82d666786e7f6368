"""A served teacher's top-k signals: what `/v1/completions` says of the tokens of a text that is there already.

    teacher: {model: NAME, endpoint: {base_url: http://localhost:8000/v1, tokenizer: PATH}}
    generate: {signal: {kind: top_k, k: 16}}

vLLM takes `prompt` as token ids and answers with `prompt_logprobs`: for every position but the first a table of the K
likeliest ids there and of the id that stands there, with rank and natural log-probability. Those of the completion's
tokens are the same signals that a teacher in this process would leave (distill/data/scoring.py), in the same codec.
The ids come from the tokenizer of the served model, in a folder here: a server's tokens are strings and no ids. K is
limited by the server (`vllm serve --max-logprobs`, 20 if not given).

    request = scoring_request(name, ids, k)                    # for POST {base_url}/completions
    ids, logprobs, own = read_top_k(body, text_ids, start, k, V)  # [N, K], [N, K], [N]; raises BadReply

Nothing of a table is trusted: ids are of the vocabulary, numbers are logarithms of probabilities that fall with the
rank, and together they are no more than 1.

Shapes: N completion tokens of one answer, K stored tokens, V ids of the tokenizer.
"""

import itertools
import json
import math
from typing import Any

import numpy as np

from distill.data.teachers import Answer, BadReply, Question, is_logprob
from distill.errors import UserError
from distill.models.chat import continuation, opening, prompt_ids, text_ids

_ROUNDING = 0.02  # of a server that computes in bfloat16


def as_tokens(tokenizer, due: list[tuple[Question, Answer]]) -> list[tuple[Answer, list[int], list[int]]]:
    """(answer, prompt, completion) of each as the student will be taught it.

    The template's opening belongs to the prompt, and the end token closes what was not cut off. An answer to a question
    that the template refuses is left out, and becomes a failed one.
    """
    found = []
    for question, answer in due:
        try:
            prompt = prompt_ids(tokenizer, question.messages)
        except UserError as error:  # the text is paid for, and stays
            answer.error, answer.finish_reason = str(error), "error"
            continue
        said = text_ids(tokenizer, continuation(answer.text, opening(tokenizer)))
        end = [tokenizer.eos_token_id] if answer.finish_reason == "stop" else []
        found.append((answer, prompt, [*said, *end]))
    return found


def scoring_request(model: str, ids: list[int], k: int) -> dict[str, Any]:
    """The body: one token is written, since a server refuses none, and nobody looks at it."""
    return {
        "model": model, "prompt": ids, "max_tokens": 1, "temperature": 0.0, "extra_body": {"prompt_logprobs": k},
    }  # fmt: skip


def read_top_k(
    body: bytes, ids: list[int], start: int, k: int, vocabulary: int
) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """(ids [N, K], log-probabilities [N, K], the likeliest first; those of the text's own tokens) from `ids[start:]`.

    Raises BadReply, not to be tried again, where the server gives no such table or another number of places.
    """
    try:
        tables = json.loads(body)["choices"][0].get("prompt_logprobs")
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        raise BadReply("the scores are not JSON with a choice") from None
    if tables is None:
        raise BadReply(
            "the server gives no prompt_logprobs (vLLM does): no signal can be stored", retry=False
        )
    if not isinstance(tables, list) or len(tables) != len(ids):
        raise BadReply(
            f"the server scored another number of tokens than the {len(ids)} it was sent", retry=False
        )
    found, values, own = [], [], []
    for token, table in zip(ids[start:], tables[start:]):
        ranked = _ranked(table, vocabulary)
        likeliest = sum(
            rank <= k for rank, _, _ in ranked
        )  # the text's own token stands there too, at any rank
        if likeliest < k:
            raise BadReply(
                f"the server names the {likeliest} likeliest tokens of a place and {k} were asked for; raise its "
                "--max-logprobs, or lower generate.signal.k",
                retry=False,
            )
        said = next((logprob for _, logprob, i in ranked if i == token), None)
        if said is None:
            raise BadReply("the scores leave out the token that stands there: another tokenizer", retry=False)
        found.append([i for _, _, i in ranked[:k]])
        values.append([logprob for _, logprob, _ in ranked[:k]])
        own.append(said)
    return np.array(found, dtype=np.int64), np.array(values, dtype=np.float32), own


def _ranked(table: Any, vocabulary: int) -> list[tuple[int, float, int]]:
    """(rank, log-probability, id) of one place, the likeliest first. Raises BadReply for what is no such table."""
    try:
        entries = [(e["rank"], e["logprob"], int(i)) for i, e in table.items() if i.isdecimal()]
        whole = len(entries) == len(table) and all(type(rank) is int for rank, _, _ in entries)
    except (AttributeError, LookupError, TypeError, ValueError):
        whole = False
    if not whole or len({i for _, _, i in entries}) < len(entries):
        raise BadReply("the scores of a token have no id, rank and logprob", retry=False)
    if any(i >= vocabulary for _, _, i in entries):
        raise BadReply(
            "the scores name an id that the tokenizer does not have: another tokenizer", retry=False
        )
    if not all(map(is_logprob, (logprob for _, logprob, _ in entries))):
        raise BadReply("a log-probability of the server is above 0 or no number", retry=False)
    ranked = sorted(entries)
    said = [logprob for _, logprob, _ in ranked]
    if any(later > earlier + _ROUNDING for earlier, later in itertools.pairwise(said)):
        raise BadReply("the server's ranks are not those of its log-probabilities", retry=False)
    if sum(map(math.exp, said)) > 1 + _ROUNDING:
        raise BadReply("the probabilities of a place come to more than 1", retry=False)
    return ranked
