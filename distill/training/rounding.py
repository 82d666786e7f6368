"""Updates that 16 bits do not see: what the first steps of a training lose in autocast's roundings.

A bf16 number has 8 bits: neighbours are 1/128 to 1/256 of their size apart (fp16: 11 bits).

*All weights train.* They are float32, and autocast casts them to bf16 for every product. A weight that was *stored* in
bf16 lies on a bf16 number. An update of less than half the distance casts back to that number: the next step computes
with the old weight, until the sum of the updates has passed that half. A weight that lies anywhere between two numbers
(trained in float32, or dequantised) loses nothing on the average: a small update takes its share of them across.

*LoRA.* The adapter's small numbers are cast without harm. But what it adds to an output of its layer is added in bf16,
to a number that is a bf16 number already: less than half the distance to the next adds nothing.

    found = unseen(matrices(model), rate=1e-5)          # AdamW: a weight moves by about the rate in a step
    found.share, found.steps, found.groups              # 0.83, 11 steps in one direction, {"attention": 0.86, ...}
    unseen(stored_matrices(folder, skeleton), rate)     # the same from the files, a sample of each tensor

Counted are matrices that enter products. Norms, and embeddings that are looked up alone, are used in float32. For LoRA
the outputs are those of random inputs, and the adapter is taken to push every one of them as far as a step can.
"""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from distill.config.training import Lora, Train
from distill.models.describe import adapted_weights, plain_name, weight_groups
from distill.models.routers import bare_model

SAMPLE = 2**13  # numbers that are looked at of each tensor
INPUTS = 64  # random inputs that an adapted layer is tried with
WORTH_SAYING = 0.1  # share of the weights from which on it is said
FEW_STEPS = 3  # as many are soon made up for
HEAD = "output head"  # also where it is the embedding


@dataclass(frozen=True)
class Unseen:
    """Of the trained weights, or with LoRA of the outputs: the share that one step of `rate` does not move in `low`.

    groups: the same by group. steps: how many such steps, all in one direction, move half of what is not moved by one.
    """

    low: str
    rate: float
    share: float
    steps: int
    groups: dict[str, float]
    lora: bool = False

    def text(self) -> str:
        """One sentence for people."""
        parts = ", ".join(f"{group} {share:.0%}" for group, share in self.groups.items() if share)
        step = f"a step of {self.rate:g} (train.learning_rate)"
        if self.lora:
            said = f"what {step} adds to {self.share:.0%} of the adapted layers' outputs is less than {self.low} shows"
        else:
            said = (
                f"{self.share:.0%} of the trained weights are {self.low} numbers that {step} leaves where they are in "
                "autocast's cast"
            )
        return f"{said} ({parts}); half of these take {self.steps:,} steps in one direction"

    @property
    def fix(self) -> str:
        head = "train.head_precision=fp32 (the output head sees them) or "
        return f"{'' if self.lora else head}train.precision=fp32 (more time and memory)"


def spacing(weights: Tensor, low: torch.dtype = torch.bfloat16) -> Tensor:
    """The distance from each number to its neighbour in `low`, away from zero; 0 for 0, which every update moves."""
    wide = weights.float()
    exponent = torch.frexp(wide).exponent  # |w| = m * 2^exponent, 0.5 <= m < 1
    return torch.where(wide == 0, 0.0, torch.ldexp(torch.full_like(wide, torch.finfo(low).eps), exponent - 1))


def lost_steps(
    train: Train,
    low: torch.dtype | None,
    tensors: Iterable[tuple[str, Tensor, int]],
    lora: Lora | None = None,
) -> Unseen | None:
    """What the first steps of this training lose, where it is worth saying; `tensors` as for `unseen`.

    low: the 16-bit format of products, None for float32. Of sgd nothing is known: its steps are as large as its
    gradients.
    """
    if low is None or train.optimizer != "adamw":
        return None
    found = unseen(tensors, train.learning_rate, low, lora)
    return found if found.share >= WORTH_SAYING else None


def unseen(
    tensors: Iterable[tuple[str, Tensor, int]],
    rate: float,
    low: torch.dtype = torch.bfloat16,
    lora: Lora | None = None,
) -> Unseen:
    """Of (group, weights, how many numbers they stand for). Up to SAMPLE of each are looked at.

    lora: the weights are frozen, and carry adapters of this kind.
    """
    lost, total, needed = Counter(), Counter(), []
    for group, tensor, count in tensors:
        if lora is None:
            flat = tensor.detach().flatten()
            some, step = flat[:: max(1, flat.numel() // SAMPLE)].float(), torch.tensor(rate)
        else:
            some, step = _outputs(tensor.detach()).cpu(), rate * _pushes(lora)
        half = spacing(some, low) / 2
        stuck = (some == some.to(low).float()) if lora is None else torch.ones_like(some, dtype=torch.bool)
        stuck &= half > step
        total[group] += count
        lost[group] += float(stuck.float().mean()) * count if len(some) else 0
        needed.append((half / step)[stuck][:4096])
    steps = torch.cat(needed) if needed else torch.empty(0)
    return Unseen(
        {torch.bfloat16: "bf16", torch.float16: "fp16"}[low],
        rate,
        sum(lost.values()) / max(1, sum(total.values())),
        int(steps.median().ceil()) if len(steps) else 0,
        {group: lost[group] / total[group] for group in total},
        lora is not None,
    )


def _outputs(weights: Tensor) -> Tensor:
    """Outputs [rows, INPUTS] of up to SAMPLE numbers of a matrix [out, in], or of experts' [E, ...].

    The inputs are of size 1.
    """
    flat = weights.reshape(-1, weights.shape[-1])
    rows = flat[:: max(1, flat.numel() // SAMPLE)].float()  # at least one
    draws = torch.Generator().manual_seed(0)
    return rows @ torch.randn(rows.shape[1], INPUTS, generator=draws).to(rows.device)


def _pushes(lora: Lora) -> Tensor:
    """What a step of 1 in every weight of B adds to the outputs of an input of size 1 at most: [INPUTS].

    B starts at 0 and A uniform within 1/sqrt(in) (PEFT's start), so A x has `rank` numbers of variance 1/3.
    """
    scale = lora.alpha / (math.sqrt(lora.rank) if lora.rslora else lora.rank)
    draws = torch.randn(lora.rank, INPUTS, generator=torch.Generator().manual_seed(1))
    return scale * draws.abs().sum(0) / math.sqrt(3)


def matrices(model: nn.Module, head: bool = True) -> Iterator[tuple[str, Tensor, int]]:
    """(group, weights, their number) of the matrices that train and are cast; with LoRA those that carry an adapter.

    head: whether the output head is cast.
    """
    base = bare_model(model)
    adapted = adapted_weights(model) if hasattr(model, "peft_config") else None
    own = {plain_name(name): parameter for name, parameter in base.named_parameters()}
    for name, group in _in_products(model, head):
        weights = own[name]
        if weights.requires_grad if adapted is None else name in adapted:
            yield group, weights, weights.numel()


def stored_matrices(
    folder: Path, skeleton: nn.Module, head: bool = True, names: Collection[str] | None = None
) -> Iterator[tuple[str, Tensor, int]]:
    """The same from safetensors files, some rows of each tensor; what has another name there is left out.

    names: these alone.
    """
    groups = {n: g for n, g in _in_products(skeleton, head) if names is None or n in names}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as stored:
            for name in sorted(set(stored.keys()) & groups.keys()):
                whole = stored.get_slice(name)
                rows, *rest = whole.get_shape()
                wanted = max(1, SAMPLE // max(1, math.prod(rest)))
                start = max(0, (rows - wanted) // 2)
                yield groups[name], whole[start : start + wanted], rows * math.prod(rest)


def _in_products(model: nn.Module, head: bool) -> Iterator[tuple[str, str]]:
    """(name, group) of the matrices that autocast casts."""
    base = bare_model(model)
    output = base.get_output_embeddings()
    own = {id(p) for p in output.parameters()} if output is not None else set()
    shapes = {plain_name(name): parameter for name, parameter in base.named_parameters()}
    for name, group in weight_groups(base).items():
        if id(shapes[name]) in own:
            if head and shapes[name].ndim > 1:
                yield name, HEAD
        elif group not in ("embedding", "other"):
            yield name, group
