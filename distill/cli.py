"""The `distill` command. Parses arguments, calls one function, turns errors into lines and exit codes.

Exit codes: 0 done; 2 the recipe or the arguments are wrong (every problem on a line, with its fix); 1 the run
failed after it had begun (what was finished is kept). Nothing heavy is imported before it is needed.
"""

import argparse
import os
import sys
from pathlib import Path

from distill import __version__
from distill.errors import DistillError, UserError

_STAGE_HELP = {
    "run": "every stage of the recipe, resuming what is done",
    "generate": "the teacher answers the training prompts",
    "filter": "keep what the verifier accepts, as a training set",
    "train": "train the student, and the control arm without a teacher",
    "evaluate": "measure checkpoints on held-out problems: a recipe's, or any named ones",
    "report": "one self-contained report.html from a run folder",
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="distill",
        description="Teacher outputs -> student (LoRA, bf16) -> MoE-aware evaluation -> one report.",
    )
    parser.add_argument("--version", action="version", version=f"distill {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    demo = commands.add_parser(
        "demo", help="the whole story on this machine, no download (recipes/demo.yaml)"
    )
    _recipe_arguments(demo, recipe=False)
    for name in ("run", "generate", "filter", "train", "report"):
        added = commands.add_parser(name, help=_STAGE_HELP[name])
        _recipe_arguments(added)
        if name == "filter":
            added.add_argument("--explain", action="store_true", help="per rule: its count and examples")

    evaluate = commands.add_parser("evaluate", help=_STAGE_HELP["evaluate"])
    evaluate.add_argument("targets", nargs="+", metavar="RECIPE [key=value ...] | CHECKPOINT ...")
    evaluate.add_argument("--tasks", nargs="+", default=["easy", "medium", "hard"], metavar="T",
                          help="checkpoints: levels, FILE, PRESET[:FILE], hub:org/name; prompts.key=value to read them")  # fmt: skip
    evaluate.add_argument(
        "--problems", type=int, default=210, metavar="N", help="checkpoints: problems per level"
    )
    evaluate.add_argument(
        "--max-new-tokens", type=int, default=96, metavar="N", help="checkpoints: longest answer"
    )
    evaluate.add_argument("--out", metavar="DIR", help="checkpoints: folder for metrics.json and answers/")
    _shared_arguments(evaluate)

    bench = commands.add_parser("bench", help="how fast it is here, against its peers in the same run")
    bench.add_argument("what", choices=["speed"])
    bench.add_argument("--only", choices=["generate"], default="generate", help="which benchmark")
    bench.add_argument("--json", action="store_true", help="print JSON")

    cost = commands.add_parser("cost", help="the bill of DeepSeek-V3, or the ledger of a run")
    cost.add_argument("what", nargs="?", default="deepseek-v3", metavar="deepseek-v3 | RUN_DIR | RECIPE")
    cost.add_argument("--usd-per-hour", type=float, metavar="USD", help="price of one device-hour, for a run")
    cost.add_argument("--json", action="store_true", help="print JSON")

    provenance = commands.add_parser(
        "provenance", help="from a student back to teacher, prompts, terms and hashes, every link checked"
    )
    provenance.add_argument("path", metavar="RUN_DIR | STUDENT | CHECKPOINT")
    provenance.add_argument("--json", action="store_true", help="print JSON")

    export = commands.add_parser("export", help="a run's training set in TRL's formats, or to the hub")
    export.add_argument("run_dir", metavar="RUN_DIR")
    export.add_argument("--format", choices=["prompt_completion", "messages"], default="prompt_completion",
                        help="prompt and completion apart, or one list of chat messages")  # fmt: skip
    export.add_argument(
        "--plain", action="store_true", help="strings through the student's chat template, not messages"
    )
    export.add_argument("--out", metavar="FILE", help="a new .jsonl or .parquet file")
    export.add_argument(
        "--push-to-hub", metavar="NAME", help="upload card and parts as a private hub dataset"
    )
    export.add_argument("--public", action="store_true", help="with --push-to-hub: for everyone")

    describe = commands.add_parser(
        "describe", help="parameters, FLOPs, KV bytes, experts: from the config alone"
    )
    describe.add_argument("model", metavar="MODEL_OR_CONFIG_DIR")
    describe.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _recipe_arguments(parser: argparse.ArgumentParser, recipe: bool = True) -> None:
    if recipe:
        parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, for example recipes/demo.yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="override any key, as train.steps=200"
    )
    _shared_arguments(parser)


def _shared_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--teacher", metavar="PATH", help="short for teacher.model=PATH")
    parser.add_argument("--student", metavar="PATH", help="short for student.model=PATH")
    parser.add_argument("--redo", action="store_true", help="rebuild what was made from other inputs")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved recipe and what follows from it"
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Arguments with options and key=value overrides in any order (argparse alone stops at the first option)."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    collected = getattr(arguments, "overrides", getattr(arguments, "targets", None))
    unknown = [word for word in rest if word.startswith("-") or collected is None]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)} (see distill {arguments.command} --help)")
    if collected is not None:
        collected.extend(rest)
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    arguments = parse(argv)
    try:
        return _dispatch(arguments)
    except DistillError as error:
        # Under a launcher every process finds the same mistake; one of them says so.
        if os.environ.get("RANK", "0") == "0":
            for problem in error.problems:
                print(f"distill: {problem}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\ndistill: interrupted; the same command continues where it stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 0


def _dispatch(arguments: argparse.Namespace) -> int:
    command = arguments.command
    if command == "cost":
        return _cost(arguments)
    if command == "bench":
        return _bench(arguments)
    if command == "describe":
        return _describe(arguments)
    if command == "provenance":
        return _provenance(arguments)
    if command == "export":
        return _export(arguments)
    if command == "evaluate" and not arguments.targets[0].endswith((".yaml", ".yml")):
        return _evaluate_checkpoints(arguments)
    if command == "demo":
        path, overrides = "recipes/demo.yaml", arguments.overrides
    elif command == "evaluate":
        path, overrides = arguments.targets[0], arguments.targets[1:]
    else:
        path, overrides = arguments.recipe, arguments.overrides
    return _run_recipe(
        "run" if command == "demo" else command, path, _with_paths(overrides, arguments), arguments
    )


def _with_paths(overrides: list[str], arguments: argparse.Namespace) -> list[str]:
    named = [("teacher.model", arguments.teacher), ("student.model", arguments.student)]
    return [*overrides, *(f"{key}={value}" for key, value in named if value)]


def _run_recipe(command: str, path: str, overrides: list[str], arguments: argparse.Namespace) -> int:
    from distill.config import load_recipe

    recipe = load_recipe(path, overrides)
    from distill import pipeline
    from distill.models import quiet_libraries

    quiet_libraries()
    if arguments.dry_run:
        from distill.plan import derived

        print(pipeline.resolved(recipe))
        for name, value in derived(recipe).items():
            print(f"# {name}: {_shown(value)}")
        return 0
    if command != "report":
        from distill.preflight import check_recipe
        from distill.shards import write_atomic

        check_recipe(recipe, command)
        if os.environ.get("RANK", "0") == "0":
            write_atomic(recipe.path / "recipe.yaml", pipeline.resolved(recipe))
        pipeline.run(recipe, command, arguments.redo, say=_say)
    if getattr(arguments, "explain", False) and os.environ.get("RANK", "0") == "0":
        from distill.filter import explain

        print(explain(recipe.path))
    if command in ("run", "report"):
        _report(recipe.path)
    return 0


def _shown(value: object) -> str:
    """A forecast for people; what nothing tells is unknown."""
    return "unknown" if value is None else value if isinstance(value, str) else f"{value:,}"


def _report(run_dir: Path) -> None:
    from distill.report import build_report, summary_table
    from distill.shards import read_json

    page = build_report(run_dir)
    print()
    print(summary_table(read_json(run_dir / "eval" / "metrics.json")))
    print(f"\nreport: {page}")


def _evaluate_checkpoints(arguments: argparse.Namespace) -> int:
    from distill.config import Evaluate, load_prompts
    from distill.presets import PRESETS, split_task
    from distill.tasks import LEVELS

    words = [*arguments.targets, *arguments.tasks]
    keys = [w for w in words if w.startswith("prompts.") and "=" in w]
    targets, tasks = ([w for w in given if w not in keys] for given in (arguments.targets, arguments.tasks))
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
    levels = {t: arguments.problems for t in tasks if t in LEVELS}
    names: dict[str, str] = {}
    for target in targets:
        name = Path(target).name
        names[name if name not in names else target.strip("/").replace("/", "-")] = target
    out = Path(arguments.out or f"checkpoints/eval-{'-'.join(names)}")
    from distill.evaluate import evaluate_checkpoints
    from distill.models import quiet_libraries
    from distill.report import summary_table
    from distill.shards import read_json

    quiet_libraries()
    section = Evaluate(levels=levels, max_new_tokens=arguments.max_new_tokens)
    prompts = load_prompts(keys)
    evaluate_checkpoints(names, arguments.teacher, out, section, sources, arguments.redo, prompts)
    print()
    print(summary_table(read_json(out / "metrics.json")))
    print(f"\nmetrics: {out / 'metrics.json'}")
    return 0


def _cost(arguments: argparse.Namespace) -> int:
    import json

    from distill import cost

    if arguments.what == "deepseek-v3":
        bill, text = cost.deepseek_v3_bill(), cost.format_bill
    else:
        run_dir = Path(arguments.what)
        if arguments.what.endswith((".yaml", ".yml")):
            from distill.config import load_recipe

            run_dir = load_recipe(arguments.what).path
        prices = (
            {"usd_per_device_hour": arguments.usd_per_hour} if arguments.usd_per_hour is not None else None
        )
        bill, text = cost.run_ledger(run_dir, prices), cost.format_ledger
    print(json.dumps(bill, indent=2) if arguments.json else text(bill))
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    import json

    from distill.speed import format_speed, generation_speed

    found = generation_speed()
    print(json.dumps(found, indent=2) if arguments.json else format_speed(found))
    return 0


def _provenance(arguments: argparse.Namespace) -> int:
    import json

    from distill.provenance import format_provenance, provenance

    found = provenance(Path(arguments.path))
    print(json.dumps(found, indent=2) if arguments.json else format_provenance(found))
    return 0 if found["whole"] else 1


def _export(arguments: argparse.Namespace) -> int:
    if not (arguments.out or arguments.push_to_hub):
        raise UserError("nothing to do: give --out FILE, or --push-to-hub NAME")
    from distill import dataset_card

    run_dir = Path(arguments.run_dir)
    if arguments.out:
        rows = dataset_card.export(run_dir, arguments.format, Path(arguments.out), arguments.plain)
        print(f"{arguments.out}: {rows:,} rows")
    if arguments.push_to_hub:
        print(dataset_card.push(run_dir, arguments.push_to_hub, arguments.public))
    return 0


def _describe(arguments: argparse.Namespace) -> int:
    import json

    from distill.describe import describe, format_description
    from distill.models import quiet_libraries, resolve_model

    quiet_libraries()
    found = describe(resolve_model(arguments.model))
    print(json.dumps(found, indent=2) if arguments.json else format_description(found))
    return 0


def _say(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)
