"""What the workshop's lessons stand on: a budget, a folder, ranges for numbers, exercises that check themselves.

    from distill.lessons import begin, expect, exercise, scaled
    folder = begin(1)                                    # seed, quiet libraries, figures; where this lesson may write
    steps = scaled(80, 8)                                # 80, or 8 with DISTILL_LESSON_BUDGET=short
    expect("teacher, hard problems", accuracy, 0.9, 1.0)           # prints the value beside its range
    exercise("1.1", lambda: mine(3) == 9, "square it")             # "solved", or "not solved yet" and the hint

A learner's kernel never stops at a number outside its range or at an exercise not done: both are printed and kept in
`EXPECTED` and `EXERCISES`, which `build` and the tests read. The variables: DISTILL_LESSON_BUDGET=short
cuts steps and problems so that a test can run every lesson; DISTILL_LESSON_DIR is where runs go instead of
checkpoints/workshop.
"""

import contextlib
import io
import json
import os
import shutil
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from distill.errors import UserError

# tqdm in a notebook without ipywidgets falls back to text by itself.
warnings.filterwarnings("ignore", message="IProgress not found")

BUDGET = "DISTILL_LESSON_BUDGET"
FOLDER = "DISTILL_LESSON_DIR"
T = TypeVar("T")


@dataclass(frozen=True)
class Expectation:
    """One number of a lesson. `checked` is false where the short budget is too short to say anything."""

    name: str
    value: float
    low: float
    high: float
    checked: bool

    @property
    def met(self) -> bool:
        return self.low <= self.value <= self.high


EXPECTED: list[Expectation] = []  # of the lesson in progress
EXERCISES: dict[str, bool] = {}  # exercise -> solved


def short_budget() -> bool:
    """Whether DISTILL_LESSON_BUDGET asks for the short run. Raises UserError for another word."""
    word = os.environ.get(BUDGET, "full")
    if word not in ("full", "short"):
        raise UserError(f"{BUDGET}={word!r}: use full (what a learner runs) or short (what the tests run)")
    return word == "short"


def scaled(full: T, short: T) -> T:
    """The first in a lesson, the second where a test runs it."""
    return short if short_budget() else full


def begin(lesson: int) -> Path:
    """Start lesson `lesson`: nothing expected or solved yet, fixed seed, quiet libraries; returns its folder."""
    import matplotlib.pyplot as plt
    import torch

    from distill.devices import pick_device
    from distill.storage import PROJECT_ROOT

    EXPECTED.clear()
    EXERCISES.clear()
    pick_device("cpu")
    torch.manual_seed(0)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs the network
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    plt.rcParams.update({"figure.figsize": (6.5, 2.8), "figure.dpi": 72, "savefig.bbox": "tight"})
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True})
    plt.rcParams.update({"grid.alpha": 0.3, "font.size": 10, "legend.frameon": False})
    root = Path(os.environ.get(FOLDER) or PROJECT_ROOT / "checkpoints" / "workshop")
    folder = root / f"lesson{lesson}{scaled('', '-short')}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def expect(
    name: str, value: float, low: float, high: float, short: tuple[float, float] | bool = False
) -> None:
    """Print `value` beside the range it should lie in, and keep both.

    The range is of the full budget. `short`: the range in the short one, True for the same, False if none holds.
    """
    value, checked = float(value), True
    if short_budget():
        checked = short is not False
        low, high = short if isinstance(short, tuple) else (low, high)
    found = Expectation(name, value, float(low), float(high), checked)
    EXPECTED.append(found)
    verdict = "ok" if found.met else "OUTSIDE: see 'What commonly goes wrong'"
    print(f"{name}: {value:.4g}   (expected {low:g} to {high:g}: {verdict if checked else 'short budget'})")


def exercise(number: str, test: Callable[[], Any], hint: str) -> None:
    """Run `test` on what the learner wrote and print whether it is solved; never raises for a wrong answer."""
    try:
        solved, reason = bool(test()), "not yet right"
    except Exception as error:  # the learner's code may do anything; the lesson goes on
        solved, reason = False, f"not solved yet ({type(error).__name__})"
    EXERCISES[number] = solved
    print(f"exercise {number}: {'solved' if solved else f'{reason}. Hint: {hint}'}")


def account() -> dict[str, Any]:
    """What this lesson measured, as plain JSON: for `build` and the tests."""
    import torch

    expected = [asdict(e) | {"met": e.met} for e in EXPECTED]
    used = {"cpu_seconds": round(time.process_time(), 1), "threads": torch.get_num_threads()}
    return {"expected": expected, "exercises": dict(EXERCISES), **used}


# ---- problems, answers, runs ---------------------------------------------------------------------------


def held_out_problems(
    per_level: dict[str, int], seed: int = 0, families: list[str] | None = None
) -> list[dict]:
    """Problems of the test split, as {"prompt_id", "family", "level", "messages", "answer", "verifier", ...}."""
    from distill.config.data import Prompts
    from distill.data.prompts import task_prompts

    chosen = Prompts(families=families) if families else Prompts()
    return task_prompts("test", per_level, chosen, seed)


def ask(model, tokenizer, problems: list[dict], **how) -> list[dict]:
    """Answers with verdicts, one row per (problem, sample); `how` are keys of the recipe section `evaluate`.

    Greedy unless `temperature` is given. A row has "text", "verdict", "tokens", "prompt_id", "family", "level", ...
    """
    from distill.config.recipe import load_evaluate
    from distill.evaluation.answers import answer_problems

    section = load_evaluate({"max_new_tokens": 80, **how})
    return answer_problems(model, tokenizer, problems, "", section, bar=False)[0]


def accuracy(rows: list[dict]) -> float:
    """Share of rows whose verdict is "correct"."""
    return sum(row["verdict"] == "correct" for row in rows) / len(rows)


def experiment(folder: Path, overrides: list[str], data: Path | None = None, command: str = "train",
               recipe: str = "recipes/demo.yaml") -> Path:  # fmt: skip
    """A shipped recipe with `overrides`, run as `distill COMMAND RECIPE run_dir=FOLDER ...` does; returns `folder`.

    data: a run whose prompts, answers and dataset are used instead of making them again. A folder that was made
    with other settings is made anew: it is the lesson's own.
    """
    from distill import pipeline
    from distill.config.recipe import load_recipe

    loaded = load_recipe(recipe, [*overrides, f"run_dir={folder}"])
    for stage in ("prompts", "generations", "dataset") if data else ():
        shutil.rmtree(folder / stage, ignore_errors=True)
        shutil.copytree(data / stage, folder / stage)
    with contextlib.redirect_stdout(io.StringIO()):  # which precision, what trains: in the manifest as well
        pipeline.run(loaded, command, redo=True, say=lambda _line: None)
    return folder


def step_log(arm: Path) -> list[dict]:
    """One record per optimizer step of a trained arm, as RUN_DIR/student: "step", "loss", "grad_norm", ..."""
    return [json.loads(line) for line in (arm / "metrics.jsonl").read_text().splitlines()]
