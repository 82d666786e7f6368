"""The commands that run recipes: demo, run, generate, filter, train, evaluate, report, bench.

    distill run RECIPE [key=value ...]
    distill train RECIPE --dry-run                     what it will cost, from configs alone
    distill evaluate RECIPE [key=value ...]            the recipe's own checkpoints
    distill evaluate CHECKPOINT ... [--tasks T ...] [--teacher PATH] [--out DIR]
    distill bench RECIPE [--budget NAME] [--jobs N]    a grid of arms and seeds over a recipe, with verdicts

The options of `evaluate` are keys of the recipe section of that name, with its defaults.
"""

import argparse
import json
import sys
from pathlib import Path

from distill import console
from distill.commands.artifacts import remember
from distill.commands.command import (
    Command,
    amount,
    comma_separated,
    is_override,
    json_argument,
    language_argument,
    override_arguments,
    pair_arguments,
    recipe_arguments,
    run_arguments,
    seed,
    whole,
    with_pair,
)
from distill.errors import UserError
from distill.files import check_targets


def demo_arguments(parser: argparse.ArgumentParser) -> None:
    override_arguments(parser)
    run_arguments(parser)
    language_argument(parser)


def demo(arguments: argparse.Namespace) -> int:
    return run_recipe("run", "recipes/demo.yaml", with_pair(arguments.overrides, arguments), arguments)


def stage_arguments(parser: argparse.ArgumentParser) -> None:
    recipe_arguments(parser)
    run_arguments(parser)


def page_arguments(parser: argparse.ArgumentParser) -> None:
    stage_arguments(parser)
    language_argument(parser)


def stage(arguments: argparse.Namespace) -> int:
    """The command is the name of what is run."""
    overrides = with_pair(arguments.overrides, arguments)
    return run_recipe(arguments.command, arguments.recipe, overrides, arguments)


def filter_arguments(parser: argparse.ArgumentParser) -> None:
    stage_arguments(parser)
    parser.add_argument("--explain", action="store_true", help="per rule: its count and examples")


def filter_rows(arguments: argparse.Namespace) -> int:
    code = stage(arguments)
    if arguments.explain and not arguments.dry_run and console.first_process():
        from distill.config.recipe import load_recipe
        from distill.data.filter import explain

        print(explain(load_recipe(arguments.recipe, with_pair(arguments.overrides, arguments)).path))
    return code


def run_recipe(command: str, path: str, overrides: list[str], arguments: argparse.Namespace) -> int:
    """One command's stages of the recipe at `path`; returns the exit code."""
    from distill.config.recipe import load_recipe, resolved

    recipe = load_recipe(path, overrides)
    if command == "report" and not arguments.dry_run:
        _report(recipe.path, arguments.lang)
        return 0
    console.quiet_libraries()
    if arguments.dry_run:
        from distill.doctor.memory import derived
        from distill.training.arms import planned_base

        with planned_base(recipe) as planned:
            forecast = derived(planned)
        if console.first_process():
            print(resolved(recipe))
            for name, value in forecast.items():
                print(f"# {name}: {_shown(value)}")
        return 0
    from distill import pipeline
    from distill.doctor.checks import check_recipe

    if recipe.student.made_from:  # what is checked next is what starts from it
        pipeline.run(recipe, "base", arguments.redo, say=console.say)
    check_recipe(recipe, command)
    pipeline.run(recipe, command, arguments.redo, say=console.say)
    if not console.first_process():  # pages are one process's work
        return 0
    if command in ("run", "train", "evaluate"):
        teacher = recipe.teacher.model if recipe.teacher else None
        remember(
            recipe.student.model, teacher, *(recipe.path / arm for arm in ("base", "control", "student"))
        )
    if command == "run":
        _report(recipe.path, arguments.lang)
    elif command == "evaluate":
        _dossier(recipe.path / "eval", arguments.lang)
    return 0


def _shown(value: object) -> str:
    """A forecast for people; what nothing tells is unknown."""
    return "unknown" if value is None else value if isinstance(value, str) else f"{value:,}"


def _dossier(out: Path, language: str) -> None:
    from distill.report.dossier import build_dossier

    print(f"dossier: {build_dossier(out, language)}")


def _report(run_dir: Path, language: str) -> None:
    from distill.report.dossier import build_dossier
    from distill.report.report import build_report, summary_table
    from distill.storage import read_json

    page = build_report(run_dir, language)
    print()
    print(summary_table(read_json(run_dir / "eval" / "metrics.json")))
    print(f"\nreport: {page}\ndossier of the checkpoints: {build_dossier(run_dir / 'eval', language)}")


# Options of `distill evaluate` that are keys of the recipe section of that name.
_EVALUATE_KEYS = (
    "samples", "temperature", "top_p", "seed", "level", "max_new_tokens", "likelihood", "text",
    "precisions", "harness", "harness_include", "harness_limit", "batch_size", "stop", "speed",
)  # fmt: skip


def evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("targets", nargs="+", metavar="TARGET", help="a RECIPE and key=value changes to it, or checkpoints")
    add("--tasks", nargs="+", metavar="T",
        help="checkpoints: level, FILE, PRESET[:FILE], hub:org/name; prompts.key=value")  # fmt: skip
    add("--problems", "--limit", dest="problems", type=whole, metavar="N",
        help="checkpoints: problems per level (210), first rows of a file, preset or hub set (all)")  # fmt: skip
    add("--threads", type=whole, default=None, metavar="N", help="CPU threads; every core if not given")
    _section_arguments(parser)
    add("--out", metavar="DIR", help="checkpoints: folder for metrics.json and answers/")
    pair_arguments(parser)
    run_arguments(parser)
    language_argument(parser)


def _section_arguments(parser: argparse.ArgumentParser) -> None:
    """Keys of the recipe section `evaluate`, with its defaults."""
    add = parser.add_argument
    add("--max-new-tokens", type=whole, metavar="N", help="longest answer")
    add(
        "--batch-size",
        type=whole,
        metavar="N",
        help="answers at a time, at most; fewer where memory is short",
    )
    add("--stop", nargs="+", metavar="TEXT", help="an answer also ends before one of these")
    add("--no-speed", dest="speed", action="store_false", default=None, help="without timing the model")
    add(
        "--samples",
        type=whole,
        metavar="N",
        help="answers per problem, with --temperature: pass@k, majority@k",
    )
    add("--temperature", type=amount, metavar="T", help="of sampled answers; 0 is greedy")
    add("--top-p", type=amount, metavar="P", help="of sampled answers")
    add("--seed", type=seed, metavar="N", help="of sampled answers and intervals")
    add("--level", type=amount, metavar="L", help="of the verdicts, 0.95")
    add("--likelihood", action="store_true", default=None, help="multiple choice: options' likelihood too")
    add("--text", nargs="+", metavar="FILE", help=".txt or .jsonl: perplexity and bits per byte")
    add("--precision", dest="precisions", type=comma_separated, metavar="P,...",
        help="again in each: fp32, bf16, fp16, fp8-emulated, nvfp4-emulated, ... (docs/training.md)")  # fmt: skip
    add("--harness", type=comma_separated, metavar="TASK,...", help="tasks of lm-evaluation-harness (extra)")
    add("--harness-include", metavar="DIR", help="a folder with further harness task files")
    add("--harness-limit", type=whole, metavar="N", help="first documents of each harness task")
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
    add("--usd-per-hour", type=amount, metavar="USD", help="price of this device, for USD per million tokens")


def evaluate(arguments: argparse.Namespace) -> int:
    path, *overrides = arguments.targets
    if not path.endswith((".yaml", ".yml")):
        return evaluate_checkpoints_command(arguments)
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
    if arguments.threads is not None:
        overrides.append(f"threads={arguments.threads}")
    if arguments.usd_per_hour is not None:
        overrides.append(f"prices.usd_per_device_hour={arguments.usd_per_hour}")
    return overrides


def evaluate_checkpoints_command(arguments: argparse.Namespace) -> int:
    from distill.config.recipe import load_evaluate, load_prompts
    from distill.tasks.corpus import PRESETS, split_task
    from distill.tasks.problems import LEVELS

    chosen = arguments.tasks or list(LEVELS)
    keys = [w for w in [*arguments.targets, *chosen] if w.startswith("prompts.") and is_override(w)]
    targets, tasks = ([w for w in given if w not in keys] for given in (arguments.targets, chosen))
    overrides = [t for t in targets if is_override(t)]
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
    if not arguments.tasks and arguments.problems is None and arguments.harness:
        tasks = []  # the harness alone: its tasks are what was asked for
    problems = 210 if arguments.problems is None else arguments.problems
    levels = dict.fromkeys((t for t in tasks if t in LEVELS), problems)
    names: dict[str, str] = {}
    for target in targets:
        name = Path(target).name
        names[name if name not in names else target.strip("/").replace("/", "-")] = target
    out = Path(arguments.out or f"checkpoints/eval-{'-'.join(names)}")
    check_targets(folder_out=out)
    section = load_evaluate({"levels": levels, **evaluate_options(arguments)})
    prompts = load_prompts(keys)
    if sources and arguments.problems is not None and prompts.limit is None:
        prompts = load_prompts([*keys, f"prompts.limit={arguments.problems}"])
    console.quiet_libraries()
    from distill.devices import pick_device
    from distill.doctor.checks import check_checkpoints
    from distill.evaluation.evaluate import evaluate_checkpoints
    from distill.report.dossier import build_dossier
    from distill.report.report import summary_table
    from distill.storage import read_json

    judged = names if arguments.teacher is None else {**names, "teacher": arguments.teacher}
    threads = arguments.threads or 0
    if threads < 0:
        raise UserError(f"--threads {threads}: at least 1")
    check_checkpoints(judged, section, pick_device(threads=threads))
    evaluate_checkpoints(
        names,
        arguments.teacher,
        out,
        section,
        sources,
        arguments.redo,
        prompts,
        arguments.usd_per_hour,
        threads,
    )
    if not console.first_process():
        return 0
    remember(*judged.values())
    page = build_dossier(out, arguments.lang)
    print()
    print(summary_table(read_json(out / "metrics.json")))
    print(f"\nmetrics: {out / 'metrics.json'}\ndossier: {page}")
    return 0


def part(text: str) -> tuple[int, int]:
    """The second of three parts, "2/3", as (2, 3)."""
    mine, slash, of = text.partition("/")
    if not (slash and mine.isdecimal() and of.isdecimal() and 1 <= int(mine) <= int(of)):
        raise argparse.ArgumentTypeError(f"'{text}' is no part; 2/3 is the second of three")
    return int(mine), int(of)


def bench_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("recipe", metavar="RECIPE", help="a grid, as recipes/claims.yaml")
    add("--budget", metavar="NAME", help="which of its budgets, as small or full; the first if not given")
    add("--jobs", type=whole, default=0, metavar="N", help="runs at a time; one per core if not given")
    add("--redo", action="store_true", help="rebuild what was made from other inputs")
    add("--part", type=part, metavar="K/N", help="every N-th seed from the K-th on, for one of N machines")
    add("--tune", action="store_true", help="choose learning rates first, on seeds of their own")
    add("--dry-run", action="store_true", help="print the runs it would make, and how long they will take")
    add("--out", metavar="FILE", help="write the JSON there too")
    language_argument(parser)
    json_argument(parser)


def bench_command(arguments: argparse.Namespace) -> int:
    if arguments.jobs > 1024:
        raise UserError(f"--jobs {arguments.jobs}: at most 1024")
    check_targets(file_out=arguments.out)
    found, text = _grid(arguments)
    if arguments.out and not arguments.dry_run:
        from distill.files import write_atomic

        write_atomic(Path(arguments.out), json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2) if arguments.json else text)
    return 0


def _grid(arguments: argparse.Namespace) -> tuple[dict, str]:
    from distill.bench.run import describe_plan, run_bench, run_tuning

    if arguments.dry_run:
        import yaml

        found = describe_plan(arguments.recipe, arguments.budget, arguments.tune)
        return found, yaml.safe_dump(found, sort_keys=False, allow_unicode=True).rstrip()
    # With --json, standard output is the JSON alone.
    say = (lambda line: print(line, file=sys.stderr, flush=True)) if arguments.json else console.say
    if arguments.tune:
        from distill.bench.plan import tuning_text

        found = run_tuning(arguments.recipe, arguments.jobs, arguments.redo, say)
        return found, tuning_text(found)
    from distill.bench.page import claims_text

    asked = (arguments.recipe, arguments.budget, arguments.jobs, arguments.redo, say, arguments.lang)
    found = run_bench(*asked, arguments.part or (1, 1))
    if "records" in found:
        return found, (
            f"part {found['part']} is done: {found['finished']} of {found['tasks']} tasks. Copy {found['records']} "
            "into the grid's folder on one of the machines, as records-2.parquet, records-3.parquet and so on; the "
            "same command without --part then does what is left and judges the claims"
        )
    return found, claims_text(found)


COMMANDS = [
    Command(
        "demo", "the whole story on this machine, no download (recipes/demo.yaml)", demo_arguments, demo, True
    ),
    Command("run", "every stage of the recipe, resuming what is done", page_arguments, stage, True),
    Command("generate", "the teacher answers the training prompts", stage_arguments, stage, True),
    Command(
        "filter", "keep what the verifier accepts, as a training set", filter_arguments, filter_rows, True
    ),
    Command(
        "train", "train the student, and the control arm without a teacher", stage_arguments, stage, True
    ),
    Command("report", "one self-contained report.html from a run folder", page_arguments, stage),
    Command(
        "evaluate",
        "measure checkpoints on held-out problems: a recipe's, or any named ones",
        evaluate_arguments,
        evaluate,
        True,
    ),
    Command("bench", "arms and seeds over a recipe, with verdicts", bench_arguments, bench_command),
]
