"""The loop against numbers worked out here in plain torch: a few optimizer steps by hand, dropout, a resume's counts.

Tests of equivalence (8 x 1 = 1 x 8, resumed = undisturbed) have the changed code on both sides. These do not: what
they compare with shares nothing with the loop but torch and the model.
"""

import hashlib
import json

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import CHATML, byte_tokenizer, save_model
from training_example import fake_dataset, losses_of, stopped_after
from transformers import AutoModelForCausalLM

from distill.config.recipe import load_recipe
from distill.data.batches import TokenRows
from distill.errors import RunError, UserError
from distill.models.student import BuiltStudent
from distill.storage import read_json
from distill.training.arms import train_arms
from distill.training.losses.routers import ExpertBiasBalancer
from distill.training.sources import OnPolicyRows
from distill.training.step import StudentStep
from distill.training.train import StepFound, _check_finite, _check_lengths, learning_rate, make_optimizer

# Six rows and steps of six rows: every step is all of them, whatever the plan of batches is.
ROWS = 6
PLAIN = ["control.enabled=false", "train.batch_size=6", "train.micro_batch_size=4", "student.adapter=full"]
FLAT = ["train.schedule=constant", "train.warmup_steps=0"]


def few(make_recipe, name: str, rows: int = ROWS) -> TokenRows:
    """A dataset of a few rows for the run of this name."""
    _, run_dir = make_recipe(name=name)
    fake_dataset(run_dir, rows=rows, seed=3)
    return TokenRows.from_folder(run_dir / "dataset")


def by_hand(folder: str, rows: TokenRows, rates: list[float], decay: float, most: float):
    """(weights, losses, gradient norms) of plain SGD: mean cross-entropy over all completion tokens of all rows."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    losses, norms = [], []
    for rate in rates:
        total, count = 0.0, 0
        for prompt, completion in map(rows.row, range(len(rows))):
            logits = model(torch.tensor([[*prompt, *completion]])).logits[0]
            for place, token in enumerate(completion, start=len(prompt)):
                total = total - logits[place - 1].log_softmax(-1)[int(token)]
                count += 1
        model.zero_grad()
        (total / count).backward()
        norm = sum(float(p.grad.square().sum()) for p in model.parameters()) ** 0.5
        losses.append(float(total.detach()) / count)
        norms.append(norm)
        with torch.no_grad():
            for p in model.parameters():
                shrunk = p.grad * min(1.0, most / norm)
                p -= rate * (shrunk + (decay * p if p.dim() > 1 else 0.0))
    return model.state_dict(), losses, norms


@pytest.mark.parametrize(
    "most, decay",
    [(1000.0, 0.0), (0.5, 0.0), (1000.0, 0.3)],
    ids=["plain", "clipped", "decayed"],
)
def test_sgd_steps_are_those_worked_out_by_hand(trained, make_recipe, hub, most, decay):
    """Tokens kept are divided by, not tokens read; clipped before the step; matrices decay, vectors do not."""
    rows = few(make_recipe, "hand")
    options = [
        *PLAIN, *FLAT, "train.optimizer=sgd", "train.learning_rate=0.5", "train.steps=2",
        f"train.max_grad_norm={most}", f"train.weight_decay={decay}",
    ]  # fmt: skip
    found, run_dir = trained("hand", *options)
    want, losses, norms = by_hand(hub["llama"], rows, [0.5, 0.5], decay, most)
    assert norms[0] > 1, "or clipping to 0.5 would do little"
    assert losses_of(run_dir) == pytest.approx(losses, abs=1e-5)
    lines = [json.loads(line) for line in (run_dir / "student" / "metrics.jsonl").read_text().splitlines()]
    assert [line["grad_norm"] for line in lines] == pytest.approx(norms, rel=1e-4)
    assert [line["lr"] for line in lines] == [0.5, 0.5]
    assert [line["tokens"] for line in lines] == [rows.completion_lengths.sum()] * 2
    start = AutoModelForCausalLM.from_pretrained(hub["llama"]).state_dict()
    for name, tensor in found.items():
        torch.testing.assert_close(
            tensor.double(), want[name], rtol=0, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
        assert (tensor - start[name]).abs().max() > 2e-5, f"{name} must move, or nothing was tried"


def test_every_step_has_its_own_rate(trained, make_recipe, hub):
    """Two steps of warm-up, then half a cosine down to a tenth: 0.25, 0.5, 0.5, 0.275, 0.05."""
    rows = few(make_recipe, "rates")
    options = [
        *PLAIN, "train.optimizer=sgd", "train.learning_rate=0.5", "train.steps=5", "train.warmup_steps=2",
        "train.final_fraction=0.1", "train.max_grad_norm=1000",
    ]  # fmt: skip
    found, run_dir = trained("rates", *options)
    rates = [0.25, 0.5, 0.5, 0.275, 0.05]
    want, losses, _ = by_hand(hub["llama"], rows, rates, 0.0, 1000.0)
    lines = [json.loads(line) for line in (run_dir / "student" / "metrics.jsonl").read_text().splitlines()]
    assert [line["lr"] for line in lines] == pytest.approx(rates)
    assert losses_of(run_dir) == pytest.approx(losses, abs=1e-5)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.double(), want[name], rtol=0, atol=1e-5)


def test_adamw_steps_are_those_of_the_paper(make_recipe):
    """Three steps of Loshchilov and Hutter's AdamW (arXiv 1711.05101, algorithm 2), entry by entry, in numpy."""
    path, _ = make_recipe()
    options = ["train.learning_rate=0.01", "train.weight_decay=0.5", "train.betas=[0.8, 0.99]"]
    train = load_recipe(path, options).train
    rng = np.random.default_rng(0)
    start = {"matrix": rng.normal(size=(3, 4)), "vector": rng.normal(size=5)}
    gradients = [{name: rng.normal(size=value.shape) for name, value in start.items()} for _ in range(3)]
    parameters = {n: torch.nn.Parameter(torch.tensor(v, dtype=torch.float32)) for n, v in start.items()}
    optimizer = make_optimizer(train, list(parameters.values()))
    for step in gradients:
        for name, parameter in parameters.items():
            parameter.grad = torch.tensor(step[name], dtype=torch.float32)
        optimizer.step()
    for name, value in start.items():
        first, second = np.zeros_like(value), np.zeros_like(value)
        for t, step in enumerate(gradients, start=1):
            value = value * (1 - 0.01 * (0.5 if name == "matrix" else 0.0))
            first, second = 0.8 * first + 0.2 * step[name], 0.99 * second + 0.01 * step[name] ** 2
            value = value - 0.01 * (first / (1 - 0.8**t)) / (np.sqrt(second / (1 - 0.99**t)) + 1e-8)
        np.testing.assert_allclose(parameters[name].detach().numpy(), value, atol=1e-6)


# ---- dropout -------------------------------------------------------------------------------------------


def random_states(trained, monkeypatch, name: str, rank: int, *options: str) -> list[str]:
    """What torch's generator is at the start of every step's forward pass, in the process of this rank."""
    real, seen = StudentStep.forward, []

    def forward(*arguments):
        seen.append(hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest())
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(StudentStep, "forward", forward)
        patch.setattr(Accelerator, "process_index", property(lambda _: rank))
        trained(name, *PLAIN, "train.micro_batch_size=6", "train.steps=3", *options)
    return seen


def test_dropout_is_drawn_anew_for_every_step_and_rank(trained, make_recipe, monkeypatch):
    for name in ("zero", "one", "again", "seed"):
        few(make_recipe, name)
    zero, one = (random_states(trained, monkeypatch, n, rank) for n, rank in (("zero", 0), ("one", 1)))
    assert len(set(zero + one)) == 6, "three steps on two ranks: six different streams"
    assert random_states(trained, monkeypatch, "again", 1) == one, "the same again"
    assert not set(random_states(trained, monkeypatch, "seed", 0, "seed=1")) & set(zero)


def test_dropout_is_on_while_training(trained, make_recipe, tmp_path):
    """At a rate of nearly 0 a step of all rows has the same loss every time, were it not for dropout."""
    folder = save_model(
        tmp_path / "dropping", {"model_type": "llama", "attention_dropout": 0.5}, byte_tokenizer(CHATML)
    )
    losses = {}
    for name, student in (("still", "llama"), ("drops", folder)):
        _, run_dir = make_recipe(student=student, name=name)
        fake_dataset(run_dir, rows=ROWS, seed=3)
        _, run_dir = trained(name, *PLAIN, "train.learning_rate=1e-12", student=student)
        losses[name] = np.array(losses_of(run_dir))
    assert np.ptp(losses["still"]) < 1e-6
    assert min(abs(a - b) for i, a in enumerate(losses["drops"]) for b in losses["drops"][:i]) > 1e-4


def test_a_look_at_held_out_rows_has_no_dropout_and_leaves_it_on(trained, make_recipe, tmp_path):
    """At a rate of nearly 0 all looks agree, the first of equals is the best, and training goes on with dropout."""
    folder = save_model(
        tmp_path / "dropping", {"model_type": "llama", "attention_dropout": 0.5}, byte_tokenizer(CHATML)
    )
    _, run_dir = make_recipe(student=folder, name="looks")
    fake_dataset(run_dir, rows=16, seed=3)
    held = "train.validation={rows: 10, every: 2}"
    _, run_dir = trained("looks", *PLAIN, held, "train.steps=5", "train.learning_rate=1e-12", student=folder)
    lines = [json.loads(line) for line in (run_dir / "student" / "metrics.jsonl").read_text().splitlines()]
    looks = [line.get("validation") for line in lines]
    assert [look is not None for look in looks] == [False, True, False, True, True], (
        "every second, and the last"
    )
    assert looks[1] == looks[3] == looks[4]
    assert read_json(run_dir / "student" / "manifest.json")["counts"]["validation"]["best_step"] == 2
    losses = losses_of(run_dir)
    assert min(abs(a - b) for i, a in enumerate(losses) for b in losses[:i]) > 1e-4


def test_the_bias_of_experts_counts_real_tokens_and_freezes_at_the_end(make_recipe, tmp_path, monkeypatch):
    tokenizer = byte_tokenizer(CHATML)
    sizes = {
        "model_type": "deepseek_v3", "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4,
        "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    }  # fmt: skip
    student = save_model(tmp_path / "mixture", sizes, tokenizer)
    path, run_dir = make_recipe(student=student, name="bias")
    fake_dataset(run_dir, rows=ROWS, seed=3)
    rows = TokenRows.from_folder(run_dir / "dataset")
    real, seen = ExpertBiasBalancer.update, []

    def update(self, u, reduce):
        seen.append((u, int(self.counts[0].sum())))
        return real(self, u, reduce)

    monkeypatch.setattr(ExpertBiasBalancer, "update", update)
    bias = ["train.expert_bias_step=0.01", "train.expert_bias_freeze=0.25", "train.steps=4"]
    train_arms(load_recipe(path, [*PLAIN, *bias]), say=lambda _: None)
    inputs = int(rows.lengths.sum()) - ROWS  # the last token of a row is predicted and never read
    assert seen == [(0.01, 2 * inputs)] * 3 + [(0.0, 2 * inputs)], (
        "two experts a token; the last quarter is frozen"
    )


# ---- what stops a run --------------------------------------------------------------------------------------


def found(loss: float, norm: float) -> StepFound:
    return StepFound(torch.tensor([10.0, 10 * loss, 0.0]), torch.tensor(norm), None, tokens=10)


def test_losses_and_gradients_that_are_not_finite_stop_it():
    nan, inf = float("nan"), float("inf")
    assert found(2.0, 1.0).means == [1.0, 2.0] and not found(2.0, 1.0).stop
    _check_finite(0, found(2.0, 1.0), scaled=False)
    _check_finite(0, found(2.0, inf), scaled=True)  # the loss scaler skips such a step
    with pytest.raises(RunError, match="step 8: the loss is"):
        _check_finite(7, found(nan, 1.0), scaled=True)
    with pytest.raises(RunError, match="step 8: the gradient norm is inf"):
        _check_finite(7, found(2.0, inf), scaled=False)


def test_rows_fit_to_the_token(make_recipe, hub):
    path, _ = make_recipe()
    train = load_recipe(path, ["train.max_length=16"]).train
    student = BuiltStudent(AutoModelForCausalLM.from_pretrained(hub["llama"]), byte_tokenizer(CHATML))

    def of(length: int) -> TokenRows:
        return TokenRows([[5] * (length - 2)], [[6, 1]])

    _check_lengths(train, student, of(16))
    with pytest.raises(UserError, match="rows of 17 tokens and the student takes 16"):
        _check_lengths(train, student, of(17))
    free = train.model_copy(update={"max_length": None})
    _check_lengths(free, student, of(512))
    with pytest.raises(UserError, match="the student takes 512"):
        _check_lengths(free, student, of(513))


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_the_rate_rises_evenly_and_falls_as_a_cosine(make_recipe, schedule):
    path, _ = make_recipe()
    options = ["train.steps=9", "train.warmup_steps=4", "train.final_fraction=0.2", "train.learning_rate=0.1"]
    train = load_recipe(path, [*options, f"train.schedule={schedule}"]).train
    falling = [0.1, 0.1 * (0.6 + 0.4 * 0.5**0.5), 0.06, 0.1 * (0.6 - 0.4 * 0.5**0.5), 0.02]
    want = [0.025, 0.05, 0.075, 0.1, *(falling if schedule == "cosine" else [0.1] * 5)]
    assert [learning_rate(train, step) for step in range(9)] == pytest.approx(want)


# ---- what a resume brings back ---------------------------------------------------------------------------


def test_tokens_of_a_resumed_run_are_all_that_were_trained(trained, make_recipe, monkeypatch):
    rows = few(make_recipe, "stopped")
    options = [*PLAIN, "train.micro_batch_size=6", "train.steps=5"]
    stopped_after(3, monkeypatch, lambda: trained("stopped", *options))
    _, run_dir = trained("stopped", *options)
    counts = read_json(run_dir / "student" / "manifest.json")["counts"]
    assert counts["tokens"] == 5 * rows.completion_lengths.sum()
    assert counts["tokens_read"] == 5 * (rows.completion_lengths.sum() + rows.prompt_lengths.sum())
    assert (counts["steps"], counts["rows"]) == (5, 30)


def test_a_resumed_run_remembers_its_best_look_and_its_patience(trained, make_recipe, monkeypatch):
    """Rows of chance are learned by heart, so the first look stays the best, and the fourth ends the run."""
    few(make_recipe, "patient", rows=16)
    options = [
        *PLAIN, *FLAT, "train.micro_batch_size=6", "train.learning_rate=0.02", "train.steps=30",
        "train.validation={rows: 10, every: 1, patience: 3, keep_best: true}",
    ]  # fmt: skip
    stopped_after(3, monkeypatch, lambda: trained("patient", *options))
    _, run_dir = trained("patient", *options)
    lines = [json.loads(line) for line in (run_dir / "student" / "metrics.jsonl").read_text().splitlines()]
    values = [line["validation"] for line in lines]
    assert len(values) == 4 and values.index(min(values)) == 0, values
    counts = read_json(run_dir / "student" / "manifest.json")["counts"]
    assert counts["validation"] == {"rows": 10, "best": values[0], "best_step": 1}
    assert (counts["steps"], counts["rows"]) == (4, 24), "those that were trained, not those asked for"


def test_a_resumed_buffer_is_read_and_not_written_again(trained, make_recipe, monkeypatch):
    """Steps 0 to 3 share a buffer. The rate is large: what the student would write after two steps is another text."""
    options = [
        *PLAIN, *FLAT, "train.micro_batch_size=6", "train.steps=6", "train.learning_rate=0.05",
        "train.objectives=[{name: reverse_kl}]",
        "train.on_policy={fraction: 1.0, buffer_steps: 4, max_new_tokens: 6, most_truncated: 1.0}",
    ]  # fmt: skip
    real, filled = OnPolicyRows._fill, []
    monkeypatch.setattr(OnPolicyRows, "_fill", lambda self, *a: (filled.append(a[0]), real(self, *a)))
    losses = {}
    for name in ("whole", "resumed", "forgotten"):
        few(make_recipe, name)
    losses["whole"] = losses_of(trained("whole", *options)[1])
    assert filled == [0, 4]
    for name in ("resumed", "forgotten"):
        stopped_after(2, monkeypatch, lambda n=name: trained(n, *options))
        filled.clear()
        with monkeypatch.context() as patch:
            if name == "forgotten":
                patch.setattr(OnPolicyRows, "restore", lambda *_: None)
            losses[name] = losses_of(trained(name, *options)[1])
        assert filled == ([4] if name == "resumed" else [2, 4])
    assert losses["resumed"] == losses["whole"]
    assert abs(losses["forgotten"][2] - losses["whole"][2]) > 1e-4, "or this test could not fail"
