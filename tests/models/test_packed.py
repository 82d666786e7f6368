"""Packed weights: the same products, nothing left behind, and the layers that must be left alone."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

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


def adapted(dtype=torch.float32, **options):
    """`Two` with an adapter that is not zero on both of its layers, in evaluation mode."""
    model = get_peft_model(Two(dtype), LoraConfig(r=4, target_modules=["large", "small"], **options)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return model


def sums_of(model) -> dict[str, bool]:
    """Layer -> whether its sum was packed, of the layers with an adapter that work in another way."""
    found = {name.split(".")[-1]: m.forward for name, m in model.named_modules() if "forward" in vars(m)}
    return {name: how.packed is not None for name, how in found.items() if isinstance(how, packed._PackedSum)}


@torch.inference_mode()
def test_a_layer_with_an_adapter_multiplies_once():
    model, x = adapted(lora_alpha=16), torch.randn(3, 5, 160)
    expected, state = model(x), {name: p.clone() for name, p in model.state_dict().items()}
    with packed_linears(model), FlopCounterMode(display=False) as counter:
        found = model(x)
        assert sums_of(model) == {"large": True, "small": True}, "small ones too: two products less"
        # Nothing is left of the adapter's own products but the two that made the sums.
        assert counter.get_total_flops() == 2 * 4 * 160 * (192 + 8)
        with model.disable_adapter():
            torch.testing.assert_close(model(x), model.base_model.model(x))
            assert not torch.allclose(model(x), expected, atol=0.1)
        assert torch.equal(model(x), found)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert sums_of(model) == {} and all(torch.equal(p, state[name]) for name, p in model.state_dict().items())


def test_an_adapter_in_other_numbers_or_with_gradient_works_as_it_did():
    for model, cast in ((adapted(torch.bfloat16), False), (adapted(), True)):
        x = torch.randn(6, 160).to(model.base_model.model.large.weight.dtype)
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=cast):
            expected = model(x)
            with packed_linears(model):
                assert torch.equal(model(x), expected)
                assert sums_of(model) == {"large": False, "small": False}
    model = adapted()
    with packed_linears(model):
        model(torch.randn(6, 160)).sum().backward()
        assert sums_of(model) == {"large": False, "small": False}
    assert any(p.grad is not None for n, p in model.named_parameters() if "lora_A" in n)


@torch.inference_mode()
def test_adapters_of_another_kind_are_left_alone():
    listened, two = adapted(), adapted()
    listened.base_model.model.large.base_layer.register_forward_hook(lambda *_: None)
    two.add_adapter("other", LoraConfig(r=2, target_modules=["large"]))
    two.base_model.set_adapter(["default", "other"])
    for model, expected in ((listened, {"small"}), (adapted(use_dora=True), set()), (two, set())):
        x = torch.randn(2, 160)
        before = model(x)
        with packed_linears(model):
            torch.testing.assert_close(model(x), before, atol=1e-5, rtol=1e-5)
            assert set(sums_of(model)) == expected
