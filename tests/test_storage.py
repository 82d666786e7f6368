"""Parts and stages: whole or absent, resumable, never overwritten, never two writers."""

import subprocess

import pyarrow as pa
import pytest
from conftest import PYTHON, ROOT

from distill import storage
from distill.errors import RunError, UserError
from distill.files import remove_leftovers
from distill.stages import Stage, input_fingerprint
from distill.storage import (
    PROMPT_SCHEMA,
    PartWriter,
    fingerprint,
    parts,
    read_json,
    read_rows,
    write_json,
)

SCHEMA = pa.schema([("n", pa.int32())])


def rows(*numbers: int) -> list[dict]:
    return [{"n": n} for n in numbers]


def test_parts_come_back_in_order(tmp_path):
    writer = PartWriter(tmp_path, SCHEMA)
    writer.write(1, rows(3))
    writer.write(0, rows(1, 2))
    assert [r["n"] for r in read_rows(tmp_path)] == [1, 2, 3]
    writer.write_all([], part_size=5)
    assert parts(tmp_path)[0].name == "part-00000.parquet"


def test_leftovers_of_a_killed_writer_are_removed(tmp_path):
    (tmp_path / ".part-00000.parquet.tmp123").write_bytes(b"half")
    remove_leftovers(tmp_path)
    assert not list(tmp_path.glob(".part*"))


def test_a_damaged_part_is_named(tmp_path):
    writer = PartWriter(tmp_path, SCHEMA)
    writer.write(0, rows(*range(1000)))
    whole = writer.path(0).read_bytes()
    writer.path(0).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"part-00000\.parquet is damaged .*; delete this file"):
        list(read_rows(tmp_path))


def test_disk_full_loses_nothing(tmp_path, monkeypatch):
    import pyarrow.parquet as pq

    writer = PartWriter(tmp_path, SCHEMA)
    writer.write(0, rows(1))

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(RunError, match="No space left on device; free some space and run again"):
        writer.write(1, rows(2))
    assert [r["n"] for r in read_rows(tmp_path)] == [1]
    assert not list(tmp_path.glob(".part*"))


def make(tmp_path, config=None, inputs=None) -> Stage:
    return Stage(tmp_path, "prompts", config or {"a": {"b": 1}}, inputs or {"x": "1"})


def test_a_stage_is_skipped_resumed_or_refused(tmp_path):
    stage = make(tmp_path)
    assert not stage.done()
    stage.begin()
    PartWriter(stage.folder, SCHEMA).write(0, rows(1))
    stage.release()

    make(tmp_path).begin()  # continues: the part is still there
    assert len(parts(stage.folder)) == 1
    with pytest.raises(UserError, match=r"a\.b: 1 -> 2\); rebuild it with --redo"):
        make(tmp_path, {"a": {"b": 2}}).begin()
    stage = make(tmp_path)
    stage.begin()
    manifest = stage.finish({"rows": 1}, device="cpu")
    assert make(tmp_path).done()
    with pytest.raises(UserError, match="x changed"):
        make(tmp_path, inputs={"x": "2"}).done()
    assert parts(stage.folder), "refusing deletes nothing"

    changed = make(tmp_path, {"a": {"b": 2}})
    assert not changed.done(redo=True)
    changed.begin(redo=True)
    assert not parts(changed.folder), "rebuilt from nothing"
    PartWriter(changed.folder, SCHEMA).write(0, rows(1))
    assert changed.finish({"rows": 1}, device="cpu")["fingerprint"] != manifest["fingerprint"]


def test_a_kill_before_the_first_word_of_a_stage_is_no_foreign_file(tmp_path):
    """Killed while writing what the folder is made from: only a temporary file is there."""
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / ".identity.json.tmp77").write_text("{")
    make(tmp_path).begin()


def test_fingerprint_follows_content_not_the_clock(tmp_path):
    found = []
    for name, number in (("one", 1), ("same", 1), ("other", 2)):
        stage = Stage(tmp_path / name, "prompts", {}, {})
        stage.begin()
        PartWriter(stage.folder, SCHEMA).write(0, rows(number))
        found.append(stage.finish({"rows": 1}, device=name)["fingerprint"])
    assert found[0] == found[1] != found[2]


def test_foreign_files_are_not_overwritten(tmp_path):
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="files that no stage of this run made"):
        make(tmp_path).begin()
    assert (tmp_path / "prompts" / "thesis.txt").read_text() == "mine"


def test_a_second_process_is_refused_and_a_dead_one_is_not(tmp_path):
    code = (
        "import sys; from pathlib import Path; from distill.stages import Stage\n"
        f"s = Stage(Path({str(tmp_path)!r}), 'prompts', {{'a': {{'b': 1}}}}, {{'x': '1'}}); s.begin()\n"
        "print('begun', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen([PYTHON, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
    assert other.stdout.readline() == b"begun\n"
    with pytest.raises(UserError, match="another run is writing"):
        make(tmp_path).begin()
    other.kill()
    other.wait()
    make(tmp_path).begin()


def test_unfinished_input_names_the_command(tmp_path):
    with pytest.raises(UserError, match="run `distill generate RECIPE` first"):
        input_fingerprint(tmp_path / "prompts", "generate RECIPE")


def test_manifest_and_json_faults(tmp_path):
    write_json(tmp_path / "a.json", {"x": "é"})
    assert read_json(tmp_path / "a.json") == {"x": "é"}
    (tmp_path / "a.json").write_text("{half")
    with pytest.raises(UserError, match=r"a\.json is damaged"):
        read_json(tmp_path / "a.json")
    with pytest.raises(ValueError):
        write_json(tmp_path / "b.json", {"x": float("nan")})
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert "solution" in PROMPT_SCHEMA.names


def test_a_recorded_file_is_read_once_until_it_changes(tmp_path, monkeypatch):
    file = tmp_path / "weights"
    file.write_bytes(b"abcd")
    recorded = {file.name: {"bytes": 4, "hash": storage.hash_file(file)}}
    real, read = storage.hash_file, []

    def counted(path):
        read.append(path)
        return real(path)

    monkeypatch.setattr(storage, "hash_file", counted)
    assert [storage.changed_files(tmp_path, recorded) for _ in range(3)] == [[], [], []] and len(read) == 1
    other = tmp_path / "other"
    other.write_bytes(b"abcX")
    other.replace(file)  # another file of the same size, however coarse the clock of the disk is
    assert "was changed" in storage.changed_files(tmp_path, recorded)[0] and len(read) == 2
