"""The README's result section, written from a committed result file, so that text and numbers cannot part.

    distill demo && python -m distill.readme checkpoints/demo        (after a measured run)

copies the run's scores to recipes/results/demo.json (small JSON, no answers) and rewrites the section of
README.md between its two markers. A test compares the two.
"""

import re
import sys
from pathlib import Path

from distill.config import PROJECT_ROOT
from distill.errors import DistillError
from distill.shards import read_json, write_atomic, write_json

RESULTS = PROJECT_ROOT / "recipes" / "results" / "demo.json"
_STAGES = ("generations", "dataset", "student", "control", "eval")


def collect(run_dir: Path) -> dict:
    """What the README quotes of a run: scores with intervals, seconds per stage, device, versions."""
    metrics = read_json(run_dir / "eval" / "metrics.json")
    manifests = {stage: read_json(run_dir / stage / "manifest.json") for stage in _STAGES}
    kept = ("n", "accuracy", "ci95")
    return {
        "models": {
            name: {
                "parameters_total": model["model"]["parameters_total"],
                "parameters_active": model["model"]["parameters_active"],
                "tasks": {task: {k: score[k] for k in kept} for task, score in model["tasks"].items()},
                **({"fidelity": model["fidelity"]} if "fidelity" in model else {}),
            }
            for name, model in metrics["models"].items()
        },
        "seconds": {stage: m["seconds"] for stage, m in manifests.items()},
        "device": manifests["student"]["device"],
        "versions": manifests["student"]["versions"],
    }


def results_section(results: dict) -> str:
    """The table and the sentence under it, as markdown."""
    tasks = list(next(iter(results["models"].values()))["tasks"])
    head = [f"{t} (n = {next(iter(results['models'].values()))['tasks'][t]['n']})" for t in tasks]
    lines = ["", f"| correct, % [95 % interval] | parameters (active) | {' | '.join(head)} |"]
    lines.append("|---|---|" + "---|" * len(tasks))
    for name, model in results["models"].items():
        cells = [_cell(model["tasks"][t]) for t in tasks]
        size = f"{model['parameters_total'] / 1e6:.2f} M"
        if model["parameters_active"] != model["parameters_total"]:
            size += f" ({model['parameters_active'] / 1e6:.2f} M)"
        lines.append(f"| {name} | {size} | {' | '.join(cells)} |")
    seconds = results["seconds"]
    agreement = results["models"]["student"]["fidelity"]["top1_agreement"]
    lines += [
        "",
        f"{results['device']}; {sum(seconds.values()) / 60:.1f} minutes in all: teacher answers "
        f"{seconds['generations']:.0f} s, student {seconds['student']:.0f} s, control {seconds['control']:.0f} s, "
        f"evaluation of all four {seconds['eval']:.0f} s. On the teacher's own answers the student's most likely "
        f"next token is the teacher's for {100 * agreement:.1f} % of tokens.",
        "",
    ]
    return "\n".join(lines)


def _cell(score: dict) -> str:
    low, high = score["ci95"]
    return f"{100 * score['accuracy']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def main() -> int:
    try:
        if len(sys.argv) > 1:
            write_json(RESULTS, collect(Path(sys.argv[1])))
        path = PROJECT_ROOT / "README.md"
        section = results_section(read_json(RESULTS))
        pattern = r"(<!-- results: .*?-->\n).*?(<!-- end of results -->)"
        write_atomic(path, re.sub(pattern, lambda m: m[1] + section + m[2], path.read_text(), flags=re.S))
    except DistillError as error:
        print(f"distill: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
