"""The generated sections of both READMEs, docs/claims.md and the speed table of docs/training.md.

    distill demo && python docs/generate/readme.py checkpoints/demo                                   (a measured run)
    distill bench recipes/claims.yaml --budget full && python docs/generate/readme.py checkpoints/claims      (a grid)
    python docs/generate/readme.py checkpoints/claims-language              (recipes/claims_language.yaml)
    python docs/generate/readme.py checkpoints/claims-combination           (recipes/claims_combination.yaml)
    python docs/generate/readme.py                                                            (the pages alone, anew)

A run's scores are copied to recipes/results/ (small JSON, no answers), and the pages are written between their markers
from those files, so that text and numbers cannot part. A test compares them, and the hash of recipes/claims.yaml in
the results with that file. What the pages say of the claims is in docs/generate/claim_pages.py.

The speed table has one row per (objective, precision, allocator): the toolkit's speed and peak memory, and its ratios
to each of TRL's trainers and to the counted floor, measured side by side in one run.
"""

import re
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.append(
    str(Path(__file__).resolve().parents[2] / "recipes" / "benchmarks")
)  # names in the speed table

from cases import DISTILLATION, DISTILLATION_AUTOCAST, GKD, HIDDEN, OURS
from claim_pages import (
    CLAIMS_PAGE,
    OTHER_PAGES,
    PREFIXES,
    RESULTS_FOLDER,
    bench_page,
    claim_results,
    claims_page,
    claims_section,
    combination_section,
    compact,
    device_words,
    language_section,
)
from training import TITLES

from distill.bench.items import ITEMS
from distill.bench.results import commit, shown_commit
from distill.console import parameters
from distill.errors import DistillError
from distill.storage import PROJECT_ROOT, hash_yaml, read_json, write_atomic, write_json

RESULTS = PROJECT_ROOT / "recipes" / "results" / "demo.json"
PAGES = {"en": PROJECT_ROOT / "README.md", "zh": PROJECT_ROOT / "README.zh-CN.md"}
_WORDS = {
    "en": {
        "score": "correct, % [95 % interval]",
        "size": "parameters (active)",
        "adapter": " + {} adapter",
        "task": "{task} (n = {n})",
        "sentence": "{device}, commit {commit}; {minutes:.1f} minutes in all: teacher answers {generations:.0f} s, "
        "student {student:.0f} s, control {control:.0f} s, evaluation of all four {eval:.0f} s. On the teacher's own "
        "answers the student's most likely next token is the teacher's for {agreement:.1f} % of tokens. The intervals "
        "cover another exam; they do not cover another training.",
        "working": " What the teacher gives is the working: worked steps without a teacher teach as much (claim "
        "teacher-or-working, {verdict}; {n} seeds, hard level, 100 steps each: {worked} against {taught} %).",
    },
    "zh": {
        "score": "正确率，% [95 % 区间]",
        "size": "参数量（激活）",
        "adapter": " + 适配器 {}",
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
        "学生最可能的下一个词元有 {agreement:.1f} % 与教师相同。"
        "区间只涵盖另一份试卷，不涵盖重新训练。",
        "working": "教师给出的是解题步骤：没有教师的带步骤答案效果相当"
        "（说法 teacher-or-working，{verdict}；{n} 个种子，困难级，各 100 步：{worked} 对 {taught} %）。",
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
                "parameters_adapter": model["model"]["parameters_adapter"],
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
        size = parameters(model["parameters_total"])
        if model["parameters_active"] != model["parameters_total"]:
            size += f" ({parameters(model['parameters_active'])})"
        if model.get("parameters_adapter"):
            size += words["adapter"].format(parameters(model["parameters_adapter"]))
        lines.append(f"| {words.get(name, name)} | {size} | {' | '.join(cells)} |")
    seconds = results["seconds"]
    agreement = results["models"]["student"]["fidelity"]["top1_agreement"]
    about = {
        "device": device_words(results["device"], language),
        "commit": shown_commit(results),
        "minutes": sum(seconds.values()) / 60,
        "agreement": 100 * agreement,
    }
    sentence = words["sentence"].format(**about, **seconds) + _working(words)
    return "\n".join([*lines, "", sentence, ""])


def _working(words: dict[str, str]) -> str:
    """What the same working teaches without a teacher, from the committed claims; empty without them."""
    found = list(claim_results().values())
    if not found:
        return ""
    arms, claims = found[-1]["arms"], {claim["id"]: claim for claim in found[-1]["claims"]}
    by_seed = {
        name: arms[arm]["metrics"]["accuracy.hard"]["values"]
        for name, arm in (("taught", "sequence"), ("worked", "worked-100"))
    }
    both = sorted(set.intersection(*map(set, by_seed.values())))  # the reference arm has more seeds
    values = {name: [of[seed] for seed in both] for name, of in by_seed.items()}
    shown = {
        name: f"{100 * statistics.fmean(of):.1f} ± {100 * statistics.stdev(of):.1f}"
        for name, of in values.items()
    }
    verdict = claims["teacher-or-working"]["verdict"]
    return words["working"].format(n=len(values["taught"]), verdict=verdict, **shown)


def _cell(score: dict) -> str:
    low, high = score["ci95"]
    return f"{100 * score['accuracy']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def sections(language: str) -> dict[str, str]:
    """Generated parts of a README by the name in their markers."""
    found = {"results": results_section(read_json(RESULTS), language)}
    if by_budget := claim_results():
        found["claims"] = claims_section(by_budget, language)
    if measured := claim_results("language").get("small"):
        found["language"] = language_section(measured, language)
    if measured := claim_results("combination"):
        found["combination"] = combination_section(list(measured.values())[-1], language)
    found["devices"] = devices_section(language)
    found["real speed"] = real_speed_section(read_json(SPEED_RESULTS["real speed"]), language)
    return found


_REAL = {
    "en": "Speed, beside the library TRL: with SmolLM2-135M as the teacher and its first 8 layers as the student, a "
    "training step is {fp32} times as fast in fp32 and {bf16} times in bf16. If the teacher's hidden states are stored "
    "beforehand, it is {fp32_hidden} and {bf16_hidden} times as fast. The losses agree. One thread, {device}. "
    "[How it is measured](docs/training.md#speed-beside-trl).",
    "zh": "与训练库 TRL 比速度：教师是 SmolLM2-135M，学生是它的前 8 层，"
    "一个训练步在 fp32 下是 TRL 的 {fp32} 倍快，在 bf16 下是 {bf16} 倍；"
    "事先存下教师的隐藏状态，则为 {fp32_hidden} 倍和 {bf16_hidden} 倍。"
    "损失一致。单线程，{device}。[测量方法](docs/training.md#speed-beside-trl)。",
}


def real_speed_section(found: dict[str, Any], language: str) -> str:
    """A sentence: ratios to TRL at the shape that people train; in bf16 to the peer whose body is under autocast."""
    shown = {"device": found["device"].partition("(")[2].partition(",")[0]}
    for group in found["groups"]:
        methods, form = group["methods"], group["precision"]
        peer = (methods.get(DISTILLATION_AUTOCAST.name) or methods[DISTILLATION.name])[group["clock"]]
        for suffix, method in (("", OURS), ("_hidden", HIDDEN)):
            shown[form + suffix] = f"{peer / methods[method.name][group['clock']]:.1f}"
    return f"{_REAL[language].format(**shown)}\n"


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
            device_words(found["device"], language), size[not found["quick"]],
            *(_mark(parts.get(name)) for name in ("equality", "resume")),
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
                kept = f"{PREFIXES[found['bench']]}-{found['budget']}"
                write_json(RESULTS_FOLDER / f"{kept}.json", compact(found))
                shutil.copyfile(run / ITEMS, RESULTS_FOLDER / f"{kept}-{ITEMS}")
            else:
                write_json(RESULTS, collect(run))
        for language, path in PAGES.items():
            text = path.read_text()
            for name, section in sections(language).items():
                text = replaced(text, name, section)
            write_atomic(path, text)
        if found := claim_results():
            write_atomic(CLAIMS_PAGE, claims_page(found))
        for bench, path in OTHER_PAGES.items():
            write_atomic(path, bench_page(claim_results(PREFIXES[bench]), bench))
        text = SPEED_PAGE.read_text()
        for name, file in SPEED_RESULTS.items():
            if file.is_file():
                text = replaced(text, name, speed_section(read_json(file)))
        write_atomic(SPEED_PAGE, text)
    except DistillError as error:
        print(f"distill: {error}", file=sys.stderr)
        return error.exit_code
    return 0


# By the name in the page's markers: the shape that people train first.
SPEED_RESULTS = {
    "real speed": PROJECT_ROOT / "recipes" / "results" / "train_speed_real.json",
    "speed": PROJECT_ROOT / "recipes" / "results" / "train_speed.json",
}
SPEED_PAGE = PROJECT_ROOT / "docs" / "training.md"
PEERS = (DISTILLATION.name, GKD.name)


def speed_section(found: dict[str, Any]) -> str:
    """Markdown between the page's markers."""
    rounds = f"{found['rounds']} round{'s' * (found['rounds'] != 1)}"
    lines = ["", f"{device_words(found['device'])}, TRL {found['peer']['trl']}, {rounds}; "
             "a step includes AdamW, and no data loading or logging."]  # fmt: skip
    for name, s in found["settings"].items():
        title = name[0].upper() + name[1:]
        lines += ["", f"*{title}*: V = {s['vocabulary']:,} (tied head), {s['rows']} x {s['tokens']} "
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
