"""Small wrong changes, one at a time: would any test notice? The measure of the tests themselves.

    python tests/mutants.py                          # all of tests/mutants.txt; about an hour on one core
    python tests/mutants.py --only evaluation/stats  # those whose file or text has this in it
    python tests/mutants.py --sample 300 --seed 1 --record seen.jsonl    # some of them, and to go on after a stop

Every change of tests/mutants.txt is made in a copy of the package, and the test files named with it are run there
until the first one fails. A change is *seen* if a test fails, cannot be collected or takes longer than the limit.
The test that failed must pass without the change, or nothing could be told: it is run once more for that.

Not part of the suite, which checks only that every entry still applies (tests/faults/test_mutants.py). Text that is
found twice, or not at all, is refused: the table goes with the code. Tests run in a fork of one warm process, so that
torch and transformers are imported once.
"""

import argparse
import ast
import contextlib
import functools
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = Path(__file__).with_name("mutants.txt")
# A change that makes tests work longer has been noticed. Seconds of work, since on a busy machine the clock says
# nothing; a test that waits for ever does no work, and the clock stops it.
SECONDS, BY_THE_CLOCK = 240, 2400
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


@functools.lru_cache(maxsize=8)
def _statements(source: str) -> list[tuple[int, int]]:
    """(from, to) of each statement of a module, as places in its text."""
    at = [0, *itertools.accumulate(len(line) for line in source.splitlines(keepends=True))]
    found = []
    for node in ast.parse(source).body:
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        found.append((at[first - 1], at[node.end_lineno]))
    return found


def _piece(mutant: Mutant, source: str) -> str:
    """Of the file with the change what has to be read again: one statement where the change lies within it."""
    place = source.index(mutant.before)
    for start, end in _statements(source):
        if start <= place and place + len(mutant.before) <= end:
            return source[start:end].replace(mutant.before, mutant.after)
    return source.replace(mutant.before, mutant.after)


def changed(mutant: Mutant, package: Path) -> str:
    """The text of its file with the change made. Raises TableError where it does not apply."""
    source = (package / mutant.file).read_text(encoding="utf-8")
    times = source.count(mutant.before)
    if times != 1:
        raise TableError(f"{mutant.name}: the text before is found {times} times, and must be once")
    if mutant.before.split() == mutant.after.split():
        raise TableError(f"{mutant.name}: the change changes nothing")
    try:
        ast.parse(_piece(mutant, source))
    except SyntaxError as error:
        raise TableError(f"{mutant.name}: the change is no Python ({error})") from None
    return source.replace(mutant.before, mutant.after)


def problems(mutants: list[Mutant], root: Path = ROOT) -> list[str]:
    """Why entries do not apply to the code as it is; [] if all do."""
    found = [f"{m.name}: written twice" for m, times in Counter(mutants).items() if times > 1]
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
    """What names files by their place in the project as copies, all the rest as links."""
    for path in ROOT.iterdir():
        if path.name in ("distill", "tests", "recipes"):
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


def run_tests(root: Path, tests: tuple[str, ...]) -> tuple[int | None, str]:
    """(pytest's exit code, None where it took too long; what it wrote), in a fork with a session of its own."""
    log = root / "mutant.log"
    child = os.fork()
    if child == 0:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        with open(log, "wb") as file:
            for stream in (1, 2):
                os.dup2(file.fileno(), stream)
        import pytest

        names = [f"{root}/tests/{test}" for test in tests]  # a Path would make one slash of a URL's two
        code = pytest.main(
            [*names, "-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:randomly"]
        )
        sys.stdout.flush()
        os._exit(int(code))
    end = time.monotonic() + BY_THE_CLOCK
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            with contextlib.suppress(OSError):  # what it has left running
                os.killpg(child, signal.SIGKILL)
            return (code if code >= 0 else None), log.read_text(errors="replace")
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None, log.read_text(errors="replace")


class Trial:
    """Changes of the package in `root`, one at a time."""

    def __init__(self, root: Path):
        self.root = root
        self._passes: set[str] = set()  # tests that are known to pass without a change

    def seen(self, mutant: Mutant) -> str:
        """The test that fails, "" for none. Raises TableError where nothing could be tried."""
        path = self.root / "distill" / mutant.file
        whole = path.read_text(encoding="utf-8")
        path.write_text(changed(mutant, self.root / "distill"), encoding="utf-8")
        compiled = list((path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"))
        try:
            for old in compiled:
                old.unlink()
            code, log = run_tests(self.root, mutant.tests)
        finally:
            path.write_text(whole, encoding="utf-8")
            for new in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
                new.unlink()
        if code in (3, 4, 5):
            raise TableError(f"{mutant.name}: pytest ended with {code}\n{log[-2000:]}")
        if code == 0:
            return ""
        told = re.search(r"^(?:FAILED|ERROR) tests/(.+?)(?: - .*)?$", log, re.M)
        if not told:
            return "took too long" if code is None else "ended without a word"
        self._pass(told[1])
        return told[1]

    def _pass(self, test: str) -> None:
        """Raises TableError where this test fails without any change."""
        if test not in self._passes:
            code, log = run_tests(self.root, (test,))
            if code != 0:
                raise TableError(f"{test} fails without any change\n{log[-3000:]}")
            self._passes.add(test)


def recorded(record: Path | None) -> set[tuple[str, str, str]]:
    """(file, before, after) of the changes that a record has as seen: they need not be tried again."""
    if record is None or not record.is_file():
        return set()
    lines = [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()]
    return {(line["file"], line["before"], line["after"]) for line in lines if line["outcome"] == "seen"}


def chosen(mutants: list[Mutant], options: argparse.Namespace) -> list[Mutant]:
    """Those that the command asks for, in the order of the table; a sample in that of its choice."""
    pattern = re.compile(options.only)
    mutants = [m for m in mutants if pattern.search(f"{m.file}: {m.before} -> {m.after}")]
    if options.sample is not None and options.sample < len(mutants):
        mutants = random.Random(options.seed).sample(mutants, options.sample)
    return mutants[options.start - 1 :]


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Small wrong changes, one at a time: which are seen by a test?"
    )
    parser.add_argument("--only", default="", metavar="PATTERN", help="regular expression on file and text")
    parser.add_argument("--start", type=int, default=1, metavar="N", help="begin with the N-th of them")
    parser.add_argument("--sample", type=int, metavar="N", help="N of them, chosen at random")
    parser.add_argument("--seed", type=int, default=1, help="of that choice")
    parser.add_argument(
        "--record", type=Path, metavar="FILE", help="append outcomes; what it has as seen stays"
    )
    options = parser.parse_args()
    options.record = options.record and options.record.resolve()
    mutants = read_table(TABLE.read_text(encoding="utf-8"))
    if wrong := problems(mutants):
        print("\n".join(wrong), file=sys.stderr)
        return 2
    mutants = chosen(mutants, options)
    known = recorded(options.record)
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        root = Path(folder)
        copy_project(root)
        warm_up(root)
        try:
            trial, unseen, untried = Trial(root), [], []
            for number, mutant in enumerate(mutants, options.start):
                if (mutant.file, mutant.before, mutant.after) in known:
                    continue
                begun = time.monotonic()
                try:
                    found = trial.seen(mutant)
                except TableError as error:  # the others can still be tried
                    untried.append(mutant)
                    print(f"{number:4}  NOT TRIED  {mutant.name}\n{error}", file=sys.stderr, flush=True)
                    continue
                if not found:
                    unseen.append(mutant)
                word = "seen" if found else ("explained" if mutant.why else "NOT SEEN")
                took = time.monotonic() - begun
                print(
                    f"{number:4}/{options.start - 1 + len(mutants)}  {word:9} {took:5.1f} s  {mutant.name}  {found}",
                    flush=True,
                )
                if options.record:
                    entry = {"file": mutant.file, "before": mutant.before, "after": mutant.after}
                    entry |= {"outcome": word, "by": found}
                    with options.record.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(entry) + "\n")
        finally:
            os.chdir(ROOT)
    for mutant in untried:
        print(f"not tried: {mutant.name}")
    mutants = [m for m in mutants if m not in untried]
    explained = [m for m in unseen if m.why]
    open_ones = [m for m in unseen if not m.why]
    share = (len(mutants) - len(unseen)) / max(1, len(mutants) - len(explained))
    for mutant in open_ones:
        print(f"not seen: {mutant.name}")
    print(
        f"{len(mutants)} changes: {len(mutants) - len(unseen)} seen, {len(explained)} not seen and explained, "
        f"{len(open_ones)} not seen; {share:.1%} of those that can be seen"
    )
    return 2 if untried else 1 if open_ones else 0


if __name__ == "__main__":
    sys.exit(main())
