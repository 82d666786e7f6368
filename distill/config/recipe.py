"""Recipes: one YAML page is one whole experiment. Typed, bounded, and wrong in one go.

`load_recipe(path, overrides)` reads the YAML, applies `key.sub=value` overrides, checks every key, and
raises one `UserError` that lists every problem with its fix and the nearest valid name, before any
weight is loaded. The resolved recipe (defaults filled in) is what manifests, reports and resumes use.
"""

import datetime
from copy import deepcopy
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from distill import console
from distill.config.data import Filter, Generate, Prices, Prompts, TeacherSection
from distill.config.evaluation import Evaluate
from distill.config.section import Section, Seed
from distill.config.training import Control, StudentSection, Train
from distill.errors import UserError, nearest
from distill.files import shown
from distill.storage import PROJECT_ROOT, find_file, unsealed
from distill.tasks.corpus import held_out_preset

BASE_FOLDER = "base"  # of a run: the student as made from another model, before it trains


class Recipe(Section):
    """One page, one whole experiment."""

    run_dir: str = Field(description="the run lives here; one folder per stage")
    seed: Seed = Field(0, description="seed of prompts, sampling, the new adapter and the order of rows")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto: the GPU if there is one, else the CPU"
    )
    threads: Annotated[int, Field(ge=0, le=4096)] = Field(
        0,
        description="CPU threads per process; 0: the number in DISTILL_THREADS, OMP_NUM_THREADS or "
        "MKL_NUM_THREADS, else all cores",
    )
    date: datetime.date | None = Field(
        None,
        description="the date that a chat template sees, if it asks for one; empty: the day the run began",
    )
    prompts: Prompts = Prompts()
    teacher: TeacherSection | None = None
    generate: Generate = Generate()
    filter: Filter = Filter()
    student: StudentSection
    train: Train = Train()
    control: Control = Control()
    evaluate: Evaluate = Evaluate()
    prices: Prices = Prices()

    @model_validator(mode="after")
    def _priced(self):
        if self.generate.max_cost_usd and not any(self.prices.model_dump().values()):
            raise ValueError("`generate.max_cost_usd` needs `prices`, for example prices.usd_per_device_hour")
        return self

    @model_validator(mode="before")
    @classmethod
    def _held_out_preset(cls, data: Any):
        return held_out_preset(data)

    @model_validator(mode="before")
    @classmethod
    def _made_base(cls, data: Any):
        """A student that is made from a model starts from the folder `base/` of its run, where it is made first."""
        student = data.get("student") if isinstance(data, dict) else None
        if isinstance(student, dict) and student.get("from") is not None and data.get("run_dir"):
            made = str(Path(str(data["run_dir"])) / BASE_FOLDER)
            if student.get("model") not in (None, made):
                raise ValueError(
                    "student: give one of `model` and `from`; `from.model` is what it is made from"
                )
            return {**data, "student": {**student, "model": made}}
        return data

    @model_validator(mode="after")
    def _teacher_or_solutions(self):
        if self.prompts.solutions == (self.teacher is not None) and not self.prompts.documents:
            raise ValueError(
                "give either `teacher` (distil from it) or `prompts.solutions: true` (train on worked steps)"
            )
        section = self.train.teachers
        uneven = section.models or section.own_start
        if self.teacher and self.teacher.device == "sharded" and (uneven or self.teacher.quantize != "none"):
            raise ValueError(
                "`teacher.device: sharded` is for one teacher that is not quantised, which every process asks "
                "equally often: leave out `train.teachers` (its models and own_start) and "
                "`teacher.quantize`, or set `teacher.device: auto`"
            )
        if self.prompts.documents and (unfit := self._needs_answers()):
            raise ValueError(f"`prompts.documents` has no questions: leave out {', '.join(unfit)}")
        rollouts = self.train.on_policy
        if rollouts.fraction and self.prompts.documents != bool(rollouts.context):
            raise ValueError(
                "`train.on_policy.context` goes with `prompts.documents` and is needed there: the student continues so "
                f"many tokens of a window; {'set it' if self.prompts.documents else 'leave it out'}"
            )
        if rollouts.fraction and rollouts.context and rollouts.context >= self.prompts.window:
            raise ValueError(
                f"`train.on_policy.context`: a window has {self.prompts.window} tokens (`prompts.window`); continue "
                "fewer of them"
            )
        if self.prompts.source != "tasks" and not (self.evaluate.source or self.prompts.documents):
            raise ValueError(
                "prompts come from a file: name held-out problems in `evaluate.source`, of the same form"
            )
        return self

    def _needs_answers(self) -> list[str]:
        """What of this recipe is about answers to questions."""
        asked = {
            "generate.signal": self.generate.signal.kind != "none",
            "train.teachers.context": bool(self.train.teachers.context),
            "teacher.endpoint": bool(self.teacher and self.teacher.endpoint),
            "prompts.completion_column": bool(self.prompts.completion_column),
            "filter.completions": self.filter.completions != "whole",
        }
        return [key for key, given in asked.items() if given]

    @model_validator(mode="after")
    def _states_of_one_teacher(self):
        live = {
            "train.on_policy": self.train.on_policy.fraction,
            "train.teachers": self.train.teachers.models
            or self.train.teachers.own_start
            or self.train.teachers.context,
        }
        if self.reads_states and (asked := [key for key, given in live.items() if given]):
            raise ValueError(
                f"generate.signal.kind=hidden stores what `teacher.model` says of its own text, and {asked[0]} asks a "
                f"live teacher; leave out {asked[0]}, or set generate.signal.kind=none"
            )
        return self

    @model_validator(mode="after")
    def _signals_of_whole_answers(self):
        dense = ("dense",) if self.reads_states else ()
        stored = [o.name for o in self.train.objectives if o.signal in ("sparse", "sampled", *dense)]
        if stored and self.filter.completions != "whole":
            raise ValueError(
                f"{stored[0]} reads signals stored with the whole answer, and filter.completions="
                f"{self.filter.completions} trains on another text; use filter.completions=whole, or cross_entropy"
            )
        return self

    @model_validator(mode="after")
    def _rows_to_hold_out(self):
        made = sum(self.prompts.levels.values()) * (self.generate.samples if self.teacher else 1)
        if self.prompts.source == "tasks" and self.train.validation.rows >= made:
            raise ValueError(
                f"train.validation.rows={self.train.validation.rows} leaves none to train on: prompts.levels and "
                f"generate.samples make {made:,} rows at most; lower it"
            )
        return self

    @model_validator(mode="after")
    def _answered_by_tag(self):
        if not self.generate.by_tag:
            return self
        plain = self.teacher and not self.teacher.endpoint and self.teacher.engine == "transformers"
        if not self.train.teachers.models or not plain or self.generate.signal.kind != "none":
            raise ValueError(
                "`generate.by_tag` is for teachers loaded here that are named in `train.teachers.models`, without "
                "`generate.signal`: name them, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _arms_to_measure(self):
        if self.evaluate.models:
            there = {
                "base": bool(self.student.model),
                "control": self.control.enabled,
                "student": True,
                "teacher": bool(self.teacher and not self.teacher.endpoint),
            }
            if absent := [name for name in self.evaluate.models if not there[name]]:
                raise ValueError(
                    f"evaluate.models: this recipe has no {' and no '.join(absent)}; leave it out"
                )
        return self

    @property
    def path(self) -> Path:
        return Path(self.run_dir)

    @property
    def base_identity(self) -> dict[str, Any]:
        """What the stage `base/` depends on: the section, and the prompts and seed where a choice reads or draws."""
        section = self.student.made_from
        found: dict[str, Any] = {"from": section.identity()}
        if section.reads:
            found["prompts"] = self.prompts.identity()
        if section.reads or section.draws:
            found["seed"] = self.seed
        return found

    @property
    def reads_states(self) -> bool:
        """Whether dense objectives read stored hidden states (`generate.signal.kind: hidden`), not a live teacher."""
        return self.generate.signal.kind == "hidden" and any(
            o.signal == "dense" for o in self.train.objectives
        )

    @property
    def needs_live_teacher(self) -> bool:
        """Whether training needs the teacher itself, and not only what is stored of it."""
        return any(o.live for o in self.train.objectives) and not self.reads_states


def load_recipe(path: str, overrides: list[str] = ()) -> Recipe:
    """Read a recipe, apply `key.sub=value` overrides, check everything.

    Raises UserError with one line per problem: unreadable file, unknown key (with the nearest valid
    one), wrong type, value out of bounds, contradiction.
    """
    file, data = read_recipe(path)
    if "arms" in data:
        raise UserError(
            f"{file} is a grid of arms over a recipe, not one recipe; run it with `distill bench {path}`"
        )
    return make_recipe(data, overrides, file)


def read_recipe(path: str) -> tuple[Path, dict[str, Any]]:
    """(file, what it holds) of a recipe or bench file. Raises UserError where it is missing or no mapping."""
    file = find_file(path)
    if not file.is_file():
        if (file / "recipe.yaml").is_file():
            raise UserError(
                f"recipe '{path}' is a run's folder; did you mean '{path.rstrip('/')}/recipe.yaml'?"
            )
        if file.is_dir():
            raise UserError(f"recipe '{path}' is a folder; give a file, as {path.rstrip('/')}/NAME.yaml")
        known = {p.stem: f"recipes/{p.name}" for p in sorted((PROJECT_ROOT / "recipes").glob("*.yaml"))}
        if close := get_close_matches(Path(path).stem, known, n=1):
            raise UserError(f"recipe '{path}' not found; did you mean '{known[close[0]]}'?")
        raise UserError(f"recipe '{path}' not found; shipped recipes: {', '.join(known.values())}")
    try:
        text, as_written = unsealed(file.read_text(encoding="utf-8"))
        data = load_yaml(text)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file}: not UTF-8 (byte 0x{error.object[error.start]:02x} at {error.start:,}), so it is no recipe, or "
            "was saved otherwise; save it as UTF-8"
        ) from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); look at its permissions") from None
    except (
        yaml.YAMLError,
        ValueError,
        RecursionError,
    ) as error:  # numbers and dates have errors of their own
        raise UserError(f"{file}: not valid YAML ({' '.join(str(error).split())[:300]})") from None
    if not as_written:
        console.warn(
            f"warning: {file} is not as the run wrote it; `distill provenance` shows what the run used"
        )
    if not isinstance(data, dict):
        raise UserError(f"{file}: a recipe is a mapping of keys to values, see recipes/demo.yaml")
    return file, data


SAFE_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml, 8 times as fast, where PyYAML has it
MOST_VALUES = 100_000  # of a YAML text, those that an alias repeats included


def load_yaml(text: str) -> Any:
    """What a YAML text says. Raises YAMLError for a key that is written twice, of which the library keeps the last.

    Also for aliases that repeat themselves: nine lines of nine aliases each are 400 million values.
    """
    return deepcopy(_said_by(text))


@lru_cache(4096)
def _said_by(text: str) -> Any:
    # A grid reads its recipe anew for every arm and seed, and the same overrides with it.
    loader = SAFE_LOADER(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _values(node, {}) > MOST_VALUES:
            raise yaml.YAMLError(f"it has more than {MOST_VALUES:,} values; write fewer, or without aliases")
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _values(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values are in a node, aliases counted where they stand."""
    if id(node) in known:
        return known[id(node)]
    known[id(node)] = MOST_VALUES + 1  # until it is counted: a node inside itself has no end
    inside = [n for pair in node.value for n in pair] if isinstance(node, yaml.MappingNode) else node.value
    if isinstance(node, yaml.MappingNode):
        names = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and (name := (key.tag, key.value)) in names:
                raise yaml.constructor.ConstructorError(
                    None,
                    None,
                    f"the key '{shown(key.value)}' is written twice; keep one of them",
                    key.start_mark,
                )
            names.add(name if isinstance(key, yaml.ScalarNode) else id(key))
    count = 1 + (0 if isinstance(node, yaml.ScalarNode) else sum(_values(n, known) for n in inside))
    known[id(node)] = count
    return count


def make_recipe(data: dict[str, Any], overrides: list[str], file: Path) -> Recipe:
    """`data` (changed in place by the overrides) as a checked recipe; `file` is named by its problems."""
    problems: list[str] = []
    for override in overrides:
        problem = _apply_override(data, override)
        if problem:
            problems.append(problem)
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        problems += [explain_error(e, file) for e in error.errors()]
    if problems:
        raise UserError(*problems)
    return recipe


def load_prompts(overrides: list[str]) -> Prompts:
    """The section `prompts` alone, from `prompts.key=value` words: how files of problems are read."""
    data: dict = {"prompts": {}}
    problems = [problem for override in overrides if (problem := _apply_override(data, override))]
    try:
        prompts = Prompts.model_validate(data["prompts"])
    except ValidationError as error:
        problems += [
            explain_error({**e, "loc": ("prompts", *e["loc"])}, Path("--tasks")) for e in error.errors()
        ]
    if problems:
        raise UserError(*problems)
    return prompts


def load_evaluate(values: dict) -> Evaluate:
    """The section `evaluate` alone, from the options of `distill evaluate CHECKPOINT`. Raises UserError."""
    try:
        return Evaluate.model_validate(values)
    except ValidationError as error:
        where = Path("distill evaluate")
        raise UserError(
            *(explain_error({**e, "loc": ("evaluate", *e["loc"])}, where) for e in error.errors())
        ) from None


def _apply_override(data: dict, override: str) -> str | None:
    """Set one `a.b.c=value` (value read as YAML) in `data`; returns the problem, if any."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        return f"'{override}': an override is written key.sub=value, for example train.steps=200"
    try:
        value = load_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = f" ({error.problem})" if getattr(error, "problem", None) else ""
        return f"'{shown(override)}': the value is not valid YAML{reason}; quote it"
    *parents, last = key.split(".")
    node: Any = data
    for part in parents:
        if isinstance(node, list) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
            continue
        if not isinstance(node, dict):
            return f"'{override}': '{part}' is not inside a section"
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
    if isinstance(node, list) and last.isdigit() and int(last) < len(node):
        node[int(last)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        return f"'{override}': '{'.'.join(parents)}' has no keys"
    return None


def explain_error(error: dict, file: Path, root: type[Section] | None = None) -> str:
    """One pydantic error as one line: where, what, and the nearest valid name for an unknown key."""
    where = ".".join(str(part) for part in error["loc"]) or "recipe"
    if error["type"] == "extra_forbidden":
        section: Any = root or Recipe
        for part in error["loc"][:-1]:
            section = _section_type(section, part)
        name = str(error["loc"][-1])
        fields = {f.alias or n: f for n, f in getattr(section, "model_fields", {}).items()}
        within = [
            f"{key}.{name}"
            for key in fields
            if name in getattr(_section_type(section, key), "model_fields", {})
        ]
        if within and section is (root or Recipe):  # a key of a section, without the section
            return f"{file}: unknown key '{where}'; did you mean '{within[0]}'?"
        return f"{file}: unknown key '{where}'{nearest(name, fields)}"
    if error["type"] == "missing":
        return f"{file}: '{where}' is missing; add it"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{file}: {where}: {message}"
    if error["type"] == "string_pattern_mismatch":
        message = f"give a name of the form {error['ctx']['pattern']}"
    return f"{file}: '{where}' is {shown(repr(error['input']), 200)}: {message[0].lower()}{message[1:]}"


def _section_type(section: Any, part: Any) -> Any:
    """The Section class behind a field, looking through Optional and list annotations."""
    fields = getattr(section, "model_fields", {})
    field = next((f for name, f in fields.items() if part in (name, f.alias)), None)
    if field is None:
        return section
    candidates = [field.annotation, *getattr(field.annotation, "__args__", ())]
    for candidate in candidates:
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return section


def resolved(recipe: Recipe) -> str:
    """The recipe with every default filled in, as YAML, objectives with their options."""
    import yaml

    data = recipe.model_dump(mode="json")
    for entry, objective in zip(data["train"]["objectives"], recipe.train.objectives):
        entry.update(objective.options)
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
