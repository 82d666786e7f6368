"""The recipe's sections about data: which questions, and which answers are kept. See distill/config.py."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from distill.errors import nearest
from distill.presets import PRESETS, fill_in
from distill.sections import Count, Section
from distill.tasks import FAMILIES, LEVELS
from distill.verify import check_pattern

Share = Annotated[float, Field(gt=0.0, le=1.0)]
PresetName = Literal[tuple(PRESETS)]


class Prompts(Section):
    """Where training questions come from: the embedded tasks, a local file, or a dataset on the hub."""

    source: str = Field(
        "tasks", description="'tasks', a .jsonl, .parquet or .csv file, or 'hub:org/name' (or name@revision)"
    )
    preset: PresetName | None = Field(
        None, description="a benchmark's columns, template and verifier; without `source`, from the hub"
    )
    config: str | None = Field(None, description="hub: the dataset's config")
    split: str | None = Field(None, description="hub: the dataset's split; empty: train")
    levels: dict[str, Annotated[int, Field(ge=0)]] = Field(
        {"easy": 800, "medium": 800, "hard": 1600}, description="embedded tasks: prompts per level"
    )
    families: list[str] = Field(list(FAMILIES), description="embedded tasks: which families")
    solutions: bool = Field(
        False, description="no teacher: train on given solutions (how the embedded teacher is made)"
    )
    solution_column: str | None = Field(None, description="with `solutions`, files: the column they stand in")
    distinct: bool = Field(
        True, description="embedded tasks: no prompt twice; false for long from-scratch runs"
    )
    limit: Count | None = Field(None, description="files and hub: use the first rows only")
    prompt_column: str = Field("prompt", description="files: column with the question, or chat messages")
    answer_column: str = Field("answer", description="files: column with the final answer ('' if none)")
    completion_column: str | None = Field(None, description="files: score these texts instead of sampling")
    template: str | None = Field(None, description="prompt made of columns, as '{question}\\n{choices}'")
    verifier: Literal["exact", "numeric", "choice", "regex", "math"] = Field(
        "exact", description="rule that compares answers"
    )
    pattern: str | None = Field(
        None, description="verifier regex: found in a right answer; {answer} is the reference, escaped"
    )
    system: str | None = Field(None, description="system message put before every question")

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, data: Any):
        return fill_in(data, "train")

    @model_validator(mode="after")
    def _known_names(self):
        for name in self.levels:
            if name not in LEVELS:
                raise ValueError(f"unknown level '{name}'{nearest(name, LEVELS)}")
        for name in self.families:
            if name not in FAMILIES:
                raise ValueError(f"unknown family '{name}'{nearest(name, FAMILIES)}")
        return self

    @model_validator(mode="after")
    def _given_solutions(self):
        from_file = self.solutions and self.source != "tasks"
        if from_file != (self.solution_column is not None):
            raise ValueError(
                "`solutions: true` on a file needs `solution_column`, the completions to train on, and nothing "
                "else has one: give both or neither"
            )
        return self

    @model_validator(mode="after")
    def _regex(self):
        if (self.verifier == "regex") != (self.pattern is not None):
            raise ValueError("`pattern` and `verifier: regex` belong together: give both or neither")
        if self.pattern is not None:
            check_pattern(self.pattern)
        return self


class Filter(Section):
    """Which teacher answers become training rows. What is empty or off drops nothing."""

    correct_only: bool = Field(True, description="rejection sampling: keep what the verifier accepts")
    completions: Literal["whole", "teacher_answer", "reference_answer", "shuffled"] = Field(
        "whole",
        description="what of a kept answer is trained on: all of it, its final answer, the public one, or (as a "
        "control) another prompt's",
    )
    keep_unverified: bool = Field(
        False, description="with correct_only: keep answers to prompts without a reference, nothing to verify"
    )
    deduplicate: bool = Field(True, description="identical completions of one prompt are kept once")
    max_per_prompt: Count | None = Field(None, description="at most this many completions per prompt")
    max_tokens: Count | None = Field(None, description="prompt plus completion at most this long")
    min_tokens: Count | None = Field(None, description="completion at least this long, with its end token")
    min_characters: Count | None = Field(None, description="completion's text at least this long")
    max_characters: Count | None = Field(None, description="completion's text at most this long")
    finish_reasons: list[str] | None = Field(
        None, description="keep these reasons to stop only; empty: all but 'length'"
    )
    near_duplicates: Share | None = Field(
        None, description="drop what is this similar to a kept row: Jaccard, 3-word shingles"
    )
    charset: Literal["latin", "cjk"] | None = Field(None, description="script of the answer's letters")
    charset_share: Share = Field(0.9, description="at least this share of them")
    decontaminate: bool | None = Field(
        None, description="drop prompts that are held out; empty: on for files and hub, off for tasks"
    )
    decontaminate_ngram: Count = Field(8, description="words in a row that count as shared")
    decontaminate_share: Share = Field(0.5, description="share of its n-grams from which a prompt is dropped")
