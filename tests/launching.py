"""Several processes of this command: by `accelerate launch` as a user starts them, or forked (tests/warm.py)."""

import os
import subprocess
from pathlib import Path

from conftest import PYTHON, ROOT
from warm import ran

from distill.storage import read_json

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
CPU2 = str(ROOT / "recipes" / "accelerate" / "cpu2.yaml")
# `accelerate launch`, without its search for garbage among what it imports.
LAUNCHER = "import gc; gc.disable(); from accelerate.commands.launch import main; main()"
LAUNCH = [PYTHON, "-c", LAUNCHER, "--config_file", CPU2, "-m", "distill"]


def run(command: list[str]) -> None:
    """Run it to its end. Whoever compares two processes with one must see by `processes_of` that there were two."""
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]


def forked(words: list, processes: int = 1, script: Path | None = None, file: str = "") -> None:
    """The same without the launcher and its imports: ranks forked from a warm process.

    `file`: a launch file; the ranks have what the launcher would read from it.
    """
    done = ran(words, processes, script, **(told_by_launcher(file) if file else {}))
    assert done.returncode == 0, done.stderr[-3000:]


def told_by_launcher(file: str) -> dict[str, str]:
    """The variables that `accelerate launch --config_file FILE` gives to the processes of several GPUs or CPUs."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    words = ["--config_file", file, "script.py"]
    found = prepare_multi_gpu_env(_validate_launch_command(launch_command_parser().parse_args(words))[0])
    return {name: value for name, value in found.items() if os.environ.get(name) != value}


def processes_of(stage: Path) -> int:
    """How many processes a finished stage ran on, from its manifest: Accelerate may start one without a word."""
    device = read_json(stage / "manifest.json")["device"]
    return int(device.split(" x ")[0]) if " x " in device else 1
