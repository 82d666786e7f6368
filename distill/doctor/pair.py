"""What the checks before a run look at and how they say it: the pair by its configs, and findings.

What a check before a run found: one line each, how serious it is, and what to do about it.

    finding = Finding("context", FAIL, "40 + 512 tokens exceed the teacher's 256", "generate.max_new_tokens=200")
    print(format_findings([finding]))

`distill doctor` prints them all; commands that spend time stop at a FAIL and print a WARN once
(distill/doctor/checks.py).

Teacher and student as their configs and tokenizers describe them: what the checks before a run look at.

    pair = Pair(recipe, "run")
    pair.student.tokenizer, pair.teacher.context, pair.training_rows        # each read once, when first asked for

No weights are read. A teacher behind an endpoint has no config here: `pair.teacher` is None.
"""

import contextlib
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from distill import console
from distill.config.recipe import Recipe
from distill.data.prompts import file_prompts, held_out, task_prompts
from distill.devices import pick_device
from distill.errors import UserError
from distill.models.chat import check_prompts, has_own_template, prompt_ids, refused_prompts
from distill.models.describe import describe_config
from distill.models.load import check_adapter_base, load_config, load_tokenizer, resolve_model
from distill.models.student import (
    LoraPlan,
    plan_lora,
    student_config,
    student_skeleton,
    student_tokenizer,
    wrap_lora,
)
from distill.tasks.corpus import documents

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


# ==== Teacher and student as their configs and tokenizers describe them ====

SAMPLE = 256  # of the prompts, the longest in characters and the shortest are counted in tokens
_TASKS = 40  # embedded problems per level that are looked at: their lengths hardly vary


class Side:
    """One of the two: `role` is "teacher" or "student", `name` what the recipe calls it."""

    def __init__(
        self,
        role: str,
        name: str | None,
        config: Callable[[], Any],
        tokenizer: Callable[[], Any],
        made_from: str | None = None,
    ):
        """`name` None: from scratch. `made_from`: the model that it is going to be made from."""
        self.role, self.name, self.made_from = role, name, made_from
        self._config, self._tokenizer = config, tokenizer

    @cached_property
    def config(self) -> Any:
        return self._config()

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._tokenizer()

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What `distill describe` says."""
        return describe_config(self.config)

    @property
    def label(self) -> str:
        if self.made_from:
            return f"{self.role} made from '{self.made_from}'"
        return f"{self.role} '{self.name or 'from scratch'}'"

    @property
    def has_template(self) -> bool:
        return has_own_template(self.tokenizer)

    @property
    def context(self) -> int | None:
        return getattr(self.config.get_text_config(decoder=True), "max_position_embeddings", None)

    @property
    def rows(self) -> int:
        """Of the embedding: the width of the logits, padding included."""
        return self.config.get_text_config(decoder=True).vocab_size

    @cached_property
    def configured_ends(self) -> set[int]:
        """Ids at which the model's own generation config ends an answer."""
        found = getattr(self.config.get_text_config(decoder=True), "eos_token_id", None)
        if self.name:
            # Without a file of its own, transformers derives it from the config.
            with contextlib.suppress(OSError, ValueError):
                found = GenerationConfig.from_pretrained(base_of(self.name)).eos_token_id
        return {i for i in (found if isinstance(found, list) else [found]) if i is not None}

    @property
    def ends(self) -> set[int]:
        """Ids at which an answer of this model ends here: the tokenizer's end token and the configured ones."""
        return self.configured_ends | {self.tokenizer.eos_token_id}

    def token(self, index: int) -> str:
        """For people, on one line: a token may be a line break."""
        return repr(self.tokenizer.convert_ids_to_tokens(index))


def model_side(role: str, name: str, template_arguments: dict[str, Any] | None = None) -> Side:
    """A named model; of an adapter folder, its base's config and its own tokenizer."""
    return Side(
        role, name, lambda: load_config(base_of(name)), lambda: load_tokenizer(name, template_arguments)
    )


def base_of(name: str) -> str:
    """The model itself, or the base of an adapter folder. Raises UserError for a folder that is not there."""
    folder = Path(resolve_model(name))
    return check_adapter_base(folder) if (folder / "adapter_config.json").is_file() else str(folder)


@dataclass(frozen=True)
class Lengths:
    """Tokens of the longest prompts and of the shortest, through one model's own template."""

    longest: list[int]  # descending
    shortest: int


class Pair:
    """A recipe's two models, its device and its prompts. `command`: what is going to run."""

    def __init__(self, recipe: Recipe, command: str = "run"):
        self.recipe, self.command = recipe, command
        self._lengths: dict[tuple[str, str], Lengths | None] = {}
        named = recipe.teacher and not recipe.teacher.endpoint
        self.teacher = (
            model_side("teacher", recipe.teacher.model, recipe.teacher.chat_template_kwargs)
            if named
            else None
        )
        start = recipe.student
        # One tokenizer of 260,000 tokens takes seconds and a quarter of a gigabyte.
        shared = (
            bool(named)
            and start.model == recipe.teacher.model
            and start.chat_template_kwargs == recipe.teacher.chat_template_kwargs
        )
        self.student = Side(
            "student",
            start.model,
            lambda: student_config(start),
            lambda: self.teacher.tokenizer if shared else student_tokenizer(start),
            start.made_from and start.made_from.model,
        )

    @cached_property
    def draft(self) -> Side | None:
        """Who guesses for the teacher while it writes; None where nobody does."""
        name = self.recipe.teacher.draft if self.recipe.teacher and self.does("generate") else None
        return model_side("draft", name) if name else None

    @property
    def sides(self) -> list[Side]:
        return [s for s in (self.teacher, self.student) if s]

    @property
    def on_logits(self) -> list[str]:
        """Names of the objectives that compare a live teacher token by token of one vocabulary."""
        return [o.name for o in self.recipe.train.objectives if o.live and o.signal != "aligned"]

    @cached_property
    def device(self) -> torch.device:
        """Raises UserError where the recipe's device is not there."""
        return pick_device(self.recipe.device, self.recipe.threads)

    def does(self, *work: str) -> bool:
        """Whether the command does any of this: generate, filter, train, evaluate."""
        return self.command == "run" or self.command in work

    @cached_property
    def adapted(self) -> tuple[LoraPlan, nn.Module]:
        """The plan of the student's LoRA, and a skeleton of the student that carries it. Raises UserError."""
        section = self.recipe.student
        skeleton = student_skeleton(section)
        plan = plan_lora(skeleton, section.lora, section.quantize)
        return plan, wrap_lora(skeleton, section.lora, plan)

    @property
    def adapter_parameters(self) -> int:
        return sum(p.numel() for p in self.adapted[1].parameters() if p.requires_grad)

    @cached_property
    def training_rows(self) -> list[dict] | None:
        """Prompts, or None where they are on the hub: nothing is downloaded to look at them. A few of the embedded."""
        section = self.recipe.prompts
        if section.source == "tasks":
            few = {level: min(n, _TASKS) for level, n in section.levels.items()}
            return task_prompts("train", few, section, self.recipe.seed)
        if section.documents:
            documents(section.source, "train", "prompts.source")  # that it can be read
            return None
        if section.source.startswith("hub:"):
            return None
        with console.slow(f"reading {section.source}"):
            return file_prompts(section.source, section, "train")

    @cached_property
    def test_rows(self) -> list[dict] | None:
        section = self.recipe.evaluate
        if (section.source or "").startswith("hub:"):
            return None
        few = {level: min(n, _TASKS) for level, n in section.levels.items()}
        section = section.model_copy(update={"levels": few})
        with console.slow(f"reading {section.source}"):
            return held_out(section, self.recipe.prompts, self.recipe.seed)

    def lengths(self, who: Side, which: str) -> Lengths | None:
        """Tokens of the "training" or "held-out" prompts for this model; None where they cannot be read.

        Counted are those that are longest in characters, and the shortest.
        """
        if (who.role, which) not in self._lengths:
            rows = self.training_rows if which == "training" else self.test_rows
            self._lengths[who.role, which] = _count(who, rows, which) if rows else None
        return self._lengths[who.role, which]


def _count(who: Side, rows: list[dict], which: str) -> Lengths:
    """Raises UserError where its chat template refuses them, or some of them."""
    with console.slow(f"rendering the {which} prompts for {who.label}"):
        few = rows[:6]
        refused = list(refused_prompts(who.tokenizer, few))
        if len(refused) == len(few):
            raise UserError(
                f"the chat template of {who.label} refuses the prompts ({refused[0][1]}); leave out prompts.system, or "
                "give the tokenizer a template that takes these roles"
            )
        check_prompts(who.tokenizer, rows, f"{who.label}, {which}")
    ordered = sorted((row["messages"] for row in rows), key=lambda ms: -sum(len(m["content"]) for m in ms))
    longest = [len(prompt_ids(who.tokenizer, messages)) for messages in ordered[:SAMPLE]]
    shortest = len(prompt_ids(who.tokenizer, ordered[-1]))
    return Lengths(sorted(longest, reverse=True), min(shortest, *longest))
