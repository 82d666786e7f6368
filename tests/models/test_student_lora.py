"""What LoRA trains: every MoE family of transformers, asked four ways, gets exactly that or a reason why not.

The oracle is neither PEFT's account nor ours: an adapter with random weights is merged, and the tensors of the
model that changed are the ones it was on. Which ones were asked for is told by names and shapes alone.
"""

import re

import numpy as np
import pytest
import routing_reference as reference
import torch
from conftest import CHATML, QWEN3_MOE, byte_tokenizer, save_model
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from distill.config.recipe import load_recipe
from distill.config.training import Lora, StudentSection
from distill.errors import UserError
from distill.models.describe import format_trainable, trainable_table, weight_groups
from distill.models.student import (
    _shortest_endings,
    add_lora,
    assert_reached,
    assert_trained,
    build_student,
    check_student,
    plan_lora,
)

CPU = torch.device("cpu")
ASKED = {
    "attention": {"targets": "attention"},
    "all-linear": {"targets": "all-linear"},
    "experts": {"targets": (), "experts": True},
    "router": {"targets": (), "router": True},
}
# Why not, by family. Whatever is not here must work.
REFUSED = {
    ("dbrx", "experts"): "one rank among all",
    ("doge", "experts"): "one rank among all",
    ("granitemoehybrid", "attention"): "no such linear layers",  # two layers, both Mamba
    ("jamba", "attention"): "no such linear layers",
    ("jamba", "all-linear"): r"get no gradient.*mamba\.dt_proj",  # the mixer reads its weight past the layer
    ("laguna", "all-linear"): r"does not load again",
    ("longcat_flash", "router"): r"get no gradient.*router\.classifier",
    ("nemotron_h", "attention"): "no such linear layers",
    ("nemotron_h", "all-linear"): "PEFT refuses this LoRA.*Mamba",
    # Sixty-four tokens of context are fewer than it compresses: the compressor never runs.
    ("deepseek_v4", "attention"): r"get no gradient.*compressor",
    ("deepseek_v4", "all-linear"): r"get no gradient.*compressor",
}
for _family in ("axk2", "deepseek_v32", "dots3_note", "glm_moe_dsa", "hy_v4"):  # sparse attention's indexer
    REFUSED |= {(_family, case): r"get no gradient.*indexer" for case in ("attention", "all-linear")}


def asked_for(model: nn.Module, case: str) -> set[str]:
    """Names of the weights meant, from names and shapes alone."""
    sizes = {name: p.ndim for name, p in model.named_parameters()}
    router = {n for n in sizes if re.search(r"\.(gate|router|router_gate)\.", n)}
    if case == "router":
        return {n for n in router if sizes[n] == 2 and not n.endswith(("bias", "biases"))}
    if case == "experts":
        return {n for n, d in sizes.items() if d == 3 and re.search(r"\.experts\.|\.(in|out)put_linear\.", n)}
    linear = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Linear)} - router
    linear -= {"lm_head.weight"}
    return {n for n in linear if case == "all-linear" or "attn" in n or "attention" in n}


@pytest.mark.parametrize("family", reference.moe_families())
def test_every_family_trains_what_is_asked_or_says_why(family):
    model = reference.build(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.arange(3, 35)[None]
    with torch.no_grad():
        base = model(input_ids=ids, use_cache=False).logits
    for case, options in ASKED.items():
        lora = Lora(rank=2, alpha=2, **options)
        if reason := REFUSED.get((family, case)):
            with pytest.raises(UserError, match=reason):
                add_lora(model, lora)
            model = reference.build(family)
            continue
        wanted = asked_for(model, case)
        wrapped = add_lora(model, lora).eval()
        torch.manual_seed(1)
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                assert ".lora_" in name and parameter.dtype == torch.float32
                parameter.data.uniform_(-0.4, 0.4)
        with torch.no_grad():
            adapted = wrapped(input_ids=ids, use_cache=False).logits
            model = wrapped.merge_and_unload()
            merged = model(input_ids=ids, use_cache=False).logits
        changed = {n for n, tensor in model.state_dict().items() if not torch.equal(tensor, before[n])}
        assert changed == wanted, case
        heard = (adapted - base).abs().max()
        assert heard > 1e-5, case
        assert (adapted - merged).abs().max() < 0.02 * heard, case
        model.load_state_dict(before)


def test_the_refusals_are_of_families_that_exist():
    assert {family for family, _ in REFUSED} <= set(reference.moe_families())


def test_retargeting_by_peft_is_noticed():
    """Plain PEFT, asked for the shared experts of DeepSeek-V3, trains the routed ones: the check must say so."""
    from peft import LoraConfig, get_peft_model

    model = reference.build("deepseek_v3")
    wanted = [n.removesuffix(".weight") for n, g in weight_groups(model).items() if g == "shared experts"]
    assert len(wanted) == 6
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=wanted))
    with pytest.raises(UserError, match=r"6 tensors missing.*shared_experts.*4 others.*routed|experts"):
        assert_trained(wrapped, tuple(f"{name}.weight" for name in wanted))


def test_anything_else_that_trains_is_noticed():
    wrapped = add_lora(reference.build("mixtral"), Lora(rank=2, targets="attention"))
    weights = plan_lora(reference.build("mixtral"), Lora(rank=2, targets="attention")).weights
    assert_trained(wrapped, weights)
    wrapped.get_base_model().get_input_embeddings().weight.requires_grad_(True)
    with pytest.raises(UserError, match=r"0 tensors missing.*1 others trained.*embed_tokens"):
        assert_trained(wrapped, weights)


def test_the_backward_pass_leaves_nothing_behind():
    wrapped = add_lora(reference.build("qwen2_moe"), Lora(rank=2, experts=True))
    wrapped.train()
    state, before = torch.get_rng_state(), {n: p.clone() for n, p in wrapped.named_parameters()}
    assert_reached(wrapped)
    assert torch.equal(torch.get_rng_state(), state)
    assert wrapped.get_base_model().training
    assert all(p.grad is None and torch.equal(p, before[n]) for n, p in wrapped.named_parameters())


# ---- what the numbers mean ---------------------------------------------------------------------------


def random_adapter(model, lora: Lora):
    wrapped = add_lora(model, lora)
    torch.manual_seed(2)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data.uniform_(-0.5, 0.5)
    return wrapped


@pytest.mark.parametrize("rslora", [False, True])
def test_scaling(rslora):
    """W' = W + alpha / r * BA, with rsLoRA alpha / sqrt(r) (Kalajdzievski 2023, arXiv 2312.03732)."""
    model = reference.build("mixtral")
    module = model.model.layers[1].self_attn.q_proj
    weight = module.weight.detach().double().numpy().copy()
    wrapped = random_adapter(
        model, Lora(rank=4, alpha=6, rslora=rslora, targets=("layers.1.self_attn.q_proj",))
    )
    layer = wrapped.get_base_model().model.layers[1].self_attn.q_proj
    a, b = (side["default"].weight.detach().double().numpy() for side in (layer.lora_A, layer.lora_B))
    merged = wrapped.merge_and_unload().model.layers[1].self_attn.q_proj.weight.detach().numpy()
    np.testing.assert_allclose(merged, weight + (6 / 2 if rslora else 6 / 4) * b @ a, atol=1e-6)


def test_dora_is_the_papers():
    """W' = m * (W + BA) / |W + BA|, norms over each output's row (arXiv 2402.09353, equation 5)."""
    model = reference.build("mixtral")
    weight = model.model.layers[0].self_attn.k_proj.weight.detach().double().numpy().copy()
    wrapped = random_adapter(model, Lora(rank=3, alpha=3, dora=True, targets=("layers.0.self_attn.k_proj",)))
    layer = wrapped.get_base_model().model.layers[0].self_attn.k_proj
    a, b = (side["default"].weight.detach().double().numpy() for side in (layer.lora_A, layer.lora_B))
    m = layer.lora_magnitude_vector["default"].weight.detach().double().numpy()
    moved = weight + b @ a
    merged = wrapped.merge_and_unload().model.layers[0].self_attn.k_proj.weight.detach().numpy()
    expected = m[:, None] * moved / np.linalg.norm(moved, axis=1, keepdims=True)
    np.testing.assert_allclose(merged, expected, atol=1e-5)


def test_the_rank_is_that_of_each_expert():
    model = reference.build("qwen3_moe")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    merged = random_adapter(model, Lora(rank=2, alpha=2, targets=(), experts=True)).merge_and_unload()
    ranks = {
        int(torch.linalg.matrix_rank(change, atol=1e-4))
        for name, p in merged.named_parameters()
        if ".experts." in name
        for change in (p.detach() - before[name]).double()
    }
    assert ranks == {2}


# ---- how it is asked ---------------------------------------------------------------------------------


def test_explicit_endings():
    model = reference.build("deepseek_v3")
    plan = plan_lora(model, Lora(targets=("o_proj", "layers.1.mlp.shared_experts.down_proj"), router=True))
    assert set(plan.weights) == {
        "model.layers.0.self_attn.o_proj.weight",
        "model.layers.1.self_attn.o_proj.weight",
        "model.layers.1.mlp.shared_experts.down_proj.weight",
        "model.layers.0.mlp.gate.weight",
        "model.layers.1.mlp.gate.weight",
    }
    assert plan.modules == ("o_proj",)
    assert plan.parameters == ("1.mlp.shared_experts.down_proj.weight", "gate.weight")


def test_endings_that_mean_nothing_are_told_all_at_once():
    with pytest.raises(UserError) as caught:
        plan_lora(reference.build("deepseek_v3"), Lora(targets=("oproj", "gate", "q_a_layernorm", "o_proj")))
    first, second, third = caught.value.problems
    assert "'oproj' ends no module's name" in first and "o_proj" in first
    assert "'gate' names a weight of group 'router'; set student.lora.router: true" in second
    assert "group 'other'" in third


@given(st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=4), min_size=1, max_size=12), st.data())
def test_shortest_endings_select_exactly(names, data):
    everything = sorted({".".join(parts) for parts in names})
    wanted = {name for name in everything if data.draw(st.booleans())}

    def selected(patterns):  # as PEFT does
        return {n for n in everything if any(n == p or n.endswith(f".{p}") for p in patterns)}

    # A name that is itself the ending of an unwanted one cannot be told apart by endings.
    hidden = any(o.endswith(f".{w}") for w in wanted for o in set(everything) - wanted)
    if hidden:
        return
    patterns = _shortest_endings(wanted, everything)
    assert selected(patterns) == wanted
    for pattern in patterns:  # none could be shorter
        shorter = pattern.partition(".")[2]
        assert not shorter or not selected([shorter]) <= wanted


def test_what_is_not_defined_on_parameters_is_a_recipe_error(make_recipe):
    path, _ = make_recipe()
    for key, word in (("dora=true", "dora"), ("dropout=0.1", "dropout above 0")):
        with pytest.raises(
            UserError, match=f"adapts experts as bare parameters, where {word} does not exist"
        ):
            load_recipe(path, ["student.lora.experts=true", f"student.lora.{key}"])
    with pytest.raises(UserError, match="leaves nothing to train"):
        load_recipe(path, ["student.lora.targets=[]"])
    with pytest.raises(UserError, match="'attentoin' is not all-linear, attention or a list") as caught:
        load_recipe(path, ["student.lora.targets=attentoin"])
    assert len(caught.value.problems) == 1


DEEPSEEK_V3 = {
    "model_type": "deepseek_v3", "num_key_value_heads": 4, "moe_intermediate_size": 16, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": None,
    "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip


def test_refused_before_weights_are_loaded(tmp_path, monkeypatch):
    folder = save_model(tmp_path / "v3", DEEPSEEK_V3, byte_tokenizer(CHATML))
    monkeypatch.setattr("distill.models.load.load_model", lambda *_, **__: pytest.fail("weights were loaded"))
    for options in ({"dora": True}, {"dropout": 0.1}, {"targets": ("gate",)}):
        with pytest.raises(UserError):
            build_student(StudentSection(model=folder, lora=Lora(**options)), "fp32", CPU, 0)
    check_student(StudentSection(model=folder, lora=Lora(dora=True, targets="attention")), "fp32", CPU)


# ---- the table ---------------------------------------------------------------------------------------


def test_the_table_counts_by_hand(hub):
    student = build_student(
        StudentSection(model=hub["qwen3_moe"], lora=Lora(rank=2, targets="attention")), "fp32", CPU, 0
    )
    table = trainable_table(student.model)
    # hidden 32, 4 query and 2 key-value heads of 8, 2 layers: q and o 32x32, k and v 32x16
    assert table["attention"] == {
        "tensors": 8,
        "parameters": 2 * 2 * (2 * (32 + 32) + 2 * (32 + 16)),
        "of": 2 * (2 * 32 * 32 + 2 * 32 * 16),
    }
    assert table["routed experts"] == {"tensors": 0, "parameters": 0, "of": 2 * 4 * 3 * 32 * 24}
    assert table["router"]["of"] == 2 * 4 * 32
    assert sum(row["parameters"] for row in table.values()) == sum(
        p.numel() for p in student.trainable.values()
    )
    assert sum(row["of"] for row in table.values()) == sum(
        p.numel() for n, p in student.model.named_parameters() if ".lora_" not in n
    )
    assert "the routed experts" in format_trainable(student.model)
    full = build_student(StudentSection(model=hub["qwen3_moe"], adapter="full"), "fp32", CPU, 0)
    assert all(row["parameters"] == row["of"] for row in trainable_table(full.model).values())
    assert "stay frozen" not in format_trainable(full.model)


# ---- a rounded base ----------------------------------------------------------------------------------


def test_without_the_package_or_the_device_it_is_refused_first(hub, monkeypatch):
    section = StudentSection(model=hub["llama"], quantize="4bit")
    monkeypatch.setattr("distill.models.load.load_model", lambda *_, **__: pytest.fail("weights were loaded"))
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    with pytest.raises(UserError, match="quantize=4bit needs bitsandbytes: pip install"):
        build_student(section, "bf16", CPU, 0)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="goes with `adapter: lora`"):
        StudentSection(model="x", adapter="full", quantize="4bit")


@pytest.mark.parametrize("quantize", ["4bit", "8bit"])
def test_a_rounded_base_trains(tmp_path, quantize):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    with pytest.raises(UserError, match="does not run on meta"):
        check_student(StudentSection(model="x/y", quantize=quantize), "bf16", torch.device("meta"))
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    folder = save_model(tmp_path / "moe", {**QWEN3_MOE, **sizes}, byte_tokenizer(CHATML))
    with pytest.raises(UserError, match="not fp8"):
        build_student(StudentSection(model=folder, quantize=quantize), "fp8", CPU, 0)
    section = StudentSection(model=folder, quantize=quantize, lora=Lora(rank=4))
    student = build_student(section, "bf16", CPU, 0)
    rounded = {"4bit": bitsandbytes.nn.Linear4bit, "8bit": bitsandbytes.nn.Linear8bitLt}[quantize]
    kinds = {n.split(".")[-2] for n, m in student.base.named_modules() if isinstance(m, rounded)}
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj"}
    plain = build_student(StudentSection(model=folder, lora=Lora(rank=4)), "bf16", CPU, 0)
    assert trainable_table(student.model) == trainable_table(plain.model)  # sizes are the logical ones
    from distill.models.describe import describe_model

    described = describe_model(student.model)
    assert described["parameters_adapter"] == sum(p.numel() for p in student.trainable.values())

    frozen = {n: p.detach().clone() for n, p in student.model.named_parameters() if not p.requires_grad}
    ids = torch.randint(3, 200, (2, 24), generator=torch.Generator().manual_seed(0))
    optimizer, losses = torch.optim.AdamW(student.trainable.values(), lr=1e-2), []
    for _ in range(5):
        with torch.autocast("cpu", torch.bfloat16):
            loss = student.model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.02
    assert all(torch.equal(p, frozen[n]) for n, p in student.model.named_parameters() if n in frozen)


@pytest.mark.parametrize("quantize", ["4bit", "8bit"])
def test_looking_at_a_rounded_student_between_steps_leaves_its_gradients(tmp_path, quantize):
    """Validation and sampling call it in eval mode; on some CPUs bitsandbytes would then drop gradients silently."""
    pytest.importorskip("bitsandbytes")
    sizes = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128}
    folder = save_model(tmp_path / "llama", sizes, byte_tokenizer(CHATML))
    student = build_student(
        StudentSection(model=folder, quantize=quantize, lora=Lora(rank=4)), "bf16", CPU, 0
    )
    for name, parameter in student.trainable.items():
        if "lora_B" in name:  # away from 0, or half of the gradients are
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    ids = torch.randint(3, 200, (2, 24), generator=torch.Generator().manual_seed(0))

    def gradients():
        student.model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            student.model(input_ids=ids, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in student.trainable.items()}

    before = gradients()
    assert all(bool(g.abs().sum() > 0) for g in before.values())
    student.model.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        student.model(input_ids=ids)
    student.model.train()
    after = gradients()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_four_bits_are_nf4_of_the_stored_weights(tmp_path):
    """Every weight is its block's largest magnitude times the nearest NF4 level, up to the second rounding."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from distill.models.load import load_model

    sizes = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    folder = save_model(tmp_path / "llama", sizes, byte_tokenizer(CHATML))
    plain, rounded = load_model(folder, "fp32"), load_model(folder, "fp32", quantize="4bit")
    levels = np.array(
        [-1, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0, 0.0795803,
         0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1]
    )  # fmt: skip
    weight = plain.model.layers[0].mlp.up_proj.weight.detach().double().numpy().reshape(-1, 64)
    scale = np.abs(weight).max(1, keepdims=True)
    nearest = levels[np.abs((weight / scale)[..., None] - levels).argmin(-1)] * scale
    stored = rounded.model.layers[0].mlp.up_proj.weight
    got = bitsandbytes.functional.dequantize_4bit(stored.data, stored.quant_state).double().numpy()
    np.testing.assert_allclose(got.reshape(-1, 64), nearest, atol=0.02 * scale.max())
    assert type(rounded.lm_head) is nn.Linear and rounded.lm_head.weight.dtype == torch.float32


def test_routers_stay_whole_even_where_they_are_linear_layers():
    from distill.models.load import _kept_whole

    kept = _kept_whole(reference.build("dbrx").config)
    assert kept == ["lm_head", *(f"transformer.blocks.{i}.ffn.router.layer" for i in range(2))]
