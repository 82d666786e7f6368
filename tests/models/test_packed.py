"""Packed weights: the same products, nothing left behind, and the layers that must be left alone."""

import pytest
import torch
from torch import nn

from distill.models import packed
from distill.models.packed import packed_linears


class Two(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.large, self.small = nn.Linear(160, 192, dtype=dtype), nn.Linear(160, 8, bias=False, dtype=dtype)

    def forward(self, x):
        return torch.cat([self.large(x), self.small(x)], -1)


def packed_dtypes(model):
    return {name: set(m.forward.packed) for name, m in model.named_modules() if "forward" in vars(m)}


@pytest.mark.parametrize("shape", [(1, 160), (7, 160), (3, 5, 160), (0, 160)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_products_are_the_layers_own(shape, dtype):
    model, x = Two(dtype), torch.randn(shape).to(dtype)
    expected = model(x)
    with packed_linears(model):
        found = model(x)
        wanted = {dtype} if x.numel() else set()
        assert packed_dtypes(model) == {"large": wanted}, "the large layer alone, and when it is called"
    assert found.dtype == dtype and found.shape == expected.shape
    if dtype == torch.bfloat16:
        assert torch.equal(found, expected)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)
    assert not any("forward" in vars(m) for m in model.modules())


@torch.inference_mode()
def test_under_autocast_the_weights_are_cast_once():
    model, x = Two(), torch.randn(6, 160)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
        with packed_linears(model):
            found = model(x)
            assert packed_dtypes(model) == {"large": {torch.bfloat16}}
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected)


def test_a_pass_with_gradient_is_the_layers_own():
    model, x = Two(), torch.randn(6, 160)
    with packed_linears(model):
        model(x).sum().backward()
        assert packed_dtypes(model) == {"large": set()}
    assert model.large.weight.grad is not None


@torch.inference_mode()
def test_layers_that_somebody_changed_are_left_alone():
    model = Two()
    model.large.forward = own = lambda x: x.new_zeros(*x.shape[:-1], 192)
    with packed_linears(model):
        assert model.large.forward is own
    assert model.large.forward is own
    model = Two()
    model.large.weight = type("Packed", (nn.Parameter,), {})(
        model.large.weight.detach()
    )  # as libraries quantize
    with packed_linears(model):
        assert packed_dtypes(model) == {}
    model = Two()
    nn.utils.parametrizations.weight_norm(model.large)
    with packed_linears(model):
        assert packed_dtypes(model) == {}


def test_compiled_models_are_left_alone():
    inside, around = Two(), Two()
    inside.large.compile()
    for model, own in ((inside, inside), (torch.compile(around), around)):
        with packed_linears(model):
            assert packed_dtypes(own) == {}


@torch.inference_mode()
def test_without_memory_or_the_operators_nothing_changes(monkeypatch):
    model, x = Two(), torch.randn(6, 160)
    expected = model(x)
    needed = model.large.weight.nbytes
    monkeypatch.setattr(packed, "free_memory", lambda device: 3 * needed - 3)
    with packed_linears(model):
        assert packed_dtypes(model) == {}
    monkeypatch.setattr(packed, "free_memory", lambda device: 3 * needed + 3)
    monkeypatch.setattr(packed, "_pack", lambda weight, dtype: None)
    with packed_linears(model):
        assert packed_dtypes(model) and torch.equal(model(x), expected)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with packed_linears(model):
        assert packed_dtypes(model) == {}
