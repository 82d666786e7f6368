"""The training-speed table of docs/training.md, from the committed result file.

    distill bench speed --only train --peer-python PATH --out recipes/results/train_speed.json
    python -m distill.readme

One row per (objective, precision, allocator): the toolkit's speed and peak memory, and its ratios to each of TRL's
trainers and to the counted floor, measured side by side in one run.
"""

from typing import Any

from distill.config import PROJECT_ROOT
from distill.speed_cases import DISTILLATION, GKD
from distill.train_speed import TITLES

RESULTS = PROJECT_ROOT / "recipes" / "results" / "train_speed.json"
PAGE = PROJECT_ROOT / "docs" / "training.md"
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
