"""One model's measurements: its answers, and everything that is said of them in `models.<name>` of metrics.json.

    plan = Plan(problems, section, device)
    reference = TeacherReference("checkpoints/teacher", tokenizer, section.fidelity_rows, device)      # or None
    rows, result = measure_model("student", path, plan, reference, is_teacher=False)

Every process of a launch calls this, for the same model; what costs time is dealt out, and all get the same result.

Always: answers with verdicts, scores per task and family, routing, cost of use, calibration of greedy answers.
With a teacher of the same vocabulary: fidelity on both models' text and token calibration, one forward pass
each over `fidelity_rows` answers. Asked for by the recipe, since they take time: likelihood, text, harness,
interventions, precisions.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from distill import console
from distill.config.evaluation import Evaluate
from distill.data.batches import TokenRows
from distill.devices import main_alone
from distill.evaluation.answers import answer_problems, stop_strings
from distill.evaluation.fidelity import TokenCalibration, answer_calibration, answer_rows, fidelity
from distill.evaluation.likelihood import (
    answers_nll,
    likelihoods,
    solutions_nll,
    text_names,
    text_nll,
    text_rows,
)
from distill.evaluation.routing import routing_section
from distill.evaluation.scores import names, summarise
from distill.evaluation.usage import usage_cost
from distill.models.chat import prompt_ids
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
    _tokenizers: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    def tokenizer(self, name: str, path: str):
        """The tokenizer of one checkpoint, loaded once: one of 150,000 tokens takes a second."""
        if name not in self._tokenizers:
            self._tokenizers[name] = load_tokenizer(path, self.template_arguments.get(name))
        return self._tokenizers[name]


class TeacherReference:
    """The teacher that fidelity is measured against, loaded once and only if something needs it."""

    def __init__(self, path: str, tokenizer, limit: int, device: torch.device):
        self.path, self.tokenizer, self.limit, self.device = path, tokenizer, limit, device
        self.answers: list[dict] = []  # its first answer to every problem, once it has answered
        self._model = None

    @property
    def model(self):
        if self._model is None:
            self._model = load_model(self.path, device=self.device)
        return self._model

    def compare(self, model, tokenizer, problems: list[dict], own: list[dict]) -> dict[str, Any]:
        """`fidelity` and token `calibration` of `model`, whose first answers are `own`.

        Empty where they cannot be defined: another vocabulary, no answers, switched off.
        """
        if not self.limit or not same_vocabulary(self.tokenizer, tokenizer):
            return {}
        found: dict[str, Any] = {}
        pad = tokenizer.pad_token_id
        if taught := answer_rows(_prompts(self.tokenizer, problems), self.answers, self.limit):
            calibration = TokenCalibration()
            found["fidelity"] = fidelity(model, self.model, taught, pad, calibration=calibration)
            found["calibration"] = calibration.result()
            if written := answer_rows(_prompts(tokenizer, problems), own, self.limit):
                found["fidelity"]["own_text"] = fidelity(model, self.model, written, pad)
        return found


def _prompts(tokenizer, problems: list[dict]) -> list[list[int]]:
    return [prompt_ids(tokenizer, p["messages"]) for p in problems]


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
        },
    }
    if moe.get("layers"):
        result["moe"] = moe
    first = [row for row in rows if row["sample_idx"] == 0]
    if reference and not is_teacher:
        with console.slow(f"evaluate {name}: closeness to the teacher"):
            result |= reference.compare(model, tokenizer, problems, first)
    if section.temperature == 0 and (answers := answer_calibration(rows)):
        result["calibration"] = {**result.get("calibration", {}), "answers": answers}
    if text := _text(model, tokenizer, plan, reference, first if is_teacher else None):
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
        **usage_cost(model, tokenizer, result["model"], nothing, plan.usd_per_hour, plan.section.speed),
    }
    result["warnings"] = []
    return result


def _harness(name: str, model, tokenizer, section: Evaluate) -> dict[str, Any]:
    from distill.evaluation.harness import run_harness

    console.say(f"evaluate {name}: lm-evaluation-harness, {', '.join(section.harness)}")
    return main_alone(lambda: run_harness(model, tokenizer, section))


def _text(model, tokenizer, plan: Plan, reference: TeacherReference | None, own: list[dict] | None) -> dict:
    """`text` of metrics.json: the files asked for and, where there is a teacher, its answers."""
    if plan.documents:
        console.say(f"evaluate: text, {', '.join(text_names(plan.section.text))}")
    found = {
        name: text_nll(model, tokenizer, documents, plan.section.text_window)
        for name, documents in zip(text_names(plan.section.text), plan.documents)
    }
    if reference and own is None and same_vocabulary(reference.tokenizer, tokenizer):
        for name, documents in zip(found, plan.documents):
            rows, _, _ = text_rows(model, tokenizer, documents, plan.section.text_window)
            read = TokenRows([context for context, _ in rows], [tokens for _, tokens in rows])
            found[name]["teacher"] = fidelity(model, reference.model, read, tokenizer.pad_token_id)
    if reference and reference.limit and plan.problems:
        same = own is not None or same_vocabulary(reference.tokenizer, tokenizer)
        answers = reference.answers if own is None else own
        if score := answers_nll(model, tokenizer, plan.problems, answers, same, reference.limit):
            found["teacher_answers"] = score
    return found


def _precision(
    model, tokenizer, plan: Plan, reference: TeacherReference | None, own: list[dict], is_teacher: bool
):
    """`precision` of metrics.json: the teacher's answers where this model reads them, else its own, read in each
    precision, and the problems answered greedily in each."""
    from distill.evaluation.precision import precision_sweep

    section = plan.section.model_copy(update={"samples": 1, "temperature": 0.0})
    taught = reference and not is_teacher and same_vocabulary(reference.tokenizer, tokenizer)
    asks, answers = (reference.tokenizer, reference.answers) if taught else (tokenizer, own)
    read = answer_rows(_prompts(asks, plan.problems), answers, PRECISION_ROWS)
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
