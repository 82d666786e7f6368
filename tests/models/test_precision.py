"""Precision is what it says: bf16 really multiplies in bf16, and what a device lacks is refused."""

import importlib.machinery
import json

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from training_example import fake_dataset
from transformers import AutoModelForCausalLM

from distill.config.recipe import load_recipe
from distill.data.batches import TokenRows
from distill.errors import RunError, UserError
from distill.models import precision
from distill.models.hooks import KeptLogits
from distill.models.load import load_model
from distill.models.precision import (
    EMULATED,
    Precision,
    resolve_precision,
    torchao_layers,
    transformer_engine_layers,
)
from distill.models.student import build_student
from distill.storage import read_json
from distill.training.arms import train_arms
from distill.training.train import make_accelerator

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "name, fix",
    [("fp16", "bf16 or fp32"), ("fp8", "train.precision=bf16"), ("fp8-te", "train.precision=bf16")],
)
def test_cpu_refuses_what_it_would_fake(name, fix):
    with pytest.raises(UserError, match=f"precision {name}.*{fix}"):
        resolve_precision(name, CPU)


@pytest.mark.parametrize("name, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_matmuls_run_in_the_stated_type_and_weights_stay_float32(make_recipe, tmp_path, name, dtype):
    path, _ = make_recipe()
    recipe = load_recipe(path, [f"train.precision={name}", "student.adapter=full"])
    student = build_student(recipe.student, name, CPU, seed=0)
    accelerator = make_accelerator(recipe, resolve_precision(name, CPU), tmp_path)
    model = accelerator.prepare(KeptLogits(student.model))
    seen = []
    student.model.model.layers[0].mlp.up_proj.register_forward_hook(
        lambda _m, _i, out: seen.append(out.dtype)
    )
    batch = TokenRows([[5, 6]], [[7, 1]]).collate(np.arange(1), 0)
    logits = model(batch.input_ids, batch.attention_mask, batch.keep)
    accelerator.backward(logits.sum())
    assert seen == [dtype]
    assert logits.dtype == torch.float32, "losses see float32"
    assert {p.dtype for p in student.model.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in student.model.parameters() if p.grad is not None} == {torch.float32}


# ---------------------------------------------------------------------- float8


@pytest.fixture(scope="module")
def in_bf16() -> list[float]:
    """Losses of the run that every emulated one is compared with: filled by the first of them."""
    return []


@pytest.mark.parametrize("name", EMULATED)
def test_training_in_emulated_float8(make_recipe, in_bf16, name):
    """The key does what it says: other losses than bf16's, the layers in the manifest, float32 weights saved."""
    path, run_dir = make_recipe(student="qwen3_moe", name="run")
    fake_dataset(run_dir)
    fixed = ["control.enabled=false", "student.adapter=full", "train.objectives=[{name: cross_entropy}]"]
    losses = {"bf16": in_bf16}
    for choice in (name,) if in_bf16 else ("bf16", name):
        train_arms(load_recipe(path, [*fixed, f"train.precision={choice}"]), redo=True)
        lines = (run_dir / "student" / "metrics.jsonl").read_text().splitlines()
        losses[choice] = [json.loads(line)["loss"] for line in lines]
    in_bf16[:] = losses["bf16"]
    assert len(in_bf16) > 1 and losses[name] == pytest.approx(losses["bf16"], rel=0.02)
    assert all(a != b for a, b in zip(losses[name], losses["bf16"]))
    numerics = read_json(run_dir / "student" / "manifest.json")["precision"]
    assert numerics["name"] == name and EMULATED[name] in numerics["reason"]
    assert "model.layers.*.mlp.experts" in numerics["layers"]["float8"]
    assert "model.layers.*.mlp.gate" in numerics["layers"]["high"]["router"]
    weights = load_file(run_dir / "student" / "model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.float32}
    saved = AutoModelForCausalLM.from_pretrained(run_dir / "student")
    assert not any("Fp8" in type(m).__name__ for m in saved.modules())


def test_prepare_of_other_precisions_changes_nothing(hub):
    model = load_model(hub["llama"], "fp32")
    classes = [type(m) for m in model.modules()]
    choice = resolve_precision("bf16", CPU)
    assert choice.prepare(model) == {"name": "bf16", "reason": choice.reason}
    assert [type(m) for m in model.modules()] == classes


@pytest.mark.parametrize(
    "name, capability, problem",
    [
        ("bf16", (7, 5), "no bfloat16 units; set train.precision=fp16"),
        ("fp8-emulated", (7, 5), "precision fp8-emulated: .* no bfloat16 units"),
        ("fp8", (8, 0), "needs .* 8.9 or later, this is capability 8.0"),
        ("fp8-te", (8, 6), "needs .* 8.9 or later, this is capability 8.6"),
        ("fp8", (8, 9), "torchao is not installed; pip install torchao"),
        ("fp8-te", (9, 0), "transformer_engine is not installed"),
        ("bf16", (8, 0), None),
        ("fp8-emulated-tensor", (8, 0), None),
    ],
)
def test_what_each_gpu_can_do(monkeypatch, name, capability, problem):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "a GPU")
    monkeypatch.setattr(precision, "find_spec", lambda _library: None)
    if problem is None:
        assert resolve_precision(name, torch.device("cuda", 0)).accelerate == "bf16"
        return
    with pytest.raises(UserError, match=problem):
        resolve_precision(name, torch.device("cuda", 0))


@pytest.mark.parametrize("name, says", [("fp8", "torchao"), ("fp8-te", "never run")])
def test_real_float8_where_it_exists(monkeypatch, name, says):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    found = importlib.machinery.ModuleSpec("library", None)
    monkeypatch.setattr(precision, "find_spec", lambda _library: found)
    choice = resolve_precision(name, torch.device("cuda", 0))
    assert choice.accelerate == "fp8" and says in choice.reason


def test_which_layers_torchao_takes(hub):
    """First and last Linear, sides not divisible by 16, fused experts, adapters: each named with its reason."""
    model = load_model(hub["qwen3_moe"], "fp32")
    model = get_peft_model(model, LoraConfig(r=16, target_modules=["q_proj", "o_proj"]))
    reasons = {layer.name: layer.reason for layer in torchao_layers(model)}
    assert reasons["model.layers.0.self_attn.q_proj.base_layer"] == "first Linear"
    assert reasons["model.layers.1.self_attn.q_proj.base_layer"] is None
    assert reasons["model.layers.0.self_attn.o_proj.lora_A.default"] == "adapter"
    assert reasons["model.layers.0.mlp.experts"] == "fused experts"
    assert reasons["model.layers.0.mlp.gate"] == "router"
    assert reasons["lm_head"] == "output head"
    model.get_base_model().model.layers[1].self_attn.k_proj = torch.nn.Linear(32, 24)
    again = {layer.name: layer.reason for layer in torchao_layers(model)}
    assert again["model.layers.1.self_attn.k_proj"] == "sides not divisible by 16"


def test_accelerates_walk_for_transformer_engine(hub):
    """It stops at the first Linear of a parent with a side not divisible by 16, and would take the output head."""
    model = load_model(hub["llama"], "fp32")
    model.lm_head = torch.nn.Linear(32, 259)
    model.model.layers[1].mlp.up_proj = torch.nn.Linear(32, 40)
    reasons = {layer.name: layer.reason for layer in transformer_engine_layers(model)}
    assert reasons["model.layers.1.mlp.gate_proj"] is None
    assert reasons["model.layers.1.mlp.down_proj"] == "left out by Accelerate's conversion"
    assert reasons["lm_head"] == "output head"
    model.lm_head = torch.nn.Linear(32, 256)
    with pytest.raises(UserError, match=r"replace the output head.*set train.precision=fp8"):
        transformer_engine_layers(model)


def test_torchao_trains_what_was_announced(make_recipe, tmp_path):
    """Three steps of the real path, which torchao emulates on a CPU: the announced layers, a falling loss, saved."""
    pytest.importorskip("torchao")
    from torchao.float8.float8_linear import Float8Linear

    path, _ = make_recipe(student="qwen3_moe")
    recipe = load_recipe(path, ["train.precision=fp8", "student.adapter=full"])
    student = build_student(recipe.student, "fp8", CPU, seed=0)
    choice = Precision("fp8", "fp8", "forced on a CPU, which resolve_precision refuses")
    accelerator = make_accelerator(recipe, choice, tmp_path)
    with pytest.raises(RunError, match="prepare"):
        accelerator.prepare(KeptLogits(student.model))
    numerics = choice.prepare(student.model)
    optimizer = torch.optim.SGD(student.model.parameters(), lr=0.5)
    model, optimizer = accelerator.prepare(KeptLogits(student.model), optimizer)
    made = [n for n, m in student.model.named_modules() if isinstance(m, Float8Linear)]
    assert len(made) == sum(modules for modules, _ in numerics["layers"]["float8"].values()) > 0
    assert not {"lm_head", "model.layers.0.self_attn.q_proj"} & set(made)
    assert any("fused experts" in line for line in numerics["layers_text"])
    batch = TokenRows([[5, 6], [8, 9]], [[7] * 17, [9] * 17]).collate(np.arange(2), 0)
    losses = []
    for _ in range(3):
        logits = model(batch.input_ids, batch.attention_mask, batch.keep)
        loss = torch.nn.functional.cross_entropy(logits, batch.targets)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    # With Accelerate's default torchao configuration, this is where a finished run was lost.
    student.model.save_pretrained(tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").state_dict()
    for name, tensor in student.model.state_dict().items():
        assert torch.equal(saved[name], tensor), name
    AcceleratorState._reset_state()


@pytest.mark.parametrize("has_units, name", [(True, "bf16"), (False, "fp32")])
def test_auto_takes_bf16_where_a_cpu_has_units_for_it(monkeypatch, has_units, name):
    monkeypatch.setattr(precision, "_cpu_has_bf16", lambda: has_units)
    choice = resolve_precision("auto", CPU)
    assert choice.name == name and choice.accelerate == resolve_precision(name, CPU).accelerate
    assert choice.reason.startswith("auto: this CPU has" + ("" if has_units else " no"))


@pytest.mark.parametrize("capability, name", [((8, 0), "bf16"), ((7, 5), "fp16")])
def test_auto_takes_fp16_on_older_gpus(monkeypatch, capability, name):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    assert resolve_precision("auto", torch.device("cuda", 0)).name == name
