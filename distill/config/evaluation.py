"""The recipe section `evaluate`: which held-out problems, and how they are answered.

Read and checked as part of a `Recipe` (distill/config/recipe.py); `distill evaluate CHECKPOINT` fills it from options.
"""

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from distill.config.data import PresetName
from distill.config.section import BlockPrecision, Count, Section, Seed, Whole
from distill.errors import nearest
from distill.tasks.benchmarks import fill_in
from distill.tasks.problems import SPLITS

SEEN = 10  # answers and tokens below which nothing is said about a group of them; pages read it without torch


class Interventions(Section):
    """Routing changed in every mixture of experts, answers compared (distill/evaluation/interventions.py)."""

    top_k: list[Count] = Field([], description="experts per token to try, as [1, 2, 4]")
    drop: list[str] = Field(
        [], description="experts to do without, LAYER:EXPERT, joined by + if together: ['1:3', '1:3+2:0']"
    )
    drop_each: bool = Field(
        False, description="without each expert of each layer in turn: layers x experts runs"
    )
    route: list[Literal["random", "uniform", "shuffled"]] = Field([], description="controls for the choice")
    problems: Count = Field(60, description="first problems of each level; answers are greedy")
    seed: Seed = Field(0, description="of random and shuffled")

    @field_validator("drop")
    @classmethod
    def _layer_and_expert(cls, drop: list[str]) -> list[str]:
        for text in drop:
            if not re.fullmatch(r"[\w.]+:\d+(\+[\w.]+:\d+)*", text):
                raise ValueError(f"'{text}': give LAYER:EXPERT, as 1:3, or several at once, as 1:3+2:0")
        return drop

    @property
    def any(self) -> bool:
        return bool(self.top_k or self.drop or self.drop_each or self.route)


class Evaluate(Section):
    """Which held-out problems, how they are answered, and what else is measured."""

    later: ClassVar = ("solutions", "stop")

    levels: dict[str, Whole] = Field(
        {"easy": 210, "medium": 210, "hard": 210}, description="embedded tasks: held-out problems per level"
    )
    source: str | None = Field(
        None, description="or a file or 'hub:org/name' of held-out problems, as in `prompts`"
    )
    preset: PresetName | None = Field(
        None, description="a benchmark, as in `prompts`; empty: that of `prompts`"
    )
    config: str | None = Field(None, description="hub: the dataset's config; empty: that of `prompts`")
    split: str = Field("test", description="embedded tasks: validation or test; hub: the dataset's split")
    limit: Count | None = Field(None, description="files and hub: use the first rows only")
    models: list[Literal["base", "control", "student", "teacher"]] = Field(
        [], description="of a recipe's checkpoints, these alone; empty: all it has"
    )
    max_new_tokens: Count = Field(96, description="tokens per answer; longer ones count as truncated")
    batch_size: Count = Field(
        256, description="answers decoded together, at most: as many as memory holds the keys and values of"
    )
    stop: list[Annotated[str, Field(min_length=1)]] = Field(
        [],
        description="an answer also ends before one of these; empty: for models without a chat template of their own, "
        "which run on, an empty line or the next 'User:'",
    )
    samples: Annotated[int, Field(ge=1, le=100_000)] = Field(
        1, description="answers per problem; above 1 needs a temperature"
    )
    temperature: Annotated[float, Field(ge=0.0, le=5.0)] = Field(0.0, description="0 is greedy")
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = Field(1.0, description="1 is off")
    seed: Seed = Field(0, description="of sampled answers and of every bootstrap")
    level: Annotated[float, Field(ge=0.5, lt=1.0)] = Field(
        0.95, description="of the verdicts BETTER and WORSE"
    )
    fidelity_rows: Whole = Field(
        200, description="answers read by model and teacher side by side, the teacher's and its own; 0 is off"
    )
    likelihood: bool = Field(
        False, description="multiple choice: score each option's log-likelihood as well as the written answer"
    )
    solutions: Whole = Field(
        0, description="embedded tasks: of each level so many worked solutions are read, in nats; 0 is off"
    )
    text: list[str] = Field([], description=".txt or .jsonl (column `text`) files for nats and bits per byte")
    text_window: Annotated[int, Field(ge=2, le=2**31 - 1)] = Field(
        1024, description="tokens of text in view at once, half of them scored; at most the model's context"
    )
    routing_rows: Count = Field(
        1000, description="mixture of experts: answers whose routing is read, evenly taken over all"
    )
    routes: Whole = Field(
        24, description="of these, answers whose every decision is kept in eval/routes/; 0 is off"
    )
    speed: bool = Field(True, description="time a prefill and one answer alone, seconds on a small model")
    precisions: list[
        Literal["fp32", "bf16", "fp16", "fp8-emulated", "fp8-emulated-tensor", BlockPrecision]
    ] = Field([], description="the same answers again in each of these: loss, scores, routing flips")
    harness: list[str] = Field([], description="tasks of lm-evaluation-harness, as [arc_easy, gsm8k]")
    harness_include: str | None = Field(None, description="a folder with further task files of the harness")
    harness_limit: Count | None = Field(None, description="first documents of each harness task only")
    interventions: Interventions = Interventions()

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, data: Any):
        return fill_in(data, "test")

    @model_validator(mode="after")
    def _samples_differ(self):
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(
                f"{self.samples} greedy answers are one answer; set `temperature`, for example 0.7, or samples 1"
            )
        return self

    @model_validator(mode="after")
    def _solved(self):
        if self.solutions and self.source:
            raise ValueError(
                "`solutions` reads those of the embedded tasks, and `source` brings none; leave one out"
            )
        return self

    @model_validator(mode="after")
    def _known_split(self):
        if not self.source and self.split not in SPLITS[1:]:
            raise ValueError(
                f"embedded tasks have no held-out split '{self.split}'{nearest(self.split, SPLITS[1:])}"
            )
        return self
