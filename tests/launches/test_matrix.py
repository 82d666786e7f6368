"""Every launch file, with what it trains, as a user starts it: any number of processes gives the weights of one.

Slow: `pytest -m slow tests/launches`. SGD and ragged lengths, seven rows a step, which no number of processes divides.
FSDP2 runs over gloo by tests/fsdp_launch.py, since Accelerate shards on accelerators only.
"""

import os
import subprocess

import pytest
from conftest import CHATML, PYTHON, ROOT, byte_tokenizer, save_model
from launching import CPU2, ENVIRONMENT, processes_of
from safetensors.torch import load_file
from training_example import MIXED, SGD, assert_same, fake_dataset

pytestmark = pytest.mark.slow
FILES = {p.stem: p for p in sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))}
SHARDED = [PYTHON, "-m", "torch.distributed.run", "--standalone"]
ONE = [PYTHON, "-m", "distill"]
MIXTURE = {
    "model_type": "deepseek_v3", "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip
WHAT = {
    "lora": ["student.adapter=lora", MIXED],
    "full": ["student.adapter=full", MIXED],
    "mixture": [
        "student.adapter=full", "train.expert_bias_step=0.01", "train.expert_bias_freeze=0",
        "train.objectives=[{name: cross_entropy}, {name: batch_balance, weight: 0.1}]",
    ],
    "on_policy": [
        "student.adapter=full", "train.on_policy={fraction: 0.5, max_new_tokens: 6}",
        "train.objectives=[{name: reverse_kl}]",
    ],
}  # fmt: skip


def command(how: str, processes: int) -> list[str]:
    """The words before `train RECIPE`."""
    if processes == 1:
        return ONE
    if how == "fsdp2":
        return [*SHARDED, "--nproc_per_node", str(processes), str(ROOT / "tests" / "fsdp_launch.py")]
    launch = [PYTHON, "-m", "accelerate.commands.launch", "--config_file", CPU2]
    return [*launch, "--num_processes", str(processes), "-m", "distill"]


def started(words: list[str]) -> subprocess.CompletedProcess:
    environment = {**ENVIRONMENT, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize(
    "how, what",
    [("ddp", w) for w in WHAT] + [("fsdp2", w) for w in ("lora", "full", "mixture")],
)
def test_the_weights_of_one_process(make_recipe, tmp_path, how, what, processes):
    student = (
        save_model(tmp_path / "m", MIXTURE, byte_tokenizer(CHATML), seed=5) if what == "mixture" else "llama"
    )
    options = [*SGD, *WHAT[what], "train.batch_size=7", "train.micro_batch_size=2"]
    if (
        what == "on_policy"
    ):  # who writes what is decided in tokens: a step large enough to part texts is no test
        options += ["train.learning_rate=0.01"]
    weights = {}
    for count in (1, processes):
        path, run_dir = make_recipe(student=student, name=f"of-{count}")
        fake_dataset(run_dir)
        done = started([*command(how, count), "train", path, *options])
        assert done.returncode == 0, done.stderr[-3000:]
        assert processes_of(run_dir / "student") == count
        weights[count] = load_file(next((run_dir / "student").glob("*.safetensors")))
    assert_same(weights[1], weights[processes], 1e-5)


@pytest.mark.parametrize("first, then", [(2, 1), (1, 3), (3, 2)])
def test_a_run_goes_on_with_another_number_of_processes(make_recipe, first, then):
    """Stopped by SIGTERM after some step with one number, finished with another: an undisturbed run's weights."""
    options = [*SGD, MIXED, "student.adapter=full", "train.batch_size=7", "train.micro_batch_size=2"]
    path, whole = make_recipe(name="whole")
    fake_dataset(whole)
    assert started([*ONE, "train", path, *options]).returncode == 0
    path, run_dir = make_recipe(name="parts")
    fake_dataset(run_dir)
    # Killed in its third step, by the process that writes: the state of the second is there.
    stop = {**ENVIRONMENT, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "DISTILL_TEST_STOP_AFTER": "2"}
    words = [*command("ddp", first)[: -2 if first > 1 else None]]
    script = str(ROOT / "tests" / "stopping_launch.py")
    words = [PYTHON, script] if first == 1 else [*words, script]
    subprocess.run([*words, "train", path, *options], cwd=ROOT, env={**os.environ, **stop}, capture_output=True,
                   timeout=600)  # fmt: skip
    assert list((run_dir / "student").glob("state-0000002")), "it stopped where it was told to"
    done = started([*command("ddp", then), "train", path, *options])
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same(*(load_file(folder / "student" / "model.safetensors") for folder in (whole, run_dir)), 1e-5)


def test_stored_signals_on_three_processes(make_recipe):
    """Generated with top-k signals, filtered, and trained on: three processes from the first stage to the last."""
    options = ["generate.signal={kind: top_k, k: 8}", "train.objectives=[{name: sparse_forward_kl}]"]
    options += [*SGD, "student.adapter=full", "train.batch_size=7", "train.micro_batch_size=2"]
    weights = {}
    for count in (1, 3):
        path, run_dir = make_recipe(name=f"of-{count}", student="qwen3_moe")
        done = started([*command("ddp", count), "run", path, *options])
        assert done.returncode == 0, done.stderr[-3000:]
        weights[count] = load_file(run_dir / "student" / "model.safetensors")
        assert processes_of(run_dir / "eval") == count and (run_dir / "report.html").is_file()
    assert_same(weights[1], weights[3], 1e-5)


@pytest.mark.parametrize("name", ["cpu", "gpu", "ddp", "multinode"])
def test_a_launch_file_as_it_stands_trains_on_a_cpu(make_recipe, name):
    """The file itself, but for the number of machines: without a GPU its processes find themselves on the CPU."""
    path, run_dir = make_recipe()
    fake_dataset(run_dir)
    launch = [PYTHON, "-m", "accelerate.commands.launch", "--config_file", str(FILES[name])]
    if name == "multinode":
        launch += ["--num_machines", "1", "--num_processes", "2", "--main_process_ip", "127.0.0.1"]
    done = started([*launch, "-m", "distill", "train", path, *SGD, MIXED])
    assert done.returncode == 0, done.stderr[-3000:]
    assert processes_of(run_dir / "student") == {"cpu": 1, "gpu": 1, "ddp": 2, "multinode": 2}[name]


def test_every_file_is_launched_by_something():
    assert FILES.keys() == {"cpu", "cpu2", "ddp", "fsdp2", "gpu", "multinode"}
