"""docs/recipes.md, from the section classes of a recipe.

python docs/generate/recipes.py
"""

import sys
from collections.abc import Iterator

from annotated_types import Gt

from distill.bench.grid import Bench
from distill.commands.scaffold import bounds_text, entries, option_text
from distill.config.recipe import Recipe
from distill.config.section import OBJECTIVES, WEIGHT, Section
from distill.storage import PROJECT_ROOT, write_atomic

PAGE = PROJECT_ROOT / "docs" / "recipes.md"
_SIGNAL_MEANING = {
    "targets": "the teacher's text",
    "dense": "logits of a live teacher",
    "drawn": "logits of a live teacher and the token that the student drew",
    "sparse": "stored `top_k` signals",
    "sampled": "stored `sampled` signals",
    "aligned": "logits of a live teacher with another tokenizer",
    "hidden": "hidden states of a live teacher",
    "routers": "routers of a live MoE teacher",
    "own_routers": "the student's own routers, no teacher",
    "ahead": "the text or the student's own distribution one token later, no teacher",
}
_OPENING = """# Recipe reference

Every key of a recipe, written by `python docs/generate/recipes.py` from the classes that check it: edit those, not
this page. A recipe is YAML; any key can be overridden on the command line as `key.sub=value`, a list element by its
number (`train.objectives.0.weight=0.5`). *empty* is YAML's `null`. An unknown key, a wrong type, a value out of bounds
and a contradiction are told all at once, one line each, before anything is loaded. Every number is finite; where no
upper bound is given, whole numbers end at 2,147,483,647 (seeds at 2^63 - 1).

```yaml
run_dir: checkpoints/mine                  # where the run lives: one folder per stage
student: {model: checkpoints/base}         # who learns
teacher: {model: checkpoints/teacher}      # from whom; or prompts.solutions, to train on worked steps
```

is a whole recipe; everything else has a default. `distill run RECIPE --dry-run` prints the recipe with all of them
filled in.
"""


def page() -> str:
    """The whole of docs/recipes.md."""
    lines = [
        _OPENING,
        *_tables(Recipe, "Top level"),
        _objectives(),
        *_tables(Bench, "A grid of `distill bench`"),
    ]
    return "\n".join(lines) + "\n"


def _tables(root: type[Section], title: str) -> Iterator[str]:
    """Heading, docstring and keys of a file's top level and of every section below it."""
    for path, section, own in entries(root):
        yield f"\n## {f'`{path}`' if path else title}\n"
        yield " ".join((section.__doc__ or "").split()) + "\n"
        if own:
            yield "| key | type | default | |\n|---|---|---|---|"
            yield from (
                f"| `{e.key}` | {_cell(e.type)} | {_cell(e.default)} | {_cell(e.description)} |" for e in own
            )


def _objectives() -> str:
    """The table of `train.objectives`: what each compares the student with, and its options."""
    lines = [
        "\n## Objectives\n",
        "An entry of `train.objectives` is `{name: ..., weight: ...}` and the options of that name. `weight` "
        f"(number, {bounds_text([Gt(WEIGHT.low)])}; default {WEIGHT.default:g}) multiplies its loss before the sum. "
        "Definitions, directions and sources: `distill/training/losses/`; which one to take: "
        "[objectives.md](objectives.md).\n",
        "| name | compares with | option | type | default |",
        "|---|---|---|---|---|",
    ]
    for name, objective in OBJECTIVES.items():
        with_what = _SIGNAL_MEANING[objective.signal]
        rows = [(f"`{o}`", *option_text(option)) for o, option in objective.options.items()] or [("", "", "")]
        for number, (option, kind, default) in enumerate(rows):
            first = (f"`{name}`", with_what) if number == 0 else ("", "")
            lines.append(f"| {' | '.join([*first, option, _cell(kind), default])} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> int:
    write_atomic(PAGE, page())
    keys = sum(len(own) for root in (Recipe, Bench) for _, _, own in entries(root))
    print(f"{PAGE.relative_to(PROJECT_ROOT)}: {keys} keys, {len(OBJECTIVES)} objectives", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
