"""A merged model is the adapter on its base, in the files that converters know, with its error told.

Weights are compared with W + s BA computed here in float64, layouts with what plain `save_pretrained` writes.
"""

import json

import numpy as np
import pytest
import torch
from conftest import CHATML, byte_tokenizer, save_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill.config.training import Lora, StudentSection
from distill.data.provenance import _model_link, provenance
from distill.errors import RunError, UserError
from distill.models.load import load_model, load_tokenizer
from distill.models.student import build_student, save_student
from distill.storage import read_json
from distill.training.merge import Reading, difference, merge_adapter, probe_rows

CPU = torch.device("cpu")
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3", "num_key_value_heads": 4, "moe_intermediate_size": 16, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": None,
    "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip
EVERYTHING = {"targets": "all-linear", "experts": True, "router": True}


def make_adapter(folder, base: str, **lora) -> str:
    """An adapter with random weights, as a finished student leaves it."""
    student = build_student(StudentSection(model=base, lora=Lora(rank=2, alpha=3, **lora)), "fp32", CPU, 0)
    torch.manual_seed(3)
    for parameter in student.trainable.values():
        parameter.data.uniform_(-0.3, 0.3)
    save_student(
        student.model, student.tokenizer, folder, "---\nlicense: mit\n---\n# old name\n\nIts story.\n"
    )
    return str(folder)


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, str]:
    """DeepSeek-V3 stored in fp32 and in bf16, and a llama with tied weights, each in a folder."""
    root = tmp_path_factory.mktemp("bases")
    v3 = save_model(root / "v3", DEEPSEEK_V3, byte_tokenizer(CHATML))
    half = AutoModelForCausalLM.from_pretrained(v3, dtype=torch.bfloat16)
    half.generation_config.max_new_tokens = 7
    half.save_pretrained(root / "v3-bf16")
    byte_tokenizer(CHATML).save_pretrained(root / "v3-bf16")
    tied = {"model_type": "llama", "tie_word_embeddings": True}
    return {
        "v3": v3,
        "v3-bf16": str(root / "v3-bf16"),
        "tied": save_model(root / "tied", tied, byte_tokenizer(CHATML)),
    }


def layout(folder) -> dict[str, tuple]:
    """Name -> (dtype, shape) of every tensor in the folder's safetensors."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                piece = file.get_slice(name)
                found[name] = (piece.get_dtype(), tuple(piece.get_shape()))
    return found


@pytest.mark.parametrize("name", ["v3", "tied"])
@pytest.mark.parametrize("dtype", ["auto", "bf16"])
def test_the_merged_model_is_the_adapter_on_its_base(bases, tmp_path, name, dtype):
    lora = EVERYTHING if name == "v3" else {}
    adapter = make_adapter(tmp_path / "adapter", bases[name], **lora)
    manifest = merge_adapter(adapter, tmp_path / "merged", dtype)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")  # plain transformers, no PEFT
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    assert merged.dtype == (torch.bfloat16 if dtype == "bf16" else torch.float32)
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        expected = load_model(adapter, "fp32")(input_ids=ids).logits
        base = load_model(bases[name], "fp32")(input_ids=ids).logits
        got = merged(input_ids=ids).logits.float()
    assert (expected - base).abs().max() > 0.05
    merge = manifest["merge"]
    assert merge["fp32"]["max_abs"] < 1e-5 and merge["fp32"]["top1_agreement"] == 1
    if dtype == "auto":
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
        assert merge["stored"]["max_abs"] < 1e-5
    else:
        assert 1e-4 < merge["stored"]["mean_abs"] < 0.05
        assert merge["unmerged"]["mean_abs"] > 1e-4  # bf16 costs something without a merge, too
    assert ("router_flip_rate" in merge["stored"]) == (name == "v3")


@pytest.mark.parametrize(
    ("name", "dtype"), [("v3", "auto"), ("v3", "bf16"), ("v3-bf16", "auto"), ("tied", "bf16")]
)
def test_layout_is_that_of_a_plain_save(bases, tmp_path, name, dtype):
    """Names, shapes and dtypes of the tensors equal those of the same architecture saved without us."""
    adapter = make_adapter(tmp_path / "adapter", bases[name], **(EVERYTHING if "v3" in name else {}))
    merge_adapter(adapter, tmp_path / "merged", dtype)
    kind = torch.bfloat16 if dtype == "bf16" else "auto"
    AutoModelForCausalLM.from_pretrained(bases[name], dtype=kind).save_pretrained(tmp_path / "plain")
    assert layout(tmp_path / "merged") == layout(tmp_path / "plain")
    configs = [read_json(tmp_path / side / "config.json") for side in ("merged", "plain")]
    assert configs[0] == configs[1]
    names = set(layout(tmp_path / "merged"))
    if "v3" in name:
        assert "model.layers.1.mlp.experts.3.gate_proj.weight" in names  # un-fused on disk
        assert not any("gate_up_proj" in n for n in names)
        bias = layout(tmp_path / "merged")["model.layers.1.mlp.gate.e_score_correction_bias"]
        assert bias[0] == "F32"  # bf16 models keep it whole
    else:
        assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names  # tied: once


def test_sums_in_fp32_and_rounds_once(bases, tmp_path):
    """A bf16 base: what is stored is bf16(W + s BA), exactly, not bf16(W) + bf16(s BA) rounded again."""
    adapter = make_adapter(tmp_path / "adapter", bases["v3-bf16"], targets=("o_proj",))
    merge_adapter(adapter, tmp_path / "merged")
    before, after = (load_file(f"{d}/model.safetensors") for d in (bases["v3-bf16"], tmp_path / "merged"))
    delta = load_file(f"{adapter}/adapter_model.safetensors")
    name = "model.layers.1.self_attn.o_proj"
    a, b = (delta[f"base_model.model.{name}.lora_{side}.weight"].double().numpy() for side in "AB")
    exact = before[f"{name}.weight"].double().numpy() + 3 / 2 * b @ a
    got = after[f"{name}.weight"].double().numpy()
    once = torch.from_numpy(exact).float().bfloat16().double().numpy()
    twice = (before[f"{name}.weight"] + torch.from_numpy(3 / 2 * b @ a).bfloat16()).double().numpy()
    assert np.mean(got == once) > 0.995  # but for ties that fp32 and float64 break differently
    assert np.mean(got == twice) < 0.9
    untouched = [n for n in before if "o_proj" not in n]
    assert all(torch.equal(before[n], after[n]) for n in untouched)


def test_difference_by_hand():
    same = torch.tensor([[4, 5], [6, 7]])
    chosen = [
        {"a": torch.tensor([[0, 1], [2, 3]]), "b": same},
        {"a": torch.tensor([[1, 0], [2, 5]]), "b": same},
    ]
    reference = Reading(torch.tensor([[0.0, 2.0], [3.0, 1.0]]), chosen[0])
    other = Reading(torch.tensor([[0.5, 2.0], [1.0, 2.0]]), chosen[1])
    assert difference(reference, other) == {
        "tokens": 2,
        "max_abs": 2.0,
        "mean_abs": (0.5 + 0 + 2 + 1) / 4,
        "top1_agreement": 0.5,
        "router_flip_rate": 0.125,  # one of eight choices; their order does not matter
        "tokens_rerouted": 0.5,  # one of two tokens, in one of two layers
    }
    assert "router_flip_rate" not in difference(Reading(reference.logits, {}), Reading(other.logits, {}))


def test_the_probe_is_our_tasks_or_text(hub):
    ours, theirs = load_tokenizer("checkpoints/base"), load_tokenizer(hub["llama"])
    rows = probe_rows(ours, load_model("checkpoints/base", "fp32"))
    text = ours.decode(rows[0])
    assert text.startswith("<|user|>") and "<think>" in text and len(rows) == 42
    rows = probe_rows(theirs, load_model(hub["llama"], "fp32"))
    assert theirs.decode(rows[0]).startswith("The train to Lyon")


# ---- what is refused ---------------------------------------------------------------------------------


def test_refusals(bases, hub, tmp_path, run_cli):
    adapter = make_adapter(tmp_path / "adapter", bases["tied"])
    (tmp_path / "there").mkdir()
    for source, out, words in (
        (adapter, "there", "nothing is written over"),
        (hub["llama"], "new", "is a whole model already"),
        (str(tmp_path), "new", "has no adapter_config.json"),
    ):
        code, _, errors = run_cli("merge", source, "--out", tmp_path / out)
        assert code == 2 and words in errors and "Traceback" not in errors
    assert not (tmp_path / "new").exists() and list((tmp_path / "there").iterdir()) == []


def test_an_adapter_without_an_exact_merge_is_not_written(bases, tmp_path):
    """On the head of a tied model the sum would change the embedding as well."""
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(load_model(bases["tied"], "fp32"), LoraConfig(r=2, target_modules=["lm_head"]))
    torch.manual_seed(0)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data.uniform_(-0.5, 0.5)
    wrapped.save_pretrained(tmp_path / "adapter")
    with pytest.raises(RunError, match="has no exact merge"):
        merge_adapter(str(tmp_path / "adapter"), tmp_path / "merged")
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_weights_that_are_not_finite_are_not_written(bases, tmp_path):
    adapter = make_adapter(tmp_path / "adapter", bases["tied"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = {name: torch.full_like(tensor, 3e38) for name, tensor in load_file(file).items()}
    save_file(tensors, file)  # each of them a number, and their product none
    with pytest.raises(RunError, match="cannot be merged"):
        merge_adapter(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


# ---- the folder --------------------------------------------------------------------------------------


def test_the_command_leaves_an_ordinary_folder(bases, tmp_path, run_cli):
    adapter = make_adapter(tmp_path / "adapter", bases["v3-bf16"], **EVERYTHING)
    code, out, errors = run_cli("merge", adapter, "--out", tmp_path / "merged")
    assert code == 0, errors
    assert "written and loaded again" in out and "rerouted" in out
    merged = tmp_path / "merged"
    names = {p.name for p in merged.iterdir()}
    assert names == {
        "README.md", "chat_template.jinja", "config.json", "generation_config.json", "manifest.json",
        "model.safetensors", "provenance.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert read_json(merged / "generation_config.json")["max_new_tokens"] == 7
    tokenizer = AutoTokenizer.from_pretrained(merged)
    assert tokenizer.chat_template == CHATML
    card = (merged / "README.md").read_text()
    front = card.split("---\n")[1]
    assert (
        f"base_model: {bases['v3-bf16']}" in front
        and "license: mit" in front
        and "library_name: transformers" in front
    )
    assert (
        "# merged" in card and "# old name" not in card and "Its story." in card and "tokens rerouted" in card
    )
    manifest = read_json(merged / "manifest.json")
    assert set(manifest["merge"]) == {"fp32", "stored", "stored_in_fp32", "unmerged"}
    assert set(manifest["adapter_source"]["files"]) == {"adapter_model.safetensors", "adapter_config.json"}
    json.dumps(manifest, allow_nan=False)

    assert provenance(merged)["whole"]
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    found = provenance(merged)
    assert found["breaks"] == [f"adapter: {file} was changed: its hash is not the recorded one"]


def test_an_adapter_whose_base_changed_is_refused_by_name(trained, hub, tmp_path, run_cli, capsys):
    """A bit of the base, or its config: loaded with a warning, and neither merged, nor evaluated, nor called whole."""
    import shutil

    from distill.models.load import base_changes, load_model

    base = shutil.copytree(hub["llama"], tmp_path / "base")
    _, run_dir = trained("adapter", "control.enabled=false", f"student.model={base}", "train.steps=2")
    student = run_dir / "student"
    assert base_changes(student) == []
    for name, change in (
        ("model.safetensors", lambda b: b[:-1] + bytes([b[-1] ^ 1])),
        ("config.json", lambda b: b + b" "),
    ):
        whole = (base / name).read_bytes()
        (base / name).write_bytes(change(whole))
        with pytest.raises(UserError, match=f"trained on another base .*{name} was changed"):
            merge_adapter(str(student), tmp_path / "merged")
        code, _, error = run_cli(
            "evaluate", student, "--tasks", "easy", "--problems", "2", "--out", tmp_path / "eval"
        )
        assert code == 2 and "trained on another base" in error and not (tmp_path / "eval").exists()
        link = _model_link("base", str(base), read_json(student / "manifest.json")["base_source"])
        assert name in link["problems"][0]
        load_model(str(student))
        assert "was trained on another base" in capsys.readouterr().err
        (base / name).write_bytes(whole)
    load_model(str(student))
    assert "another base" not in capsys.readouterr().err
