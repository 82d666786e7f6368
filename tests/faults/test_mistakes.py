"""Mistakes over every command and key: exit code 1 or 2, one line with a fix, no traceback, nothing changed on disk.

Most rows are generated from the recipe's own classes, so that a new key is tried without anybody thinking of it.
"""

import itertools
import json
import re
import shutil
import types
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import pytest
from spread import spread

from distill.commands.cli import main
from distill.commands.scaffold import section_of
from distill.config.recipe import Recipe
from distill.storage import hash_file

NUMBERS = (".inf", "-.inf", ".nan", "-1", str(2**70), "word", "[1, 2, 3]", "9" * 5000)


def attempt(capsys, *words: Any) -> tuple[int, str]:
    capsys.readouterr()
    try:
        code = main([str(word) for word in words])
    except SystemExit as left:  # argparse's own way
        code = left.code
    said = capsys.readouterr()
    # A doctor's findings are what was asked for, on standard output.
    return code, said.err + "".join(f"distill: {x}\n" for x in said.out.splitlines() if words[0] == "doctor")


def contents(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hash_file(p) if p.is_file() else "folder"
        for p in sorted(folder.rglob("*"))
    }


# What a line says when it names a way out.
FIX = re.compile(
    r"; |did you mean|give|set |use |add |install|choose|correct|leave|valid|should be|lower|raise|at (least|most)|"
    r"usage:|required|allowed|name |only|see |must be|for example|expected|goes with|is not .* or |has no"
)


def refused(capsys, place: Path, *words: Any) -> str:
    before = contents(place)
    code, err = attempt(capsys, *words)
    shown = [str(word)[:80] for word in words]
    assert code in (1, 2), (shown, code, err)
    assert "Traceback" not in err, (shown, err)
    lines = [line for line in err.splitlines() if line.startswith(("distill: ", "distill "))]
    assert lines and FIX.search(" ".join(lines)), (shown, err)
    assert max(map(len, lines)) < 1500, (shown, err)
    assert contents(place) == before, shown
    return err


def numeric_keys(section=Recipe, above: str = "") -> list[str]:
    """Dotted keys of every number of a recipe, lists and dicts of numbers by an element of theirs."""
    found = []
    for name, field in section.model_fields.items():
        inner = section_of(field.annotation)
        if inner is not None and get_origin(field.annotation) is not list:
            found += numeric_keys(inner, f"{above}{name}.")
        elif kind := _number(field.annotation):
            found.append(f"{above}{name}" + {"dict": ".easy", "list": "", "one": ""}[kind])
    return found


def _number(annotation: Any) -> str | None:
    origin = get_origin(annotation)
    if annotation in (int, float):
        return "one"
    if origin is Annotated:
        return _number(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return next((k for a in get_args(annotation) if (k := _number(a))), None)
    if origin is dict:
        return "dict" if _number(get_args(annotation)[1]) else None
    if origin in (list, tuple):
        return "list" if _number(get_args(annotation)[0]) else None
    return None


KEYS = numeric_keys()
TEACHER_ONLY = {key for key in KEYS if key.startswith("teacher.endpoint.")}


@pytest.fixture
def place(make_recipe, tmp_path):
    """(recipe, its run folder) in a folder with a file, an empty folder and some rubbish."""
    path, run_dir = make_recipe()
    (tmp_path / "file").write_text("rubbish\n")
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    (tmp_path / "folder").mkdir()
    (tmp_path / "list.json").write_text("[1, 2]")
    return path, run_dir


def test_there_are_as_many_numbers_as_the_recipe_has():
    assert len(KEYS) > 60 and {
        "train.betas",
        "prompts.levels.easy",
        "seed",
        "prices.usd_per_device_hour",
    } <= set(KEYS)


@pytest.mark.parametrize("key", spread(KEYS, 16))
def test_no_number_of_a_recipe_may_be_odd(key, place, tmp_path, capsys):
    path, _ = place
    extra = ["teacher.endpoint.base_url=http://127.0.0.1:9/v1"] if key in TEACHER_ONLY else []
    for value in NUMBERS:
        if value.startswith("[") and key in ("train.betas", "evaluate.interventions.top_k"):
            value = "[1.0, 1.0, 0.0]"
        refused(capsys, tmp_path, "generate", path, *extra, f"{key}={value}")


@pytest.mark.parametrize("key", spread(KEYS, 16))
def test_zero_is_refused_or_means_something(key, place, tmp_path, capsys):
    """Where 0 is allowed the command goes on, finds no evaluation to report, and says so."""
    path, _ = place
    extra = ["teacher.endpoint.base_url=http://127.0.0.1:9/v1", "teacher.endpoint.api_key_env=null"]
    refused(capsys, tmp_path, "report", path, *(extra if key in TEACHER_ONLY else []), f"{key}=0")


def test_all_zeros_that_are_allowed_together(place, tmp_path, capsys):
    from distill.config.recipe import load_recipe
    from distill.errors import UserError

    path, _ = place
    zeros = []
    for key in KEYS:
        try:
            load_recipe(path, [*zeros, f"{key}=0"])
        except UserError:
            continue
        zeros.append(f"{key}=0")
    assert len(zeros) > 15
    refused(capsys, tmp_path, "train", path, *zeros)


PATHS = ("run_dir", "prompts.source", "evaluate.source", "evaluate.text", "evaluate.harness_include",
         "teacher.model", "student.model", "student.tokenizer", "train.teachers.models.addition")  # fmt: skip
VALUES = {
    "file": "{0}/file",
    "binary": "{0}/binary",
    "below_a_file": "{0}/file/below",
    "folder": "{0}/folder",
    "nothing": "{0}/nothing",
    "nul": '"a\\0b"',
    "long": "{0}/" + "n" * 300,
    "deep": "{0}/" + "d/" * 2500,
    "device": "/dev/null",
    "empty": "''",
    "blank": "' '",
    "number": "7",
    "surrogate": '"\\ud800"',
}
SOUND = {("run_dir", "folder"), ("run_dir", "nothing"), ("evaluate.source", "empty")}


@pytest.mark.parametrize(
    "key, kind", spread([p for p in itertools.product(PATHS, VALUES) if p not in SOUND], 11)
)
def test_no_path_of_a_recipe_may_be_odd(key, kind, place, tmp_path, capsys):
    path, _ = place
    value = VALUES[kind].format(tmp_path)
    extra = []
    if key == "evaluate.text":
        value = f"[{value}]"
    if key == "evaluate.harness_include":
        extra = ["evaluate.harness=[arc_easy]"]
    if key == "student.tokenizer":
        extra = [
            "student={config: {model_type: llama, hidden_size: 32, num_attention_heads: 4}, adapter: full}"
        ]
    if key == "prompts.source":
        extra = [f"evaluate.source={tmp_path}/file"]
    refused(capsys, tmp_path, "run", path, *extra, f"{key}={value}")


CONFIGS = {
    "heads_do_not_divide": "{model_type: llama, hidden_size: 33, num_attention_heads: 4}",
    "no_heads": "{model_type: llama, hidden_size: 32, num_attention_heads: 0}",
    "negative": "{model_type: llama, hidden_size: -32}",
    "huge_layers": "{model_type: llama, hidden_size: 32, num_hidden_layers: 1000000000}",
    "huge_vocabulary": "{model_type: llama, hidden_size: 32, vocab_size: 1000000000000}",
    "huge_width": "{model_type: llama, hidden_size: 1000000000}",
    "text_size": "{model_type: llama, hidden_size: wide}",
    "list_size": "{model_type: llama, hidden_size: [32]}",
    "infinite": "{model_type: llama, rms_norm_eps: .inf}",
    "no_family": "{model_type: nothing}",
    "list_family": "{model_type: [llama]}",
    "no_causal_lm": "{model_type: vit}",
    "odd_activation": "{model_type: llama, hidden_size: 32, num_attention_heads: 4, hidden_act: nope}",
    "list": "[1]",
    "text": "llama",
}


@pytest.mark.parametrize("name", spread(CONFIGS, 5))
def test_no_config_of_a_student_may_be_odd(name, place, tmp_path, capsys):
    path, _ = place
    refused(capsys, tmp_path, "run", path, f"student={{config: {CONFIGS[name]}, adapter: full}}")


# Words after the command; {0} is the folder, {1} the recipe, {2} a sound model.
ROWS = """
nonsense
run
run {0}/nothing.yaml
run {0}/file
run {0}/binary
run {0}/folder
run {0}/list.json
run {0}/run
run {1} steps
run {1} =3
run {1} train=
run {1} train.steps.more=3
run {1} train.objectives.9.name=x
run {1} train.steps=[
run {1} train.steps=2020-13-45
run {1} train.steps=!!python/object:os.system
run {1} --nonsense
run {1} --teacher
run {1} --teacher {0}/file
run {1} --teacher {0}/folder
run {1} --student {0}/nothing
run {1} --student {0}/list.json
run {1} --student hub:name
run {1} device=tpu
run {1} date=yesterday
run {1} date=2020-13-45
run {1} date=99999999999999999999
run {1} date=.inf
run {1} teacher.chat_template_kwargs=5
run {1} teacher.chat_template_kwargs={{"a-b":1}}
run {1} teacher.chat_template_kwargs={{"day":2020-01-01}}
run {1} student.lora.targets=["a-b"]
run {1} teacher.chat_template_kwargs={{"messages":5}}
run {1} student.chat_template_kwargs={{"a":.nan}}
run {1} student.chat_template_kwargs=[1]
run {1} prompts.last_turn=maybe
run {1} train.precision=fp4
run {1} train.objectives=[]
run {1} train.objectives=[5]
run {1} train.objectives=[{{name:nothing}}]
run {1} train.objectives=[{{"name":"forward_kl","temperature":1e999}}]
run {1} train.objectives=[{{"name":"forward_kl","temperature":0}}]
run {1} train.objectives=[{{"name":"forward_kl","weight":.nan}}]
run {1} train.objectives=[{{"name":"forward_kl","weight":1e300}}]
run {1} train.objectives=[{{"name":"ranking_hinge","top":1180591620717411303424}}]
run {1} train.betas=[1.0,1.0]
run {1} train.betas=[0.9]
run {1} train.warmup_steps=4
run {1} train.validation.patience=3
run {1} train.trackers=[nothing]
run {1} train.on_policy.fraction=0.5
run {1} student.lora.targets=nothing
run {1} student.lora.targets=[nothing]
run {1} student.lora.targets=[]
run {1} student.lora.experts=true
run {1} student.lora.rank=1000000
run {1} student.quantize=8bit
run {1} student.adapter=full student.quantize=8bit
run {1} teacher.quantize=8bit
run {1} teacher=null
run {1} teacher.endpoint={{base_url:ftp://x}}
run {1} teacher.endpoint={{"base_url":"http://a:b@c/v1"}}
run {1} teacher.endpoint={{"base_url":"http://x:99999999/v1"}}
run {1} teacher.endpoint={{"base_url":"http://[::1/v1"}}
run {1} prompts.levels={{}}
run {1} prompts.levels={{easy:0}}
run {1} prompts.levels={{"easy":0}}
run {1} prompts.levels={{"easy":100000000}}
run {1} prompts.levels={{"easy":9000000}}
run {1} prompts.levels={{"easy":100000000}} prompts.distinct=false
run {1} prompts.levels={{"simple":1}}
run {1} prompts.families=[]
run {1} prompts.families=[nothing]
run {1} prompts.verifier=regex
run {1} prompts.verifier=regex prompts.pattern=(
run {1} prompts.verifier=regex prompts.pattern=a{{999999999}}
run {1} prompts.verifier=regex prompts.pattern=((a{{1000}}){{1000}}){{1000}}
run {1} prompts.verifier=regex prompts.pattern=(?:a{{50000}}){{50000}}
run {1} prompts.preset=nothing
run {1} prompts.completion_column=x
run {1} evaluate.levels={{"easy":0}}
run {1} evaluate.levels={{}}
run {1} evaluate.levels={{"easy":10000000}}
run {1} evaluate.levels={{"hard":2000000000}}
run {1} evaluate.split=nothing
run {1} evaluate.samples=3
run {1} evaluate.models=[control] control.enabled=false
run {1} evaluate.likelihood=true
run {1} evaluate.harness=[arc_easy]
run {1} evaluate.text=[{0}/nothing.txt]
run {1} evaluate.text=[{0}/binary]
run {1} evaluate.interventions.top_k=[99] evaluate.models=[base]
run {1} evaluate.interventions.drop=[x]
run {1} generate.max_cost_usd=1
run {1} generate.signal.kind=nothing
run {1} filter.max_tokens=0
run {1} filter.charset=nothing
run {1} filter.finish_reasons=stop
run {1} filter.finish_reasons=[]
run {1} filter.finish_reasons=[content_filter]
run {1} filter.finish_reasons=[stop,stop]
run {1} filter.min_tokens=9 filter.max_tokens=3
run {1} filter.min_characters=9 filter.max_characters=3
run {1} seed=true
run {1} generate.samples=true
run {1} prompts.levels={{"easy":true}}
run {1} train.betas=[true,0.5]
run {1} evaluate.models=[student,student]
run {1} evaluate.precisions=[fp32,fp32]
run {1} train.objectives=[{{"name":"cross_entropy"}},{{"name":"cross_entropy"}}]
run {1} train.validation.rows=48
run {1} train={{"steps":3,"steps":4}}
run {0}/twice
run {0}/bomb
run {0}/cycle
run {1} run_dir=/dev/null
run {1} run_dir=/dev/null/run
run {1} run_dir=/proc/run
run {1} run_dir={0}/file
generate
generate {1} run_dir={0}/file/x
filter
filter {1}
filter {1} --explain
filter {1} --expl4in
train
train {1}
train {1} run_dir={0}/folder
evaluate
evaluate {1}
evaluate {0}/file
evaluate {0}/folder
evaluate {0}/nothing
evaluate {2} --tasks nothing
evaluate {2} --tasks {0}/folder
evaluate {2} --tasks {0}/binary
evaluate {2} --tasks {0}/file --out {0}/out
evaluate {2} --problems 0
evaluate {2} --problems -1
evaluate {2} --problems nan
evaluate {2} --problems 10000000
evaluate {2} --problems 99999999999999999999
evaluate {2} --out {0}/file
evaluate {2} --out {0}/file/below
evaluate {2} --out /dev/null
evaluate {2} --teacher {0}/file
evaluate {2} --usd-per-hour nan
evaluate {2} --usd-per-hour inf
evaluate {2} --usd-per-hour -3
evaluate {2} --usd-per-hour 1e400
evaluate {2} --temperature nan
evaluate {2} --temperature 99
evaluate {2} --top-p 0
evaluate {2} --top-p 2
evaluate {2} --seed -1
evaluate {2} --seed 1180591620717411303424
evaluate {2} --level 1
evaluate {2} --level 0.1
evaluate {2} --samples 3
evaluate {2} --samples 0
evaluate {2} --max-new-tokens 0
evaluate {2} --text {0}/nothing.txt
evaluate {2} --text {0}/binary
evaluate {2} --text {0}/folder
evaluate {2} --precision fp3
evaluate {2} --top-k 0
evaluate {2} --top-k x
evaluate {2} --top-k 2
evaluate {2} --drop-expert 1
evaluate {2} --route nothing
evaluate {2} --harness arc_easy
evaluate {2} --harness-limit 0
evaluate {2} prompts.answer_column=x
evaluate {2} train.steps=3
evaluate {1} --tasks easy
evaluate {1} --out {0}/x
report
report {0}/folder
report {1}
report {0}/file
bench
bench {1}
bench {0}/nothing.yaml
bench {0}/list.json
bench {0}/binary
bench recipes/claims.yaml --budget nothing
bench recipes/claims.yaml --jobs -1
bench recipes/claims.yaml --jobs x
bench recipes/claims.yaml --jobs 100000
bench recipes/claims.yaml --out {0}/folder
bench recipes/claims.yaml --out {0}/file/below.json
doctor
doctor {0}/file
doctor {1} run_dir={0}/file
doctor {1} teacher.model={0}/nothing
init
init {0}/folder/a/b/c
init {0}/run
init {0}/file/x
init x --teacher {0}/file
init x --student= --teacher {2}
describe
describe {0}/nothing
describe {0}/folder
describe {0}/file
describe {0}/list.json
describe {0}/listed
describe {0}/broken
describe {0}/deep
cost {0}/nothing
cost {0}/folder
cost {0}/file
cost deepseek-v4
cost deepseek-v3 x=1
cost deepseek-v3 --usd-per-hour nan
cost deepseek-v3 --usd-per-hour inf
cost deepseek-v3 --usd-per-hour -1
cost deepseek-v3 --out {0}/x
cost --break-even --queries nan
cost --break-even --queries -1
cost --break-even --queries inf
cost --break-even --students 0
cost --break-even --students nan
cost --break-even --teacher-query nan
cost --break-even --out {0}/file
cost --break-even --unit eur
cost --break-even --direct-multiple 0
cost deepseek-v3 --queries 5
cost deepseek-v3 --students 2
cost deepseek-v3 --break-even
export
export {0}/nothing --out {0}/x.jsonl
export {0}/folder
export {0}/folder --out {0}/x.jsonl
export {0}/folder --out {0}/x.csv
export {2} --gguf --out {0}/x.jsonl
export {0}/folder --out {0}/folder
export {0}/folder --out {0}/file/x.jsonl
merge
merge {0}/folder
merge {0}/folder --out {0}/x
merge {0}/nothing --out {0}/x
merge {2} --out {0}/x
merge {2} --out {0}/file
merge {2} --out /dev/null/x
merge {2} --out {0}/x --dtype fp8
inherit
inherit {2} --probes {0}/binary
inherit {2} --probes {0}/folder
inherit {2} --probes {0}/nothing
inherit {2} --probes {0}/file
inherit {2} --probes {0}/list.json
inherit {2} --per-flaw 0
inherit {2} --per-flaw nan
inherit {2} --max-new-tokens 0
inherit {2} --seed -1
inherit {2} --out {0}/file
inherit {2} --out /dev/null/x
inherit {0}/file
inherit {0}/nothing
inherit {2} --teacher {0}/nothing
provenance
provenance {0}/nothing
provenance {0}/folder
provenance {0}/file
play
play {0}/nothing
play {0}/file
play {2} --port 99999999
play {2} --port -1
play {2} --max-new-tokens 0
completion
completion tcsh
demo train.steps=many
demo --teacher {0}/nothing
demo run_dir={0}/file
""".strip().splitlines()


@pytest.mark.parametrize("row", spread(ROWS, 13))
def test_the_table(row, place, tmp_path, capsys, hub, monkeypatch):
    path, _ = place
    if "listed" in row or "broken" in row or "deep" in row:
        for name, text in (("listed", "[1]"), ("broken", '{"model_type": '), ("deep", "[" * 100_000)):
            (tmp_path / name).mkdir()
            (tmp_path / name / "config.json").write_text(text)
    if "/twice" in row or "/bomb" in row or "/cycle" in row:
        bomb = "".join(
            f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in itertools.pairwise("abcdefghij")
        )
        text = {"twice": "seed: 1\n", "bomb": f"a: &a [x]\n{bomb}", "cycle": "more: &e {x: *e}\n"}
        name = row.rpartition("/")[2]
        (tmp_path / name).write_text(Path(path).read_text() + text[name])
    words = [word.format(tmp_path, path, hub["llama"]) for word in row.split()]
    if words[0] == "init" and not words[-1].startswith("/"):
        monkeypatch.chdir(tmp_path)
    refused(capsys, tmp_path, *words)


WORDS = ("run", "evaluate", "describe", "cost", "export", "merge", "inherit", "provenance", "init")


@pytest.mark.parametrize(
    "word, text", spread(itertools.product(WORDS, ["a\0b", "n" * 300, "d/" * 2500, ""]), 7)
)
def test_odd_words(word, text, place, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    more = {"export": ["--out", "x.jsonl"], "merge": ["--out", "x"]}.get(word, [])
    refused(capsys, tmp_path, word, text, *more)


# ---- a finished run --------------------------------------------------------------------------------------


OTHER = {
    "run": ["seed=1", "prompts.levels.easy=13", "generate.samples=3", "filter.deduplicate=false", "train.steps=5",
            "train.learning_rate=0.5", "evaluate.seed=9", "student.lora.rank=3"],
    "generate": ["generate.temperature=0.5", "prompts.system=hello"],
    "filter": ["filter.max_tokens=400"],
    "train": ["train.schedule=constant", "train.batch_size=7"],
    "evaluate": ["evaluate.max_new_tokens=9"],
}  # fmt: skip


@pytest.mark.parametrize(
    "command, change", spread([(c, change) for c, changes in OTHER.items() for change in changes], 4)
)
def test_a_refused_command_leaves_a_finished_run_untouched(finished, capsys, command, change):
    path = finished / "run.yaml"
    err = refused(capsys, finished, command, path, change)
    assert "was made from other inputs" in err and "--redo" in err


def test_its_own_recipe_is_accepted_after_all_that(finished, capsys):
    before = contents(finished)
    code, err = attempt(capsys, "run", finished / "run" / "recipe.yaml")
    assert code == 0, err
    shown = {name for name in contents(finished) | before if not name.endswith(".html")}
    assert {n: contents(finished)[n] for n in shown} == {n: before[n] for n in shown}


def test_a_locked_run_is_left_alone(finished, tmp_path, capsys):
    """Another process is at the student: nothing of the run changes, its lock file included."""
    import fcntl

    run = Path(shutil.copytree(finished / "run", tmp_path / "run"))
    (run / "student" / "manifest.json").unlink()
    with open(run / ".student.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        changes = [f"run_dir={run}", "train.steps=4"]
        err = refused(capsys, tmp_path, "train", finished / "run.yaml", *changes)
    assert "another run is writing" in err or "files that no stage" in err or "other inputs" in err


def test_the_table_is_as_long_as_it_says():
    generated = len(KEYS) * (len(NUMBERS) + 1) + len(PATHS) * len(VALUES) - len(SOUND) + len(CONFIGS)
    assert len(ROWS) > 200 and generated > 300
    assert json.dumps(sorted({row.split()[0] for row in ROWS}))
