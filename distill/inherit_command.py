"""`distill inherit`: which flaws of a teacher its students have, by probes. See distill/inherit.py.

distill inherit STUDENT ... --teacher PATH [--clean PATH] [--probes FILE|embedded] [--out DIR] [--json]
"""

import argparse
import json
from pathlib import Path

from distill.command import Command, json_argument
from distill.errors import UserError


def inherit_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("checkpoints", nargs="+", metavar="CHECKPOINT", help="students: any causal LM or adapter")
    add(
        "--probes",
        default="embedded",
        metavar="FILE|embedded",
        help="a probe file (JSONL), as distill/probes.py",
    )
    add("--teacher", metavar="PATH", help="whose flaws: paired differences and shares inherited")
    add("--clean", metavar="PATH", help="a twin without the flaws, to count from; without it, chance")
    add("--per-flaw", type=int, metavar="N", help="probes of each flaw: the first N (embedded: 80)")
    add("--max-new-tokens", type=int, default=80, metavar="N", help="longest answer")
    add("--seed", type=int, default=0, metavar="N", help="of sampled choices and intervals")
    add("--out", metavar="DIR", help="folder for inherit.json and every answer")
    json_argument(parser)


def inherit(arguments: argparse.Namespace) -> int:
    from distill.inherit import audit, checkpoint_names, format_audit, read_probes, write_audit

    for name in ("per_flaw", "max_new_tokens"):
        if (given := getattr(arguments, name)) is not None and given < 1:
            raise UserError(f"--{name.replace('_', '-')} {given}: at least 1")
    out = Path(arguments.out) if arguments.out else None
    if out and (out / "inherit.json").exists():
        raise UserError(f"{out} has an audit already; give another --out, or move it away")
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
        "inherit",
        "which flaws of a teacher its students have, and how much of each",
        inherit_arguments,
        inherit,
    )
]
