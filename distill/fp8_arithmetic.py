"""FP8 arithmetic emulated exactly: quantise, dequantise, multiply in float32. Any device, no float8 hardware.

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

Shapes: T tokens (all leading dimensions flattened, padding included), K inputs, N outputs.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

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


_ROW, _COLUMN, _BLOCK = Tile(1, 128), Tile(128, 1), Tile(128, 128)
_TENSOR, _TENSOR_E5M2 = Tile(_WHOLE, _WHOLE), Tile(_WHOLE, _WHOLE, torch.float8_e5m2)
VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("tiles", _ROW, _BLOCK, _ROW, _COLUMN, _COLUMN),
        Variant("tensor", _TENSOR, _TENSOR, _TENSOR_E5M2, _TENSOR_E5M2, _TENSOR),
        Variant("gradient-blocks", _ROW, _BLOCK, _BLOCK, _BLOCK, _COLUMN),
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


@torch.compiler.disable  # a break in a compiled graph: fused code may round where this must not
def fp8_linear(x: Tensor, weight: Tensor, bias: Tensor | None, variant: Variant) -> Tensor:
    """F.linear(x [..., K], weight [N, K], bias [N]) with its products in emulated float8 -> [..., N].

    The bias is added in the output's type: that of autocast where it is on, else of x.
    """
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    y = _Product.apply(x.reshape(-1, x.shape[-1]), weight, variant, dtype)
    y = y.view(*x.shape[:-1], weight.shape[0])
    return y if bias is None else y + bias.to(dtype)
