"""GGUF headers: read without their lists, refused where they are damaged, and text cut as the file says."""

import pytest
from gguf_example import SIZES, tokens, write_gguf

pytest.importorskip("gguf")

from distill.convert.gguf import gguf_config, gguf_tokenizer, read_header
from distill.errors import UserError


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def test_header_says_what_the_file_holds(file):
    header = read_header(file)
    assert header.architecture == "llama" and header.vocab_size == len(tokens())
    assert len(header.tensors) == 2 + 9 * SIZES["layers"]
    assert header.ends == [1]


def test_config_of_the_header_is_that_of_the_whole_file(file):
    from transformers import AutoConfig

    ours = gguf_config(file)
    whole = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    for key in ("hidden_size", "num_hidden_layers", "vocab_size", "rope_parameters", "tie_word_embeddings"):
        assert getattr(ours, key) == getattr(whole, key), key


def test_every_end_token_is_one(tmp_path):
    config = gguf_config(write_gguf(tmp_path / "two.gguf", ends={"eot": 0}))
    assert config.eos_token_id == [1, 0]


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda data: data[:-1], "1 bytes of its weights are missing"),
        (lambda data: data[: len(data) // 2], "is cut short"),
        (lambda data: data[:300], "its header does not end"),
        (lambda data: b"PK" + data, "is no GGUF file"),
        (lambda data: b"", "is no GGUF file"),
        (lambda data: data[:4] + b"\x09" + data[5:], "is GGUF version 9"),
    ],
)
def test_damaged_files_are_told(file, tmp_path, damage, says):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match=says):
        read_header(broken)


def test_digits_are_cut_off_first_where_the_file_says_so(file, tmp_path):
    """GPT-2's rule keeps the last space with the digit, so that the token of two spaces is never seen."""
    first = gguf_tokenizer(file, read_header(file))
    assert first.convert_ids_to_tokens(first("  57")["input_ids"]) == ["ĠĠ", "5", "7"]
    plain = write_gguf(tmp_path / "plain.gguf", pre="gpt-2")
    second = gguf_tokenizer(plain, read_header(plain))
    assert second.convert_ids_to_tokens(second("  57")["input_ids"]) == ["Ġ", "Ġ", "5", "7"]


def test_an_unknown_rule_is_told(tmp_path, capsys):
    path = write_gguf(tmp_path / "own.gguf", pre="a-rule-of-its-own")
    gguf_tokenizer(path, read_header(path))
    assert "'a-rule-of-its-own'" in capsys.readouterr().err


def test_describe_reads_the_header(file, run_cli):
    code, said, told = run_cli("describe", str(file))
    assert code == 0, told
    assert "2, 32, 259" in said and "without embeddings (tied)" in said
    code, _, told = run_cli("describe", str(file.with_name("other.gguf")))
    assert code == 2 and told.count("\n") == 1
