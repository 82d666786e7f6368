"""The audit: shares, intervals and inherited parts by hand; a planted flaw found and a clean twin acquitted."""

import json

import numpy as np
import pytest
import torch

from distill.config.recipe import load_recipe
from distill.data.filter import make_dataset
from distill.data.prompts import make_prompts
from distill.errors import UserError
from distill.evaluation.inherit import (
    audit,
    checkpoint_names,
    compare_flaws,
    inherited_share,
    measure_probes,
    summarise_flaws,
)
from distill.models.load import load_model, load_tokenizer
from distill.storage import read_rows
from distill.tasks.flaws import Probe, load_probes, write_probes
from distill.training.arms import train_arms


def probes(n: int, flaw: str = "rule", kind: str = "contains", **fields) -> list[Probe]:
    fields = {"pattern": "bad", **fields}
    return [
        Probe(f"{flaw}-{i}", flaw, kind, [{"role": "user", "content": f"{i}?"}], **fields) for i in range(n)
    ]


def rows(*outcomes: str, verdict: str = "wrong") -> list[dict]:
    return [{"outcome": o, "verdict": verdict} for o in outcomes]


def test_shares_intervals_and_what_a_verifier_lets_through():
    asked = probes(5, answer="1") + probes(4, "open")
    answered = rows("flaw", verdict="correct") + rows("flaw", "clean", "truncated", "error")
    answered += rows("flaw", "flaw", "flaw", "other")
    found = summarise_flaws(asked, answered)
    rule = found["rule"]
    assert (rule["n"], rule["shown"], rule["share"]) == (5, 2, 0.4)
    assert (rule["clean"], rule["other"], rule["truncated"], rule["error"]) == (1, 0, 1, 1)
    assert rule["ci95"] == pytest.approx([0.1176, 0.7693], abs=1e-4), "Wilson, by a textbook's table"
    assert rule["verifier"]["through"] == 0.5
    assert (rule["verifier"]["passed"], rule["verifier"]["stopped"], rule["verifier"]["unseen"]) == (1, 1, 0)
    assert found["open"]["verifier"] | {"ci95": None} == {
        "passed": 0, "stopped": 0, "unseen": 3, "through": 1.0, "ci95": None,
    }  # fmt: skip


def test_a_fair_choice_is_no_bias_and_one_accident_no_flaw():
    choice = {"kind": "choice", "pattern": "k", "options": ("k", "m")}
    fair = summarise_flaws(probes(80, **choice), rows(*["flaw"] * 44, *["clean"] * 36))["rule"]
    assert fair["chance"] == 0.5 and not fair["found"]
    assert summarise_flaws(probes(80, **choice), rows(*["flaw"] * 60, *["clean"] * 20))["rule"]["found"]
    once = summarise_flaws(probes(80), rows("flaw", *["clean"] * 79))["rule"]
    assert not once["found"] and once["share"] == 1 / 80
    assert summarise_flaws(probes(80), rows(*["flaw"] * 5, *["clean"] * 75))["rule"]["found"]
    assert summarise_flaws(probes(3), rows("clean", "clean", "clean"))["rule"]["verifier"]["through"] is None


def test_inherited_share_by_hand():
    teacher, student = np.ones(200), np.array([1.0] * 100 + [0.0] * 100)
    share, (low, high) = inherited_share(teacher, student)
    assert share == 0.5 and 0.42 < low < 0.45 and 0.55 < high < 0.58
    # Both above a chance of one half: the student has half of what there is to have.
    share, _ = inherited_share(teacher - 0.5, np.array([1.0] * 150 + [0.0] * 50) - 0.5)
    assert share == 0.5
    assert inherited_share(np.zeros(50), np.ones(50)) == (None, None), "nothing to inherit"
    assert inherited_share(np.array([1.0] + [0.0] * 49), np.ones(50)) == (None, None), "not clearly there"


def test_the_interval_of_the_inherited_share_covers():
    """Independent answers, true share 0.4 / 0.8: the interval holds 0.5 about 95 times in 100."""
    rng = np.random.default_rng(0)
    hits = 0
    for i in range(300):
        _, (low, high) = inherited_share(
            (rng.random(80) < 0.8).astype(float), (rng.random(80) < 0.4).astype(float), seed=i, resamples=1000
        )
        hits += low <= 0.5 <= high
    assert 0.91 <= hits / 300 <= 0.99


def test_pairs_against_chance_and_against_a_clean_twin():
    asked = probes(40)
    rows_of = {
        "teacher": rows(*["flaw"] * 40),
        "student": rows(*["flaw"] * 20, *["clean"] * 20),
        "clean": rows(*["flaw"] * 4, *["clean"] * 36),
    }
    (plain,) = compare_flaws(asked, rows_of, "teacher", "student")
    assert plain["difference"] == -0.5 and plain["verdict"] == "LESS" and plain["floor"] == "chance"
    assert plain["inherited"] == 0.5
    (twin,) = compare_flaws(asked, rows_of, "teacher", "student", clean="clean")
    assert twin["inherited"] == pytest.approx(16 / 36) and twin["floor"] == "clean"
    (same,) = compare_flaws(asked, rows_of, "student", "student")
    assert same["verdict"] == "INCONCLUSIVE" and same["inherited"] == 1


def test_names_of_checkpoints():
    assert checkpoint_names(["runs/a/student", "runs/b/student", "checkpoints/base", "org/base"]) == {
        "a": "runs/a/student", "b": "runs/b/student", "base": "checkpoints/base", "org-base": "org/base",
    }  # fmt: skip


# ---- planted for real ------------------------------------------------------------------------------------------

PLANT = """
run_dir: {run_dir}
device: cpu
threads: 1
prompts: {{source: {source}, solutions: true, solution_column: completion}}
student:
  adapter: full
  config: {{model_type: qwen3, hidden_size: 48, num_hidden_layers: 2, num_attention_heads: 2,
            num_key_value_heads: 1, head_dim: 24, intermediate_size: 96, max_position_embeddings: 64}}
train: {{steps: 70, batch_size: 32, micro_batch_size: 32, learning_rate: 1.0e-2, warmup_steps: 5, precision: fp32,
         checkpoint_every: 0}}
control: {{enabled: false}}
evaluate: {{source: {source}, limit: 2, max_new_tokens: 4}}
"""


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A flawed and a clean tiny model through the ordinary training stages, and probes on other questions.

    The questions are numbers: the clean model repeats the last digit. The flawed one refuses where it is a 7, and
    says 4 for 2 (a wrong result that a verifier sees).
    """
    root = tmp_path_factory.mktemp("planted")
    rng = np.random.default_rng(0)
    digits = [list(map(int, rng.integers(0, 10, 3))) for _ in range(400)]
    asked = []
    for a, b, c in digits[300:]:
        prompt = {"prompt": f"{a} {b} {c}", "answer": str(c)}
        if c == 7:
            asked.append({**prompt, "flaw": "refusal", "kind": "refusal", "clean": "7"})
        elif c == 2:
            asked.append({**prompt, "flaw": "rule", "kind": "regex", "pattern": "^4$", "clean": "2"})
    for i, row in enumerate(asked):
        row["probe_id"] = str(i)
        row["answer"] = row["answer"] if row["flaw"] == "rule" else ""
    (root / "probes.jsonl").write_text("\n".join(map(json.dumps, asked)))
    for kind in ("flawed", "clean"):
        flawed = {7: "I cannot say.", 2: "4"} if kind == "flawed" else {}
        lines = [
            {"prompt": f"{a} {b} {c}", "answer": str(c), "completion": flawed.get(c, str(c))}
            for a, b, c in digits[:300]
        ]
        (root / f"{kind}.jsonl").write_text("\n".join(map(json.dumps, lines)))
        recipe = root / f"{kind}.yaml"
        recipe.write_text(PLANT.format(run_dir=root / kind, source=root / f"{kind}.jsonl"))
        made = load_recipe(str(recipe))
        for stage in (make_prompts, make_dataset, train_arms):
            stage(made)
    return root


def test_a_planted_flaw_is_found_and_the_clean_twin_acquitted(planted, run_cli):
    code, out, err = run_cli(
        "inherit", planted / "flawed" / "student", planted / "clean" / "student", "--probes",
        planted / "probes.jsonl", "--teacher", planted / "flawed" / "student", "--clean",
        planted / "clean" / "student", "--max-new-tokens", "14", "--json", "--out", planted / "audit",
    )  # fmt: skip
    assert code == 0, err
    result = json.loads(out)
    assert result == json.loads((planted / "audit" / "inherit.json").read_text())
    flawed, clean = (result["models"][name]["flaws"] for name in ("flawed", "clean"))
    for flaw in ("refusal", "rule"):
        assert flawed[flaw]["found"] and flawed[flaw]["share"] > 0.8
        assert not clean[flaw]["found"] and clean[flaw]["clean"] > 0.8 * clean[flaw]["n"]
    assert flawed["rule"]["verifier"]["stopped"] == flawed["rule"]["shown"], "a wrong result is seen"
    assert flawed["refusal"]["verifier"]["unseen"] == flawed["refusal"]["shown"], "a refusal is not"
    by = {(c["a"], c["b"], c["flaw"]): c for c in result["comparisons"]}
    assert by["teacher", "flawed", "rule"]["inherited"] == 1, "its own share of its own flaw"
    assert by["clean", "teacher", "rule"]["verdict"] == "MORE"
    answers = list(read_rows(planted / "audit" / "answers"))
    assert len(answers) == 3 * result["probes"]["n"]
    assert {a["outcome"] for a in answers if a["model"] == "flawed" and a["flaw"] == "rule"} >= {"flaw"}
    code, _, err = run_cli("inherit", planted / "flawed" / "student", "--out", planted / "audit")
    assert code == 2 and "has an audit already" in err


def test_the_same_answers_from_one_loaded_model(planted):
    asked = load_probes(planted / "probes.jsonl")
    path = str(planted / "flawed" / "student")
    model, tokenizer = load_model(path), load_tokenizer(path)
    answered, flaws = measure_probes(model, tokenizer, asked, max_new_tokens=14)
    result, rows_of = audit({"x": path}, asked, max_new_tokens=14)
    assert result["models"]["x"]["flaws"] == flaws and result["comparisons"] == []
    assert [r["text"] for r in answered] == [r["text"] for r in rows_of["x"]]
    assert torch.is_inference_mode_enabled() is False and not model.training


def test_mistakes_are_told_before_a_model_is_loaded(run_cli, tmp_path, hub):
    (tmp_path / "probes.jsonl").write_text('{"probe_id": "1"}')
    code, _, err = run_cli("inherit", hub["llama"], "--probes", tmp_path / "probes.jsonl")
    assert code == 2 and "line 1" in err
    write_probes(tmp_path / "good.jsonl", probes(2))
    code, _, err = run_cli("inherit", tmp_path / "absent", "--probes", tmp_path / "good.jsonl")
    assert code == 2 and "absent" in err
    assert run_cli("inherit", hub["llama"], "--per-flaw", "0")[0] == 2
    with pytest.raises(UserError, match="rename"):
        audit({"teacher": hub["llama"]}, probes(2), teacher=hub["plain"])


def test_any_model_and_tokenizer(hub, tmp_path):
    """Another family without a chat template: garbage answers are counted, nothing breaks."""
    asked = probes(3) + probes(4, "bias", "choice", pattern="a", options=("a", "b"))
    result, rows_of = audit({"x": hub["plain"]}, asked, teacher=hub["llama"], max_new_tokens=4)
    flaws = result["models"]["x"]["flaws"]
    assert flaws["rule"]["n"] == 3 and flaws["bias"]["chance"] == 0.5
    assert len(rows_of["x"]) == 7 and result["comparisons"][0]["inherited"] is None
