"""The generated sections of both READMEs, docs/claims.md and the speed table of docs/training.md.

    distill demo && python docs/generate/readme.py checkpoints/demo                                   (a measured run)
    distill bench recipes/claims.yaml --budget full && python docs/generate/readme.py checkpoints/claims      (a grid)
    python docs/generate/readme.py                                                            (the pages alone, anew)

A run's scores are copied to recipes/results/ (small JSON, no answers), and the pages are written between their markers
from those files, so that text and numbers cannot part. A test compares them, and the hash of recipes/claims.yaml in
the results with that file. recipes/results/claims-BUDGET.json are results.json without the single values of every run.

The speed table has one row per (objective, precision, allocator): the toolkit's speed and peak memory, and its ratios
to each of TRL's trainers and to the counted floor, measured side by side in one run.
"""

import re
import sys
from pathlib import Path
from typing import Any

sys.path.append(
    str(Path(__file__).resolve().parents[2] / "recipes" / "benchmarks")
)  # names in the speed table

from cases import DISTILLATION, GKD
from training import TITLES

from distill.bench.metrics import metric
from distill.bench.page import MARKS, amount, shown_effect
from distill.bench.results import commit, shown_commit
from distill.errors import DistillError
from distill.report.numbers import si
from distill.storage import PROJECT_ROOT, hash_yaml, read_json, write_atomic, write_json

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
        "recipes": {RECIPE: hash_yaml(PROJECT_ROOT / RECIPE)},
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
    files = [RESULTS_FOLDER / f"claims-{budget}.json" for budget in ("small", "full")]
    return {f.stem.partition("-")[2]: read_json(f) for f in files if f.is_file()}


def sections(language: str) -> dict[str, str]:
    """Generated parts of a README by the name in their markers."""
    found = {"results": results_section(read_json(RESULTS), language)}
    if by_budget := claim_results():
        found["claims"] = claims_section(by_budget, language)
    found["devices"] = devices_section(language)
    return found


def devices_section(language: str) -> str:
    """A row per recipes/results/device-*.json (recipes/benchmarks/device.py)."""
    head = {
        "en": "| device | models | equal to the CPU | exact resume | decode, tokens/s "
        "| KD step LoRA / full, tokens/s | MFU | peak GB |",
        "zh": "| 设备 | 模型 | 与 CPU 相等 | 精确续跑 | 解码，词元/秒 "
        "| 蒸馏一步 LoRA / 全参数，词元/秒 | MFU | 峰值 GB |",
    }[language]  # fmt: skip
    size = {"en": ("small", "0.6B, 1.7B"), "zh": ("小模型", "0.6B、1.7B")}[language]
    rows = []
    for file in sorted(RESULTS_FOLDER.glob("device-*.json")):
        found = read_json(file)
        parts = found["parts"]
        steps = [parts.get("kd", {}).get(f"{adapter} fused") for adapter in ("lora", "full")]
        known = [step for step in steps if step]
        mfu = [f"{step['mfu']:.1%}" for step in known if step["mfu"]]
        cells = [
            found["device"], size[not found["quick"]], *(_mark(parts.get(name)) for name in ("equality", "resume")),
            f"{parts['decode']['greedy']['tokens_per_second']:,}" if parts.get("decode", {}).get("ok") else "–",
            " / ".join(f"{step['tokens_per_second']:,}" for step in known) or "–", " / ".join(mfu) or "–",
            " / ".join(f"{step['peak_bytes'] / 1e9:.2f}" for step in known) or "–",
        ]  # fmt: skip
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join([head, "|---" * 8 + "|", *rows, ""])


def _mark(part: dict[str, Any] | None) -> str:
    return "–" if not part or part.get("ran") is False else "✓" if part.get("ok") else "✗"


def replaced(text: str, name: str, section: str) -> str:
    """`text` with what stands between `<!-- NAME: ... -->` and `<!-- end of NAME -->` replaced."""
    pattern = rf"(<!-- {name}: .*?-->\n).*?(<!-- end of {name} -->)"
    return re.sub(pattern, lambda m: m[1] + section + m[2], text, flags=re.S)


def main() -> int:
    try:
        for run in map(Path, sys.argv[1:]):
            if (run / "results.json").is_file():
                found = read_json(run / "results.json")
                write_json(RESULTS_FOLDER / f"claims-{found['budget']}.json", compact(found))
            else:
                write_json(RESULTS, collect(run))
        for language, path in PAGES.items():
            text = path.read_text()
            for name, section in sections(language).items():
                text = replaced(text, name, section)
            write_atomic(path, text)
        if found := claim_results():
            write_atomic(CLAIMS_PAGE, claims_page(found))
        section = speed_section(read_json(SPEED_RESULTS))
        write_atomic(SPEED_PAGE, replaced(SPEED_PAGE.read_text(), "speed", section))
    except DistillError as error:
        print(f"distill: {error}", file=sys.stderr)
        return error.exit_code
    return 0


RESULTS_FOLDER = PROJECT_ROOT / "recipes" / "results"
CLAIMS_PAGE = PROJECT_ROOT / "docs" / "claims.md"
BENCH = "recipes/claims.yaml"
_CLAIM_WORDS = {
    "en": {
        "head": "| the article | hypothesis, written down before the run | effect [95 % interval] | verdict |",
        "sentence": "{n} claims, {counts}; {seeds} seeds at most, {tasks} tasks, {minutes:.0f} minutes on the wall, "
        "{jobs} at a time; {device}; commit {commit}. All of them, with what each arm used: "
        "[docs/claims.md](docs/claims.md).",
        "smaller": " `--budget {name}`: {seeds} seeds, {tasks} tasks, {minutes:.0f} minutes.",
    },
    "zh": {
        "head": "| 文章的说法（原文） | 运行之前写下的假设（原文） | 效应 [95 % 区间] | 判定 |",
        "sentence": "共 {n} 条论断：{counts}；最多 {seeds} 个种子，{tasks} 个任务，实际耗时 {minutes:.0f} 分钟，"
        "同时运行 {jobs} 个；{device}；提交 {commit}。全部论断与各组用量见 [docs/claims.md](docs/claims.md)。",
        "smaller": "`--budget {name}`：{seeds} 个种子，{tasks} 个任务，{minutes:.0f} 分钟。",
    },
}
_INTRODUCTION = f"""\
Generated by `python docs/generate/readme.py` from `recipes/results/claims-*.json`. What the arms are stands in
[{BENCH}](../{BENCH}), how a verdict follows in `distill/bench/verdicts.py`. An effect is the mean over seeds
of a difference taken within each seed, with Student's 95 % interval. SUPPORTED: the whole interval lies where the
hypothesis says; NOT SUPPORTED: the whole of it lies elsewhere; INCONCLUSIVE: anything else. One in twenty true
nulls would be called by its interval, so a verdict also needs its p-value below 0.05 after Holm's correction for all
claims of a file; the last column is what the interval of the larger budget alone would say, where that differs.

After the runs one claim was withdrawn: that balancing by a bias costs less quality than by an auxiliary loss. What it
compared carried the penalty of one arm ([LOG.md](../LOG.md), Evaluation). The words of `retention-by-size`,
`together-moe` and `teacher-or-labels` were made more exact. No effect changed."""
_VERDICTS = {
    "SUPPORTED": "成立",
    "NOT SUPPORTED": "不成立",
    "INCONCLUSIVE": "无定论",
    "NOT COMPARABLE": "不可比",
}


def compact(results: dict[str, Any]) -> dict[str, Any]:
    """What is committed of results.json: arms with mean and sd, without the values of single runs."""
    arms = {
        name: {**arm, "metrics": {m: [s["mean"], s["sd"]] for m, s in arm["metrics"].items()}}
        for name, arm in results["arms"].items()
    }
    return {**results, "arms": arms}


def stale(results: dict[str, Any]) -> list[str]:
    """Files that the results were made from and that have changed since."""
    return [name for name, digest in results["recipes"].items() if hash_yaml(PROJECT_ROOT / name) != digest]


def claims_section(found: dict[str, dict[str, Any]], language: str = "en") -> str:
    """The headline claims of the largest budget of `found` as a table, what it rests on, and what smaller ones take."""
    words, (*smaller, results) = _CLAIM_WORDS[language], found.values()
    lines = ["", words["head"], "|---|---|---|---|"]
    for claim in results["claims"]:
        if claim["headline"]:
            verdict = _verdict(claim["verdict"], language)
            cells = (claim["sentence"], claim["hypothesis"], shown_effect(claim), verdict)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    counts = ", ".join(
        f"{n} {_verdict(v, language)}"
        for v in MARKS
        if (n := sum(c["verdict"] == v for c in results["claims"]))
    )
    sentence = words["sentence"].format(
        n=len(results["claims"]), counts=counts, jobs=results["jobs"], device=results["device"],
        commit=shown_commit(results), **_size(results),
    )  # fmt: skip
    for other in smaller:
        sentence += words["smaller"].format(name=other["budget"], **_size(other))
    return "\n".join([*lines, "", sentence, ""])


def _size(results: dict[str, Any]) -> dict[str, Any]:
    return {"seeds": results["seeds"], "tasks": results["tasks"], "minutes": results["seconds"]["wall"] / 60}


def _verdict(verdict: str, language: str) -> str:
    return verdict if language == "en" else f"{_VERDICTS[verdict]} {verdict}"


def claims_page(found: dict[str, dict[str, Any]]) -> str:
    """docs/claims.md: every claim of every budget, `found` by its name, the largest last."""
    largest = list(found.values())[-1]
    lines = ["# The article on trial", "", *_INTRODUCTION.splitlines(), ""]
    for name, results in found.items():
        seconds = results["seconds"]
        lines.append(
            f"- `distill bench {BENCH} --budget {name}`: {results['tasks']} tasks, "
            f"{seconds['wall'] / 60:.0f} minutes on the wall with {results['jobs']} at a time, "
            f"{seconds['work'] / 60:.0f} minutes of work; {results['device']}; commit {shown_commit(results)}."
        )
    groups = dict.fromkeys(c["group"] for c in largest["claims"])
    for group in groups:
        lines += ["", f"## {group}", "", "| claim | hypothesis | " + " | ".join(f"{n} budget" for n in found)
                  + " | alone |", "|---|---|" + "---|" * len(found) + "---|"]  # fmt: skip
        for claim in (c for c in largest["claims"] if c["group"] == group):
            cells = [_claim_cell(results, claim["id"]) for results in found.values()]
            alone = claim["alone"] if claim["alone"] != claim["verdict"] else ""
            note = f" *{claim['axis']}*" if claim["axis"] else ""
            hypothesis = f"“{claim['sentence']}” {claim['hypothesis']}.{note}".replace("|", "\\|")
            lines.append(f"| {claim['id']} | {hypothesis} | {' | '.join(cells)} | {alone} |")
    for curve in largest["curves"]:
        lines += ["", f"## {curve['title']}", "", *_curve(curve)]
    lines += ["", "## Arms", "", _arms(largest), ""]
    return "\n".join(lines)


def _curve(curve: dict[str, Any]) -> list[str]:
    """Markdown of a figure: a row per point, its fits, and which points nothing beats."""
    x, y = metric(curve["x"]), metric(curve["y"])
    lines = [f"| series | arm | {x.label} | {y.label} |", "|---|---|---|---|"]
    for name, series in curve["series"].items():
        for arm, at, value, sd in zip(series["arms"], series["x"], series["y"], series["y_sd"]):
            spread = f" ± {amount(sd, y.unit)}" if sd is not None else ""
            mark = " (front)" if arm in curve.get("front", ()) else ""
            lines.append(f"| {name} | {arm}{mark} | {amount(at, x.unit)} | {amount(value, y.unit)}{spread} |")
    fits = {name: s["fit"] for name, s in curve["series"].items() if s["fit"]}
    if fits:
        lines += ["", "Logistic in the logarithm of the first (`distill/bench/verdicts.py`), "
                  "fitted to all seeds: "
                  + "; ".join(f"*{name}* from {100 * f['low']:.0f} to {100 * f['top']:.0f} %, half of the way at "
                              f"{si(10 ** f['middle'])} ({100 * f['rms']:.1f} points rms)"
                              for name, f in fits.items()) + "."]  # fmt: skip
    if "front" in curve:
        lines += ["", f"No other is both cheaper and better: {', '.join(curve['front'])}."]
    return lines


def _claim_cell(results: dict[str, Any], claim_id: str) -> str:
    claim = next((c for c in results["claims"] if c["id"] == claim_id), None)
    if claim is None:
        return ""
    return f"{shown_effect(claim)} (n = {claim['effect']['n']}) **{claim['verdict']}**"


def _arms(results: dict[str, Any]) -> str:
    """Markdown table: what each arm is, how well it does (mean ± sd over seeds), and what a run of it used."""
    lines = ["| arm | what it is | easy, % | medium, % | hard, % | steps | trained tokens | training FLOPs |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, arm in results["arms"].items():
        cells = []
        for level in ("easy", "medium", "hard"):
            mean, sd = arm["metrics"].get(f"accuracy.{level}", (None, None))
            spread = f" ± {100 * sd:.1f}" if sd is not None else ""
            cells.append("" if mean is None else f"{100 * mean:.1f}{spread}")
        used = arm["budget"]
        numbers = [amount(used[key], "") if used[key] else "" for key in ("tokens", "flops")]
        steps = f"{used['steps']:.0f}" if used["steps"] else ""
        lines.append(f"| {name} | {arm['about']} | {' | '.join(cells)} | {steps} | {' | '.join(numbers)} |")
    return "\n".join(lines)


SPEED_RESULTS = PROJECT_ROOT / "recipes" / "results" / "train_speed.json"
SPEED_PAGE = PROJECT_ROOT / "docs" / "training.md"
PEERS = (DISTILLATION.name, GKD.name)


def speed_section(found: dict[str, Any]) -> str:
    """Markdown between the page's markers."""
    lines = ["", f"{found['device']}, TRL {found['peer']['trl']}, {found['rounds']} round(s); a step includes AdamW, "
             "and no data loading or logging."]  # fmt: skip
    for name, s in found["settings"].items():
        lines += ["", f"*{name.capitalize()}*: V = {s['vocabulary']:,} (tied head), {s['rows']} x {s['tokens']} "
                  f"tokens, half of them prompt; teacher {s['teacher'][0]} wide, {s['teacher'][1]} layers, student "
                  f"{s['student'][0]} and {s['student'][1]}.", "",
                  "| method | objective | format | allocator | tokens/s | peak GB | x DistillationTrainer | "
                  "x GKDTrainer | x the floor's time |",
                  "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
        for group in found["groups"]:
            if group["setting"] == name and group["measured"] == "step":
                lines += _rows(group)
    loops = [
        f"{method} {100 * row['loop_overhead_seconds']:+.1f} %"
        for group in found["groups"]
        if group["measured"] == "loop"
        for method, row in group["methods"].items()
    ]
    if loops:
        lines += [
            "",
            f"Reading, collating and logging add to a step of the small models: {'; '.join(loops)}.",
        ]
    missing = [
        f"{m['method']}, {TITLES[m['group'][1]]}, {m['group'][3]}: {m['why']}" for m in found["missing"]
    ]
    if notes := [*missing, *found["left_out"]]:
        lines += ["", f"Not measured: {'; '.join(notes)}."]
    return "\n".join([*lines, ""])


def _rows(group: dict[str, Any]) -> list[str]:
    rows = []
    for method, row in group["methods"].items():
        if method in PEERS:
            continue
        ratios = (row["times_faster_than"].get(peer) for peer in PEERS)
        cells = [f"{ratio:.2f}" if ratio else "–" for ratio in ratios]
        floor = f"{row['times_the_floor']:.1f}" if "times_the_floor" in row else "–"
        rows.append(
            f"| {method} | {TITLES[group['objective']]} | {group['precision']} | {group['allocator']} "
            f"| {row['tokens_per_second']:,.0f} | {row['memory_peak'] / 1e9:.2f} | {' | '.join(cells)} | {floor} |"
        )
    for method in PEERS:
        if row := group["methods"].get(method):
            rows.append(
                f"| *{method}* | | | | {row['tokens_per_second']:,.0f} | {row['memory_peak'] / 1e9:.2f} | | | |"
            )
    return rows


if __name__ == "__main__":
    raise SystemExit(main())
