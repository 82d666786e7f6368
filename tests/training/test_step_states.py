"""Every objective of the table trains through the command's own path, and equals its formula on whole models."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from launching import LAUNCH, processes_of, run
from torch.utils.flop_counter import FlopCounterMode
from training_example import SGD, assert_same, fake_dataset, losses_of, stopped_after, stored

from distill.config.recipe import load_recipe
from distill.config.section import OBJECTIVES
from distill.config.training import Objective
from distill.data.batches import TokenRows
from distill.errors import UserError
from distill.models.load import load_model
from distill.storage import read_json
from distill.training.arms import body_flops
from distill.training.live_teachers import FrozenTeacher
from distill.training.losses.hidden import hidden_mse
from distill.training.losses.routers import router_distillation
from distill.training.step import StudentStep, state_objectives


def build(hub, student: str, objectives: list[Objective], teacher: str = "qwen3_moe"):
    model, live = (
        load_model(hub[student], "fp32", training=True),
        FrozenTeacher(load_model(hub[teacher], "fp32")),
    )
    states = state_objectives(objectives, model, live, 0)
    return StudentStep(model.train(), objectives, states), live


def test_hidden_states_equal_output_hidden_states(hub):
    objectives = [Objective(name="hidden_mse", weight=0.5, normalise=False, layers="uniform")]
    step, teacher = build(hub, "llama", objectives)
    batch = stored(4).collate(np.arange(4), 0)
    total, sums = step(batch, teacher(batch))
    with torch.no_grad():
        mine = step.model(**batch.inputs(), output_hidden_states=True).hidden_states
        theirs = teacher.model(**batch.inputs(), output_hidden_states=True).hidden_states
        # Of two layers the first; the last entry is after the final norm, a state is before it.
        first = hidden_mse(mine[1][batch.keep], theirs[1][batch.keep], normalise=False).sum()
    only = [Objective(name="hidden_mse", normalise=False, layers=[[0, 0]])]
    one, teacher_one = build(hub, "llama", only)
    assert one(batch, teacher_one(batch))[0].item() == pytest.approx(first.item(), rel=1e-5)
    assert total.item() == pytest.approx(0.5 * sums[0].item(), rel=1e-6)
    total.backward()
    assert step.model.model.layers[0].mlp.down_proj.weight.grad.abs().sum() > 0


def test_the_order_of_a_mixture_is_the_recipes(hub):
    """A state objective between two on logits: sums come back in the recipe's order."""
    names = ["cross_entropy", "hidden_cosine", "forward_kl"]
    step, teacher = build(hub, "llama", [Objective(name=name) for name in names])
    batch = stored(4).collate(np.arange(4), 0)
    total, sums = step(batch, teacher(batch))
    for i, name in enumerate(names):
        alone, its_teacher = build(hub, "llama", [Objective(name=name)])
        assert alone(batch, its_teacher(batch))[1].item() == pytest.approx(sums[i].item(), rel=1e-5)
    assert total.item() == pytest.approx(sums.sum().item(), rel=1e-5)


def test_routers_that_agree_cost_nothing(hub):
    step, teacher = build(hub, "qwen3_moe", [Objective(name="router_distillation")])
    batch = stored(4).collate(np.arange(4), 0)
    assert abs(step(batch, teacher(batch))[0].item()) < 1e-5
    with torch.no_grad():
        step.model.model.layers[0].mlp.gate.weight.mul_(-3)
    total, _ = step(batch, teacher(batch))
    with torch.no_grad():
        mine, theirs = (
            m(**batch.inputs(), output_router_logits=True).router_logits for m in (step.model, teacher.model)
        )
    kept = batch.keep.reshape(-1)
    layers = [float(router_distillation(m[kept], t[kept]).sum()) for m, t in zip(mine, theirs)]
    assert len(layers) == 2 and total.item() == pytest.approx(sum(layers) / 2, rel=1e-4), (
        "the mean of its layers"
    )
    total.backward()
    assert total.item() > 0.1 and step.model.model.layers[0].mlp.gate.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "objective, student, teacher",
    [
        ("ranking_hinge", "llama", "qwen3_moe"),
        ("ranking_logistic", "llama", "qwen3_moe"),
        ("uld", "llama", "other_vocabulary"),
        ("hidden_cosine", "llama", "qwen3_moe"),
        ("hidden_mse", "qwen3_moe", "llama"),
        ("router_distillation", "qwen3_moe", "qwen3_moe"),
        ("sequence_balance", "qwen3_moe", "llama"),
        ("batch_balance", "qwen3_moe", "llama"),
    ],
)
def test_every_objective_trains_and_does_not_depend_on_the_split(trained, objective, student, teacher):
    options = [f"train.objectives=[{{name: cross_entropy, weight: 0.5}}, {{name: {objective}}}]", *SGD]
    pair = {"student": student, "teacher": teacher}
    whole, run_dir = trained("whole", *options, "train.micro_batch_size=6", **pair)
    split, split_dir = trained("split", *options, "train.micro_batch_size=2", **pair)
    assert_same(whole, split, 5e-6)
    assert losses_of(run_dir) == pytest.approx(losses_of(split_dir), abs=5e-6)
    lines = (run_dir / "student" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["objectives"][objective] > 0


def test_a_projection_trains_resumes_and_stays_behind(trained, hub, monkeypatch, tmp_path):
    """A wider teacher: the learned map is part of the saved state, and not of the student's folder."""
    from conftest import CHATML, byte_tokenizer, save_model

    wide = save_model(
        tmp_path / "wide", {"model_type": "llama", "hidden_size": 48}, byte_tokenizer(CHATML), seed=5
    )
    options = ["train.objectives=[{name: hidden_mse}, {name: cross_entropy}]", "control.enabled=false"]
    whole, whole_dir = trained("whole", *options, teacher=wide)
    stopped_after(5, monkeypatch, lambda: trained("stopped", *options, teacher=wide))
    resumed, run_dir = trained("stopped", *options, teacher=wide)
    assert losses_of(run_dir) == losses_of(whole_dir)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert not any("maps" in name for name in whole)


BALANCE = "train.objectives=[{name: cross_entropy}, {name: batch_balance, weight: 0.1}]"


def test_a_pass_that_counts_a_step_is_in_the_flops(trained, monkeypatch):
    """8 x 1 reads every token once more than 1 x 8, through the body alone; over a resume too."""
    found = {}
    for name, size in (("whole", 6), ("split", 2), ("stopped", 2)):
        options = [BALANCE, *SGD, f"train.micro_batch_size={size}", "train.checkpoint_every=1"]
        start = lambda n=name, o=options: trained(n, *o, student="qwen3_moe")  # noqa: E731
        if name == "stopped":
            stopped_after(7, monkeypatch, start)
        found[name] = read_json(start()[1] / "student" / "manifest.json")
    read = found["whole"]["counts"]["tokens_read"]
    assert [found[n]["counts"]["tokens_counted"] for n in ("whole", "split", "stopped")] == [0, read, read]
    assert found["split"]["flops"] == found["stopped"]["flops"]
    # Of full training's three forward passes a token; this model's head is its smaller part.
    more = (found["split"]["flops"] - found["whole"]["flops"]) / (found["whole"]["flops"] / 3)
    assert 0.5 < more < 1


def test_the_body_is_counted_as_torch_counts_it(hub):
    """Anchor: FlopCounterMode on the counting pass itself, experts one by one, where it sees every product."""
    step, _ = build(hub, "qwen3_moe", [Objective(name="batch_balance")])
    for part in ("attn", "experts"):
        getattr(step.model, f"set_{part}_implementation")("eager")
    rows = TokenRows([[5, 6, 7]] * 4, [[8, 9, 10, 11, 1]] * 4)  # no padding: 7 tokens are read of each
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        step(rows.collate(np.arange(4), 0), {}, counting=True)
    student = SimpleNamespace(model=step.model, base=step.model)
    assert counter.get_total_flops() == pytest.approx(4 * 7 * body_flops(student, context=7), rel=1e-3)


@pytest.mark.slow
def test_two_processes_give_the_same_hidden_loss(trained, make_recipe, hub):
    options = ["train.objectives=[{name: hidden_mse}, {name: batch_balance, weight: 0.1}]", *SGD]
    pair = {"student": "qwen3_moe", "teacher": "qwen3_moe"}
    _, one = trained("one", *options, **pair)
    path, two = make_recipe(name="two", **pair)
    fake_dataset(two)
    run([*LAUNCH, "train", path, *options])
    assert processes_of(two / "student") == 2
    assert losses_of(two) == pytest.approx(losses_of(one), abs=1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        (["train.objectives=[{name: sequence_balance}]"], "this one is dense"),
        (["train.objectives=[{name: router_distillation}]"], "this one is dense"),
        (["train.objectives=[{name: hidden_mse, layers: [[0, 7]]}]"], r"\[0, 7\] is not there"),
        (
            ["train.objectives=[{name: hidden_mse}]", "train.teachers={own_start: true}"],
            "compares one student with one teacher",
        ),
    ],
)
def test_what_cannot_be_heard_is_refused(trained, options, message):
    with pytest.raises(UserError, match=message):
        trained("refused", *options)


@pytest.mark.parametrize(
    "objectives, message",
    [
        ("[{name: uld}, {name: forward_kl}]", "forward_kl means nothing"),
        ("[{name: hidden_mse, layers: middle}]", "must be uniform or last, or pairs"),
        ("[{name: ranking_hinge, top: 1}]", "must be at least 2"),
        ("[{name: ranking_hinge, top: 2.5}]", "must be a whole number"),
    ],
)
def test_options_are_bounded(make_recipe, objectives, message):
    path, _ = make_recipe()
    with pytest.raises(UserError, match=message):
        load_recipe(path, [f"train.objectives={objectives}"])


def test_the_table_names_functions_that_exist():
    from distill.training import losses
    from distill.training import step as state_objectives
    from distill.training.losses import routers as router_losses

    for name, objective in OBJECTIVES.items():
        if objective.signal in ("hidden", "routers", "own_routers", "ahead"):
            assert objective.signal in state_objectives._KINDS
            if objective.signal == "own_routers":
                assert callable(getattr(router_losses, name))
        else:
            assert callable(getattr(losses, name))
