"""The trained module equals plain autograd on any model: heads that scale and cap, LoRA, packing, compilation."""

import numpy as np
import pytest
import torch
from step_example import FAMILIES, MIXED, V, assert_close, build, gradients, rows
from transformers import AutoConfig, AutoModelForCausalLM

from distill.config.training import Lora
from distill.data.batches import check_packing
from distill.errors import UserError
from distill.models.hooks import AtHead, KeptLogits
from distill.models.student import add_lora
from distill.training import losses
from distill.training.live_teachers import FrozenTeacher
from distill.training.step import StudentStep


def plainly(model, teacher, batch, objectives):
    """Whole logits of the whole batch, then autograd: what everything else must equal."""
    q = model(**batch.inputs()).logits[batch.keep]
    with torch.no_grad():
        p = teacher(**batch.inputs()).logits[batch.keep]
    total = 0.0
    for o in objectives:
        of = batch.targets if o.signal == "targets" else p
        total = total + o.weight * getattr(losses, o.name)(q, of, **o.options).sum()
    return total


@pytest.mark.parametrize("family", FAMILIES)
def test_any_model_equals_plain_autograd(family):
    model, teacher = build(family), build("gemma2" if family == "granite" else "qwen3", seed=1).eval()
    step, batch = StudentStep(model, MIXED), rows().collate(np.arange(7), 0)
    assert step.head_form.startswith("fused")
    total, sums = step(batch, FrozenTeacher(teacher)(batch))
    total.backward()
    ours = gradients(model)
    expected = plainly(model, teacher, batch, MIXED)
    expected.backward()
    assert_close(ours, gradients(model))
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert float(sum(o.weight * s for o, s in zip(MIXED, sums))) == pytest.approx(expected.item(), rel=1e-5)


def test_what_follows_the_head_is_found_by_asking():
    found = {
        f: (AtHead(build(f)).scale, AtHead(build(f)).softcap)
        for f in ("qwen3", "gemma2", "granite", "cohere")
    }
    assert found == {
        "qwen3": (1.0, None),
        "gemma2": (1.0, 3.0),
        "granite": (pytest.approx(1 / 7), None),
        "cohere": (pytest.approx(0.2), None),
    }
    model = build("qwen3")
    model.forward = lambda forward=model.forward, **k: _squared(forward(**k))
    assert not AtHead(model).fusable, "an unknown transform is not guessed"
    assert StudentStep(model, MIXED).head_form.startswith("on whole logits")


def _squared(output):
    output.logits = output.logits * output.logits.abs()
    return output


def test_an_unknown_transform_still_trains_exactly():
    model, teacher = build("qwen3"), build("qwen3", seed=1).eval()
    model.forward = lambda forward=model.forward, **k: _squared(forward(**k))
    batch = rows().collate(np.arange(7), 0)
    StudentStep(model, MIXED)(batch, FrozenTeacher(teacher)(batch))[0].backward()
    ours = gradients(model)
    model._forward_pre_hooks.clear()
    plainly(model, teacher, batch, MIXED).backward()
    assert_close(ours, gradients(model))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_trains_the_same_with_a_frozen_head(checkpointing):
    from peft import LoraConfig, get_peft_model

    base, teacher = build("qwen3"), build("qwen3", seed=1).eval()
    model = get_peft_model(
        base, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    )
    batch = rows().collate(np.arange(7), 0)
    plainly(model, teacher, batch, MIXED).backward()
    expected = gradients(model)
    if checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
        base.enable_input_require_grads()
    StudentStep(model, MIXED)(batch, FrozenTeacher(teacher)(batch))[0].backward()
    assert_close(gradients(model), expected)
    assert base.lm_head.weight.grad is None


@pytest.mark.parametrize(
    "family, attention",
    [("qwen3", "eager"), ("qwen3", "sdpa"), ("gemma2", "eager"), ("olmoe", "sdpa"), ("gpt2", "eager")],
)
def test_packed_equals_padded(family, attention):
    model, teacher = build(family), build("qwen3", seed=1).eval()
    model.set_attn_implementation(attention)
    check_packing(model, V)
    step, data = StudentStep(model, MIXED), rows()
    found = []
    for batch in (data.collate(np.arange(7), 0), data.pack(np.arange(7))):
        total, _ = step(batch, FrozenTeacher(teacher)(batch))
        total.backward()
        found.append((total.item(), gradients(model)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert_close(found[0][1], found[1][1])


def test_a_model_that_sees_across_packed_rows_is_refused():
    torch.manual_seed(0)
    config = AutoConfig.for_model("mamba", vocab_size=V, hidden_size=16, num_hidden_layers=1, state_size=4)
    with pytest.raises(UserError, match=r"train.packing: .*set train.packing=false"):
        check_packing(AutoModelForCausalLM.from_config(config), V)


def test_a_model_that_counts_places_through_the_whole_pack_is_refused():
    """It sees no neighbour, yet a row that stands later is not what it is alone."""
    model = build("gpt2")
    model.set_attn_implementation("eager")
    check_packing(model, V)
    places = model.transformer.wpe

    def counted_through(module, arguments, found):
        return 30 * places.weight[torch.arange(found.shape[-2])].expand_as(found)

    places.register_forward_hook(counted_through)
    with pytest.raises(UserError, match="sees from one packed row into the next"):
        check_packing(model, V)


def test_the_heads_forward_is_back_after_an_error():
    model = build("qwen3")
    at = AtHead(model)
    with pytest.raises(RuntimeError, match="mine"):
        at(
            lambda _hidden: (_ for _ in ()).throw(RuntimeError("mine")),
            input_ids=torch.zeros(1, 2, dtype=torch.long),
        )
    assert (
        "forward" not in vars(model.lm_head)
        and model(torch.zeros(1, 2, dtype=torch.long)).logits.shape[-1] == V
    )


def test_kept_logits_serve_packed_rows_too():
    model, data = build("qwen3").eval(), rows()
    batch, packed = data.collate(np.arange(7), 0), data.pack(np.arange(7))
    with torch.no_grad(), KeptLogits(model) as kept:
        a = kept(keep=batch.keep, **batch.inputs())
        b = kept(keep=packed.keep, attention_mask=None, **packed.inputs())
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_accelerate_shards_layer_by_layer():
    """Its FSDP2 policy, asked of the module that it is given: every decoder layer is a unit, under LoRA too."""
    from types import SimpleNamespace

    from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    plugin = SimpleNamespace(
        auto_wrap_policy=transformer_auto_wrap_policy, transformer_cls_names_to_wrap=None
    )
    plain = build("qwen3")
    for model in (plain, add_lora(build("qwen3"), Lora(rank=2))):
        step = StudentStep(model, MIXED)
        policy = fsdp2_prepare_auto_wrap_policy(plugin, step)
        units = [type(m).__name__ for m in step.modules() if policy(m)]
        assert units == ["Qwen3DecoderLayer"] * len(plain.model.layers)
