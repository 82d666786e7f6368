"""What a forward pass keeps for its backward pass: exact on networks one can count by hand, and of no effect."""

import pytest
import torch
from conftest import QWEN3_MOE, byte_tokenizer, save_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from distill.training.memory import saved_for_backward


def test_a_multilayer_perceptron_keeps_its_inputs_and_activations():
    """Linear keeps its input, ReLU its output, which is the next layer's input: one storage, counted once."""
    net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    x = torch.randn(7, 3)
    with saved_for_backward(net) as saved:
        y = net(x)
    assert saved() == 4 * 7 * (3 + 5)
    del y
    assert saved() == 0  # they went with the graph


def test_what_is_freed_on_the_way_does_not_count():
    weight = nn.Parameter(torch.randn(4, 4))
    module = nn.ParameterList([weight])
    with saved_for_backward(module) as saved:
        x = torch.randn(6, 4)
        torch.autograd.grad((x @ weight).exp().sum(), weight)  # a graph that is gone again
        total = (x @ weight).sin().sum()
    assert saved() == 4 * 6 * (4 + 4)  # x, and what sin reads
    assert total.requires_grad


def test_half_the_bytes_in_bf16_besides_the_copies_of_weights():
    net = nn.Linear(8, 8, bias=False)
    x = torch.randn(32, 8, requires_grad=True)
    with saved_for_backward(net) as saved, torch.autocast("cpu", torch.bfloat16):
        y = net(x)
    assert saved() == 2 * 32 * 8 + 2 * 8 * 8
    with saved_for_backward(net) as saved:
        z = net(x)
    assert saved() == 4 * 32 * 8  # the weight itself is there anyway
    assert y.shape == z.shape


@pytest.mark.parametrize("nested", [False, True])
def test_gradients_are_the_same_bits(tmp_path, nested):
    from transformers import AutoModelForCausalLM

    path = save_model(tmp_path / "m", QWEN3_MOE, byte_tokenizer(None))
    model = AutoModelForCausalLM.from_pretrained(path)
    ids = torch.randint(0, 200, (2, 9))

    def plain():
        return model(input_ids=ids, labels=ids).loss

    def loss():
        return checkpoint(plain, use_reentrant=False) if nested else plain()

    loss().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    with saved_for_backward(model) as saved:
        total = loss()
    assert nested or saved() > 4 * 2 * 9 * 32
    total.backward()
    assert all(torch.equal(p.grad, expected[name]) for name, p in model.named_parameters())
