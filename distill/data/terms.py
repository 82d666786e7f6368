"""May this teacher's outputs train another model? Asked before a token is spent, and written down.

    teacher: {model: org/name, terms: {train_other_models: yes, name: MIT, url: ..., read: 2026-01-31}}

The answer comes from the recipe, else from the model card's `license:` or the shipped table `terms.yaml`
(dated, with sources). `no`, `unknown`, and `same_provider` for another provider's student stop the run,
unless `teacher.terms.acknowledged` says who goes on and why. The decision is in the manifests of generations,
dataset and student, and in both cards. It orders what is known; it is not legal advice.

    decision = require(recipe)         # a dict, None without a teacher, UserError where the run may not go on
"""

import fnmatch
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from distill.config.data import TeacherSection
from distill.config.recipe import Recipe
from distill.config.training import StudentSection
from distill.errors import UserError
from distill.storage import find_file, parse_yaml

NOTICE = "not legal advice"
_TABLE = Path(__file__).with_name("terms.yaml")
_STRICTEST_FIRST = ("no", "unknown", "same_provider", "yes")
_LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1", "0.0.0.0")
_ANSWERS = {
    "yes": "allowed by {name}",
    "no": "not allowed by {name}",
    "same_provider": "{name} allows it for models of {provider} only",
    "unknown": "unknown",
}


def require_permission(recipe: Recipe) -> dict[str, Any] | None:
    """The decision for the recipe's teacher; None without one.

    Raises UserError (with the fix) where its outputs may not train the student and nobody acknowledged that.
    """
    if recipe.teacher is None:
        return None
    teachers = [recipe.teacher]
    for name in dict.fromkeys(
        recipe.train.teachers.models.values()
    ):  # what is stated of one is stated of all
        teachers.append(recipe.teacher.model_copy(update={"model": name}))
    decisions = [decide(teacher, recipe.student) for teacher in teachers]
    decision = next((d for d in decisions if not d["allowed"]), decisions[0])
    if not decision["allowed"]:
        raise UserError(
            f"may outputs of teacher '{decision['teacher']}' train the student? {decision['reason']}; state "
            "what you read in teacher.terms (train_other_models, name, url, read), or go on knowingly with "
            f"teacher.terms.acknowledged='<who, why>' ({NOTICE})"
        )
    return decision


def decide(teacher: TeacherSection, student: StudentSection) -> dict[str, Any]:
    """What is known of the teacher's terms and whether the run may go on.

    Keys: teacher, answer ("yes", "no", "same_provider" or "unknown"), allowed, reason, acknowledged, notice,
    source ("recipe", "model card", "table" or "nothing"), and what the source says: name, provider, url,
    text, read, quality, says, conditions, name_prefix. All JSON values.
    """
    shipped, source = _look_up(teacher)
    stated = teacher.terms.model_dump(mode="json", exclude={"train_other_models", "acknowledged"})
    found = {**shipped, **{key: value for key, value in stated.items() if value is not None}}
    answer = found.pop("train_other_models", "unknown")
    contradicted = False
    if teacher.terms.train_other_models:
        contradicted = teacher.terms.train_other_models == "yes" and answer in ("no", "same_provider")
        answer, source = teacher.terms.train_other_models, "recipe"
        found["quality"] = "stated in the recipe"
    reason = _ANSWERS[answer].format(name=found.get("name"), provider=found.get("provider"))
    if answer == "unknown" and found.get("says"):
        reason += f" ({found['says']})"
    allowed = answer == "yes" or (
        answer == "same_provider" and str(found.get("provider")).lower() in _providers(student)
    )
    if contradicted:
        allowed = False
        reason = (
            f"the recipe says yes, but {shipped['name']}, read on {shipped['read']}, says: {shipped['says']}"
        )
    acknowledged = teacher.terms.acknowledged
    return {
        "teacher": teacher.model,
        "answer": answer,
        "allowed": allowed or bool(acknowledged),
        "reason": reason,
        "acknowledged": acknowledged,
        "source": source,
        **{key: found.get(key) for key in ("name", "provider", "url", "text", "read", "quality", "says")},
        "conditions": found.get("conditions", []),
        "name_prefix": found.get("name_prefix"),
        "notice": NOTICE,
    }


def in_card(text: str) -> str:
    """A name as a card may carry it: one line, no tag, no end of a code span. Hubs render what cards say."""
    return " ".join(text.split()).replace("<", "&lt;").replace("`", "'")


def terms_lines(decision: dict[str, Any]) -> list[str]:
    """The decision as markdown lines for a card: answer, where it stands, conditions, who acknowledged."""
    decision = {key: in_card(value) if isinstance(value, str) else value for key, value in decision.items()}
    line = f"Terms of the teacher `{decision['teacher']}` ({decision['notice']}): {decision['reason']}."
    details = [
        decision["says"] and f"It says: {decision['says']}.",
        decision["url"] and f"Source: {decision['url']}.",
        decision["read"] and f"Read on {decision['read']} ({decision['quality']}).",
    ]
    lines = [" ".join([line, *filter(None, details)])]
    lines += [f"- {condition}" for condition in decision["conditions"]]
    if decision["acknowledged"]:
        lines += ["", f"Acknowledged: {decision['acknowledged']}"]
    return lines


def name_problem(decision: dict[str, Any] | None, name: str) -> str | None:
    """What is wrong with calling a distributed student `name`, for licences with a naming rule."""
    prefix = decision and decision["name_prefix"]
    if prefix and not name.lower().startswith(prefix.lower()):
        return f"'{name}': {decision['name']} asks for a name that begins with it; choose '{prefix}-{name}'"
    return None


def card_metadata(model: str) -> dict[str, Any]:
    """The YAML front matter of a model's card: a local folder's README.md, or the hub's. {} without one."""
    path = find_file(model) / "README.md"
    if not find_file(model).is_dir():
        path = _hub_card(model)
    if path is None or not path.is_file():
        return {}
    opening, _, rest = path.read_text(encoding="utf-8", errors="replace").partition("---\n")
    if opening.strip():
        return {}
    try:
        found = yaml.safe_load(rest.partition("\n---")[0])
    except yaml.YAMLError:
        raise UserError(f"{path}: its front matter is not valid YAML; correct it") from None
    return found if isinstance(found, dict) else {}


def _hub_card(model: str) -> Path | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(hf_hub_download(model, "README.md"))
    except (HfHubHTTPError, OSError, ValueError):  # no such card, or no network: nothing is known of it
        return None


def _look_up(teacher: TeacherSection) -> tuple[dict[str, Any], str]:
    """(entry of the table, where it was found): endpoint host, then model name, then the model card."""
    host = urlsplit(teacher.endpoint.base_url).hostname if teacher.endpoint else None
    for entry in _table()["teachers"]:
        if host and any(host == known or host.endswith(f".{known}") for known in entry.get("hosts", [])):
            return _entry(entry), "table"
    named = None if find_file(teacher.model).is_dir() and not host else _by_name(teacher.model)
    if host and host not in _LOCAL_HOSTS:
        # Whoever serves open weights may bind their users further; a `no` of the model itself stays.
        if named and named["train_other_models"] != "yes":
            return named, "table"
        return {"says": f"the terms of {host} are not in the shipped table"}, "nothing"
    if named:
        return named, "table"
    if host:
        return {"says": "a local endpoint does not say which weights it serves"}, "nothing"
    licences = card_metadata(teacher.model).get("license")
    if not licences:
        return {"says": "its model card names no licence"}, "nothing"
    entries = [_by_licence(str(each)) for each in (licences if isinstance(licences, list) else [licences])]
    return min(entries, key=lambda e: _STRICTEST_FIRST.index(e["train_other_models"])), "model card"


def _by_name(model: str) -> dict[str, Any] | None:
    """The first entry whose pattern fits the model's name, with or without its organisation."""
    names = {model.lower(), model.rpartition("/")[2].lower()}
    for entry in _table()["teachers"]:
        patterns = [pattern.lower() for pattern in entry.get("models", [])]
        if any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in patterns):
            return _entry(entry)
    return None


def _by_licence(licence: str) -> dict[str, Any]:
    entry = _table()["licenses"].get(licence.lower())
    if entry is None:
        says = f"licence '{licence}' of its model card is not in the shipped table"
        return {"name": licence, "train_other_models": "unknown", "says": says}
    return _entry(entry)


def _entry(entry: dict[str, Any]) -> dict[str, Any]:
    """An entry without its patterns, its date as text."""
    return {key: value for key, value in entry.items() if key not in ("models", "hosts")} | {
        "read": str(entry["read"])
    }


def _providers(student: StudentSection) -> set[str]:
    """Whose model the student is, in lower case: by the table, and by the organisation in its name."""
    if student.model is None:
        return set()
    names = [student.model]
    if find_file(student.model).is_dir():
        base = card_metadata(student.model).get("base_model") or []
        names = [str(name) for name in (base if isinstance(base, list) else [base])]
    found = {name.partition("/")[0].lower() for name in names if "/" in name}
    return found | {str(entry.get("provider")).lower() for entry in map(_by_name, names) if entry}


@cache
def _table() -> dict[str, Any]:
    return parse_yaml(_TABLE.read_text(encoding="utf-8"))
