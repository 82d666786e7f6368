"""metrics.json, typed: every key that an evaluation writes, what it means and in what unit. Version 2.

One source of truth: `check` holds what is written to these models, and the JSON Schema beside the code
(distill/schemas/metrics.schema.json, for readers in other languages) is exported from them:

    python -m distill.evaluation.schema            # rewrites the schema file; a test compares the two
    check(metrics)                              # RunError naming every key that does not fit

An optional key is absent where it was not measured, never null by accident: null is a number that does not
exist (the accuracy of no problems). Intervals are [low, high] at 95 % whatever the level of the verdicts.
Version 2 added to version 1: sampled answers, likelihood, text, calibration, forgetting, usage, harness,
warnings, and the settings; nothing of version 1 was renamed.
"""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from distill.errors import RunError
from distill.storage import write_atomic

METRICS_VERSION = 2
SCHEMA_FILE = Path(__file__).parent / "schemas" / "metrics.schema.json"

Number = float | None
Interval = list[float] | None


class Block(BaseModel):
    """Keys that are ours: an unknown one is a mistake."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Open(BaseModel):
    """Keys that other modules add to: the named ones are promised, others may stand beside them."""

    model_config = ConfigDict(extra="allow", strict=True)


# ------------------------------------------------------------------------------------------- answers


class Score(Block):
    n: int = Field(description="problems")
    accuracy: Number = Field(description="share answered correctly, 0 to 1; with samples, mean pass@1")
    stderr: Number = Field(description="of accuracy, over problems")
    ci95: Interval = Field(description="95 % interval of accuracy; `interval` says which")


class TaskScore(Score):
    interval: Literal["wilson", "bootstrap over problems"] = Field(
        description="wilson where a problem has one answer; otherwise a bootstrap that draws whole problems, "
        "because the answers to one problem are not independent"
    )
    samples: int = Field(description="answers per problem")
    pass_at_k: dict[str, Number] = Field(
        description="chance that one of k answers is right, unbiased (arXiv 2107.03374, equation 1); k as a string"
    )
    pass_at_k_ci95: dict[str, Interval] | None = Field(None, description="with samples: over problems")
    majority_at_k: dict[str, Number] | None = Field(
        None, description="with samples: chance that a vote among k answers elects the right one"
    )
    majority_at_k_ci95: dict[str, Interval] | None = Field(None, description="over problems")
    truncated: int = Field(description="answers cut at max_new_tokens; they count as not correct")
    no_answer: int = Field(
        description="answers that are empty, never left <think>, or state nothing that can be read"
    )
    unparsed: int = Field(
        description="finished answers in which the verifier finds no final answer (no number, no letter), "
        "those of no_answer included"
    )
    errors: int = Field(description="answers that failed, as by non-finite logits; the rows say how")
    mean_tokens: Number = Field(description="tokens written per answer, the end token included")
    mean_thinking_tokens: Number = Field(description="of these, up to and with the last </think>")
    mean_answer_tokens: Number = Field(description="of these, after it")


class LikelihoodScore(Block):
    """Multiple choice by the log-likelihood of each option, under four normalisations."""

    form: Literal["chat", "plain"] = Field(
        "chat",
        description="chat: after the prompt, through the model's template; plain: as lm-evaluation-harness writes it, "
        "without one",
    )
    options: Literal["letter", "text"] = Field(
        description="what was scored: the letter (chat: 'Answer: B', plain: ' B'), or the words of the choice"
    )
    mean_options: float = Field(description="choices per problem")
    errors: int = Field(description="problems with a non-finite option; they count as not correct")
    sum: Score = Field(description="by log p(option); plain: acc of lm-evaluation-harness")
    per_character: Score | None = Field(
        None, description="by log p(option) / its characters; plain: acc_norm of lm-evaluation-harness"
    )
    per_token: Score = Field(description="by log p(option) / its tokens")
    per_byte: Score = Field(description="by log p(option) / its UTF-8 bytes")


# ---------------------------------------------------------------------------- fidelity and calibration


class Agreement(Block):
    """Teacher and model side by side, teacher-forced, temperature 1. Errors are clustered by answer."""

    answers: int
    tokens: int
    not_finite: int = Field(description="tokens left out because one model's logits are not finite")
    top1_agreement: Number = Field(description="share of tokens at which both most likely next tokens agree")
    top1_agreement_stderr: Number
    top1_agreement_ci95: Interval
    forward_kl: Number = Field(description="KL(teacher || model), nats per token")
    forward_kl_stderr: Number
    forward_kl_ci95: Interval
    reverse_kl: Number = Field(description="KL(model || teacher), nats per token")
    reverse_kl_stderr: Number
    reverse_kl_ci95: Interval


class TextScore(Block):
    """Negative log-likelihood of text. Nats, except bits_per_byte."""

    tokens: int = Field(description="tokens scored, every one once")
    bytes: int = Field(description="UTF-8 bytes of the text (an added end token has none)")
    documents: int
    nll_per_token: Number
    nll_per_token_stderr: Number = Field(description="clustered by document, or by window if there is one")
    nll_per_byte: Number = Field(description="comparable between tokenizers, as nll_per_token is not")
    bits_per_byte: Number
    perplexity: Number = Field(description="exp(nll_per_token)")
    window: int | None = Field(
        description="tokens a pass sees at most; null: whole answers after their prompts"
    )
    stride: int | None = Field(description="tokens scored per pass; the rest of the window is context")
    not_finite: int = Field(description="tokens left out because their logits are not finite")
    teacher: Agreement | None = Field(
        None, description="files, with a teacher of the same vocabulary: both read the text side by side"
    )


class Fidelity(Agreement):
    """On the teacher's own answers; `own_text` is the same on the answers that the model itself wrote."""

    own_text: Agreement | None = None


class Bin(Block):
    low: float = Field(description="confidence above which a prediction falls here (the first: from 0)")
    high: float = Field(description="and up to which")
    n: int
    confidence: Number = Field(description="mean confidence")
    accuracy: Number = Field(description="share that was right")


class AnswerCalibration(Block):
    """Greedy, finished answers: the probability of the whole answer against its being right."""

    n: int
    ece: Number = Field(description="sum over bins of n_b/n |accuracy_b - confidence_b|")
    brier: Number = Field(description="mean (probability - right)^2")
    bins: list[Bin]


class Calibration(Block):
    """Tokens: the next-token distribution against what the teacher really wrote. 15 equal-width bins."""

    tokens: int | None = Field(None, description="tokens of teacher answers")
    ece: Number = Field(
        None,
        description="expected calibration error of the most likely token (Naeini et al. 2015; Guo et al. 2017, "
        "arXiv 1706.04599, equation 3), 15 bins of equal width as there",
    )
    brier: Number = Field(None, description="sum over the vocabulary of (p - 1[token])^2, mean; 0 to 2")
    nll: Number = Field(None, description="nats per token of the teacher's text")
    bins: list[Bin] | None = Field(None, description="the reliability diagram of the tokens")
    answers: AnswerCalibration | None = None


# ------------------------------------------------------------------------------------------------ cost


class Ahead(Block):
    """Drafts of a module for a token further ahead that lies beside the weights (distill/models/ahead.py)."""

    answers: int = Field(description="greedy ones, in which drafts were counted")
    drafts: int = Field(description="that could have been taken")
    acceptance: float = Field(description="share of them that were the model's own next token")
    tokens_per_pass: float = Field(description="tokens of answers over passes of the model, 1 without drafts")
    tokens_per_second: Number = Field(None, description="answers written alone, with drafts")
    tokens_per_second_without: Number = Field(None, description="the same answers without")


class Cost(Block):
    seconds: float = Field(description="answering the problems")
    prompt_tokens: int
    generated_tokens: int
    decode_tokens_per_second: float = Field(
        description="generated tokens over those seconds, prefill included, in batches of `batch_size`"
    )
    batch_size: int
    flops: int = Field(description="forward FLOPs of answering: flops_per_token times all tokens")
    flops_per_answer: int
    prefill_tokens: int | None = Field(None, description="tokens of the one prompt that was timed")
    prefill_tokens_per_second: Number = Field(None, description="median of three, batch 1")
    decode_tokens_per_second_batch_1: Number = Field(None, description="of the median step, one answer alone")
    weight_bytes: int
    kv_bytes_per_token: int
    usd_per_hour: Number = Field(None, description="as given; nothing is assumed")
    usd_per_million_input_tokens: Number = Field(None, description="at prefill_tokens_per_second")
    usd_per_million_output_tokens: Number = Field(None, description="at decode_tokens_per_second")
    ahead: Ahead | None = Field(None, description="where such a module lies beside the weights")


class ModelSize(Open):
    """What `distill describe` says of it."""

    parameters_total: int
    parameters_active: int
    flops_per_token: int
    kv_bytes_per_token: int
    weight_bytes: int


class Moe(Open):
    """Routing while the problems were answered, real tokens only; further analyses stand beside `layers`."""

    layers: dict[str, dict[str, Any]] = Field(
        description="per router: tokens, load, max_violation, entropies, dead_experts, ..."
    )


class HarnessTask(Block):
    """One task as lm-evaluation-harness reports it."""

    n: int | None = Field(description="documents scored")
    metrics: dict[str, Number] = Field(description="'metric,filter': value")
    stderr: dict[str, Number] = Field(description="the same keys; null where the harness gives none")
    version: str | None
    hash: str | None = Field(description="of the task's prompts and targets, where the harness gives one")
    shots: int | None


class Harness(Block):
    lm_eval: str = Field(description="version of the package")
    limit: int | None = Field(description="first documents of each task only")
    tasks: dict[str, HarnessTask]
    seconds: float
    moe: Moe | None = Field(None, description="routing during these tasks")


class ModelMetrics(Block):
    path: str
    model: ModelSize
    tasks: dict[str, TaskScore]
    families: dict[str, dict[str, TaskScore]] = Field(description="the same, per family and task")
    likelihood: dict[str, list[LikelihoodScore]] | None = Field(None, description="per multiple-choice task")
    solutions: dict[str, TextScore] | None = Field(
        None, description="per level: the worked solutions of its first problems, read after their questions"
    )
    text: dict[str, TextScore] | None = Field(
        None, description="per file, and `teacher_answers`: the teacher's answers after their prompts"
    )
    fidelity: Fidelity | None = Field(None, description="where there is a teacher with the same vocabulary")
    calibration: Calibration | None = None
    moe: Moe | None = None
    cost: Cost
    harness: Harness | None = None
    interventions: list[dict[str, Any]] | None = Field(
        None, description="sweeps of the routing, one entry each"
    )
    precision: list[dict[str, Any]] | None = Field(None, description="the same answers in other precisions")
    warnings: list[str] = Field(description="what a reader must know before quoting a number from here")


# --------------------------------------------------------------------------------- several models together


class Comparison(Block):
    a: str
    b: str
    task: str
    n: int = Field(description="problems that both answered")
    difference: Number = Field(description="accuracy of b minus accuracy of a")
    ci95: Interval = Field(description="95 % interval of the difference; `interval` says which")
    interval: Literal["tango", "bootstrap over problems"]
    bootstrap_ci95: Interval = Field(description="paired bootstrap over problems, for either kind of answers")
    p_value: Number
    test: Literal["mcnemar exact", "sign flips over problems, exact"]
    p_value_holm: Number = Field(description="corrected for `family_size` comparisons")
    correction: Literal["holm"]
    family_size: int
    level: float = Field(description="BETTER and WORSE need p_value_holm below 1 - level")
    verdict: Literal["BETTER", "WORSE", "INCONCLUSIVE"] = Field(description="on b")


class Kept(Block):
    """Of the problems that the base solved, those that the model still solves."""

    n: int = Field(description="problems that the base solved (with samples: at least half of its answers)")
    kept: Number = Field(description="share of them that the model solves")
    ci95: Interval
    gained: Number = Field(description="share that the model solves of those that the base did not")
    gained_n: int


class Forgetting(Block):
    base: str = Field(description="the model whose solved problems are looked at again")
    models: dict[str, dict[str, Kept]] = Field(description="per model and task; `all` is every task together")


class Settings(Block):
    samples: int
    temperature: float
    top_p: float
    seed: int
    max_new_tokens: int
    bootstrap_resamples: int


class Metrics(Block):
    """metrics.json of an evaluation of one or several checkpoints on the same problems."""

    schema_version: Literal[2]
    settings: Settings
    models: dict[str, ModelMetrics]
    comparisons: list[Comparison]
    forgetting: Forgetting | None = None


def check(metrics: dict[str, Any]) -> None:
    """Raises RunError naming every key of `metrics` that does not fit the schema."""
    try:
        Metrics.model_validate(metrics)
    except ValidationError as error:
        lines = [f"metrics.json: {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:10]]
        raise RunError(*lines) from None


def json_schema() -> dict[str, Any]:
    schema = Metrics.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


if __name__ == "__main__":
    write_atomic(SCHEMA_FILE, json.dumps(json_schema(), indent=1, ensure_ascii=False) + "\n")
