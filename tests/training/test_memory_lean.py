"""A lean step keeps the inputs of norms and gated MLPs alone: the same bits forward, gradients to rounding."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from step_example import FAMILIES, build, mla, rows
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from distill.config.training import Objective
from distill.training.memory import Lean, _Gate, _LoraSum, _RMSNorm, saved_for_backward
from distill.training.step import StudentStep

HALF = {"fp32": False, "bf16": True}


def model_of(family: str):
    return mla() if family == "deepseek_v3" else build(family)


def step_of(model, half: bool, lean: bool) -> tuple[float, dict[str, torch.Tensor], int]:
    """Loss, gradients, bytes kept."""
    model.zero_grad()
    step, batch = StudentStep(model, [Objective(name="cross_entropy")]), rows().collate(range(7), 0)
    inside = Lean(model) if lean else torch.enable_grad()
    with inside, saved_for_backward(step) as saved:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            total, _ = step(batch, {})
        kept = saved()
        total.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return float(total.detach()), found, kept


def apart(found: dict, right: dict) -> float:
    assert found.keys() == right.keys()
    return max(float((found[n] - right[n]).norm() / (right[n].norm() + 1e-12)) for n in right)


@pytest.mark.parametrize("precision", HALF)
@pytest.mark.parametrize(
    "family, replaced",
    # Norms of two layers and the last one, norms of queries and keys, gated MLPs; of the mixtures the norms alone,
    # and DeepSeek's shared expert and norms of latents.
    [("qwen3 tied", 4 + 1 + 4 + 2), ("gemma2", 8 + 1 + 2), ("granite", 4 + 1 + 2), ("olmoe", 4 + 1 + 4),
     ("deepseek_v3", 4 + 1 + 4 + 2), ("gpt2", 0), ("cohere", 2)],
)  # fmt: skip
def test_the_same_loss_to_the_last_bit_and_the_same_gradients(family, replaced, precision):
    model = model_of(family)
    assert len(Lean(model).instead) == replaced
    loss, right, before = step_of(model, HALF[precision], lean=False)
    found, gradients, kept = step_of(model, HALF[precision], lean=True)
    assert found == loss and apart(gradients, right) < (1e-2 if HALF[precision] else 1e-5)
    assert kept < before if replaced else kept == before
    assert not any("forward" in vars(module) for module in model.modules()), "it ends with the context"


def test_what_is_kept_is_the_inputs():
    """Of a gated MLP both halves, and their product for the weight behind; of a norm its input and a number a row."""
    model = build("qwen3")
    mlp, norm = model.model.layers[0].mlp, model.model.layers[0].input_layernorm
    x = torch.randn(5, 32, requires_grad=True)
    for module, kept in ((mlp, 32 + 3 * 48), (norm, 32 + 1)):
        with Lean(module), saved_for_backward(module) as saved:
            y = module(x)
            assert saved() == 4 * 5 * kept
        with saved_for_backward(module) as saved:
            z = module(x)
            assert saved() > 4 * 5 * kept
        assert torch.equal(y, z)


def test_gradients_of_the_gate_are_exact():
    gate, up = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    for name in ("silu", "gelu", "gelu_pytorch_tanh", "relu2"):
        assert torch.autograd.gradcheck(lambda g, u, act=ACT2FN[name]: _Gate.apply(g, u, act), (gate, up))


@pytest.mark.parametrize("form, offset", [("rounded first", 0.0), ("rounded last", 0.0), ("plus one", 1.0)])
@pytest.mark.parametrize("dtype, near", [(torch.float32, 1e-6), (torch.bfloat16, 6e-3)])
def test_gradients_of_the_norm_are_those_of_its_definition(form, offset, dtype, near):
    torch.manual_seed(0)
    x, weight, grad = torch.randn(4, 6, 16), torch.randn(16), torch.randn(4, 6, 16)
    given = [t.to(dtype).requires_grad_() for t in (x, weight)]
    _RMSNorm.apply(*given, 1e-2, form).backward(grad.to(dtype))
    wide = [t.detach().double().requires_grad_() for t in given]
    normal = wide[0] * torch.rsqrt(wide[0].square().mean(-1, keepdim=True) + 1e-2)
    ((wide[1] + offset) * normal).backward(grad.to(dtype).double())
    for found, right in zip(given, wide):
        assert float((found.grad.double() - right.grad).norm() / right.grad.norm()) < near


def test_a_frozen_norm_gets_no_gradient_and_frozen_inputs_neither():
    norm, x = LlamaRMSNorm(8), torch.randn(2, 8)
    with Lean(norm):
        norm(x).sum().backward()
    assert norm.weight.grad is not None and x.grad is None
    norm.requires_grad_(False).zero_grad()
    x.requires_grad_()
    with Lean(norm):
        norm(x).sum().backward()
    assert norm.weight.grad is None and x.grad is not None


class Doubling(LlamaRMSNorm):
    def forward(self, x):
        return 2 * super().forward(x)


class Sloped(nn.Module):
    """A gated MLP by its names, of other arithmetic."""

    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=0.5) * self.up_proj(x))


@pytest.mark.parametrize("module", [Doubling(8), Sloped(), nn.LayerNorm(8), nn.RMSNorm(8, eps=None)])
def test_what_computes_anything_else_is_left_alone(module):
    assert Lean(nn.Sequential(module)).instead == []


def test_a_forward_of_somebody_else_is_left_alone():
    norm = LlamaRMSNorm(8)
    norm.forward = norm.forward  # of the same arithmetic, but somebody put it there
    assert Lean(nn.Sequential(norm)).instead == []


# ---- LoRA -------------------------------------------------------------------------------------------------


def adapted(dropout: float = 0.0, alpha: int = 8, **more):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **_sizes()))
    config = LoraConfig(r=4, lora_alpha=alpha, lora_dropout=dropout, target_modules="all-linear", **more)
    model = get_peft_model(model, config).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def _sizes() -> dict:
    from step_example import SIZES

    return {**SIZES, **FAMILIES["qwen3"], "attention_bias": True}


def layers_of(lean: Lean) -> int:
    return sum(hasattr(module, "lora_A") for module, _ in lean.instead)


@pytest.mark.parametrize("precision", HALF)
@pytest.mark.parametrize("alpha", [8, 12])
def test_a_lora_step_is_pefts(precision, alpha):
    model = adapted(alpha=alpha)
    assert layers_of(Lean(model)) == 2 * 7
    loss, right, before = step_of(model, HALF[precision], lean=False)
    found, gradients, kept = step_of(model, HALF[precision], lean=True)
    assert found == pytest.approx(loss, rel=2e-3 if HALF[precision] else 1e-6)
    assert kept < before
    if HALF[precision]:  # no further from the gradients in float32 than PEFT's
        exact = step_of(model, False, lean=False)[1]
        assert apart(gradients, exact) < 1.3 * apart(right, exact)
    else:
        assert apart(gradients, right) < 1e-5


def test_gradients_of_the_lora_sum_are_exact():
    torch.manual_seed(0)
    shapes = [(2, 3, 5), (7, 5), (7,), (4, 5), (7, 4)]
    x, weight, bias, down, up = (torch.randn(s, dtype=torch.float64) for s in shapes)
    given = [t.requires_grad_() for t in (x, down, up)]
    plain = lambda x, a, b: x @ weight.T + bias + 1.5 * (x @ a.T) @ b.T  # noqa: E731
    fused = lambda x, a, b: _LoraSum.apply(x, x.detach(), weight, bias, a, b, 1.5)  # noqa: E731
    assert torch.autograd.gradcheck(fused, given)
    assert torch.allclose(fused(*given), plain(*given), rtol=1e-12)


def test_in_sixteen_bits_it_is_nearer_to_float64_than_the_sum_of_three():
    model = adapted()
    layer = model.base_model.model.model.layers[0].mlp.gate_proj
    x = torch.randn(64, 32)
    right = copy.deepcopy(layer).double()(x.double())
    off = []
    for lean in (False, True):
        with torch.autocast("cpu", torch.bfloat16), Lean(layer) if lean else torch.enable_grad():
            off.append(float((layer(x).double() - right).detach().norm()))
    assert off[1] < off[0]


def test_layers_that_read_one_input_share_its_cast():
    model = adapted()
    mlp = model.base_model.model.model.layers[0].mlp
    x = torch.randn(6, 32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), Lean(mlp), saved_for_backward(mlp) as saved:
        both = mlp.gate_proj(x), mlp.up_proj(x)
        # One cast of x; of each layer the r inner numbers, and casts of W, A and B.
        assert saved() == 2 * (6 * 32 + 2 * (6 * 4 + 48 * 32 + 4 * 32 + 48 * 4))
        x.data.add_(1.0), x.detach_().add_(0.0)  # another value is another cast
        assert not torch.equal(mlp.gate_proj(x), both[0])


@pytest.mark.parametrize(
    "kinds, fused",
    # Of seven layers those without a bias: a bias that trains is not of the adapter alone.
    [({"dropout": 0.1}, 0), ({"use_dora": True}, 0), ({"bias": "all"}, 3), ({"lora_bias": True}, 0)],
    ids=["dropout", "dora", "bias", "lora bias"],
)
@pytest.mark.filterwarnings("ignore:.*lora_bias")
def test_other_kinds_of_adapters_are_pefts_own(kinds, fused):
    assert layers_of(Lean(adapted(**kinds))) == 2 * fused


def test_an_adapter_that_is_switched_off_or_merged_is_pefts_own():
    model = adapted()
    ids = torch.randint(3, 60, (2, 9))
    with model.disable_adapter():
        right = model(input_ids=ids).logits
        with Lean(model):
            assert torch.equal(model(input_ids=ids).logits, right)
    model.merge_adapter()
    right = model(input_ids=ids).logits
    with Lean(model):
        assert torch.equal(model(input_ids=ids).logits, right)
