"""metrics.jsonl is the record of a training run: at no moment does it hold fewer lines than steps are done."""

import contextlib
import json
import os
import signal

import pytest
from accelerate import Accelerator

from distill.config.training import Train
from distill.training import log as log_module
from distill.training.log import StepLog, cut_back
from distill.training.sources import Lot


def lines(*steps: int) -> str:
    return "".join(json.dumps({"step": n, "loss": 1.0, "seconds": float(n)}) + "\n" for n in steps)


def steps_of(path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def open_log(folder, first: int) -> StepLog:
    return StepLog(folder, first, 0, 0, Accelerator(cpu=True), Train())


@pytest.mark.parametrize("first", [20, 12, 0])
def test_a_kill_just_after_a_resume_keeps_every_line(tmp_path, first):
    """The process dies as SIGKILL leaves it, between the resume and its first step: nothing is flushed."""
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines(*range(1, 21)))
    if (pid := os.fork()) == 0:
        open_log(tmp_path, first)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    assert steps_of(path) == list(range(1, first + 1))
    assert open_log(tmp_path, first).earlier == first


def test_seconds_go_on_where_the_run_before_the_stop_ended(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(lines(*range(1, 13)))
    log = open_log(tmp_path, 12)
    with contextlib.suppress(AttributeError):
        log.write(12, [1.5], 0.1, 0.2, Lot(None, None, 4, 9))
    log.sync()
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 13 and 12 <= last["seconds"] < 12 + 60


def test_lines_that_are_cut_go_in_one_replacement(tmp_path, monkeypatch):
    """Killed while lines past the state are taken out: the file is the old one, whole."""
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines(*range(1, 21)))

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(log_module, "write_atomic", killed)
    with pytest.raises(KeyboardInterrupt):
        cut_back(path, 12)
    assert steps_of(path) == list(range(1, 21))


def test_a_line_cut_short_by_a_kill_is_none(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines(1, 2, 3) + '{"step": 4, "lo')
    assert cut_back(path, 3)[0] == 3.0
    assert path.read_text() == lines(1, 2, 3)


def test_a_gap_is_told_and_nothing_else_is_lost(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines(5, 6, 7, 8))
    cut_back(path, 7)
    assert steps_of(path) == [5, 6, 7]
    assert "lacks 4 of the 7 steps" in capsys.readouterr().err


def test_lines_that_the_state_does_not_know_are_told(tmp_path, capsys):
    """One flipped digit of a loss; the state holds the hash of the lines that it was saved with."""
    first = open_log(tmp_path, 0)
    for step in (0, 1, 2):
        with contextlib.suppress(AttributeError):  # without a progress bar
            first.write(step, [1.5], 0.1, 0.2, Lot(None, None, 4, 9))
        if step == 1:
            recorded = first.sync()
    path = tmp_path / "metrics.jsonl"
    assert cut_back(path, 2, recorded)[1].hexdigest() == recorded and not capsys.readouterr().err
    path.write_text(path.read_text().replace('"loss": 1.5', '"loss": 1.7', 1))
    cut_back(path, 2, recorded)
    assert "is not as training wrote it" in capsys.readouterr().err


def test_the_loss_of_a_line_is_the_weighted_sum_of_its_objectives(tmp_path):
    train = Train(
        objectives=[{"name": "cross_entropy", "weight": 0.2}, {"name": "forward_kl", "weight": 3.0}]
    )
    log = StepLog(tmp_path, 0, 0, 0, Accelerator(cpu=True), train)
    with contextlib.suppress(AttributeError):
        log.write(0, [1.5, 4.0], 0.1, 0.2, Lot(None, None, 4, 9))
    log.sync()
    (line,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert line["loss"] == pytest.approx(0.2 * 1.5 + 3.0 * 4.0)
    assert line["objectives"] == {"cross_entropy": 1.5, "forward_kl": 4.0}


def test_what_fits_is_not_touched(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines(1, 2))
    before = path.stat().st_mtime_ns, path.stat().st_ino
    cut_back(path, 2)
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == before
