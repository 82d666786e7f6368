"""What 16 bits do not see of small updates: foretold from the weights, and measured on a training that loses it."""

import json
from pathlib import Path

import pytest
import torch
from conftest import CHATML, byte_tokenizer, save_model
from step_example import build, rows
from torch import nn
from transformers import AutoModelForCausalLM

from distill.config.training import Lora, Objective, Train
from distill.models.precision import _outputs, _pushes, lost_steps, matrices, spacing, stored_matrices, unseen
from distill.models.student import add_lora
from distill.training.step import StudentStep
from distill.training.train import make_optimizer

LOWS = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def stored_in(model: nn.Module, low: torch.dtype = torch.bfloat16) -> nn.Module:
    """The same model with every weight a number of `low`, kept in float32."""
    return model.to(low).float()


@pytest.mark.parametrize("low", LOWS)
def test_spacing_is_the_distance_to_the_next_number(low):
    numbers = torch.tensor([1.0, 1.5, 0.02, 3e-3, 100.0, -0.75, -0.02]).to(low)
    away = torch.where(numbers > 0, torch.inf, -torch.inf).to(low)
    expected = (torch.nextafter(numbers, away).double() - numbers.double()).abs()
    assert torch.equal(spacing(numbers, low).double(), expected)
    assert spacing(torch.zeros(1)).item() == 0


@pytest.mark.parametrize("rate", [1e-5, 1e-4, 1e-3])
def test_the_share_is_what_a_step_leaves_where_it_was(rate):
    model = stored_in(build("qwen3"))
    still, count = 0, 0
    for name, weights in model.named_parameters():
        if weights.ndim > 1 and "embed" not in name:  # looked up in float32
            moved = weights + rate * torch.sign(torch.randn_like(weights))
            still += int((moved.bfloat16() == weights.bfloat16()).sum())
            count += weights.numel()
    found = unseen(matrices(model), rate)
    assert found.share == pytest.approx(still / count, abs=0.01)
    assert (found.steps > 3) == (rate < 1e-4)


def test_weights_between_the_numbers_lose_nothing():
    train = Train(learning_rate=1e-5, steps=30)
    for model, says in ((build("qwen3"), False), (stored_in(build("qwen3")), True)):
        assert (lost_steps(train, torch.bfloat16, matrices(model)) is not None) == says
        assert lost_steps(train, None, matrices(model)) is None, "float32 sees everything"
    assert lost_steps(train.model_copy(update={"optimizer": "sgd"}), torch.bfloat16, matrices(model)) is None
    coarse = stored_in(build("qwen3"))
    assert unseen(matrices(coarse), 1e-5, torch.float16).share < unseen(matrices(coarse), 1e-5).share


def test_the_head_is_counted_where_it_is_cast():
    tied, own = stored_in(build("qwen3 tied")), stored_in(build("qwen3"))
    assert unseen(matrices(tied), 1e-5).groups.keys() == {"output head", "attention", "mlp"}
    assert unseen(matrices(own, head=False), 1e-5).groups.keys() == {"attention", "mlp"}


def progress(model: nn.Module, exact_head: bool, autocast: bool, steps: int = 4) -> tuple[float, float]:
    """(how far the loss fell in these steps as the training computes it, the same computed in float32)."""
    model.get_input_embeddings().requires_grad_(False)  # looked up in float32, where everything is seen
    step = StudentStep(model, [Objective(name="cross_entropy")], exact_head=exact_head)
    batch, train = rows().collate(range(7), 0), Train(learning_rate=1e-6, steps=30, warmup_steps=0)
    optimizer = make_optimizer(train, [p for p in model.parameters() if p.requires_grad])

    def loss(low: bool = autocast) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            return step(batch, {})[0] / len(batch.places)

    with torch.no_grad():
        before, exact = float(loss()), float(loss(False))
    for _ in range(steps):
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return before - float(loss()), exact - float(loss(False))


def test_small_updates_vanish_in_bf16_and_float32_sees_them():
    low, hidden = progress(stored_in(build("qwen3")), False, True)
    head, _ = progress(stored_in(build("qwen3")), True, True)
    exact, same = progress(stored_in(build("qwen3")), False, False)
    assert exact == same > 0
    assert hidden == pytest.approx(exact, rel=0.2), "the weights did move"
    assert low < 0.4 * exact, "and the loss does not see it, but for the norms"
    assert 1.5 * low < head < exact


def test_a_step_of_an_adapter_by_hand():
    """alpha / rank, or alpha / sqrt(rank); rank numbers of variance 1/3, all pushed one way."""
    sizes = torch.randn(4, 64, generator=torch.Generator().manual_seed(1)).abs().sum(0) / 3**0.5
    torch.testing.assert_close(_pushes(Lora(rank=4, alpha=8)), 2 * sizes)
    torch.testing.assert_close(_pushes(Lora(rank=4, alpha=8, rslora=True)), 4 * sizes)


def test_an_exact_head_multiplies_in_float32():
    model, batch = build("qwen3"), rows().collate(range(7), 0)
    losses = {}
    for exact in (False, True):
        step = StudentStep(model, [Objective(name="cross_entropy")], exact_head=exact)
        with torch.autocast("cpu", torch.bfloat16):
            losses[exact] = float(step(batch, {})[1][0])
            hidden = step.at(lambda states: states.detach(), **batch.inputs()).flatten(0, 1)[batch.places]
        assert ("float32" in step.head_form) == exact
    logits = hidden.double() @ model.lm_head.weight.detach().double().T
    expected = float(nn.functional.cross_entropy(logits, batch.targets, reduction="sum"))
    assert losses[True] == pytest.approx(expected, rel=1e-6)
    assert losses[False] != pytest.approx(expected, rel=1e-6)


def test_what_an_adapter_adds_is_lost_as_foretold():
    rate, lora = 1e-4, Lora(rank=4, alpha=8)
    model = add_lora(build("qwen3").bfloat16(), lora)
    found = unseen(matrices(model), rate, lora=lora)
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    before, lost = layer.base_layer.weight.detach(), []
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        for x in torch.randn(64, 1, 32):
            plain = nn.functional.linear(x.bfloat16(), before)
            b.copy_(
                rate * (x @ a.T).sign().expand_as(b)
            )  # as far as a step can push the outputs of this input
            with torch.autocast("cpu", torch.bfloat16):
                lost.append(float((layer(x) == plain).float().mean()))
    alone = unseen([("mlp", before, before.numel())], rate, lora=lora)
    assert alone.share == pytest.approx(sum(lost) / len(lost), abs=0.06) and 0.1 < alone.share < 0.9
    assert found.lora and "outputs" in found.text()
    assert _outputs(before).shape == (48, 64)


@pytest.fixture(scope="module")
def coarse(tmp_path_factory):
    """A folder with weights in bf16."""
    folder = tmp_path_factory.mktemp("coarse") / "llama"
    save_model(folder, {"model_type": "llama"}, byte_tokenizer(CHATML))
    AutoModelForCausalLM.from_pretrained(folder).bfloat16().save_pretrained(folder)
    return str(folder)


def test_files_say_what_the_loaded_model_says(coarse):
    model = AutoModelForCausalLM.from_pretrained(coarse, dtype=torch.float32)
    stored, loaded = unseen(stored_matrices(Path(coarse), model), 1e-5), unseen(matrices(model), 1e-5)
    assert (
        stored.share == pytest.approx(loaded.share, abs=0.02) and stored.groups.keys() == loaded.groups.keys()
    )
    sizes = [
        sorted(count for _, _, count in of) for of in (stored_matrices(Path(coarse), model), matrices(model))
    ]
    assert sizes[0] == sizes[1], "each stands for all of its numbers"


@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_doctor_says_so_and_what_helps(make_recipe, run_cli, coarse, adapter):
    path, _ = make_recipe(teacher="llama", student=coarse)
    keys = [f"student.adapter={adapter}", "train.learning_rate=1e-5", "train.precision=bf16"]
    for more, says in ((), True), (("train.precision=fp32",), False), (("train.learning_rate=0.1",), False):
        _, said, _ = run_cli("doctor", path, *keys, *more, "--json")
        found = [f for f in json.loads(said)["findings"] if "train.learning_rate" in f["text"]]
        assert bool(found) == says
        if found:
            assert found[0]["state"] == "WARN" and "train.precision=fp32" in found[0]["fix"]
            assert ("head_precision" in found[0]["fix"]) == (adapter == "full")
