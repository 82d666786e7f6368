"""Every launch file, with what it trains, as a user starts it: any number of processes gives the weights of one.

Slow: `pytest -m slow tests/launches/test_matrix.py`. SGD and ragged lengths, seven rows a step, which no number of
processes divides. One launch a file and number of processes does all of it, command by command (tests/many_launch.py);
a run that is killed has a launch of its own. FSDP2 runs over gloo by tests/fsdp_launch.py, since Accelerate shards on
accelerators only.
"""

import json
import os
import socket
import subprocess
from pathlib import Path

import pytest
from conftest import CHATML, PYTHON, RECIPE, ROOT, byte_tokenizer, save_model
from launching import CPU2, ENVIRONMENT, processes_of
from safetensors.torch import load_file
from training_example import MIXED, SGD, assert_same, fake_dataset

pytestmark = pytest.mark.slow
FILES = {p.stem: p for p in sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))}
LAUNCH = [PYTHON, "-m", "accelerate.commands.launch", "--config_file"]
MIXTURE = {
    "model_type": "deepseek_v3", "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip
FULL = "student.adapter=full"
WHAT = {
    "lora": ["student.adapter=lora", MIXED],
    "full": [FULL, MIXED],
    "tied": [FULL, MIXED],
    "ahead": [FULL, "train.objectives=[{name: cross_entropy}, {name: multi_token, weight: 0.3}]"],
    "ahead_alone": [FULL, "train.objectives=[{name: multi_token, frozen: true, target: model}]"],
    "mixture": [
        FULL, "train.expert_bias_step=0.01", "train.expert_bias_freeze=0",
        "train.objectives=[{name: cross_entropy}, {name: batch_balance, weight: 0.1}]",
    ],
    # Who writes what is decided in tokens: a step large enough to part texts is no test.
    "on_policy": [
        FULL, "train.on_policy={fraction: 0.5, max_new_tokens: 6}", "train.objectives=[{name: reverse_kl}]",
        "train.learning_rate=0.01",
    ],
    # From the first stage to the last: answers, signals, filter, student, evaluation, report.
    "stored": [FULL, "generate.signal={kind: top_k, k: 8}", "train.objectives=[{name: sparse_forward_kl}]"],
    "hidden": [FULL, "generate.signal={kind: hidden}", "train.objectives=[{name: forward_kl}]"],
}  # fmt: skip
WHOLE_RUNS = {"stored", "hidden"}
SHARDED = ("lora", "full", "tied", "mixture", *sorted(WHOLE_RUNS))  # the others are refused under FSDP2
# Killed in this launch, finished in that one.
RESUMED = {
    ("ddp 2", "alone"),
    ("alone", "ddp 3"),
    ("ddp 3", "ddp 2"),
    ("fsdp2 2", "alone"),
    ("ddp 2", "fsdp2 3"),
}
OF = {"alone": ("cpu2", 1), "ddp 2": ("cpu2", 2), "ddp 3": ("cpu2", 3), "fsdp2 2": ("fsdp2", 2),
      "fsdp2 3": ("fsdp2", 3)}  # fmt: skip


def started(words: list[str], **more: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", **more}
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)


def command(file: str, processes: int) -> list[str]:
    """The words before a script."""
    if processes == 1:
        return [PYTHON]
    config = CPU2 if file == "cpu2" else str(FILES[file])
    return [*LAUNCH, config, "--num_processes", str(processes)]


class Matrix:
    """`student(group, what)`: the finished folder; a group is launched when it is first asked for."""

    def __init__(self, root: Path, hub: dict):
        self.root, self.hub, self.done = root, hub, set()
        tied = {"model_type": "qwen3", "tie_word_embeddings": True, "head_dim": 8}
        made = {"mixture": MIXTURE, "tied": tied}
        self.students = {n: save_model(root / n, c, byte_tokenizer(CHATML), seed=5) for n, c in made.items()}

    def words(self, group: str, what: str, options: list[str]) -> list[str]:
        """One command, with what it reads laid ready."""
        run_dir = self.root / group / what
        path = Path(f"{run_dir}.yaml")
        teacher, student = self.hub["qwen3_moe"], self.students.get(what, self.hub["llama"])
        if not path.is_file():
            path.parent.mkdir(exist_ok=True)
            path.write_text(RECIPE.format(run_dir=run_dir, teacher=teacher, student=student))
            if what not in WHOLE_RUNS:
                fake_dataset(run_dir)
        shape = ["train.batch_size=7", "train.micro_batch_size=2"]
        return ["run" if what in WHOLE_RUNS else "train", str(path), *SGD, *shape, *options]

    def student(self, group: str, what: str) -> Path:
        if group not in self.done:
            file, processes = OF[group]
            names = [w for w in WHAT if file != "fsdp2" or w in SHARDED]
            commands = [self.words(group, name, WHAT[name]) for name in names]
            commands += [self.killed(*pair) for pair in sorted(RESUMED) if pair[1] == group]
            path = self.root / f"{group}.json"
            path.write_text(json.dumps(commands))
            done = started([*command(file, processes), str(ROOT / "tests" / "many_launch.py"), str(path)])
            assert done.returncode == 0, done.stderr[-3000:]
            self.done.add(group)
        return self.root / group / what / "student"

    def killed(self, first: str, then: str) -> list[str]:
        """A run that the process which writes has left in its third step; returns the command that goes on."""
        words = self.words("resumed", f"{first} then {then}", WHAT["full"])
        script = str(ROOT / "tests" / "stopping_launch.py")
        started([*command(*OF[first]), script, *words], DISTILL_TEST_STOP_AFTER="2")
        assert (self.root / "resumed" / f"{first} then {then}" / "student" / "state-0000002").is_dir()
        return words


@pytest.fixture(scope="module")
def matrix(tmp_path_factory, hub):
    return Matrix(tmp_path_factory.mktemp("matrix"), hub)


def weights(folder: Path) -> dict:
    """Of all files: a module for a token ahead lies beside the model."""
    return {(p.name, name): t for p in folder.glob("*.safetensors") for name, t in load_file(p).items()}


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("how, what", [("ddp", w) for w in WHAT] + [("fsdp2", w) for w in SHARDED])
def test_the_weights_of_one_process(matrix, how, what, processes):
    one, many = matrix.student("alone", what), matrix.student(f"{how} {processes}", what)
    assert processes_of(one) == 1 and processes_of(many) == processes
    assert_same(weights(one), weights(many), 1e-6)
    if what in WHOLE_RUNS:
        assert processes_of(many.parent / "eval") == processes and (many.parent / "report.html").is_file()


@pytest.mark.parametrize("first, then", sorted(RESUMED))
def test_a_run_goes_on_with_another_number_of_processes(matrix, first, then):
    """Killed after its second step with one number, finished with another: an undisturbed run's weights."""
    whole = matrix.student("alone", "full")
    matrix.student(then, "full")
    resumed = matrix.root / "resumed" / f"{first} then {then}" / "student"
    assert processes_of(resumed) == OF[then][1]
    assert_same(weights(whole), weights(resumed), 1e-6)


@pytest.mark.parametrize("name", ["cpu", "gpu", "ddp", "multinode"])
def test_a_launch_file_as_it_stands_trains_on_a_cpu(make_recipe, name):
    """The file itself, but for the number of machines: without a GPU its processes find themselves on the CPU."""
    path, run_dir = make_recipe()
    fake_dataset(run_dir)
    launch = [*LAUNCH, str(FILES[name])]
    if name == "multinode":
        launch += ["--num_machines", "1", "--num_processes", "2", "--main_process_ip", "127.0.0.1"]
    done = started([*launch, "-m", "distill", "train", path, *SGD, MIXED])
    assert done.returncode == 0, done.stderr[-3000:]
    assert processes_of(run_dir / "student") == {"cpu": 1, "gpu": 1, "ddp": 2, "multinode": 2}[name]


def test_two_machines_are_one_launch(matrix, tmp_path):
    """Two launchers, as on two machines that share a folder, with the file for them: the weights of one process."""
    run_dir, path = tmp_path / "two", tmp_path / "two.yaml"
    path.write_text(
        RECIPE.format(run_dir=run_dir, teacher=matrix.hub["qwen3_moe"], student=matrix.hub["llama"])
    )
    fake_dataset(run_dir)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["-m", "distill", "train", str(path), *SGD, "train.batch_size=7", "train.micro_batch_size=2"]
    place = ["--num_processes", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", str(port)]
    launch = [*LAUNCH, str(FILES["multinode"]), *place, "--machine_rank"]
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    machines = [
        subprocess.Popen(
            [*launch, rank, *words, *WHAT["full"]], cwd=ROOT, env=environment, stderr=subprocess.PIPE
        )
        for rank in ("0", "1")
    ]
    errors = [machine.communicate(timeout=1800)[1].decode()[-2000:] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], errors
    assert processes_of(run_dir / "student") == 2
    assert_same(weights(matrix.student("alone", "full")), weights(run_dir / "student"), 1e-6)


def test_every_file_is_launched_by_something():
    assert FILES.keys() == {"cpu", "cpu2", "ddp", "fsdp2", "gpu", "multinode"}
