"""One pass for all that is said of a text: equal to a pass for each, and the teacher reads a text once."""

import os
import shutil

import pytest
import torch

from distill.config.evaluation import Evaluate
from distill.evaluation import evaluate as module
from distill.evaluation.fidelity import Reader, TokenCalibration, answer_rows, fidelity
from distill.evaluation.likelihood import answers_nll, text_nll
from distill.evaluation.measure import Plan, TeacherReference, _text
from distill.models.chat import prompt_ids
from distill.models.hooks import Hooks
from distill.models.layers import decoder_layers
from distill.models.load import load_model, load_tokenizer
from distill.storage import read_json

REASONS = ["stop", "length", "stop", "error", "stop", "length", "stop", "stop"]


@pytest.fixture
def case(hub):
    """(teacher's reference with answers of every kind, student, tokenizer, problems, the student's answers)."""
    tokenizer = load_tokenizer(hub["llama"])
    problems = [{"messages": [{"role": "user", "content": f"{i} + {10**i}"}]} for i in range(len(REASONS))]

    def answers(shift: int) -> list[dict]:
        found = []
        for i, reason in enumerate(REASONS):
            ids = [(shift + 7 * i + 3 * t) % 40 + 20 for t in range(1 + (i * 5) % 7)]
            error = "non-finite logits" if reason == "error" else None
            text = tokenizer.decode(ids)
            found.append({"completion_ids": ids, "text": text, "finish_reason": reason, "error": error})
        return found

    reference = TeacherReference(hub["llama"], tokenizer, 5, torch.device("cpu"))
    reference.answers = answers(0)
    torch.manual_seed(1)
    student = load_model(hub["llama"], "fp32")
    with torch.no_grad():
        student.lm_head.weight.add_(torch.randn_like(student.lm_head.weight) * 0.3)
    return reference, student, tokenizer, problems, answers(5)


def alike(found, expected):
    assert set(found) == set(expected)
    for key, value in expected.items():
        if isinstance(value, dict):
            alike(found[key], value)
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for a, b in zip(found[key], value, strict=True):
                alike(a, b)
        elif value is None:
            assert found[key] is None, key
        else:
            assert found[key] == pytest.approx(value, rel=1e-5, abs=1e-7), key


def test_one_pass_says_what_a_pass_for_each_says(case):
    reference, student, tokenizer, problems, own = case
    prompts = [prompt_ids(tokenizer, p["messages"]) for p in problems]
    calibration = TokenCalibration()
    teacher = load_model(reference.path, "fp32")
    expected = fidelity(
        student, teacher, answer_rows(prompts, reference.answers, 5), 0, calibration=calibration
    )
    expected["own_text"] = fidelity(student, teacher, answer_rows(prompts, own, 5), 0)
    found = reference.compare(student, tokenizer, problems, own)
    alike(found["fidelity"], expected)
    alike(found["calibration"], calibration.result())
    # Five finished answers reach further than the first five answers with text.
    alike(found["teacher_answers"], answers_nll(student, tokenizer, problems, reference.answers, True, 5))
    taught = reference.own_likelihood(problems, reference.answers)
    alike(taught, answers_nll(teacher, tokenizer, problems, reference.answers, True, 5))
    assert taught["documents"] == 5 != found["fidelity"]["answers"] - 1


def test_the_teacher_reads_a_text_once_for_all(case):
    reference, student, tokenizer, problems, own = case
    read, _ = [], reference.reader  # which asks its head once what it does
    with Hooks() as hooks:
        hooks.before(
            decoder_layers(reference.model)[1][0], lambda _layer, args: read.append(args[0].shape[0])
        )
        reference.own_likelihood(problems, reference.answers)
        assert sum(read) == 7  # not the one that failed
        for _ in range(2):
            found = reference.compare(student, tokenizer, problems, own)
        # Each time the student's own text, and the teacher's not again.
        assert sum(read) == 7 + 2 * found["fidelity"]["own_text"]["answers"]


def test_an_answer_that_is_the_teachers_is_read_once(case):
    """Word for word, behind the same question: what is said of it is what a pass of its own would say."""
    reference, student, tokenizer, problems, own = case
    taught = [answer["completion_ids"] for answer in reference.answers]
    own[0]["completion_ids"], own[4]["completion_ids"] = list(taught[0]), list(taught[4])
    own[2]["completion_ids"] = list(taught[0])  # the teacher's words, behind another question
    prompts = [prompt_ids(tokenizer, p["messages"]) for p in problems]
    expected = fidelity(student, load_model(reference.path, "fp32"), answer_rows(prompts, own, 5), 0)
    read = []
    with Hooks() as hooks:
        hooks.before(decoder_layers(student)[1][0], lambda _layer, args: read.append(args[0].shape[0]))
        found = reference.compare(student, tokenizer, problems, own)["fidelity"]["own_text"]
    alike(found, expected)
    assert found["answers"] == 5 and sum(read) == 1 + 7 + 3, (
        "the head is asked once; then the teacher's seven, and three of its own five"
    )
    for i, answer in enumerate(own):
        answer["completion_ids"] = list(taught[i])
    alike(
        reference.compare(student, tokenizer, problems, own)["fidelity"]["own_text"],
        fidelity(student, load_model(reference.path, "fp32"), answer_rows(prompts, own, 5), 0),
    )


def test_a_reader_gives_the_same_bits_and_forgets_nothing_else(case):
    student = case[1]
    rows = answer_rows([[5, 6], [7]], [{"completion_ids": [8, 9], "error": None}] * 2, 2)
    batch, other = rows.collate([0, 1], 0), rows.collate([1], 0)
    reader = Reader(student)
    with torch.inference_mode():
        first = reader(batch, keep=True)
        again, fresh = reader(batch), reader(other)
        assert torch.equal(first, again)
        torch.testing.assert_close(fresh, first[2:])
        with torch.no_grad():
            student.model.embed_tokens.weight.zero_()
        assert torch.equal(reader(batch), first) and not torch.equal(reader(other), fresh)


def test_text_files_are_read_once_too(case):
    reference, student, tokenizer, _, own = case
    documents = [["one two three four five six", "seven eight"]]
    section = Evaluate(text=["a.txt"], text_window=16)
    plan = Plan([], section, torch.device("cpu"), documents)
    alone = _text(student, tokenizer, plan, None, None)["a.txt"]
    with Hooks() as hooks:
        read = []
        hooks.before(
            decoder_layers(reference.model)[1][0], lambda _layer, args: read.append(args[0].shape[0])
        )
        taught = _text(reference.model, tokenizer, plan, reference, own)["a.txt"]
        passes = sum(read)
        told = _text(student, tokenizer, plan, reference, None)["a.txt"]
        assert passes and sum(read) == passes
    alike({k: v for k, v in told.items() if k != "teacher"}, alone)
    alike(taught, text_nll(reference.model, tokenizer, documents[0], 16))
    assert told["teacher"]["tokens"] == alone["tokens"]


def test_the_first_usable_answers_up_to_the_limit_are_read():
    answers = [
        {"completion_ids": [], "error": None},
        {"completion_ids": [8], "error": "non-finite logits"},
        *({"completion_ids": [n], "error": None} for n in (9, 10, 11)),
    ]
    rows = answer_rows([[1], [2], [3], [4], [5]], answers, 2)
    assert [(p.tolist(), c.tolist()) for p, c in map(rows.row, range(len(rows)))] == [([3], [9]), ([4], [10])]
    assert answer_rows([[1], [2]], answers[:2], 2) is None


def test_one_folder_under_two_names_has_one_tokenizer(hub):
    """And another one where its template is given other arguments."""
    asked = {"told": {"enable_thinking": False}}
    plan = Plan([], Evaluate(), torch.device("cpu"), template_arguments=asked)
    base, teacher, told = (plan.tokenizer(name, hub["llama"]) for name in ("base", "teacher", "told"))
    assert base is teacher is plan.tokenizer("base", hub["llama"]) and told is not base
    assert told is plan.tokenizer("told", hub["llama"]) and plan.tokenizer("x", hub["plain"]) is not base


def test_a_process_that_keeps_its_teacher_reads_a_text_with_it_once(hub, tmp_path, monkeypatch):
    """Of evaluations one after the other; the numbers are those of a process that keeps nothing."""
    text = tmp_path / "text.txt"
    text.write_text("one two three four five six seven eight. " * 4)
    section = Evaluate(text=[str(text)], text_window=16, levels={"easy": 2}, max_new_tokens=4, speed=False)
    passes = []

    def metrics(folder: str, teacher: str, student: str) -> dict:
        out = tmp_path / folder
        module.evaluate_checkpoints({"student": student}, teacher, out, section, [])
        return read_json(out / "metrics.json")["models"]

    def load(path, **named):
        model = load_model(path, **named)
        if path == teacher:
            passes.append(0)
            Hooks().before(decoder_layers(model)[0], lambda *_: passes.__setitem__(-1, passes[-1] + 1))
        return model

    teacher = str(shutil.copytree(hub["llama"], tmp_path / "teacher"))
    plain = [metrics(f"plain-{name}", teacher, hub[name]) for name in ("llama", "qwen3_moe")]
    monkeypatch.setattr("distill.evaluation.measure.load_model", load)
    monkeypatch.setattr("distill.evaluation.measure._kept", {})
    kept = [metrics("kept-llama", teacher, hub["llama"])]
    first = passes[0]
    kept.append(metrics("kept-qwen3_moe", teacher, hub["qwen3_moe"]))
    assert 0 < passes[0] - first < first, "the second time its answers are written anew, and no text is read"
    for one, other in zip(plain, kept):
        for model in one:
            for key in ("text", "fidelity", "tasks"):
                assert one[model].get(key) == other[model].get(key)
    (path,) = (tmp_path / "teacher").glob("*.safetensors")
    os.utime(path, (1, 1))
    metrics("touched", teacher, hub["llama"])
    assert len(passes) == 2, "another file is another teacher"
