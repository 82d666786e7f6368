"""The `distill` command. Parses arguments, calls one function, turns errors into lines and exit codes.

Exit codes: 0 done; 2 the recipe or the arguments are wrong (every problem on a line, with its fix); 1 the run
failed after it had begun (what was finished is kept). Nothing heavy is imported before it is needed.
"""

import argparse
import os
import sys
from pathlib import Path

from distill import __version__, commands
from distill.errors import DistillError

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
    evaluate.add_argument("--tasks", nargs="+", metavar="T",
                          help="checkpoints: level, FILE, PRESET[:FILE], hub:org/name; prompts.key=value")  # fmt: skip
    evaluate.add_argument("--problems", type=int, metavar="N", help="checkpoints: problems per level, 210")
    _evaluate_arguments(evaluate)
    evaluate.add_argument("--out", metavar="DIR", help="checkpoints: folder for metrics.json and answers/")
    _shared_arguments(evaluate)

    bench = commands.add_parser("bench", help="how fast it is here, against its peers in the same run")
    bench.add_argument("what", choices=["speed"])
    bench.add_argument("--only", choices=["generate", "train"], default="generate", help="which benchmark")
    bench.add_argument("--quick", action="store_true", help="a minute of it: small models, fewer prompts")
    bench.add_argument("--rounds", type=int, metavar="N", help="interleaved rounds (generate 3, train 1)")
    bench.add_argument("--peer-python", metavar="PATH", help="train: an interpreter that can import trl")
    bench.add_argument("--out", metavar="FILE", help="write the JSON there too")
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

    merge = commands.add_parser("merge", help="an adapter folded into its base, with the error that makes")
    merge.add_argument("adapter", metavar="ADAPTER_OR_STUDENT_FOLDER")
    merge.add_argument("--out", required=True, metavar="DIR", help="a new model folder")
    merge.add_argument("--dtype", choices=["auto", "fp32", "bf16"], default="auto", help="auto: as the base")
    merge.add_argument("--json", action="store_true", help="print JSON")

    describe = commands.add_parser(
        "describe", help="parameters, FLOPs, KV bytes, experts: from the config alone"
    )
    describe.add_argument("model", metavar="MODEL_OR_CONFIG_DIR")
    describe.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _evaluate_arguments(parser: argparse.ArgumentParser) -> None:
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
    add("--precision", dest="precisions", type=_comma_separated, metavar="P,...",
        help="again in each: fp32, bf16, fp16, fp8-emulated, fp8-emulated-tensor")  # fmt: skip
    add("--harness", type=_comma_separated, metavar="TASK,...", help="tasks of lm-evaluation-harness (extra)")
    add("--harness-include", metavar="DIR", help="a folder with further harness task files")
    add("--harness-limit", type=int, metavar="N", help="first documents of each harness task")
    add("--top-k", type=_comma_separated, metavar="K,...", help="MoE: again with so many experts per token")
    add("--drop-expert", dest="drop", type=_comma_separated, metavar="L:E,...",
        help="MoE: again without expert E of layer L; 1:3+2:0 drops two together")  # fmt: skip
    add(
        "--drop-each",
        action="store_true",
        default=None,
        help="MoE: without each expert in turn",
    )
    add("--route", type=_comma_separated, metavar="HOW,...", help="MoE: again, random, uniform or shuffled")
    add("--usd-per-hour", type=float, metavar="USD", help="price of this device, for USD per million tokens")


def _comma_separated(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


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
    if command in commands.COMMANDS:
        return commands.COMMANDS[command](arguments)
    if command == "evaluate" and not arguments.targets[0].endswith((".yaml", ".yml")):
        return commands.evaluate_checkpoints(arguments)
    if command == "demo":
        path, overrides = "recipes/demo.yaml", arguments.overrides
    elif command == "evaluate":
        path = arguments.targets[0]
        overrides = [*arguments.targets[1:], *commands.evaluate_overrides(arguments)]
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
    from distill.dossier import build_dossier
    from distill.report import build_report, summary_table
    from distill.shards import read_json

    page = build_report(run_dir)
    print()
    print(summary_table(read_json(run_dir / "eval" / "metrics.json")))
    print(f"\nreport: {page}\ndossier of the checkpoints: {build_dossier(run_dir / 'eval')}")


def _say(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)
