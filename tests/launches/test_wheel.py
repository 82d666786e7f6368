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
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    empty = folder / "empty"
    empty.mkdir()

    def run(*words: str) -> subprocess.CompletedProcess:
        done = subprocess.run(
            [PYTHON, "-m", "distill", *words], cwd=empty, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done

    run.folder = empty
    return run


def test_commands_that_need_no_run(installed):
    where = subprocess.run(
        [PYTHON, "-c", "import distill; print(distill.__file__)"], cwd=installed.folder, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(installed.folder.parent / "site")},
    )  # fmt: skip
    assert where.stdout.startswith(str(installed.folder.parent)), "the wheel is what runs, not the clone"
    assert json.loads(installed("describe", "checkpoints/teacher", "--json").stdout)["experts"] == 8
    installed("init", "mine")
    assert "0 FAIL" in installed("doctor", "mine.yaml").stdout
    assert "recipes/results" not in installed("cost", "--break-even").stderr
    assert json.loads(installed("cost", "deepseek-v3", "--json").stdout)["usd"] == 5_576_000
    installed("evaluate", "checkpoints/base", "--tasks", "easy", "--problems", "5")
    assert (installed.folder / "checkpoints" / "eval-base" / "metrics.json").is_file()


@pytest.mark.slow
def test_the_demo(installed):
    """Every stage, at a size of seconds; the run folder is in the current folder."""
    installed(
        "demo",
        "prompts.levels={easy: 20}",
        "evaluate.levels={easy: 10}",
        "train.steps=2",
        "train.warmup_steps=0",
        "generate.samples=1",
    )
    assert "<html" in (installed.folder / "checkpoints" / "demo" / "report.html").read_text()
    assert not (installed.folder.parent / "site" / "distill" / "shipped" / "checkpoints" / "demo").exists()
