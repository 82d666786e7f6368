"""A single flipped bit in any file of a run or of a checkpoint is told, or does not matter.

Every kind of file of a finished run is tried at random places, against whoever reads it next: a stage that reads its
folder, `report`, `provenance`, loading. What is never read again, or is for people alone, is listed and argued.
"""

import contextlib
import random
import shutil
from pathlib import Path

import pytest
import torch

from distill.commands.cli import main
from distill.errors import DistillError, RunError, UserError
from distill.evaluation.interventions import _keep, _read_kept
from distill.models.load import check_model, load_model, load_tokenizer
from distill.storage import (
    hash_file,
    read_json,
    read_table,
    remove_changed,
    same,
    sealed_text,
    unsealed,
    verify_folder,
    write_json,
)
from distill.training.checkpoint import load_trained, save_trained, saved_step

FLIPS = 3  # per file of a checkpoint
# Pages are made from the folders and read by nobody but people; so are cards, whose one field that is read
# (the licence of a teacher's card) is looked up in a table, see the last test.
FOR_PEOPLE = (".html", ".md")


def files_of(run: Path) -> list[str]:
    return sorted(
        str(p.relative_to(run)) for p in run.rglob("*") if p.is_file() and not p.suffix.endswith(FOR_PEOPLE)
    )


def flip(path: Path, rng: random.Random) -> tuple[int, int]:
    data = bytearray(path.read_bytes())
    place, bit = rng.randrange(len(data)), rng.randrange(8)
    data[place] ^= 1 << bit
    path.write_bytes(bytes(data))
    return place, bit


def base_is_told(config: Path) -> bool:
    """An adapter's base that is not where the settings say is told by whoever loads the adapter."""
    entry = read_json(config.with_name("manifest.json"))["records"][config.name]
    try:
        check_model(str(config.parent))
    except DistillError:
        return True
    return same(config, entry) and read_json(config) is not None


def test_every_kind_of_file_is_tried(finished):
    kinds = {Path(name).name for name in files_of(finished / "run")}
    assert {"manifest.json", "recipe.yaml", "metrics.jsonl", "metrics.json", "adapter_model.safetensors",
            "adapter_config.json", "tokenizer.json", "chat_template.jinja", "part-00000.parquet"} <= kinds  # fmt: skip


@pytest.mark.parametrize("flips", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_a_flipped_bit_in_any_file_of_a_run_is_told(finished, capsys, flips):
    """By the same command: it would say `done before` of a run that is as it was."""
    rng = random.Random(flips)
    run = finished / "run"
    missed = []
    for name in files_of(run)[:: 1 if flips > 1 else 4]:
        sound = (run / name).read_bytes()
        for _ in range(flips):
            where = flip(run / name, rng)
            capsys.readouterr()
            code = main(["report" if name.endswith("recipe.yaml") else "run", str(run / "recipe.yaml")])
            said = capsys.readouterr().err
            told = code in (1, 2) or ("warning" in said and "recipe.yaml" in said)
            if not told and name.endswith("adapter_config.json"):
                told = base_is_told(run / name)  # the place of its base: nothing else may differ
                said = f"{name}{said}"
            if not told or "Traceback" in said or Path(name).name not in said:
                missed.append((name, where, code, said[-300:]))
            (run / name).write_bytes(sound)
    assert not missed
    assert main(["run", str(run / "recipe.yaml")]) == 0


def test_a_mismatch_says_who_wrote_it_and_how_to_make_it_again(finished, tmp_path, capsys):
    run = Path(shutil.copytree(finished / "run", tmp_path / "run"))
    part = run / "generations" / "part-00001.parquet"
    sound = part.read_bytes()
    flip(part, random.Random(1))
    words = ["filter", str(finished / "run.yaml"), f"run_dir={run}"]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert f"{part} is damaged: it is not what the stage 'generations' wrote" in said
    assert "delete this file and run `distill generate RECIPE` again" in said
    part.unlink()
    assert main(["generate", *words[1:]]) == 0 and part.read_bytes() == sound
    assert main(words) == 0, "the fix that was named works"


def test_another_base_under_the_adapter_is_told(finished, tmp_path, capsys, hub):
    """The base's weights are a bit other than those that the student was trained on."""
    run = Path(shutil.copytree(finished / "run", tmp_path / "run"))
    shutil.rmtree(run / "eval")
    weights = Path(hub["llama"]) / "model.safetensors"
    sound = weights.read_bytes()
    try:
        weights.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
        assert main(["evaluate", str(finished / "run.yaml"), f"run_dir={run}"]) == 2
    finally:
        weights.write_bytes(sound)
    assert f"{weights} is not the file that the stage 'student' used" in capsys.readouterr().err
    assert not (run / "eval").exists()


def test_redo_makes_the_damaged_file_again_and_keeps_the_rest(finished, tmp_path):
    run = Path(shutil.copytree(finished / "run", tmp_path / "run"))
    parts = sorted((run / "generations").glob("part-*.parquet"))
    before = {p.name: hash_file(p) for p in parts}
    stamp = parts[0].stat().st_mtime_ns
    flip(parts[1], random.Random(2))
    assert main(["generate", str(finished / "run.yaml"), f"run_dir={run}", "--redo"]) == 0
    assert {p.name: hash_file(p) for p in parts} == before and parts[0].stat().st_mtime_ns == stamp


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "tokenizer.json",
                                  "tokenizer_config.json", "chat_template.jinja"])  # fmt: skip
def test_a_flipped_bit_of_a_student_that_is_loaded_is_told(finished, tmp_path, name):
    folder = Path(shutil.copytree(finished / "run" / "student", tmp_path / "student"))
    rng = random.Random(3)
    sound = (folder / name).read_bytes()
    for _ in range(FLIPS):
        flip(folder / name, rng)
        with pytest.raises(DistillError, match=name):
            load_tokenizer(str(folder))
            load_model(str(folder))
        (folder / name).write_bytes(sound)
    load_model(str(folder))


@pytest.mark.parametrize("checkpoint", ["checkpoints/teacher", "checkpoints/base"])
def test_a_flipped_bit_of_a_shipped_checkpoint_is_told(checkpoint, tmp_path):
    from distill.storage import PROJECT_ROOT

    folder = Path(shutil.copytree(PROJECT_ROOT / checkpoint, tmp_path / "model"))
    rng = random.Random(4)
    for path in sorted(folder.iterdir()):
        if path.suffix.endswith(FOR_PEOPLE) or path.name in ("provenance.json", "recipe.yaml"):
            continue  # read by `distill provenance` alone, which compares them with the manifest
        sound = path.read_bytes()
        for _ in range(FLIPS):
            flip(path, rng)
            with pytest.raises(DistillError):
                verify_folder(folder)
            path.write_bytes(sound)
    verify_folder(folder)


def test_a_flipped_bit_of_what_a_student_is_made_from_is_told(make_recipe, hub, capsys):
    """The base of `student.from`, and the teacher's head beside stored hidden states: the next stage reads both."""
    path, run = make_recipe()
    words = [
        path, f"student={{from: {{model: {hub['qwen3_moe']}, layers: 1}}, adapter: full}}", "control.enabled=false",
        "generate.signal={kind: hidden}", "train.objectives=[{name: forward_kl}]", "train.steps=2",
        "filter.finish_reasons=[stop, length]", "filter.correct_only=false",
    ]  # fmt: skip
    for command in ("generate", "filter"):
        assert main([command, *words]) == 0, capsys.readouterr().err
    assert main(["train", *words]) == 0, capsys.readouterr().err
    rng = random.Random(9)
    names = ["base/model.safetensors", "base/config.json", "base/manifest.json", "dataset/head.safetensors",
             "dataset/manifest.json", "generations/head.safetensors"]  # fmt: skip
    for name in names:
        sound = (run / name).read_bytes()
        for _ in range(2):
            shutil.rmtree(run / "student", ignore_errors=True)
            shutil.rmtree(
                run / "dataset" if name.startswith("generations") else run / "control", ignore_errors=True
            )
            flip(run / name, rng)
            capsys.readouterr()
            assert main(["run", *words]) in (1, 2), name
            said = capsys.readouterr().err
            assert Path(name).name in said and "Traceback" not in said, (name, said)
            assert not (run / "student" / "manifest.json").exists()
            (run / name).write_bytes(sound)


def test_a_flipped_bit_in_a_state_is_told(tmp_path):
    from distill.training.checkpoint import load_state, save_state

    module = torch.nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    save_state(tmp_path, 3, module, optimizer, {"tokens": 5})
    rng = random.Random(5)
    for name in ("tensors.safetensors", "state.json"):
        path = tmp_path / "state-0000003" / name
        sound = path.read_bytes()
        for _ in range(20):
            place = flip(path, rng)
            try:
                found = load_state(path.parent, module, optimizer)
            except DistillError:
                pass
            else:  # a bit of the word "checksum" itself: all that it covers is as it was
                assert name == "state.json" and found["step"] == 3 and found["tokens"] == 5, place
            path.write_bytes(sound)


def test_a_flipped_bit_of_the_best_weights_is_told(tmp_path):
    """Its step too: a larger one made the next look forget which was best."""
    module, path = torch.nn.Linear(8, 8), tmp_path / "best.safetensors"
    assert saved_step(path) is None
    save_trained(path, module, 12)
    sound, rng = path.read_bytes(), random.Random(6)
    assert saved_step(path) == 12
    places = [sound.index(b'"12"') + 1, sound.index(b'"hash"') + 1]
    for place in [*places, *(rng.randrange(len(sound)) for _ in range(40))]:
        path.write_bytes(sound[:place] + bytes([sound[place] ^ 1]) + sound[place + 1 :])
        with pytest.raises(RunError, match="damaged"):
            saved_step(path)
        with pytest.raises(RunError, match=r"damaged|belongs to another"):
            load_trained(path, module)


def test_a_flipped_bit_of_kept_answers_is_answered_again(tmp_path):
    path, rows = tmp_path / "m.interventions.jsonl", [{"verdict": "correct", "logprob": -1.5}]
    for label in ("top_k 1", "top_k 2"):
        _keep(path, label, rows)
    sound, rng = path.read_bytes(), random.Random(7)
    assert _read_kept(path) == {"top_k 1": rows, "top_k 2": rows}
    for _ in range(100):
        flip(path, rng)
        assert all(
            label in ("top_k 1", "top_k 2") and kept == rows for label, kept in _read_kept(path).items()
        )
        path.write_bytes(sound)


def test_a_flipped_bit_of_an_unfinished_evaluation_is_told(finished, tmp_path, capsys, monkeypatch):
    """Models that are measured are not measured again: what was found of them is read."""
    from distill.evaluation import evaluate

    run = Path(shutil.copytree(finished / "run", tmp_path / "run"))
    shutil.rmtree(run / "eval")
    words = ["evaluate", str(finished / "run.yaml"), f"run_dir={run}", "evaluate.models=[base, student]"]
    real, calls = evaluate.measure_model, []

    def measure(name, *rest):
        calls.append(name)
        if len(calls) > 1:
            raise RunError("stopped")
        return real(name, *rest)

    monkeypatch.setattr(evaluate, "measure_model", measure)
    assert main(words) == 1
    rng = random.Random(8)
    for name in (f"{calls[0]}.json", ".identity.json"):
        sound = (run / "eval" / name).read_bytes()
        for _ in range(4):
            flip(run / "eval" / name, rng)
            capsys.readouterr()
            assert main(words) in (1, 2)
            said = capsys.readouterr().err
            assert Path(name).name in said and "Traceback" not in said, (name, said)
            (run / "eval" / name).write_bytes(sound)
    part = next((run / "eval" / "answers").glob("part-*.parquet"))
    sound, rows = part.read_bytes(), read_table(part).to_pylist()
    for _ in range(60):  # a part of an unfinished stage has no hash yet: its pages have
        place = flip(part, rng)
        with contextlib.suppress(UserError):
            assert read_table(part).to_pylist() == rows, place
        part.write_bytes(sound)


def test_a_changed_line_of_an_unfinished_log_is_told(finished, tmp_path, capsys, monkeypatch):
    """Each state has the hash of the log that belongs to it: one digit of a loss is another."""
    from distill.training.step import StudentStep

    run = Path(shutil.copytree(finished / "run", tmp_path / "run"))
    for name in ("student", "control", "eval"):
        shutil.rmtree(run / name)
    words = ["train", str(finished / "run.yaml"), f"run_dir={run}", "control.enabled=false"]
    real, calls = StudentStep.forward, []

    def stops(self, *rest, **more):
        calls.append(1)
        if len(calls) > 5:  # two forward passes a step: three states are there
            raise KeyboardInterrupt
        return real(self, *rest, **more)

    monkeypatch.setattr(StudentStep, "forward", stops)
    assert main(words) == 130
    monkeypatch.setattr(StudentStep, "forward", real)
    log = run / "student" / "metrics.jsonl"
    other = log.read_text().replace('"lr": 0.00', '"lr": 0.01', 1)
    assert other != log.read_text()
    log.write_text(other)
    capsys.readouterr()
    assert main(words) == 0
    assert "metrics.jsonl is not as training wrote it" in capsys.readouterr().err


def test_a_manifest_cannot_have_other_files_deleted(tmp_path):
    """--redo deletes what is not as the manifest says: inside its folder alone."""
    (tmp_path / "stage").mkdir()
    (tmp_path / "mine").write_text("kept")
    for name in ("../mine", str(tmp_path / "mine")):
        write_json(tmp_path / "stage" / "manifest.json", {"files": {name: {"bytes": 1, "hash": "x"}}})
        with pytest.raises(UserError, match="names a file outside its folder"):
            remove_changed(tmp_path / "stage")
    assert (tmp_path / "mine").read_text() == "kept"


def test_licences_of_cards_that_are_a_bit_apart_say_the_same():
    """The one field of a card that is read: a flip must not turn a refusal into a permission."""
    import yaml

    from distill.storage import PROJECT_ROOT

    table = yaml.safe_load((PROJECT_ROOT / "distill" / "data" / "terms.yaml").read_text())["licenses"]
    for name, entry in table.items():
        for place in range(len(name)):
            for bit in range(8):
                other = f"{name[:place]}{chr(ord(name[place]) ^ (1 << bit))}{name[place + 1 :]}".lower()
                if other in table and other != name:
                    assert table[other]["train_other_models"] == entry["train_other_models"], (name, other)


def test_a_flipped_bit_in_the_words_of_a_seal_is_told():
    """Such a text is not one that was never sealed."""
    text = sealed_text("run_dir: x\nseed: 0\n")
    assert unsealed(text) == ("run_dir: x\nseed: 0\n", True) and unsealed("a: 1\n# b\n") == (
        "a: 1\n# b\n",
        True,
    )
    words = text.rindex("# checksum")
    for place in range(words + 1, len(text) - 1):
        for bit in range(7):
            flipped = text[:place] + chr(ord(text[place]) ^ 1 << bit) + text[place + 1 :]
            if "\n" not in flipped[place]:
                assert unsealed(flipped)[1] is False, (place - words, bit)
