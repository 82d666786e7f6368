"""The recipe's sections about data: which questions, and which answers are kept. See distill/config/recipe.py."""

import re
from datetime import date
from typing import Annotated, Any, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from distill.config.section import (
    Count,
    Fraction,
    Section,
    Signal,
    TemplateArguments,
    Whole,
)
from distill.errors import nearest
from distill.tasks.corpus import PRESETS, fill_in
from distill.tasks.problems import FAMILIES, LEVELS
from distill.tasks.verify import check_pattern

Share = Annotated[float, Field(gt=0.0, le=1.0)]
PresetName = Literal[tuple(PRESETS)]


class Prompts(Section):
    """Where training questions come from: the embedded tasks, a local file, or a dataset on the hub."""

    later: ClassVar = ("last_turn", "documents", "window")

    source: str = Field(
        "tasks",
        description="'tasks', a .jsonl, .json, .csv, .tsv or .parquet file, or 'hub:org/name' (or name@revision)",
    )
    preset: PresetName | None = Field(
        None, description="a benchmark's columns, template and verifier; without `source`, from the hub"
    )
    config: str | None = Field(None, description="hub: the dataset's config")
    split: str | None = Field(None, description="hub: the dataset's split; empty means train")
    levels: dict[str, Whole] = Field(
        {"easy": 800, "medium": 800, "hard": 1600}, description="embedded tasks: prompts per level"
    )
    families: list[str] = Field(list(FAMILIES), description="embedded tasks: which families")
    solutions: bool = Field(
        False, description="train on given solutions, without a teacher (the embedded teacher was made so)"
    )
    solution_column: str | None = Field(
        None, description="files, with `solutions`: the column that holds the solutions"
    )
    distinct: bool = Field(
        True, description="embedded tasks: no prompt occurs twice; set false for long runs from scratch"
    )
    limit: Count | None = Field(None, description="files and hub: use the first rows only")
    documents: bool = Field(
        False,
        description="train on plain text instead of questions. `source` is then a .txt file, a .jsonl file "
        "with a column `text`, or 'python-docs' (the English documentation inside Python). A live"
        " teacher scores the text",
    )
    window: Annotated[int, Field(ge=8)] = Field(128, description="with `documents`: tokens of a training row")
    prompt_column: str = Field(
        "prompt", description="files: column with the question: text, or a conversation (a list of messages)"
    )
    last_turn: Literal["drop", "reference", "refuse"] = Field(
        "drop",
        description="what to do with a conversation's last assistant turn. drop: leave it out. reference: use"
        " it as the final answer, so no answer column is needed. refuse: report such a row as a "
        "mistake",
    )
    answer_column: str = Field("answer", description="files: column with the final answer ('' if none)")
    completion_column: str | None = Field(
        None, description="files: column with finished answers; they are scored, and nothing is sampled"
    )
    template: str | None = Field(
        None, description="how a prompt is made of columns, for example '{question}\\n{choices}'"
    )
    verifier: Literal["exact", "contains", "numeric", "choice", "regex", "math"] = Field(
        "exact", description="the rule that compares an answer with the reference"
    )
    pattern: str | None = Field(
        None,
        description="with verifier regex: the pattern that a right answer contains; {answer} stands for the "
        "reference",
    )
    system: str | None = Field(
        None,
        description="system message before every question; a conversation that has a different one is refused",
    )

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
    def _plain_text(self):
        if self.documents and (self.source == "tasks" or self.source.startswith("hub:") or self.solutions):
            raise ValueError(
                "`documents: true` needs a `source` of plain text (a .txt or .jsonl file, or python-docs) and no "
                "`solutions`"
            )
        if self.source == "python-docs" and not self.documents:
            raise ValueError("`source: python-docs` is plain text: set `documents: true`")
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

    correct_only: bool = Field(
        True, description="rejection sampling: keep only answers that the verifier accepts"
    )
    completions: Literal["whole", "teacher_answer", "reference_answer", "shuffled"] = Field(
        "whole",
        description="the part of a kept answer to train on. whole: all of it. teacher_answer: its final "
        "answer. reference_answer: the public final answer. shuffled: another prompt's answer, as"
        " a control",
    )
    shuffled_share: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0,
        description="with shuffled: the share of prompts that get another's answer; a larger share contains "
        "the smaller one",
    )
    keep_unverified: bool = Field(
        False,
        description="with correct_only: keep answers that cannot be checked because their prompt has no "
        "reference",
    )
    deduplicate: bool = Field(True, description="identical completions of one prompt are kept once")
    max_per_prompt: Count | None = Field(None, description="at most this many completions per prompt")
    max_tokens: Count | None = Field(None, description="prompt plus completion at most this long")
    min_tokens: Count | None = Field(None, description="completion at least this long, with its end token")
    min_characters: Count | None = Field(None, description="completion's text at least this long")
    max_characters: Count | None = Field(None, description="completion's text at most this long")
    finish_reasons: Annotated[list[Literal["stop", "length"]], Field(min_length=1)] | None = Field(
        None,
        description="keep answers that ended in one of these ways. stop: by themselves. length: cut off; they"
        " are trained on without an end token. empty: stop alone",
    )
    near_duplicates: Share | None = Field(
        None,
        description="drop an answer if it is at least so similar to a kept one (Jaccard similarity of runs of"
        " 3 words)",
    )
    charset: Literal["latin", "cjk"] | None = Field(
        None, description="the script that an answer's letters must be of"
    )
    charset_share: Share = Field(0.9, description="with charset: at least this share of the letters")
    decontaminate: bool | None = Field(
        None, description="drop prompts that are held out; empty: on for files and hub, off for tasks"
    )
    decontaminate_ngram: Count = Field(8, description="words in a row that count as shared")
    decontaminate_share: Share = Field(
        0.5, description="drop a prompt if at least this share of its n-grams occurs in held-out problems"
    )

    @model_validator(mode="after")
    def _some_length_fits(self):
        for unit in ("tokens", "characters"):
            least, most = getattr(self, f"min_{unit}"), getattr(self, f"max_{unit}")
            if least and most and least > most:
                raise ValueError(
                    f"no answer has `min_{unit}` {least} and `max_{unit}` {most}; lower the first"
                )
        return self


class Terms(Section):
    """What the teacher's licence or terms of use say about training on its outputs. Not legal advice."""

    train_other_models: Literal["yes", "no", "same_provider", "unknown"] | None = Field(
        None,
        description="may its outputs train another model? empty: the answer is read from the model card or "
        "the shipped table",
    )
    name: str | None = Field(None, description="name of the licence or the terms, for example MIT")
    url: str | None = Field(None, description="address of their text")
    read: date | None = Field(None, description="when you read them")
    provider: str | None = Field(
        None, description="with same_provider: the provider whose models may be trained"
    )
    acknowledged: str | None = Field(
        None, description="your name and your reason, if you go on although the answer is not yes"
    )

    @field_validator("train_other_models", mode="before")
    @classmethod
    def _words(cls, value):
        return {True: "yes", False: "no"}.get(value, value) if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _named(self):
        if self.train_other_models in ("yes", "same_provider") and not self.name:
            raise ValueError("say which licence or terms allow it: add `name` (and `url`, `read`)")
        if self.train_other_models == "same_provider" and not self.provider:
            raise ValueError("`same_provider` needs `provider`: whose models may be trained")
        if self.acknowledged is not None and not self.acknowledged.strip():
            raise ValueError("`acknowledged` says who goes on and why; it is empty")
        return self


class Endpoint(Section):
    """An OpenAI-compatible server that answers as the teacher. It gives text; weights and logits are not here."""

    base_url: str = Field(description="address of the server, for example http://localhost:8000/v1")
    api_key_env: str | None = Field(
        "OPENAI_API_KEY", description="name of the environment variable that holds the key; null: no key"
    )
    concurrency: Annotated[int, Field(ge=1, le=10_000)] = Field(
        8, description="how many requests run at the same time, per process"
    )
    timeout: Annotated[float, Field(gt=0, le=86400)] = Field(60.0, description="seconds for one whole answer")
    retries: Annotated[int, Field(ge=0, le=1000)] = Field(
        5, description="how often a failed request is tried again"
    )
    backoff: Annotated[float, Field(ge=0, le=3600)] = Field(
        1.0, description="seconds before the first retry; doubled for each further one"
    )
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = Field(
        0, description="keep so many log-probabilities per token; 0 keeps none"
    )
    tokenizer: str | None = Field(
        None,
        description="folder with the served model's tokenizer. With it, token ids are known, and "
        "generate.signal of kind top_k works if the server returns prompt_logprobs (vLLM)",
    )

    @model_validator(mode="after")
    def _no_secrets(self):
        # The recipe is stored with the run. Neither message may repeat what was written.
        try:
            url = urlsplit(self.base_url)
            known = url.scheme in ("http", "https") and url.hostname and url.port != 0
        except ValueError:  # a port or an address that is none
            known = False
        if not known:
            raise ValueError("`base_url` must be like http://localhost:8000/v1; correct it")
        if url.username or url.password or url.query or url.fragment:
            raise ValueError(
                "`base_url` holds a user or a query; the key belongs in the variable `api_key_env`"
            )
        if self.api_key_env is not None and not re.fullmatch("[A-Z_][A-Z0-9_]*", self.api_key_env):
            raise ValueError(
                "`api_key_env` is the NAME of an environment variable in capitals, never the key; give its name"
            )
        return self


class TeacherSection(Section):
    """Whose outputs train the student: any causal LM from a folder or the hub, or one behind a server."""

    later: ClassVar = ("chat_template_kwargs", "engine", "engine_options", "draft", "draft_tokens")
    model: str = Field(description="folder or hub name of any causal LM")
    chat_template_kwargs: TemplateArguments = Field(
        {},
        description="arguments for its chat template, for example {enable_thinking: false}; a server receives"
        " them too",
    )
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="number format of its weights; auto: the stored one"
    )
    device: Literal["auto", "cpu", "sharded"] = Field(
        "auto",
        description="where it lies while it scores for training. auto: a whole copy in every process. cpu: in"
        " main memory. sharded: its layers are spread over the processes",
    )
    quantize: Literal["none", "4bit", "8bit"] = Field(
        "none", description="store its weights in 4 or 8 bits (needs bitsandbytes)"
    )
    engine: Literal["transformers", "vllm"] = Field(
        "transformers",
        description="what runs it in `generate`: this project's own decoder, or vLLM on this machine (an "
        "extra). Training and evaluation always use transformers",
    )
    engine_options: TemplateArguments = Field(
        {},
        description="with engine vllm: arguments for vllm.LLM, for example {gpu_memory_utilization: 0.8, "
        "max_model_len: 4096}",
    )
    draft: str | None = Field(
        None,
        description="a smaller model with the same tokenizer that guesses the teacher's next tokens in "
        "`generate`. The answers stay the same. It is faster if few are written at a time "
        "(generate.batch_size 1 to 4)",
    )
    draft_tokens: Annotated[int, Field(ge=1, le=16)] = Field(
        3, description="with `draft`: how many tokens it guesses at a time"
    )
    endpoint: Endpoint | None = Field(None, description="a server that answers; `model` is its name there")
    terms: Terms = Terms()

    @model_validator(mode="after")
    def _one_engine(self):
        if self.engine_options and self.engine != "vllm":
            raise ValueError("`engine_options` are those of `engine: vllm`: set it, or leave them out")
        if self.engine == "vllm" and (self.endpoint or self.quantize != "none"):
            raise ValueError(
                "`engine: vllm` loads the weights here as they are: leave out `endpoint` and `quantize`"
            )
        if self.draft and (self.endpoint or self.engine == "vllm"):
            raise ValueError(
                "`draft` is for this project's own decoder: leave out `endpoint` and `engine: vllm`, or `draft`"
            )
        if taken := sorted({"model", "dtype", "trust_remote_code", "tokenizer"} & self.engine_options.keys()):
            raise ValueError(f"`engine_options`: {taken[0]} is set by this recipe's own keys; leave it out")
        return self


class Generate(Section):
    """How the teacher answers the training prompts."""

    later: ClassVar = ("by_tag",)

    samples: Annotated[int, Field(ge=1, le=100_000)] = Field(2, description="completions per prompt")
    temperature: Annotated[float, Field(ge=0.0, le=5.0)] = Field(0.7, description="0 is greedy")
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        1.0, description="nucleus: smallest set of tokens with this share of the probability; 1 is off"
    )
    top_k: Whole = Field(0, description="0 is off")
    min_p: Fraction = Field(0.0, description="0 is off")
    max_new_tokens: Count = Field(96, description="thinking included; longer answers count as truncated")
    stop_strings: list[Annotated[str, Field(min_length=1)]] = Field(
        [], description="an answer ends when it contains one of these texts; the text is kept"
    )
    by_tag: bool = Field(
        False,
        description="each question is answered by its specialist: the teacher of its tag in "
        "`train.teachers.models`. Other tags are answered by `teacher.model`",
    )
    batch_size: Count = Field(256, description="completions decoded together")
    part_size: Count = Field(512, description="prompts per Parquet part, the unit of resuming")
    signal: Signal = Signal()
    max_tokens: Count | None = Field(
        None,
        description="stop when so many tokens of answers are written; the part in progress is finished first",
    )
    max_cost_usd: Annotated[float, Field(gt=0, le=1e12)] | None = Field(
        None,
        description="stop when the cost, at `prices`, reaches this; the part in progress is finished first",
    )


class Prices(Section):
    """What things cost you, for forecasts and `generate.max_cost_usd`. Nothing is assumed."""

    usd_per_million_input_tokens: Annotated[float, Field(ge=0, le=1e9)] | None = Field(
        None, description="USD per million tokens of prompts; empty: unknown"
    )
    usd_per_million_output_tokens: Annotated[float, Field(ge=0, le=1e9)] | None = Field(
        None, description="USD per million tokens of answers, thinking included; empty: unknown"
    )
    usd_per_device_hour: Annotated[float, Field(ge=0, le=1e9)] | None = Field(
        None, description="USD for an hour of one device; empty: unknown"
    )
