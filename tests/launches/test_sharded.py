"""FSDP2 over gloo: the fused head inside a sharded student, and its state on disk, equal one process."""

import os
import subprocess

from conftest import PYTHON, ROOT
from safetensors.torch import load_file
from training_example import assert_same

WORKER = str(ROOT / "tests" / "fsdp_worker.py")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}


def test_two_sharded_processes_equal_one(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
    launch = [PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for command in ([PYTHON, WORKER, str(one), "1"], [*launch, WORKER, str(two), "2"]):
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]
    assert_same(load_file(one / "final.safetensors"), load_file(two / "final.safetensors"), 1e-6)
    # What was saved is whole, so another number of processes can go on from it.
    saved = [load_file(folder / "state-0000002" / "tensors.safetensors") for folder in (one, two)]
    assert {n: t.shape for n, t in saved[0].items()} == {n: t.shape for n, t in saved[1].items()}
    assert any(name.startswith("optimizer.momentum_buffer") for name in saved[0])
