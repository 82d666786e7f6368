"""What a check before a run found: one line each, how serious it is, and what to do about it.

    finding = Finding("context", FAIL, "40 + 512 tokens exceed the teacher's 256", "generate.max_new_tokens=200")
    print(format_findings([finding]))

`distill doctor` prints them all; commands that spend time stop at a FAIL and print a WARN once
(distill/doctor/checks.py).
"""

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from distill import console
from distill.errors import UserError

OK, NOTE, WARN, FAIL = "OK", "note", "WARN", "FAIL"
_COLOURS = {OK: "green", NOTE: "cyan", WARN: "yellow", FAIL: "red"}


@dataclass(frozen=True)
class Finding:
    """`state` OK: as it should be; note: worth knowing; WARN: likely not what is wanted; FAIL: would go wrong."""

    check: str
    state: str
    text: str
    fix: str | None = None

    @property
    def line(self) -> str:
        return f"{self.text}; {self.fix}" if self.fix else self.text


def failures(check: str, error: UserError) -> list[Finding]:
    """A FAIL per problem of an error; by the convention of this project its fix stands after the last semicolon."""
    found = []
    for problem in error.problems:
        text, _, fix = problem.rpartition("; ")
        found.append(Finding(check, FAIL, text, fix) if text else Finding(check, FAIL, problem))
    return found


def findings_of(check: str, function: Callable[..., list[Finding]], *arguments: Any) -> list[Finding]:
    """What `function` finds; a UserError it raises becomes a FAIL."""
    try:
        return function(*arguments)
    except UserError as error:
        return failures(check, error)


def format_findings(findings: list[Finding]) -> str:
    """A line per finding and one per fix, and a last line that counts; coloured on a terminal."""
    width = max(len(f.check) for f in findings)
    lines = []
    for finding in findings:
        state = console.paint(f"{finding.state:<4}", _COLOURS[finding.state], sys.stdout)
        lines.append(f"{state}  {finding.check:<{width}}  {finding.text}")
        if finding.fix:
            lines.append(f"{'':<{width + 8}}fix: {finding.fix}")
    count = {state: sum(f.state == state for f in findings) for state in _COLOURS}
    lines.append(", ".join(f"{n} {state}" for state, n in count.items()))
    return "\n".join(lines)


def as_json(findings: list[Finding]) -> dict[str, Any]:
    """{"ok": no FAIL, "findings": [{"check", "state", "text", "fix"}]}, as `distill doctor --json` prints it."""
    return {"ok": all(f.state != FAIL for f in findings), "findings": [asdict(f) for f in findings]}
