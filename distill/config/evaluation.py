"""The recipe section `evaluate`: which held-out problems, and how they are answered.

Read and checked as part of a `Recipe` (distill/config/recipe.py); `distill evaluate CHECKPOINT` fills it from options.
"""

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from distill.config.data import PresetName
from distill.config.section import (
    BlockPrecision,
    Count,
    Section,
    Seed,
    Whole,
)
from distill.errors import nearest
from distill.tasks.corpus import fill_in
from distill.tasks.problems import SPLITS

SEEN = 10  # answers and tokens below which nothing is said about a group of them; pages read it without torch


class Interventions(Section):
    """Routing changed in every mixture of experts, answers compared (distill/evaluation/interventions.py)."""

    top_k: list[Count] = Field([], description="experts per token to try, as [1, 2, 4]")
    drop: list[str] = Field(
        [],
        description="experts to remove, as LAYER:EXPERT; join several by +, for example ['1:3', '1:3+2:0']",
    )
    drop_each: bool = Field(
        False, description="remove each expert of each layer in turn: as many runs as layers x experts"
    )
    route: list[Literal["random", "uniform", "shuffled"]] = Field(
        [], description="replace the router's choice, as a control"
    )
    problems: Count = Field(60, description="first problems of each level; answers are greedy")
    seed: Seed = Field(0, description="seed of random and shuffled")

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
        None,
        description="instead of levels: a file or 'hub:org/name' with held-out problems, as in `prompts`",
    )
    preset: PresetName | None = Field(
        None, description="a benchmark, as in `prompts`; empty: that of `prompts`"
    )
    config: str | None = Field(None, description="hub: the dataset's config; empty: that of `prompts`")
    split: str = Field("test", description="embedded tasks: validation or test; hub: the dataset's split")
    limit: Count | None = Field(None, description="files and hub: use the first rows only")
    models: list[Literal["base", "control", "student", "teacher"]] = Field(
        [], description="measure only these checkpoints of the recipe; empty: all"
    )
    max_new_tokens: Count = Field(96, description="tokens per answer; longer ones count as truncated")
    batch_size: Count = Field(256, description="answers decoded together, at most; fewer if memory is short")
    stop: list[Annotated[str, Field(min_length=1)]] = Field(
        [],
        description="an answer ends before one of these texts. empty: models without a chat template end at "
        "an empty line or the next 'User:'",
    )
    samples: Annotated[int, Field(ge=1, le=100_000)] = Field(
        1, description="answers per problem; above 1 needs a temperature"
    )
    temperature: Annotated[float, Field(ge=0.0, le=5.0)] = Field(0.0, description="0 is greedy")
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = Field(1.0, description="1 is off")
    seed: Seed = Field(0, description="of sampled answers and of every bootstrap")
    level: Annotated[float, Field(ge=0.5, lt=1.0)] = Field(
        0.95, description="confidence level of the verdicts BETTER and WORSE"
    )
    fidelity_rows: Whole = Field(
        200,
        description="answers that model and teacher both read, the teacher's and the model's own; 0 is off",
    )
    likelihood: bool = Field(
        False, description="multiple choice: score each option's log-likelihood as well as the written answer"
    )
    solutions: Whole = Field(
        0,
        description="embedded tasks: read so many worked solutions of each level and give their loss in nats;"
        " 0 is off",
    )
    text: list[str] = Field(
        [],
        description="files of plain text, .txt or .jsonl (column `text`): their loss is given in nats per token "
        "and bits per byte",
    )
    text_window: Annotated[int, Field(ge=2, le=2**31 - 1)] = Field(
        1024,
        description="tokens of text that the model sees at once; half of them are scored. At most the model's"
        " context",
    )
    routing_rows: Count = Field(
        1000, description="MoE: answers whose routing is measured, taken evenly from all"
    )
    routes: Whole = Field(
        24, description="how many of these answers keep every routing decision, in eval/routes/; 0 is off"
    )
    speed: bool = Field(
        True,
        description="measure the speed of reading a prompt and of writing one answer alone; takes seconds on a "
        "small model",
    )
    precisions: list[
        Literal["fp32", "bf16", "fp16", "fp8-emulated", "fp8-emulated-tensor", BlockPrecision]
    ] = Field([], description="measure again in each of these number formats: loss, scores, changed routing")
    harness: list[str] = Field([], description="tasks of lm-evaluation-harness, as [arc_easy, gsm8k]")
    harness_include: str | None = Field(None, description="a folder with further task files of the harness")
    harness_limit: Count | None = Field(
        None, description="use only the first so many documents of each harness task"
    )
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
