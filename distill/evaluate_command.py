"""`distill evaluate`: a recipe's checkpoints, or any named ones side by side, on held-out problems.

    distill evaluate RECIPE [key=value ...]
    distill evaluate CHECKPOINT ... [--tasks T ...] [--teacher PATH] [--out DIR]

The options are keys of the recipe section `evaluate`, with its defaults.
"""

import argparse
import json
from pathlib import Path

from distill.command import Command, comma_separated, pair_arguments, run_arguments, with_pair
from distill.errors import UserError
from distill.recipe_commands import run_recipe

# Options of `distill evaluate` that are keys of the recipe section of that name.
_EVALUATE_KEYS = (
    "samples", "temperature", "top_p", "seed", "level", "max_new_tokens", "likelihood", "text",
    "precisions", "harness", "harness_include", "harness_limit",
)  # fmt: skip


def evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("targets", nargs="+", metavar="TARGET", help="a RECIPE and key=value changes to it, or checkpoints")
    add("--tasks", nargs="+", metavar="T",
        help="checkpoints: level, FILE, PRESET[:FILE], hub:org/name; prompts.key=value")  # fmt: skip
    add("--problems", type=int, metavar="N", help="checkpoints: problems per level, 210")
    _section_arguments(parser)
    add("--out", metavar="DIR", help="checkpoints: folder for metrics.json and answers/")
    pair_arguments(parser)
    run_arguments(parser)


def _section_arguments(parser: argparse.ArgumentParser) -> None:
    """Keys of the recipe section `evaluate`, with its defaults."""
    add = parser.add_argument
    add("--max-new-tokens", type=int, metavar="N", help="longest answer")
    add(
        "--samples", type=int, metavar="N", help="answers per problem, with --temperature: pass@k, majority@k"
    )
    add("--temperature", type=float, metavar="T", help="of sampled answers; 0 is greedy")
    add("--top-p", type=float, metavar="P", help="of sampled answers")
    add("--seed", type=int, metavar="N", help="of sampled answers and intervals")
    add("--level", type=float, metavar="L", help="of the verdicts, 0.95")
    add("--likelihood", action="store_true", default=None, help="multiple choice: options' likelihood too")
    add("--text", nargs="+", metavar="FILE", help=".txt or .jsonl: perplexity and bits per byte")
    add("--precision", dest="precisions", type=comma_separated, metavar="P,...",
        help="again in each: fp32, bf16, fp16, fp8-emulated, fp8-emulated-tensor")  # fmt: skip
    add("--harness", type=comma_separated, metavar="TASK,...", help="tasks of lm-evaluation-harness (extra)")
    add("--harness-include", metavar="DIR", help="a folder with further harness task files")
    add("--harness-limit", type=int, metavar="N", help="first documents of each harness task")
    add("--top-k", type=comma_separated, metavar="K,...", help="MoE: again with so many experts per token")
    add("--drop-expert", dest="drop", type=comma_separated, metavar="L:E,...",
        help="MoE: again without expert E of layer L; 1:3+2:0 drops two together")  # fmt: skip
    add(
        "--drop-each",
        action="store_true",
        default=None,
        help="MoE: without each expert in turn",
    )
    add("--route", type=comma_separated, metavar="HOW,...", help="MoE: again, random, uniform or shuffled")
    add("--usd-per-hour", type=float, metavar="USD", help="price of this device, for USD per million tokens")


def evaluate(arguments: argparse.Namespace) -> int:
    path, *overrides = arguments.targets
    if not path.endswith((".yaml", ".yml")):
        return evaluate_checkpoints(arguments)
    overrides = with_pair([*overrides, *evaluate_overrides(arguments)], arguments)
    return run_recipe("evaluate", path, overrides, arguments)


def evaluate_options(arguments: argparse.Namespace) -> dict[str, object]:
    """The keys of the section `evaluate` that were given as options."""
    given = {key: getattr(arguments, key) for key in _EVALUATE_KEYS}
    changes = {key: getattr(arguments, key) for key in ("top_k", "drop", "drop_each", "route")}
    given["interventions"] = {key: value for key, value in changes.items() if value is not None} or None
    return {key: value for key, value in given.items() if value is not None}


def evaluate_overrides(arguments: argparse.Namespace) -> list[str]:
    """The same as overrides of a recipe. Raises UserError for options that go with checkpoints alone."""
    alone = [name for name in ("tasks", "problems", "out") if getattr(arguments, name) is not None]
    if alone:
        raise UserError(
            f"--{alone[0]} goes with checkpoints; a recipe has evaluate.levels, evaluate.source and run_dir"
        )
    options = evaluate_options(arguments)
    # One by one, so that the keys of the recipe that no option names stay.
    options |= {f"interventions.{key}": value for key, value in options.pop("interventions", {}).items()}
    overrides = [f"evaluate.{key}={json.dumps(value)}" for key, value in options.items()]
    if arguments.usd_per_hour is not None:
        overrides.append(f"prices.usd_per_device_hour={arguments.usd_per_hour}")
    return overrides


def evaluate_checkpoints(arguments: argparse.Namespace) -> int:
    from distill.config import load_evaluate, load_prompts
    from distill.presets import PRESETS, split_task
    from distill.tasks import LEVELS

    chosen = arguments.tasks or list(LEVELS)
    keys = [w for w in [*arguments.targets, *chosen] if w.startswith("prompts.") and "=" in w]
    targets, tasks = ([w for w in given if w not in keys] for given in (arguments.targets, chosen))
    overrides = [t for t in targets if "=" in t]
    if overrides:
        raise UserError(
            f"'{overrides[0]}': only prompts.key=value goes with checkpoints, and --tasks, --problems, --out"
        )
    sources = [t for t in tasks if t not in LEVELS]
    missing = [
        f"--tasks {t}: neither a level, a preset ({', '.join([*LEVELS, *PRESETS])}), hub:org/name nor a file"
        for t in sources
        if not (t in PRESETS or t.startswith("hub:") or Path(split_task(t)[1]).is_file())
    ]
    if keys and not sources:
        missing.append(f"'{keys[0]}' says how to read a file, preset or hub dataset; name one with --tasks")
    if missing:
        raise UserError(*missing)
    problems = 210 if arguments.problems is None else arguments.problems
    levels = dict.fromkeys((t for t in tasks if t in LEVELS), problems)
    names: dict[str, str] = {}
    for target in targets:
        name = Path(target).name
        names[name if name not in names else target.strip("/").replace("/", "-")] = target
    out = Path(arguments.out or f"checkpoints/eval-{'-'.join(names)}")
    section = load_evaluate({"levels": levels, **evaluate_options(arguments)})
    prompts = load_prompts(keys)
    from distill.devices import pick_device
    from distill.dossier import build_dossier
    from distill.evaluate import evaluate_checkpoints
    from distill.models import quiet_libraries
    from distill.preflight import check_checkpoints
    from distill.report import summary_table
    from distill.shards import read_json

    quiet_libraries()
    judged = names if arguments.teacher is None else {**names, "teacher": arguments.teacher}
    check_checkpoints(judged, section, pick_device())
    evaluate_checkpoints(
        names, arguments.teacher, out, section, sources, arguments.redo, prompts, arguments.usd_per_hour
    )
    page = build_dossier(out)
    print()
    print(summary_table(read_json(out / "metrics.json")))
    print(f"\nmetrics: {out / 'metrics.json'}\ndossier: {page}")
    return 0


COMMANDS = [
    Command(
        "evaluate",
        "measure checkpoints on held-out problems: a recipe's, or any named ones",
        evaluate_arguments,
        evaluate,
    )
]
