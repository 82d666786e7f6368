"""Evaluation: resumes model by model, compares in the stated direction, and never hides a failure."""

import itertools
import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save

from distill.config.data import Prompts
from distill.config.evaluation import Evaluate
from distill.data.batches import TokenRows
from distill.data.prompts import held_out
from distill.evaluation import evaluate
from distill.evaluation.answers import answer_problems, compare, summarise
from distill.evaluation.fidelity import Reader, TokenCalibration, fidelity
from distill.evaluation.fidelity import read_rows as read_rows_of
from distill.evaluation.schema import check
from distill.models.chat import prompt_ids
from distill.models.load import load_model, load_tokenizer
from distill.storage import hash_file, read_json, read_rows


def row(verdict: str, level: str = "hard", tokens: int = 4, sample: int = 0) -> dict:
    final = "7" if verdict in ("correct", "wrong") else None
    found = {"verdict": verdict, "level": level, "tokens": tokens, "sample_idx": sample}
    return {**found, "thinking_tokens": tokens // 2, "final": final}


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
    import distill.evaluation.measure as module

    path, run_dir = make_recipe()
    for command in ("generate", "filter", "train"):
        assert run_cli(command, path)[0] == 0
    real, asked = module.answer_problems, []

    def stops(model, tokenizer, problems, name, section):
        asked.append(name)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return real(model, tokenizer, problems, name, section)

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
    assert run_cli("evaluate", path, "--redo")[0] == 0  # and in one go: the same rows
    assert list(read_rows(run_dir / "eval" / "answers")) == rows


def test_nan_logits_are_errors_not_wrong_answers(make_recipe, run_cli, hub, tmp_path):
    model = load_model(hub["llama"], "fp32")
    with torch.no_grad():
        model.lm_head.weight[:] = 3e38  # numbers themselves, and their products are none
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
    assert "warning: broken: non-finite logits (NaN or infinity) in 7 of 7 answers" in err and "fp32" in err


PAIRS = [([5, 6, 7], [8, 9]), ([10], [11, 12, 13, 1]), ([14, 15], [1])]


@pytest.mark.parametrize("order", itertools.permutations(range(3)))
def test_fidelity_is_the_definition(hub, order):
    """Agreement and both KLs against float64 by hand, on ragged answers; errors clustered by answer."""
    student, teacher = load_model(hub["llama"], "fp32"), load_model(hub["plain"], "fp32")
    calibration = TokenCalibration()
    pairs = [PAIRS[i] for i in order]
    rows = TokenRows(*map(list, zip(*pairs)))
    found = fidelity(student, teacher, rows, pad_id=0, batch_size=2, calibration=calibration)
    read = read_rows_of(student, rows, 0, Reader(teacher), batch_size=3)
    per_answer = []  # [tokens, agreements, forward, reverse, nats]
    for prompt, completion in pairs:
        ids = torch.tensor([prompt + completion])
        with torch.no_grad():
            q, p = (m(ids).logits[0].double().log_softmax(-1) for m in (student, teacher))
        sums = np.zeros(5)
        for t in range(len(prompt) - 1, ids.shape[1] - 1):
            sums[0] += 1
            sums[1] += int(p[t].argmax() == q[t].argmax())
            sums[2] += float((p[t].exp() * (p[t] - q[t])).sum())
            sums[3] += float((q[t].exp() * (q[t] - p[t])).sum())
            sums[4] -= float(q[t, ids[0, t + 1]])
        per_answer.append(sums)
    tokens, agree, forward, reverse, nats = np.array(per_answer).T
    assert read.counts.tolist() == tokens.tolist(), "each answer has its own"
    assert read.sums == pytest.approx(np.array([agree, forward, reverse]), rel=1e-4)
    assert (found["answers"], found["tokens"], found["not_finite"]) == (3, 7, 0)
    for name, sums in (("top1_agreement", agree), ("forward_kl", forward), ("reverse_kl", reverse)):
        mean = sums.sum() / 7
        stderr = math.sqrt(3 / 2 * ((sums - mean * tokens) ** 2).sum()) / 7
        assert found[name] == pytest.approx(mean, rel=1e-4)
        assert found[f"{name}_stderr"] == pytest.approx(stderr, rel=1e-3, abs=1e-9)
    low, high = found["forward_kl_ci95"]
    assert low < found["forward_kl"] < high
    assert calibration.result()["nll"] == pytest.approx(nats.sum() / 7, rel=1e-5)


def test_fidelity_leaves_out_what_is_not_finite_and_says_so(hub):
    student, teacher = load_model(hub["llama"], "fp32"), load_model(hub["plain"], "fp32")
    with torch.no_grad():
        student.model.embed_tokens.weight[10] = math.nan  # the prompt of the second answer
    found = fidelity(student, teacher, TokenRows(*map(list, zip(*PAIRS))), pad_id=0)
    assert found["not_finite"] == 4 and found["tokens"] == 3 and math.isfinite(found["forward_kl"])
    only = fidelity(student, teacher, TokenRows([[10]], [[11, 12]]), pad_id=0)
    assert only["tokens"] == 0 and only["forward_kl"] is None and only["top1_agreement_ci95"] is None


def sampling(**more) -> Evaluate:
    return Evaluate(**{"samples": 3, "temperature": 1.0, "max_new_tokens": 6, "batch_size": 5, **more})


def test_sampled_answers_depend_on_seed_problem_and_sample_alone(hub):
    model, tokenizer = load_model(hub["llama"], "fp32"), load_tokenizer(hub["llama"])
    problems = held_out(Evaluate(levels={"easy": 6}), Prompts(), 0)

    def answers(section, chosen):
        rows, _ = answer_problems(model, tokenizer, chosen, "m", section)
        assert [(r["prompt_id"], r["sample_idx"]) for r in rows] == [
            (p["prompt_id"], i) for p in chosen for i in range(section.samples)
        ]
        return {(r["prompt_id"], r["sample_idx"]): r["completion_ids"] for r in rows}

    whole = answers(sampling(), problems)
    assert whole == answers(sampling(batch_size=64), problems)
    assert len({tuple(ids) for ids in whole.values()}) > 12, "samples differ"
    part = answers(sampling(samples=2), problems[::-2])
    assert all(whole[key] == ids for key, ids in part.items())
    assert answers(sampling(seed=1), problems) != whole
    greedy = [answers(Evaluate(max_new_tokens=6, seed=seed), problems) for seed in (0, 1)]
    assert greedy[0] == greedy[1]


def test_rows_of_the_vocabulary_that_no_token_has_are_never_written(hub):
    """Models are padded to a round number of rows; the tokenizer has no text for those at the end."""
    model, tokenizer = load_model(hub["plain"], "fp32"), load_tokenizer(hub["plain"])
    model.resize_token_embeddings(len(tokenizer) + 8, mean_resizing=False)
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        head[-8:] = 50 * torch.randn(8, head.shape[1], generator=torch.Generator().manual_seed(0))
    problems = held_out(Evaluate(levels={"easy": 4}), Prompts(), 0)
    rows, _ = answer_problems(model, tokenizer, problems, "m", sampling(samples=2))
    assert max(token for row in rows for token in row["completion_ids"]) < len(tokenizer)


def test_an_answer_s_logprob_is_that_of_the_model(hub):
    model, tokenizer = load_model(hub["qwen3_moe"], "fp32"), load_tokenizer(hub["qwen3_moe"])
    problems = held_out(Evaluate(levels={"easy": 3}), Prompts(), 0)
    rows, measured = answer_problems(model, tokenizer, problems, "m", sampling(samples=1))
    for row, problem in zip(rows, problems):
        prompt = prompt_ids(tokenizer, problem["messages"])
        with torch.no_grad():
            logs = model(torch.tensor([prompt + row["completion_ids"]])).logits[0].double().log_softmax(-1)
        total = sum(float(logs[len(prompt) - 1 + i, t]) for i, t in enumerate(row["completion_ids"]))
        assert row["logprob"] == pytest.approx(total, rel=1e-4)
    assert measured["generated_tokens"] == sum(r["tokens"] for r in rows)


def test_a_sampled_evaluation_of_checkpoints(run_cli, hub, tmp_path):
    """All measurements of sampled answers in one file that fits its schema; the same again gives the same."""
    arguments = ("--tasks", "easy", "--problems", "6", "--samples", "4", "--temperature", "1.0", "--seed", "3",
                 "--max-new-tokens", "4", "--level", "0.9", "--usd-per-hour", "0.5")  # fmt: skip
    one, two = tmp_path / "one", tmp_path / "two"
    code, _, err = run_cli(
        "evaluate", hub["llama"], hub["qwen3_moe"], "--teacher", hub["plain"], *arguments, "--out", one
    )
    assert code == 0, err
    assert "cut at 4 tokens" in err and "--max-new-tokens" in err
    metrics, rows = read_json(one / "metrics.json"), list(read_rows(one / "answers"))
    check(metrics)
    assert len(rows) == 3 * 6 * 4
    code, _, err = run_cli("evaluate", hub["llama"], *arguments, "--precision", "fp32,bf16", "--out", two)
    assert code == 0, err
    swept = read_json(two / "metrics.json")["models"]["llama"]["precision"]
    assert [(entry["precision"], entry["tasks"]["easy"]["n"]) for entry in swept] == [
        ("fp32", 6),
        ("bf16", 6),
    ]
    assert list(read_rows(two / "answers")) == [row for row in rows if row["model"] == "llama"]
    assert metrics["settings"]["samples"] == 4 and metrics["settings"]["seed"] == 3
    model = metrics["models"]["llama"]
    assert model["tasks"]["easy"]["n"] == 6 and set(model["tasks"]["easy"]["pass_at_k"]) == {"1", "2", "4"}
    assert model["fidelity"]["answers"] == 6 and model["fidelity"]["own_text"]["answers"] == 6
    assert model["calibration"]["tokens"] == model["fidelity"]["tokens"]
    assert "answers" not in model["calibration"], "a drawn answer's probability is not its confidence"
    assert any("every answer of task easy was cut" in line for line in model["warnings"])
    price = model["cost"]["usd_per_million_output_tokens"]
    assert price == pytest.approx(0.5 / 3600 / model["cost"]["decode_tokens_per_second"] * 1e6)
    assert {c["level"] for c in metrics["comparisons"]} == {0.9} and len(metrics["comparisons"]) == 3
    assert (one / "dossier.html").is_file()
    code, _, err = run_cli("evaluate", hub["llama"], *arguments[:-2], "--out", two)
    assert code == 2 and "made from other inputs" in err


def test_bad_input_is_one_line(run_cli, hub, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text("{}")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "adapter").mkdir()
    settings = {"base_model_name_or_path": "/nowhere/base", "peft_type": "LORA", "r": 1, "lora_alpha": 1}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(save({"x": torch.zeros(1)}))
    model = hub["llama"]
    for arguments, message in (
        ([tmp_path / "folder"], "no *.safetensors weights"),
        ([tmp_path / "adapter"], "its base model does not load"),
        ([tmp_path / "nowhere" / "at" / "all"], "is not a folder"),
        ([model, "--tasks", tmp_path / "empty.jsonl"], "empty.jsonl"),
        ([model, "--tasks", "easy", "--problems", "0"], "no problems"),
        ([model, "--samples", "4"], "set `temperature`"),
        ([model, "--temperature", "9"], "evaluate.temperature"),
        ([model, "--level", "1"], "evaluate.level"),
        (["r.yaml", "--tasks", "easy"], "--tasks goes with checkpoints"),
    ):
        code, _, err = (
            run_cli("evaluate", *arguments, "--out", tmp_path / "out")
            if "r.yaml" not in arguments
            else (run_cli("evaluate", *arguments))
        )
        assert code == 2 and message in err and "Traceback" not in err, (arguments, err)


def test_code_of_a_checkpoint_is_neither_run_nor_offered(run_cli, hub, tmp_path, monkeypatch):
    """transformers would ask a person at a terminal whether to run it."""
    folder, marker = tmp_path / "own", tmp_path / "it-ran"
    shutil.copytree(hub["llama"], folder)
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": names}))
    (folder / "own.py").write_text(f"open({str(marker)!r}, 'w').write('x')\nclass OwnConfig: pass\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    for command in (["evaluate", folder, "--out", tmp_path / "out"], ["describe", folder]):
        code, _, err = run_cli(*command)
        assert code == 2 and "never run" in err and "trust_remote_code" not in err
    assert not marker.exists()


def test_options_become_overrides_of_a_recipe(make_recipe, run_cli):
    path, _ = make_recipe()
    options = (
        "--samples",
        "2",
        "--temperature",
        "0.5",
        "--usd-per-hour",
        "1.5",
        "--harness",
        "a,b",
        "--dry-run",
    )
    code, out, err = run_cli("evaluate", path, *options)
    assert code == 0, err
    for line in ("samples: 2", "temperature: 0.5", "usd_per_device_hour: 1.5", "- a"):
        assert line in out


def test_report_of_a_real_run_agrees_with_its_metrics(finished, run_cli, drawn):
    run_dir = finished / "run"
    assert run_cli("report", finished / "run.yaml")[0] == 0
    metrics = read_json(run_dir / "eval" / "metrics.json")
    page = (run_dir / "report.html").read_text()
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


def test_nobody_goes_on_while_another_reads_what_was_measured(monkeypatch, tmp_path):
    """The first process removes the parts when it goes on: the last meeting comes after the last of them is read."""
    happened = []
    ranks = SimpleNamespace(is_main_process=False, wait_for_everyone=lambda: happened.append("meets"))
    monkeypatch.setattr(evaluate, "main_decides", lambda _ranks, _decide: True)  # all is on disk already
    monkeypatch.setattr(evaluate, "read_table", lambda _path: SimpleNamespace(to_pylist=list))
    monkeypatch.setattr(evaluate, "read_json", lambda path: happened.append(path.stem) or {})
    stage = SimpleNamespace(folder=tmp_path)
    rows, results = evaluate._measure_all(stage, {"a": "x", "b": "y"}, plan=None, teacher=None, ranks=ranks)
    assert happened == ["a", "b", "meets"] and list(results) == list(rows) == ["a", "b"]
