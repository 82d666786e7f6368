"""The kernel of a training step: plain products where the fused one is slow, the same numbers either way."""

import pytest
import torch

from distill.models.precision import PLAIN_ATTENTION_LIMIT, training_attention

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "precision, longest, plain",
    [("bf16", 60, True), ("bf16", PLAIN_ATTENTION_LIMIT + 1, False), ("no", 60, False)],
)
def test_plain_products_for_short_rows_in_bf16_alone(precision, longest, plain):
    before = torch.backends.cuda.flash_sdp_enabled()
    with training_attention(CPU, precision, longest):
        assert torch.backends.cuda.flash_sdp_enabled() == (before and not plain)
    assert torch.backends.cuda.flash_sdp_enabled() == before


def test_the_same_attention_and_gradient():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 20, 16, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    found = []
    for longest in (20, PLAIN_ATTENTION_LIMIT + 1):
        with training_attention(CPU, "bf16", longest):
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            found.append((out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))))
    for plain, fused in zip(*found):
        assert torch.allclose(plain.float(), fused.float(), atol=0.05, rtol=0.05)
