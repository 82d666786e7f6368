"""The same small student trained in five precisions: how far does float8 move the loss from bf16's?

    OMP_NUM_THREADS=1 python recipes/benchmarks/precisions.py                          (10 minutes at most on one
    thread) python recipes/benchmarks/precisions.py --steps 400 --seeds 5 train.batch_size=64  (where bf16 has
    units)

DeepSeek-V3 (arXiv 2412.19437, section 3.3 and appendix B.1) reports a relative loss error of float8 against
bf16 below 0.25 %, curves smoothed by an exponential average of 0.9, for 16B and 230B parameters over a trillion
tokens. Here: the recipe of the embedded teacher (a DeepSeek-V3 MoE from random weights, 2 layers), the same
data, start and order in every precision, several seeds; real steps of the real loop, so it continues where it
was interrupted. One number has to stand beside the error: how far fp32 is from bf16, which is what two exact
enough runs differ by at this size. The paper's bound only says something where that is well below it.

Leaves recipes/results/fp8.json; the runs themselves go to checkpoints/precision-run, delete it to start afresh.
"""

import argparse
import json
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

from distill.bench.metrics import SMOOTHING, smoothed
from distill.config.recipe import Recipe, load_recipe
from distill.errors import DistillError
from distill.storage import PROJECT_ROOT, read_json, write_json

RECIPE = "recipes/teacher.yaml"
PRECISIONS = ("fp32", "bf16", "fp8-emulated", "fp8-emulated-tensor", "fp8-emulated-gradient-blocks")
SMALL = [  # of the teacher's recipe, what makes it minutes instead of an hour
    "prompts.levels={easy: 600, medium: 600, hard: 600}",
    "student.config.num_hidden_layers=2",
    "train.batch_size=8",
    "train.micro_batch_size=8",
    "train.checkpoint_every=0",
]
PAPER_BOUND = 0.0025


def relative_errors(curves: list[list[float]], reference: list[list[float]], last: int) -> dict[str, Any]:
    """Smoothed curves against the reference of the same seed, over their last `last` steps.

    per_seed: mean signed error of each seed, (loss - reference) / reference; mean over seeds; stderr of that mean
    (None for one seed); largest: the largest absolute error of any seed and step.
    """
    errors = [
        [(a - b) / b for a, b in zip(smoothed(curve)[-last:], smoothed(other)[-last:])]
        for curve, other in zip(curves, reference)
    ]
    per_seed = [statistics.fmean(e) for e in errors]
    stderr = statistics.stdev(per_seed) / len(per_seed) ** 0.5 if len(per_seed) > 1 else None
    return {
        "per_seed": per_seed,
        "mean": statistics.fmean(per_seed),
        "stderr": stderr,
        "largest": max(abs(x) for e in errors for x in e),
    }


def summary(curves: dict[str, list[list[float]]], last: int) -> dict[str, Any]:
    """{precision: final_loss per seed, relative_loss_error against bf16, below_paper_bound}."""
    found = {}
    for name, of_seeds in curves.items():
        error = relative_errors(of_seeds, curves["bf16"], last)
        found[name] = {
            "final_loss": [smoothed(curve)[-1] for curve in of_seeds],
            "relative_loss_error": error,
            "below_paper_bound": abs(error["mean"]) < PAPER_BOUND,
        }
    return found


def dataset(work: Path, overrides: list[str]) -> Path:
    """The training rows, made once by the recipe's own stages; returns the folder of that run."""
    from distill.data.filter import make_dataset
    from distill.data.prompts import make_prompts

    recipe = load_recipe(RECIPE, [*SMALL, *overrides, f"run_dir={work / 'data'}"])
    make_prompts(recipe)
    make_dataset(recipe)
    return recipe.path


def train_one(recipe: Recipe, data: Path) -> tuple[list[float], float, dict[str, Any]]:
    """(loss of each step, seconds, what the manifest says of the precision). Finished runs are read, not repeated."""
    from distill.training.arms import train_arms

    if not (recipe.path / "dataset").is_dir():
        shutil.copytree(data / "dataset", recipe.path / "dataset")
    train_arms(recipe)
    manifest = read_json(recipe.path / "student" / "manifest.json")
    lines = (recipe.path / "student" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines], manifest["seconds"], manifest["precision"]


def precision_run(steps: int, seeds: int, work: Path, overrides: list[str]) -> dict[str, Any]:
    """Train every precision from every seed and compare. Raises UserError and RunError of the stages."""
    from distill.devices import describe_device, pick_device
    from distill.stages import versions

    data = dataset(work, overrides)
    curves: dict[str, list[list[float]]] = {name: [] for name in PRECISIONS}
    seconds, numerics = dict.fromkeys(PRECISIONS, 0.0), {}
    schedule = [f"train.steps={steps}", f"train.warmup_steps={max(1, steps // 10)}"]
    for seed in range(seeds):
        for name in PRECISIONS:  # precisions inside seeds: a machine that slows down slows all of them
            run = [f"run_dir={work / f'{name}-{seed}'}", f"seed={seed}", f"train.precision={name}"]
            recipe = load_recipe(RECIPE, [*SMALL, *schedule, *overrides, *run])
            curve, spent, numerics[name] = train_one(recipe, data)
            curves[name].append(curve)
            seconds[name] += spent
    last = max(1, steps // 4)
    results = summary(curves, last)
    for name, result in results.items():
        result["seconds_per_step"] = round(seconds[name] / (steps * seeds), 4)
        result["float8_share"] = numerics[name].get("layers", {}).get("float8_share")
    between = [smoothed(curve)[-1] for curve in curves["bf16"]]
    return {
        "recipe": RECIPE,
        "overrides": [*SMALL, *overrides],
        "steps": steps,
        "seeds": seeds,
        "compared_steps": last,
        "smoothing": SMOOTHING,
        "paper_bound": PAPER_BOUND,
        "seeds_differ_by": statistics.stdev(between) / statistics.fmean(between) if seeds > 1 else None,
        "device": describe_device(pick_device()),
        "versions": versions(),
        "precisions": results,
    }


def table(results: dict[str, Any]) -> str:
    """For people: one line per precision."""
    lines = [f"{'precision':30} {'loss':>8} {'error vs bf16':>14} {'stderr':>8} {'largest':>8} {'s/step':>7}"]
    for name, result in results["precisions"].items():
        error = result["relative_loss_error"]
        stderr = "" if error["stderr"] is None else f"{error['stderr']:.3%}"
        lines.append(
            f"{name:30} {statistics.fmean(result['final_loss']):8.4f} {error['mean']:+14.3%} {stderr:>8} "
            f"{error['largest']:8.3%} {result['seconds_per_step']:7.3f}"
        )
    return "\n".join([*lines, f"paper (16B, 230B): below {results['paper_bound']:.2%}"])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python recipes/benchmarks/precisions.py", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps of each run")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each precision")
    parser.add_argument("--work", type=Path, default=PROJECT_ROOT / "checkpoints" / "precision-run")
    parser.add_argument("--out", type=Path, default=PROJECT_ROOT / "recipes" / "results" / "fp8.json")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys, for all runs")
    given = parser.parse_args(arguments)
    if given.steps < 2 or given.seeds < 1:
        parser.error("--steps must be at least 2 and --seeds at least 1")
    try:
        results = precision_run(given.steps, given.seeds, given.work.resolve(), given.overrides)
    except DistillError as error:
        print("\n".join(error.problems), file=sys.stderr)
        return error.exit_code
    given.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(given.out, results)
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
