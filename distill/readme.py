"""The result section of both READMEs, written from a committed result file, so that text and numbers cannot part.

    distill demo && python -m distill.readme checkpoints/demo                                   (after a measured run)
    distill bench recipes/claims.yaml && python -m distill.readme checkpoints/claims            (a grid)

copies the run's scores to recipes/results/ (small JSON, no answers) and rewrites the sections of README.md and
README.zh-CN.md between their markers, docs/claims.md, and the speed table of docs/training.md. A test compares them.
"""

import re
import sys
from pathlib import Path

from distill import readme_claims as claims
from distill import readme_speed as speed
from distill.bench_results import commit, shown_commit
from distill.config import PROJECT_ROOT
from distill.errors import DistillError
from distill.shards import hash_file, read_json, write_atomic, write_json

RESULTS = PROJECT_ROOT / "recipes" / "results" / "demo.json"
PAGES = {"en": PROJECT_ROOT / "README.md", "zh": PROJECT_ROOT / "README.zh-CN.md"}
_WORDS = {
    "en": {
        "score": "correct, % [95 % interval]",
        "size": "parameters (active)",
        "task": "{task} (n = {n})",
        "sentence": "{device}, commit {commit}; {minutes:.1f} minutes in all: teacher answers {generations:.0f} s, "
        "student {student:.0f} s, control {control:.0f} s, evaluation of all four {eval:.0f} s. On the teacher's own "
        "answers the student's most likely next token is the teacher's for {agreement:.1f} % of tokens.",
    },
    "zh": {
        "score": "正确率，% [95 % 区间]",
        "size": "参数量（激活）",
        "task": "{task}（n = {n}）",
        "easy": "简单 easy",
        "medium": "中等 medium",
        "hard": "困难 hard",
        "base": "base（训练前的学生）",
        "control": "control（对照）",
        "student": "student（学生）",
        "teacher": "teacher（教师）",
        "sentence": "{device}，提交 {commit}；全程 {minutes:.1f} 分钟：教师作答 {generations:.0f} 秒，"
        "学生 {student:.0f} 秒，对照 {control:.0f} 秒，四个模型的评测 {eval:.0f} 秒。在教师自己的答案上，"
        "学生最可能的下一个词元有 {agreement:.1f} % 与教师相同。",
    },
}
RECIPE = "recipes/demo.yaml"
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
        "recipes": {RECIPE: hash_file(PROJECT_ROOT / RECIPE)},
        "commit": commit(),
        "device": manifests["student"]["device"],
        "versions": manifests["student"]["versions"],
    }


def results_section(results: dict, language: str = "en") -> str:
    """The table and the sentence under it, as markdown. language: "en" or "zh"."""
    words = _WORDS[language]
    tasks = list(next(iter(results["models"].values()))["tasks"])
    head = [
        words["task"].format(task=words.get(t, t), n=next(iter(results["models"].values()))["tasks"][t]["n"])
        for t in tasks
    ]
    lines = ["", f"| {words['score']} | {words['size']} | {' | '.join(head)} |"]
    lines.append("|---|---|" + "---|" * len(tasks))
    for name, model in results["models"].items():
        cells = [_cell(model["tasks"][t]) for t in tasks]
        size = f"{model['parameters_total'] / 1e6:.2f} M"
        if model["parameters_active"] != model["parameters_total"]:
            size += f" ({model['parameters_active'] / 1e6:.2f} M)"
        lines.append(f"| {words.get(name, name)} | {size} | {' | '.join(cells)} |")
    seconds = results["seconds"]
    agreement = results["models"]["student"]["fidelity"]["top1_agreement"]
    about = {
        "device": results["device"],
        "commit": shown_commit(results),
        "minutes": sum(seconds.values()) / 60,
        "agreement": 100 * agreement,
    }
    sentence = words["sentence"].format(**about, **seconds)
    return "\n".join([*lines, "", sentence, ""])


def _cell(score: dict) -> str:
    low, high = score["ci95"]
    return f"{100 * score['accuracy']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def claim_results() -> dict[str, dict]:
    """Committed results of the claims by budget, the smaller first; {} if there are none."""
    files = [claims.FOLDER / f"claims-{budget}.json" for budget in ("small", "full")]
    return {f.stem.partition("-")[2]: read_json(f) for f in files if f.is_file()}


def sections(language: str) -> dict[str, str]:
    """Generated parts of a README by the name in their markers."""
    found = {"results": results_section(read_json(RESULTS), language)}
    if by_budget := claim_results():
        found["claims"] = claims.claims_section(by_budget, language)
    return found


def replaced(text: str, name: str, section: str) -> str:
    """`text` with what stands between `<!-- NAME: ... -->` and `<!-- end of NAME -->` replaced."""
    pattern = rf"(<!-- {name}: .*?-->\n).*?(<!-- end of {name} -->)"
    return re.sub(pattern, lambda m: m[1] + section + m[2], text, flags=re.S)


def main() -> int:
    try:
        for run in map(Path, sys.argv[1:]):
            if (run / "results.json").is_file():
                found = read_json(run / "results.json")
                write_json(claims.FOLDER / f"claims-{found['budget']}.json", claims.compact(found))
            else:
                write_json(RESULTS, collect(run))
        for language, path in PAGES.items():
            text = path.read_text()
            for name, section in sections(language).items():
                text = replaced(text, name, section)
            write_atomic(path, text)
        if found := claim_results():
            write_atomic(claims.PAGE, claims.claims_page(found))
        section = speed.speed_section(read_json(speed.RESULTS))
        write_atomic(speed.PAGE, replaced(speed.PAGE.read_text(), "speed", section))
    except DistillError as error:
        print(f"distill: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
