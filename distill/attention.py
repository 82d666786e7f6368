"""Which attention kernel a training step runs on: torch's own choice, except where it is known to be slow.

    with training_attention(device, "bf16", longest=60): ...forward and backward...

On a CPU torch's fused kernel is the one of flash attention, whose backward pass in bfloat16 takes 16 ms a layer for 32
rows of 50 tokens where plain matrix products take 2 (AMD EPYC with AVX512-BF16, one thread; a LoRA step of the embedded
student 183 ms with it, 146 without). Plain products hold [rows, heads, T, T] scores, so long rows keep the fused one.
"""

import contextlib

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

LONGEST = 512  # tokens of a row up to which whole score matrices are small


def training_attention(device: torch.device, mixed_precision: str, longest: int):
    """A context for one step. `mixed_precision` is Accelerate's word; `longest` the step's longest row in tokens."""
    if device.type == "cpu" and mixed_precision == "bf16" and longest <= LONGEST:
        return sdpa_kernel(SDPBackend.MATH)
    return contextlib.nullcontext()
