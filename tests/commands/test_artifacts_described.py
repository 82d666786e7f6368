"""A description is counted once for a config, a release and a state of the code, and then read from the disk."""

import json
import os
import shutil
import subprocess

import pytest
from conftest import PYTHON, ROOT, byte_tokenizer, save_model

from distill.commands import artifacts as module
from distill.commands.artifacts import described, remember
from distill.errors import UserError
from distill.models import describe


@pytest.fixture
def model(tmp_path):
    return save_model(tmp_path / "model", {"model_type": "llama"}, byte_tokenizer(None))


@pytest.fixture
def counted(tmp_path, monkeypatch):
    """How often a description was counted, with a cache of this test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    calls = []

    def count(source, *arguments):
        calls.append(source)
        return original(source, *arguments)

    original = describe.describe
    monkeypatch.setattr(describe, "describe", count)
    return calls


def kept(tmp_path) -> list:
    return sorted((tmp_path / "cache" / "distill" / "describe").glob("*.json"))


def edit(model: str, **keys) -> None:
    path = f"{model}/config.json"
    with open(path) as file:
        config = json.load(file)
    with open(path, "w") as file:
        json.dump({**config, **keys}, file)


def test_the_second_time_is_read_and_says_the_same(model, counted, tmp_path):
    first = described(model)
    assert described(model) == first and len(counted) == 1 and len(kept(tmp_path)) == 1
    assert first[0] == describe.describe(model) and "parameters, total" in first[1]


def test_another_config_code_or_release_is_counted(model, counted, tmp_path, monkeypatch):
    before, _ = described(model)
    edit(model, num_hidden_layers=3)
    after, _ = described(model)
    assert len(counted) == 2 and after["parameters_total"] > before["parameters_total"]
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "describe.py").write_text("# edited")
    monkeypatch.setattr(module, "_COUNTS", tmp_path / "code")
    described(model)
    assert len(counted) == 3
    monkeypatch.setattr("distill.stages.versions", lambda: {"transformers": "99"})
    described(model)
    assert len(counted) == 4 and len(kept(tmp_path)) == 4


@pytest.mark.parametrize(
    "damage", [lambda text: text[:99], lambda text: text.replace("llama", "lamma"), lambda _: "[]"]
)
def test_a_damaged_one_is_counted_again(model, counted, tmp_path, damage):
    first = described(model)
    (file,) = kept(tmp_path)
    whole = file.read_text()
    file.write_text(damage(whole))
    assert described(model) == first and len(counted) == 2 and file.read_text() == whole


def test_a_folder_is_looked_at_every_time(model, counted):
    described(model)
    with open(f"{model}/model.safetensors", "r+b") as file:
        file.truncate(100)
    with pytest.raises(UserError, match="damaged or cut short"):
        described(model)
    edit(model, hidden_size=-1)
    with pytest.raises(UserError, match="hidden_size"):
        described(model)


def test_where_nothing_can_be_kept_it_is_counted(model, counted, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert described(model) == described(model) and len(counted) == 2


def test_a_config_for_each_release_is_never_kept(model, counted, tmp_path):
    edit(model, configuration_files=["config.4.0.0.json"])
    shutil.copy(f"{model}/config.json", f"{model}/config.4.0.0.json")
    described(model)
    assert kept(tmp_path) == []


def test_the_oldest_go(model, counted, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_MOST", 2)
    for layers in (1, 2, 3, 4):
        edit(model, num_hidden_layers=layers)
        described(model)
        os.utime(kept(tmp_path)[-1])
    assert len(kept(tmp_path)) == 2


def test_reading_takes_no_torch(model, counted):
    _, table = described(model)
    code = (
        "import sys; from distill.commands.cli import main; main(['describe', sys.argv[1]])\n"
        "print({'torch', 'transformers', 'scipy', 'sympy', 'accelerate'} & set(sys.modules), len(sys.modules))"
    )
    done = subprocess.run([PYTHON, "-c", code, model], cwd=ROOT, capture_output=True, text=True)
    *said, last = done.stdout.splitlines()
    heavy, modules = last.rsplit(" ", 1)
    assert "\n".join(said) == table.rstrip() and done.stderr == "" and heavy == "set()"
    assert int(modules) < 600  # of 3,000 with transformers


def test_what_a_command_has_read_or_made_is_described_at_once(model, counted, tmp_path, run_cli):
    """Not a folder without a config, nor a hub name, nor a folder that is not there: nobody asked about those."""
    (tmp_path / "adapter").mkdir()
    remember(model, None, tmp_path / "adapter", "org/name", tmp_path / "none")
    assert counted == [model] and len(kept(tmp_path)) == 1
    run_cli("evaluate", model, "--problems", "1", "--no-speed", "--out", str(tmp_path / "eval"))
    assert run_cli("describe", model)[0] == 0 and counted == [model]


def test_a_run_without_a_teacher_ends_as_well(tmp_path, counted, run_cli):
    """As recipes/base.yaml: worked solutions, a student from random weights."""
    small = [
        f"run_dir={tmp_path / 'run'}", "prompts.levels={easy: 12}", "train.steps=2", "train.warmup_steps=0",
        "train.batch_size=4", "train.micro_batch_size=4", "evaluate.levels={easy: 2}", "evaluate.speed=false",
    ]  # fmt: skip
    code, _, told = run_cli("run", "recipes/base.yaml", *small)
    assert code == 0, told
    assert run_cli("describe", tmp_path / "run" / "student")[0] == 0 and len(counted) == 1


def test_a_run_describes_its_models(finished, hub, counted, tmp_path, run_cli):
    """Its arms are adapters here, which are described with their base and not kept."""
    assert run_cli("run", finished / "run.yaml")[0] == 0
    assert sorted(counted) == sorted([hub["llama"], hub["qwen3_moe"]]) and len(kept(tmp_path)) == 2
    for model in ("llama", "qwen3_moe"):
        assert run_cli("describe", hub[model])[0] == 0
    assert len(counted) == 2
