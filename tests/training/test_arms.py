"""Student and control arm against numbers worked out here: whose rows, whose objectives, whose FLOPs."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from training_example import fake_dataset
from transformers import AutoModelForCausalLM

import distill.training.arms as module
from distill.config.recipe import load_recipe
from distill.data.batches import TokenRows
from distill.models.describe import describe_model
from distill.models.student import build_student
from distill.storage import read_json, write_json
from distill.training import live_teachers
from distill.training.arms import train_arms, training_flops

# Six rows and steps of six rows, at a rate of nearly 0: every line of metrics.jsonl is about all rows.
STILL = ["train.batch_size=6", "train.micro_batch_size=4", "train.learning_rate=1e-12", "train.steps=2"]
TEACHER = "train.objectives=[{name: forward_kl, weight: 0.5}, {name: cross_entropy}]"


def lines_of(run_dir, arm: str) -> list[dict]:
    return [json.loads(line) for line in (run_dir / arm / "metrics.jsonl").read_text().splitlines()]


def mean_nll(folder: str, rows: TokenRows) -> float:
    """Cross-entropy over all completion tokens, one row at a time, without the collator."""
    model, total = AutoModelForCausalLM.from_pretrained(folder), 0.0
    for prompt, completion in map(rows.row, range(len(rows))):
        with torch.no_grad():
            logs = model(torch.tensor([[*prompt, *completion]])).logits[0].double().log_softmax(-1)
        total -= sum(float(logs[len(prompt) - 1 + i, int(t)]) for i, t in enumerate(completion))
    return total / int(rows.completion_lengths.sum())


def both(make_recipe, *options: str, student: str = "llama", name: str = "arms"):
    """Trains both arms; returns the run's folder and the rows of each."""
    path, run_dir = make_recipe("qwen3_moe", student, name)
    fake_dataset(run_dir, rows=6, seed=3)
    train_arms(load_recipe(path, [*STILL, *options]), say=lambda _: None)
    return run_dir, *(TokenRows.from_folder(run_dir / "dataset" / part) for part in ("", "control"))


def test_each_arm_trains_on_its_own_rows(make_recipe, hub):
    run_dir, ours, plain = both(make_recipe, "train.objectives=[{name: cross_entropy}]")
    tokens = [int(rows.completion_lengths.sum()) for rows in (ours, plain)]
    assert tokens[0] > 2 * tokens[1], "the example gives the arms different rows, or nothing is tried"
    for arm, rows, count in zip(("student", "control"), (ours, plain), tokens):
        counts = read_json(run_dir / arm / "manifest.json")["counts"]
        losses = [line["loss"] for line in lines_of(run_dir, arm)]
        assert read_json(run_dir / arm / "manifest.json")["final_loss"] == pytest.approx(
            np.mean(losses), abs=1e-5
        )
        assert counts["tokens"] == 2 * count and counts["tokens_read"] == 2 * int(rows.lengths.sum())
        assert lines_of(run_dir, arm)[0]["loss"] == pytest.approx(mean_nll(hub["llama"], rows), abs=1e-5)


def test_the_control_arm_has_no_teacher(make_recipe, hub, monkeypatch):
    """Its loss is the cross-entropy of the answers alone, and no teacher is loaded for it."""
    real, asked = module.live_teachers, []
    monkeypatch.setattr(module, "live_teachers", lambda *a: (asked.append(1), real(*a))[1])
    run_dir, _, plain = both(make_recipe, TEACHER)
    (first, second) = lines_of(run_dir, "control")
    assert set(first["objectives"]) == set(second["objectives"]) == {"cross_entropy"}
    assert (
        first["loss"]
        == first["objectives"]["cross_entropy"]
        == pytest.approx(mean_nll(hub["llama"], plain), abs=1e-5)
    )
    assert set(lines_of(run_dir, "student")[0]["objectives"]) == {"forward_kl", "cross_entropy"}
    assert len(asked) == 1
    manifest = read_json(run_dir / "control" / "manifest.json")
    assert manifest["terms"] is None and manifest["config"]["teacher"] is None
    dataset = run_dir / "dataset" / "manifest.json"
    assert read_json(run_dir / "student" / "manifest.json")["terms"] is None
    write_json(dataset, read_json(dataset) | {"terms": {"answer": "yes"}, "fingerprint": "another"})
    monkeypatch.setattr(module, "student_card", lambda *_: "")
    train_arms(load_recipe(f"{run_dir}.yaml", [*STILL, TEACHER]), redo=True, say=lambda _: None)
    terms = {arm: read_json(run_dir / arm / "manifest.json")["terms"] for arm in ("student", "control")}
    assert terms == {"student": {"answer": "yes"}, "control": None}, "its targets are nobody's output"


def test_what_the_student_writes_or_several_teachers_say_is_not_the_control_s(make_recipe, hub):
    rows = "train.on_policy={fraction: 1.0, buffer_steps: 2, max_new_tokens: 4, most_truncated: 1.0}"
    run_dir, _, plain = both(make_recipe, "train.objectives=[{name: reverse_kl}]", rows)
    assert [line.get("on_policy") for line in lines_of(run_dir, "control")] == [None, None]
    assert all(line["on_policy"]["sampled"] == 12 for line in lines_of(run_dir, "student"))
    assert lines_of(run_dir, "control")[0]["tokens"] == plain.completion_lengths.sum()
    teachers = f"train.teachers={{by: level, models: {{easy: {hub['llama']}}}}}"
    run_dir, *_ = both(make_recipe, "train.objectives=[{name: forward_kl}]", teachers, name="several")
    config = read_json(run_dir / "control" / "manifest.json")["config"]["train"]
    assert config["teachers"]["models"] == {} and [o["name"] for o in config["objectives"]] == [
        "cross_entropy"
    ]


def test_objectives_on_the_students_own_routers_stay(make_recipe):
    """They need no teacher: a control of a mixture is kept balanced as the student is."""
    objectives = "train.objectives=[{name: sequence_balance, weight: 0.1}, {name: forward_kl}]"
    run_dir, *_ = both(make_recipe, objectives, student="qwen3_moe")
    line = lines_of(run_dir, "control")[0]
    assert set(line["objectives"]) == {"cross_entropy", "sequence_balance"}
    expected = line["objectives"]["cross_entropy"] + 0.1 * line["objectives"]["sequence_balance"]
    assert line["loss"] == pytest.approx(expected) and line["objectives"]["sequence_balance"] > 1


def test_training_flops_are_three_passes_of_the_student_and_one_of_the_teacher(monkeypatch):
    """Kaplan et al. 2020: forward 1, backward 2; frozen weights leave 2 and the adapter's 6 a parameter."""
    contexts = []

    def described(model, context, k=None):
        contexts.append(context)
        return {"flops_per_token": {"student": 1000, "small teacher": 10, "large teacher": 40}[model]}

    monkeypatch.setattr(module, "describe_model", described)
    monkeypatch.setattr(live_teachers, "describe_model", described)
    student = SimpleNamespace(model="student")
    one, two = (live_teachers.RoutedTeachers({}, None) for _ in range(2))
    kinds = {one: ["small teacher"], two: ["small teacher", "large teacher"]}
    monkeypatch.setattr(live_teachers.RoutedTeachers, "models", property(kinds.get))
    full = {"rows": 5, "tokens_read": 120, "parameters_trainable": 70, "parameters_total": 70}
    adapter = {**full, "parameters_trainable": 7}
    assert training_flops(student, None, full) == 120 * 3000
    assert training_flops(student, one, full) == 120 * (3000 + 10)
    assert training_flops(student, two, full) == 120 * (3000 + 25)
    assert training_flops(student, None, adapter) == 120 * (2000 + 6 * 7)
    assert training_flops(student, one, adapter) == 120 * (2000 + 6 * 7 + 10)
    assert set(contexts) == {12}, "a token sees half of its row's 24 tokens on average"
    training_flops(student, None, {**full, "rows": 1000})
    assert contexts[-1] == 1


def test_a_manifest_says_the_mean_of_the_last_losses_and_all_parameters(make_recipe):
    run_dir, *_ = both(make_recipe, "train.steps=25", "train.learning_rate=0.01", "control.enabled=false")
    manifest = read_json(run_dir / "student" / "manifest.json")
    losses = [line["loss"] for line in lines_of(run_dir, "student")]
    assert (
        manifest["final_loss"]
        == pytest.approx(np.mean(losses[5:]), abs=1e-5)
        != pytest.approx(np.mean(losses), abs=1e-3)
    )
    counts = manifest["counts"]
    adapted = build_student(load_recipe(f"{run_dir}.yaml").student, "fp32", torch.device("cpu"), 0)
    per_token = describe_model(adapted.model, counts["tokens_read"] // (2 * counts["rows"]))[
        "flops_per_token"
    ]
    expected = counts["tokens_read"] * (2 * per_token + 6 * counts["parameters_trainable"])
    assert manifest["flops"] == pytest.approx(expected, rel=1e-6), "prompts are read too"
    assert 0 < counts["parameters_trainable"] < counts["parameters_total"] / 5
