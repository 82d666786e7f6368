"""Teacher outputs: every (prompt, sample) once, failures as rows, randomness from the key, flat memory."""

import contextlib
import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import PYTHON, ROOT

from distill.config.recipe import load_recipe
from distill.data import generate as module
from distill.data.prompts import make_prompts
from distill.data.provenance import provenance
from distill.data.teachers import Answer
from distill.errors import RunError, UserError
from distill.models.ahead import TokenAhead
from distill.models.load import load_model
from distill.storage import read_json, read_rows


class ScriptedTeacher:
    """Answers by a rule, without a model: right, wrong, cut off or failed in turn."""

    name = "scripted"
    opened = ""

    def __init__(self, fail_every: int = 5):
        self.fail_every, self.asked = fail_every, []

    def identity(self):
        return {"vocabulary": "scripted"}

    def open(self):
        pass

    def flops(self, *_counts):
        return None

    def answer(self, questions, sampling, on_finish):
        answers = []
        for question in questions:
            self.asked.append(question.key)
            n = len(self.asked)
            if n % self.fail_every == 0:
                answer = Answer("", "error", error="scripted failure")
            elif n % 7 == 0:
                answer = Answer("<think>1", "length", [5], [6, 7], [-0.1, -0.2], None, 1, 2)
            else:
                answer = Answer("<think>1</think>2", "stop", [5, 6], [7, 1], [-0.5, 0.0], None, 2, 2)
            on_finish(answer)
            answers.append(answer)
        return answers


@pytest.fixture
def scripted(monkeypatch):
    teacher = ScriptedTeacher()
    monkeypatch.setattr(module, "open_teacher", lambda *_: teacher)
    return teacher


def test_every_sample_is_a_row_failures_too(make_recipe, scripted):
    path, run_dir = make_recipe()
    recipe = load_recipe(path)
    make_prompts(recipe)
    manifest = module.generate(recipe)
    rows = list(read_rows(run_dir / "generations"))
    prompts = list(read_rows(run_dir / "prompts"))
    assert [(r["prompt_id"], r["sample_idx"]) for r in rows] == [
        (p["prompt_id"], s) for p in prompts for s in (0, 1)
    ]
    assert scripted.asked == [(recipe.seed, p["prompt_id"], s) for p in prompts for s in (0, 1)], (
        "the draws' names"
    )
    assert len(set(scripted.asked)) == 48, "no key is used twice"
    failed = [r for r in rows if r["error"]]
    assert len(failed) == manifest["counts"]["errors"] == 48 // 5
    assert all(r["verdict"] == "error" for r in failed)
    assert {r["verdict"] for r in rows if r["finish_reason"] == "length"} == {"truncated"}
    verdicts = manifest["counts"]["verdicts"]
    assert sum(verdicts.values()) == 48
    counted = {name: manifest["counts"][name] for name in ("prompt_tokens", "tokens")}
    asked, written = (sum(r[name] for r in rows) for name in ("prompt_tokens", "completion_tokens"))
    assert counted == {"prompt_tokens": asked, "tokens": written} and asked != written


def test_finished_parts_are_not_asked_again(make_recipe, scripted):
    path, run_dir = make_recipe()
    recipe = load_recipe(path)
    make_prompts(recipe)
    module.generate(recipe)
    asked = len(scripted.asked)
    (run_dir / "generations" / "part-00002.parquet").unlink()
    module.generate(recipe)
    assert len(scripted.asked) == asked + 16, "one part of 8 prompts, two samples each"


def test_a_limit_before_a_last_part_that_is_not_full(make_recipe, scripted):
    """24 prompts in parts of 10: the third has four, and a run that a limit stops before it is not finished."""
    path, run_dir = make_recipe()
    parts_of_ten = ["generate.part_size=10"]
    recipe = load_recipe(path, parts_of_ten)
    make_prompts(recipe)
    module.generate(recipe)
    rows = list(read_rows(run_dir / "generations"))
    spent = sum(len(row["completion_ids"]) for row in rows[:40])  # two parts of 10 prompts, two samples each

    path, run_dir = make_recipe(name="stopped")
    recipe = load_recipe(path, [*parts_of_ten, f"generate.max_tokens={spent}"])
    make_prompts(recipe)
    scripted.asked.clear()
    with pytest.raises(RunError, match=f"max_tokens={spent} is reached.* 2 of 3 parts are kept"):
        module.generate(recipe)
    assert len(scripted.asked) == 40 and not (run_dir / "generations" / "manifest.json").exists()


@pytest.mark.parametrize("change", ["generate.batch_size=3", "generate.part_size=5"])
def test_a_sample_depends_on_its_key_alone(make_recipe, run_cli, change):
    """Other neighbours, other parts: the same text for every (prompt, sample); another seed: other text."""
    texts = {}
    for name, overrides in (("one", []), ("two", [change]), ("seed", ["seed=7"])):
        path, run_dir = make_recipe(name=name)
        assert run_cli("generate", path, *overrides)[0] == 0
        texts[name] = {
            (r["prompt_id"], r["sample_idx"]): r["completion_ids"] for r in read_rows(run_dir / "generations")
        }
    assert texts["one"] == texts["two"]
    shared = texts["one"].keys() & texts["seed"].keys()
    assert not shared or any(texts["one"][k] != texts["seed"][k] for k in shared)
    samples = {k[0] for k in texts["one"]}
    assert any(texts["one"][p, 0] != texts["one"][p, 1] for p in samples), "two samples of a prompt differ"


MEMORY = """
import resource, sys
sys.path[:0] = ["tests", "tests/data"]
from test_generate import ScriptedTeacher
from distill.data import generate as module
from distill.config.recipe import load_recipe
from distill.data.prompts import make_prompts
from distill.data.provenance import provenance
from distill.devices import pick_device
module.open_teacher = lambda *_: ScriptedTeacher(10**9)
recipe = load_recipe(sys.argv[1], sys.argv[2:])
if recipe.generate.samples == 2:
    make_prompts(recipe)
else:
    pick_device("cpu"); module.generate(recipe)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_prompts(make_recipe):
    """Peak of the generate stage in its own process: 20 times the prompts, nearly the same megabytes."""
    peaks = []
    for name, count in (("few", 1_000), ("many", 20_000)):
        path, _ = make_recipe(name=name)
        sizes = [f"prompts.levels={{easy: {count}}}", "prompts.distinct=false", "generate.part_size=500"]
        for samples in ("2", "1"):
            command = [PYTHON, "-c", MEMORY, path, *sizes, f"generate.samples={samples}"]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
            assert done.returncode == 0, done.stderr[-2000:]
        peaks.append(int(done.stdout.split()[-1]))
    assert peaks[1] < peaks[0] + 60, peaks


def test_logprobs_are_the_models_own(make_recipe, run_cli, hub):
    """Stored log-probabilities equal a full forward pass over prompt and completion."""
    import torch

    path, run_dir = make_recipe("llama", "llama")
    assert run_cli("generate", path)[0] == 0
    model = load_model(hub["llama"], "fp32")
    for row in list(read_rows(run_dir / "generations"))[:6]:
        ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
        with torch.no_grad():
            logprobs = model(ids).logits[0].log_softmax(-1)
        start = len(row["prompt_ids"]) - 1
        expected = [float(logprobs[start + i, t]) for i, t in enumerate(row["completion_ids"])]
        assert row["logprobs"] == pytest.approx(expected, abs=1e-4)
    config = read_json(run_dir / "generations" / "manifest.json")["config"]
    assert json.dumps(config["identity"])


def test_stop_strings_through_a_recipe(make_recipe, run_cli):
    path, run_dir = make_recipe("llama", "llama")
    assert run_cli("generate", path, "generate.stop_strings=[e, '9']", "generate.max_new_tokens=60")[0] == 0
    rows = list(read_rows(run_dir / "generations"))
    stopped = [r for r in rows if r["text"].endswith(("e", "9"))]
    assert stopped and all(r["finish_reason"] == "stop" for r in stopped)
    assert not any("e" in r["text"][:-1] or "9" in r["text"][:-1] for r in rows)


def test_a_part_has_one_maker_and_a_free_process_takes_the_next(make_recipe, scripted, monkeypatch):
    """Of two processes the other one is busy with part 1: this one makes all the others, and does not wait."""
    path, run_dir = make_recipe()
    recipe = load_recipe(path, ["generate.part_size=6"])
    make_prompts(recipe)
    real, busy = module.claimed, []
    part = run_dir / "prompts" / "x"
    with pytest.raises(KeyError), real(part) as first, real(part) as second:
        assert first and not second  # the first one has it
        raise KeyError  # what fails is free again
    with real(part) as mine:
        assert mine

    def claimed(part):
        if part.name == "part-00001.parquet":
            busy.append(part)
            return contextlib.nullcontext(False)
        return real(part)

    monkeypatch.setattr(module, "claimed", claimed)
    monkeypatch.setattr(module.Limits, "error", lambda *_: RunError("one part is somebody else's"))
    with pytest.raises(RunError, match="somebody else's"):
        module.generate(recipe)
    made = sorted(p.name for p in (run_dir / "generations").glob("part-*.parquet"))
    assert made == ["part-00000.parquet", "part-00002.parquet", "part-00003.parquet"] and len(busy) == 1
    # What a killed run has claimed is free again.
    (run_dir / "generations" / ".part-00001.parquet.claim.tmp0").touch()
    monkeypatch.setattr(module, "claimed", real)
    module.generate(recipe)
    assert len(list((run_dir / "generations").glob("part-*.parquet"))) == 4
    assert not list((run_dir / "generations").glob(".*claim*"))


def test_each_question_is_answered_by_the_teacher_of_its_tag(
    make_recipe, hub, monkeypatch, tmp_path, run_cli
):
    """As if asked alone: the same key draws the same tokens. Rows, terms and provenance name who answered."""
    specialist = shutil.copytree(hub["qwen3_moe"], tmp_path / "specialist")
    model = load_model(str(specialist), "fp32")
    with torch.no_grad():
        model.lm_head.weight.neg_()
    model.save_pretrained(specialist)
    family = "addition"
    by_tag = [f"train.teachers.models={{{family}: {specialist}}}", "generate.by_tag=true"]
    found = {}
    for name, options in (("both", by_tag), ("plain", []), ("alone", [f"teacher.model={specialist}"])):
        path, run = make_recipe(name=name)
        code, _, told = run_cli("generate", path, *options)
        assert code == 0, told
        found[name] = list(read_rows(run / "generations"))
    assert {row["family"] for row in found["both"]} > {family}
    for both, plain, alone in zip(found["both"], found["plain"], found["alone"]):
        wanted = alone if both["family"] == family else plain
        assert both["completion_ids"] == wanted["completion_ids"] and both["teacher"] == wanted["teacher"]
    assert any(a["completion_ids"] != p["completion_ids"] for a, p in zip(found["alone"], found["plain"]))
    run = tmp_path / "both"
    manifest = read_json(run / "generations" / "manifest.json")
    assert list(manifest["teacher_sources"]) == [str(specialist)]
    links = [link["where"] for link in provenance(run / "generations")["links"]]
    assert sum(str(specialist) in str(where) for where in links) == 1
    card = Path(specialist, "README.md")
    card.write_text("---\nlicense: gemma\n---\n")
    with pytest.raises(UserError, match=f"may outputs of teacher '{specialist}' train"):
        module.generate(load_recipe(make_recipe(name="refused")[0], by_tag))


def test_a_teacher_with_a_module_beside_it_writes_the_same_rows_one_at_a_time(
    make_recipe, hub, tmp_path, run_cli
):
    folder = shutil.copytree(hub["llama"], tmp_path / "with-module")
    TokenAhead(load_model(str(folder), "fp32")).save(folder)
    rows = {}
    for name, teacher in (("drafts", str(folder)), ("plain", hub["llama"])):
        path, run = make_recipe(teacher=teacher, student="llama", name=name)
        assert run_cli("generate", path, "generate.batch_size=1", "generate.max_new_tokens=9")[0] == 0
        rows[name] = list(
            read_rows(run / "generations", ["completion_ids", "finish_reason", "text", "prompt_ids"])
        )
    assert rows["drafts"] == rows["plain"] and len({tuple(r["completion_ids"]) for r in rows["plain"]}) > 3
