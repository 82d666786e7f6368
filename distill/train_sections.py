"""Recipe sections of the student and its training: the start, the adapter, the objectives, the loop.

Read and checked as part of a `Recipe` (distill/config.py), which names them as `student`, `train`, `control`.
"""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from distill import objectives
from distill.sections import Count, Fraction, Section


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
