"""Models with fewer layers: the kept ones compute what they computed, in every family that has kinds of layers."""

import math

import pytest
import torch
from tiny_families import FAMILIES, SIZES, model_of, random_ids
from transformers import AutoConfig, AutoModelForCausalLM

from distill.config.section import From
from distill.convert.calibrate import Calibration, angles
from distill.convert.derive import derived, derived_config, drop_layers, kept_layers
from distill.errors import UserError
from distill.models.layers import decoder_layers
from distill.models.load import load_model

KEEP = [0, 2, 4, 5]


@pytest.mark.parametrize("family", FAMILIES)
def test_kept_layers_compute_what_they_computed(family, tmp_path, monkeypatch):
    """Against the whole model whose other layers hand on what they are given; its masks and kinds stay in place."""
    model = model_of(family)
    student = drop_layers(model, KEEP)
    student.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    for number, layer in enumerate(decoder_layers(model)[1]):
        if number not in KEEP:
            monkeypatch.setattr(layer, "forward", lambda hidden_states, *args, **kwargs: hidden_states)
    ids = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        for found in (student, again):
            torch.testing.assert_close(found(input_ids=ids, use_cache=False).logits, expected)
    assert student.config.num_hidden_layers == len(KEEP)
    tied = student.get_output_embeddings().weight is student.get_input_embeddings().weight
    assert tied == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)


@pytest.mark.parametrize(
    ("asked", "kept"), [(10, [0, 3, 6, 10, 13, 16, 19, 23, 26, 29]), (2, [0, 29]), (1, [0]), ((1, 4), [1, 4])]
)
def test_counts_are_taken_evenly_with_both_ends(asked, kept):
    assert kept_layers(asked, 30) == kept


@pytest.mark.parametrize("asked", [0, 31, (), (3, 1), (1, 1), (0, 30)])
def test_layers_that_are_not_there_are_refused(asked):
    with pytest.raises(UserError, match=r"student\.from\.layers"):
        kept_layers(asked, 30)


def test_models_averaged_weight_by_weight(hub, tmp_path):
    """In float64, tied weights once; a model of another shape is refused."""
    section = From(model=hub["llama"], average=(str(tmp_path / "b"), str(tmp_path / "c")))
    first, *others = [load_model(hub["llama"], "fp32") for _ in range(3)]
    for number, model in enumerate(others):
        torch.manual_seed(number)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        model.save_pretrained(section.average[number])
    wanted = {
        name: sum(m.state_dict()[name].double() for m in (first, *others)) / 3 for name in first.state_dict()
    }
    made = derived(first, section)
    assert made.did == ["every weight the mean of 3 models"] and len(made.chosen["average"]) == 3
    for name, weight in made.model.state_dict().items():
        torch.testing.assert_close(weight, wanted[name].float(), rtol=0, atol=1e-7)
    with pytest.raises(UserError, match="is another kind of model"):
        derived(load_model(hub["llama"], "fp32"), From(model="x", average=(hub["qwen3_moe"],)))
    derived_config(first.config, section)  # nothing is read


def test_the_config_alone_says_the_same():
    model = model_of("gemma3_text")
    section = From(model="x", layers=(1, 2, 5))
    config = derived_config(model.config, section)
    assert config.layer_types == ["sliding_attention", "full_attention", "full_attention"]
    assert config.to_dict() == derived(model, section).model.config.to_dict()
    assert model.config.num_hidden_layers == 6  # the model it is made from stays as it is


def test_a_config_that_cannot_say_it_is_refused():
    """Every second layer is a mixture, by a step in the config: layers 1, 2, 5 are none, one, one."""
    config = AutoConfig.for_model(
        "qwen3_moe", **{**SIZES, **FAMILIES["qwen3_moe"], "mlp_only_layers": [], "decoder_sparse_step": 2}
    )
    model = AutoModelForCausalLM.from_config(config)
    assert drop_layers(model, [0, 1, 4, 5]).config.num_hidden_layers == 4
    with pytest.raises(UserError, match="would become another one"):
        drop_layers(model, [1, 2, 5])


def test_the_run_of_layers_that_turns_the_state_least_is_left_out():
    """Layers 2 and 3 add next to nothing: by angle they go, whatever stands evenly."""
    model, ids = model_of("llama"), random_ids()
    for number in (2, 3):
        for matrix in (model.model.layers[number].self_attn.o_proj, model.model.layers[number].mlp.down_proj):
            matrix.weight.data.mul_(1e-3)
    section = From(model="x", layers=4, by="angle")
    made = derived(model, section, Calibration(ids.tolist()))
    assert made.chosen["layers"] == [0, 1, 4, 5] and made.did == ["4 layers"]
    turns = angles(model, Calibration(ids.tolist()), 2)
    with torch.no_grad():
        states = model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
    cosine = torch.cosine_similarity(states[1][:, -1], states[3][:, -1], dim=-1)
    assert turns[1] == pytest.approx(float((cosine.arccos() / math.pi).mean()), abs=1e-5)
    assert derived_config(model.config, section).num_hidden_layers == 4


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({}, "say what becomes of the model"),
        ({"layers": (0, 1), "by": "angle"}, "give their number"),
        ({"experts": {"drop": 0.5}, "dense": {}}, "exclude each other"),
        ({"mixture": {"experts": 2, "experts_per_token": 3}}, "cannot use 3 of 2"),
        ({"width": {}}, "name what becomes narrower"),
    ],
)
def test_sections_that_say_nothing_or_two_things_are_refused(section, says):
    with pytest.raises(ValueError, match=says):
        From(model="x", **section)


def test_the_section_of_an_older_recipe_is_written_as_it_was():
    assert From(model="x", layers=3).identity() == {"model": "x", "layers": 3}
    assert From(model="x", experts={"drop": 0.5}).reads and not From(model="x", layers=3).reads
