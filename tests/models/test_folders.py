"""A hundred damaged or hostile model folders: each is refused in one line, in seconds, without filling memory."""

import json
import os
import resource
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from spread import spread

from distill.errors import UserError
from distill.models.describe import describe
from distill.models.folders import check_template, read_object
from distill.models.load import check_model, load_model, load_tokenizer

MOST_SECONDS, MOST_BYTES = 5.0, 2**30
Damage = Callable[[Path], None]


def put(name: str, content: str | bytes) -> Damage:
    """The file holds this instead."""
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def change(name: str, **values) -> Damage:
    """Keys of a JSON file get other values."""

    def damage(folder: Path) -> None:
        path = folder / name
        found = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps({**found, **values}))

    return damage


def config(**values) -> Damage:
    return change("config.json", **values)


def without(name: str, key: str) -> Damage:
    def damage(folder: Path) -> None:
        found = json.loads((folder / name).read_text())
        found.pop(key)
        (folder / name).write_text(json.dumps(found))

    return damage


def weights(change_bytes: Callable[[bytes], bytes], name: str = "model.safetensors") -> Damage:
    return lambda folder: (folder / name).write_bytes(change_bytes((folder / name).read_bytes()))


def tensors(part: str, change_tensor: Callable) -> Damage:
    """Tensors with `part` in their names become others."""

    def damage(folder: Path) -> None:
        found = load_file(folder / "model.safetensors")
        changed = {k: change_tensor(t) if part in k else t for k, t in found.items()}
        save_file(changed, folder / "model.safetensors")

    return damage


def sparse(name: str, size: int) -> Damage:
    """A file of so many zeros, which takes no room on the disk."""

    def damage(folder: Path) -> None:
        with open(folder / name, "wb") as file:
            file.truncate(size)

    return damage


def header(value: object) -> bytes:
    text = json.dumps(value).encode()
    return struct.pack("<Q", len(text)) + text + b"\0" * 64


def index(value: object) -> Damage:
    return put("model.safetensors.index.json", value if isinstance(value, str) else json.dumps(value))


def renamed(old: str, new: str) -> Damage:
    return lambda folder: (folder / old).rename(folder / new)


def removed(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def fifo(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return damage


def folder_instead(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return damage


def template(text: object) -> Damage:
    return lambda folder: (
        (folder / "chat_template.jinja").write_text(text)
        if isinstance(text, str)
        else (
            (folder / "chat_template.jinja").unlink(),
            change("tokenizer_config.json", chat_template=text)(folder),
        )
    )


DEEP = "[" * 100_000
NESTED = '{"a":' * 5000 + "1" + "}" * 5000
MODELS: dict[str, Damage] = {
    **{f"config_{n}": put("config.json", t) for n, t in {
        "list": "[]", "text": '"llama"', "number": "7", "null": "null", "empty": "", "broken": '{"model_type": "llama"',
        "deep": DEEP, "nested": NESTED, "latin": b'{"model_type": "llam\xe9"}', "object": "{}", "nan_word": "NaN",
        "digits": '{"hidden_size": ' + "9" * 5000 + "}"}.items()},
    "config_folder": folder_instead("config.json"),
    "config_missing": removed("config.json"),
    "config_fifo": fifo("config.json"),
    **{f"hidden_size_{n}": config(hidden_size=v) for n, v in {
        "negative": -32, "zero": 0, "text": "wide", "list": ["a"], "huge": 10**9, "half": 32.5, "true": True,
        "other": 64, "odd": 33}.items()},
    **{f"layers_{n}": config(num_hidden_layers=v) for n, v in {
        "huge": 10**9, "many": 1500, "negative": -1, "text": "two", "more": 3}.items()},
    **{f"heads_{n}": config(num_attention_heads=v) for n, v in {
        "zero": 0, "seven": 7, "text": "4", "huge": 10**8}.items()},
    **{f"vocab_{n}": config(vocab_size=v) for n, v in {
        "zero": 0, "huge": 10**12, "large": 10**8, "other": 300}.items()},
    "width_text": config(intermediate_size="x"),
    "width_huge": config(intermediate_size=10**7),
    "kv_heads_three": config(num_key_value_heads=3),
    "family_missing": without("config.json", "model_type"),
    **{f"family_{n}": config(model_type=v) for n, v in {
        "list": ["llama"], "unknown": "nope", "vision": "vit", "number": 5}.items()},
    "family_of_its_own": config(model_type="mine", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}),
    "activation": config(hidden_act="nope"),
    "rope_text": config(rope_parameters="x"),
    "rope_type": config(rope_parameters={"rope_type": "nope", "rope_theta": 1.0}),
    "norm_text": config(rms_norm_eps="x"),
    "context_text": config(max_position_embeddings="x"),
    "quantised_list": config(quantization_config=[1]),
    **{f"norm_{n}": config(rms_norm_eps=v) for n, v in {
        "negative": -1.0, "infinite": float("inf"), "nan": float("nan")}.items()},
    **{f"theta_{n}": config(rope_parameters={"rope_type": "default", "rope_theta": v}) for n, v in {
        "zero": 0, "negative": -1.0, "infinite": float("inf")}.items()},
    "more_experts_than_there_are": config(num_local_experts=4, num_experts_per_tok=9),
    "labels_huge": config(num_labels=10**9),
    "dropout_five": config(attention_dropout=5),
    "kernel_of_a_stranger": config(_attn_implementation="evil/kernel"),
    "kernel_of_each_part": config(attn_implementation={"": "evil/kernel"}),
    "key_twice": put("config.json", '{"model_type": "llama", "model_type": "qwen3"}'),
    "eos_text": config(eos_token_id="x"),
    "eos_nested": config(eos_token_id=[[1]]),
    **{f"manifest_{n}": put("manifest.json", json.dumps(v)) for n, v in {
        "list": [], "no_entry": {"files": {"model.safetensors": 5}}, "files_list": {"files": [1]},
        "outside": {"files": {"../model/config.json": {"bytes": 1, "hash": "a"}}},
        "absolute": {"records": {"/etc/passwd": {"bytes": 1, "hash": "a"}}},
        "no_hash": {"files": {"model.safetensors": {"bytes": 1}}}}.items()},
    "generation_list": put("generation_config.json", "[]"),
    "generation_broken": put("generation_config.json", "{"),
    "generation_deep": put("generation_config.json", DEEP),
    "generation_eos": change("generation_config.json", eos_token_id="x"),
    **{f"index_{n}": index(v) for n, v in {
        "broken": "{", "list": [], "empty": {}, "map_list": {"weight_map": ["model.safetensors"]},
        "map_number": {"weight_map": {"a": 5}}, "outside": {"weight_map": {"a": "../model.safetensors"}},
        "absolute": {"weight_map": {"a": "/etc/passwd"}}, "missing": {"weight_map": {"a": "other.safetensors"}},
        "deep": DEEP}.items()},
    "weights_cut": weights(lambda data: data[:-1000]),
    "weights_empty": weights(lambda data: b""),
    "weights_eight": weights(lambda data: data[:8]),
    "weights_long_header": weights(lambda data: struct.pack("<Q", 2**60) + data[8:]),
    "weights_no_json": weights(lambda data: data[:8] + b"x" + data[9:]),
    "weights_overlap": put("model.safetensors", header({
        "a": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]},
        "b": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}})),
    "weights_beyond": put("model.safetensors", header({
        "a": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 64]}})),
    "weights_others": lambda f: save_file(
        {f"other.{k}": t for k, t in load_file(f / "model.safetensors").items()}, f / "model.safetensors"),
    **{f"weights_{n}": tensors("norm" if n == "nan" else "q_proj", c) for n, c in {
        "nan": lambda t: t * float("nan"), "infinite": lambda t: t / 0, "bool": lambda t: t > 0,
        "whole": lambda t: t.int()}.items()},
    "weights_pickled": renamed("model.safetensors", "pytorch_model.bin"),
    "weights_pickled_pt": renamed("model.safetensors", "consolidated.00.pth"),
    "weights_missing": removed("model.safetensors"),
    "weights_folder": folder_instead("model.safetensors"),
    "weights_fifo": fifo("model.safetensors"),
    "weights_named_otherwise": lambda f: (
        renamed("model.safetensors", "mine.safetensors")(f), put("pytorch_model.bin", b"\x80\x04.")(f)),
    **{f"tokenizer_{n}": put("tokenizer.json", t) for n, t in {
        "list": "[]", "broken": "{", "object": "{}", "deep": DEEP, "number": "5", "model_text": '{"model": "x"}',
        "nested": NESTED}.items()},
    "tokenizer_model_odd": change("tokenizer.json", model={"type": "BPE", "vocab": [], "merges": 5}),
    "tokenizer_without_tokens": change(
        "tokenizer.json", model={"type": "BPE", "vocab": {}, "merges": []}, added_tokens=[]),
    "tokenizer_missing": removed("tokenizer.json"),
    **{f"tokenizer_config_{n}": put("tokenizer_config.json", t) for n, t in {
        "list": "[]", "broken": "{", "deep": DEEP, "text": '"x"'}.items()},
    "tokenizer_eos_missing": without("tokenizer_config.json", "eos_token"),
    "tokenizer_eos_number": change("tokenizer_config.json", eos_token=5),
    "tokenizer_added_list": change("tokenizer_config.json", added_tokens_decoder=[1]),
    "special_tokens_list": put("special_tokens_map.json", "[]"),
    "added_tokens_list": put("added_tokens.json", "[1]"),
    "template_of_gigabytes": sparse("chat_template.jinja", 3 * 10**9),
    "template_number": template(5),
    "template_list": template([5]),
    "template_loop": template("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"),
    "template_text": template("{{ 'a' * 1000000000 }}"),
    "template_just": template("{{ 'a'.ljust(10 ** 10) }}"),
    "template_format": template("{{ '%900000000d' % 1 }}"),
    "template_words": template("{{ lipsum(n=1000000) }}"),
    "template_doubling": template(
        "{% set n = namespace(s='ab') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}"),
    "template_long": template("{{ messages[0]['content'] * 900000 }}"),
    "template_list_product": template("{% set x = [0] * 10 ** 9 %}"),
}  # fmt: skip

ADAPTERS: dict[str, Damage] = {
    **{f"rank_{n}": change("adapter_config.json", r=v) for n, v in {
        "other": 3, "zero": 0, "negative": -1, "text": "x", "huge": 10**9, "half": 2.5, "null": None}.items()},
    **{f"alpha_{n}": change("adapter_config.json", lora_alpha=v) for n, v in {
        "text": "x", "infinite": float("inf"), "nan": float("nan"), "zero": 0}.items()},
    "targets_unknown": change("adapter_config.json", target_modules=["nothing"]),
    "targets_number": change("adapter_config.json", target_modules=5),
    "targets_numbers": change("adapter_config.json", target_modules=[5]),
    "targets_more": change("adapter_config.json", target_modules=["q_proj", "v_proj", "up_proj"]),
    "targets_fewer": change("adapter_config.json", target_modules=["q_proj"]),
    "kind_number": change("adapter_config.json", peft_type=5),
    "kind_unknown": change("adapter_config.json", peft_type="NOPE"),
    "kind_other": change("adapter_config.json", peft_type="PROMPT_TUNING"),
    "base_missing": change("adapter_config.json", base_model_name_or_path="/nowhere/at/all"),
    "base_number": change("adapter_config.json", base_model_name_or_path=5),
    "base_empty": change("adapter_config.json", base_model_name_or_path=""),
    "base_nul": change("adapter_config.json", base_model_name_or_path="a\0b"),
    "base_itself": lambda f: change("adapter_config.json", base_model_name_or_path=str(f))(f),
    "config_list": put("adapter_config.json", "[]"),
    "config_broken": put("adapter_config.json", "{"),
    "config_deep": put("adapter_config.json", DEEP),
    "weights_cut": weights(lambda data: data[:-100], "adapter_model.safetensors"),
    "weights_missing": removed("adapter_model.safetensors"),
    "weights_pickled": renamed("adapter_model.safetensors", "adapter_model.bin"),
    "weights_pickled_beside_others": lambda f: (
        renamed("adapter_model.safetensors", "other.safetensors")(f), put("adapter_model.bin", b"\x80\x04.")(f)),
    "tensors_renamed": lambda f: save_file(
        {k.replace("layers.0", "layers.7"): t for k, t in load_file(f / "adapter_model.safetensors").items()},
        f / "adapter_model.safetensors"),
    "tensors_one_fewer": lambda f: save_file(
        dict(list(load_file(f / "adapter_model.safetensors").items())[1:]), f / "adapter_model.safetensors"),
    "tokenizer_list": put("tokenizer.json", "[]"),
}  # fmt: skip


@pytest.fixture(scope="module")
def adapter(hub, tmp_path_factory) -> Path:
    from peft import LoraConfig, get_peft_model

    model = load_model(hub["llama"])
    made = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"]))
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    made.save_pretrained(folder)
    load_tokenizer(hub["llama"]).save_pretrained(folder)
    return folder


def read(folder: Path) -> None:
    """What commands do with a model folder, in their order."""
    check_model(str(folder))
    load_tokenizer(str(folder))
    load_model(str(folder))


def refused(folder: Path) -> str:
    begun, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError) as found:
        read(folder)
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert time.process_time() - begun < MOST_SECONDS and grown < MOST_BYTES
    (line,) = found.value.problems
    assert "\n" not in line and len(line) < 700, line
    assert str(folder.parent) in line or "chat template" in line, line
    return line


def test_there_are_a_hundred():
    assert len(MODELS) + len(ADAPTERS) >= 100


@pytest.mark.parametrize("name", spread(MODELS, 9))
def test_a_damaged_model_is_refused(name, hub, tmp_path):
    folder = Path(shutil.copytree(hub["llama"], tmp_path / "model"))
    MODELS[name](folder)
    line = refused(folder)
    if "pickled" in name or name == "weights_named_otherwise":
        assert "bin" in line or "pth" in line or "mine" in line or "no file named" in line, line


@pytest.mark.parametrize("name", spread(ADAPTERS, 6))
def test_a_damaged_adapter_is_refused(name, adapter, tmp_path):
    folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    ADAPTERS[name](folder)
    line = refused(folder)
    if "pickled" in name:
        assert "adapter_model.bin" in line and "never loaded" in line


def test_no_pickle_is_opened(adapter, tmp_path, monkeypatch):
    """By any name: torch.load is never reached."""
    import torch

    def loaded(*_args, **_kwargs):
        raise AssertionError("torch.load was called")

    monkeypatch.setattr(torch, "load", loaded)
    folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    ADAPTERS["weights_pickled_beside_others"](folder)
    refused(folder)


def test_sound_folders_are_read(hub, adapter):
    for folder in (*hub.values(), str(adapter)):
        read(Path(folder))


@pytest.mark.parametrize(
    "name", ["config_list", "config_deep", "hidden_size_huge", "layers_huge", "family_list", "rope_text"]
)
def test_describe_refuses_too(name, hub, tmp_path):
    folder = Path(shutil.copytree(hub["llama"], tmp_path / "model"))
    MODELS[name](folder)
    with pytest.raises(UserError):
        describe(folder)


def test_templates_that_refuse_or_are_unknown_are_not_hostile():
    tokens = {"bos_token": None, "eos_token": "x"}
    for text in (
        "{{ raise_exception('no system message') }}",
        "{% generation %}{{ messages[0].content }}{% endgeneration %}",
        "{{ messages | tojson }}{{ strftime_now('%Y') }}",
        "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.content }}{% endfor %}",
        "{{ unknown.attribute.chain }}",
    ):
        check_template(text, "it", tokens)
    with pytest.raises(UserError, match="does not end within 2 s and 512 MB; give the tokenizer another"):
        check_template("{{ 'b' * 1000000000 }}", "it", tokens)


def test_read_object_names_the_file(tmp_path):
    (tmp_path / "a.json").write_text("[1]")
    with pytest.raises(UserError, match=r"a\.json holds a list and not an object"):
        read_object(tmp_path / "a.json")
