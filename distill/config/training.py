"""Recipe sections of the student and its training: the start, the adapter, the objectives, the loop.

Read and checked as part of a `Recipe` (distill/config/recipe.py), which names them as `student`, `train`, `control`.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, field_validator, model_serializer, model_validator

from distill.config import section
from distill.config.section import BlockPrecision, Count, Fraction, From, Section, TemplateArguments, Whole

WEIGHED = (
    "targets",
    "dense",
    "drawn",
    "sparse",
    "sampled",
)  # signals of objectives that are on single tokens
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
ModuleName = Annotated[str, Field(min_length=1, pattern=r"^[\w.]+$")]


class Lora(Section):
    """LoRA (Hu et al. 2021, arXiv 2106.09685) through PEFT; see distill/models/student.py for what each key reaches."""

    rank: Annotated[int, Field(ge=1, le=65_536)] = Field(
        16, description="rank of the adapter of each weight; with `experts`, of each expert"
    )
    alpha: Annotated[float, Field(gt=0, le=1e6)] = Field(
        32, description="the adapter is scaled by alpha / rank before it is added"
    )
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.0, description="share of the adapter's inputs set to zero in training"
    )
    rslora: bool = Field(False, description="scale by alpha / sqrt(rank) instead of alpha / rank")
    dora: bool = Field(
        False,
        description="DoRA: train magnitude and direction separately (Liu et al. 2024, arXiv 2402.09353)",
    )
    targets: Literal["all-linear", "attention"] | tuple[ModuleName, ...] = Field(
        "all-linear",
        description="which linear layers get an adapter: all, those of attention, or a list of name endings, "
        "for example [q_proj, mlp.down_proj]; [] means none",
    )
    experts: bool = Field(False, description="MoE: adapters on the routed experts too, one for each")
    router: bool = Field(False, description="MoE: adapters on the routers too")

    @field_validator("targets", mode="before")
    @classmethod
    def _known_word(cls, value):
        if isinstance(value, str) and value not in ("all-linear", "attention"):
            raise ValueError(
                f"'{value}' is not all-linear, attention or a list of endings like [q_proj, o_proj]"
            )
        return value

    @model_validator(mode="after")
    def _defined_on_parameters(self):
        asked = " and ".join(name for name in ("experts", "router") if getattr(self, name))
        if not self.targets and not asked:
            raise ValueError("`targets: []` with neither `experts` nor `router` leaves nothing to train")
        clash = [n for n, on in (("dora", self.dora), ("dropout above 0", self.dropout > 0)) if on]
        if asked and clash:
            raise ValueError(
                f"PEFT adapts {asked} as bare parameters, where {' and '.join(clash)} does not exist; "
                "go without one or the other"
            )
        return self


class StudentSection(Section):
    """The model that trains: where it starts and what of it moves."""

    later: ClassVar = ("chat_template_kwargs",)
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    model: str | None = Field(None, description="folder or hub name to start from")
    made_from: From | None = Field(None, alias="from", description="or a model to make it from")
    config: dict[str, Any] | None = Field(
        None,
        description="instead of `model`: a transformers config (with model_type), to start from random "
        "weights",
    )
    tokenizer: str = Field("embedded", description="with `config`: 'embedded', or a folder or hub name")
    chat_template_kwargs: TemplateArguments = Field(
        {}, description="arguments of its chat template, as {enable_thinking: false}; saved with the student"
    )
    adapter: Literal["lora", "full"] = Field(
        "lora", description="lora: the base stays frozen; full: every weight trains"
    )
    lora: Lora = Lora()
    quantize: Literal["none", "4bit", "8bit"] = Field(
        "none",
        description="store the frozen base in 4 bits (QLoRA, arXiv 2305.14314) or 8 bits; needs bitsandbytes",
    )

    @model_serializer(mode="wrap")
    def _as_written(self, handler):
        """`from` by its own name; left out where there is none, as in recipes from before there was the key."""
        values = handler(self)
        for name in ("made_from", "from"):
            if name in values and (found := values.pop(name)) is not None:
                values["from"] = found
        return values

    @model_validator(mode="after")
    def _one_start(self):
        if (self.model is None) == (self.config is None):
            raise ValueError(
                "give exactly one of `model` (start from weights), `from` (a model to make it from) and `config` (from "
                "scratch)"
            )
        if self.config is not None:
            if "model_type" not in self.config:
                raise ValueError("`config` needs a `model_type`, for example qwen3 or deepseek_v3")
            if self.adapter == "lora":
                raise ValueError("LoRA on random weights trains almost nothing: set `adapter: full`")
        if self.quantize != "none" and self.adapter != "lora":
            raise ValueError("`quantize` freezes the base: it goes with `adapter: lora`")
        return self


class Objective(Section):
    """One term of the training loss: a name, a weight, and the named objective's own options."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str = Field(description="of a function in the table of objectives")
    weight: float = Field(1.0, description="above 0; its share of the sum of losses")

    @model_validator(mode="after")
    def _known(self):
        found = section.problems({"name": self.name, "weight": self.weight, **(self.model_extra or {})})
        if found:
            raise ValueError("; ".join(found))
        return self

    @property
    def options(self) -> dict[str, Any]:
        """The objective's keyword arguments, defaults filled in."""
        resolved = section.resolve({"name": self.name, **(self.model_extra or {})})
        return {k: v for k, v in resolved.items() if k not in ("name", "weight")}

    @property
    def signal(self) -> str:
        return section.OBJECTIVES[self.name].signal

    @property
    def live(self) -> bool:
        return section.OBJECTIVES[self.name].live

    @property
    def frozen(self) -> bool:
        """Whether it trains something beside the student, and the student not at all."""
        return bool(self.options.get("frozen"))


class OnPolicy(Section):
    """The student writes some of the rows, the teacher scores them (GKD, arXiv 2306.13649)."""

    later: ClassVar = ("first_tokens", "skip_truncated", "skip_special", "context")

    fraction: Fraction = Field(
        0.0, description="share of rows that the student writes (GKD's lambda); 0: the teacher's text only"
    )
    buffer_steps: Count = Field(8, description="for how many optimizer steps rows are sampled at once")
    temperature: Annotated[float, Field(gt=0, le=5)] = Field(
        1.0, description="temperature of the student's sampling"
    )
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="nucleus of the student's sampling; 1 is off"
    )
    max_new_tokens: Count = Field(96, description="tokens per answer; longer ones count as truncated")
    batch_size: Count = Field(256, description="answers decoded together")
    most_truncated: Fraction = Field(
        0.5, description="stop the run when a larger share of answers does not end, twice in a row"
    )
    first_tokens: Count | None = Field(
        None,
        description="count only the first so many tokens of what the student wrote. Further on, the teacher "
        "reads text that it would never write (arXiv 2606.22600). empty: all count",
    )
    skip_truncated: bool = Field(
        False,
        description="answers that do not end within max_new_tokens do not count (overlong filtering, DAPO, "
        "arXiv 2503.14476, section 3.4)",
    )
    skip_special: bool = Field(
        False,
        description="control tokens that the student wrote do not count; its end token does (special-token "
        "masking, arXiv 2603.25562)",
    )
    context: Count | None = Field(
        None,
        description="with `prompts.documents`: the student continues the first so many tokens of a window by "
        "max_new_tokens. Text need not end, so nothing counts as truncated. empty: it answers questions",
    )

    @model_validator(mode="after")
    def _text_has_no_end(self):
        if self.context and self.skip_truncated:
            raise ValueError(
                "`skip_truncated` leaves out every text that is continued: leave out one of it and `context`"
            )
        return self

    @property
    def weighs(self) -> bool:
        """Whether some of what the student writes counts for nothing."""
        return bool(self.first_tokens) or self.skip_truncated or self.skip_special


class Context(Section):
    """What a live teacher reads and the student does not: context distillation (arXiv 2209.15189)."""

    system: str | None = Field(
        None, description="the system prompt that the teacher reads in place of the row's own"
    )
    question: str | None = Field(
        None,
        description="the text that the teacher reads in place of the last question. {question} stands for the"
        " question, {answer} for the row's stored answer with its working",
    )

    @model_validator(mode="after")
    def _something_more(self):
        if not self.system and not self.question:
            raise ValueError("say what the teacher is told: `system`, `question` or both")
        if self.question is not None and "{question}" not in self.question:
            raise ValueError("`question` is text with {question} in it: the teacher must know what was asked")
        return self


class LiveTeachers(Section):
    """Which teacher scores which row while the student trains. Empty: `teacher.model` scores them all."""

    later: ClassVar = ("balance",)

    by: Literal["family", "level"] = Field("family", description="column of the dataset that holds the tag")
    models: dict[str, str] = Field(
        {}, description="for each tag the folder or hub name of its teacher; other tags: `teacher.model`"
    )
    balance: bool = Field(
        False,
        description="every tag counts equally in a step, however many tokens it has: a token's loss is "
        "divided by its tag's share of tokens",
    )
    own_start: bool = Field(
        False, description="self-distillation: the student's starting weights are the teacher"
    )
    experts_per_token: Count | None = Field(
        None,
        description="MoE teacher: how many experts a token uses when it scores; empty: as many as in its "
        "training",
    )
    routings: Count | None = Field(
        None,
        description="MoE teacher: draw the experts so many times by their scores and average the "
        "distributions (arXiv 2502.12947). Each draw is one more forward pass. empty: its own "
        "choice, once",
    )
    context: Context | None = Field(None, description="what the teacher reads and the student does not")
    remember_gb: Annotated[float, Field(ge=0, le=1e6)] = Field(
        0.0,
        description="GB of main memory per process to keep the teacher's last hidden states, so that later "
        "epochs need not compute them again. The result is the same up to rounding; a resumed run"
        " may differ in the last bit. A sharded teacher remembers nothing",
    )

    @model_validator(mode="after")
    def _one_way(self):
        if self.own_start and self.models:
            raise ValueError("`own_start` and `models` exclude each other: one teacher per row")
        if (self.experts_per_token or self.routings) and (self.own_start or self.remember_gb):
            raise ValueError(
                "`experts_per_token` and `routings` change a mixture that is asked anew: leave out `own_start` and "
                "`remember_gb`"
            )
        return self


class Validation(Section):
    """Rows of the dataset that are kept from training to look at the loss on."""

    rows: Whole = Field(0, description="rows held out; 0 is off")
    every: Count = Field(50, description="optimizer steps between two measurements")
    patience: Whole = Field(
        0, description="end training after so many measurements without a better value; 0 is off"
    )
    keep_best: bool = Field(False, description="save the weights of the best measurement, not the last ones")

    @model_validator(mode="after")
    def _something_to_look_at(self):
        if not self.rows and (self.patience or self.keep_best):
            raise ValueError("`patience` and `keep_best` need `rows` to look at: set `rows` above 0")
        return self


class Train(Section):
    """How it trains. The same loop for student and control arm, one process or many."""

    later: ClassVar = ("head_precision",)

    objectives: Annotated[list[Objective], Field(min_length=1)] = Field(
        [Objective(name="cross_entropy")], description="terms of the loss, each a name, a weight and options"
    )
    on_policy: OnPolicy = OnPolicy()
    teachers: LiveTeachers = LiveTeachers()
    validation: Validation = Validation()
    steps: Count = Field(400, description="optimizer steps")
    batch_size: Count = Field(64, description="rows per optimizer step over all processes and micro-batches")
    micro_batch_size: Count = Field(64, description="rows per forward pass of one process")
    learning_rate: Annotated[float, Field(gt=0, le=1000)] = Field(
        1e-2,
        description="the largest learning rate. The default suits a million parameters; billions need a "
        "smaller one. LoRA needs about 10 times that of full training",
    )
    schedule: Literal["cosine", "constant"] = Field(
        "cosine", description="how the learning rate goes on after the warm-up"
    )
    warmup_steps: Whole = Field(
        20, description="optimizer steps in which the learning rate rises linearly; fewer than `steps`"
    )
    final_fraction: Fraction = Field(
        0.1, description="learning rate at the last step, as a share of the largest one"
    )
    optimizer: Literal["adamw", "sgd"] = Field(
        "adamw", description="adamw, or plain sgd for exact comparisons"
    )
    betas: tuple[Beta, Beta] = Field((0.9, 0.95), description="adamw: the decay of its two moments")
    weight_decay: Annotated[float, Field(ge=0, le=1000)] = Field(
        0.0, description="weight decay of matrices; norms and biases never decay"
    )
    max_grad_norm: Annotated[float, Field(gt=0, le=1e12)] = Field(
        1.0, description="gradients with a larger Euclidean norm are scaled down to it"
    )
    precision: Literal[
        "auto",
        "fp32",
        "bf16",
        "fp16",
        "fp8",
        "fp8-te",
        "fp8-emulated",
        "fp8-emulated-tensor",
        "fp8-emulated-gradient-blocks",
        BlockPrecision,
    ] = Field(
        "bf16", description="number format of matrix products; the table is in distill/models/precision.py"
    )
    head_precision: Literal["same", "fp32"] = Field(
        "same",
        description="precision of the student's output head alone. With fp32 its logits are not rounded, and "
        "small updates are not lost as in bf16 (distill/models/precision.py)",
    )
    max_length: Count | None = Field(None, description="rows longer than this are refused, not cut")
    checkpoint_every: Whole = Field(100, description="steps between saved states; 0 saves none")
    gradient_checkpointing: bool = Field(
        False, description="recompute activations in the backward pass: less memory, about a third more time"
    )
    micro_batch_tokens: Count | None = Field(
        None,
        description="at most so many tokens per forward pass, padding included; rows of similar length go "
        "together",
    )
    auto_micro_batch: bool = Field(
        False, description="halve micro_batch_size when memory runs out; the result stays the same"
    )
    packing: bool = Field(
        False,
        description="put rows end to end, without padding; refused if the model would let one row see another",
    )
    compile: bool | Literal["auto"] = Field(
        False,
        description="torch.compile of the decoder layers. auto: only if the training is long enough to repay "
        "it (on a CPU, dense models, stored text); the first lines of the run state the rule",
    )
    attention: Literal[
        "auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"
    ] = Field(
        "auto",
        description="attention kernel of student and live teachers, by its name in transformers; auto: what "
        "transformers chooses, usually torch's fused one",
    )
    tf32: bool = Field(
        False,
        description="GPU: float32 products in TF32, 10 bits of mantissa instead of 23, several times as fast",
    )
    deterministic: bool = Field(
        False,
        description="GPU: every run gives the same bits, with slower kernels; an operation that has none is "
        "an error",
    )
    expert_bias_step: Annotated[float, Field(ge=0, le=1000)] = Field(
        0.0, description="MoE from scratch: bias balancing step u (DeepSeek-V3 section 2.1.2); 0 is off"
    )
    expert_bias_freeze: Fraction = Field(0.1, description="last share of steps with u = 0")
    keep_states: Count = Field(1, description="how many saved states are kept")
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = Field(
        [], description="where to log as well, besides metrics.jsonl"
    )

    @model_validator(mode="after")
    def _sensible(self):
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps ({self.warmup_steps}) must be below steps ({self.steps})")
        for i, o in enumerate(self.objectives):
            if any((o.name, o.options) == (p.name, p.options) for p in self.objectives[:i]):
                raise ValueError(
                    f"`objectives` has {o.name} twice with the same options: give one, with both weights"
                )
        if self.packing and any(o.name == "sequence_balance" for o in self.objectives):
            raise ValueError(
                "`packing` joins sequences, and sequence_balance is per sequence: use batch_balance"
            )
        aligned = [o for o in self.objectives if o.signal == "aligned"]
        if aligned and (others := [o.name for o in self.objectives if o.live and o.signal != "aligned"]):
            raise ValueError(f"uld is for a teacher with another tokenizer, where {others[0]} means nothing")
        if self.compile is True and self.teachers.routings:
            raise ValueError(
                "`teachers.routings` changes the teacher at every batch, which compiled code does not see: leave out "
                "`compile`"
            )
        told = [o for o in self.objectives if o.live and o.signal not in ("dense", "drawn")]
        if self.teachers.context and (
            told or not any(o.signal in ("dense", "drawn") for o in self.objectives)
        ):
            raise ValueError(
                "`teachers.context` is for divergences from the teacher's distribution, as {name: reverse_kl}: with "
                "another prompt its hidden states and routers are of other tokens, and stored signals were told nothing"
            )
        if aligned and (self.on_policy.fraction or self.teachers.models or self.teachers.own_start):
            raise ValueError(
                "uld goes with stored text and one teacher: leave out `on_policy` and `teachers`"
            )
        drawn = next((o.name for o in self.objectives if o.signal == "drawn"), None)
        as_drawn = self.on_policy.fraction == self.on_policy.temperature == self.on_policy.top_p == 1
        if drawn and (not as_drawn or self.validation.rows):
            raise ValueError(
                f"{drawn} is of tokens that the student drew from its own distribution: set `on_policy.fraction`, "
                "`temperature` and `top_p` to 1 and `validation.rows` to 0, or use reverse_kl"
            )
        alone = next((o.name for o in self.objectives if o.frozen), None)
        if alone and len(self.objectives) > 1:
            raise ValueError(
                f"{alone} with `frozen` trains its module alone: leave out the other objectives, or `frozen`"
            )
        weighed = self.teachers.balance or self.on_policy.weighs
        if weighed and (unfit := [o.name for o in self.objectives if o.signal not in WEIGHED]):
            raise ValueError(
                f"`teachers.balance` and what `on_policy` leaves out are for losses of single tokens, which {unfit[0]} "
                "is not: leave out one or the other"
            )
        if self.on_policy.fraction and not drawn and not any(o.signal == "dense" for o in self.objectives):
            raise ValueError(
                "`on_policy` needs a live divergence to score what the student writes: add {name: reverse_kl} or "
                "{name: forward_kl} to `objectives`"
            )
        if self.on_policy.fraction and (
            stored := [o.name for o in self.objectives if o.signal in ("sparse", "sampled")]
        ):
            raise ValueError(
                f"`on_policy`: {stored[0]} reads stored signals, which the student's own text has none of"
            )
        return self


class Control(Section):
    """The same base, prompts, steps and adapter, on question + final answer, without a teacher."""

    enabled: bool = Field(
        True,
        description="train this arm too. Without it you cannot tell the teacher's effect from that of more "
        "training",
    )
