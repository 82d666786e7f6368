"""What the training-speed benchmark measures: settings, methods, cases, and the floor of a step.

    cases, left_out = all_cases(rates); floor_seconds(LARGE, rates, OURS)

Nothing here imports torch: `training` runs the cases, `worker` is what each becomes.

Shapes: N kept tokens, V vocabulary, d width, T time.
"""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Setting:
    """Widths and layers of two models with tied embeddings, and a batch that is half prompt.

    `attention`: (heads, heads of keys and values, width of a head, width of the MLP) of both. None: Qwen3 models with
    heads of 32, half as many for keys and values, and an MLP three times as wide.
    """

    name: str
    vocabulary: int
    rows: int
    tokens: int
    teacher: tuple[int, int]  # (width, layers)
    student: tuple[int, int]
    warm_up: int
    timed: int  # steps at most
    patience: float  # seconds of timed steps after which no other begins
    repeats: int = 1  # processes a round: short steps are told apart by many of them
    attention: tuple[int, int, int, int] | None = None

    @property
    def kept(self) -> int:
        return self.rows * (self.tokens - self.tokens // 2)

    def attention_of(self, width: int) -> tuple[int, int, int, int]:
        heads = width // 32
        return self.attention or (heads, max(1, heads // 2), 32, 3 * width)

    @property
    def parameters(self) -> tuple[int, int]:
        """Of teacher and student, norms left out."""
        return tuple(
            self.vocabulary * width + layers * _layer_weights(width, *self.attention_of(width))
            for width, layers in (self.teacher, self.student)
        )


def _layer_weights(width: int, heads: int, shared: int, head: int, mlp: int) -> int:
    return 2 * width * head * (heads + shared) + 3 * width * mlp


LARGE = Setting("large vocabulary", 151_936, 4, 512, (256, 4), (128, 2), warm_up=1, timed=3, patience=12.0)
REAL = Setting(
    "SmolLM2-135M to its first 8 layers", 49_152, 4, 256, (576, 30), (576, 8), warm_up=1, timed=4, patience=25.0,
    attention=(9, 3, 64, 1536),
)  # fmt: skip
SMALL = Setting(
    "small models", 512, 32, 128, (192, 4), (96, 2), warm_up=3, timed=10, patience=10.0, repeats=3
)


@dataclass(frozen=True)
class Method:
    """`runner` is "module:function" of a runner, `imports` the modules it needs in memory before it starts.

    `held_to` says what of its first two steps must equal the definition's. `logits` are the float32 tensors of
    [rows, tokens, V] at its peak, by objective: an estimate from above, to know whether it fits.
    """

    name: str
    runner: str
    imports: tuple[str, ...] = ()
    peer: bool = False
    live: bool = True
    held_to: tuple[str, ...] = ("loss", "gradient_norm", "second_loss")
    logits: dict[str, float] = field(default_factory=dict, hash=False)


_OURS = "worker:distill_step_runner"
OURS = Method("distill", _OURS, ("distill.training.train",))
STORED = Method("distill, stored top-64", _OURS, ("distill.training.train",), live=False, held_to=())
HIDDEN = Method(
    "distill, stored hidden states", "worker:distill_hidden_runner", ("distill.training.train",),
)  # fmt: skip
LORA = Method(
    "distill, LoRA", "worker:distill_lora_runner", ("distill.training.train", "peft"), held_to=("loss",)
)
COMPILED = Method(
    "distill, compiled", "worker:distill_compiled_runner", ("distill.training.train", "torch._inductor"),
)  # fmt: skip
NAIVE = Method(
    "plain PyTorch, kept tokens", "worker:naive_runner", logits={"forward_kl": 4, "generalized_jsd": 8}
)  # fmt: skip
DISTILLATION = Method(
    "TRL DistillationTrainer", "trl_peers:distillation_runner", ("trl.trainer.distillation_trainer",),
    peer=True,
)  # fmt: skip
DISTILLATION_AUTOCAST = Method(
    "TRL DistillationTrainer, its body under autocast", "trl_peers:autocast_distillation_runner",
    ("trl.trainer.distillation_trainer",), peer=True,
)  # fmt: skip
GKD = Method(
    "TRL GKDTrainer", "trl_peers:gkd_runner", ("trl.experimental.gkd.gkd_trainer",), peer=True,
    logits={"forward_kl": 9, "reverse_kl": 9, "generalized_jsd": 17},
)  # fmt: skip
GKD_COMPILED = Method(
    "TRL GKDTrainer, compiled", "trl_peers:gkd_compiled_runner",
    ("trl.experimental.gkd.gkd_trainer", "torch._inductor"), peer=True, logits=GKD.logits,
)  # fmt: skip

OBJECTIVES = {
    "forward_kl": {"name": "forward_kl"},
    "reverse_kl": {"name": "reverse_kl"},
    "generalized_jsd": {"name": "generalized_jsd", "beta": 0.5},
}
SPARSE = {"name": "sparse_forward_kl"}


@dataclass(frozen=True)
class Case:
    """One measured process. `objective` is the group it is compared in; stored signals have their own loss."""

    setting: Setting
    method: Method
    objective: str
    precision: str = "fp32"
    allocator: str = "glibc"
    do: str = "step"

    @property
    def group(self) -> tuple[str, str, str, str, str]:
        return self.setting.name, self.objective, self.precision, self.allocator, self.do

    @property
    def spec(self) -> dict[str, Any]:
        return {
            "do": self.do,
            "setting": asdict(self.setting),
            "runner": self.method.runner,
            "imports": self.method.imports,
            "objective": OBJECTIVES[self.objective] if self.method.live else SPARSE,
            "precision": self.precision,
            "live": self.method.live,
            "warm_up": self.setting.warm_up,
            "timed": self.setting.timed,
            "patience": self.setting.patience,
        }

    @property
    def memory_needed(self) -> float:
        """Bytes, an estimate from above: logits at their peak, weights and optimizer, imports."""
        s = self.setting
        logits = self.method.logits.get(self.objective, self.method.logits.get("forward_kl", 1.5))
        weights = 4 * (s.parameters[0] + 4 * s.parameters[1])
        return logits * 4 * s.rows * s.tokens * s.vocabulary + 1.5 * weights + 1e9


def quick_cases() -> list[Case]:
    """Small models, forward KL, every method: under a minute."""
    return [Case(SMALL, method, "forward_kl") for method in (NAIVE, OURS, STORED, DISTILLATION, GKD)]


def real_cases(precisions: tuple[str, ...] = ("fp32", "bf16")) -> list[Case]:
    """SmolLM2's shape, forward KL: a live teacher, stored hidden states, stored tokens, LoRA, and TRL."""
    cases = []
    for precision in precisions:
        more = () if precision == "fp32" else (COMPILED, DISTILLATION_AUTOCAST)
        cases += [
            Case(REAL, method, "forward_kl", precision)
            for method in (NAIVE, OURS, HIDDEN, STORED, LORA, DISTILLATION, *more)
        ]
    return cases


def all_cases(rates: dict[str, float]) -> tuple[list[Case], list[str]]:
    """(everything worth measuring on a CPU with these matmul rates, what is left out and why)."""
    ours_and_peers, short = (OURS, DISTILLATION, GKD), (NAIVE, OURS, DISTILLATION, STORED)
    cases = []
    for allocator in ("glibc", "keeping"):
        forward = (NAIVE, *ours_and_peers, STORED, LORA)
        cases += [Case(LARGE, m, "forward_kl", allocator=allocator) for m in forward]
        others = [(name, m) for name in ("reverse_kl", "generalized_jsd") for m in ours_and_peers]
        cases += [Case(LARGE, m, name, allocator=allocator) for name, m in others]
    cases = real_cases(("fp32",)) + cases
    left_out = []
    for precision, gain in (
        ("bf16", rates["bf16"] / rates["fp32"]),
        ("medium", rates["medium"] / rates["fp32"]),
    ):
        if gain >= 1.3:
            both = [(allocator, m) for allocator in ("glibc", "keeping") for m in short]
            cases += [Case(LARGE, m, "forward_kl", precision, allocator) for allocator, m in both]
            if precision == "bf16":
                cases += real_cases(("bf16",))
        else:
            what = "float32 matmul precision 'medium'" if precision == "medium" else "bf16"
            left_out.append(
                f"{what}: its matmuls run at {gain:.2f} times the float32 rate on this CPU, which has no units for "
                "them; nothing would be gained"
            )
    cases += [*quick_cases(), *(Case(SMALL, m, "forward_kl") for m in (COMPILED, GKD_COMPILED))]
    cases += [Case(SMALL, m, "forward_kl", do="loop") for m in (OURS, STORED)]
    return cases, left_out


# ------------------------------------------------------------------------------------------------ the floor


def counted_work(setting: Setting) -> dict[str, float]:
    """FLOPs of one step by part: bodies of both models, heads on the N kept tokens, forward and backward."""

    def body(width: int, layers: int) -> float:
        shape = setting.attention_of(width)
        per_token = 2 * layers * _layer_weights(width, *shape)
        scores = 2 * layers * setting.tokens * shape[0] * shape[2]  # causal: half of 4 T d
        return setting.rows * setting.tokens * (per_token + scores)

    def head(width: int) -> float:
        return 2.0 * setting.kept * width * setting.vocabulary

    return {
        "teacher_body": body(*setting.teacher),
        "teacher_head": head(setting.teacher[0]),
        "student_body": 3 * body(*setting.student),
        "student_head": head(setting.student[0]),
        "student_head_back": 2 * head(setting.student[0]),
    }


def floor_seconds(
    setting: Setting, rates: dict[str, float], method: Method, precision: str = "fp32"
) -> float:
    """Seconds of the counted matmuls of a step of `method`, at the rates measured for their dtype [FLOP/s]."""
    work = counted_work(setting)
    if method is HIDDEN:  # the teacher's head, over states that are there
        work["teacher_body"] = 0.0
    if not method.live:
        work = {part: flops for part, flops in work.items() if not part.startswith("teacher")}
    if method is LORA:  # frozen weights want no gradient: no weight gradient in the head, nor in the body
        work["student_head_back"] /= 2
        work["student_body"] *= 2 / 3
    kind = " bf16" if precision == "bf16" else ""
    return sum(flops / rates[part + kind] for part, flops in work.items())
