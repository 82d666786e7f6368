"""An evaluation by two processes, and three under `accelerate launch`: the metrics of one, to the last bit."""

import json
import re
from functools import partial

import pytest
from launching import LAUNCH, forked, processes_of, run

from distill.storage import hash_file, parts, read_json

TIMES = re.compile(r"seconds|per_second|usd_per")


def untimed(value):
    """JSON without what a clock says."""
    if isinstance(value, dict):
        return {key: untimed(item) for key, item in value.items() if not TIMES.search(key)}
    return [untimed(item) for item in value] if isinstance(value, list) else value


def evaluated(tmp_path, hub, name: str, start):
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": f"document {i} " * (i + 1)}) for i in range(9)) + "\n")
    out = tmp_path / name
    options = ["--tasks", "easy", "medium", "--problems", "70", "--max-new-tokens", "12", "--top-k", "1"]
    options += ["--text", str(text), "--precision", "bf16", "--teacher", hub["qwen3_moe"], "--out", str(out)]
    start(["evaluate", hub["llama"], *options])
    return out


@pytest.mark.slow
def test_more_processes_than_rows(tmp_path, hub, make_recipe):
    """One problem and one part for three processes: two of them have nothing, and nobody waits for ever."""
    found = {}
    for processes in (1, 3):
        out = tmp_path / f"eval {processes}"
        options = [
            "--tasks",
            "easy",
            "--problems",
            "1",
            "--max-new-tokens",
            "6",
            "--teacher",
            hub["qwen3_moe"],
        ]
        forked(["evaluate", hub["llama"], *options, "--out", str(out)], processes)
        path, run_dir = make_recipe(name=f"run {processes}")
        forked(["generate", path, "generate.part_size=100", "generate.signal={kind: top_k, k: 4}"], processes)
        generations = run_dir / "generations"
        assert processes_of(out) == processes_of(generations) == processes
        found[processes] = (
            untimed(read_json(out / "metrics.json")),
            [hash_file(p) for p in parts(generations)],
        )
    assert found[1] == found[3]


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_processes_evaluate_to_the_same_metrics(tmp_path, hub, processes):
    launch = [*LAUNCH[:-2], "--num_processes", str(processes), *LAUNCH[-2:]]
    one = evaluated(tmp_path, hub, "one", forked)
    several = partial(forked, processes=2) if processes == 2 else lambda words: run([*launch, *words])
    many = evaluated(tmp_path, hub, "many", several)
    assert processes_of(one) == 1 and processes_of(many) == processes
    alone, together = (untimed(read_json(out / "metrics.json")) for out in (one, many))
    assert alone == together
    teacher = alone["models"]["teacher"]
    assert teacher["moe"]["layers"] and alone["models"]["llama"]["fidelity"]["own_text"]["tokens"]
    assert len(teacher["interventions"]) == 2 and teacher["text"]["text.jsonl"]["tokens"]
    files = sorted(p.relative_to(one) for p in one.rglob("*.parquet"))
    assert len(files) == 3 and all(hash_file(one / f) == hash_file(many / f) for f in files)
    assert (many / "report.html").is_file() == (one / "report.html").is_file()
