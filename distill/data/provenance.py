"""From a student back to its teacher, link by link, and whether the teacher's terms allow it.

May this teacher's outputs train another model? Asked before a token is spent, and written down.

    teacher: {model: org/name, terms: {train_other_models: yes, name: MIT, url: ..., read: 2026-01-31}}

The answer comes from the recipe, else from the model card's `license:` or the shipped table `terms.yaml`
(dated, with sources). `no`, `unknown`, and `same_provider` for another provider's student stop the run,
unless `teacher.terms.acknowledged` says who goes on and why. The decision is in the manifests of generations,
dataset and student, and in both cards. It orders what is known; it is not legal advice.

    decision = require(recipe)         # a dict, None without a teacher, UserError where the run may not go on

From a student back to its teacher: prompts, answers, terms and hashes, checked link by link.

    distill provenance checkpoints/demo [--json]        a run, a student's folder, or a published checkpoint

Every manifest names the fingerprints of what it was made from, and its own fingerprint covers its files'
hashes, so one changed byte anywhere shows. A published checkpoint has left its data behind: `provenance.json`
keeps the manifests above it, which still have to fit each other.

    found = provenance(path); found["whole"], found["links"], found["breaks"]
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
from distill.files import like_it
from distill.storage import MANIFEST, changed_files, find_file, fingerprint, hash_file, parse_yaml, read_json

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


# ==== From a student back to its teacher ====

UPSTREAM = "provenance.json"
_UPSTREAM_STAGES = ("dataset", "generations", "prompts")


def model_source(model: str) -> dict[str, Any]:
    """What pins a model: hashes of a local folder's weights and config, or the revision of a hub name.

    {"model", "files": {name: {"bytes", "hash"}}} or {"model", "revision"} (None where the cache has none).
    """
    folder = find_file(model)
    if folder.is_dir():
        whole = [*sorted(folder.glob("*.safetensors")), *folder.glob("config.json")]
        files = {p.name: {"bytes": p.stat().st_size, "hash": hash_file(p)} for p in whole}
        return {"model": model, "files": files}
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(model, "config.json")
    return {"model": model, "revision": Path(cached).parent.name if isinstance(cached, str) else None}


def teacher_source(teacher: TeacherSection) -> dict[str, Any]:
    """`model_source` of a teacher loaded here; of an endpoint the address: its weights are elsewhere."""
    if teacher.endpoint:
        return {"model": teacher.model, "endpoint": teacher.endpoint.base_url}
    return model_source(teacher.model)


def upstream_manifests(run_dir: Path) -> dict[str, Any]:
    """The manifests a student was made from, by stage: what a published checkpoint takes along."""
    files = {stage: run_dir / stage / MANIFEST for stage in _UPSTREAM_STAGES}
    return {stage: read_json(file) for stage, file in files.items() if file.is_file()}


def provenance(path: Path) -> dict[str, Any]:
    """The chain of `path`, a run folder, a stage's folder or a published checkpoint.

    Returns {"path", "whole", "links", "breaks"}; a link is {"name", "where", "state", "detail", "problems"},
    its state "ok", "not here" (recorded and consistent, but the files are elsewhere) or "broken". Raises
    UserError where there is no manifest to start from.
    """
    folder = _start(path)
    first = _read(folder)
    # A published checkpoint carries its stage's manifest under a name of its own.
    in_run = folder.name == first["stage"]
    kept = read_json(folder / UPSTREAM) if (folder / UPSTREAM).is_file() else {}
    links = [_stage_link(folder.name, folder, first)]
    if first["config"].get("student", {}).get("model"):
        links.append(_model_link("base", first["config"]["student"]["model"], first.get("base_source")))
    if first["config"].get("adapter"):
        links.append(_model_link("adapter", first["config"]["adapter"], first.get("adapter_source")))
    manifests = {first["stage"]: first}
    wanted = dict(first["inputs"])
    for stage in ("student", "control", *_UPSTREAM_STAGES):  # a merged model was made from an arm
        if stage not in wanted:
            continue
        manifest, link = _upstream_link(stage, wanted[stage], folder.parent / stage if in_run else None, kept)
        links.append(link)
        if manifest is None:
            continue
        manifests[stage] = manifest
        for name, expected in manifest["inputs"].items():
            if wanted.setdefault(name, expected) != expected:
                link["problems"].append(f"{stage} was made from other {name} than the stages after it")
    if "generations" in manifests:
        answered = manifests["generations"]
        links.append(
            _model_link("teacher", answered["config"]["teacher"]["model"], answered.get("teacher_source"))
        )
        for name, source in answered.get("teacher_sources", {}).items():
            links.append(_model_link("teacher", name, source))
        links.append(_terms_link(manifests))
    for link in links:
        link["state"] = "broken" if link["problems"] else link["state"]
    breaks = [f"{link['name']}: {problem}" for link in links for problem in link["problems"]]
    return {"path": str(path), "whole": not breaks, "links": links, "breaks": breaks}


def _start(path: Path) -> Path:
    """The folder whose manifest the chain starts at: the student of a run, or the last stage it has."""
    folder = find_file(str(path))
    for candidate in (folder, folder / "student", *(folder / stage for stage in _UPSTREAM_STAGES)):
        if (candidate / MANIFEST).is_file():
            return candidate
    raise UserError(
        f"{path}: no {MANIFEST} here{like_it(path)}; give a run folder, a student's folder or a published checkpoint"
    )


def _read(folder: Path) -> dict[str, Any]:
    manifest = read_json(folder / MANIFEST)
    missing = {"stage", "config", "inputs", "files", "fingerprint"} - set(manifest)
    if missing:
        raise UserError(f"{folder / MANIFEST} is no manifest of a stage (no {', '.join(sorted(missing))})")
    return manifest


def _stage_link(name: str, folder: Path | None, manifest: dict[str, Any]) -> dict[str, Any]:
    """A manifest against its own fingerprint and, where the folder is here, against its files."""
    identity = {"config": manifest["config"], "inputs": manifest["inputs"]}
    problems = []
    if fingerprint({"identity": identity, "files": manifest["files"]}) != manifest["fingerprint"]:
        problems.append(f"{MANIFEST} was changed: its fingerprint is not that of its content")
    if folder is not None:
        problems += changed_files(folder, {**manifest["files"], **manifest.get("records", {})})
    detail = f"{_files(manifest)}, fingerprint {manifest['fingerprint'][:8]}"
    return _link(name, folder, "ok" if folder else "not here", detail, problems)


def _upstream_link(
    stage: str, expected: str, folder: Path | None, kept: dict[str, Any]
) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """(manifest, link) of a stage that a later one names as its input."""
    if folder is not None and (folder / MANIFEST).is_file():
        manifest = _read(folder)
    elif stage in kept:
        manifest, folder = kept[stage], None
    else:
        problem = f"made from {stage} {expected[:8]}, of which nothing is here"
        return None, _link(stage, folder, "broken", "", [problem])
    link = _stage_link(stage, folder, manifest)
    if manifest["fingerprint"] != expected:
        link["problems"].append(
            f"the next stage was made from {stage} {expected[:8]}, but this is {manifest['fingerprint'][:8]}"
        )
    return manifest, link


def _model_link(name: str, model: str, source: dict[str, Any] | None) -> dict[str, Any]:
    """A model the run used, against what was recorded of it then."""
    if source is None:
        return _link(name, model, "broken", "", ["its weights were not recorded when it was used"])
    if "endpoint" in source:
        return _link(
            name, model, "ok", f"answered as text from {source['endpoint']}; no weights to check", []
        )
    if "revision" in source:
        revision = source["revision"]
        return _link(
            name, model, "ok" if revision else "not here", f"hub revision {revision or 'unknown'}", []
        )
    folder = find_file(source["model"])
    if not folder.is_dir():
        return _link(name, model, "not here", f"{_files(source)} recorded", [])
    problems = changed_files(folder, source["files"])
    return _link(name, model, "ok", f"{_files(source)} as when it was used", problems)


def _terms_link(manifests: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The decision under which the answers were made, and that the stages after it carry the same."""
    decision = manifests["generations"].get("terms")
    if not decision:
        return _link("terms", "", "broken", "", ["no decision on the teacher's terms was recorded"])
    problems = [
        f"{stage} carries another decision on the teacher's terms than the answers it is made of"
        for stage, manifest in manifests.items()
        if stage in ("dataset", "student") and manifest.get("terms") != decision
    ]
    if not decision["allowed"]:
        problems.append("the teacher's terms do not allow it, and nobody acknowledged that")
    detail = f"{decision['reason']} ({decision['source']}, read {decision['read']}; {decision['notice']})"
    if decision["acknowledged"]:
        detail += f"; acknowledged: {decision['acknowledged']}"
    return _link("terms", decision["name"] or "", "ok", detail, problems)


def _files(holder: dict[str, Any]) -> str:
    count = len(holder["files"])
    return f"{count} file{'' if count == 1 else 's'}"


def _link(name: str, where: Any, state: str, detail: str, problems: list[str]) -> dict[str, Any]:
    return {"name": name, "where": str(where or ""), "state": state, "detail": detail, "problems": problems}


def format_provenance(found: dict[str, Any]) -> str:
    """The chain as text, one link a line, and where it breaks."""
    width = max(len(link["name"]) for link in found["links"])
    where = max(len(link["where"]) for link in found["links"])
    lines = [
        f"{link['name']:<{width}}  {link['where']:<{where}}  {link['state']:<8}  {link['detail']}".rstrip()
        for link in found["links"]
    ]
    if found["whole"]:
        away = [link["name"] for link in found["links"] if link["state"] == "not here"]
        end = f", as far as it is here; not here: {', '.join(away)}" if away else ""
        return "\n".join([*lines, f"whole: every link fits the next{end}"])
    return "\n".join([*lines, "broken:", *(f"  {problem}" for problem in found["breaks"])])
