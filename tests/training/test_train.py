"""The loop's arithmetic: invariances under SGD with ragged lengths, exact resume, and the flat twin."""

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import QWEN3_MOE, ROOT, byte_tokenizer
from safetensors.torch import load_file
from training_example import MIXED, SGD, assert_same, fake_dataset, losses_of, stopped_after

from distill.config.recipe import load_recipe
from distill.data.batches import TokenRows
from distill.errors import RunError, UserError
from distill.models.hooks import KeptLogits
from distill.storage import read_json
from distill.training.arms import train_arms
from distill.training.step import StudentStep
from distill.training.train import learning_rate


@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_accumulation_changes_nothing(trained, adapter):
    """1 x 6 = 2 x 3 = 6 x 1 rows: a mean of means would differ here, since lengths are ragged."""
    runs = {
        size: trained(f"m{size}", *SGD, MIXED, f"student.adapter={adapter}", f"train.micro_batch_size={size}")
        for size in (6, 3, 1)
    }
    for size in (3, 1):
        assert_same(runs[6][0], runs[size][0], 2e-6)
        assert losses_of(runs[6][1]) == pytest.approx(losses_of(runs[size][1]), abs=2e-6)
    assert losses_of(runs[6][1])[0] != losses_of(runs[6][1])[-1]


def test_loss_is_the_brute_force_mean_over_the_step(trained, hub):
    """The logged first loss equals float64 arithmetic over all completion tokens of the step, by hand."""
    from distill.data.batches import BatchPlan
    from distill.models.load import load_model

    _, run_dir = trained("brute", *SGD, MIXED, "train.steps=2", "train.micro_batch_size=2")
    rows = TokenRows.from_folder(run_dir / "dataset")
    student, teacher = load_model(hub["llama"], "fp32"), load_model(hub["qwen3_moe"], "fp32")
    ce, kl, count = 0.0, 0.0, 0
    for i in BatchPlan(rows.lengths, 6, 0).step_rows(0):
        prompt, completion = rows.row(i)
        ids = torch.tensor([[*prompt, *completion]])
        with torch.no_grad():
            q, p = (m(ids).logits[0].double().numpy() for m in (student, teacher))
        for t, token in enumerate(completion, start=len(prompt)):

            def log_softmax(x):
                x = x - x.max()
                return x - np.log(np.exp(x).sum())

            ce -= log_softmax(q[t - 1])[token]
            lp, lq = log_softmax(p[t - 1] / 2), log_softmax(q[t - 1] / 2)
            kl += (np.exp(lp) * (lp - lq)).sum()
            count += 1
    assert losses_of(run_dir)[0] == pytest.approx((ce + 0.5 * kl) / count, abs=1e-5)


def test_kept_logits_are_the_models_own(hub):
    """[N, V] equals the rows of [B, T, V] that the mask selects, for plain and LoRA models."""
    from distill.models.load import load_model

    model = load_model(hub["qwen3_moe"], "fp32")
    rows = TokenRows([[5, 6, 7], [8], [9, 10]], [[11, 1], [12, 13, 14, 1], [1]])
    batch = rows.collate(np.arange(3), pad_id=0)
    with torch.no_grad():
        full = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[batch.keep]
        with KeptLogits(model) as kept:
            some = kept(batch.input_ids, batch.attention_mask, batch.keep)
        after = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    torch.testing.assert_close(some, full, rtol=1e-5, atol=1e-6)
    assert some.shape == (7, model.config.vocab_size)
    assert after.shape[:2] == batch.input_ids.shape, "the hook is gone after the context"


@pytest.mark.parametrize(
    "options", [(), ("student.lora.dropout=0.3",), ("train.optimizer=sgd", "student.adapter=full")]
)
def test_resume_is_exact(trained, make_recipe, monkeypatch, options):
    """Stopped after 2 of 4 steps and continued: bit for bit the uninterrupted weights."""
    whole, whole_dir = trained("whole", *options, "control.enabled=false")

    # Two micro-batches a step: in the middle of step 3.
    stopped_after(5, monkeypatch, lambda: trained("stopped", *options, "control.enabled=false"))
    resumed, run_dir = trained("stopped", *options, "control.enabled=false")
    for name in whole:
        assert torch.equal(whole[name], resumed[name]), name
    assert losses_of(run_dir) == losses_of(whole_dir)
    counts, expected = (read_json(d / "student" / "manifest.json")["counts"] for d in (run_dir, whole_dir))
    assert counts["saved_bytes"] == expected["saved_bytes"] > 0, "of the run's first micro-batch"
    assert not list((run_dir / "student").glob("state-*")), "states are dropped once the weights are saved"


def test_the_minimal_twin_gives_the_same_losses(trained, hub, monkeypatch, capsys):
    import importlib.util
    import sys

    options = [
        "control.enabled=false",
        "train.schedule=constant",
        "train.warmup_steps=0",
        "student.lora.rank=4",
    ]
    kd = "train.objectives=[{name: cross_entropy}, {name: forward_kl}]"
    _, run_dir = trained("twin", *options, kd, "train.steps=5", "student.lora.alpha=8")
    spec = importlib.util.spec_from_file_location("minimal_kd", ROOT / "recipes" / "minimal_kd.py")
    minimal = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(minimal)
    arguments = (
        f"{run_dir}/dataset --teacher {hub['qwen3_moe']} --student {hub['llama']} --steps 5 --batch-size 6"
    )
    monkeypatch.setattr(sys, "argv", ["minimal_kd.py", *arguments.split(), "--rate", "1e-3", "--rank", "4"])
    assert minimal.main() == pytest.approx(losses_of(run_dir), abs=2e-5)
    assert len((ROOT / "recipes" / "minimal_kd.py").read_text().splitlines()) <= 120


def test_control_and_student_start_alike_and_train_equally(trained):
    _, run_dir = trained("arms", "control.enabled=true")
    student, control = (read_json(run_dir / arm / "manifest.json") for arm in ("student", "control"))
    for key in ("steps", "rows", "parameters_trainable"):
        assert student["counts"][key] == control["counts"][key]
    assert student["precision"]["name"] == "fp32"


def test_expert_bias_is_balanced_by_hand(make_recipe, tmp_path):
    """A DeepSeek-V3 student from scratch: its bias moves by multiples of u, against the load, and is saved."""
    tokenizer = byte_tokenizer(None)
    tokenizer.save_pretrained(tmp_path / "tok")
    config = (
        "{model_type: deepseek_v3, hidden_size: 32, num_hidden_layers: 2, first_k_dense_replace: 1, "
        "intermediate_size: 32, moe_intermediate_size: 16, n_routed_experts: 4, num_experts_per_tok: 2, n_group: 1, "
        "topk_group: 1, num_attention_heads: 2, num_key_value_heads: 2, q_lora_rank: null, kv_lora_rank: 8, "
        "qk_nope_head_dim: 8, qk_rope_head_dim: 8, v_head_dim: 8, max_position_embeddings: 128}"
    )
    path, run_dir = make_recipe()
    fake_dataset(run_dir)
    options = [
        "student.model=null", f"student.config={config}", f"student.tokenizer={tmp_path / 'tok'}",
        "student.adapter=full", "control.enabled=false", "train.expert_bias_step=0.01", "train.expert_bias_freeze=0.25",
    ]  # fmt: skip
    train_arms(load_recipe(path, options))
    saved = load_file(run_dir / "student" / "model.safetensors")
    (bias,) = [t for n, t in saved.items() if n.endswith("e_score_correction_bias")]
    steps = (bias / 0.01).round()
    torch.testing.assert_close(bias, steps * 0.01, atol=1e-6, rtol=0)
    assert steps.abs().max() in (1, 2, 3) and steps.abs().sum() > 0, "three of four steps move the bias"


def test_bias_update_is_the_papers_rule(hub):
    from transformers import AutoConfig, AutoModelForCausalLM

    from distill.training.losses.routers import ExpertBiasBalancer

    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = AutoConfig.for_model(**QWEN3_MOE, **small, intermediate_size=8, vocab_size=9)
    with pytest.raises(UserError, match="selection bias"):
        ExpertBiasBalancer(AutoModelForCausalLM.from_config(config))
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "deepseek_v3", hidden_size=16, num_hidden_layers=2, first_k_dense_replace=0, moe_intermediate_size=8,
        n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, num_attention_heads=2, vocab_size=30,
        num_key_value_heads=2, q_lora_rank=None, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    balancer = ExpertBiasBalancer(model)
    router = balancer.routers[0]
    seen = []
    router.experts.register_forward_pre_hook(lambda _m, args: seen.append(args[1]))
    ids = torch.randint(0, 30, (3, 8))
    balancer.mask = torch.ones(3, 8, dtype=torch.long)
    balancer.mask[0, 5:] = 0
    with torch.no_grad():
        model.eval()(ids)  # a look at held-out rows counts nothing
    seen.clear()
    model.train()
    model(ids)
    load = torch.bincount(seen[0][balancer.mask.reshape(-1).bool()].reshape(-1), minlength=4).double()
    assert load.sum() == 21 * 2
    balancer.counts[1].fill_(7)  # an even layer: the step's violation is that of the worst one
    violation = balancer.update(0.001)
    torch.testing.assert_close(router.bias, (0.001 * torch.sign(load.mean() - load)).float())
    assert violation == pytest.approx(float(load.max() / load.mean() - 1)) and violation > 0
    assert not balancer.routers[1].bias.any()
    assert [float(counts.sum()) for counts in balancer.counts] == [0, 0]


def test_a_step_that_is_not_finite_stops_the_run_and_keeps_the_state(trained, make_recipe, monkeypatch):
    real, calls = StudentStep.forward, []

    def explodes(*args):
        calls.append(1)
        total, terms = real(*args)
        return total, terms * (float("nan") if len(calls) > 4 else 1.0)

    monkeypatch.setattr(StudentStep, "forward", explodes)
    with pytest.raises(RunError, match=r"step 3: the loss is \[nan\]; lower"):
        trained("nan", "control.enabled=false", "train.objectives=[{name: cross_entropy}]")


def test_learning_rate_schedule(make_recipe):
    path, _ = make_recipe()
    train = load_recipe(path, ["train.steps=11", "train.warmup_steps=1", "train.final_fraction=0.1"]).train
    rates = [learning_rate(train, step) / train.learning_rate for step in range(11)]
    assert rates[0] == rates[1] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.1)
    assert rates[5] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 4 / 9)))
    assert all(a >= b for a, b in itertools.pairwise(rates))


def test_rows_longer_than_the_model_are_refused(make_recipe):
    path, run_dir = make_recipe()
    fake_dataset(run_dir, longest=30)
    with pytest.raises(UserError, match=r"set filter\.max_tokens=16"):
        train_arms(load_recipe(path, ["train.max_length=16"]))
