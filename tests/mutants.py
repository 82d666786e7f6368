"""Small wrong changes, one at a time: would any test notice? The measure of the tests themselves.

    python tests/mutants.py                          # all of tests/mutants.txt; about an hour on one core
    python tests/mutants.py --only evaluation/stats  # those whose file or text has this in it

Every change of tests/mutants.txt is made in a copy of the package, and the test files named with it are run there
until the first one fails. A change is *seen* if a test fails, cannot be collected or takes longer than the limit.
First the named tests run without a change: they must pass, or nothing could be told.

Not part of the suite, which checks only that every entry still applies (tests/faults/test_mutants.py). Text that is
found twice, or not at all, is refused: the table goes with the code. Tests run in a fork of one warm process, so that
torch and transformers are imported once.
"""

import argparse
import ast
import contextlib
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = Path(__file__).with_name("mutants.txt")
SECONDS = 240  # a change that makes tests run longer has been noticed
# Imported once, before any fork. None of them is the package under test.
HEAVY = (
    "torch", "transformers", "transformers.models.llama.modeling_llama", "peft", "accelerate", "datasets", "pandas",
    "transformers.models.qwen3_moe.modeling_qwen3_moe", "scipy.stats", "scipy.optimize", "pyarrow.parquet",
    "matplotlib", "hypothesis", "pytest", "safetensors.torch", "pydantic", "yaml", "math_verify", "sympy",
)  # fmt: skip


class TableError(Exception):
    """An entry that does not apply; the message says which."""


@dataclass(frozen=True)
class Mutant:
    """`file` under distill/; `tests` under tests/; `why` it cannot be seen, where that is so."""

    file: str
    tests: tuple[str, ...]
    before: str
    after: str
    why: str = ""

    @property
    def name(self) -> str:
        short = [" ".join(text.split())[:70] for text in (self.before, self.after)]
        return f"{self.file}: {short[0]}  ->  {short[1] or '(nothing)'}"


def read_table(text: str) -> list[Mutant]:
    """Mutants of a table in the form that the head of tests/mutants.txt describes."""
    found: list[Mutant] = []
    file, tests, parts = "", (), {"-": [], "+": [], "=": []}

    def close() -> None:
        if parts["-"]:
            found.append(Mutant(file, tests, *("\n".join(parts[mark]) for mark in "-+=")))
        for lines in parts.values():
            lines.clear()

    for number, line in enumerate(text.splitlines(), 1):
        mark, body = line[:1], line[2:]
        if mark == "@":
            close()
            file, _, names = body.partition(":")
            tests = tuple(names.split())
        elif mark in parts:
            if mark == "-" and (parts["+"] or parts["="]):
                close()
            parts[mark].append(body)
        elif line.strip() and mark != "#":
            raise TableError(f"{TABLE.name}, line {number}: begins with none of @ - + = #")
    close()
    return found


def changed(mutant: Mutant, package: Path) -> str:
    """The text of its file with the change made. Raises TableError where it does not apply."""
    source = (package / mutant.file).read_text(encoding="utf-8")
    times = source.count(mutant.before)
    if times != 1:
        raise TableError(f"{mutant.name}: the text before is found {times} times, and must be once")
    if mutant.before.split() == mutant.after.split():
        raise TableError(f"{mutant.name}: the change changes nothing")
    text = source.replace(mutant.before, mutant.after)
    try:
        ast.parse(text)
    except SyntaxError as error:
        raise TableError(f"{mutant.name}: the change is no Python ({error})") from None
    return text


def problems(mutants: list[Mutant], root: Path = ROOT) -> list[str]:
    """Why entries do not apply to the code as it is; [] if all do."""
    found = [f"{m.name}: written twice" for m in set(mutants) if mutants.count(m) > 1]
    for mutant in mutants:
        missing = [t for t in mutant.tests if not (root / "tests" / t.partition("::")[0]).is_file()]
        if missing or not mutant.tests:
            found.append(f"{mutant.name}: no test {', '.join(missing) or 'is named'}")
        try:
            changed(mutant, root / "distill")
        except (TableError, OSError) as error:
            found.append(str(error))
    return found


# ---- running ------------------------------------------------------------------------------------------------


def copy_project(root: Path) -> None:
    """Package and tests as copies, all the rest as links: tests find their files where they expect them."""
    for path in ROOT.iterdir():
        if path.name in ("distill", "tests"):
            shutil.copytree(path, root / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        elif not path.name.startswith("."):
            (root / path.name).symlink_to(path)


def warm_up(root: Path) -> None:
    """Imports what all tests import, with the settings of tests/conftest.py."""
    os.environ |= {
        "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "DISTILL_THREADS": "1", "OMP_NUM_THREADS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "PYTHONPATH": str(root),
    }  # fmt: skip
    os.chdir(root)
    here = {str(ROOT), str(ROOT / "tests"), ""}
    sys.path[:] = [str(root), *(path for path in sys.path if path not in here)]
    for name in HEAVY:
        with contextlib.suppress(ImportError):
            __import__(name)
    import torch

    torch.set_num_threads(1)
    assert not any(name.partition(".")[0] == "distill" for name in sys.modules), (
        "the package is for the forks"
    )


def run_tests(root: Path, tests: tuple[str, ...], seconds: float) -> tuple[int | None, str]:
    """(pytest's exit code, None where it took too long; what it wrote), in a fork with a session of its own."""
    log = root / "mutant.log"
    child = os.fork()
    if child == 0:
        os.setsid()
        with open(log, "wb") as file:
            for stream in (1, 2):
                os.dup2(file.fileno(), stream)
        import pytest

        names = [str(root / "tests" / test) for test in tests]
        code = pytest.main(
            [*names, "-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:randomly"]
        )
        sys.stdout.flush()
        os._exit(int(code))
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return code, log.read_text(errors="replace")
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None, log.read_text(errors="replace")


def seen(root: Path, mutant: Mutant) -> bool:
    """Whether one of its tests fails. Raises TableError where nothing could be tried."""
    path = root / "distill" / mutant.file
    whole = path.read_text(encoding="utf-8")
    path.write_text(changed(mutant, root / "distill"), encoding="utf-8")
    compiled = list((path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"))
    try:
        for old in compiled:
            old.unlink()
        code, log = run_tests(root, mutant.tests, SECONDS)
    finally:
        path.write_text(whole, encoding="utf-8")
        for new in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
            new.unlink()
    if code in (3, 4, 5):
        raise TableError(f"{mutant.name}: pytest ended with {code}\n{log[-2000:]}")
    return code != 0


def baseline(root: Path, mutants: list[Mutant]) -> None:
    """Every named test file, without a change. Raises TableError for one that fails."""
    for test in dict.fromkeys(test for mutant in mutants for test in mutant.tests):
        begun = time.monotonic()
        code, log = run_tests(root, (test,), SECONDS)
        print(f"unchanged  {time.monotonic() - begun:5.1f} s  {test}", flush=True)
        if code != 0:
            raise TableError(f"{test} fails without any change\n{log[-3000:]}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Small wrong changes, one at a time: which are seen by a test?"
    )
    parser.add_argument("--only", default="", metavar="PATTERN", help="regular expression on file and text")
    parser.add_argument("--start", type=int, default=1, metavar="N", help="begin with the N-th of them")
    parser.add_argument("--no-baseline", action="store_true", help="the named tests are known to pass")
    options = parser.parse_args()
    mutants = read_table(TABLE.read_text(encoding="utf-8"))
    if wrong := problems(mutants):
        print("\n".join(wrong), file=sys.stderr)
        return 2
    pattern = re.compile(options.only)
    mutants = [m for m in mutants if pattern.search(f"{m.file}: {m.before} -> {m.after}")]
    mutants = mutants[options.start - 1 :]
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        root = Path(folder)
        copy_project(root)
        warm_up(root)
        try:
            if not options.no_baseline:
                baseline(root, mutants)
            unseen = []
            for number, mutant in enumerate(mutants, options.start):
                begun = time.monotonic()
                found = seen(root, mutant)
                if not found:
                    unseen.append(mutant)
                word = "seen" if found else ("explained" if mutant.why else "NOT SEEN")
                took = time.monotonic() - begun
                print(
                    f"{number:4}/{options.start - 1 + len(mutants)}  {word:9} {took:5.1f} s  {mutant.name}",
                    flush=True,
                )
        except TableError as error:
            print(error, file=sys.stderr)
            return 2
        finally:
            os.chdir(ROOT)
    explained = [m for m in unseen if m.why]
    open_ones = [m for m in unseen if not m.why]
    share = (len(mutants) - len(unseen)) / max(1, len(mutants) - len(explained))
    for mutant in open_ones:
        print(f"not seen: {mutant.name}")
    print(
        f"{len(mutants)} changes: {len(mutants) - len(unseen)} seen, {len(explained)} not seen and explained, "
        f"{len(open_ones)} not seen; {share:.1%} of those that can be seen"
    )
    return 1 if open_ones else 0


if __name__ == "__main__":
    sys.exit(main())
