"""Twenty random SIGKILLs over generate and twenty SIGKILLs and SIGTERMs over train change nothing at the end.

The children are forked from one warm process, so a kill lands in the work and not in twenty imports of torch.
"""

import os
import subprocess

import pytest
from conftest import PYTHON, ROOT

from distill.storage import hash_file, read_json, read_rows

FORKS = """
import os, random, signal, sys, time
import torch
torch.set_num_threads(1)
from distill.commands.cli import main
import distill.training.arms, distill.evaluation.evaluate, distill.data.filter, distill.data.generate
import peft, transformers.models.llama.modeling_llama
signals, kills, seed, command = sys.argv[1].split(","), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]
rng = random.Random(seed)

def child():
    pid = os.fork()
    if pid == 0:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1); os.dup2(null, 2)
        os._exit(main(command))
    return pid

landed = 0
while landed < kills:
    pid = child()
    time.sleep(rng.uniform(0.02, 0.5))
    done, status = os.waitpid(pid, os.WNOHANG)
    if done:
        assert os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0, status
        break
    os.kill(pid, getattr(signal, rng.choice(signals)))
    os.waitpid(pid, 0)
    landed += 1
pid = child()
_, status = os.waitpid(pid, 0)
assert os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0, status
print(landed)
"""


def survive(signals: str, kills: int, *command) -> int:
    done = subprocess.run(
        [PYTHON, "-c", FORKS, signals, str(kills), "1", *map(str, command)],
        cwd=ROOT, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return int(done.stdout.split()[-1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_twenty_random_kills(make_recipe, run_cli):
    slow = [
        "generate.part_size=1", "prompts.levels={easy: 250}", "generate.samples=2", "generate.max_new_tokens=24",
        "train.steps=400", "train.checkpoint_every=3", "control.enabled=false",
    ]  # fmt: skip
    path, whole = make_recipe(name="whole")
    for command in ("generate", "filter", "train"):
        assert run_cli(command, path, *slow)[0] == 0
    path, run = make_recipe(name="killed")
    landed = survive("SIGKILL", 20, "generate", path, *slow)
    assert landed == 20, f"only {landed} kills landed before the stage was done: make it longer"
    parts = {p.name: hash_file(p) for p in (whole / "generations").glob("part-*")}
    assert {p.name: hash_file(p) for p in (run / "generations").glob("part-*")} == parts
    rows = [(r["prompt_id"], r["sample_idx"]) for r in read_rows(run / "generations")]
    assert len(rows) == len(set(rows)) == 500
    assert not list((run / "generations").glob(".part-*")), "no half-written file is left"

    assert run_cli("filter", path, *slow)[0] == 0
    landed = survive("SIGKILL,SIGTERM", 20, "train", path, *slow)
    assert landed == 20, f"only {landed} kills landed before the stage was done: make it longer"
    weights = "student/adapter_model.safetensors"
    assert hash_file(run / weights) == hash_file(whole / weights)
    assert read_json(run / "student" / "manifest.json")["counts"]["steps"] == 400
