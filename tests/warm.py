"""`distill` in processes that are forked from a warm one, which has imported torch and the rest once.

    done = ran(["train", path])                 # one process: returncode, stdout, stderr
    done = ran(["train", path], processes=3)    # three ranks of one group over gloo, as torchrun starts them
    process = Started(["generate", path])            # poll(), kill(signal), wait(), of a process group of its own

A process of its own takes 5 s of imports before its work begins; here it takes a fork. What is tried is the same: other
processes, their signals, files, locks and collectives. Not tried is the launcher: tests/launches/test_launch.py starts
one pair of processes as a user does, and the slow tests start every launch file. Hashes of strings, and so the order of
sets, are alike in all forks; in that pair they are not.

Pages and speeds are drafts (tests/drafting.py), unless `DRAWN_HERE=1` is among the variables that are given. The warm
process computes nothing itself and so has no threads that a fork would lose.
"""

import atexit
import contextlib
import fcntl
import gc
import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = {
    "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1",
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
}  # fmt: skip
_server: subprocess.Popen | None = None  # where this process has started it
_line: TextIO | None = None


# ---- what tests call -----------------------------------------------------------------------------------


class Started:
    """A running `distill WORDS`, or a script with such words; its output lies in files until it is asked for."""

    def __init__(self, words: list, script: Path | None = None, **environment: str):
        self.folder = Path(tempfile.mkdtemp(prefix="warm-"))
        order = {
            "words": [*map(str, words)], "script": script and str(script), "cwd": str(ROOT),
            "environment": {**os.environ, **SETTINGS, **environment},
            "out": str(self.folder / "out"), "err": str(self.folder / "err"),
        }  # fmt: skip
        self.pid = _ask(start=order)
        self.returncode: int | None = None
        # Readable when the process has ended: to ask for it again and again would take as much work as some tests.
        self._end = os.fdopen(os.pidfd_open(self.pid)) if hasattr(os, "pidfd_open") else None

    def poll(self, patience: float = 0) -> int | None:
        """The exit code, negative for a signal as in subprocess; None while it runs, looked at for so many seconds."""
        if self.returncode is None:
            if self._end and not select.select([self._end], [], [], patience)[0]:
                return None
            self.returncode = _ask(poll=self.pid)
            if self._end and self.returncode is not None:
                self._end.close()
        return self.returncode

    def kill(self, number: int = signal.SIGKILL, group: bool = False) -> None:
        (os.killpg if group else os.kill)(self.pid, number)

    def wait(self, timeout: float = 240) -> int:
        """The exit code. Raises TimeoutError, after killing it and all that it started."""
        deadline = time.monotonic() + timeout
        while self.poll(patience=1) is None:
            if time.monotonic() > deadline:
                self.kill(group=True)
                raise TimeoutError(f"still running after {timeout} s: {self.errors[-3000:]}")
            time.sleep(0.005)
        return self.returncode

    @property
    def output(self) -> str:
        return (self.folder / "out").read_text()

    @property
    def errors(self) -> str:
        return (self.folder / "err").read_text()


def ran(
    words: list, processes: int = 1, script: Path | None = None, timeout: float = 240, **environment: str
) -> subprocess.CompletedProcess:
    """All ranks run to their end; where one fails the others are killed, as a launcher does. Output is that of all."""
    ranks = [Started(words, script, **_rank(rank, processes, environment)) for rank in range(processes)]
    deadline, failed = time.monotonic() + timeout, False
    while any(rank.poll() is None for rank in ranks):
        failed = time.monotonic() > deadline or any(rank.poll() for rank in ranks)
        if failed:
            time.sleep(0.5)  # a mistake that all of them find is told by all
            for rank in ranks:
                if rank.poll() is None:
                    rank.kill(group=True)
                    rank.wait()
        time.sleep(0.02)
    code = next((rank.returncode for rank in ranks if rank.returncode), 0)
    return subprocess.CompletedProcess(
        words, code, "".join(rank.output for rank in ranks), "".join(rank.errors for rank in ranks)
    )


_ports: dict[str, str] = {}


def _rank(rank: int, processes: int, environment: dict[str, str]) -> dict[str, str]:
    """What torchrun gives to one of several processes; the port is the same for all of a group."""
    if processes == 1:
        return environment
    if rank == 0:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            _ports["now"] = str(free.getsockname()[1])
    world = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "GROUP_RANK": "0"}
    place = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": _ports["now"],
    }
    return {**world, **place, **environment}


def _ask(**order):
    """One order to the warm process; its answer."""
    global _line
    if _line is None:
        _line = _reached()
    _line.write(json.dumps(order) + "\n")
    _line.flush()
    said = _line.readline()
    assert said, "the warm process has ended"
    return json.loads(said)


def _reached() -> TextIO:
    """A line to the warm process, which all workers of a test run share; who needs it first starts it.

    It ends with the last line to it.
    """
    global _server
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID", os.getpid())
    place = os.path.join(tempfile.gettempdir(), f"warm-{run}")
    with open(f"{place}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with contextlib.suppress(OSError):
            return _line_to(place)
        _server = subprocess.Popen(
            [sys.executable, __file__, place], env={**os.environ, **SETTINGS}, cwd=ROOT, text=True,
            start_new_session=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert _server.stdout.readline(), f"the warm process has not started: {_server.wait()}"
        return _line_to(place)


def _line_to(place: str) -> TextIO:
    end = socket.socket(socket.AF_UNIX)
    end.connect(place)
    line = end.makefile("rw")
    if not line.readline():  # it was about to end
        raise ConnectionError
    return line


# ---- the warm process ----------------------------------------------------------------------------------


def serve(place: str) -> None:
    gc.disable()  # as in conftest.py
    import torch

    torch.set_num_threads(1)
    import pandas  # noqa: F401, which datasets loads when it is first used
    import peft  # noqa: F401
    import pyarrow.dataset  # noqa: F401
    import transformers.models.llama.modeling_llama
    import transformers.models.qwen3.modeling_qwen3
    import transformers.models.qwen3_moe.modeling_qwen3_moe  # noqa: F401

    import distill.data.filter
    import distill.data.generate
    import distill.doctor.checks
    import distill.doctor.memory
    import distill.evaluation.evaluate
    import distill.pipeline
    import distill.report.dossier
    import distill.report.report
    import distill.training.arms  # noqa: F401

    os.fsync = lambda _file: None  # as in conftest.py
    gc.freeze()  # a collection in a fork would copy every page of what is imported
    gc.enable()
    door, lines = socket.socket(socket.AF_UNIX), {}
    with contextlib.suppress(FileNotFoundError):
        os.unlink(place)
    door.bind(place)
    door.listen()
    print("ready", flush=True)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1)  # what a library prints is no answer
    lines[door] = None
    while True:
        for ready in select.select(list(lines), [], [])[0]:
            if ready is door:
                end, _ = door.accept()
                lines[end] = end.makefile("rw")
                _say(lines[end], "ready")
            elif order := lines[ready].readline():
                _say(lines[ready], _done(json.loads(order), lines))
            else:
                lines.pop(ready).close()
                ready.close()
                if len(lines) == 1:
                    for name in (place, f"{place}.lock"):
                        os.unlink(name)
                    return


def _say(line: TextIO, answer) -> None:
    with contextlib.suppress(OSError):  # who asked has ended
        line.write(json.dumps(answer) + "\n")
        line.flush()


def _done(order: dict, lines: dict) -> int | None:
    """The number of a new process, or the exit code of one."""
    if "start" in order:
        said = os.fork() or _child(order["start"], lines)
        with contextlib.suppress(OSError):  # both do it, so that neither need wait for the other
            os.setpgid(said, said)
        return said
    done, status = os.waitpid(order["poll"], os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def _child(order: dict, lines: dict) -> None:
    """The command in this fork, which hears no orders; never returns."""
    import runpy
    import traceback

    import numpy as np
    from drafting import draft_pages

    from distill.commands.cli import main

    os.setpgid(0, 0)
    for heard in lines:
        os.close(heard.fileno())
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(order[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.clear()
    os.environ.update(order["environment"])
    os.chdir(order["cwd"])
    random.seed()  # as in processes that were started apart
    np.random.seed()
    if not os.environ.get("DRAWN_HERE"):
        draft_pages().__enter__()  # for the life of this process
    sys.argv = [order["script"] or "distill", *order["words"]]
    try:
        if order["script"]:
            runpy.run_path(order["script"], run_name="__main__")
            code = 0
        else:
            code = main(order["words"])
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    atexit._run_exitfuncs()
    os._exit(code)


if __name__ == "__main__":
    serve(sys.argv[1])
