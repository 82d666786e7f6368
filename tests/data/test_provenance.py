"""The chain from a student to its teacher: whole as made, and any one change breaks it where it is."""

import json
import shutil
from pathlib import Path

import publish
import pytest
from conftest import CHATML, RECIPE, ROOT, byte_tokenizer, save_model

from distill.commands.cli import main
from distill.data.provenance import model_source, provenance
from distill.errors import UserError
from distill.storage import fingerprint, hash_file, read_json, write_json


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of one run, finished through train, with a teacher and a base of its own."""
    root = tmp_path_factory.mktemp("chain")
    teacher = save_model(root / "teacher", {"model_type": "llama"}, byte_tokenizer(CHATML), seed=7)
    base = save_model(root / "base", {"model_type": "llama"}, byte_tokenizer(CHATML), seed=8)
    recipe = root / "recipe.yaml"
    recipe.write_text(RECIPE.format(run_dir=root / "run", teacher=teacher, student=base))
    for command in ("generate", "filter", "train"):
        assert main([command, str(recipe)]) == 0
    return root


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of the run, to damage. Teacher and base stay where its manifests name them."""
    return Path(shutil.copytree(finished / "run", tmp_path / "run"))


def broken(path: Path) -> list[str]:
    found = provenance(path)
    assert found["whole"] == (not found["breaks"])
    states = {link["name"]: link["state"] for link in found["links"]}
    assert all((states[b.partition(":")[0]] == "broken") for b in found["breaks"])
    return found["breaks"]


def test_a_finished_run_is_whole(run, run_cli, finished):
    code, out, _ = run_cli("provenance", run)
    assert code == 0 and "whole: every link fits the next" in out
    for name in ("student", "base", "dataset", "generations", "prompts", "teacher", "terms"):
        assert any(line.startswith(name) for line in out.splitlines()), name
    assert str(finished / "teacher") in out and "MIT License" in out and "not legal advice" in out
    code, out, _ = run_cli("provenance", run / "student", "--json")
    found = json.loads(out)
    assert code == 0 and found["whole"] and [link["state"] for link in found["links"]] == ["ok"] * 7


def test_it_starts_at_what_there_is(run):
    shutil.rmtree(run / "student")
    assert provenance(run)["links"][0]["name"] == "dataset" and not broken(run)
    shutil.rmtree(run / "dataset")
    assert [link["name"] for link in provenance(run)["links"]] == [
        "generations",
        "prompts",
        "teacher",
        "terms",
    ]
    assert broken(run) == []


def data_files(run: Path) -> list[Path]:
    student = run / "student"
    read_again = [student / name for name in ("adapter_config.json", "tokenizer.json", "chat_template.jinja")]
    return sorted([*run.rglob("part-*.parquet"), *student.glob("*.safetensors"), *read_again])


def test_one_flipped_bit_in_any_file_breaks_the_chain_there(run):
    files = data_files(run)
    assert len(files) >= 10
    for path in files:
        whole = path.read_bytes()
        middle = len(whole) // 2
        path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
        stage = path.relative_to(run).parts[0]
        assert broken(run) == [f"{stage}: {path} was changed: its hash is not the recorded one"]
        path.write_bytes(whole)
    assert broken(run) == []


def test_a_missing_file_and_a_missing_stage(run):
    path = run / "dataset" / "part-00000.parquet"
    path.unlink()
    assert broken(run) == [f"dataset: {path} is missing"]
    shutil.rmtree(run / "generations")
    assert any("generations: made from generations" in b and "nothing is here" in b for b in broken(run))


@pytest.mark.parametrize("stage", ["student", "dataset", "generations", "prompts"])
def test_an_edited_manifest_is_noticed(run, stage):
    path = run / stage / "manifest.json"
    manifest = read_json(path)
    manifest["config"]["seed"] = 99
    write_json(path, manifest)
    assert f"{stage}: manifest.json was changed: its fingerprint is not that of its content" in broken(run)


def test_a_stage_made_again_does_not_fit_what_was_made_from_it(run):
    """Even one that is consistent in itself: file, manifest and fingerprint all redone."""
    folder = run / "generations"
    part = folder / "part-00000.parquet"
    part.write_bytes(part.read_bytes() + b"x")
    manifest = read_json(folder / "manifest.json")
    manifest["files"][part.name] = {"bytes": part.stat().st_size, "hash": hash_file(part)}
    identity = {"config": manifest["config"], "inputs": manifest["inputs"]}
    manifest["fingerprint"] = fingerprint({"identity": identity, "files": manifest["files"]})
    write_json(folder / "manifest.json", manifest)
    (only,) = broken(run)
    assert only.startswith("generations: the next stage was made from generations ")


def test_terms_have_to_be_there_and_the_same(run):
    path = run / "dataset" / "manifest.json"
    manifest = read_json(path)
    manifest["terms"]["acknowledged"] = "somebody else"
    write_json(path, manifest)
    assert broken(run) == [
        "terms: dataset carries another decision on the teacher's terms than the answers it is made of"
    ]
    path = run / "generations" / "manifest.json"
    manifest = read_json(path)
    del manifest["terms"]
    write_json(path, manifest)
    assert broken(run) == ["terms: no decision on the teacher's terms was recorded"]


def test_another_teacher_in_the_same_folder(run, finished, tmp_path):
    away = tmp_path / "away"
    weights = finished / "teacher" / "model.safetensors"
    whole = weights.read_bytes()
    try:
        weights.write_bytes((finished / "base" / "model.safetensors").read_bytes())
        assert broken(run) == [f"teacher: {weights} was changed: its hash is not the recorded one"]
    finally:
        weights.write_bytes(whole)
    shutil.move(finished / "teacher", away)
    try:
        found = provenance(run)
        assert (
            found["whole"]
            and {link["name"]: link["state"] for link in found["links"]}["teacher"] == "not here"
        )
    finally:
        shutil.move(away, finished / "teacher")
    assert broken(run) == []


def published(run: Path, target: Path) -> Path:
    scores = {"model": {"parameters_total": 1, "parameters_active": 1}, "tasks": {}}
    write_json(run / "eval" / "metrics.json", {"models": {"student": scores}})
    (run / "recipe.yaml").write_text("run_dir: x\n")
    publish.publish(run, target)
    return target


def test_a_published_checkpoint_keeps_its_chain_without_the_data(run, run_cli, tmp_path):
    target = published(run, tmp_path / "shipped")
    shutil.rmtree(run)
    code, out, _ = run_cli("provenance", target)
    assert code == 0 and "not here" in out and "MIT License" in out
    kept = read_json(target / "provenance.json")
    kept["generations"]["inputs"]["prompts"] = "0" * 32
    write_json(target / "provenance.json", kept)
    assert any(b.startswith("generations: manifest.json was changed") for b in broken(target))
    (target / "provenance.json").unlink()
    code, out, _ = run_cli("provenance", target)
    assert code == 1 and "broken:" in out and "dataset: made from dataset" in out and "nothing is here" in out


def test_publishing_keeps_to_a_naming_rule(run, tmp_path):
    path = run / "student" / "manifest.json"
    manifest = read_json(path)
    manifest["terms"] |= {"name": "Llama 3.3 Community License", "name_prefix": "Llama"}
    write_json(path, manifest)
    with pytest.raises(UserError, match="choose 'Llama-shipped'"):
        published(run, tmp_path / "shipped")
    assert published(run, tmp_path / "Llama-shipped").is_dir()


@pytest.mark.parametrize("name", ["teacher", "base"])
def test_the_shipped_pair_is_whole(name):
    found = provenance(ROOT / "checkpoints" / name)
    assert found["whole"], found["breaks"]
    assert [link["name"] for link in found["links"]] == [name, "dataset", "prompts"]


def test_nothing_to_start_from(tmp_path, run_cli):
    code, _, err = run_cli("provenance", tmp_path)
    assert code == 2 and "give a run folder" in err
    (tmp_path / "manifest.json").write_text('{"counts": {}}')
    code, _, err = run_cli("provenance", tmp_path)
    assert code == 2 and "no manifest of a stage" in err


def test_hub_models_are_pinned_by_revision(tmp_path, monkeypatch):
    import huggingface_hub

    cached = tmp_path / "snapshots" / "abc123" / "config.json"
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repo, file: str(cached))
    assert model_source("org/name") == {"model": "org/name", "revision": "abc123"}
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repo, file: None)
    assert model_source("org/name") == {"model": "org/name", "revision": None}
