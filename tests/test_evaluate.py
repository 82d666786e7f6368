"""Evaluation: resumes model by model, compares in the stated direction, and never hides a failure."""

import math

import pytest
import torch

from distill.answers import summarise
from distill.evaluate import compare
from distill.models import load_model
from distill.report import build_report
from distill.shards import hash_file, read_json, read_rows


def row(verdict: str, level: str = "hard", tokens: int = 4) -> dict:
    return {"verdict": verdict, "level": level, "tokens": tokens}


def test_summary_counts_every_way_to_fail():
    verdicts = ["correct", "correct", "wrong", "truncated", "no_answer", "error"]
    found = summarise([row(v, tokens=i) for i, v in enumerate(verdicts)])
    assert (found["n"], found["truncated"], found["no_answer"], found["errors"]) == (6, 1, 1, 1)
    assert found["accuracy"] == found["pass_at_k"]["1"] == pytest.approx(1 / 3)
    assert found["mean_tokens"] == 2.5
    assert found["ci95"][0] < 1 / 3 < found["ci95"][1]


def test_comparison_is_about_the_second():
    """b solves all that a solves and 30 more: the difference is positive and the verdict is b's."""
    a = [row("correct")] * 20 + [row("wrong")] * 40
    b = [row("correct")] * 50 + [row("wrong")] * 10
    (found,) = compare({"a": a, "b": b})
    assert (found["a"], found["b"], found["task"], found["verdict"]) == ("a", "b", "hard", "BETTER")
    assert found["difference"] == pytest.approx(0.5)
    assert found["ci95"][0] > 0
    assert compare({"b": b, "a": a})[0]["verdict"] == "WORSE"
    assert compare({"a": a, "same": a})[0]["verdict"] == "INCONCLUSIVE"


def test_many_comparisons_are_corrected():
    """A difference that would pass alone (p = 0.03) does not among many (Holm)."""
    a = [row("correct")] * 30 + [row("wrong")] * 30
    b = [row("correct")] * 30 + [row("correct")] * 6 + [row("wrong")] * 24
    alone = compare({"a": a, "b": b})[0]
    assert alone["p_value"] == pytest.approx(2 * 0.5**6) and alone["verdict"] == "BETTER"
    many = compare({"a": a, "b": b, "c": a, "d": a})
    among = next(c for c in many if (c["a"], c["b"]) == ("a", "b"))
    assert among["verdict"] == "INCONCLUSIVE" and among["p_value_holm"] > 0.05 > among["p_value"]


def test_interrupted_evaluation_continues_with_the_next_model(make_recipe, run_cli, monkeypatch):
    import distill.evaluate as module

    path, run_dir = make_recipe()
    for command in ("generate", "filter", "train"):
        assert run_cli(command, path)[0] == 0
    real, asked = module.answer_problems, []

    def stops(model, tokenizer, problems, name, *rest):
        asked.append(name)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return real(model, tokenizer, problems, name, *rest)

    monkeypatch.setattr(module, "answer_problems", stops)
    code, _, err = run_cli("evaluate", path)
    assert code == 130 and "the same command continues" in err
    kept = {p.name: hash_file(p) for p in (run_dir / "eval" / "answers").glob("part-*.parquet")}
    assert len(kept) == 2
    code, _, err = run_cli("evaluate", path)
    assert code == 0, err
    assert sorted(asked[3:]) == sorted({"base", "control", "student", "teacher"} - set(asked[:2]))
    rows = list(read_rows(run_dir / "eval" / "answers"))
    assert len({(r["model"], r["prompt_id"]) for r in rows}) == len(rows) == 4 * 14
    assert all(hash_file(run_dir / "eval" / "answers" / name) == digest for name, digest in kept.items())


def test_nan_logits_are_errors_not_wrong_answers(make_recipe, run_cli, hub, tmp_path):
    model = load_model(hub["llama"], "fp32")
    with torch.no_grad():
        model.lm_head.weight[:] = math.nan
    model.save_pretrained(tmp_path / "broken")
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(hub["llama"]).save_pretrained(tmp_path / "broken")
    code, _, err = run_cli(
        "evaluate", tmp_path / "broken", "--tasks", "easy", "--problems", "7", "--out", tmp_path / "out"
    )
    assert code == 0, err
    score = read_json(tmp_path / "out" / "metrics.json")["models"]["broken"]["tasks"]["easy"]
    assert score["errors"] == 7 and score["accuracy"] == 0
    assert all("non-finite" in r["error"] for r in read_rows(tmp_path / "out" / "answers"))


def test_fidelity_is_the_definition(hub):
    """Agreement and both KLs against float64 by hand, on ragged teacher answers."""
    from distill.data import TokenRows
    from distill.fidelity import fidelity

    student, teacher = load_model(hub["llama"], "fp32"), load_model(hub["plain"], "fp32")
    pairs = [([5, 6, 7], [8, 9]), ([10], [11, 12, 13, 1]), ([14, 15], [1])]
    found = fidelity(student, teacher, TokenRows(*map(list, zip(*pairs))), pad_id=0, batch_size=2)
    agree = forward = reverse = count = 0
    for prompt, completion in pairs:
        ids = torch.tensor([prompt + completion])
        with torch.no_grad():
            q, p = (m(ids).logits[0].double().log_softmax(-1) for m in (student, teacher))
        for t in range(len(prompt) - 1, ids.shape[1] - 1):
            agree += int(p[t].argmax() == q[t].argmax())
            forward += float((p[t].exp() * (p[t] - q[t])).sum())
            reverse += float((q[t].exp() * (q[t] - p[t])).sum())
            count += 1
    assert found["tokens"] == count == 7
    assert found["top1_agreement"] == pytest.approx(agree / 7)
    assert found["forward_kl"] == pytest.approx(forward / 7, rel=1e-4)
    assert found["reverse_kl"] == pytest.approx(reverse / 7, rel=1e-4)


def test_report_of_a_real_run_agrees_with_its_metrics(make_recipe, run_cli):
    path, run_dir = make_recipe()
    assert run_cli("run", path)[0] == 0
    metrics = read_json(run_dir / "eval" / "metrics.json")
    page = build_report(run_dir).read_text()
    for name, model in metrics["models"].items():
        assert name in page
        assert f"{model['tasks']['hard']['mean_tokens']:.1f}" in page
    assert "http://" not in page and "https://" not in page and "<script" not in page


def test_tensorboard_tracker(make_recipe, run_cli):
    pytest.importorskip("tensorboard")
    path, run_dir = make_recipe()
    for command in ("generate", "filter"):
        assert run_cli(command, path)[0] == 0
    assert run_cli("train", path, "train.trackers=[tensorboard]")[0] == 0
    assert list((run_dir / "student").rglob("events.out.tfevents*"))
