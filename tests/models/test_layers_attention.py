"""Attention of a training step on a CPU: in float32 under autocast too, which is nearer to float64 than 16 bits are."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from distill.models.layers import _sdpa

MODULE = SimpleNamespace(num_key_value_groups=2, is_causal=True)


def states(dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = [(3, heads, 20, 16) for heads in (4, 2, 2)]
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def with_gradients(attend, given: list[torch.Tensor], mask=None) -> list[torch.Tensor]:
    out = attend(MODULE, *given, mask, is_causal=mask is None)[0]
    out.double().square().sum().backward()
    return [out.detach().double(), *(x.grad.double() for x in given)]


def exact(given: list[torch.Tensor]) -> list[torch.Tensor]:
    q, k, v = (x.detach().double().requires_grad_() for x in given)
    out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
    out.square().sum().backward()
    return [out.detach(), q.grad, k.grad, v.grad]


def errors(found: list[torch.Tensor], right: list[torch.Tensor]) -> list[float]:
    return [float((a - b).norm() / b.norm()) for a, b in zip(found, right)]


@pytest.mark.parametrize("autocast", [True, False])
def test_sixteen_bits_attend_in_float32_on_the_way_to_a_gradient(autocast):
    given = states(torch.bfloat16)
    right = exact(given)
    plain = errors(with_gradients(sdpa_attention_forward, states(torch.bfloat16)), right)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = errors(with_gradients(_sdpa, given), right)
    # The result is rounded to 16 bits once, by at most 2^-9 of a number; torch's own kernel is further off.
    assert max(found) < 2.5e-3 and all(a < b for a, b in zip(found, plain))


def test_under_autocast_wide_states_are_not_cast_and_the_result_is_narrow():
    """Qwen3's norms of queries and keys leave float32 beside values in 16 bits."""
    q, k, v = states(torch.float32)
    given = [q, k, v.detach().bfloat16().requires_grad_()]
    right = exact(given)
    with torch.autocast("cpu", torch.bfloat16):
        assert _sdpa(MODULE, *given, None, is_causal=True)[0].dtype == torch.bfloat16
        assert max(errors(with_gradients(_sdpa, given), right)) < 2.5e-3


def test_a_mask_is_taken_along():
    bias = torch.full((20, 20), float("-inf")).triu(1)[None, None]
    for mask in (bias, bias.bfloat16(), bias == 0):
        given = states(torch.bfloat16)
        assert max(errors(with_gradients(_sdpa, given, mask), exact(given))) < 2.5e-3


def test_without_a_gradient_and_in_other_dtypes_it_is_transformers_own():
    with torch.no_grad():
        given = states(torch.bfloat16)
        assert torch.equal(_sdpa(MODULE, *given, None)[0], sdpa_attention_forward(MODULE, *given, None)[0])
    given = states(torch.float64)
    assert torch.equal(_sdpa(MODULE, *given, None)[0], sdpa_attention_forward(MODULE, *given, None)[0])
