"""The installed package alone, in an empty folder: what a wheel brings is enough for every command."""

import json
import os
import subprocess
import zipfile

import pytest
from conftest import PYTHON, ROOT


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A function that runs `distill` from an unpacked wheel in an empty folder: words -> finished process."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("distill", "recipes", "checkpoints", "pyproject.toml", "setup.py", "README.md", "LICENSE"):
        (source / name).symlink_to(ROOT / name)
    words = ["-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder), str(source)]
    built = subprocess.run([PYTHON, *words], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    zipfile.ZipFile(next(folder.glob("*.whl"))).extractall(folder / "site")
    environment = {
        **os.environ,
        "PYTHONPATH": str(folder / "site"),
        "XDG_CACHE_HOME": str(folder / "cache"),  # what the clone said is no answer of the wheel
        "HF_HUB_OFFLINE": "1",
    }
    empty = folder / "empty"
    empty.mkdir()

    def run(*commands: list[str]) -> list[str]:
        done = subprocess.run(
            [PYTHON, "-c", SEVERAL, json.dumps(commands)],
            cwd=empty,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    run.folder, run.environment = empty, environment
    return run


# Several commands in one process, which imports torch once; what each printed.
SEVERAL = """
import contextlib, io, json, sys
import distill
from distill.commands.cli import main
said = [distill.__file__]
for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(words) == 0, words
    said.append(out.getvalue())
print(json.dumps(said))
"""


def test_commands_that_need_no_run(installed):
    where, described, _, doctor, _, bill, _ = installed(
        ["describe", "checkpoints/teacher", "--json"], ["init", "mine"], ["doctor", "mine.yaml"],
        ["cost", "--break-even"], ["cost", "deepseek-v3", "--json"],
        ["evaluate", "checkpoints/base", "--tasks", "easy", "--problems", "5"],
    )  # fmt: skip
    assert where.startswith(str(installed.folder.parent)), "the wheel is what runs, not the clone"
    assert json.loads(described)["experts"] == 8 and "0 FAIL" in doctor
    assert json.loads(bill)["usd"] == 5_576_000
    assert (installed.folder / "checkpoints" / "eval-base" / "metrics.json").is_file()
    module = subprocess.run(
        [PYTHON, "-m", "distill", "cost", "--break-even"], cwd=installed.folder, env=installed.environment,
        capture_output=True, text=True,
    )  # fmt: skip
    assert module.returncode == 0 and "recipes/results" not in module.stderr


@pytest.mark.slow
def test_the_demo(installed):
    """Every stage, at a size of seconds; the run folder is in the current folder."""
    changes = ["prompts.levels={easy: 20}", "evaluate.levels={easy: 10}", "generate.samples=1"]
    installed(["demo", *changes, "train.steps=2", "train.warmup_steps=0"])
    assert "<html" in (installed.folder / "checkpoints" / "demo" / "report.html").read_text()
    assert not (installed.folder.parent / "site" / "distill" / "shipped" / "checkpoints" / "demo").exists()
