"""How fast the toolkit trains, against TRL's trainers in the same run, as ratios.

    python recipes/benchmarks/training.py [--quick | --real] [--peer-python PATH] [--out FILE] [--json]

One process per (setting, method, objective, precision, allocator), one at a time, each on one thread; rounds are
interleaved, so that a slow minute of the machine hits everybody, and the small models' short steps get three turns in
each. A step is forward of both models, loss, backward, clipping and AdamW; data loading and logging are left out for
everyone. "Tokens read" are prompt and completion tokens of the batch. Before anything is compared, the loss and the
gradient norm of the first step must agree with the plain definition's: a method of other arithmetic gets no ratio.
The floor is the counted work of the step (bodies, heads on kept tokens, backward) at the matmul rates measured here
for these shapes.

Peers run in `--peer-python`, an interpreter where `trl` can be imported; in one where it cannot they are listed as
not installed. What is measured is in `cases`, the process in `worker`, TRL in
`trl_peers`. Ratios are of wall seconds; where somebody else had the core meanwhile (a process got less
than 90 % of it), they are of CPU seconds, and the table says so.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cases import (
    DISTILLATION,
    GKD,
    LARGE,
    NAIVE,
    OURS,
    REAL,
    SMALL,
    Case,
    all_cases,
    counted_work,
    floor_seconds,
    quick_cases,
    real_cases,
)
from script import benchmark_parser, check, leave, run_script

from distill.errors import RunError, UserError

FOLDER = Path(__file__).resolve().parent
PROJECT_ROOT = FOLDER.parent.parent
INSTALL = "python -m pip install --no-deps trl==1.16.0"


# Memory that is freed goes back to the kernel and is faulted in again, page by page; these keep it.
ALLOCATORS = {
    "glibc": {},
    "keeping": {
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(2**40),
        "MALLOC_TOP_PAD_": str(2**26),
    },
}
TITLES = {"forward_kl": "forward KL", "reverse_kl": "reverse KL", "generalized_jsd": "JSD (beta 0.5)"}
AGREE = {"fp32": 1e-3, "medium": 2e-2, "bf16": 5e-2}  # relative, of the first loss and its gradient's norm
AGREE_AFTER = (
    1e-3  # relative, of the loss after one update, whatever the precision: the first cannot see an update
)
BUSY = 0.9  # CPU seconds over wall seconds, below which somebody else had the core


# ------------------------------------------------------------------------------------------------ running


def run_worker(
    python: str, spec: dict[str, Any], allocator: str = "glibc", timeout: float = 900
) -> dict[str, Any]:
    """What one measured process says. Raises RunError with its last line where it failed."""
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")},
        **ALLOCATORS[allocator],
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(
            [str(FOLDER), str(PROJECT_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        ),
    }
    command = [python, "-W", "ignore", str(FOLDER / "worker.py"), json.dumps(spec)]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        raise RunError(f"not finished after {timeout:.0f} seconds") from None
    if done.returncode == -9:
        raise RunError("killed: most likely out of memory")
    if done.returncode:
        raise RunError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    return json.loads(done.stdout.strip().splitlines()[-1])


def find_peer(python: str) -> str | None:
    """The version of trl that this interpreter imports, or None. Raises UserError where it is no Python."""
    question = "from importlib.metadata import version; print(version('trl'))"
    try:
        done = subprocess.run([python, "-c", question], capture_output=True, text=True)
    except OSError as error:
        raise UserError(
            f"--peer-python {python}: {error.strerror}; give the path of a Python interpreter"
        ) from None
    return done.stdout.strip() if done.returncode == 0 else None


def available_memory() -> float:
    """Bytes that a new process may take, or infinity where the system does not say."""
    info, limit = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")
    found = float("inf")
    if info.is_file():
        fields = dict(line.split(":", 1) for line in info.read_text().splitlines())
        found = int(fields["MemAvailable"].split()[0]) * 1024
    if limit.is_file() and limit.read_text().strip().isdigit():
        used = int((limit.parent / "memory.current").read_text())
        found = min(found, int(limit.read_text()) - used)
    return found


def training_speed(
    quick: bool = False,
    rounds: int = 1,
    peer_python: str | None = None,
    say: Callable[[str], None] = lambda line: None,
    cases: list[Case] | None = None,
) -> dict[str, Any]:
    """Measure `cases` (default: all, or the quick ones) and compare. Returns what `--json` prints; Ctrl-C
    ends the measuring, not what was measured.

    Raises UserError for a peer interpreter that does not run, RunError where the toolkit's own step fails.
    """
    start, peer_python = time.perf_counter(), peer_python or sys.executable
    trl = find_peer(peer_python)
    settings = [SMALL] if quick else [REAL, LARGE, SMALL]
    if cases is not None:
        settings = list(dict.fromkeys(case.setting for case in cases))
    rates, device = {}, ""
    for setting in settings:
        found = run_worker(sys.executable, {"do": "rates", "setting": asdict(setting)})
        rates[setting.name], device = found["rates"], found["device"]
    left_out: list[str] = []
    if cases is None:
        cases, left_out = (quick_cases(), []) if quick else all_cases(rates[LARGE.name])
    runs, missing = _measure_all(cases, rounds, peer_python, trl, say, left_out)
    return {
        "settings": {s.name: {**asdict(s), "work_flops": counted_work(s)} for s in settings},
        "groups": compare({case: found for case, found in runs.items() if case not in missing}, rates),
        "missing": [
            {"method": case.method.name, "group": case.group, "why": why} for case, why in missing.items()
        ],
        "left_out": left_out,
        "rates": rates,
        "device": device,
        "peer": {"trl": trl},
        "allocators": ALLOCATORS,
        "rounds": rounds,
        "seconds": round(time.perf_counter() - start, 1),
    }


def _measure_all(
    cases: list[Case],
    rounds: int,
    peer_python: str,
    trl: str | None,
    say: Callable[[str], None],
    left_out: list[str],
) -> tuple[dict[Case, list[dict[str, Any]]], dict[Case, str]]:
    """(what each case's processes said, why others said nothing). Stopped by hand, it keeps what it has, and
    says so in `left_out`."""
    runs, missing = {case: [] for case in cases}, {}
    last = rounds * max(case.setting.repeats for case in cases)
    plan = [
        (turn, i, c) for turn in range(last) for i, c in enumerate(cases) if turn < rounds * c.setting.repeats
    ]
    start, done = time.perf_counter(), 0
    try:
        for done, (turn, i, case) in enumerate(plan):
            if case in missing:
                continue
            minutes = (time.perf_counter() - start) * (len(plan) - done) / max(done, 1) / 60
            left = f"; about {minutes:.0f} min left" if done else ""
            where = f"{' · '.join(case.group[:4])}: {case.method.name}"
            say(f"turn {turn + 1} of {last}, {i + 1} of {len(cases)}: {where}{left}")
            try:
                runs[case].append(_run_case(case, peer_python, trl))
            except RunError as error:
                if not case.method.peer and case.method is not NAIVE:
                    raise
                missing[case] = str(error)
    except KeyboardInterrupt:
        if not any(runs.values()):
            raise
        left_out.append(
            f"stopped by hand after {done} of {len(plan)} measurements: rows and ratios are missing"
        )
    return runs, missing


def _run_case(case: Case, peer_python: str, trl: str | None) -> dict[str, Any]:
    if case.method.peer and trl is None:
        raise RunError(f"not installed in {peer_python}: {INSTALL}")
    need, free = case.memory_needed, available_memory()
    if need > free:
        raise RunError(f"needs about {need / 1e9:.0f} GB of memory and {free / 1e9:.0f} GB are free")
    return run_worker(peer_python if case.method.peer else sys.executable, case.spec, case.allocator)


# ------------------------------------------------------------------------------------------------ comparing


def compare(
    runs: dict[Case, list[dict[str, Any]]], rates: dict[str, dict[str, float]]
) -> list[dict[str, Any]]:
    """Groups of like cases, each with its methods' figures, agreement with the definition, and ratios."""
    grouped: dict[tuple, dict[Case, list[dict[str, Any]]]] = {}
    for case, found in runs.items():
        if found:
            grouped.setdefault(case.group, {})[case] = found
    groups = []
    for key, members in grouped.items():
        rows = {case.method.name: figures(case, found, rates) for case, found in members.items()}
        _check_agreement(rows, {case.method.name: case for case in members})
        busy = any(row["cpu_share"] < BUSY for row in rows.values())
        clock = "step_cpu_seconds" if busy else "step_seconds"
        peers = {c.method.name: rows[c.method.name][clock] for c in members if c.method.peer}
        for row in rows.values():
            row["times_faster_than"] = {
                name: round(seconds / row[clock], 3)
                for name, seconds in peers.items()
                if rows[name]["agrees"] and row["agrees"] is not False
            }
        names = ("setting", "objective", "precision", "allocator", "measured")
        groups.append({**dict(zip(names, key)), "clock": clock, "methods": rows})
    return groups


def figures(case: Case, found: list[dict[str, Any]], rates: dict[str, dict[str, float]]) -> dict[str, Any]:
    """One method's row: medians over all timed steps of all rounds, with their spread."""
    seconds = [s for run in found for s in run["seconds"]]
    cpu = [s for run in found for s in run["cpu_seconds"]]
    system = sum(run["system_seconds"] for run in found)
    median = statistics.median(seconds)
    row = {
        "step_seconds": median,
        "step_seconds_spread": [min(seconds), max(seconds)],
        "step_cpu_seconds": statistics.median(cpu),
        "timed_steps": len(seconds),
        "tokens_per_second": case.setting.rows * case.setting.tokens / median,
        "steps_per_second": 1 / median,
        "memory_peak": max(run["memory_peak"] for run in found),
        "memory_after_imports": statistics.median(run["memory_after_imports"] for run in found),
        "system_share": round(system / max(sum(cpu), 1e-9), 3),
        "cpu_share": round(sum(cpu) / sum(seconds), 3),
        "page_faults_per_step": round(sum(run["page_faults"] for run in found) / len(seconds)),
        "loss": found[0]["losses"][0],
        "second_loss": found[0]["losses"][1],
        "gradient_norm": found[0]["gradient_norms"][0],
        "versions": found[0]["versions"],
    }
    if case.precision == "fp32" or (
        case.precision == "bf16" and "teacher_body bf16" in rates[case.setting.name]
    ):
        floor = floor_seconds(case.setting, rates[case.setting.name], case.method, case.precision)
        row["floor_seconds"], row["times_the_floor"] = floor, row["step_cpu_seconds"] / floor
    if case.do == "loop":
        for clock in ("seconds", "cpu_seconds"):
            bare, loop = (
                statistics.median(s for run in found for s in run[prefix + clock]) for prefix in ("", "loop_")
            )
            row[f"loop_overhead_{clock}"] = loop / bare - 1
    return row


def _check_agreement(rows: dict[str, dict[str, Any]], cases: dict[str, Case]) -> None:
    """Sets `agrees` of every row: True or False against the plain definition's first two steps (the toolkit's,
    where that was not run), None where the loss is another by intent (stored signals)."""
    reference = rows.get(NAIVE.name) or rows.get(OURS.name)
    for name, row in rows.items():
        keys, allowed = cases[name].method.held_to, AGREE[cases[name].precision]
        row["agrees"] = None
        if reference is not None and keys:
            row["agrees"] = all(
                abs(row[k] - reference[k])
                <= (AGREE_AFTER if k == "second_loss" else allowed) * abs(reference[k])
                for k in keys
            )


# ------------------------------------------------------------------------------------------------ the table


def format_training_speed(found: dict[str, Any]) -> str:
    """The table for people: one block per group, methods as rows, ratios to each peer of the block."""
    lines = [f"{found['device']}; trl {found['peer']['trl'] or 'not installed'}; {found['rounds']} round(s), "
             f"{found['seconds']:,.0f} s; a step includes AdamW, and no data loading or logging"]  # fmt: skip
    for name, s in found["settings"].items():
        lines.append(
            f"{name}: V = {s['vocabulary']:,} (tied), batch {s['rows']} x {s['tokens']} tokens, half prompt; teacher "
            f"{s['teacher'][0]} x {s['teacher'][1]}, student {s['student'][0]} x {s['student'][1]} (width x layers)"
        )
    for group in found["groups"]:
        lines += ["", *_block(group)]
    notes = [f"- {m['method']}, {', '.join(m['group'][:4])}: {m['why']}" for m in found["missing"]]
    notes += [f"- {line}" for line in found["left_out"]]
    torches = {row["versions"]["torch"] for group in found["groups"] for row in group["methods"].values()}
    if len(torches) > 1:
        notes.append(
            f"- caution: peers and toolkit ran on different versions of torch: {', '.join(sorted(torches))}"
        )
    if notes:
        lines += ["", "not measured, and cautions:", *notes]
    return "\n".join(lines)


def _block(group: dict[str, Any]) -> list[str]:
    rows, by_cpu = group["methods"], group["clock"] == "step_cpu_seconds"
    title = f"{group['setting']}, {TITLES[group['objective']]}, {group['precision']}, allocator {group['allocator']}"
    if by_cpu:
        title += "  (the core was shared: ratios are of CPU seconds)"
    if group["measured"] == "loop":
        key = "loop_overhead_cpu_seconds" if by_cpu else "loop_overhead_seconds"
        return [title] + [
            f"  {name}: the loop of `distill train` (data, log) costs {100 * row[key]:+.1f}% a step over the bare step"
            for name, row in rows.items()
        ]
    peers = [name for name in rows if name in (DISTILLATION.name, GKD.name)]
    heads = "".join(f"{'x ' + p.removeprefix('TRL '):>22}" for p in peers)
    lines = [
        title,
        f"  {'':28}{'tokens/s':>10}{'s/step (spread)':>24}{'cpu s':>8}{'system':>8}{'floor':>7}{'peak GB':>9}{heads}",
    ]
    for name, row in rows.items():
        low, high = row["step_seconds_spread"]
        spread = f"{row['step_seconds']:.3f} ({low:.3f}-{high:.3f})"
        floor = f"{row['times_the_floor']:.1f}x" if "times_the_floor" in row else ""
        ratios = "".join(f"{row['times_faster_than'].get(p, '-'):>22}" for p in peers)
        note = "  OTHER ARITHMETIC: not compared" if row["agrees"] is False else ""
        lines.append(
            f"  {name:28}{row['tokens_per_second']:>10,.0f}{spread:>24}{row['step_cpu_seconds']:>8.2f}"
            f"{100 * row['system_share']:>7.0f}%{floor:>7}{row['memory_peak'] / 1e9:>9.2f}{ratios}{note}"
        )
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--peer-python", metavar="PATH", help="an interpreter that can import trl")
    parser.add_argument(
        "--real", action="store_true", help="the shape that people train alone: 30 layers to 8"
    )
    arguments = parser.parse_args(argv)
    check(arguments)
    rounds = {} if arguments.rounds is None else {"rounds": arguments.rounds}

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    cases = real_cases() if arguments.real else None
    found = training_speed(arguments.quick, peer_python=arguments.peer_python, say=say, cases=cases, **rounds)
    leave(found, format_training_speed(found), arguments)
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
