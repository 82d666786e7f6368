"""The shipped pair: small, whole, loadable without our code, made by the recipes beside it."""

import json

import pytest
import yaml
from conftest import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill.config.recipe import load_recipe
from distill.storage import hash_file
from distill.tasks.problems import build_tokenizer
from distill.training.losses.routers import ExpertBiasBalancer

CHECKPOINTS = ROOT / "checkpoints"
NAMES = ("teacher", "base")


def test_together_under_24_mb():
    assert sum(f.stat().st_size for n in NAMES for f in (CHECKPOINTS / n).iterdir()) < 24e6


@pytest.mark.parametrize("name", NAMES)
def test_plain_transformers_loads_it_and_it_answers(name):
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINTS / name)
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINTS / name)
    messages = [{"role": "user", "content": "What is 47 + 85?"}]
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    text = tokenizer.decode(
        model.generate(**ids, max_new_tokens=40, do_sample=False)[0], skip_special_tokens=True
    )
    assert text.endswith("<think>7+5+0=12 4+8+1=13</think>132")
    assert tokenizer.get_vocab() == build_tokenizer().get_vocab()


@pytest.mark.parametrize("name", NAMES)
def test_manifest_hash_and_card_belong_to_the_file(name):
    folder = CHECKPOINTS / name
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["files"]["model.safetensors"]["hash"] == hash_file(folder / "model.safetensors")
    card = (folder / "README.md").read_text()
    assert "95 % interval" in card and "recipe.yaml" in card


@pytest.mark.parametrize("name", NAMES)
def test_the_rebuild_recipe_is_the_recipe_that_made_it(name):
    """Every setting in the manifest is what the recipe of today resolves to."""
    manifest = json.loads((CHECKPOINTS / name / "manifest.json").read_text())
    recipe = load_recipe(str(ROOT / "recipes" / f"{name}.yaml"))
    made, now = manifest["config"], recipe.model_dump(mode="json")
    assert made["seed"] == now["seed"]
    for section in ("student", "train"):
        for key, value in made[section].items():
            current = now[section][key]
            if isinstance(value, dict):  # keys that came later keep their defaults
                current = {k: current[k] for k in value}
            assert current == value, f"{section}.{key}"
    saved = yaml.safe_load((CHECKPOINTS / name / "recipe.yaml").read_text())
    for key, value in saved["prompts"].items():
        assert now["prompts"][key] == value, f"prompts.{key}"


def test_the_teacher_is_a_real_deepseek_v3():
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINTS / "teacher")
    config = model.config
    assert type(model).__name__ == "DeepseekV3ForCausalLM"
    assert 3e6 < sum(p.numel() for p in model.parameters()) < 8e6
    assert config.kv_lora_rank and config.n_shared_experts == 1 and config.first_k_dense_replace == 1
    assert config.n_routed_experts >= 8 and config.num_experts_per_tok == 2
    biases = [r.bias for r in ExpertBiasBalancer(model).routers]
    assert len(biases) == config.num_hidden_layers - 1 and all(b.abs().max() > 0 for b in biases)


def test_the_base_is_small():
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINTS / "base")
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert sum(p.numel() for p in model.parameters()) < 1.5e6
