"""Precision is one explicit value: what a device cannot do is refused, and what 16 bits lose is counted.

Precision is one explicit value, and what a device cannot do is refused with the reason.

| value        | matrix products                | needs |
|--------------|--------------------------------|-------|
| auto         | bf16 where the device computes in it, else fp16 on a GPU, else fp32; it says which and why | nothing |
| fp32         | float32                        | nothing |
| bf16         | bfloat16 autocast              | any CPU; a GPU of compute capability 8.0 (Ampere) or later |
| fp16         | float16 autocast + loss scaler | CUDA: on CPU, Accelerate would silently run float32 |
| fp8          | float8 by torchao              | CUDA capability 8.9 (Ada, Hopper) or later and torchao |
| fp8-te       | float8 by Transformer Engine   | the same, and transformer_engine; never run by this project |
| fp8-emulated | float8 by emulation, DeepSeek-V3's tiles (distill/models/fp8.py) | what bf16 needs; slower than bf16 |
| fp8-emulated-tensor | the same, one scale per matrix | the same |
| fp8-emulated-gradient-blocks | the same, activation gradients in 128x128 blocks | the same |
| mxfp4-emulated, nvfp4-emulated, mxfp8-emulated | scales by the block (distill/formats.py) | the same |
| ...-emulated-weights, -experts, -expert-weights | weights alone, routed experts alone, both | the same |

Trained weights and the optimizer are float32 in every case; around float8 the rest runs as in bf16.

    choice = resolve_precision("fp8-emulated", torch.device("cpu")); print(choice.reason)
    numerics = choice.prepare(student.model)       # once, before Accelerate's prepare: installs, reports

Updates that 16 bits do not see: what the first steps of a training lose in autocast's roundings.

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

import contextlib
import math
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from distill.config.training import Lora, Train
from distill.errors import RunError, UserError
from distill.formats import BLOCKS
from distill.models.describe import adapted_weights, plain_name, weight_groups
from distill.models.fp8 import VARIANTS, Fp8Report, Layer, describe_layers, emulate_fp8, layers_of
from distill.models.routers import bare_model

EMULATED = {  # value: variant of distill.models.fp8
    "fp8-emulated": "tiles",
    "fp8-emulated-tensor": "tensor",
    "fp8-emulated-gradient-blocks": "gradient-blocks",
    **{
        name.replace(form, f"{form}-emulated", 1): name
        for name in VARIANTS
        for form in BLOCKS
        if name.startswith(form)
    },
}
_LIBRARIES = {"fp8": "torchao", "fp8-te": "transformer_engine"}


@dataclass(frozen=True)
class Precision:
    """What a run computes in, and why; from `resolve_precision`."""

    name: str
    accelerate: str  # what `Accelerator(mixed_precision=...)` is given
    reason: str  # printed and kept in the manifest
    _float8: set[nn.Module] = field(default_factory=set, compare=False, repr=False)  # for torchao to convert

    @property
    def half(self) -> torch.dtype | None:
        """The 16-bit format that products run in, None for float32."""
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}.get(self.accelerate)

    def handlers(self) -> list:
        """Accelerate's recipe objects: only real float8 has one. ImportError without its library."""
        if self.name == "fp8":
            from accelerate.utils import AORecipeKwargs
            from torchao.float8 import Float8LinearConfig

            # Accelerate's default also wraps weights for FSDP's gather: safetensors then refuses to save them.
            config = Float8LinearConfig(pad_inner_dim=True, enable_fsdp_float8_all_gather=False)
            return [AORecipeKwargs(config=config, module_filter_func=self._converts)]
        if self.name == "fp8-te":
            from accelerate.utils import TERecipeKwargs

            return [TERecipeKwargs()]
        return []

    def prepare(self, model: nn.Module) -> dict[str, Any]:
        """Make the built student ready for this precision, once, before Accelerate's `prepare`.

        Returns what the manifest keeps: `name`, `reason` and, for float8, `layers` (which multiply in float8
        and which stay high, from this very model) with `layers_text`, the same as lines for people.
        Raises UserError for a model that cannot run so.
        """
        report = self._install(model)
        numerics = {"name": self.name, "reason": self.reason}
        return numerics | ({"layers": report.as_dict(), "layers_text": report.lines()} if report else {})

    def _install(self, model: nn.Module) -> Fp8Report | None:
        if self.name in EMULATED:
            return emulate_fp8(model, EMULATED[self.name])
        if self.name not in _LIBRARIES:
            return None
        if self.name == "fp8":
            layers = torchao_layers(model)
            self._float8.update(layer.module for layer in layers if layer.reason is None)
        else:
            layers = transformer_engine_layers(model)
        report = describe_layers(layers, _LIBRARIES[self.name])
        if not report.float8:
            raise UserError(f"precision {self.name}: no layer of this model can multiply in float8; use bf16")
        return report

    def _converts(self, module: nn.Module, _name: str) -> bool:
        if not self._float8:
            raise RunError("precision fp8: Precision.prepare(model) must come before Accelerate's prepare")
        return module in self._float8


def resolve_precision(name: str, device: torch.device) -> Precision:
    """The precision `name` on `device`. Raises UserError with the reason where the device lacks it."""
    kind = device.type
    if name == "auto":
        return _automatic(device)
    if name == "fp32":
        return Precision(name, "no", "float32 everywhere")
    if name == "bf16" or name in EMULATED:
        if kind == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
            raise UserError(
                f"precision {name}: {torch.cuda.get_device_name(device)} has no bfloat16 units; "
                "set train.precision=fp16 (or fp32)"
            )
        slow = kind == "cpu" and not _cpu_has_bf16()
        note = " (emulated: this CPU has no bf16 units, expect it slower than fp32)" if slow else ""
        bf16 = f"bfloat16 matmuls by autocast{note}, weights and optimizer float32"
        return Precision(
            name, "bf16", f"{_emulation(name)}, around them {bf16}" if name in EMULATED else bf16
        )
    if name == "fp16":
        if kind == "cpu":
            raise UserError(
                "precision fp16: no CPU path (Accelerate would silently compute in float32, and real float16 "
                "is tens of times slower); set train.precision=bf16 or fp32"
            )
        return Precision(name, "fp16", "float16 matmuls by autocast with loss scaling, weights float32")
    return _real_float8(name, device)


def _emulation(name: str) -> str:
    variant = VARIANTS[EMULATED[name]]
    what = "routed experts" if variant.experts_only else "linear layers"
    return f"{variant.label} {what} by emulation (variant {variant.name})"


def _automatic(device: torch.device) -> Precision:
    """The fastest precision whose matrix products this device has units for, and the reason."""
    if device.type == "cuda":
        has_bf16 = torch.cuda.get_device_capability(device) >= (8, 0)
        chosen, why = ("bf16", "this GPU has") if has_bf16 else ("fp16", "this GPU has no")
    else:
        # Emulated bfloat16 products made a training step of the embedded teacher 5 times slower.
        chosen, why = ("bf16", "this CPU has") if _cpu_has_bf16() else ("fp32", "this CPU has no")
    found = resolve_precision(chosen, device)
    return replace(found, reason=f"auto: {why} bfloat16 units, so {found.reason}")


def _real_float8(name: str, device: torch.device) -> Precision:
    instead = "set train.precision=bf16, or fp8-emulated to see what float8 would do to the loss"
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    if capability < (8, 9):
        found = f"capability {capability[0]}.{capability[1]}" if device.type == "cuda" else device.type
        raise UserError(
            f"precision {name}: needs a CUDA GPU of compute capability 8.9 or later, this is {found}; {instead}"
        )
    library = _LIBRARIES[name]
    if find_spec(library) is None:
        raise UserError(f"precision {name}: {library} is not installed; pip install {library}, or {instead}")
    untested = "" if name == "fp8" else "; this project has never run Transformer Engine"
    return Precision(
        name,
        "fp8",
        f"float8 matmuls in linear layers by {library}, around them bfloat16 by autocast, weights and "
        f"optimizer float32{untested}",
    )


def torchao_layers(model: nn.Module) -> list[Layer]:
    """What torchao makes float8: the Linear layers that `distill.models.fp8` would emulate, less three kinds.

    The first and the last Linear stay high, as Accelerate's own filter leaves them; so do layers with a side not
    divisible by 16 (float8 units take no other), and fused experts, which are parameters and not layers.
    """
    layers = layers_of(model)
    linears = [layer for layer in layers if isinstance(layer.module, nn.Linear) and layer.reason != "adapter"]
    ends = {"first Linear": linears[:1], "last Linear": linears[-1:]}
    named = {layer.module: reason for reason, found in ends.items() for layer in found}

    def reason(layer: Layer) -> str | None:
        if layer.reason is not None:
            return layer.reason
        if not isinstance(layer.module, nn.Linear):
            return "fused experts"
        divisible = all(side % 16 == 0 for side in layer.module.weight.shape)
        return named.get(layer.module) if divisible else "sides not divisible by 16"

    return [replace(layer, reason=reason(layer)) for layer in layers]


def transformer_engine_layers(model: nn.Module) -> list[Layer]:
    """What Accelerate hands to Transformer Engine: it takes no filter, so its own walk is repeated here.

    Raises UserError where that walk would replace the output head: the training loop reads it directly.
    """
    base = bare_model(model)
    taken = set(_accelerate_walk(base))
    if base.get_output_embeddings() in taken:
        raise UserError(
            "precision fp8-te: Accelerate would replace the output head, which must stay high and in place; "
            "set train.precision=fp8 (torchao)"
        )
    other = "left out by Accelerate's conversion"
    return [
        replace(layer, reason=None if layer.module in taken else layer.reason or other)
        for layer in layers_of(model)
    ]


def _accelerate_walk(parent: nn.Module) -> Iterator[nn.Module]:
    """The Linear layers that `accelerate.utils.transformer_engine.convert_model` replaces."""
    for child in parent.children():
        if isinstance(child, nn.Linear):
            if any(side % 16 for side in child.weight.shape):
                return  # accelerate 1.15 leaves the parent here, so later siblings stay high as well
            yield child
        else:
            yield from _accelerate_walk(child)


def _cpu_has_bf16() -> bool:
    """Whether bf16 matmuls have hardware (AVX512-BF16 or AMX) on this CPU."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(capabilities.get(flag) for flag in ("avx512_bf16", "amx_bf16", "amx_tile", "bf16"))


@contextlib.contextmanager
def arithmetic(tf32: bool, deterministic: bool) -> Iterator[None]:
    """How float32 products are made and which kernels may be chosen, for as long as the context lasts.

    deterministic: an operation that has no deterministic kernel on the device raises RuntimeError.
    """
    before = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.use_deterministic_algorithms(deterministic)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.use_deterministic_algorithms(before[1])


# ---- Updates that 16 bits do not see ----

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
