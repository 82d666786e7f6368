"""One gradient for a tied matrix: equal to autograd's two, whatever looks the tokens up, and without the second."""

import pytest
import torch
from step_example import assert_close, build, gradients, rows
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from distill.config.training import Lora, Objective
from distill.models.hooks import Head
from distill.models.student import add_lora
from distill.training.losses.fused import Given, Term, fused_loss
from distill.training.step import StudentStep, TiedGradient

V, D = 13, 4


class Tied(nn.Module):
    """A model of an embedding, a mixing matrix and a head with the embedding's weight."""

    def __init__(self, padding: int | None = None):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(V, D, padding_idx=padding, dtype=torch.float64)
        self.mix = nn.Linear(D, D, dtype=torch.float64)
        self.head = nn.Linear(D, V, bias=False, dtype=torch.float64)
        self.head.weight = self.embed.weight

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.head

    def forward(self, ids):
        return self.mix(self.embed(ids))


IDS = torch.tensor([3, 0, 3, 3, 12, 7])
TARGETS = torch.tensor([0, 3, 12, 1, 1, 5])


def gradient(model: Tied, run, tied: TiedGradient | None) -> torch.Tensor:
    """Of the sum of the losses that `run(model, loss)` returns, where `loss(hidden)` is the fused one."""

    def loss(hidden):
        leave = tied.leave if tied and tied.asked else None
        signals = {"targets": Given((TARGETS,))}
        return fused_loss(
            hidden, Head(model.head.weight), [Term("cross_entropy", "targets")], signals, None, leave
        )[0]

    if tied:
        with tied.reading():
            total = run(model, loss)
    else:
        total = run(model, loss)
    total.backward()
    found, model.embed.weight.grad = model.embed.weight.grad, None
    return found


RUNS = {
    "once": lambda m, loss: loss(m(IDS)),
    "twice in one graph": lambda m, loss: loss(m(IDS)) + 2 * loss(m(IDS.flip(0))),
    "two losses of one lookup": lambda m, loss: (lambda h: loss(h) + 2 * loss(0.5 * h))(m(IDS)),
    "two lookups, one loss": lambda m, loss: loss(m(IDS) + 0.3 * m(IDS * 2 % V)),
    "another lookup beside the loss": lambda m, loss: loss(m(IDS)) + m.embed(IDS).square().sum(),
    "checkpointed": lambda m, loss: loss(torch.utils.checkpoint.checkpoint(m, IDS, use_reentrant=False)),
    "no lookup with a gradient": lambda m, loss: loss(m.mix(m.embed.weight.detach()[IDS])),
}


@pytest.mark.parametrize("padding", [None, 3])
@pytest.mark.parametrize("run", RUNS)
def test_the_gradient_is_that_of_two_uses(run, padding):
    model = Tied(padding)
    tied = TiedGradient.of(model)
    for _ in range(2):  # nothing is left from one pass to the next
        found = gradient(model, RUNS[run], tied)
        torch.testing.assert_close(found, gradient(model, RUNS[run], None), rtol=1e-12, atol=1e-12)
    assert "forward" not in vars(model.embed)


def test_gradients_accumulate_over_passes():
    model = Tied()
    tied = TiedGradient.of(model)
    once = gradient(model, RUNS["once"], tied)
    model.embed.weight.grad = once.clone()
    assert torch.allclose(gradient(model, RUNS["once"], tied), 2 * once)


def test_a_gradient_that_nobody_took_is_an_error_of_the_backward_pass():
    model = Tied()
    tied = TiedGradient.of(model)

    def detached(m, loss):
        m(IDS)
        return loss(torch.zeros(6, D, dtype=torch.float64, requires_grad=True))

    with pytest.raises(RuntimeError, match="not taken on"):
        gradient(model, detached, tied)


def test_a_pass_that_failed_on_its_way_back_leaves_nothing_to_the_next():
    """Out of memory, say: `train.auto_micro_batch` goes on with smaller ones."""
    model = Tied()
    tied = TiedGradient.of(model)

    def fails(m, loss):
        hidden = m.embed(IDS)
        hidden.register_hook(lambda _: (_ for _ in ()).throw(MemoryError("no room")))
        return loss(m.mix(hidden))

    with pytest.raises(MemoryError, match="no room"):
        gradient(model, fails, tied)
    model.zero_grad()
    torch.testing.assert_close(gradient(model, RUNS["once"], tied), gradient(model, RUNS["once"], None))


def test_only_a_plain_trained_tied_embedding_is_shared():
    assert TiedGradient.of(Tied()) is not None
    untied, frozen, hooked, scaled = Tied(), Tied(), Tied(), Tied()
    untied.head.weight = nn.Parameter(untied.head.weight.detach().clone())
    frozen.embed.weight.requires_grad_(False)
    hooked.embed.forward = hooked.embed.forward
    scaled.embed.scale_grad_by_freq = True
    assert [TiedGradient.of(m) for m in (untied, frozen, hooked, scaled)] == [None] * 4
    assert StudentStep(add_lora(build("qwen3 tied"), Lora()), [Objective(name="cross_entropy")]).tied is None


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, _types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


def test_no_second_gradient_of_the_matrix_is_made(monkeypatch):
    makes = []
    for share in (True, False):
        if not share:
            monkeypatch.setattr(TiedGradient, "of", lambda _model: None)
        step = StudentStep(build("qwen3 tied"), [Objective(name="cross_entropy")])
        with Operations() as operations:
            step(rows().collate(range(7), 0), {})[0].backward()
        makes.append("aten::embedding_dense_backward" in operations.names)
    assert makes == [False, True]


@pytest.mark.parametrize("family", ["qwen3 tied", "gpt2", "opt"])
def test_real_families_train_the_same_with_it_and_without(family, monkeypatch):
    batch, found = rows().collate(range(7), 0), []
    for share in (True, False):
        model = build(family)
        if not share:
            monkeypatch.setattr(TiedGradient, "of", lambda _model: None)
        step = StudentStep(model, [Objective(name="cross_entropy")])
        assert (step.tied is not None) == share
        for _ in range(2):
            step(batch, {})[0].backward()
        found.append(gradients(model))
    assert_close(*found, tolerance=1e-6)
