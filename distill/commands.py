"""What the commands without a recipe do: evaluate checkpoints, cost, bench, provenance, export, describe.

`distill.cli` parses and calls one of `COMMANDS`; each takes the parsed arguments and returns an exit code. Heavy
imports stay inside, so that a mistake in the arguments is told in a fraction of a second.
"""

import argparse
import json
import sys
from pathlib import Path

from distill.errors import UserError

# Options of `distill evaluate` that are keys of the recipe section of that name.
_EVALUATE_KEYS = (
    "samples", "temperature", "top_p", "seed", "level", "max_new_tokens", "likelihood", "text",
    "precisions", "harness", "harness_include", "harness_limit",
)  # fmt: skip


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
    from distill.dossier import build_dossier
    from distill.evaluate import evaluate_checkpoints
    from distill.models import quiet_libraries
    from distill.report import summary_table
    from distill.shards import read_json

    quiet_libraries()
    evaluate_checkpoints(
        names, arguments.teacher, out, section, sources, arguments.redo, prompts, arguments.usd_per_hour
    )
    page = build_dossier(out)
    print()
    print(summary_table(read_json(out / "metrics.json")))
    print(f"\nmetrics: {out / 'metrics.json'}\ndossier: {page}")
    return 0


def cost(arguments: argparse.Namespace) -> int:
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


def bench(arguments: argparse.Namespace) -> int:
    if arguments.rounds is not None and arguments.rounds < 1:
        raise UserError(f"--rounds {arguments.rounds}: at least 1")
    if arguments.out and not Path(arguments.out).resolve().parent.is_dir():
        raise UserError(f"--out {arguments.out}: its folder does not exist; make it first")
    rounds = {} if arguments.rounds is None else {"rounds": arguments.rounds}
    if arguments.only == "train":
        from distill.train_speed import format_training_speed, training_speed

        def say(line: str) -> None:
            print(line, file=sys.stderr, flush=True)

        found = training_speed(arguments.quick, peer_python=arguments.peer_python, say=say, **rounds)
        table = format_training_speed
    else:
        from distill.speed import format_speed, generation_speed

        quick = {"prompts": 64, "rounds": 1} if arguments.quick else {}
        found, table = generation_speed(**{**quick, **rounds}), format_speed
    text = json.dumps(found, indent=2)
    if arguments.out:
        Path(arguments.out).write_text(text + "\n", encoding="utf-8")
    print(text if arguments.json else table(found))
    return 0


def provenance(arguments: argparse.Namespace) -> int:
    from distill.provenance import format_provenance, provenance

    found = provenance(Path(arguments.path))
    print(json.dumps(found, indent=2) if arguments.json else format_provenance(found))
    return 0 if found["whole"] else 1


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


def merge(arguments: argparse.Namespace) -> int:
    from distill.merge import format_errors, merge_adapter
    from distill.models import quiet_libraries

    quiet_libraries()
    manifest = merge_adapter(arguments.adapter, Path(arguments.out), arguments.dtype)
    text = json.dumps(manifest["merge"], indent=2) if arguments.json else format_errors(manifest)
    print(text if arguments.json else f"{text}\nmerged model: {arguments.out}")
    return 0


def describe(arguments: argparse.Namespace) -> int:
    from distill.describe import describe, format_description
    from distill.models import quiet_libraries, resolve_model

    quiet_libraries()
    found = describe(resolve_model(arguments.model))
    print(json.dumps(found, indent=2) if arguments.json else format_description(found))
    return 0


COMMANDS = {
    "bench": bench,
    "cost": cost,
    "describe": describe,
    "export": export,
    "merge": merge,
    "provenance": provenance,
}
