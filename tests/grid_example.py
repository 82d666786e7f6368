"""The tiny grid on the shipped pair that the tests of distill/bench run."""

import contextlib
import os
from concurrent.futures import Future

import yaml
from conftest import ROOT

TINY = {
    "title": "Tiny",
    "recipe": str(ROOT / "recipes" / "demo.yaml"),
    "set": {
        "teacher.model": str(ROOT / "checkpoints" / "teacher"),
        "student.model": str(ROOT / "checkpoints" / "base"),
        "prompts.levels": {"easy": 14},
        "generate.samples": 1,
        "train.objectives": [{"name": "cross_entropy"}],
        "train.steps": 2,
        "train.warmup_steps": 1,
        "train.batch_size": 4,
        "evaluate.levels": {"easy": 7},
        "evaluate.speed": False,
        "evaluate.max_new_tokens": 40,
        "prices.usd_per_device_hour": 0.05,
    },
    "budgets": {"small": {"seeds": 1}, "full": {"seeds": 3}},
    "arms": {
        "base": {"checkpoint": str(ROOT / "checkpoints" / "base")},
        "teacher": {
            "checkpoint": str(ROOT / "checkpoints" / "teacher"),
            "set": {"evaluate.interventions.top_k": [1, 2], "evaluate.interventions.problems": 7},
        },
        "control": {"set": {"filter.completions": "reference_answer"}},
        "sequence": {},
        "more": {"start": "sequence", "set": {"train.steps": 3}, "budget": "full"},
    },
    "claims": [
        {
            "id": "gain", "group": "G", "sentence": "s <b>", "hypothesis": "h", "metric": "accuracy.easy",
            "effect": {"sequence": 1, "control": -1}, "expect": "greater",
        },
        {
            "id": "tokens", "group": "G", "sentence": "s", "hypothesis": "h", "metric": "train.tokens",
            "effect": {"sequence": 1, "control": -1}, "expect": "greater", "equal": ["tokens"],
        },
        {
            "id": "later", "group": "G", "sentence": "s", "hypothesis": "h", "metric": "accuracy.easy",
            "effect": {"more": 1, "sequence": -1}, "expect": "greater", "equal": ["prompts"], "axis": "more steps",
            "budget": "full",
        },
    ],
    "curves": [
        {"title": "C", "x": "train.flops", "y": "accuracy.easy", "series": {"s": ["sequence", "more"]}},
        {
            "title": "D", "x": "cost.usd_per_million", "y": "accuracy.easy", "front": True,
            "series": {"base": ["base"], "s": ["sequence"], "teacher": ["teacher@k1", "teacher@k2"]},
        },
    ],
}  # fmt: skip


def written(tmp_path, **changes) -> str:
    """The path of that grid as a file, with changes; `set` is added to."""
    path = tmp_path / "bench.yaml"
    content = {"run_dir": str(tmp_path / "grid"), **TINY, **changes}
    content["set"] = {**TINY["set"], **changes.get("set", {})}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return str(path)


class Inline:
    """In the place of a bench's ProcessPoolExecutor: tasks in this process, since a worker imports torch anew."""

    def __init__(self, *_, initializer, initargs):
        initializer(*initargs)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False

    def submit(self, function, *arguments):
        future = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future


@contextlib.contextmanager
def in_this_process():
    """`run_bench` inside starts no worker; how much is printed and the environment are as before when it ends."""
    from distill import console
    from distill.bench import run

    before, pool, verbosity = dict(os.environ), run.ProcessPoolExecutor, console._verbosity
    run.ProcessPoolExecutor = Inline
    try:
        yield
    finally:
        run.ProcessPoolExecutor = pool
        console.set_verbosity(verbosity)
        os.environ.clear()
        os.environ.update(before)
