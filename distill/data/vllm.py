"""vLLM as the teacher: its top-k log-probabilities are signals, over HTTP and in this process.

    teacher: {model: NAME, endpoint: {base_url: http://localhost:8000/v1, tokenizer: PATH}}     # `vllm serve`
    teacher: {model: PATH, engine: vllm}                              # in this process; pip install -e ".[vllm]"
    generate: {signal: {kind: top_k, k: 16}}

*Over HTTP* `/v1/completions` takes `prompt` as token ids and answers with `prompt_logprobs`: for every position but the
first a table of the K likeliest ids there and of the id that stands there, with rank and natural log-probability. The
ids come from the tokenizer of the served model, in a folder here: a server's tokens are strings and no ids. K is
limited by the server (`vllm serve --max-logprobs`, 20 if not given).

    request = scoring_request(name, ids, k)                    # for POST {base_url}/completions
    ids, logprobs, own = read_top_k(body, text_ids, start, k, V)  # [N, K], [N, K], [N]; raises BadReply

*In this process* `VllmTeacher` answers as `LocalTeacher` does: the same prompts in ids, ids back, and the tables of the
answer's tokens come while it decodes, so that no second pass is made. Given texts are scored as over HTTP. What is
drawn depends on vLLM's own numbers: the same seed gives other answers than this project's decoder.

Those tables are the same signals that `distill.data.scoring` leaves, in the same codec. Nothing of a table is trusted:
ids are of the vocabulary, numbers are logarithms of probabilities that fall with the rank, and together they are no
more than 1.

Shapes: N completion tokens of one answer, K stored tokens, V ids of the tokenizer.
"""

import gc
import itertools
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from transformers import GenerationConfig

from distill.config.data import TeacherSection
from distill.data.signals import SignalFormat, encode_top_k
from distill.data.teachers import Answer, BadReply, Prompts, Question, is_logprob, read_json_reply, taught
from distill.errors import RunError, UserError
from distill.models.chat import continuation, opening, prompt_ids, text_ids, whole_turn
from distill.models.decode import Sampling, row_seed
from distill.models.describe import describe
from distill.models.folders import first_line
from distill.models.load import load_config, load_tokenizer, resolve_model, tokenizer_fingerprint

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
        tables = read_json_reply(body, "scoring")["choices"][0].get("prompt_logprobs")
    except (LookupError, TypeError, AttributeError):
        raise BadReply("the scoring has no choice") from None
    if tables is None:
        raise BadReply(
            "the server gives no prompt_logprobs (vLLM does): no signal can be stored", retry=False
        )
    if not isinstance(tables, list) or len(tables) != len(ids):
        raise BadReply(
            f"the server scored another number of tokens than the {len(ids)} it was sent", retry=False
        )
    return top_k_of(tables[start:], ids[start:], k, vocabulary)


def top_k_of(
    tables: list[dict], ids: list[int], k: int, vocabulary: int
) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """The same from the tables of these tokens alone: id as text -> {rank, logprob}. Raises BadReply."""
    found, values, own = [], [], []
    for token, table in zip(ids, tables, strict=True):
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


# ---- in this process --------------------------------------------------------------------------------------

_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_REASONS = {"stop": "stop", "length": "length"}


def check_engine(section: TeacherSection) -> None:
    """Everything but the weights: the package, and a folder that it can load. Raises UserError."""
    if find_spec("vllm") is None:
        raise UserError(
            'teacher.engine=vllm needs vLLM: pip install -e ".[vllm]" (or teacher.engine=transformers)'
        )
    if (Path(resolve_model(section.model)) / "adapter_config.json").is_file():
        raise UserError(
            f"teacher.engine=vllm: '{section.model}' is an adapter; merge it first (distill merge)"
        )


class VllmTeacher:
    """A causal LM that vLLM loads into processes of its own. `k`: tokens named at every place while it decodes."""

    def __init__(self, section: TeacherSection, batch_size: int, k: int = 0):
        self.name, self._section, self._batch_size, self._k = section.model, section, batch_size, k
        self.tokenizer = load_tokenizer(section.model, section.chat_template_kwargs)
        self._engine = None
        self._prompts = Prompts(self.name, self.tokenizer)
        self._tables: dict[int, list[dict]] = {}  # of answers not yet scored, by the answer's id()

    @property
    def opened(self) -> str:
        return opening(self.tokenizer)

    def identity(self) -> dict[str, Any]:
        return tokenizer_fingerprint(self.tokenizer)

    @property
    def context(self) -> int | None:
        """Tokens that it takes, prompt and answer."""
        return getattr(load_config(self.name).get_text_config(), "max_position_embeddings", None)

    def flops(self, prompt_tokens: int, completion_tokens: int, rows: int) -> int:
        tokens = prompt_tokens + completion_tokens
        return int(describe(self.name, max(1, tokens // (2 * max(rows, 1))))["flops_per_token"] * tokens)

    def open(self) -> None:
        """Load it. Raises UserError without vLLM, or where vLLM does not take this model or these options."""
        if self._engine is not None:
            return
        check_engine(self._section)
        from vllm import LLM

        stored = str(getattr(load_config(self.name), "dtype", None) or "auto").removeprefix("torch.")
        options = {
            "model": resolve_model(self.name), "dtype": _DTYPES.get(self._section.dtype, stored),
            "max_num_seqs": self._batch_size, "max_logprobs": max(self._k, 1), "trust_remote_code": False,
        }  # fmt: skip
        try:
            self._engine = LLM(**{**options, **self._section.engine_options})
        except Exception as error:  # whatever it raises for weights, memory and options
            raise UserError(
                f"vLLM does not load '{self.name}' ({first_line(error)}); correct teacher.engine_options, or set "
                "teacher.engine=transformers"
            ) from error

    def close(self) -> None:
        """End its processes and give the memory back: the stages after this one need it."""
        engine, self._engine = self._engine, None
        if engine is not None:
            stop = getattr(getattr(engine.llm_engine, "engine_core", None), "shutdown", None)
            if stop is not None:
                stop()
            del engine
            gc.collect()

    @property
    def _ends(self) -> list[int]:
        """As `distill.models.load.eos_ids`, from files."""
        try:
            configured = GenerationConfig.from_pretrained(resolve_model(self.name)).eos_token_id
        except OSError:  # a folder without one
            configured = None
        ids = configured if isinstance(configured, list) else [configured]
        return sorted({i for i in [*ids, self.tokenizer.eos_token_id] if i is not None})

    def _run(self, prompts: list[list[int]], parameters: list) -> list:
        self.open()
        try:
            given = [{"prompt_token_ids": ids} for ids in prompts]
            return self._engine.generate(given, parameters, use_tqdm=False)
        except Exception as error:
            raise RunError(
                f"vLLM failed ({first_line(error)}); look at its messages above, then run again: "
                "finished parts are kept"
            ) from error

    def _room(self) -> int:
        """Tokens of a prompt, at most: one more must fit."""
        limit = self._section.engine_options.get("max_model_len") or self.context
        return (limit or 2**31) - 1

    def answer(self, questions: list[Question], sampling: Sampling, on_finish) -> list[Answer]:
        from vllm import SamplingParams

        answers: list[Answer | None] = [None] * len(questions)
        ids = dict(zip(*self._prompts.read(questions, answers, on_finish)))  # {place: tokens}
        asked = [i for i, prompt in ids.items() if len(prompt) <= self._room()]
        shared = {
            "n": 1, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k,
            "min_p": sampling.min_p, "max_tokens": sampling.max_new_tokens, "stop": list(sampling.stop),
            "include_stop_str_in_output": True, "stop_token_ids": self._ends, "logprobs": self._k,
            "detokenize": bool(sampling.stop),
        }  # fmt: skip
        parameters = [SamplingParams(**shared, seed=row_seed(questions[i].key) & 0x7FFFFFFF) for i in asked]
        for i, found in zip(asked, self._run([ids[i] for i in asked], parameters)):
            answers[i] = self._read(ids[i], found.outputs[0])
        for i, prompt in ids.items():
            if answers[i] is None:
                reason = f"the prompt has {len(prompt)} tokens and vLLM takes {self._room()}"
                answers[i] = Answer("", "error", prompt, error=reason, prompt_tokens=len(prompt))
            on_finish(answers[i])
        return answers

    def _read(self, prompt: list[int], found: Any) -> Answer:
        """An answer of the engine as one of ours; its tables wait for `score`."""
        ids = list(found.token_ids)
        answer = Answer("", "error", prompt, ids, prompt_tokens=len(prompt), completion_tokens=len(ids))
        reason = _REASONS.get(found.finish_reason)
        if reason is None or any(i >= len(self.tokenizer) for i in ids):
            answer.error = (
                f"vLLM ended with {found.finish_reason!r}" if reason is None else "an id of no token"
            )
            return answer
        try:
            tables = [_named(table) for table in found.logprobs]
            own = [table[str(i)]["logprob"] for i, table in zip(ids, tables, strict=True)]
            if not all(map(is_logprob, own)):
                raise ValueError
        except (TypeError, KeyError, ValueError):
            answer.error = "vLLM gave a token without its log-probability"
            return answer
        answer.text = whole_turn(self.tokenizer, self.tokenizer.decode(ids, skip_special_tokens=True))
        answer.finish_reason, answer.logprobs = reason, [float(x) for x in own]
        self._tables[id(answer)] = tables
        return answer

    def score(
        self, questions: list[Question], answers: list[Answer], form: SignalFormat | None, reasons=("stop",)
    ) -> None:
        """Give every answer that ended so its signal, and its tokens' log-probabilities where it has none."""
        tables_of, self._tables = self._tables, {}
        due = [a for a in answers if a.finish_reason in reasons and a.error is None]
        left = []
        for answer in due:
            tables, ids = tables_of.get(id(answer)), taught(self.tokenizer, answer)
            if form and tables is not None and len(tables) == len(ids):
                self._keep(answer, tables, ids, form)
            elif form or not answer.logprobs:
                left.append((answer, ids))
        self._score_texts(left, form)

    def _score_texts(self, texts: list[tuple[Answer, list[int]]], form: SignalFormat | None) -> None:
        """Those whose tables are missing: given texts, and answers that another end token closed."""
        from vllm import SamplingParams

        k = form.k if form else 1
        fit = []
        for answer, ids in texts:
            if len(answer.prompt_ids) + len(ids) <= self._room():
                fit.append((answer, ids))
            else:
                answer.error, answer.finish_reason = (
                    f"prompt and text are longer than {self._room()} tokens",
                    "error",
                )
        parameters = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=k, detokenize=False)
        found = self._run([[*a.prompt_ids, *ids] for a, ids in fit], [parameters] * len(fit)) if fit else []
        for (answer, ids), scored in zip(fit, found):
            tables = [_named(table) for table in scored.prompt_logprobs[len(answer.prompt_ids) :]]
            self._keep(answer, tables, ids, form)

    def _keep(self, answer: Answer, tables: list[dict], ids: list[int], form: SignalFormat | None) -> None:
        try:
            named, logprobs, own = top_k_of(tables, ids, form.k if form else 1, len(self.tokenizer))
        except BadReply as bad:
            answer.error, answer.finish_reason = bad.reason, "error"
            return
        answer.logprobs = answer.logprobs or own
        if form:
            answer.signal_ids, answer.signal_values = encode_top_k(form, named, logprobs)


def _named(table: Any) -> dict[str, dict]:
    """A table of vLLM's objects as its server writes it."""
    return {str(i): {"rank": entry.rank, "logprob": entry.logprob} for i, entry in table.items()}
