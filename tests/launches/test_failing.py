"""A launch of which one process fails: it says why, the others end in one line, and the same command goes on."""

import signal
import time

import pytest
import warm
from conftest import ROOT
from launching import forked, processes_of
from safetensors.torch import load_file
from training_example import MIXED, SGD, assert_same, fake_dataset
from warm import Started, ran

from distill import console
from distill.commands.cli import COMMANDS, main

OPTIONS = [*SGD, MIXED, "train.batch_size=7", "train.micro_batch_size=2"]


def stopped(words: list, how: str) -> list[Started]:
    """Two processes, of which the second ends after its second step; nobody ends the first from outside."""
    told = {"DISTILL_TEST_STOP_AFTER": "2", "DISTILL_TEST_STOP_HOW": how}
    ranks = [
        Started(words, ROOT / "tests" / "stopping_launch.py", **warm._rank(rank, 2, told))
        for rank in range(2)
    ]
    for rank in ranks:
        rank.wait()
    return ranks


@pytest.mark.parametrize("how, code", [("error", 1), ("killed", -9)])
def test_one_that_ends_alone_is_told_of_and_the_run_goes_on(make_recipe, how, code):
    words = {}
    for name in ("whole", "ended"):
        path, run_dir = make_recipe(name=name)
        fake_dataset(run_dir)
        words[name] = ["train", path, *OPTIONS], run_dir / "student"
    first, second = stopped(words["ended"][0], how)
    assert second.returncode == code and first.returncode == 1
    lines = first.errors.splitlines()
    assert any(line.startswith("distill: another process of this launch has ended") for line in lines), lines
    said = "distill: process 1: the memory of this machine is full; take smaller batches"
    assert (said in second.errors.splitlines()) == (how == "error")
    assert "Traceback" not in first.errors + second.errors
    forked(*words["whole"][:1])
    forked(words["ended"][0], 2)
    whole, ended = (load_file(next(folder.glob("*.safetensors"))) for _, folder in words.values())
    assert processes_of(words["ended"][1]) == 2
    assert_same(whole, ended, 1e-6)


def test_one_that_is_told_to_stop_stops_all_of_them_with_their_state(make_recipe):
    """SIGTERM to one process, as of a machine that is taken away: the step ends, all leave, and the run goes on."""
    weights, options = {}, [*OPTIONS, "train.steps=30", "train.checkpoint_every=0"]
    for name in ("whole", "told"):
        path, run_dir = make_recipe(name=name)
        fake_dataset(run_dir)
        if name == "told":
            ranks = [Started(["train", path, *options], **warm._rank(rank, 2, {})) for rank in range(2)]
            log = run_dir / "student" / "metrics.jsonl"
            while ranks[0].poll() is None and not (log.is_file() and log.read_text().count("\n") >= 3):
                time.sleep(0.01)
            ranks[1].kill(signal.SIGTERM)
            assert [rank.wait() for rank in ranks] == [143, 143], [rank.errors for rank in ranks]
            assert "stopped by SIGTERM after step" in ranks[0].errors
            (state,) = (run_dir / "student").glob("state-*")
            assert int(state.name.partition("-")[2]) < 30
        forked(["train", path, *options], 1 if name == "whole" else 2)
        weights[name] = load_file(next((run_dir / "student").glob("*.safetensors")))
    assert_same(weights["whole"], weights["told"], 1e-6)


def test_what_all_of_them_find_is_said_once_and_before_work_begins(make_recipe):
    path, run_dir = make_recipe()
    fake_dataset(run_dir)
    done = ran(["train", path, *OPTIONS, "train.batch_size=1", "train.micro_batch_size=1"], 2)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.count("train.batch_size=1 is below the 2 processes; raise it to 2") == 1
    assert not (run_dir / "student").exists()


@pytest.mark.parametrize("rank, before", [("0", "distill: "), ("1", "distill: process 1: ")])
def test_what_one_process_does_is_refused_in_a_launch(monkeypatch, capsys, rank, before):
    """Two of them would write the same files at once."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(console, "_LAUNCHER_ENDS", 0.01)
    assert main(["describe", "nowhere"]) == 2
    assert capsys.readouterr().err.startswith(f"{before}`distill describe` is the work of one process")
    shared = {name for name, command in COMMANDS.items() if command.shared}
    assert shared == {"demo", "run", "generate", "filter", "train", "evaluate"}


def test_what_a_launch_cannot_train_is_told_before_the_first_stage(make_recipe, monkeypatch, capsys):
    """`run` would have written hours of answers by the time its student is refused."""
    path, run_dir = make_recipe()
    mtp = "train.objectives=[{name: reverse_kl}, {name: multi_token}]"
    words = [
        "run",
        path,
        mtp,
        "train.on_policy={fraction: 0.5, max_new_tokens: 6}",
        "train.teachers={own_start: true}",
    ]
    for name, value in {"WORLD_SIZE": "7", "RANK": "0", "ACCELERATE_USE_FSDP": "true"}.items():
        monkeypatch.setenv(name, value)
    assert main(words) == 2
    said = capsys.readouterr().err
    for problem in (
        "batch_size=6 is below the 7",
        "cannot write by itself",
        "starting weights",
        "multi_token: a sharded",
    ):
        assert said.count(problem) == 1, said
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert main(words) == 2 and "DeepSpeed takes an optimizer step of its own" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert main(["run", path, "teacher.device=sharded"]) == 2
    assert "nothing to spread the teacher over" in capsys.readouterr().err and not run_dir.exists()
