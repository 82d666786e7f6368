"""Before a command spends time: what `distill doctor` would call a FAIL stops it, a WARN is printed once.

    check_recipe(recipe, "run")        # raises one UserError with every problem found

The checks themselves are those of distill/doctor.py, of the part of the recipe that the command runs.
"""

import torch

from distill import console
from distill.config import Recipe
from distill.doctor import examine, examine_checkpoints
from distill.errors import UserError
from distill.eval_sections import Evaluate
from distill.findings import FAIL, NOTE, WARN, Finding
from distill.models import check_model

__all__ = ["check_checkpoints", "check_model", "check_recipe"]


def check_recipe(recipe: Recipe, command: str) -> None:
    """Everything that can be known without loading weights. Raises UserError with all problems."""
    _stop_or_warn(examine(recipe, command, weights=True))


def check_checkpoints(models: dict[str, str], section: Evaluate, device: torch.device) -> None:
    """The same for checkpoints by name that are only measured."""
    _stop_or_warn(examine_checkpoints(models, section, device))


def _stop_or_warn(findings: list[Finding]) -> None:
    if problems := [f.line for f in findings if f.state == FAIL]:
        raise UserError(*dict.fromkeys(problems))
    shown = (WARN, NOTE) if console.verbose() else (WARN,)
    said = {f.line: "warning" if f.state == WARN else "note" for f in findings if f.state in shown}
    for line, kind in said.items():
        console.warn(f"{kind}: {line}")
