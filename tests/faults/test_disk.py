"""Disks that are full or read-only: one line with the folder and the bytes, and the same command goes on later."""

import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml
from conftest import PYTHON
from gguf_example import write_gguf
from grid_example import in_this_process, written
from spread import spread

from distill.bench.items import ITEMS
from distill.commands.cli import main
from distill.errors import RunError
from distill.files import (
    check_targets,
    is_leftover,
    remove,
    remove_dead,
    replacing,
    shown,
    system_problem,
    write_atomic,
    writing,
)
from distill.storage import hash_file


def one_line(code: int, err: str) -> str:
    lines = [line for line in err.splitlines() if line.startswith("distill: ") and "warning" not in line]
    assert code == 1 and "Traceback" not in err and len(lines) == 1, (code, err)
    return lines[0]


def limited(most: int, *command) -> tuple[int, str]:
    """A command in a process whose files may not grow beyond so many bytes: what a full disk is to a writer."""
    heard, said = os.pipe()
    if (pid := os.fork()) == 0:
        os.dup2(said, 1)
        os.dup2(said, 2)
        # pytest has put files of its own in their place.
        sys.stdout, sys.stderr = (open(n, "w", closefd=False) for n in (1, 2))  # noqa: SIM115
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
        code = main([str(word) for word in command])
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    os.close(said)
    with open(heard, errors="replace") as pipe:
        told = pipe.read()
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), told


# Which file of the stage is the first above the limit.
@pytest.mark.parametrize(
    "command, most, folder",
    spread(
        [
            ("train", 6_000, "student"),
            ("generate", 4_000, "prompts"),
            ("generate", 6_500, "generations"),
            ("evaluate", 5_000, "eval"),
        ],
        4,
    ),
)
def test_a_full_disk_is_one_line_and_the_command_goes_on(make_recipe, run_cli, command, most, folder):
    path, run_dir = make_recipe()
    before = ("generate", "filter", "train")
    for earlier in before[: {"generate": 0, "train": 2, "evaluate": 3}[command]]:
        assert run_cli(earlier, path)[0] == 0
    code, err = limited(most, command, path)
    line = one_line(code, err)
    assert f"cannot write {run_dir / folder}" in line and "free some space and run again" in line, line
    assert "bytes needed in" in line and " free), finished parts are kept" in line, line
    assert not [p for p in run_dir.rglob(".*") if is_leftover(p)]
    assert run_cli(command, path)[0] == 0


# What each stage of the finished run makes: its words, and the folders and files that go before it is made again.
MADE = {
    "generate": (["generate"], ["prompts", "generations", "recipe.yaml"]),
    "filter": (["filter"], ["dataset", "recipe.yaml"]),
    "train": (["train"], ["student", "control", "recipe.yaml"]),
    "evaluate": (["evaluate"], ["eval", "recipe.yaml"]),
    "report": (["report"], ["report.html"]),
    "merge": (["merge", "RUN/student", "--out", "RUN/merged"], ["merged"]),
    "export": (["export", "RUN", "--out", "RUN/rows.parquet"], ["rows.parquet"]),
    "export lines": (["export", "RUN", "--out", "RUN/rows.jsonl"], ["rows.jsonl"]),
    "import": (["import", "GGUF", "--out", "RUN/imported"], ["imported"]),
    "inherit": (
        ["inherit", "RUN/student", "--per-flaw", "1", "--max-new-tokens", "3", "--out", "RUN/audit"],
        ["audit"],
    ),
    "evaluate a checkpoint": (
        ["evaluate", "RUN/student", "--tasks", "easy", "--problems", "2", "--max-new-tokens", "3", "--no-speed",
         "--out", "RUN/found"],
        ["found"],
    ),
    "cost": (["cost", "RUN", "--break-even", "--usd-per-hour", "1", "--out", "RUN/bill"], ["bill"]),
}  # fmt: skip


@pytest.mark.parametrize("name", spread(MADE, 4))
def test_no_file_of_a_command_is_left_half(name, finished, tmp_path):
    """The limit is just below the size of each file that it makes, in turn: every kind of file is refused once."""
    run = tmp_path / "run"
    words, made = MADE[name]
    gguf = tmp_path / "tiny.gguf"
    if "GGUF" in words:
        pytest.importorskip("gguf")
        write_gguf(gguf, ends={"eot": 0})
    shutil.copytree(finished / "run", run)
    words = [word.replace("RUN", str(run)).replace("GGUF", str(gguf)) for word in words]
    if len(words) == 1:
        words += [str(finished / "run.yaml"), f"run_dir={run}"]
    clear(run, made)
    assert main(words) == 0
    whole = contents(run, made)
    clear(run, made)
    # A fiftieth less, since pages and times of the next run may be some digits shorter.
    limits = sorted({size - 1 - size // 50 for size, _ in whole.values() if size})
    for limit in limits if len(limits) < 12 else [*limits[::3], limits[-1]]:
        code, said = limited(limit, *words)
        assert code, f"{limit} bytes were enough, and a file has more"
        line = one_line(code, said)
        # What is read of a GGUF file is tried with a copy of its header, which lies with the temporary files.
        places = [str(run), *([f"{tempfile.gettempdir()}/tmp"] if name == "import" else [])]
        assert line.partition("cannot write ")[2].startswith(tuple(places)) and "bytes needed in" in line, (
            line
        )
        assert not [p for p in run.rglob(".*") if is_leftover(p)]
    assert main(words) == 0
    again = contents(run, made)
    assert again.keys() == whole.keys()
    same = [n for n in whole if n.endswith((".parquet", ".safetensors", "rows.jsonl"))]
    assert {n: again[n][1] for n in same} == {n: whole[n][1] for n in same}


# The files that a bench itself writes, beside those of its runs.
JUDGED = ["clock.json", "results.json", "results.parquet", ITEMS, "bench.html"]


@pytest.mark.slow
def test_no_file_of_a_bench_is_left_half(tmp_path):
    arms = {
        "start": {},
        "more": {"start": "start", "set": {"train.steps": 3}},
    }
    bench, grid = written(tmp_path, arms=arms, claims=[], curves=[]), tmp_path / "grid"
    words = ["bench", bench, "--budget", "small", "--jobs", "1"]
    with in_this_process():
        assert main(words) == 0
        whole = contents(grid, ["."])
        # Its own files first, with every task done; then a task's weights, which the next task waits for.
        limits = {name: whole[name][0] * 9 // 10 for name in JUDGED}
        student = max(n for n in whole if n.startswith("start-0/start/") and n.endswith(".safetensors"))
        for name, limit in limits.items():
            clear(grid, [n for n in JUDGED if n != "clock.json" or name == n])
            code, said = limited(limit, *words)
            # A limit below the clock's size meets a model card first, which is one task's failure.
            assert code == 1 and "Traceback" not in said, (name, said)
            assert "cannot write" in said and f"in {grid}" in said and "free some space" in said, (name, said)
            assert name == "clock.json" or not (grid / name).exists(), name
            assert not [p for p in grid.rglob(".*") if is_leftover(p)], name
        for gone in (f"{task}-0" for task in ("start", "more")):
            clear(grid, [gone])
        code, said = limited(whole[student][0] - 1, *words)
        assert code == 1 and "Traceback" not in said, said
        assert "1 of 4 tasks failed" in said and "free some space" in said and "start-0" in said, said
        assert not [p for p in grid.rglob(".*") if is_leftover(p)]
        assert main(words) == 0
    again = contents(grid, ["."])
    assert again.keys() == whole.keys()
    same = [n for n in whole if n.endswith((".safetensors", ITEMS)) or n.endswith("rows.parquet")]
    assert {n: again[n][1] for n in same} == {n: whole[n][1] for n in same}


def clear(run: Path, made: list[str]) -> None:
    for name in made:
        remove(run / name)


def contents(run: Path, made: list[str]) -> dict[str, tuple[int, str]]:
    """{name: (bytes, hash)} of the files that are made."""
    found = [p for name in made for p in (run / name, *(run / name).rglob("*")) if p.is_file()]
    return {str(p.relative_to(run)): (p.stat().st_size, hash_file(p)) for p in found}


def test_a_page_on_a_full_disk(run_cli, finished, monkeypatch):
    path, run_dir = finished / "run.yaml", finished / "run"
    before = {p: hash_file(p) for p in run_dir.rglob("*.html")}
    real = os.replace

    def full(source, target):
        if str(target).endswith(".html"):
            raise OSError(28, "No space left on device")
        return real(source, target)

    monkeypatch.setattr(os, "replace", full)
    code, _, err = run_cli("report", path)
    assert f"cannot write {run_dir}: No space left on device; free some space" in one_line(code, err)
    assert {p: hash_file(p) for p in run_dir.rglob("*.html")} == before


@pytest.fixture
def read_only(tmp_path):
    """A folder on a file system that takes nothing; root is not stopped by permissions."""
    folder = tmp_path / "closed"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"mounting needs root: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("command", ["run", "generate", "train", "evaluate"])
def test_a_read_only_folder_is_told_before_work_begins(make_recipe, run_cli, read_only, command):
    path, _ = make_recipe()
    code, _, err = run_cli(command, path, f"run_dir={read_only}/run")
    assert code == 2 and "Traceback" not in err
    assert (
        f"run_dir={shown(f'{read_only}/run')} cannot be written: {read_only} is read-only for you; give another path"
        in err
    )


@pytest.mark.parametrize(
    "words",
    [
        ["merge", "RUN/student", "--out", "CLOSED/x"],
        ["export", "RUN", "--out", "CLOSED/x.jsonl"],
        ["import", "GGUF", "--out", "CLOSED/x"],
        ["inherit", "RUN/student", "--out", "CLOSED/x"],
        ["evaluate", "RUN/student", "--tasks", "easy", "--out", "CLOSED/x"],
        ["cost", "RUN", "--break-even", "--out", "CLOSED/x"],
        ["init", "CLOSED/x"],
        ["bench", "BENCH"],
        ["bench", "OPEN", "--out", "CLOSED/x.json"],
    ],
    ids=lambda words: " ".join(words[:1] + words[-1:]),
)
def test_a_read_only_target_is_told_before_work_begins(finished, tmp_path, run_cli, read_only, words):
    pytest.importorskip("gguf")
    write_gguf(tmp_path / "tiny.gguf", ends={"eot": 0})
    for name, place in (("BENCH", read_only / "grid"), ("OPEN", tmp_path / "grid")):
        file = {"title": "t", "recipe": str(finished / "run.yaml"), "run_dir": str(place), "set": {}, "claims": [],
                "arms": {"a": {}}, "budgets": {"small": {"seeds": 1}}}  # fmt: skip
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(file))
    places = {"RUN": finished / "run", "CLOSED": read_only, "GGUF": tmp_path / "tiny.gguf",
              "BENCH": tmp_path / "BENCH.yaml", "OPEN": tmp_path / "OPEN.yaml"}  # fmt: skip
    for name, place in places.items():
        words = [word.replace(name, str(place)) for word in words]
    code, _, err = run_cli(*words)
    assert code == 2 and "Traceback" not in err and str(read_only) in err and "read-only for you" in err, err
    assert not (tmp_path / "grid").exists()


def test_a_finished_run_that_was_put_on_a_closed_disk(finished, tmp_path, run_cli):
    """What is done before is said so; what would have to write says in one line where it cannot."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(place)], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"mounting needs root: {mounted.stderr.strip()}")
    try:
        run = Path(shutil.copytree(finished / "run", place / "run"))
        subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
        recipe = [str(finished / "run.yaml"), f"run_dir={run}"]
        codes = {}
        for words in (["filter", *recipe], ["provenance", str(run)], ["report", *recipe], ["run", *recipe],
                      ["evaluate", *recipe, "evaluate.max_new_tokens=5", "--redo"]):  # fmt: skip
            codes[words[0]], _, err = run_cli(*words)
            lines = [line for line in err.splitlines() if line.startswith("distill: ")]
            assert "Traceback" not in err and len(lines) <= 1, (words, err)
            assert not codes[words[0]] or (str(run) in lines[0] and "writ" in lines[0]), (words, err)
        assert codes["provenance"] == 0 and codes["evaluate"] in (1, 2)
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_replacing_leaves_the_old_file_or_the_new_one(tmp_path):
    target = tmp_path / "a.txt"
    write_atomic(target, "old")
    with (
        pytest.raises(RunError, match=r"free some space and run again \(3 bytes needed"),
        replacing(target, 3) as half,
    ):
        half.write_text("new")
        raise OSError(28, "No space left on device")
    assert target.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize(
    "text", ["I/O error: No space left on device (os error 28)", "[Errno 28] Error writing"]
)
def test_a_full_disk_is_known_in_whatever_error_a_library_wraps_it(tmp_path, text):
    with pytest.raises(RunError, match="No space left on device; free some space"), writing(tmp_path, 10):
        raise Exception(text)
    assert "No space left" in system_problem(Exception(text))
    with pytest.raises(ValueError), writing(tmp_path):
        raise ValueError("a bug is a bug")
    assert system_problem(ValueError("a bug is a bug")) is None


def test_leftovers_of_the_living_stay(tmp_path):
    (tmp_path / f".page.html.tmp{os.getppid()}").write_text("being written")
    gone = subprocess.run(
        [PYTHON, "-c", "import os; print(os.getpid())"], capture_output=True, text=True
    ).stdout.strip()
    (tmp_path / f".page.html.tmp{gone}").write_text("half")
    (tmp_path / f".page.html.tmp{gone}0x").write_text("somebody else's")
    remove_dead(tmp_path, "page.html")
    assert {p.name for p in tmp_path.iterdir()} == {
        f".page.html.tmp{os.getppid()}",
        f".page.html.tmp{gone}0x",
    }


def test_targets_are_checked_without_being_touched(tmp_path):
    (tmp_path / "file").write_text("x")
    for good in (tmp_path / "new", tmp_path / "new" / "deeper", tmp_path):
        check_targets(folder_out=good)
    for bad in (
        tmp_path / "file",
        tmp_path / "file" / "below",
        "/dev/null",
        "/dev/null/x",
        tmp_path / ("n" * 300),
        "a\0b",
        "",
    ):
        with pytest.raises(Exception, match=r"--out .*; give "):
            check_targets(folder_out=bad)
    for bad in (tmp_path, "/dev/null", tmp_path / "file" / "below.json", "a\0b"):
        with pytest.raises(Exception, match=r"--out .*; give "):
            check_targets(file_out=bad)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
