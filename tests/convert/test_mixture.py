"""Dense to mixture and back: the same function at the start, plain transformers behind it."""

import pytest
import torch
from tiny_families import model_of, random_ids
from transformers import AutoModelForCausalLM

from distill.config.section import Dense, From, Mixture
from distill.convert.calibrate import Calibration
from distill.convert.derive import derived, derived_config
from distill.convert.mixture import as_dense, as_mixture
from distill.errors import UserError
from distill.models.routers import find_routers


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize(
    ("family", "shared", "becomes"),
    [("llama", False, "mixtral"), ("llama", True, "glm4_moe"), ("mistral", False, "mixtral"),
     ("qwen3", False, "qwen3_moe"), ("qwen3", True, "glm4_moe"), ("qwen2", True, "qwen2_moe")],
)  # fmt: skip
def test_an_upcycled_model_computes_what_the_dense_one_does(family, shared, becomes, tmp_path):
    model, ids = model_of(family), random_ids()
    student = as_mixture(model, Mixture(experts=5, experts_per_token=2, shared=shared), seed=3)
    assert student.config.model_type == becomes
    (first, *_) = find_routers(student)
    assert (first.num_experts, first.top_k, len(find_routers(student))) == (5, 2, 6)
    torch.testing.assert_close(logits(student, ids), logits(model, ids), rtol=0, atol=1e-5)
    chosen = {int(e) for e in _chosen(student, ids)}
    assert len(chosen) > 2  # a router that sends all tokens the same way would not be one
    student.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again, ids), logits(model, ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "shared"), [("llama", False), ("llama", True), ("qwen3", False), ("qwen2", True)]
)
def test_what_is_left_of_equality_is_the_rounding_of_router_weights(family, shared):
    """In float64 a block whose router weighs both experts with exactly one half is the MLP; a drawn router's weights
    are float32, whatever the model is in, and their products with the experts' outputs are rounded."""
    model = model_of(family)
    student = as_mixture(model, Mixture(experts=4, experts_per_token=2, shared=shared), seed=3).double()
    student.set_experts_implementation("eager")
    block, mlp = find_routers(student)[2].block, model.double().model.layers[2].mlp
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def apart():
        with torch.no_grad():
            found = block(x)
        return float(
            ((found[0] if isinstance(found, tuple) else found) - mlp(x)).abs().max() / mlp(x).abs().max()
        )

    assert 1e-10 < apart() < 1e-6
    dict(block.named_parameters())["gate.weight"].data.zero_()
    assert apart() < 1e-15


def _chosen(model, ids):
    from distill.moe.recording import record_routing

    with record_routing(model) as recording:
        logits(model, ids)
    return next(iter(recording.layers.values())).indices.unique()


def test_a_model_that_would_compute_something_else_is_refused(monkeypatch):
    """The guard behind the table: a partner whose attention differs."""
    model = model_of("llama")
    monkeypatch.setattr(type(model.model.layers[1].self_attn), "scaling", 1.0, raising=False)
    model.model.layers[1].self_attn.scaling = 1.0
    with pytest.raises(UserError, match="would compute something else"):
        as_mixture(model, Mixture(), seed=0)


@pytest.mark.parametrize(
    ("family", "section", "says"),
    [
        ("gemma3_text", {"mixture": Mixture()}, "known with shared: false are llama, mistral, qwen3"),
        ("qwen2", {"mixture": Mixture()}, "with `shared: true` it is known"),
        ("llama", {"dense": Dense()}, "is dense already"),
        ("llama", {"experts": {"drop": 0.5}}, "model is dense"),
    ],
)
def test_a_family_without_a_partner_is_refused_from_the_config_alone(family, section, says):
    with pytest.raises(UserError, match=says):
        derived_config(model_of(family).config, From(model="x", **section))


def test_averaging_copies_gives_the_dense_model_back():
    model, ids = model_of("qwen3"), random_ids()
    mixture = as_mixture(model, Mixture(experts=4, experts_per_token=2), seed=0)
    back, facts = as_dense(mixture, Dense(how="average"), Calibration(ids.tolist()))
    assert back.config.model_type == "qwen3" and facts["intermediate"] == model.config.intermediate_size
    torch.testing.assert_close(logits(back, ids), logits(model, ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "mixtral"])
def test_all_experts_side_by_side_are_a_mixture_that_uses_all_equally(family, tmp_path):
    """Every expert chosen by every token with the same weight: then nothing is lost by concatenating them."""
    sizes = {"n_routed_experts": 4} if family == "deepseek_v3" else {}
    model, ids = model_of(family, num_experts_per_tok=4, mlp_only_layers=[], **sizes), random_ids()
    for router in find_routers(model):
        router.router.weight.data.zero_()
    dense, _ = as_dense(model, Dense(experts=4), Calibration(ids.tolist()))
    assert not find_routers(dense)
    torch.testing.assert_close(logits(dense, ids), logits(model, ids), rtol=0, atol=1e-5)
    dense.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again, ids), logits(model, ids), rtol=0, atol=1e-5)


def test_the_most_weighted_experts_are_set_side_by_side():
    model, ids = model_of("qwen3_moe"), random_ids()
    made = derived(model, From(model="x", dense=Dense()), Calibration(ids.tolist()))
    planned = derived_config(model.config, From(model="x", dense=Dense()))
    assert planned.to_dict() == made.model.config.to_dict()
    assert made.model.config.intermediate_size == 48  # two experts of 24, and the dense layers' own 48
    assert made.did == ["experts concatenated into one MLP of 48"]
    assert all(len(kept) == 2 for kept in made.chosen["dense"]["experts"].values())
