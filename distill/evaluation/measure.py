"""One model's measurements: its answers, and everything that is said of them in `models.<name>` of metrics.json.

    plan = Plan(problems, section, device)
    reference = TeacherReference("checkpoints/teacher", tokenizer, section.fidelity_rows, device)      # or None
    rows, result = measure_model("student", path, plan, reference, is_teacher=False)

Every process of a launch calls this, for the same model; what costs time is dealt out, and all get the same result.

Always: answers with verdicts, scores per task and family, routing, cost of use, calibration of greedy answers.
With a teacher of the same vocabulary: fidelity on both models' text, token calibration and the likelihood of the
teacher's answers, one forward pass each over `fidelity_rows` answers; the teacher reads its own once for all, and an
answer that is the teacher's word for word is read once by either.
Asked for by the recipe, since they take time: likelihood, text, harness, interventions, precisions.
"""

import math
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distill import console
from distill.config.evaluation import Evaluate
from distill.data.batches import TokenRows
from distill.devices import main_alone
from distill.evaluation.answers import answer_problems, names, problem_prompts, stop_strings, summarise
from distill.evaluation.fidelity import (
    Reader,
    Reading,
    TokenCalibration,
    answer_calibration,
    answer_rows,
    read_further,
    read_rows,
)
from distill.evaluation.likelihood import (
    answers_nll,
    likelihoods,
    read_score,
    solutions_nll,
    text_names,
    text_nll,
    text_rows,
)
from distill.evaluation.routing import routing_section
from distill.evaluation.usage import AHEAD_PROMPTS, measure_ahead, usage_cost
from distill.models.ahead import load_ahead
from distill.models.describe import describe_model
from distill.models.load import load_model, load_tokenizer, same_vocabulary
from distill.models.routers import find_routers

PRECISION_ROWS = 200  # answers read in every precision


@dataclass(frozen=True)
class Plan:
    """What is measured of every model. `documents`: per text file, as read."""

    problems: list[dict]
    section: Evaluate
    device: torch.device
    documents: list[list[str]] = field(default_factory=list)
    usd_per_hour: float | None = None
    # By checkpoint, where a recipe has some.
    template_arguments: dict[str, dict[str, Any]] = field(default_factory=dict)
    _tokenizers: dict[tuple[str, str], Any] = field(default_factory=dict, init=False, repr=False)

    def tokenizer(self, name: str, path: str):
        """The tokenizer of one checkpoint, loaded once, and once for two names of one folder."""
        given = self.template_arguments.get(name)
        key = path, repr(given)
        if key not in self._tokenizers:
            self._tokenizers[key] = load_tokenizer(path, given)
        return self._tokenizers[key]


class TeacherReference:
    """The teacher that fidelity is measured against, loaded once and only if something needs it."""

    def __init__(self, path: str, tokenizer, limit: int, device: torch.device):
        self.path, self.tokenizer, self.limit, self.device = path, tokenizer, limit, device
        self.answers: list[dict] = []  # its first answer to every problem, once it has answered
        self._model = self._reader = None

    @property
    def model(self):
        if self._model is None:
            self._model = load_model(self.path, device=self.device)
        return self._model

    @property
    def reader(self) -> Reader:
        """The teacher as one who remembers what it has read: its answers, and the text files."""
        if self._reader is None:
            self._reader = Reader(self.model)
        return self._reader

    def taught(self, problems: list[dict], answers: list[dict]) -> "_Taught | None":
        """Its answers as rows to read: those that fidelity is measured on, and the finished ones; None without any."""
        prompts = problem_prompts(self.tokenizer, problems)
        written = [bool(a["completion_ids"]) and not a["error"] for a in answers]
        finished = [a["finish_reason"] == "stop" for a in answers]
        told, scored = _first(written, self.limit), _first(finished, self.limit)
        chosen = np.flatnonzero(told | scored)
        if not len(chosen):
            return None
        rows = TokenRows([prompts[i] for i in chosen], [answers[i]["completion_ids"] for i in chosen])
        sizes = np.array([len(answers[i]["text"].encode()) for i in chosen])
        return _Taught(rows, told[chosen], scored[chosen], sizes)

    def compare(self, model, tokenizer, problems: list[dict], own: list[dict]) -> dict[str, Any]:
        """`fidelity` and token `calibration` of `model`, whose first answers are `own`; and as `teacher_answers` the
        likelihood of the teacher's, where the model reads them behind the same prompts: all from one pass.

        Empty where they cannot be defined: another vocabulary, no answers, switched off.
        """
        if not self.limit or not same_vocabulary(self.tokenizer, tokenizer):
            return {}
        pad, prompts = tokenizer.pad_token_id, problem_prompts(tokenizer, problems)
        taught = self.taught(problems, self.answers)
        if taught is None or not taught.told.any():
            return {}
        calibration, reader = TokenCalibration(), Reader(model)
        read = read_rows(
            reader, taught.rows, pad, self.reader, calibration=calibration, measured=taught.told, keep=True
        )
        found: dict[str, Any] = {"fidelity": read.agreement(taught.rows, taught.told)}
        found["calibration"] = calibration.result()
        same = prompts == problem_prompts(self.tokenizer, problems)
        if same and (score := taught.likelihood(read, _context(model))):
            found["teacher_answers"] = score
        if written := answer_rows(prompts, own, self.limit):
            heard = read_further(reader, written, pad, self.reader, taught.rows, read)
            found["fidelity"]["own_text"] = heard.agreement(written)
        return found

    def own_likelihood(self, problems: list[dict], own: list[dict]) -> dict[str, Any] | None:
        """`TextScore` of the teacher's answers in its own eyes; what it reads here it need not read again."""
        taught = self.taught(problems, own)
        read = taught and read_rows(self.reader, taught.rows, self.tokenizer.pad_token_id, keep=True)
        return taught and taught.likelihood(read, _context(self.model))


# Of a process that keeps its teacher: {what tells that it is the same one: that teacher}; None where none is kept.
_kept: dict[tuple, TeacherReference] | None = None


def keep_teacher() -> None:
    """From now on the teacher of an evaluation stays in this process's memory, with the hidden states of what it has
    read, for a process that evaluates many students beside one teacher. On a CPU alone, where memory is the larger."""
    global _kept
    _kept = {} if _kept is None else _kept


def teacher_reference(name: str, path: str, plan: Plan) -> TeacherReference:
    """The teacher of an evaluation, `name` in `plan`: loaded when something asks, or the one that this process kept."""
    tokenizer, limit, device = plan.tokenizer(name, path), plan.section.fidelity_rows, plan.device
    if _kept is None or device.type != "cpu" or not os.path.isdir(path):
        return TeacherReference(path, tokenizer, limit, device)
    files = sorted((entry.name, entry.stat().st_size, entry.stat().st_mtime_ns) for entry in os.scandir(path))
    key = path, tuple(files), repr(plan.template_arguments.get(name)), limit
    if key not in _kept:
        _kept.clear()  # one at a time
        _kept[key] = TeacherReference(path, tokenizer, limit, device)
    return _kept[key]


@dataclass(frozen=True)
class _Taught:
    """The teacher's answers as rows: which count for fidelity, which are finished (their likelihood), their bytes."""

    rows: TokenRows
    told: np.ndarray  # [R] bool
    scored: np.ndarray  # [R] bool
    sizes: np.ndarray  # [R]

    def likelihood(self, read: Reading, context: float) -> dict[str, Any] | None:
        """`TextScore` of the finished ones of at most `context` tokens; None without any."""
        chosen = np.flatnonzero(self.scored & (self.rows.lengths <= context))
        if not len(chosen):
            return None
        size = int(self.sizes[chosen].sum())
        score = read_score([read.logprobs[i] for i in chosen], list(range(len(chosen))), size, len(chosen))
        return score | {"window": None, "stride": None}


def _context(model) -> float:
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or math.inf


def _first(holds: list[bool], limit: int) -> np.ndarray:
    """[R] bool: the first `limit` at which it holds."""
    mask = np.array(holds, dtype=bool)
    return mask & (mask.cumsum() <= limit)


def measure_model(
    name: str,
    path: str,
    plan: Plan,
    reference: TeacherReference | None,
    is_teacher: bool,
    routes: Path | None = None,
    kept: Path | None = None,
) -> tuple[list[dict], dict[str, Any]]:
    """(answer rows, `ModelMetrics` of metrics.json) of the checkpoint at `path`.

    routes: where a mixture of experts leaves single decisions (distill/evaluation/routes.py). kept: what is
    answered under changed routing (distill/evaluation/interventions.py), so that an interrupted sweep goes on.
    """
    problems, section = plan.problems, plan.section
    tokenizer = plan.tokenizer(name, path)
    model = reference.model if is_teacher else load_model(path, device=plan.device)
    if not problems:
        return [], _unanswered(name, path, model, tokenizer, plan, reference, is_teacher)
    rows, answering = answer_problems(model, tokenizer, problems, name, section)
    with console.slow(f"evaluate {name}: routing"):
        moe = (
            routing_section(model, tokenizer, rows, problems, section, routes) if find_routers(model) else {}
        )
    # One context for all models, so that their FLOPs/token compare; the page states it.
    described = describe_model(model, context=section.max_new_tokens)
    flops = int(described["flops_per_token"] * (answering["prompt_tokens"] + answering["generated_tokens"]))
    result: dict[str, Any] = {
        "path": path,
        "model": described,
        **scores(rows, section.seed),
        "cost": {
            **answering,
            "flops": flops,
            "flops_per_answer": flops // len(rows),
            **_usage(name, model, tokenizer, described, answering, plan),
            **_drafts(name, path, model, tokenizer, problems, section),
        },
    }
    if moe.get("layers"):
        result["moe"] = moe
    first = [row for row in rows if row["sample_idx"] == 0]
    told = {}
    if reference and not is_teacher:
        with console.slow(f"evaluate {name}: closeness to the teacher"):
            told = reference.compare(model, tokenizer, problems, first)
    known = told.pop("teacher_answers", None)
    result |= told
    if section.temperature == 0 and (answers := answer_calibration(rows)):
        result["calibration"] = {**result.get("calibration", {}), "answers": answers}
    if text := _text(model, tokenizer, plan, reference, first if is_teacher else None, known):
        result["text"] = text
    if section.solutions:
        console.say(f"evaluate {name}: worked solutions")
        result["solutions"] = solutions_nll(model, tokenizer, problems, rows, section.solutions)
    if section.likelihood:
        console.say(f"evaluate {name}: likelihood of options")
        result["likelihood"] = likelihoods(model, tokenizer, problems)
    if section.harness:
        result["harness"] = _harness(name, model, tokenizer, section)
    if section.interventions.any:
        from distill.evaluation.interventions import interventions_for

        result["interventions"] = interventions_for(model, tokenizer, problems, section, kept)
    if section.precisions:
        console.say(f"evaluate {name}: again in {', '.join(section.precisions)}")
        result["precision"] = _precision(model, tokenizer, plan, reference, first, is_teacher)
    result["warnings"] = warnings(rows, result, section, moe.get("error"), tokenizer)
    return rows, result


def _usage(name: str, model, tokenizer, described: dict, answering: dict, plan: Plan) -> dict[str, Any]:
    """What using it costs, timed while the other processes of a launch wait."""
    with console.slow(f"evaluate {name}: its speed (--no-speed leaves it out)"):
        return main_alone(
            lambda: usage_cost(model, tokenizer, described, answering, plan.usd_per_hour, plan.section.speed)
        )


def _drafts(
    name: str, path: str, model, tokenizer, problems: list[dict], section: Evaluate
) -> dict[str, Any]:
    """`ahead` of `Cost`; empty without a module beside the weights."""
    ahead = load_ahead(path, model)
    if ahead is None:
        return {}
    asked = problem_prompts(tokenizer, problems[:: max(1, len(problems) // AHEAD_PROMPTS)][:AHEAD_PROMPTS])
    given = (model, ahead, tokenizer, asked, section.max_new_tokens, section.speed)
    with console.slow(f"evaluate {name}: a token ahead"):
        return {"ahead": main_alone(lambda: measure_ahead(*given))}


def _unanswered(name: str, path: str, model, tokenizer, plan: Plan, reference, is_teacher: bool) -> dict:
    """`ModelMetrics` where there is nothing to answer: texts and the harness alone."""
    start = time.perf_counter()
    result: dict[str, Any] = {
        "path": path,
        "model": describe_model(model, context=plan.section.max_new_tokens),
        "tasks": {},
        "families": {},
    }
    if text := _text(model, tokenizer, plan, reference, [] if is_teacher else None):
        result["text"] = text
    if plan.section.harness:
        result["harness"] = _harness(name, model, tokenizer, plan.section)
    seconds = round(time.perf_counter() - start, 3)
    # Nothing was decoded, so nothing is known of its speed.
    nothing = {"prompt_tokens": 0, "generated_tokens": 0, "decode_tokens_per_second": 0.0, "batch_size": 0}
    spent = {"seconds": seconds, **nothing, "flops": 0, "flops_per_answer": 0}
    result["cost"] = {
        **spent,
        **_usage(name, model, tokenizer, result["model"], nothing, plan),
    }
    result["warnings"] = []
    return result


def _harness(name: str, model, tokenizer, section: Evaluate) -> dict[str, Any]:
    from distill.evaluation.harness import run_harness

    console.say(f"evaluate {name}: lm-evaluation-harness, {', '.join(section.harness)}")
    return run_harness(model, tokenizer, section)


def _text(
    model,
    tokenizer,
    plan: Plan,
    reference: TeacherReference | None,
    own: list[dict] | None,
    known: dict[str, Any] | None = None,
) -> dict:
    """`text` of metrics.json: the files asked for and, where there is a teacher, its answers.

    own: the answers of the teacher, where this is it. known: the likelihood of its answers, where they were read.
    """
    if plan.documents:
        console.say(f"evaluate: text, {', '.join(text_names(plan.section.text))}")
    follows = reference and own is None and same_vocabulary(reference.tokenizer, tokenizer)
    teaches = reference and own is not None
    found = {}
    for name, documents in zip(text_names(plan.section.text), plan.documents):
        if not (follows or teaches):
            found[name] = text_nll(model, tokenizer, documents, plan.section.text_window)
            continue
        rows, groups, view = text_rows(model, tokenizer, documents, plan.section.text_window)
        read = TokenRows([context for context, _ in rows], [tokens for _, tokens in rows])
        heard = read_rows(
            reference.reader if teaches else model, read, tokenizer.pad_token_id,
            reference.reader if follows else None, 16, keep=True,
        )  # fmt: skip
        size = sum(len(document.encode()) for document in documents)
        found[name] = read_score(heard.logprobs, groups, size, len(documents)) | view
        if follows:
            found[name]["teacher"] = heard.agreement(read)
    if reference and reference.limit and plan.problems:
        if known is None and own is not None:
            known = reference.own_likelihood(plan.problems, own)
        elif known is None:
            same = same_vocabulary(reference.tokenizer, tokenizer)
            known = answers_nll(model, tokenizer, plan.problems, reference.answers, same, reference.limit)
        if known:
            found["teacher_answers"] = known
    return found


def _precision(
    model, tokenizer, plan: Plan, reference: TeacherReference | None, own: list[dict], is_teacher: bool
):
    """`precision` of metrics.json: the teacher's answers where this model reads them, else its own, read in each
    precision, and the problems answered greedily in each."""
    from distill.evaluation.usage import precision_sweep

    section = plan.section.model_copy(update={"samples": 1, "temperature": 0.0})
    taught = reference and not is_teacher and same_vocabulary(reference.tokenizer, tokenizer)
    asks, answers = (reference.tokenizer, reference.answers) if taught else (tokenizer, own)
    read = answer_rows(problem_prompts(asks, plan.problems), answers, PRECISION_ROWS)
    if read is None:
        return []

    def tasks(changed) -> dict[str, dict]:
        rows, _ = answer_problems(changed, tokenizer, plan.problems, "again", section)
        return scores(rows, section.seed)["tasks"]

    return precision_sweep(model, read, tokenizer.pad_token_id, tuple(section.precisions), answers=tasks)


def scores(rows: list[dict], seed: int) -> dict[str, Any]:
    """`tasks` and `families` of metrics.json."""

    def of(chosen: list[dict]) -> dict[str, dict]:
        return {
            level: summarise([r for r in chosen if r["level"] == level], seed)
            for level in names(chosen, "level")
        }

    families = {family: [r for r in rows if r["family"] == family] for family in names(rows, "family")}
    return {"tasks": of(rows), "families": {family: of(chosen) for family, chosen in families.items()}}


def warnings(
    rows: list[dict], result: dict, section: Evaluate, routing_error: str | None, tokenizer
) -> list[str]:
    """What a reader must know before quoting a number: one sentence each, with the fix where there is one."""
    found = []
    if (stop := stop_strings(tokenizer, section)) and not section.stop:
        shown = " or ".join(repr(text) for text in stop)
        found.append(
            f"it has no chat template, so its answers were ended before {shown}; --stop (evaluate.stop) sets others"
        )
    failed = [row["error"] for row in rows if row["error"]]
    broken = sum("non-finite" in error for error in failed)
    if broken:
        found.append(
            f"non-finite logits (NaN or infinity) in {broken} of {len(rows)} answers: they count as errors, not as "
            "wrong; the weights may be damaged, or the dtype too narrow (try fp32)"
        )
    if len(failed) > broken:
        other = next(error for error in failed if "non-finite" not in error)
        found.append(f"{len(failed) - broken} of {len(rows)} answers failed: {other}")
    if routing_error:
        found.append(f"routing was not measured: {routing_error}")
    for task in result["tasks"]:
        own = [row for row in rows if row["level"] == task]
        unread = sum(row["verdict"] == "no_answer" for row in own)
        if unread:
            found.append(
                f"{unread} of {len(own)} answers to {task} state nothing that the verifier can read, and count as not "
                "solved (verdict no_answer in answers/)"
            )
    for task, score in result["tasks"].items():
        if score["truncated"] and score["truncated"] == score["n"] * score["samples"]:
            found.append(
                f"every answer of task {task} was cut at {section.max_new_tokens} tokens, so its accuracy says "
                "nothing; raise --max-new-tokens (evaluate.max_new_tokens)"
            )
    lost = result.get("fidelity", {}).get("not_finite", 0)
    if lost:
        found.append(f"fidelity leaves out {lost} tokens whose logits are not finite")
    return found
