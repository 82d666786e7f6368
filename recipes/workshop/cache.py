"""The finished demo that lesson 0 opens, made small: recipes/workshop/demo, from a finished run of recipes/demo.yaml.

    distill demo
    python recipes/workshop/cache.py checkpoints/demo        # 0.3 MB: the student's adapter, what was measured

The adapter is stored in bfloat16, half of its bytes; the exam of the stored student is taken again and kept beside the
run's own (`stored`), so that no number is of another file than the one that is here.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from distill.storage import (
    PROJECT_ROOT,
    fingerprint,
    hash_file,
    read_json,
    record_entries,
    write_json,
    write_sealed,
)

FOLDER = PROJECT_ROOT / "recipes" / "workshop" / "demo"
COPIED = ("adapter_config.json", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json")


def store(run: Path, out: Path) -> None:
    """The student of `run` with its recipe, as a run folder of its own under `out`."""
    student = out / "student"
    student.mkdir(parents=True, exist_ok=True)
    weights = load_file(run / "student" / "adapter_model.safetensors")
    half = {name: value.to(torch.bfloat16) for name, value in weights.items()}
    save_file(half, student / "adapter_model.safetensors", metadata={"format": "pt"})
    for name in COPIED:
        (student / name).write_bytes((run / "student" / name).read_bytes())
    manifest = read_json(run / "student" / "manifest.json")
    path = student / "adapter_model.safetensors"
    manifest["files"] = {path.name: {"bytes": path.stat().st_size, "hash": hash_file(path)}}
    manifest["records"] = record_entries(student)
    manifest["stored"] = "bfloat16, by recipes/workshop/cache.py"
    identity = {"config": manifest["config"], "inputs": manifest["inputs"]}
    manifest["fingerprint"] = fingerprint({"identity": identity, "files": manifest["files"]})
    write_sealed(student / "manifest.json", manifest)
    (out / "recipe.yaml").write_bytes((run / "recipe.yaml").read_bytes())


def exam(run: Path, out: Path) -> dict:
    """Right answers of the run's four models, and of the stored student on the same problems."""
    from distill import load_model, load_tokenizer
    from distill.evaluation.stats import score
    from distill.lessons import ask, held_out_problems

    told = read_json(run / "eval" / "metrics.json")
    kept = ("n", "accuracy", "ci95")
    models = {
        name: {task: {k: one[k] for k in kept} for task, one in model["tasks"].items()}
        for name, model in told["models"].items()
    }
    problems = held_out_problems({"easy": 210, "medium": 210, "hard": 420})
    rows = ask(load_model(str(out / "student")), load_tokenizer("checkpoints/teacher"), problems)
    stored = {}
    for level in ("easy", "medium", "hard"):
        found = score([row["verdict"] == "correct" for row in rows if row["level"] == level])
        stored[level] = {k: found[k] for k in kept}
    manifest = read_json(run / "student" / "manifest.json")
    asked = manifest.get("device"), manifest.get("versions")
    return {"models": models, "stored": stored, "device": asked[0], "versions": asked[1]}


def main() -> int:
    if len(sys.argv) != 2:
        print("usage: python recipes/workshop/cache.py RUN_DIR", file=sys.stderr)
        return 2
    run = Path(sys.argv[1])
    store(run, FOLDER)
    found = exam(run, FOLDER)
    write_json(FOLDER / "results.json", found)
    print(json.dumps(found["stored"], indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
