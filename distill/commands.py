"""What the commands without a recipe do: evaluate checkpoints, cost, bench, provenance, export, describe.

`distill.cli` parses and calls one of `COMMANDS`; each takes the parsed arguments and returns an exit code. Heavy
imports stay inside, so that a mistake in the arguments is told in a fraction of a second.
"""

import argparse
import json
from pathlib import Path

from distill.errors import UserError


def evaluate_checkpoints(arguments: argparse.Namespace) -> int:
    from distill.config import load_prompts
    from distill.eval_sections import Evaluate
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
    from distill.speed import format_speed, generation_speed

    found = generation_speed()
    print(json.dumps(found, indent=2) if arguments.json else format_speed(found))
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
    "provenance": provenance,
}
