"""A model with its matrix products in emulated FP8, and exactly itself again afterwards.

DeepSeek-V3 (arXiv 2412.19437, section 3.3.1) multiplies in float8 wherever a linear layer of a transformer
block multiplies, and keeps embedding, output head, MoE gates, norms and attention operators high. The same
split here.

    with fp8_emulated(model, "tiles") as report:        # evaluation
        print(*report.lines(), sep="\n")
    report = emulate_fp8(model, "tensor")               # training; restore(model) takes it back

In float8: every plain nn.Linear inside a block, MLA's low-rank projections included (V3's released checkpoint
stores them in float8 too), the frozen layer under a LoRA adapter, and fused experts (3-D parameters) of the
families that share transformers' experts interface, one product per expert and its own tokens. High: the
above, LoRA's own matrices, biases, layers narrower than 16 (no float8 unit takes them), Linear layers of a
kind of their own, experts without that interface. The report names all of both; nothing is skipped silently.
A layer whose weight is read by its parent, rather than called, would stay high and be reported as float8.

Only classes of modules are exchanged: parameters, buffers, names and state_dict stay the very same objects.

Shapes: N tokens, k experts per token, S = N * k assignments, d hidden.

The arithmetic is emulated exactly: quantise, dequantise, multiply in float32. Any device, no float8 hardware.

A tile of numbers shares one scale, its largest magnitude over the format's largest number, and every number
of the tile is divided by it and rounded to float8. What the rounding loses is lost; the products and sums
that follow are float32. Three matrix products make a linear layer, and each has its own tiles:

| variant         | forward y = x W'          | gradient of x: dy W      | gradient of W: dy' x            |
|-----------------|---------------------------|--------------------------|---------------------------------|
| tiles           | x 1x128, W 128x128        | dy 1x128, W 128x128      | dy 128x1, x 1x128 then 128x1    |
| gradient-blocks | the same                  | dy 128x128, W the same   | dy 128x128, x 1x128 then 128x1  |
| tensor          | x, W: one scale each      | dy (E5M2), W: one each   | dy (E5M2), x: one each          |

`tiles` is DeepSeek-V3's (arXiv 2412.19437, section 3.3): E4M3 everywhere, tiles along the inner dimension of
each product, so tokens for the gradient of W; x is kept in float8 for the backward pass and quantised again
there (section 3.5.2). `gradient-blocks` is the one that paper saw diverge at 16B (appendix B.2). `tensor` is
the classic recipe (arXiv 2209.05433): one scale per matrix, E4M3 forward, E5M2 for gradients, here with the
scale of the tensor at hand rather than of past ones.

Kept from V3: master weights and their gradients in float32, outputs and activation gradients in bfloat16
(under bf16 autocast; else the type of the input). Not emulated: the roughly 14 bits to which an H800 sums
between promotions (float32 here), E5M6 and powers of two as scales for the layer after attention,
float8 dispatch between GPUs, bfloat16 optimizer moments. The products obey
`torch.set_float32_matmul_precision`; torch's default, "highest", is what the comparison needs.

    y = fp8_linear(x, weight, bias, VARIANTS["tiles"])

Four bits, and eight with scales by the block (distill/formats.py), are variants too: `mxfp4`, `nvfp4` and `mxfp8` round
inputs and weights of every linear layer, along the inner dimension. `-weights` leaves the inputs as they are,
`-experts` rounds in routed experts alone, `-expert-weights` is both, as gpt-oss is published (arXiv 2508.10925). Only
the forward product is rounded: the backward pass takes rounded operands and exact gradients, and hands them to the
weights through the rounding (straight through, Bengio et al., arXiv 1308.3432).

Shapes: T tokens (all leading dimensions flattened, padding included), K inputs, N outputs.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.errors import UserError
from distill.formats import BLOCKS, BlockFormat
from distill.models.routers import bare_model, find_routers

_LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
_TINY = torch.finfo(torch.float32).tiny  # scale of an all-zero tile: 0 / tiny is 0
_WHOLE = 2**62


class Tile(NamedTuple):
    """How a matrix is cut: numbers of `rows` x `columns` share a scale."""

    rows: int
    columns: int
    dtype: torch.dtype = torch.float8_e4m3fn


@dataclass(frozen=True)
class Variant:
    """The tiles of the five operands. Matrices are x [T, K], W [N, K], dy [T, N]."""

    name: str
    activation: Tile  # x in the forward product, and as kept for the backward pass
    weight: Tile  # W in the forward product and in the gradient of x
    gradient: Tile  # dy in the gradient of x
    gradient_of_weight: Tile  # dy in the gradient of W
    activation_of_weight: Tile  # x, already quantised, in the gradient of W
    label: str = "float8"  # for people, before the name
    experts_only: bool = False

    def product(self, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """x [T, K], weight [N, K] -> [T, N] in `dtype`."""
        return _Product.apply(x, weight, self, dtype)

    @property
    def bits(self) -> float:
        """Of a weight, its share of the scales included."""
        tile = self.weight
        return 8 + (32 / (tile.rows * tile.columns) if tile.rows < _WHOLE else 0)


@dataclass(frozen=True)
class BlockVariant:
    """A format with scales by the block for weights, and for inputs where `inputs`."""

    name: str
    format: BlockFormat
    inputs: bool
    experts_only: bool

    @property
    def label(self) -> str:
        return self.format.name

    @property
    def bits(self) -> float:
        return self.format.bits

    def product(self, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        return _BlockProduct.apply(x, weight, self, dtype)


_ROW, _COLUMN, _BLOCK = Tile(1, 128), Tile(128, 1), Tile(128, 128)
_TENSOR, _TENSOR_E5M2 = Tile(_WHOLE, _WHOLE), Tile(_WHOLE, _WHOLE, torch.float8_e5m2)
VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("tiles", _ROW, _BLOCK, _ROW, _COLUMN, _COLUMN),
        Variant("tensor", _TENSOR, _TENSOR, _TENSOR_E5M2, _TENSOR_E5M2, _TENSOR),
        Variant("gradient-blocks", _ROW, _BLOCK, _BLOCK, _BLOCK, _COLUMN),
        *(
            BlockVariant(f"{name}{suffix}", form, "weights" not in suffix, "expert" in suffix)
            for name, form in BLOCKS.items()
            for suffix in ("", "-weights", "-experts", "-expert-weights")
        ),
    )
}


def quantise(matrix: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
    """float8 values [a, rows, b, columns] and float32 scales [a, 1, b, 1] of a matrix [R, C], R <= a * rows.

    Ragged edges are tiles of their own, padded with zeros. A tile that holds a NaN or an infinity gets a scale
    that is not finite and comes back as NaN throughout: the cast alone would turn infinity into 448 and hide
    it from the training loop's finite check.
    """
    rows, columns = (max(1, min(size, limit)) for size, limit in zip(matrix.shape, tile[:2]))
    down, right = -matrix.shape[0] % rows, -matrix.shape[1] % columns
    padded = F.pad(matrix.float(), (0, right, 0, down)) if down or right else matrix.float()
    tiles = padded.reshape(-1, rows, padded.shape[1] // columns, columns)
    scales = tiles.abs().amax((1, 3), keepdim=True).div(_LARGEST[tile.dtype]).clamp(min=_TINY)
    return (tiles / scales).to(tile.dtype), scales


def dequantise(values: Tensor, scales: Tensor, shape: tuple[int, int]) -> Tensor:
    """The float32 matrix of `shape` [R, C] that `quantise` kept."""
    a, rows, b, columns = values.shape
    matrix = (values.float() * scales).view(a * rows, b * columns)
    return matrix[: shape[0], : shape[1]]


def round_trip(matrix: Tensor, tile: Tile) -> Tensor:
    """What float8 leaves of a matrix [R, C], as float32."""
    return dequantise(*quantise(matrix, tile), matrix.shape)


class _Product(torch.autograd.Function):
    """y [T, N] = x [T, K] W' with W [N, K], all three products of forward and backward in emulated float8."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, variant: Variant, dtype: torch.dtype) -> Tensor:
        kept = quantise(x, variant.activation)
        with torch.autocast(x.device.type, enabled=False):  # it would round the products to bf16 again
            y = dequantise(*kept, x.shape) @ round_trip(weight, variant.weight).T
        ctx.variant, ctx.dtype, ctx.x_dtype, ctx.shape = variant, dtype, x.dtype, x.shape
        # One byte a number; and nothing where the weight is frozen.
        ctx.save_for_backward(weight, *(kept if ctx.needs_input_grad[1] else ()))
        return y.to(dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor):
        weight, *kept = ctx.saved_tensors
        variant, dx, dw = ctx.variant, None, None
        with torch.autocast(dy.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                dx = round_trip(dy, variant.gradient) @ round_trip(weight, variant.weight)
                dx = dx.to(ctx.dtype).to(ctx.x_dtype)
            if kept:
                x = round_trip(dequantise(*kept, ctx.shape), variant.activation_of_weight)
                dw = (round_trip(dy, variant.gradient_of_weight).T @ x).to(weight.dtype)
        return dx, dw, None, None


class _BlockProduct(torch.autograd.Function):
    """y [T, N] = x [T, K] W' with W [N, K], operands rounded to a BlockVariant's format, gradients not."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, variant: BlockVariant, dtype: torch.dtype) -> Tensor:
        ctx.variant, ctx.dtype = variant, dtype
        ctx.save_for_backward(x, weight)
        with torch.autocast(x.device.type, enabled=False):
            inputs = variant.format.round_trip(x) if variant.inputs else x.to(dtype).float()
            return (inputs @ variant.format.round_trip(weight).T).to(dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor):
        x, weight = ctx.saved_tensors
        variant, dx, dw = ctx.variant, None, None
        with torch.autocast(dy.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                dx = (dy.float() @ variant.format.round_trip(weight)).to(ctx.dtype).to(x.dtype)
            if ctx.needs_input_grad[1]:
                inputs = variant.format.round_trip(x) if variant.inputs else x.to(ctx.dtype).float()
                dw = (dy.float().T @ inputs).to(weight.dtype)
        return dx, dw, None, None


@torch.compiler.disable  # a break in a compiled graph: fused code may round where this must not
def fp8_linear(x: Tensor, weight: Tensor, bias: Tensor | None, variant: Variant | BlockVariant) -> Tensor:
    """F.linear(x [..., K], weight [N, K], bias [N]) with its products in emulated float8 -> [..., N].

    The bias is added in the output's type: that of autocast where it is on, else of x.
    """
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    y = variant.product(x.reshape(-1, x.shape[-1]), weight, dtype)
    y = y.view(*x.shape[:-1], weight.shape[0])
    return y if bias is None else y + bias.to(dtype)


_GATE = re.compile(r"(^|_)(gate|router)$")
_IN_BLOCK = re.compile(r"\.\d+\.")  # a member of a list of layers has a number in its name
_NARROWEST = 16
_NO_EXPERT = "no routed expert"


# ---------------------------------------------------------------------- which layers


@dataclass(frozen=True)
class Layer:
    """One module with parameters of its own. `reason` says why it stays high; None: it multiplies in float8."""

    name: str  # in the bare causal LM
    module: nn.Module
    matrices: int  # parameters, counted once where tied
    vectors: int  # of biases (those of all experts together), norm gains
    reason: str | None


def layers_of(model: nn.Module) -> list[Layer]:
    """Every module that owns parameters, in module order. Looks through PEFT, DDP and torch.compile.

    Raises UserError for a MoE whose routers cannot be told from its other layers.
    """
    base = bare_model(model)
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    reasons = dict.fromkeys(head.modules(), "output head") if head is not None else {}
    for router in find_routers(base):
        if router.router is not None:
            reasons |= dict.fromkeys(router.router.modules(), "router")
    for wrapper in base.modules():
        if hasattr(wrapper, "base_layer"):
            children = [c for name, c in wrapper.named_children() if name != "base_layer"]
            reasons |= {m: "adapter" for child in children for m in child.modules()}
    found, seen = [], set()
    for name, module in base.named_modules():
        own = [p for p in module.parameters(recurse=False) if id(p) not in seen]
        seen |= {id(p) for p in own}
        if own:
            matrices = sum(p.numel() for p in own if p.ndim > 1)
            vectors = sum(p.numel() for p in own if p.ndim <= 1)
            found.append(Layer(name, module, matrices, vectors, reasons.get(module) or _reason(name, module)))
    return found


def _reason(name: str, module: nn.Module) -> str | None:
    """Why a module stays high, from what it is; None if it is a layer that multiplies in float8."""
    kind, leaf = type(module).__name__, name.removesuffix(".base_layer").rpartition(".")[2]
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.Linear):
        if _GATE.search(leaf):
            return "router"
        if type(module) is not nn.Linear:
            return f"a Linear of its own kind ({kind})"
        if not _IN_BLOCK.search(name):
            return "outside the blocks"
        return "narrower than 16" if min(module.weight.shape) < _NARROWEST else None
    if _has_interface(module):
        return "experts spread over devices" if module._is_expert_parallel else None
    if isinstance(module, nn.Conv1d):
        return "convolution"
    if any(p.ndim == 3 for p in module.parameters(recurse=False)):
        return f"experts without the experts interface ({kind})"
    if all(p.ndim <= 1 for p in module.parameters(recurse=False)):
        return "norms and vectors"
    return f"not a Linear ({kind})"


def _is_expert(layer: Layer) -> bool:
    return layer.reason is None and _has_interface(layer.module)


def _has_interface(module: nn.Module) -> bool:
    """Fused experts whose class transformers marked with @use_experts_implementation."""
    marks = ("is_transposed", "has_gate", "has_bias", "has_post_expert_norm", "_is_expert_parallel")
    return all(hasattr(module, mark) for mark in marks) and hasattr(type(module).forward, "__wrapped__")


# ---------------------------------------------------------------------- the report


@dataclass(frozen=True)
class Fp8Report:
    """What multiplies in float8 and what stays high. Counts are parameters, tied ones once."""

    variant: str
    float8: dict[str, list[int]]  # name with layer numbers as *: [modules, parameters]
    high: dict[str, dict[str, list[int]]]  # reason: the same

    @property
    def parameters(self) -> int:
        return sum(n for _, n in self.float8.values())

    @property
    def share(self) -> float:
        """Of all parameters, those in float8."""
        high = sum(n for names in self.high.values() for _, n in names.values())
        return self.parameters / (self.parameters + high)

    @property
    def weight_bytes(self) -> int:
        """Of all weights, those that are rounded in their format and the others in 16 bits."""
        high = sum(n for names in self.high.values() for _, n in names.values())
        bits = VARIANTS[self.variant].bits if self.variant in VARIANTS else 8
        return int((self.parameters * bits + 16 * high) / 8)

    def lines(self) -> list[str]:
        """For people: one line for float8, one for each reason to stay high."""
        modules = sum(m for m, _ in self.float8.values())
        text = [
            f"{_label(self.variant)} ({self.variant}): {modules} modules, {self.parameters:,} parameters "
            f"({self.share:.1%})"
        ]
        for reason, names in self.high.items():
            count = sum(n for _, n in names.values())
            text.append(f"high, {reason}: {count:,} parameters ({_some(names)})")
        return text

    def as_dict(self) -> dict:
        """Plain JSON for a manifest."""
        return {
            "variant": self.variant,
            "float8_parameters": self.parameters,
            "float8_share": round(self.share, 6),
            "float8": self.float8,
            "high": self.high,
        }


def describe_layers(layers: list[Layer], variant: str) -> Fp8Report:
    """The report on layers whose `reason` says what happens to them."""
    float8: dict[str, list[int]] = {}
    high: dict[str, dict[str, list[int]]] = defaultdict(dict)

    def count(group: dict[str, list[int]], layer: Layer, parameters: int) -> None:
        entry = group.setdefault(re.sub(r"\.\d+(?=\.|$)", ".*", layer.name), [0, 0])
        entry[0] += 1
        entry[1] += parameters

    for layer in layers:
        if layer.reason is None:
            count(float8, layer, layer.matrices)
            if layer.vectors:
                count(high["biases"], layer, layer.vectors)
        else:
            count(high[layer.reason], layer, layer.matrices + layer.vectors)
    return Fp8Report(variant, float8, dict(high))


def _label(variant: str) -> str:
    return VARIANTS[variant].label if variant in VARIANTS else "float8"


def _some(names: dict[str, list[int]]) -> str:
    first, *others = names
    return first + (f" and {len(others)} more" if others else "")


# ---------------------------------------------------------------------- putting it on, taking it off


def emulate_fp8(model: nn.Module, variant: str = "tiles") -> Fp8Report:
    """Make the layers of `model` multiply in emulated float8, in place; VARIANTS names the choices.

    Training and inference, under autocast, gradient checkpointing, no_grad; weights keep their type.
    Raises UserError for an unknown variant, a model that already emulates, or one with no such layer.
    """
    if variant not in VARIANTS:
        raise UserError(f"float8 variant '{variant}' is unknown; choose one of {', '.join(VARIANTS)}")
    if any(_emulates(module) for module in bare_model(model).modules()):
        raise UserError("this model already multiplies in emulated float8; call restore(model) first")
    layers = layers_of(model)
    if VARIANTS[variant].experts_only:
        layers = [
            layer if _is_expert(layer) else replace(layer, reason=layer.reason or _NO_EXPERT)
            for layer in layers
        ]
    report = describe_layers(layers, variant)
    if not report.float8:
        raise UserError(
            f"{type(bare_model(model)).__name__} has no layer that {_label(variant)} emulation knows "
            f"({'; '.join(report.lines()[1:])}); use precision bf16 or fp32"
        )
    for layer in layers:
        if layer.reason is None:
            kind = _Linear if isinstance(layer.module, nn.Linear) else _Experts
            layer.module.__class__ = _emulating(type(layer.module), kind, VARIANTS[variant])
    return report


def restore(model: nn.Module) -> None:
    """Take emulation back: every module is of its own class again. Nothing happens to a model without."""
    for module in bare_model(model).modules():
        if _emulates(module):
            module.__class__ = type(module).fp8_original


@contextmanager
def fp8_emulated(model: nn.Module, variant: str = "tiles") -> Iterator[Fp8Report]:
    """`emulate_fp8` inside the context, the model as it was outside."""
    report = emulate_fp8(model, variant)
    try:
        yield report
    finally:
        restore(model)


def _emulates(module: nn.Module) -> bool:
    return "fp8_original" in vars(type(module))


@cache
def _emulating(original: type, kind: type, variant: Variant | BlockVariant) -> type:
    # The variant lives on the class: no attribute of any module changes, so there is none to put back.
    return type(f"Fp8{original.__name__}", (kind, original), {"fp8_original": original, "fp8": variant})


class _Linear:
    fp8: Variant | BlockVariant

    def forward(self, input: Tensor) -> Tensor:
        return fp8_linear(input, self.weight, self.bias, self.fp8)


class _Experts:
    """Fused experts behind transformers' interface: same arguments, same result up to float8."""

    fp8: Variant | BlockVariant

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        experts, order = top_k_index.reshape(-1).sort(stable=True)  # [S]
        tokens = hidden_states[order // top_k_index.shape[-1]]  # [S, d]
        sizes = torch.bincount(experts, minlength=self.num_experts).tolist()
        first = "gate_up_proj" if self.has_gate else "up_proj"
        groups = zip(tokens.split(sizes), self._matrices(first), self._matrices("down_proj"))
        # Tiles never mix the tokens of two experts: each is a matrix product of its own.
        outputs = torch.cat([self._expert(rows, up, down) for rows, up, down in groups if len(rows)])
        if self.has_post_expert_norm:
            outputs = self.post_expert_norm(outputs)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        weighted = outputs[back] * top_k_weights.reshape(-1, 1)
        return weighted.view(*top_k_index.shape, -1).sum(1).to(hidden_states.dtype)

    def _matrices(self, name: str) -> list[tuple[Tensor, Tensor | None]]:
        """(weight [out, in], bias [out] or None) of each expert."""
        weights = getattr(self, name)  # [E, out, in], or [E, in, out] in families that transpose
        if self.is_transposed:
            weights = weights.transpose(1, 2)
        biases = getattr(self, f"{name}_bias").unbind(0) if self.has_bias else [None] * len(weights)
        # unbind: one gradient [E, out, in] is put together at the end, not one per expert.
        return list(zip(weights.unbind(0), biases))

    def _expert(self, tokens: Tensor, up: tuple, down: tuple) -> Tensor:
        inner = fp8_linear(tokens, *up, self.fp8)
        inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
        return fp8_linear(inner, *down, self.fp8)
