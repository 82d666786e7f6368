"""Kills and bad input: nothing lost, nothing twice, one clear line, nothing overwritten."""

import json
import random
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from warm import Started

from distill.storage import hash_file, read_rows


def start(*arguments) -> Started:
    return Started(arguments)


def finish(*arguments) -> str:
    process = start(*arguments)
    assert process.wait() == 0, process.errors
    return process.errors


def kill_when(process: Started, ready) -> None:
    """SIGKILL as soon as `ready()` is true; fails if the process ends first."""
    deadline = time.monotonic() + 120
    while not ready():
        assert process.poll() is None, f"ended before the kill: {process.errors}"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill(group=True)
    process.wait()


def contents(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): hash_file(p) for p in sorted(folder.rglob("*.parquet"))}


@pytest.mark.slow
def test_kill_during_generate_and_train_changes_nothing(make_recipe):
    path, whole = make_recipe(name="whole")
    slow = ["generate.part_size=2", "train.steps=40", "train.checkpoint_every=2", "prompts.levels={easy: 40}"]
    for command in ("generate", "filter", "train"):
        finish(command, path, *slow)

    path, run = make_recipe(name="killed")

    # ---- generate: killed after some parts, and again later -----------------------------------------
    def parts():
        return list((run / "generations").glob("part-*.parquet"))

    for wanted in (3, 9):
        kill_when(start("generate", path, *slow), lambda n=wanted: len(parts()) >= n)
        kept = {p: p.stat().st_mtime_ns for p in parts()}
        assert not (run / "generations" / "manifest.json").exists()
    finish("generate", path, *slow)
    assert all(p.stat().st_mtime_ns == stamp for p, stamp in kept.items()), (
        "finished parts are not made again"
    )
    assert contents(run / "generations") == contents(whole / "generations")
    finish("filter", path, *slow)
    assert contents(run / "dataset") == contents(whole / "dataset")
    rows = [(r["prompt_id"], r["sample_idx"]) for r in read_rows(run / "generations")]
    assert len(rows) == len(set(rows)) == 80

    # ---- train: killed at random moments of both arms ------------------------------------------------
    rng = random.Random(0)
    for arm, step in (
        ("student", rng.randint(2, 20)),
        ("student", rng.randint(21, 38)),
        ("control", rng.randint(4, 30)),
    ):
        log = run / arm / "metrics.jsonl"
        lines = lambda f=log: f.read_text().count("\n") if f.is_file() else 0  # noqa: E731
        kill_when(start("train", path, *slow), lambda n=step, count=lines: count() >= n)
    finish("train", path, *slow)
    for arm in ("student", "control"):
        file = "adapter_model.safetensors"
        assert hash_file(run / arm / file) == hash_file(whole / arm / file), arm
        steps = [json.loads(line)["step"] for line in (run / arm / "metrics.jsonl").read_text().splitlines()]
        assert steps == list(range(1, 41))


def snapshot(folder: Path) -> dict[str, int]:
    files = (p for p in folder.rglob("*") if p.is_file() and not p.name.endswith(".lock"))
    return {str(p): p.stat().st_mtime_ns for p in files}


def check_refusal(result: tuple[int, str, str], *said: str, code: int = 2) -> None:
    """One problem: the right exit code, one line per problem on stderr, no traceback, the fix named."""
    got, _, err = result
    lines = [line for line in err.splitlines() if line.startswith("distill: ")]
    assert got == code, err
    assert "Traceback" not in err
    assert lines, err
    for text in said:
        assert re.search(text, " ".join(lines)), (text, lines)


def test_bad_recipe_arguments_and_files(make_recipe, run_cli, tmp_path, hub):
    path, run_dir = make_recipe()
    check_refusal(run_cli("run", "nowhere.yaml"), "nowhere.yaml' not found; shipped recipes: .*demo.yaml")
    check_refusal(run_cli("run", "demo"), "did you mean 'recipes/demo.yaml'")
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "recipe.yaml").write_text("run_dir: x")
    check_refusal(run_cli("report", tmp_path / "done"), "did you mean '.*done/recipe.yaml'")
    check_refusal(run_cli("run", path, "steps=3"), "unknown key 'steps'; did you mean 'train.steps'")
    check_refusal(run_cli("run", path, "train.stepz=3"), "unknown key 'train.stepz'; did you mean 'steps'")
    check_refusal(run_cli("run", path, "train.steps=many"), "'train.steps' is 'many'.*integer")
    check_refusal(run_cli("run", path, "--teacher", tmp_path / "gone"), "gone' is not a folder")
    check_refusal(run_cli("run", path, "train.precision=fp16"), "fp16.*silently.*bf16")
    check_refusal(run_cli("run", path, "device=cuda"), "no CUDA GPU")
    check_refusal(run_cli("run", path, "--teacher", "/nope", "train.precision=fp8"), "fp8", "/nope")
    check_refusal(run_cli("train", path), "dataset is not finished; run `distill filter RECIPE` first")
    check_refusal(run_cli("report", path), "distill")
    check_refusal(run_cli("evaluate", hub["llama"], "--tasks", "esay"), "neither a level")
    check_refusal(run_cli("evaluate", tmp_path / "gone"), "is not a folder")
    check_refusal(run_cli("describe", tmp_path / "gone"), "gone")
    check_refusal(run_cli("cost", tmp_path), "manifest")
    assert not (run_dir / "generations").exists()


def test_different_vocabularies_asked_for_a_kl(make_recipe, run_cli):
    path, run_dir = make_recipe("other_vocabulary", "llama")
    kl = "train.objectives=[{name: forward_kl}]"
    check_refusal(
        run_cli("run", path, kl), "forward_kl compares logits.*different vocabularies", "cross_entropy"
    )
    assert not (run_dir / "prompts").exists(), "said before anything was spent"
    for command in ("generate", "filter", "train"):
        assert run_cli(command, path)[0] == 0, "the text alone can be distilled"


def copy_of(hub: dict, name: str, target: Path) -> Path:
    return Path(shutil.copytree(hub[name], target))


def test_damaged_models(make_recipe, run_cli, hub, tmp_path):
    path, run_dir = make_recipe()
    cut = copy_of(hub, "llama", tmp_path / "cut")
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    check_refusal(run_cli("run", path, "--student", cut), r"model\.safetensors is damaged or cut short")

    pickled = copy_of(hub, "llama", tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    check_refusal(run_cli("run", path, "--student", pickled), "pickle weights only.*save_pretrained")

    empty = copy_of(hub, "llama", tmp_path / "empty")
    (empty / "config.json").unlink()
    check_refusal(run_cli("run", path, "--teacher", empty), "cannot read the config")

    other = copy_of(hub, "llama", tmp_path / "deeper")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    check_refusal(run_cli("generate", path, "--teacher", other), "lacks weights its config asks for")
    assert not (run_dir / "generations").exists()


def test_an_adapter_without_its_base(finished, run_cli, tmp_path):
    student = shutil.copytree(finished / "run" / "student", tmp_path / "student")
    config = student / "adapter_config.json"
    config.write_text(config.read_text().replace("hub", "bub"))
    result = run_cli("evaluate", student, "--out", tmp_path / "out")
    check_refusal(result, "its base model does not load.*base_model_name_or_path")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stage, command", [("generations", "filter"), ("dataset", "train")])
def test_a_corrupt_part_is_named_and_kept(make_recipe, run_cli, stage, command):
    path, run_dir = make_recipe()
    assert run_cli("generate", path)[0] == 0
    assert command == "filter" or run_cli("filter", path)[0] == 0
    part = sorted((run_dir / stage).glob("part-*.parquet"))[0]
    part.write_bytes(part.read_bytes()[:200])
    before = snapshot(run_dir / stage)
    check_refusal(run_cli(command, path), f"{part.name} is damaged.*delete this file")
    assert snapshot(run_dir / stage) == before


def test_a_lost_tail_of_generate_is_refilled(make_recipe, run_cli):
    """Deleting a damaged part and the manifest, as the message says, makes just that part again."""
    path, run_dir = make_recipe()
    assert run_cli("generate", path)[0] == 0
    before = contents(run_dir / "generations")
    (run_dir / "generations" / "part-00001.parquet").unlink()
    code, _, err = run_cli("generate", path)
    assert code == 0, err
    assert contents(run_dir / "generations") == before


def test_nothing_left_to_train_on(make_recipe, run_cli):
    path, _ = make_recipe()
    assert run_cli("generate", path)[0] == 0
    check_refusal(
        run_cli("filter", path, "filter.correct_only=true"),
        "no row is left to train on",
        "correct_only=false",
    )
    assert run_cli("filter", path)[0] == 0, "the fix that was named works, without --redo"


def test_answers_that_were_cut_off_are_told_as_such(make_recipe, run_cli):
    path, _ = make_recipe()
    short = "generate.max_new_tokens=1"
    assert run_cli("generate", path, short)[0] == 0
    refused = run_cli("filter", path, short, "filter.finish_reasons=[stop]")
    check_refusal(refused, "no row is left to train on", "generate.max_new_tokens")
    code, _, err = run_cli("filter", path, short, "filter.finish_reasons=[stop, length]")
    assert code == 0, f"the fix that was named works: {err}"


def test_a_stopped_run_keeps_its_state_and_says_so(make_recipe, run_cli, monkeypatch):
    from distill.training.step import StudentStep

    path, run_dir = make_recipe()
    for command in ("generate", "filter"):
        assert run_cli(command, path)[0] == 0
    real, calls = StudentStep.forward, []

    def breaks(*args):
        calls.append(1)
        total, terms = real(*args)
        return (total, terms * float("inf")) if len(calls) > 5 else (total, terms)

    monkeypatch.setattr(StudentStep, "forward", breaks)
    check_refusal(run_cli("train", path), r"step 3: the loss is \[inf\]; lower train.learning_rate", code=1)
    assert list((run_dir / "student").glob("state-*")), "the last good state is kept"


@pytest.mark.slow
def test_a_disk_that_fills_up_in_the_middle_of_a_part(make_recipe):
    """A tmpfs of 200 kB: exit code 1 and one line; with more room the same command ends with the same rows."""
    path, whole = make_recipe(name="whole")
    slow = ["generate.part_size=4", "prompts.levels={easy: 150}", "generate.max_new_tokens=24"]
    finish("generate", path, *slow)
    path, run = make_recipe(name="small")
    finish("generate", path, "--dry-run", *slow)
    target = run / "generations"
    target.mkdir(parents=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(target)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"mounting needs root: {mounted.stderr.strip()}")
    try:
        process = start("generate", path, *slow)
        assert process.wait(120) == 1, process.errors
        lines = [line for line in process.errors.splitlines() if line.startswith("distill: ")]
        assert len(lines) == 1 and "No space left on device; free some space and run again" in lines[0]
        kept = contents(target)
        assert kept, "parts written before are kept"
        subprocess.run(["mount", "-o", "remount,size=20m", str(target)], check=True)
        finish("generate", path, *slow)
        assert contents(target) == contents(whole / "generations")
        assert kept.items() <= contents(target).items()
    finally:
        subprocess.run(["umount", str(target)], check=True)
