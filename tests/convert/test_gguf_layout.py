"""`distill export --gguf`: what the converter reads is checked, and it is run where it is at hand."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

CONVERTER = """
import argparse, json, pathlib
p = argparse.ArgumentParser(); p.add_argument("model"); p.add_argument("--outfile"); p.add_argument("--outtype")
a = p.parse_args()
if "refuse" in a.outfile: raise NotImplementedError("BPE pre-tokenizer was not recognized")
pathlib.Path(a.outfile).write_text(json.dumps(vars(a)))
"""


@pytest.fixture
def model(hub, tmp_path):
    return shutil.copytree(hub["llama"], tmp_path / "model")


def test_the_command_is_printed(model, run_cli):
    code, said, _ = run_cli("export", str(model), "--gguf")
    assert code == 0 and "LlamaForCausalLM" in said
    assert f"python llama.cpp/convert_hf_to_gguf.py {model} --outfile {model}.gguf --outtype f32" in said


def test_the_converter_is_run_where_it_is(model, tmp_path, run_cli):
    there = tmp_path / "llama.cpp"
    there.mkdir()
    (there / "convert_hf_to_gguf.py").write_text(CONVERTER)
    out = tmp_path / "new.gguf"
    code, _, told = run_cli("export", str(model), "--gguf", "--llama-cpp", str(there), "--out", str(out))
    assert code == 0, told
    assert json.loads(out.read_text()) == {"model": str(model), "outfile": str(out), "outtype": "f32"}
    code, _, told = run_cli("export", str(model), "--gguf", "--llama-cpp", str(there), "--out", str(out))
    assert code == 2 and "exists" in told
    refused = str(tmp_path / "refuse.gguf")
    code, _, told = run_cli("export", str(model), "--gguf", "--llama-cpp", str(there), "--out", refused)
    assert code == 1 and told.count("\n") == 1 and "was not recognized" in told
    (there / "convert_hf_to_gguf.py").write_text("import no_such_package_at_all")
    code, _, told = run_cli("export", str(model), "--gguf", "--llama-cpp", str(there), "--out", refused)
    assert code == 1 and told.count("\n") == 1 and "pip install no_such_package_at_all" in told
    code, _, told = run_cli("export", str(model), "--gguf", "--llama-cpp", str(tmp_path))
    assert code == 2 and "convert_hf_to_gguf.py" in told


def without_architectures(model):
    config = json.loads((model / "config.json").read_text())
    del config["architectures"]
    (model / "config.json").write_text(json.dumps(config))


def change(edit):
    def damage(model):
        weights = load_file(model / "model.safetensors")
        edit(weights)
        save_file(weights, model / "model.safetensors", {"format": "pt"})

    return damage


def pieces(model):
    """A vocabulary as SentencePiece has them, in tokenizer.json alone, of a family that is not read from it."""
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "architectures": ["Gemma3ForCausalLM"]}))
    stored = json.loads((model / "tokenizer.json").read_text())
    stored["model"]["byte_fallback"] = True
    (model / "tokenizer.json").write_text(json.dumps(stored))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (without_architectures, "names no `architectures`"),
        (change(lambda w: w.pop("model.norm.weight")), "lacks the weight model.norm.weight"),
        (
            change(lambda w: w.update({"model.norm.weight": w["model.norm.weight"][:4].clone()})),
            r"model.norm.weight is \[4\], and its config says \[32\]",
        ),
        (change(lambda w: w.update({n: t.double() for n, t in w.items()})), "weights in F64"),
        (pieces, "tokenizer.model, which is not there"),
        (lambda model: [p.unlink() for p in model.glob("tokenizer*")], "has no tokenizer"),
    ],
)
def test_what_the_converter_would_not_read_is_told(model, damage, says):
    from distill.convert.gguf import check_layout
    from distill.errors import UserError

    damage(model)
    with pytest.raises(UserError, match=says):
        check_layout(str(model))


def test_an_adapter_is_to_be_merged_first(tmp_path, run_cli):
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "adapter_config.json").write_text("{}")
    code, _, told = run_cli("export", str(tmp_path), "--gguf")
    assert code == 2 and f"distill merge {tmp_path / 'student'}" in told
