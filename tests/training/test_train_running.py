"""What a long run needs: stop and go on, memory that runs out, held-out loss, launch files, compilation."""

import json
import os
import signal
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DistributedType
from conftest import ROOT
from tiny_families import model_of
from training_example import MIXED, SGD, assert_same, fake_dataset, losses_of, stopped_after, stored
from warm import Started

from distill.config.recipe import load_recipe
from distill.config.training import Train
from distill.data.batches import TokenRows
from distill.errors import RunError, UserError
from distill.storage import read_json
from distill.training import train as train_module
from distill.training.arms import train_arms
from distill.training.checkpoint import BEST, latest_state
from distill.training.open_teachers import teacher_dtype
from distill.training.sources import Lot, StoredRows
from distill.training.step import StudentStep
from distill.training.train import MicroBatches

PLAIN = "control.enabled=false"


def metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "student" / "metrics.jsonl").read_text().splitlines()]


def test_sigterm_saves_after_the_step_and_the_same_command_goes_on(trained, make_recipe, capsys):
    options = [PLAIN, "train.steps=80", "train.checkpoint_every=0", "train.batch_size=4"]
    path, run_dir = make_recipe(name="told")
    fake_dataset(run_dir)
    process = Started(["train", path, *options])
    log = run_dir / "student" / "metrics.jsonl"
    while process.poll() is None and not (log.is_file() and log.read_text().count("\n") >= 5):
        time.sleep(0.05)
    process.kill(signal.SIGTERM)
    assert process.wait(120) == 143, process.errors
    errors = process.errors
    assert "stopped by SIGTERM after step" in errors and "state saved" in errors and "Traceback" not in errors
    (state,) = (run_dir / "student").glob("state-*")
    assert int(state.name.partition("-")[2]) == log.read_text().count("\n") >= 5
    first, rest = log.read_text().split("\n", 1)
    log.write_text(first.replace('"seconds": ', '"seconds": 1', 1) + "\n" + rest)
    capsys.readouterr()
    whole, _ = trained("whole", *options)
    assert "is not as training wrote it" not in capsys.readouterr().err
    resumed, _ = trained("told", *options)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert "is not as training wrote it" in capsys.readouterr().err, "the state knows the lines of its log"


def out_of_memory(monkeypatch, most_rows: int) -> list[int]:
    """From now on a forward pass of more rows than this fails as a GPU does; returns the sizes tried."""
    real, tried = StudentStep.forward, []

    def forward(self, batch, signals):
        tried.append(len(batch.row_tokens))
        if tried[-1] > most_rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB. GPU 0 is full.")
        return real(self, batch, signals)

    monkeypatch.setattr(StudentStep, "forward", forward)
    return tried


def test_out_of_memory_says_what_to_halve(trained, monkeypatch):
    out_of_memory(monkeypatch, 3)
    with pytest.raises(RunError) as found:
        trained("small", PLAIN, "train.micro_batch_size=6")
    text = str(found.value)
    assert (
        "out of memory at 6 rows a pass (CUDA out of memory)" in text and "train.micro_batch_size=3" in text
    )
    assert "gradient_checkpointing=true" in text and "\n" not in text


def test_micro_batches_halve_until_they_fit_and_change_nothing(trained, monkeypatch):
    whole, _ = trained("whole", *SGD, MIXED, "train.micro_batch_size=6")
    tried = out_of_memory(monkeypatch, 2)
    halved, run_dir = trained(
        "halved", *SGD, MIXED, "train.micro_batch_size=6", "train.auto_micro_batch=true"
    )
    assert_same(whole, halved, 2e-6)
    assert tried[:2] == [6, 3] and max(tried[2:]) <= 2 and tried.count(6) == 1, "found once, kept"
    assert read_json(run_dir / "student" / "manifest.json")["counts"]["micro_batch_size"] == 1


def test_what_a_failed_pass_left_behind_is_dropped(trained, monkeypatch):
    """The second piece of a step fails once, when the first has gradients already: they must not count twice."""
    whole, _ = trained("whole", *SGD, MIXED, "train.micro_batch_size=3")
    real, sizes = StudentStep.forward, []

    def forward(self, batch, signals):
        sizes.append(len(batch.row_tokens))
        if len(sizes) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(self, batch, signals)

    monkeypatch.setattr(StudentStep, "forward", forward)
    again, _ = trained("again", *SGD, MIXED, "train.micro_batch_size=3", "train.auto_micro_batch=true")
    assert sizes[:8] == [3, 3, 1, 1, 1, 1, 1, 1]
    assert_same(whole, again, 2e-6)


def test_what_a_failed_pass_counted_for_the_experts_is_dropped():
    """Every try begins without counts and without gradients."""
    called = []
    one = SimpleNamespace(states=(), ready=lambda batch, _device: batch)
    train = SimpleNamespace(auto_micro_batch=True, objectives=[0], micro_batch_tokens=None, packing=False)
    accelerator = SimpleNamespace(
        num_processes=1, device="cpu", reduce=None, no_sync=lambda _: nullcontext(), backward=lambda _: None
    )
    micro = MicroBatches.__new__(MicroBatches)
    micro.train, micro.pad_id, micro.accelerator, micro.step = train, 0, accelerator, one
    micro.size, micro.saved_bytes, micro._made = 4, 77, None

    def forward(_model, batch, _signals):
        called.append(len(batch.row_tokens))
        if called.count(4) + called.count(3) == 2 and 2 not in called:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return torch.zeros(()), torch.zeros(1)

    micro._forward = forward
    optimizer = SimpleNamespace(zero_grad=lambda **_: called.append("gradients"))
    balancer = SimpleNamespace(forget=lambda: called.append("counts"), mask=None)
    lot = Lot(stored(7), np.arange(7), 10, 0)
    micro.accumulate(None, optimizer, lot, None, balancer)
    assert (micro.size, micro.saved_bytes) == (2, None)
    assert called[:1] == ["counts"] and sorted(called[1:3]) == [3, 4]
    assert called[3:5] == ["gradients", "counts"] and sorted(called[5:]) == [1, 2, 2, 2]


def test_what_has_no_room_ahead_is_made_in_its_own_step():
    """On a device whose memory is full at that moment; on a CPU nothing is made ahead at all."""
    micro = MicroBatches.__new__(MicroBatches)
    micro.train, micro.size = SimpleNamespace(micro_batch_tokens=None, packing=False, steps=9), 2
    micro._next, micro._made, made = None, None, []

    def batch(_rows, indices):
        made.append(len(indices))
        if len(made) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return "batch"

    micro._batch, source = batch, StoredRows(stored(12), 5, 0)
    for kind, tried in (("cpu", []), ("cuda", [2])):
        micro.accelerator = SimpleNamespace(device=torch.device(kind), process_index=0, num_processes=1)
        micro.look_ahead(source, 3)
        assert made == tried and micro._made is None
    assert micro.lot(source, 3).share.tolist() == source.lot(3).share.tolist()
    micro.look_ahead(source, 4)
    assert micro._made == "batch" and micro.lot(source, 4) is micro._next[1]
    micro.look_ahead(source, 9)  # behind the last one
    assert made == [2, 2]


@pytest.mark.parametrize("most_tokens, most", [(None, 4), (20, 6)])
def test_a_process_with_less_to_do_makes_up_the_numbers(most_tokens, most):
    """By the lengths of everyone's rows: seven of other processes, one of them with much longer ones."""
    rows = TokenRows([[5] * 4] * 4, [[6, 1]] * 4)
    micro = MicroBatches.__new__(MicroBatches)
    micro.train, micro.size = SimpleNamespace(micro_batch_tokens=most_tokens, packing=False), 2
    lot = Lot(rows, np.arange(4), 8, 24, [rows.lengths, np.array([6] * 7), np.array([30] * 6)])
    pieces = micro._pieces(lot)
    assert [weight for _, weight in pieces] == [1.0] * 2 + [0.0] * (most - 2)
    assert np.concatenate([indices for indices, _ in pieces[:2]]).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "option", ["train.packing=true", "train.micro_batch_tokens=40", "train.gradient_checkpointing=true"]
)
def test_how_a_step_is_computed_does_not_change_it(trained, option):
    whole, run_dir = trained("whole", *SGD, MIXED, student="qwen3_moe")
    other, other_dir = trained("other", *SGD, MIXED, option, student="qwen3_moe")
    assert_same(whole, other, 5e-6)
    assert losses_of(run_dir) == pytest.approx(losses_of(other_dir), abs=5e-6)


@pytest.mark.slow
def test_compiled_layers_train_the_same(trained, monkeypatch):
    """Traced forwards and backwards as in a real run; the graphs run eagerly, since C++ takes a minute to compile."""
    real = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **how: real(self, backend="aot_eager", **how)
    )
    whole, _ = trained("whole", *SGD, "train.steps=2")
    compiled, _ = trained("compiled", *SGD, "train.steps=2", "train.compile=true")
    assert_same(whole, compiled, 1e-5)


def test_auto_compiles_where_the_training_foreseen_repays_it(trained, monkeypatch, capsys):
    """By a count and not by a clock: a repeated run chooses alike. What is chosen is said, and kept in the manifest."""
    asked = []
    monkeypatch.setattr(train_module, "compile_layers", lambda *models: asked.append(len(models)))
    compiled = {}
    for name, least, more, words in (
        ("short", 30, (), "compile: auto is off: 0 minutes of training are foreseen, and it repays from 30 on"),
        ("long", 0, (), "compile: auto is on: 0 minutes of training are foreseen, and it repays from 0 on"),
        ("own", 0, ("train.on_policy={fraction: 1.0, max_new_tokens: 4}", "train.objectives=[{name: reverse_kl}]"),
         "compile: auto is off: text is written between the steps, by plain code"),
    ):  # fmt: skip
        monkeypatch.setattr(train_module, "_LEAST_MINUTES", least)
        _, run_dir = trained(name, *SGD, "train.steps=2", "train.compile=auto", *more)
        assert words in capsys.readouterr().out
        compiled[name] = read_json(run_dir / "student" / "manifest.json")["counts"]["compiled"]
    assert compiled == {"short": False, "long": True, "own": False} and asked == [1]


def test_auto_compiles_no_mixture_and_nothing_on_other_devices():
    asked = SimpleNamespace(train=Train(compile="auto", steps=10**9))
    asked.model_copy = lambda update: SimpleNamespace(**update)
    dense, mixture = (SimpleNamespace(model=model_of(family)) for family in ("llama", "qwen3_moe"))
    cpu, gpu = (
        SimpleNamespace(
            device=torch.device(kind), num_processes=1, mixed_precision="no", is_main_process=True
        )
        for kind in ("cpu", "cuda")
    )
    teacher = SimpleNamespace(models=[mixture.model])
    for student, other, where, on in (
        (dense, None, cpu, True), (mixture, None, cpu, False), (dense, teacher, cpu, False), (dense, None, gpu, False),
    ):  # fmt: skip
        said = []
        chosen = train_module.compilation(asked, 1e9, student, other, where, said.append)
        assert chosen.train.compile is on
        assert said[0].startswith(f"compile: auto is {'on' if on else 'off'}: ")
    train_module.compilation(asked, 7e10 * torch.get_num_threads(), dense, None, cpu, said.append)
    assert f"{10**9 * asked.train.batch_size / 60:.0f} minutes" in said[-1]
    for plain in (True, False):
        asked.train = asked.train.model_copy(update={"compile": plain})
        assert train_module.compilation(asked, 1e9, mixture, None, gpu, None) is asked


def test_held_out_rows_are_looked_at_and_never_trained_on(trained):
    section = "train.validation={rows: 10, every: 2}"
    _, run_dir = trained("held", PLAIN, section, "train.steps=8", "train.batch_size=30")
    seen = [line.get("validation") for line in metrics(run_dir)]
    assert [v is not None for v in seen] == [False, True] * 4
    manifest = read_json(run_dir / "student" / "manifest.json")
    assert manifest["counts"]["validation"]["best"] == pytest.approx(min(v for v in seen if v), abs=1e-9)
    # 30 rows are left, and a step of 30 rows is an epoch of them: all steps train the same tokens.
    assert len({line["tokens"] for line in metrics(run_dir)}) == 1


def test_the_held_out_loss_is_the_training_loss_of_those_rows(trained, hub):
    """Before any step moves the weights (rate ~ 0), the mean over held-out tokens by hand."""
    import numpy as np

    from distill.data.batches import TokenRows
    from distill.models.load import load_model
    from distill.training import losses
    from distill.training.log import split_rows

    options = [
        "train.learning_rate=1e-12",
        "train.validation={rows: 7, every: 1}",
        "train.micro_batch_size=2",
        PLAIN,
    ]
    _, run_dir = trained("still", *options)
    recipe = load_recipe(str(run_dir.with_suffix(".yaml")), options)
    _, held = split_rows(TokenRows.from_folder(run_dir / "dataset"), recipe.train.validation, recipe.seed)
    batch = held.collate(np.arange(7), 0)
    with torch.no_grad():
        logits = load_model(hub["llama"], "fp32")(**batch.inputs()).logits[batch.keep]
    expected = losses.cross_entropy(logits, batch.targets).mean().item()
    assert metrics(run_dir)[0]["validation"] == pytest.approx(expected, abs=1e-5)


def test_patience_ends_training_and_the_best_weights_are_kept(trained):
    # A rate that destroys the weights: the first look is the best one.
    wild = ["train.learning_rate=0.5", "train.steps=40", "train.warmup_steps=0", "train.max_grad_norm=100"]
    section = "train.validation={rows: 10, every: 1, patience: 3, keep_best: true}"
    best, run_dir = trained("patient", PLAIN, *wild, section, "train.schedule=constant")
    lines = metrics(run_dir)
    values = [line["validation"] for line in lines]
    assert len(lines) < 40 and min(values) not in values[-3:]
    counts = read_json(run_dir / "student" / "manifest.json")["counts"]
    assert counts["steps"] == len(lines) and counts["validation"]["best"] == min(values)
    assert not (run_dir / "student" / BEST).exists()
    stop = [*wild, "train.schedule=constant", "train.validation={rows: 10, every: 1}"]
    steps = counts["validation"]["best_step"]
    same, _ = trained("short", PLAIN, *stop, f"train.steps={steps}")
    assert all(torch.equal(best[name], same[name]) for name in best)


def test_so_many_states_are_kept(trained, make_recipe, monkeypatch):
    # Two micro-batches a step: in the middle of step 4.
    stopped_after(7, monkeypatch, lambda: trained("kept", PLAIN, "train.keep_states=2"))
    _, run_dir = make_recipe(name="kept")
    assert [p.name for p in sorted((run_dir / "student").glob("state-*"))] == [
        "state-0000002",
        "state-0000003",
    ]
    assert latest_state(run_dir / "student").name == "state-0000003", "the one that a resume takes"


LAUNCHES = {"cpu", "cpu2", "ddp", "fsdp2", "gpu", "multinode"}


def test_every_launch_file_is_what_accelerate_reads():
    from accelerate.commands.config.config_args import load_config_from_file

    files = sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))
    assert {f.stem for f in files} == LAUNCHES
    for file in files:
        config = load_config_from_file(str(file))
        raw = yaml.safe_load(file.read_text())
        assert (
            config.num_processes == raw["num_processes"]
            and config.distributed_type.value == raw["distributed_type"]
        )
        assert f"recipes/accelerate/{file.name}" in file.read_text(), "the file says how to launch it"
        assert (config.fsdp_config or {}).get("fsdp_version") == (2 if file.stem == "fsdp2" else None)


def test_sharding_is_refused_where_accelerate_would_not_shard(make_recipe, monkeypatch):
    path, run_dir = make_recipe()
    fake_dataset(run_dir)
    monkeypatch.setitem(os.environ, "ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="asks for FSDP and Accelerate would run NO instead"):
        train_arms(load_recipe(path, [PLAIN]))


def test_deepspeed_is_refused_before_anything_is_loaded(make_recipe, monkeypatch):
    """A step of its engine for every micro-batch would be another training than the recipe's."""
    path, run_dir = make_recipe()
    fake_dataset(run_dir)
    monkeypatch.setattr(Accelerator, "distributed_type", property(lambda _self: DistributedType.DEEPSPEED))
    with pytest.raises(UserError, match=r"recipes/accelerate/fsdp2\.yaml, which shards the same things"):
        train_arms(load_recipe(path, [PLAIN]))


@pytest.mark.parametrize("student", ["llama", "qwen3_moe"])
def test_held_out_loss_is_cross_entropy_whatever_the_objectives(make_recipe, student):
    """The same weights give the same held-out loss under any objectives and any weight of a penalty."""
    found, totals = [], []
    kinds = [
        "{name: cross_entropy}",
        "{name: cross_entropy, weight: 3.0}, {name: forward_kl, weight: 2.0}",
        "{name: reverse_kl}",
    ]
    if student == "qwen3_moe":
        kinds = [
            "{name: cross_entropy}",
            *(f"{{name: cross_entropy}}, {{name: batch_balance, weight: {w}}}" for w in (0.1, 9.0)),
        ]
    for i, kind in enumerate(kinds):
        path, run_dir = make_recipe(student=student, name=f"held-{i}")
        fake_dataset(run_dir)
        options = [
            "train.learning_rate=1e-12",
            "train.steps=1",
            "train.warmup_steps=0",
            "control.enabled=false",
        ]
        options += ["train.validation={rows: 7, every: 1}", f"train.objectives=[{kind}]"]
        train_arms(load_recipe(path, options))
        (line,) = metrics(run_dir)
        found.append(line["validation"])
        totals.append(line["validation_objective"])
    assert found == pytest.approx([found[0]] * len(kinds), abs=1e-6)
    assert totals[0] == pytest.approx(found[0], abs=1e-6) and abs(totals[1] - totals[0]) > 1e-3


def test_a_finished_arm_that_kept_its_best_weights_is_not_trained_again(trained):
    _, run_dir = trained("kept", PLAIN, "train.validation={rows: 10, every: 1, keep_best: true}")
    before = (run_dir / "student" / "manifest.json").read_bytes()
    assert "best.safetensors" not in read_json(run_dir / "student" / "manifest.json")["files"]
    trained("kept", PLAIN, "train.validation={rows: 10, every: 1, keep_best: true}")
    assert (run_dir / "student" / "manifest.json").read_bytes() == before


def test_a_teacher_in_float32_computes_as_the_student_does_on_a_gpu():
    gpu, cpu, half = torch.device("cuda"), torch.device("cpu"), torch.bfloat16
    assert teacher_dtype("auto", gpu, half, torch.float32) == half
    assert teacher_dtype("fp32", gpu, half, torch.float32) == torch.float32  # asked for
    assert teacher_dtype("auto", gpu, None, torch.float32) == torch.float32  # the student trains in float32
    assert teacher_dtype("auto", cpu, half, torch.float32) == torch.float32
    assert teacher_dtype("auto", gpu, torch.float16, half) == half  # stored narrower: as stored


def test_the_manifest_says_what_the_teacher_computes_in(trained):
    _, run_dir = trained("stated", "train.objectives=[{name: forward_kl}]", "train.steps=2")
    assert read_json(run_dir / "student" / "manifest.json")["precision"]["teacher"] == ["float32"]


def test_deterministic_kernels_and_tf32_hold_for_the_training_alone(trained, monkeypatch):
    seen = []
    real = StudentStep.forward

    def looks(*args, **named):
        seen.append((torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()))
        return real(*args, **named)

    monkeypatch.setattr(StudentStep, "forward", looks)
    before = torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()
    trained("exact", "train.deterministic=true", "train.tf32=true", "train.steps=2", "control.enabled=false")
    assert set(seen) == {(True, "high")}
    assert before == (torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision())
