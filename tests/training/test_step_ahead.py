"""multi_token: what a module beside the student is trained on, and what it leaves alone, against plain arithmetic."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from step_example import build, rows
from training_example import SGD, losses_of, stopped_after

from distill.config.recipe import load_recipe
from distill.config.training import Objective
from distill.errors import UserError
from distill.models.ahead import FILE, load_ahead
from distill.models.layers import rows_apart
from distill.models.load import load_model
from distill.training.step import StudentStep, state_objectives


def made(model, **options):
    objectives = [Objective(name="cross_entropy"), Objective(name="multi_token", weight=0.3, **options)]
    if options.get("frozen"):
        objectives = objectives[1:]
    return StudentStep(model, objectives, state_objectives(objectives, model, None, seed=5))


def by_hand(model, module, data, target):
    """The sum over rows of the loss of every completion token, one row at a time and no padding."""
    total = 0
    for i in range(len(data)):
        prompt, completion = data.row(i)
        ids = torch.tensor([[*prompt, *completion]]).long()
        heard = []
        hook = model.get_output_embeddings().register_forward_pre_hook(
            lambda _m, args, heard=heard: heard.append(args[0])
        )
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits[0]
        hook.remove()
        states, embed = heard[0], model.get_input_embeddings()(ids[:, :-1])
        before = torch.cat([torch.zeros_like(states[:, :1]), states[:, :-1]], 1)
        logs = model.get_output_embeddings()(module(before, embed, use_cache=False))[0].log_softmax(-1)
        kept = slice(len(prompt) - 1, None)
        if target == "tokens":
            total = total - logs[kept].gather(1, ids[0, 1:][kept][:, None]).sum()
        else:
            p = logits[kept].detach().log_softmax(-1)
            total = total + (p.exp() * (p - logs[kept])).sum()
    return total


@pytest.mark.parametrize("target", ["tokens", "model"])
@pytest.mark.parametrize("packed", [False, True])
def test_the_loss_is_that_of_rows_alone(target, packed):
    model, data = build("qwen3 tied"), rows(n=5)
    step = made(model, target=target)
    batch = data.pack(np.arange(5)) if packed else data.collate(np.arange(5), 0)
    if packed:
        from distill.models.layers import attend_by_row

        assert attend_by_row(model)
        step = made(model, target=target)
    with rows_apart(batch.rows):
        total, sums = step(batch, {})
        total.backward()
    found = {n: p.grad.clone() for n, p in step.named_parameters() if p.grad is not None}
    step.zero_grad()
    expected = by_hand(model, step.states[0].module, data, target)
    assert sums[1].item() == pytest.approx(expected.item(), rel=1e-4)
    batch_loss, _ = StudentStep(model, [Objective(name="cross_entropy")])(data.collate(np.arange(5), 0), {})
    (batch_loss + 0.3 * expected).backward()
    for name, parameter in step.named_parameters():
        if parameter.grad is not None and parameter.grad.abs().max() > 0:
            torch.testing.assert_close(found[name], parameter.grad, rtol=2e-3, atol=2e-4)
    assert any("eh_proj" in name and grad.any() for name, grad in found.items())


def test_frozen_nothing_of_the_student_moves():
    model = build("qwen3 tied")
    step = made(model, target="model", frozen=True)
    total, _ = step(rows(n=4).collate(np.arange(4), 0), {})
    total.backward()
    moved = {name for name, p in step.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved and all(name.startswith("states.0.module.") for name in moved)


def test_the_module_is_left_beside_the_student_and_a_resume_goes_on_with_it(trained, monkeypatch, hub):
    options = [
        "train.objectives=[{name: multi_token, target: model, frozen: true}]",
        *SGD,
        "student.adapter=full",
    ]
    whole, whole_dir = trained("whole", *options)
    stopped_after(3, monkeypatch, lambda: trained("stopped", *options))
    _, run_dir = trained("stopped", *options)
    assert losses_of(run_dir) == losses_of(whole_dir)
    kept = [load_file(folder / "student" / FILE) for folder in (whole_dir, run_dir)]
    assert all(torch.equal(kept[0][name], kept[1][name]) for name in kept[0])
    before = load_model(hub["llama"], "fp32").state_dict()
    assert all(torch.equal(weight, before[name]) for name, weight in whole.items())
    ahead = load_ahead(str(whole_dir / "student"), load_model(str(whole_dir / "student"), "fp32"))
    assert torch.equal(ahead.eh_proj.weight, kept[0]["eh_proj.weight"])
    manifest = json.loads((whole_dir / "student" / "manifest.json").read_text())
    assert FILE in manifest["files"] and manifest["counts"]["parameters_trainable"] == 0


def test_what_has_nothing_to_train_is_refused(make_recipe):
    path, _ = make_recipe()
    both = "[{name: cross_entropy}, {name: multi_token, frozen: true}]"
    with pytest.raises(UserError, match="trains its module alone"):
        load_recipe(path, [f"train.objectives={both}"])
