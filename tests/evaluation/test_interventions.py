"""Sweeps of changed routing: the right change around the right answers, compared, corrected, resumed."""

import json
from collections import Counter

import pytest
import routing_reference as reference
import torch
from transformers import AutoModelForCausalLM

from distill.config.data import Prompts
from distill.config.evaluation import Evaluate, Interventions
from distill.data.prompts import held_out
from distill.errors import UserError
from distill.evaluation import measure
from distill.evaluation.interventions import (
    accuracy_against_flops,
    check_interventions,
    intervention_sweep,
    interventions_for,
    parse_drop,
)
from distill.evaluation.stats import holm, paired_comparison
from distill.evaluation.usage import usage_cost
from distill.models.describe import describe_config, describe_model
from distill.models.load import load_model, load_tokenizer
from distill.moe.interventions import drop_experts, route, use_top_k
from distill.moe.recording import record_routing
from distill.storage import read_json

IDS = torch.arange(40).reshape(2, 20)


@pytest.fixture(scope="module")
def model():
    return reference.build("mixtral")


def row(verdict: str, level: str) -> dict:
    return {
        "verdict": verdict,
        "level": level,
        "sample_idx": 0,
        "final": "1",
        "tokens": 3,
        "thinking_tokens": 0,
    }


def seen_by(model) -> list:
    with torch.no_grad(), record_routing(model) as recording:
        model(input_ids=IDS)
    return [(r.indices.shape[1], r.indices.tolist(), r.weights.tolist()) for r in recording.layers.values()]


def test_each_answer_is_given_under_its_own_change(model):
    seen = []

    def answer():
        seen.append(seen_by(model))
        return [row("correct", "easy")]

    entries = intervention_sweep(
        model, answer, top_k=[1, 2, 4], drop=["1:3", "0:1+1:2"], route=["random", "uniform"], seed=5
    )
    expected = [seen_by(model)]
    for change in (
        use_top_k(model, 1),
        use_top_k(model, 4),
        drop_experts(model, {1: [3]}),
        drop_experts(model, {0: [1], 1: [2]}),
        route(model, "random", 5),
        route(model, "uniform"),
    ):
        with change:
            expected.append(seen_by(model))
    assert seen == expected
    assert [(e["kind"], e["value"], e["experts_per_token"]) for e in entries] == [
        ("none", None, 2), ("top_k", 1, 1), ("top_k", 4, 4), ("drop", "1:3", 2), ("drop", "0:1+1:2", 2),
        ("route", "random", 2), ("route", "uniform", 2),
    ]  # fmt: skip
    json.dumps(entries)


def test_every_expert_of_every_layer_once(model):
    missing = Counter()

    def answer():
        for layer, (_, indices, _) in enumerate(seen_by(model)):
            missing.update((layer, e) for e in range(8) if not any(e in chosen for chosen in indices))
        return [row("correct", "easy")]

    entries = intervention_sweep(model, answer, drop_each=True)
    assert [e["label"] for e in entries[1:]] == [f"without {layer}:{e}" for layer in (0, 1) for e in range(8)]
    unused = Counter()
    for layer, (_, indices, _) in enumerate(seen_by(model)):
        unused.update((layer, e) for e in range(8) if not any(e in chosen for chosen in indices))
    assert all(missing[layer, e] >= 1 for layer in (0, 1) for e in range(8))
    assert not unused  # so each was missing because it was dropped


def test_comparisons_are_about_the_change_and_corrected_over_the_sweep(model):
    base = ["correct"] * 50 + ["wrong"] * 10
    answers = {1: ["correct"] * 20 + ["wrong"] * 40, 3: ["correct"] * 44 + ["wrong"] * 16, 4: base}
    queue = [base, *answers.values()]

    def answer():
        return [row(v, "easy" if i < 30 else "hard") for i, v in enumerate(queue.pop(0))]

    first, *rest = intervention_sweep(model, answer, top_k=answers)
    assert first["comparison"] is None
    assert (first["tasks"]["easy"]["accuracy"], first["tasks"]["hard"]["accuracy"]) == (1.0, 20 / 30)
    assert rest[0]["tasks"]["hard"]["n"] == 30 and rest[0]["tasks"]["hard"]["accuracy"] == 0
    right = [[v == "correct" for v in given] for given in (*answers.values(), base)]
    plain = [paired_comparison(given, right[-1]) for given in right[:-1]]
    for entry, want, corrected in zip(rest, plain, holm([p["p_value"] for p in plain])):
        for key in ("n", "difference", "ci95", "p_value"):
            assert entry["comparison"][key] == want[key]
        assert entry["comparison"]["p_value_holm"] == corrected
    assert [e["comparison"]["verdict"] for e in rest] == ["WORSE", "INCONCLUSIVE", "INCONCLUSIVE"]
    assert plain[1]["verdict"] == "WORSE", "6 of 60 are lost, p = 0.03: a verdict alone, none among three"
    assert rest[0]["comparison"]["difference"] == -0.5


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "dbrx", "gemma4"])
def test_flops_are_those_of_a_model_built_with_that_k(family, monkeypatch):
    model = reference.build(family)
    fields = ("num_experts_per_tok", "top_k_experts")
    monkeypatch.setattr(reference, "SMALL", reference.SMALL | dict.fromkeys(fields, 3))
    monkeypatch.setitem(reference.OVERRIDES["dbrx"]["ffn_config"], "moe_top_k", 3)
    other = describe_model(reference.build(family), 64)
    found = describe_model(model, 64, experts_per_token=3)
    assert found == other and found["flops_per_token"] > describe_model(model, 64)["flops_per_token"]


def test_curve_goes_by_cost_and_leaves_the_controls_out(model):
    verdicts = iter(["correct", "wrong", "correct", "wrong"])
    entries = intervention_sweep(
        model, lambda: [row(next(verdicts), "easy")], top_k=[4, 1], route=["random"], context=64
    )
    curve = accuracy_against_flops(entries)["easy"]
    assert [(p["experts_per_token"], p["accuracy"]) for p in curve] == [(1, 1.0), (2, 1.0), (4, 0.0)]
    one, two, four = (p["flops_per_token"] for p in curve)
    expert = 2 * 3 * 32 * 32  # FLOPs of the three 32 x 32 matrices, in two layers
    assert (two - one, four - two) == (2 * expert, 4 * expert)
    assert two == describe_config(model.config, 64)["flops_per_token"]
    assert accuracy_against_flops([]) == {}


def test_what_was_answered_is_not_answered_again(model):
    kept, asked = {}, []

    def dies():
        if len(asked) == 2:
            raise OSError
        asked.append(None)
        return [row("correct", "easy")] * len(asked)

    with pytest.raises(OSError):
        intervention_sweep(model, dies, top_k=[1, 3], on_entry=kept.__setitem__)
    assert list(kept) == ["unchanged", "top-k 1"]
    kept["top-k 1"] = kept["unchanged"]
    asked.clear()
    entries = intervention_sweep(model, dies, top_k=[1, 3], done=kept)
    assert len(asked) == 1 and len(entries) == 3


def test_impossible_changes_are_told_before_the_first_answer(model):
    with pytest.raises(UserError) as caught:
        intervention_sweep(model, lambda: pytest.fail("answered"), top_k=[9], drop=["7:1"], route=["up"])
    text = "\n".join(caught.value.problems)
    assert "top-k 9 is not possible" in text and "layer 7 routes nothing" in text and "route='up'" in text


def test_drops_are_parsed():
    assert parse_drop("1:3") == {"1": [3]}
    assert parse_drop("1:3+1:0+model.layers.2.mlp:7") == {"1": [3, 0], "model.layers.2.mlp": [7]}
    for wrong in ("1", ":3", "1:", "1:x", "1:3+", "1:-2"):
        with pytest.raises(UserError, match="LAYER:EXPERT"):
            parse_drop(wrong)
        with pytest.raises(ValueError, match="LAYER:EXPERT"):
            Interventions(drop=[wrong])


# ---------------------------------------------------------------------- in an evaluation


def test_sweep_of_a_checkpoint_resumes_and_takes_the_first_problems(hub, tmp_path):
    model, tokenizer = load_model(hub["qwen3_moe"]), load_tokenizer(hub["qwen3_moe"])
    section = Evaluate(
        levels={"easy": 5, "hard": 5},
        max_new_tokens=4,
        interventions=Interventions(top_k=[1], drop=["0:1"], route=["shuffled"], problems=3),
    )
    problems = held_out(section, Prompts(), seed=0)
    kept = tmp_path / "kept.jsonl"
    entries = interventions_for(model, tokenizer, problems, section, kept)
    assert [e["label"] for e in entries] == ["unchanged", "top-k 1", "without 0:1", "shuffled routing"]
    assert {level: score["n"] for level, score in entries[0]["tasks"].items()} == {"easy": 3, "hard": 3}
    lines = [line for line in kept.read_text().splitlines() if line]  # each begins on a line of its own
    assert len(lines) == 4
    kept.write_text("\n".join(lines[:2]) + "\n" + lines[2][:30])  # killed while it wrote
    again = interventions_for(model, tokenizer, problems, section, kept)
    assert all(entry.pop("decode_tokens_per_second") > 0 for entry in [*entries, *again])
    assert again == entries
    assert interventions_for(model, tokenizer, problems, Evaluate()) == []
    dense = load_model(hub["llama"])
    (skipped,) = interventions_for(dense, tokenizer, problems, section)
    assert skipped["kind"] == "skipped" and "dense" in skipped["label"]


def test_dense_models_alone_are_refused_from_the_config(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    asked = Interventions(top_k=[1])
    check_interventions([hub["llama"], hub["qwen3_moe"]], asked)
    check_interventions([hub["llama"]], Interventions())
    with pytest.raises(UserError, match="is a dense model"):
        check_interventions([hub["llama"]], asked)
    with pytest.raises(UserError, match="are dense models"):
        check_interventions([hub["llama"], hub["plain"]], asked)
    with pytest.raises(UserError, match=r"qwen3-moe: .*top-k 5 is not possible"):
        check_interventions([hub["llama"], hub["qwen3_moe"]], Interventions(top_k=[5]))


def test_command_line_measures_the_mixture_and_notes_the_dense_model(hub, tmp_path, run_cli, monkeypatch):
    # Neither timings nor pages are looked at here, and they take most of the time.
    monkeypatch.setattr(measure, "usage_cost", lambda *given: usage_cost(*given[:-1], False))
    monkeypatch.setattr("distill.report.dossier.build_dossier", lambda out, *_: out)
    monkeypatch.setattr("distill.devices.pick_device", lambda **_: torch.device("cpu"))  # one thread, as set
    out = tmp_path / "eval"
    command = ["evaluate", hub["qwen3_moe"], hub["llama"], "--tasks", "easy", "--problems", "4"]
    command += ["--max-new-tokens", "4", "--out", out]
    code, _, err = run_cli(*command, "--top-k", "1,2,4", "--drop-expert", "0:1,0:1+1:2", "--route", "random")
    assert code == 0, err
    models = read_json(out / "metrics.json")["models"]
    labels = ["unchanged", "top-k 1", "top-k 4", "without 0:1", "without 0:1+1:2", "random routing"]
    assert [e["label"] for e in models["qwen3-moe"]["interventions"]] == labels
    assert [e["kind"] for e in models["llama"]["interventions"]] == ["skipped"]
    assert not list(out.glob("*.jsonl"))

    code, _, err = run_cli("evaluate", hub["llama"], "--top-k", "1", "--out", tmp_path / "other")
    assert code == 2 and "dense model" in err and "Traceback" not in err
    for option, word in {"--top-k": "0", "--drop-expert": "3", "--route": "sideways"}.items():
        code, _, err = run_cli(*command, option, word)
        assert code == 2 and "interventions" in err and "Traceback" not in err, (option, err)
