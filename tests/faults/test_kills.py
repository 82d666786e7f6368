"""Random SIGKILLs and SIGTERMs over every stage change nothing at the end, the step log included, and leave nothing.

The children are forked from one warm process (tests/warm.py), so that a kill lands in the work and not in imports of
torch. Four in the ordinary suite; `pytest -m slow tests/faults/test_kills.py` does 300, DISTILL_KILLS=1000 as many.
"""

import fcntl
import json
import os
import random
import re
import signal
import subprocess
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from conftest import PYTHON, ROOT
from warm import Started

from distill.files import is_leftover
from distill.storage import hash_file, read_json, read_rows

# A bench's tasks in the process itself: a worker of its own would import torch anew after every kill.
INLINE = """
import sys
from grid_example import in_this_process
from distill.commands.cli import main

with in_this_process():
    sys.exit(main(sys.argv[1:]))
"""


def worked(running: Started, begun: float) -> float:
    """Seconds of work of a process: on a busy machine the clock says nothing of how far it is."""
    try:
        fields = Path(f"/proc/{running.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    except OSError:
        return time.monotonic() - begun


def survive(
    signals: str, kills: int, *command, longest: float = 0.5, seed: int = 1, script: Path | None = None
) -> int:
    """How many kills landed before the command was done, which it is in the end."""
    rng = random.Random(seed)
    landed = 0
    while landed < kills:
        running, begun, goal = Started(command, script), time.monotonic(), rng.uniform(0.02, longest)
        while running.poll() is None and worked(running, begun) < goal:
            if time.monotonic() > begun + 60 * longest:
                break
            time.sleep(rng.uniform(0.001, 0.004))
        if running.poll() is not None:
            assert running.returncode == 0, running.errors[-3000:]
            break
        running.kill(getattr(signal, rng.choice(signals.split(","))))
        running.wait()
        landed += 1
    last = Started(command, script)
    assert last.wait(3000) == 0, last.errors[-3000:]
    return landed


# ---- what is compared: every file, but for times -----------------------------------------------------

TIMES = {"seconds", "gflops", "mfu", "energy", "decode_tokens_per_second", "usd", "fingerprint", "checksum", "hash",
         "peak_memory_bytes", "records", "files", "speed", "prefill_seconds", "inputs", "bytes",
         "bench", "recipes", "commit"}  # fmt: skip


TIMED = re.compile("second|usd|speed|gflops|kwh|mfu|peak_memory")


def timeless(value, run: Path):
    """A JSON value without what a clock said, and without the name of the run's folder."""
    if isinstance(value, dict):
        return {
            k: timeless(v, run)
            for k, v in value.items()
            if k not in TIMES and "second" not in k and "usd" not in k
        }
    if isinstance(value, list):
        return [timeless(v, run) for v in value]
    return value.replace(str(run), "RUN") if isinstance(value, str) else value


def compared(run: Path) -> dict[str, object]:
    """{name: content} of every file of a run. Pages and cards show seconds, and are made from the rest."""
    found = {}
    for path in sorted(p for p in run.rglob("*") if p.is_file()):
        name = str(path.relative_to(run))
        if path.suffix == ".json" and path.name != "clock.json":
            found[name] = timeless(read_json(path), run)
        elif path.suffix == ".jsonl":
            found[name] = [timeless(json.loads(line), run) for line in path.read_text().splitlines()]
        elif name == "results.parquet":
            rows = pq.read_table(path).to_pylist()
            found[name] = [row for row in rows if not TIMED.search(row["metric"])]
        elif path.suffix in (".html", ".md") or path.name in ("clock.json", "log.txt"):
            found[name] = "there"
        elif path.suffix == ".yaml":
            found[name] = path.read_text().replace(str(run), "RUN").rpartition("# checksum")[0]
        else:
            found[name] = hash_file(path)
    return found


def leftovers(run: Path) -> list[str]:
    return [
        str(p)
        for p in run.rglob("*")
        if is_leftover(p) or p.name.endswith(".lock") or p.name.startswith(("state-", ".identity"))
    ]


def parted(a, b, place: str = "") -> list[str]:
    """Where two JSON values part."""
    if isinstance(a, dict) and isinstance(b, dict):
        return [
            d for key in sorted(a.keys() | b.keys()) for d in parted(a.get(key), b.get(key), f"{place}.{key}")
        ]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [d for i, pair in enumerate(zip(a, b)) for d in parted(*pair, f"{place}[{i}]")]
    return [] if a == b else [f"{place}: {a!r:.80} and {b!r:.80}"]


def assert_undisturbed(run: Path, whole: Path, but: tuple[str, ...] = ()) -> None:
    ours, theirs = compared(run), compared(whole)
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if ours[name] != theirs[name] and not name.startswith(but)]
    assert not different, [(name, parted(ours[name], theirs[name])[:9]) for name in different]
    assert not leftovers(run)


# ---- the kills ---------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_random_kills(make_recipe, run_cli, kills):
    slow = [
        "generate.part_size=1", f"prompts.levels={{easy: {20 + 10 * kills}}}", "generate.samples=2",
        "generate.max_new_tokens=12", f"train.steps={20 * kills}", "train.checkpoint_every=3", "control.enabled=false",
    ]  # fmt: skip
    path, whole = make_recipe(name="whole")
    for command in ("generate", "filter", "train"):
        assert run_cli(command, path, *slow)[0] == 0
    path, run = make_recipe(name="killed")
    landed = survive("SIGKILL", kills, "generate", path, *slow)
    assert landed == kills, f"only {landed} kills landed before the stage was done: make it longer"
    rows = [(r["prompt_id"], r["sample_idx"]) for r in read_rows(run / "generations")]
    assert len(rows) == len(set(rows)) == 40 + 20 * kills

    assert run_cli("filter", path, *slow)[0] == 0
    landed = survive("SIGKILL,SIGTERM", kills, "train", path, *slow)
    assert landed == kills, f"only {landed} kills landed before the stage was done: make it longer"
    assert read_json(run / "student" / "manifest.json")["counts"]["steps"] == 20 * kills
    assert_undisturbed(run, whole)


# Stages with what makes them long enough to be hit, and the longest wait before a kill.
STAGES = {
    "generate": ("generate", ["generate.part_size=1", "prompts.levels={easy: 400}"], 0.5),
    "filter": ("filter", ["prompts.levels={easy: 2000}", "generate.part_size=2000"], 0.25),
    "train_lora": ("train", ["train.steps=300", "train.checkpoint_every=3"], 0.5),
    "train_on_policy": (
        "train",
        ["train.steps=60", "train.checkpoint_every=2", "train.objectives=[{name: reverse_kl}]",
         "train.on_policy={fraction: 0.5, buffer_steps: 2, max_new_tokens: 6, most_truncated: 1.0}",
         "control.enabled=false"],
        0.6,
    ),
    "train_signals": (
        "train",
        ["prompts.levels={easy: 250}",  # random models seldom stop, and what is cut is dropped
         "train.steps=120", "train.checkpoint_every=2", "generate.signal.kind=sampled", "generate.signal.k=4",
         "train.objectives=[{name: sampled_cross_entropy}]",
         "train.validation={rows: 5, every: 3, keep_best: true}", "control.enabled=false"],
        0.6,
    ),
    "evaluate": ("evaluate", ["evaluate.levels={easy: 40, hard: 40}", "evaluate.speed=false"], 1.5),
    "report": ("report", [], 0.3),
}  # fmt: skip
ORDER = ("generate", "filter", "train", "evaluate", "report")


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_hundreds_of_kills(stage, make_recipe, run_cli, monkeypatch):
    """As many kills of one stage as its share of DISTILL_KILLS, 300; a stage that is done begins again elsewhere."""
    monkeypatch.setenv("DRAWN_HERE", "1")  # a kill may land in a figure
    wanted = -(-int(os.environ.get("DISTILL_KILLS", "300")) // len(STAGES))
    command, options, longest = STAGES[stage]
    path, whole = make_recipe(name="whole")
    before = ORDER[: ORDER.index(command)]
    for earlier in (*before, command):
        code, _, err = run_cli(earlier, path, *options)
        assert code == 0, err
    landed = round_ = 0
    while landed < wanted:
        round_ += 1
        path, run = make_recipe(name=f"killed{round_}")
        for earlier in before:
            assert run_cli(earlier, path, *options)[0] == 0
        more = survive("SIGKILL", wanted - landed, command, path, *options, longest=longest, seed=round_)
        landed += more
        assert_undisturbed(run, whole)
        assert round_ < 40 or landed > round_, f"{landed} kills in {round_} runs of {stage}: make it longer"
    print(f"{stage}: {landed} kills in {round_} runs")


BENCH = {
    "title": "Killed",
    "set": {
        "prompts.levels": {"easy": 30},
        "generate.samples": 1,
        "train.objectives": [{"name": "cross_entropy"}],
        "evaluate.levels": {"easy": 20},
        "evaluate.speed": False,
        "control.enabled": False,
    },
    "budgets": {"small": {"seeds": 2}},
    "arms": {"base": {}, "rows": {"set": {"filter.completions": "reference_answer"}}, "sequence": {},
             "more": {"start": "sequence", "set": {"train.steps": 3}}},
    "claims": [
        {"id": "gain", "group": "G", "sentence": "s", "hypothesis": "h", "metric": "accuracy.easy",
         "effect": {"sequence": 1, "rows": -1}, "expect": "greater"},
    ],
}  # fmt: skip


@pytest.mark.slow
def test_a_bench_that_is_killed_again_and_again(make_recipe, run_cli, tmp_path, hub):
    wanted = int(os.environ.get("DISTILL_KILLS", "300")) // 8
    path, _ = make_recipe(name="arms")
    arms = {**BENCH["arms"], "base": {"checkpoint": hub["llama"]}}

    def bench(name: str) -> tuple[Path, Path]:
        file, grid = tmp_path / f"{name}.yaml", tmp_path / name
        file.write_text(yaml.safe_dump({"run_dir": str(grid), "recipe": path, **BENCH, "arms": arms}))
        return file, grid

    file, whole = bench("whole")
    assert run_cli("bench", file, "--jobs", "1")[0] == 0
    landed = round_ = 0
    (script := tmp_path / "inline.py").write_text(INLINE)
    while landed < wanted:
        round_ += 1
        file, grid = bench(f"killed{round_}")
        words = ["bench", file, "--jobs", "1"]
        more = survive("SIGKILL", wanted - landed, *words, longest=1.5, seed=round_, script=script)
        landed += more
        assert_undisturbed(grid, whole)
        assert round_ < 10, f"{landed} kills in {round_} runs: make it longer"
    print(f"bench: {landed} kills in {round_} runs")


@pytest.mark.slow
def test_workers_of_a_killed_bench_end_with_it(make_recipe, hub, tmp_path):
    """Otherwise they hold the folders, and the same command is refused."""
    path, _ = make_recipe(name="arms")
    file, grid = tmp_path / "bench.yaml", tmp_path / "grid"
    more = {
        "arms": {"sequence": {"set": {"train.steps": 4000}}},
        "claims": [],
        "budgets": {"small": {"seeds": 1}},
    }
    file.write_text(yaml.safe_dump({"run_dir": str(grid), "recipe": path, **BENCH, **more}))
    running = subprocess.Popen([PYTHON, "-m", "distill", "bench", str(file), "--jobs", "1"], cwd=ROOT)
    deadline = time.monotonic() + 120
    while not list(grid.rglob("student/metrics.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.2)
    (lock,) = grid.rglob(".student.lock")
    running.kill()
    running.wait()
    with open(lock) as held:
        while time.monotonic() < deadline:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                time.sleep(0.2)
            else:
                return
    pytest.fail("a worker still holds its folder")
