"""A run folder of an earlier version still opens: nothing is made anew, and every reader understands it.

`old_run.tar.gz` was written by the version before the package had folders (commit d6c71a6): two tiny models, a recipe,
and its finished run.
"""

import os
import tarfile
from pathlib import Path

import pytest
from conftest import ROOT

from distill.play.records import find_setup
from distill.storage import hash_file


@pytest.fixture
def old(tmp_path, monkeypatch) -> Path:
    with tarfile.open(ROOT / "tests" / "old_run.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return Path("run")


def contents(folder: Path) -> dict[str, str]:
    return {
        str(p): hash_file(p)
        for p in folder.rglob("*")
        if p.is_file() and p.suffix in (".parquet", ".safetensors", ".json")
    }


def test_every_stage_is_recognised_as_done(old, run_cli):
    before = contents(old)
    code, out, err = run_cli("run", "recipe.yaml")
    assert code == 0, err
    assert out.count("done before") == 6, out
    assert contents(old) == before


def test_the_readers_open_it(old, run_cli):
    before = contents(old)
    assert run_cli("report", "recipe.yaml")[0] == 0
    assert (
        "<html" in (old / "report.html").read_text()
        and "<html" in (old / "eval" / "dossier.html").read_text()
    )
    code, out, err = run_cli("provenance", "run")
    assert code == 0, out + err
    assert set(find_setup(["run"]).checkpoints) == {"base", "control", "student", "teacher"}
    assert contents(old) == before


def test_its_student_is_evaluated(old, run_cli):
    code, _, err = run_cli("evaluate", "run/student", "--tasks", "easy", "--problems", "3", "--max-new-tokens", "4",
                           "--out", "eval-old")  # fmt: skip
    assert code == 0, err
    assert os.path.isfile("eval-old/metrics.json")
