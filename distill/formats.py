"""Numbers in four and eight bits that share a scale by the block: MXFP4, MXFP8 and NVFP4, emulated exactly.

    kept = BLOCKS["mxfp4"].round_trip(matrix)        # float32: what the format leaves of it
    BLOCKS["nvfp4"].bits                             # 4.5 a number, scales included

| format | numbers | block | scale of a block | and besides |
|---|---|---|---|---|
| mxfp4 | E2M1: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives | 32 | E8M0: a power of two | |
| mxfp8 | E4M3: up to 448 | 32 | E8M0 | |
| nvfp4 | E2M1 | 16 | E4M3 | one float32 scale a tensor |

MX: OCP Microscaling Formats specification 1.0, section 6.3: the scale is the largest power of two not above the block's
largest magnitude, over the format's largest power of two; what is then too large becomes the largest number. NVFP4:
NVIDIA, "Pretraining large language models with NVFP4" (arXiv 2509.25149, appendix B): the tensor's scale puts the
largest block scale at 448, and block scales are rounded to E4M3. Both round to the nearest, ties to even, and give the
very bits of torchao's reference casts (`to_mx` with ScaleCalculationMode.FLOOR, `nvfp4_quantize`): the tests hold them
to a table, and to torchao where it is installed.

Blocks lie along the last axis, the inner one of a matrix product; a ragged last block is filled up with zeros. A block
with a NaN or an infinity comes back as NaN throughout. The scale of a tensor is of the numbers at hand: rounded as
inputs in NVFP4, a row of a batch depends a little on the rows beside it.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_E4M3 = torch.float8_e4m3fn
_E4M3_LARGEST, _E2M1_LARGEST = 448.0, 6.0
_E4M3_TINY = torch.finfo(_E4M3).tiny
_SMALLEST = 2.0**-100  # of a tensor's scale: its reciprocal over a block's scale is finite


@dataclass(frozen=True)
class BlockFormat:
    """Numbers of `name`'s kind in blocks of `size`; `bits` a number, scales of the blocks included."""

    name: str
    size: int
    bits: float

    def round_trip(self, matrix: Tensor) -> Tensor:
        """What the format leaves of a tensor [..., C], as float32."""
        columns = matrix.shape[-1]
        blocks = F.pad(matrix.float(), (0, -columns % self.size)).unflatten(-1, (-1, self.size))
        largest = blocks.abs().amax(-1, keepdim=True)
        kept = _nv(blocks, largest) if self.name == "nvfp4" else _mx(blocks, largest, self.name)
        return torch.where(largest.isfinite(), kept, torch.nan).flatten(-2)[..., :columns]


BLOCKS = {
    "mxfp4": BlockFormat("mxfp4", 32, 4 + 8 / 32),
    "mxfp8": BlockFormat("mxfp8", 32, 8 + 8 / 32),
    "nvfp4": BlockFormat("nvfp4", 16, 4 + 8 / 16),
}


def e2m1(values: Tensor) -> Tensor:
    """The nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6 with the sign of each value; ties to the even mantissa, 6 at most."""
    exponent = torch.frexp(values).exponent.clamp(1, 3)  # of values in [1, 2): 1; below 1 the step stays
    step = torch.ldexp(torch.ones_like(values), exponent - 2)
    return (values / step).round().mul(step).clamp(-_E2M1_LARGEST, _E2M1_LARGEST)


def _mx(blocks: Tensor, largest: Tensor, name: str) -> Tensor:
    power = {"mxfp4": 2, "mxfp8": 8}[name]  # exponent of the largest power of two among the numbers
    exponent = (torch.frexp(largest).exponent - 1 - power).clamp(-126, 127)
    scale = torch.ldexp(torch.ones_like(largest), exponent)
    scaled = blocks / scale
    if name == "mxfp4":
        return e2m1(scaled) * scale
    return scaled.clamp(-_E4M3_LARGEST, _E4M3_LARGEST).to(_E4M3).float() * scale


def _nv(blocks: Tensor, largest: Tensor) -> Tensor:
    # The scale of the tensor leaves out what is not finite: those blocks are NaN anyway, the others are not.
    peak = torch.where(largest.isfinite(), largest, 0).amax()
    of_tensor = torch.where(peak > 0, peak / (_E4M3_LARGEST * _E2M1_LARGEST), 1.0).clamp(min=_SMALLEST)
    of_block = (largest / _E2M1_LARGEST / of_tensor).clamp(_E4M3_TINY, _E4M3_LARGEST).to(_E4M3).float()
    # By the reciprocal, as the reference and the kernels do it.
    scaled = blocks * ((1.0 / of_tensor) / of_block)
    return e2m1(scaled) * (of_tensor * of_block)
