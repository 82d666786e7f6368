"""The commands about what a run left behind: provenance, export, merge, play."""

import argparse
import json
from pathlib import Path

from distill.command import Command, json_argument
from distill.errors import UserError


def provenance_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="RUN_DIR | STUDENT | CHECKPOINT")
    json_argument(parser)


def provenance(arguments: argparse.Namespace) -> int:
    from distill.provenance import format_provenance, provenance

    found = provenance(Path(arguments.path))
    print(json.dumps(found, indent=2) if arguments.json else format_provenance(found))
    return 0 if found["whole"] else 1


def export_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run_dir", metavar="RUN_DIR")
    add("--format", choices=["prompt_completion", "messages"], default="prompt_completion",
        help="prompt and completion apart, or one list of chat messages")  # fmt: skip
    add("--plain", action="store_true", help="strings through the student's chat template, not messages")
    add("--out", metavar="FILE", help="a new .jsonl or .parquet file")
    add("--push-to-hub", metavar="NAME", help="upload card and parts as a private hub dataset")
    add("--public", action="store_true", help="with --push-to-hub: for everyone")


def export(arguments: argparse.Namespace) -> int:
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


def merge_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("adapter", metavar="ADAPTER_OR_STUDENT_FOLDER")
    add("--out", required=True, metavar="DIR", help="a new model folder")
    add("--dtype", choices=["auto", "fp32", "bf16"], default="auto", help="auto: as the base")
    json_argument(parser)


def merge(arguments: argparse.Namespace) -> int:
    from distill.merge import format_errors, merge_adapter
    from distill.models import quiet_libraries

    quiet_libraries()
    manifest = merge_adapter(arguments.adapter, Path(arguments.out), arguments.dtype)
    text = json.dumps(manifest["merge"], indent=2) if arguments.json else format_errors(manifest)
    print(text if arguments.json else f"{text}\nmerged model: {arguments.out}")
    return 0


def play_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("targets", nargs="+", metavar="TARGET", help="a RUN_DIR, or checkpoints")
    add("--teacher", metavar="PATH", help="whose alternatives are shown; of a run, its own teacher")
    add(
        "--tasks",
        nargs="+",
        metavar="T",
        help="problems to pick from: level, FILE, PRESET[:FILE], hub:org/name",
    )
    add("--max-new-tokens", type=int, metavar="N", help="longest answer")
    add("--port", type=int, default=7860, metavar="N", help="of the page on 127.0.0.1; 0 is any that is free")


def play(arguments: argparse.Namespace) -> int:
    if arguments.max_new_tokens is not None and arguments.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {arguments.max_new_tokens}: at least 1")
    from distill.models import quiet_libraries
    from distill.play_page import play

    quiet_libraries()
    try:
        play(arguments.targets, arguments.teacher, arguments.tasks, arguments.port, arguments.max_new_tokens)
    except KeyboardInterrupt:
        print()
    return 0


COMMANDS = [
    Command(
        "provenance",
        "from a student back to teacher, prompts, terms and hashes, every link checked",
        provenance_arguments,
        provenance,
    ),
    Command("export", "a run's training set in TRL's formats, or to the hub", export_arguments, export),
    Command("play", "ask checkpoints side by side on a local page (extra `play`)", play_arguments, play),
    Command("merge", "an adapter folded into its base, with the error that makes", merge_arguments, merge),
]
