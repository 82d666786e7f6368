"""FSDP2 over gloo: the fused head inside a sharded student, and its state on disk, equal one process."""

import os
import subprocess

import pytest
import torch
import torch.distributed as dist
from conftest import PYTHON, ROOT
from launching import forked, processes_of
from safetensors.torch import load_file
from step_example import build
from torch.distributed.fsdp import fully_shard
from training_example import MIXED, SGD, assert_same, fake_dataset, losses_of

from distill.models.layers import decoder_layers
from distill.training.checkpoint import whole_state_dict

FSDP2 = str(ROOT / "recipes" / "accelerate" / "fsdp2.yaml")
SHARDED = [PYTHON, "-m", "accelerate.commands.launch", "--config_file", FSDP2]
SHARDED += [str(ROOT / "tests" / "fsdp_launch.py"), "train"]
WORKER = str(ROOT / "tests" / "fsdp_worker.py")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}


@pytest.mark.slow
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


def sharded(path: str, *options: str) -> subprocess.CompletedProcess:
    """`distill train` in two processes under Accelerate's FSDP2."""
    words = [*SHARDED, path, *options]
    return subprocess.run(words, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=240)


@pytest.mark.slow
def test_in_16_bits_only_products_are(make_recipe, trained):
    """Losses and sums of gradients stay float32: Accelerate's own policy logs multiples of 1/32 instead."""
    options = [*SGD, MIXED, "student.adapter=full", "train.precision=bf16"]
    _, one = trained("one", *options)
    path, two = make_recipe(name="two")
    fake_dataset(two)
    done = sharded(path, *options)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = losses_of(two)
    assert losses == pytest.approx(losses_of(one), rel=2e-3)
    assert any(float(torch.tensor(x).bfloat16()) != float(torch.tensor(x)) for x in losses)


def test_a_weight_of_two_names_is_saved_once(tmp_path):
    """Gathered apart, a tied head would be a second matrix of V x d in the student's folder."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        model = build("qwen3 tied")
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        for layer in decoder_layers(model)[1]:
            fully_shard(layer)
        whole = whole_state_dict(fully_shard(model))
        assert whole["lm_head.weight"] is whole["model.embed_tokens.weight"]
        model.save_pretrained(tmp_path / "student", state_dict=whole)
    finally:
        dist.destroy_process_group()
    saved = load_file(tmp_path / "student" / "model.safetensors")
    assert saved.keys() == before.keys() - {"lm_head.weight"}
    assert all(torch.equal(saved[name], before[name]) for name in saved)


@pytest.mark.slow
def test_a_sharded_adapter_cannot_be_asked_without_itself(make_recipe):
    path, run_dir = make_recipe()
    fake_dataset(run_dir)
    done = sharded(path, *SGD, "train.teachers={own_start: true}", "train.objectives=[{name: forward_kl}]")
    assert done.returncode != 0 and "own_start: the starting weights of a sharded LoRA" in done.stderr


@pytest.mark.parametrize("adapter", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_the_command_trains_a_sharded_student_to_the_same_weights(make_recipe, adapter):
    """The whole loop under Accelerate's FSDP2: ragged rows, uneven micro-batches, a live teacher."""
    options = [*SGD, MIXED, f"student.adapter={adapter}", "train.batch_size=7", "train.micro_batch_size=2"]
    weights = {}
    for name in ("one", "two"):
        path, run_dir = make_recipe(name=name)
        fake_dataset(run_dir)
        if name == "one":
            forked(["train", path, *options])
        elif adapter == "lora":  # what the file says, in forks
            forked(["train", path, *options], 2, ROOT / "tests" / "fsdp_launch.py", FSDP2)
        else:  # by the launch file, as a user starts it
            done = sharded(path, *options)
            assert done.returncode == 0, done.stderr[-3000:]
        weights[name] = load_file(next((run_dir / "student").glob("*.safetensors")))
        assert processes_of(run_dir / "student") == {"one": 1, "two": 2}[name]
    assert_same(weights["one"], weights["two"], 1e-6)
