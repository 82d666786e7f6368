"""Commands, recipes and links in the documentation, as the tests read them.

A fenced block says by its first line how it is checked:

    ```sh         every command runs here, in this process, in an empty folder
    ```sh slow    needs minutes, a network, a GPU or files of yours: parsed, and every key and value resolved
    ```yaml       a part of a recipe: laid over recipes/demo.yaml and checked
    ```           lines of key=value words are overrides of recipes/demo.yaml; anything else is prose
"""

import importlib.util
import re
import shlex
import tomllib
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import yaml
from conftest import ROOT

from distill.bench.grid import load_bench, pick_budget
from distill.bench.plan import plan
from distill.commands import recipe as evaluate_command
from distill.commands.cli import parse
from distill.config.recipe import Recipe, load_evaluate, load_prompts, load_recipe

PAGES = [
    ROOT / "README.md",
    *ROOT.glob("README.*.md"),
    *ROOT.glob("CONTRIBUTING.md"),
    *(ROOT / "docs").glob("*.md"),
]
DEMO = "recipes/demo.yaml"
_BLOCK = re.compile(r"^( *)```([^\n]*)\n(.*?)^ *```$", re.M | re.S)
_SYNOPSIS = re.compile(r"^## (?:Commands|命令)\n.*?(?=^## )", re.M | re.S)


@dataclass(frozen=True)
class Example:
    """One command or fragment of a page. `kind` is the block's first line; `text` has no continuation lines."""

    page: str
    kind: str
    text: str

    def __str__(self):
        return f"{self.page}: {self.text[:70]}"


def examples(path: Path) -> list[Example]:
    """Every checked line (sh, overrides) or block (yaml) of a page; the synopsis under "Commands" is none."""
    found = []
    for _indent, kind, body in _BLOCK.findall(_SYNOPSIS.sub("", path.read_text())):
        kind = kind.strip()
        if kind == "yaml":
            found.append(Example(path.name, kind, body))
            continue
        for line in body.replace("\\\n", " ").splitlines():
            words = _words(line)
            if not words:
                continue
            if kind.startswith("sh"):
                found.append(Example(path.name, kind, line.strip()))
            elif not kind:
                assert words[0] not in ("distill", "accelerate", "python"), f"{path.name}: mark as sh: {line}"
                if re.match(r"^[a-z_]+(\.[a-z_0-9]+)*=", words[0]):
                    found.append(Example(path.name, "overrides", line.strip()))
    return found


def recipe_examples(path: Path) -> list[Example]:
    """The commands in a recipe's opening comment."""
    head = path.read_text().split("\nrun_dir", 1)[0]
    lines = re.sub(r"\\\n#\s*", " ", head).splitlines()
    commands = (line.removeprefix("#").strip() for line in lines)
    return [
        Example(path.name, "sh slow", re.split(r"\s{3,}", c)[0]) for c in commands if c.startswith("distill ")
    ]


def _words(line: str) -> list[str]:
    try:
        return shlex.split(line, comments=True)
    except ValueError:  # a quotation mark of prose
        return []


def command(text: str) -> tuple[list[str] | None, Path | None]:
    """The arguments of `distill` in a command line, or the module's file of another `python -m distill.X`.

    Everything named on the way must exist: make targets, launch configs, extras. Raises AssertionError.
    """
    words = _words(text)
    words = [w.removeprefix(".venv/bin/") for w in words]
    while re.match(r"^[A-Z_]+=", words[0]):
        words = words[1:]
    if words[0] == "accelerate":
        assert words[1] == "launch"
        for option, value in pairwise(words):
            assert option != "--config_file" or (ROOT / value).is_file(), f"no such launch config: {value}"
        words = ["python", *words[words.index("-m") :]]
    if words[:3] == ["python", "-m", "distill"]:
        words = ["distill", *words[3:]]
    if words[0] == "distill":
        return words[1:], None
    if words[0] == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
        assert set(words[1:]) <= {*targets, *[w for w in words if "=" in w]}, f"no such target: {words[1:]}"
    elif words[0] == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for asked in re.findall(r"\[(.*?)\]", text):
            assert set(asked.split(",")) <= set(extras), f"no such extra: {asked}"
    elif words[:2] == ["python", "-m"]:
        spec = importlib.util.find_spec(words[2])
        assert spec is not None, f"no such module: {words[2]}"
        return None, Path(spec.origin) if words[2].startswith("distill") else None
    elif words[0] == "python":
        assert (ROOT / words[1]).is_file(), f"no such file: {words[1]}"
    else:
        assert words[0] in ("source", "git", "cd", "pytest", "ruff", "cp", "mkdir"), f"not checked: {text}"
    return None, None


def resolve(arguments: list[str]) -> None:
    """A command as far as a mistake of the reader could go: the parser, then every key of its recipe.

    A recipe of a run (checkpoints/mine/recipe.yaml) and files of one's own stand for ones that exist.
    """
    parsed = parse(arguments)
    recipe = next((w for w in arguments[1:] if w.endswith((".yaml", ".yml"))), None)
    if parsed.command == "bench" and recipe:
        bench, file = load_bench(recipe)
        plan(bench, pick_budget(bench, parsed.budget), file)
    elif parsed.command == "demo" or (recipe and "=" not in recipe and hasattr(parsed, "redo")):
        path = DEMO if parsed.command == "demo" or recipe.startswith("checkpoints/") else recipe
        words = getattr(parsed, "overrides", None)
        overrides = list(parsed.targets[1:]) if words is None else list(words)
        if parsed.command == "evaluate":
            overrides += evaluate_command.evaluate_overrides(parsed)
        load_recipe(path, overrides)
    elif parsed.command == "evaluate":
        load_prompts([w for w in parsed.targets if "=" in w])
        load_evaluate({"levels": {"easy": 1}, **evaluate_command.evaluate_options(parsed)})


def lay_over_demo(fragment: str) -> Recipe:
    """A part of a recipe over recipes/demo.yaml, checked as `distill` would."""
    part = yaml.safe_load(fragment)

    def merged(old, new):
        if not (isinstance(old, dict) and isinstance(new, dict)):
            return new
        return {**old, **{k: merged(old.get(k), v) for k, v in new.items()}}

    return Recipe.model_validate(merged(yaml.safe_load((ROOT / DEMO).read_text()), part))
