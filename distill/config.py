"""Recipes: one YAML page is one whole experiment. Typed, bounded, and wrong in one go.

`load_recipe(path, overrides)` reads the YAML, applies `key.sub=value` overrides, checks every key, and
raises one `UserError` that lists every problem with its fix and the nearest valid name, before any
weight is loaded. The resolved recipe (defaults filled in) is what manifests, reports and resumes use.
"""

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from distill import objectives
from distill.errors import UserError
from distill.tasks import FAMILIES, LEVELS

PROJECT_ROOT = Path(__file__).resolve().parent.parent

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Prompts(Section):
    """Where training questions come from: the embedded tasks, or a JSONL, Parquet or CSV file."""

    source: str = Field("tasks", description="'tasks', or the path of a .jsonl, .parquet or .csv file")
    levels: dict[str, Annotated[int, Field(ge=0)]] = Field(
        {"easy": 800, "medium": 800, "hard": 1600}, description="embedded tasks: prompts per level"
    )
    families: list[str] = Field(list(FAMILIES), description="embedded tasks: which families")
    solutions: bool = Field(
        False, description="embedded tasks: train on the worked steps themselves (how the teacher is made)"
    )
    distinct: bool = Field(
        True, description="embedded tasks: no prompt twice; false for long from-scratch runs"
    )
    limit: Count | None = Field(None, description="files: use the first rows only")
    prompt_column: str = Field("prompt", description="files: column with the question, or chat messages")
    answer_column: str = Field("answer", description="files: column with the final answer ('' if none)")
    verifier: Literal["exact", "numeric"] = Field("exact", description="rule that compares answers")
    system: str | None = Field(None, description="system message put before every question")

    @model_validator(mode="after")
    def _known_names(self):
        for name in self.levels:
            if name not in LEVELS:
                raise ValueError(f"unknown level '{name}'{_nearest(name, LEVELS)}")
        for name in self.families:
            if name not in FAMILIES:
                raise ValueError(f"unknown family '{name}'{_nearest(name, FAMILIES)}")
        return self


class Teacher(Section):
    model: str = Field(description="folder or hub name of any causal LM")
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = Field("auto", description="auto: as stored")


class Generate(Section):
    samples: Count = Field(2, description="completions per prompt")
    temperature: Annotated[float, Field(ge=0.0, le=5.0)] = Field(0.7, description="0 is greedy")
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = Field(0, description="0 is off")
    min_p: Fraction = Field(0.0, description="0 is off")
    max_new_tokens: Count = 96
    batch_size: Count = Field(256, description="completions decoded together")
    part_size: Count = Field(512, description="prompts per Parquet part, the unit of resuming")


class Filter(Section):
    correct_only: bool = Field(True, description="rejection sampling: keep what the verifier accepts")
    deduplicate: bool = Field(True, description="identical completions of one prompt are kept once")
    max_per_prompt: Count | None = Field(None, description="at most this many completions per prompt")
    max_tokens: Count | None = Field(None, description="prompt plus completion at most this long")


class Lora(Section):
    """LoRA (Hu et al. 2021, arXiv 2106.09685) through PEFT."""

    rank: Count = 16
    alpha: Annotated[float, Field(gt=0)] = 32
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    rslora: bool = Field(False, description="scale by alpha / sqrt(rank) instead of alpha / rank")
    targets: Literal["all-linear", "attention"] = "all-linear"


class Student(Section):
    model: str | None = Field(None, description="folder or hub name to start from")
    config: dict[str, Any] | None = Field(
        None, description="or a transformers config (with model_type) to start from random weights"
    )
    tokenizer: str = Field("embedded", description="with `config`: 'embedded', or a folder or hub name")
    adapter: Literal["lora", "full"] = "lora"
    lora: Lora = Lora()

    @model_validator(mode="after")
    def _one_start(self):
        if (self.model is None) == (self.config is None):
            raise ValueError("give exactly one of `model` (start from weights) and `config` (from scratch)")
        if self.config is not None:
            if "model_type" not in self.config:
                raise ValueError("`config` needs a `model_type`, for example qwen3 or deepseek_v3")
            if self.adapter == "lora":
                raise ValueError("LoRA on random weights trains almost nothing: set `adapter: full`")
        return self


class Objective(Section):
    """One term of the training loss: a name, a weight, and the named objective's own options."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str
    weight: float = 1.0

    @model_validator(mode="after")
    def _known(self):
        found = objectives.problems({"name": self.name, "weight": self.weight, **(self.model_extra or {})})
        if found:
            raise ValueError("; ".join(found))
        return self

    @property
    def options(self) -> dict[str, Any]:
        """The objective's keyword arguments, defaults filled in."""
        resolved = objectives.resolve({"name": self.name, **(self.model_extra or {})})
        return {k: v for k, v in resolved.items() if k not in ("name", "weight")}

    @property
    def signal(self) -> str:
        return objectives.OBJECTIVES[self.name].signal


class Train(Section):
    objectives: Annotated[list[Objective], Field(min_length=1)] = [Objective(name="cross_entropy")]
    steps: Count = Field(400, description="optimizer steps")
    batch_size: Count = Field(64, description="rows per optimizer step over all processes and micro-batches")
    micro_batch_size: Count = Field(64, description="rows per forward pass of one process")
    learning_rate: Annotated[float, Field(gt=0)] = 1e-2
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] = 20
    final_fraction: Fraction = Field(0.1, description="learning rate at the last step over its peak")
    optimizer: Literal["adamw", "sgd"] = "adamw"
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    precision: Literal["fp32", "bf16", "fp16", "fp8"] = Field("bf16", description="what matmuls run in")
    max_length: Count | None = Field(None, description="rows longer than this are refused, not cut")
    checkpoint_every: Annotated[int, Field(ge=0)] = Field(100, description="steps; 0 keeps none")
    gradient_checkpointing: bool = False
    expert_bias_step: Annotated[float, Field(ge=0)] = Field(
        0.0, description="MoE from scratch: bias balancing step u (DeepSeek-V3 section 2.1.2); 0 is off"
    )
    expert_bias_freeze: Fraction = Field(0.1, description="last share of steps with u = 0")
    trackers: list[Literal["tensorboard"]] = Field([], description="besides metrics.jsonl")

    @model_validator(mode="after")
    def _sensible(self):
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps ({self.warmup_steps}) must be below steps ({self.steps})")
        return self


class Control(Section):
    """The same base, prompts, steps and adapter, on question + final answer, without a teacher."""

    enabled: bool = True


class Evaluate(Section):
    levels: dict[str, Annotated[int, Field(ge=0)]] = Field(
        {"easy": 210, "medium": 210, "hard": 210}, description="embedded tasks: held-out problems per level"
    )
    source: str | None = Field(None, description="or a file of held-out problems; default: as `prompts`")
    split: Literal["validation", "test"] = "test"
    max_new_tokens: Count = 96
    batch_size: Count = 256
    fidelity_rows: Annotated[int, Field(ge=0)] = Field(200, description="teacher answers compared; 0 is off")


class Recipe(Section):
    run_dir: str = Field(description="the run lives here; one folder per stage")
    seed: Annotated[int, Field(ge=0)] = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Annotated[int, Field(ge=0)] = Field(0, description="CPU threads; 0 uses every core")
    prompts: Prompts = Prompts()
    teacher: Teacher | None = None
    generate: Generate = Generate()
    filter: Filter = Filter()
    student: Student
    train: Train = Train()
    control: Control = Control()
    evaluate: Evaluate = Evaluate()

    @model_validator(mode="after")
    def _teacher_or_solutions(self):
        if self.prompts.solutions == (self.teacher is not None):
            raise ValueError(
                "give either `teacher` (distil from it) or `prompts.solutions: true` (train on worked steps)"
            )
        if self.prompts.solutions and self.prompts.source != "tasks":
            raise ValueError("`prompts.solutions` needs the embedded tasks (`prompts.source: tasks`)")
        if self.prompts.source != "tasks" and not self.evaluate.source:
            raise ValueError(
                "prompts come from a file: name held-out problems in `evaluate.source`, of the same form"
            )
        return self

    @property
    def path(self) -> Path:
        return Path(self.run_dir)


def _nearest(name: str, valid) -> str:
    valid = list(valid)
    close = difflib.get_close_matches(name, valid, n=1)
    return f"; did you mean '{close[0]}'?" if close else f"; valid: {', '.join(valid)}"


def find_file(path: str) -> Path:
    """A recipe or shipped checkpoint named relative to here, or else to the project folder."""
    here = Path(path)
    if not here.exists() and not here.is_absolute() and (PROJECT_ROOT / here).exists():
        return PROJECT_ROOT / here
    return here


def load_recipe(path: str, overrides: list[str] = ()) -> Recipe:
    """Read a recipe, apply `key.sub=value` overrides, check everything.

    Raises UserError with one line per problem: unreadable file, unknown key (with the nearest valid
    one), wrong type, value out of bounds, contradiction.
    """
    file = find_file(path)
    if not file.is_file():
        known = sorted(p.name for p in (PROJECT_ROOT / "recipes").glob("*.yaml"))
        raise UserError(f"recipe '{path}' not found; shipped recipes: {', '.join(known)}")
    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(data, dict):
        raise UserError(f"{file}: a recipe is a mapping of keys to values, see recipes/demo.yaml")
    problems: list[str] = []
    for override in overrides:
        problem = _apply_override(data, override)
        if problem:
            problems.append(problem)
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        problems += [_explain(e, file) for e in error.errors()]
    if problems:
        raise UserError(*problems)
    return recipe


def _apply_override(data: dict, override: str) -> str | None:
    """Set one `a.b.c=value` (value read as YAML) in `data`; returns the problem, if any."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        return f"'{override}': an override is written key.sub=value, for example train.steps=200"
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return f"'{override}': the value is not valid YAML; quote it"
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


def _explain(error: dict, file: Path) -> str:
    """One pydantic error as one line: where, what, and the nearest valid name for an unknown key."""
    where = ".".join(str(part) for part in error["loc"]) or "recipe"
    if error["type"] == "extra_forbidden":
        section: Any = Recipe
        for part in error["loc"][:-1]:
            section = _section_type(section, part)
        name = str(error["loc"][-1])
        return f"{file}: unknown key '{where}'{_nearest(name, getattr(section, 'model_fields', {}))}"
    if error["type"] == "missing":
        return f"{file}: '{where}' is missing; add it"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{file}: {where}: {message}"
    return f"{file}: '{where}' is {error['input']!r}: {message[0].lower()}{message[1:]}"


def _section_type(section: Any, part: Any) -> Any:
    """The Section class behind a field, looking through Optional and list annotations."""
    field = getattr(section, "model_fields", {}).get(part)
    if field is None:
        return section
    candidates = [field.annotation, *getattr(field.annotation, "__args__", ())]
    for candidate in candidates:
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return section
