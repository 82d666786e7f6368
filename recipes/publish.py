"""Turn a finished run into a shipped checkpoint: the model folder, its measured scores in its card, its manifest.

    python recipes/publish.py checkpoints/teacher-run checkpoints/teacher        (what `make teacher` does)

The card and manifest say which recipe made the files, so that anyone can make them again. Refuses to write over
a folder that exists: move the old one away first, since other runs may be built on it.
"""

import shutil
import sys
from pathlib import Path

from distill.data.cards import unmeasured
from distill.data.provenance import UPSTREAM, name_problem, upstream_manifests
from distill.errors import DistillError, UserError
from distill.storage import entries, read_json, read_manifest, record_entries, verify_folder, write_sealed

# Everything plain transformers needs, and the account of how it was made; not the step log.
_SHIPPED = ("*.safetensors", "*.json", "README.md", "*.jinja")


def publish(run_dir: Path, target: Path) -> None:
    """Copy `run_dir/student` to `target` and put the evaluation's numbers into its card."""
    if target.exists():
        raise UserError(f"{target} exists; move it away first, other runs may be built on it")
    for stage in ("student", "eval"):
        verify_folder(run_dir / stage)
    manifest = read_json(run_dir / "student" / "manifest.json")
    scores = read_json(run_dir / "eval" / "metrics.json")["models"]["student"]
    if problem := name_problem(manifest.get("terms"), target.name):
        raise UserError(problem)
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for pattern in _SHIPPED:
        for file in (run_dir / "student").glob(pattern):
            shutil.copy2(file, temporary / file.name)
    card = unmeasured((temporary / "README.md").read_text(encoding="utf-8"))
    card = card.replace(f"# {run_dir.name}: student", f"# {target.name}")
    shutil.copy2(run_dir / "recipe.yaml", temporary / "recipe.yaml")
    write_sealed(temporary / UPSTREAM, upstream_manifests(run_dir))
    (temporary / "README.md").write_text(card + _measured(scores, manifest), encoding="utf-8")
    record(temporary)
    temporary.rename(target)


def record(folder: Path) -> None:
    """The manifest's hashes of what else is published: whoever loads the folder checks them."""
    manifest = read_manifest(folder)
    manifest["records"] = record_entries(folder) | entries(folder, [folder / "recipe.yaml"])
    write_sealed(folder / "manifest.json", manifest)


def _measured(scores: dict, manifest: dict) -> str:
    model = scores["model"]
    lines = [
        "",
        "## Measured",
        "",
        f"{model['parameters_total']:,} parameters, {model['parameters_active']:,} active per token; "
        f"trained in {manifest['seconds'] / 60:.0f} minutes on {manifest['device']}.",
        "",
        "| held-out problems | n | accuracy | 95 % interval (Wilson) |",
        "|---|---|---|---|",
    ]
    for name, score in scores["tasks"].items():
        low, high = score["ci95"]
        lines.append(f"| {name} | {score['n']} | {score['accuracy']:.1%} | {low:.1%} to {high:.1%} |")
    lines += ["", "The exact recipe is in `recipe.yaml`, versions and hashes in `manifest.json`.", ""]
    return "\n".join(lines)


def main() -> int:
    if len(sys.argv) != 3:
        print("usage: python recipes/publish.py RUN_DIR TARGET", file=sys.stderr)
        return 2
    try:
        publish(Path(sys.argv[1]), Path(sys.argv[2]))
    except DistillError as error:
        print(f"distill: {error}", file=sys.stderr)
        return error.exit_code
    print(f"published {sys.argv[2]}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
