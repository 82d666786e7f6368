"""Whether files are what a stage wrote: the hashes of its manifest, checked where the files are read.

    manifest["files"]       rows and weights, {name: {"bytes", "hash"}}: part of the fingerprint
    manifest["records"]     everything else that is read again: configs, tokenizers, templates, metrics
    "checksum"              of a JSON file's own content (manifest.json, state.json), added by `write_sealed`

    verify_folder(folder)   # raises UserError naming the first file that changed, who wrote it and how to remake it

A file is hashed once per process, as long as its size and time of change stay: BLAKE2b reads 0.8 GB a second, so
100 MB cost 0.13 s of one core, and the bytes are in memory when they are parsed. A folder without a manifest says
nothing of itself, and old manifests have `files` alone.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from distill import console
from distill.errors import UserError
from distill.files import write_atomic
from distill.storage import CHECKSUM, MANIFEST, adapter_content, fingerprint, hash_file, read_json, same

COMMANDS = {
    "prompts": "generate",
    "generations": "generate",
    "dataset": "filter",
    "student": "train",
    "control": "train",
    "eval": "evaluate",
}
# What a stage's folder holds besides rows and weights and is read again. Pages (.html) are made from these, and a
# card (.md) is for people: evaluation writes its scores into it.
_RECORDS = (".json", ".jsonl", ".jinja", ".txt", ".model")
_ADAPTER = "adapter_config.json"
_SEAL = "# checksum of the lines above: "


# ---- writing -----------------------------------------------------------------------------------------


def entries(folder: Path, paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """{name in the folder: {"bytes", "hash"}} of these files."""
    return {
        str(p.relative_to(folder)): {"bytes": p.stat().st_size, "hash": hash_file(p)} for p in sorted(paths)
    }


def record_entries(folder: Path) -> dict[str, dict[str, Any]]:
    """`entries` of what goes into `records`: directly in the folder, but not the manifest.

    Of an adapter's settings it is {"content"}: the path of its base may be edited.
    """
    found = entries(
        folder,
        (
            p
            for p in folder.iterdir()
            if p.is_file() and p.suffix in _RECORDS and p.name != MANIFEST and not p.name.startswith(".")
        ),
    )
    if _ADAPTER in found:
        found[_ADAPTER] = {"content": adapter_content(folder / _ADAPTER)}
    return found


def write_sealed(path: Path, value: dict[str, Any]) -> None:
    """A JSON object with the checksum of its own content; `read_json` checks it and takes it out."""
    plain = json.loads(json.dumps(value, allow_nan=False))
    sealed = {**plain, CHECKSUM: fingerprint(plain)}
    write_atomic(path, json.dumps(sealed, indent=2, ensure_ascii=False) + "\n")


def sealed_text(text: str) -> str:
    """A text file of lines, with a last one, a YAML comment, that holds the checksum of those above."""
    return f"{text}{_SEAL}{fingerprint(text)}\n"


def unsealed(text: str) -> tuple[str, bool]:
    """(the text without its seal, whether it is as it was written); one that was never sealed is."""
    body, seal, checksum = text.rpartition(_SEAL)
    if seal:
        return body, checksum.strip() == fingerprint(body)
    body, _, last = text.rstrip("\n").rpartition("\n")
    # A seal whose own words are damaged is no text that was never sealed.
    damaged = len(last) == len(_SEAL) + 32 and sum(a != b for a, b in zip(last, _SEAL)) <= 2
    return (f"{body}\n", False) if damaged else (text, True)


# ---- reading -----------------------------------------------------------------------------------------


def read_manifest(folder: Path) -> dict[str, Any]:
    """A stage's manifest. Raises UserError where it is missing or damaged, or its fingerprint is not its own."""
    path = folder / MANIFEST
    manifest = read_json(path)
    if not isinstance(manifest, dict):
        raise UserError(f"{path} is no manifest of a stage; delete it and {_remake(folder, None)}")
    if not {"config", "inputs", "files", "fingerprint"} <= set(manifest):
        return manifest
    identity = {"config": manifest["config"], "inputs": manifest["inputs"]}
    if fingerprint({"identity": identity, "files": manifest["files"]}) != manifest["fingerprint"]:
        raise UserError(
            f"{path} is damaged: its fingerprint is not that of its content; delete it and "
            f"{_remake(folder, manifest.get('stage'))}"
        )
    return manifest


def verify_folder(folder: Path, but: str | None = None) -> None:
    """Every file of the folder's manifest is as it was written; a missing one is for its reader to tell.

    `but`: the ending of files that are not going to be read. Without a manifest nothing is known. Raises UserError.
    """
    if not (folder / MANIFEST).is_file():
        return
    manifest = read_manifest(folder)
    with console.slow(f"comparing {folder} with its hashes"):
        changed = _changed(folder, manifest, but)
    if problems := [_problem(path, folder, manifest.get("stage")) for path in changed]:
        raise UserError(*problems)


def remove_changed(folder: Path) -> None:
    """For --redo: files that `verify_folder` would name are deleted, so that they are made again."""
    if (folder / MANIFEST).is_file():
        manifest = read_json(folder / MANIFEST)
        for path in _changed(folder, manifest if isinstance(manifest, dict) else {}):
            path.unlink()


def _changed(folder: Path, manifest: dict[str, Any], but: str | None = None) -> list[Path]:
    lists = [manifest.get(name, {}) for name in ("files", "records")]
    recorded = {**lists[0], **lists[1]} if all(isinstance(files, dict) for files in lists) else {"": None}
    # A stranger's manifest must not have other files read, or with --redo deleted.
    if not all(_is_entry(name, entry) for name, entry in recorded.items()):
        raise UserError(
            f"{folder / MANIFEST} names a file outside its folder, or one without its hash; delete it and "
            f"{_remake(folder, None)}"
        )
    found = {folder / name: entry for name, entry in recorded.items()}
    read = {path: entry for path, entry in found.items() if not (but and path.name.endswith(but))}
    return [path for path, entry in read.items() if path.is_file() and not same(path, entry)]


def _is_entry(name: str, entry: Any) -> bool:
    inside = bool(name) and not Path(name).is_absolute() and ".." not in Path(name).parts and "\0" not in name
    return inside and isinstance(entry, dict) and ("content" in entry or {"bytes", "hash"} <= entry.keys())


def _problem(path: Path, folder: Path, stage: str | None) -> str:
    return (
        f"{path} is damaged: it is not what the stage '{stage}' wrote (its hash is another); "
        f"delete this file and {_remake(folder, stage)} (a change of your own belongs in a copy without {MANIFEST})"
    )


def verify_source(source: dict[str, Any] | None, folder: Path, user: str) -> None:
    """A model's files against what `user` recorded of them when it used it. Raises UserError for another one."""
    for name, entry in (source or {}).get("files", {}).items():
        path = folder / name
        if path.is_file() and not same(path, entry):
            raise UserError(
                f"{path} is not the file that {user} used (its hash is another); put that one back, or make the run "
                "anew from that stage with --redo"
            )


def _remake(folder: Path, stage: str | None) -> str:
    stage = stage or folder.name
    if folder.name == stage and stage in COMMANDS:
        return f"run `distill {COMMANDS[stage]} RECIPE` again"
    return "copy the folder again"
