"""From a student back to its teacher: prompts, answers, terms and hashes, checked link by link.

    distill provenance checkpoints/demo [--json]        a run, a student's folder, or a published checkpoint

Every manifest names the fingerprints of what it was made from, and its own fingerprint covers its files'
hashes, so one changed byte anywhere shows. A published checkpoint has left its data behind: `provenance.json`
keeps the manifests above it, which still have to fit each other.

    found = provenance(path); found["whole"], found["links"], found["breaks"]
"""

from pathlib import Path
from typing import Any

from distill.config.data import TeacherSection
from distill.errors import UserError
from distill.files import like_it
from distill.storage import MANIFEST, changed_files, find_file, fingerprint, hash_file, read_json

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
