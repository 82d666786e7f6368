"""The teacher's hidden states as a signal: every logit again, without its body. And a live teacher that remembers."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from training_example import losses_of
from transformers import AutoModelForCausalLM

import distill.training.arms
import distill.training.open_teachers
from distill.data.batches import TokenRows
from distill.data.scoring import score_rows
from distill.data.signals import SignalFormat, StoredSignals, decode_hidden, encode_hidden
from distill.models.hooks import Head, load_head, save_head
from distill.storage import read_json
from distill.training.live_teachers import FrozenTeacher, StoredTeacher

SGD = ["train.optimizer=sgd", "train.learning_rate=0.5", "control.enabled=false", "train.max_grad_norm=1000"]
EXACT = "generate.signal={kind: hidden, bits: 32}"
SHORT = "generate.signal={kind: hidden}"
KL = "train.objectives=[{name: forward_kl, temperature: 2.0}, {name: reverse_kl}, {name: cross_entropy, weight: 0.5}]"
OPTIONS = [*SGD, "train.steps=5", "train.precision=fp32"]


def form(width: int, bits: int = 16) -> SignalFormat:
    return SignalFormat("hidden", width, 258, 1.0, bits, {})


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 40), st.floats(-30, 30))
def test_states_come_back_to_their_precision(seed, tokens, width, power):
    states = (np.random.default_rng(seed).standard_normal((tokens, width)) * 2.0**power).astype(np.float32)
    ids, values = encode_hidden(form(width), states)
    assert len(ids) + len(values) == tokens * form(width).bytes_per_token() == tokens * (4 + 2 * width)
    (found,) = decode_hidden(form(width), tokens, ids, values)
    largest = np.abs(states).max(axis=1, keepdims=True)
    assert (np.abs(found - states) <= np.abs(states) * 2.0**-11 + largest * 2.0**-24).all()
    (exact,) = decode_hidden(form(width, 32), tokens, *encode_hidden(form(width, 32), states))
    assert np.array_equal(exact, states)


def test_states_of_bfloat16_come_back_as_they_were():
    states = torch.randn(50, 64, dtype=torch.float64).mul(torch.randn(50, 1).exp() * 1e3).bfloat16().float()
    states = torch.where(states.abs() < states.abs().amax(1, keepdim=True) * 2**-16, 0, states).numpy()
    (found,) = decode_hidden(form(64), 50, *encode_hidden(form(64), states))
    assert np.array_equal(found, states)
    zeros = np.zeros((2, 64), dtype=np.float32)
    assert np.array_equal(decode_hidden(form(64), 2, *encode_hidden(form(64), zeros))[0], zeros)


def test_a_head_comes_back_with_what_it_does_after_the_product(tmp_path):
    head = Head(torch.randn(7, 3).bfloat16(), torch.randn(7), 0.25, 30.0)
    save_head(tmp_path / "head.safetensors", head)
    found = load_head(
        tmp_path / "head.safetensors", torch.device("cpu", 1)
    )  # as a process of a launch is told
    assert torch.equal(found.weight, head.weight) and torch.equal(found.bias, head.bias)
    assert (found.scale, found.softcap) == (0.25, 30.0)
    (tmp_path / "head.safetensors").write_bytes(b"no")
    with pytest.raises(Exception, match="no output head of a teacher"):
        load_head(tmp_path / "head.safetensors", torch.device("cpu"))


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_stored_states_give_the_logits_of_the_model(hub, family):
    """Against a plain forward pass, row by row, without padding."""
    model = AutoModelForCausalLM.from_pretrained(hub[family]).eval()
    rng = np.random.default_rng(0)
    rows = TokenRows(*([rng.integers(2, 250, rng.integers(1, 12)).tolist() for _ in range(9)] for _ in "pc"))
    shape = form(model.config.hidden_size, 32)
    keys = [(0, f"p{i}", 0) for i in range(9)]
    scores = score_rows(model, rows, shape, keys=keys, pad_id=0, vocabulary=258, batch_size=4)
    rows.signals = StoredSignals(shape, [s.signal_ids for s in scores], [s.signal_values for s in scores])
    batch = rows.collate(np.arange(9), 0)
    head = Head(model.lm_head.weight.detach())
    (logits,) = StoredTeacher(head)(batch)["dense"].chunk(slice(0, 10**6), None)
    want, said = [], []
    for i in range(9):
        prompt, completion = map(torch.from_numpy, rows.row(i))
        with torch.no_grad():
            z = model(torch.cat([prompt, completion])[None].long()).logits[0, len(prompt) - 1 : -1].double()
        want.append(z)
        said.append(z[:, :258].log_softmax(-1).gather(1, completion[:, None].long())[:, 0])
    torch.testing.assert_close(logits.double(), torch.cat(want), rtol=0, atol=2e-5)
    found = torch.tensor([x for s in scores for x in s.logprobs]).double()
    torch.testing.assert_close(found, torch.cat(said), rtol=0, atol=2e-5)


def made(run_cli, path, *overrides):
    for stage in ("generate", "filter"):
        code, _, err = run_cli(stage, path, *overrides)
        assert code == 0, err


def trained(run_cli, path, run_dir, *overrides) -> list[float]:
    code, _, err = run_cli("train", path, *overrides)
    assert code == 0, err
    return losses_of(run_dir)


def test_a_student_of_stored_states_is_that_of_the_live_teacher(make_recipe, run_cli, monkeypatch):
    path, run_dir = make_recipe(name="stored")
    short_path, short_dir = make_recipe(name="short")
    live_path, live_dir = make_recipe(name="live")
    made(run_cli, path, EXACT)
    made(run_cli, short_path, SHORT)
    made(run_cli, live_path)
    live = trained(run_cli, live_path, live_dir, *OPTIONS, KL)
    monkeypatch.setattr(
        distill.training.open_teachers, "load_model", lambda *_, **__: pytest.fail("the teacher was loaded")
    )
    assert trained(run_cli, path, run_dir, EXACT, *OPTIONS, KL) == pytest.approx(live, abs=2e-6)
    assert trained(run_cli, short_path, short_dir, SHORT, *OPTIONS, KL) == pytest.approx(live, abs=1e-3)
    manifest = read_json(run_dir / "dataset" / "manifest.json")
    assert "head.safetensors" in manifest["files"] and manifest["signal"]["kind"] == "hidden"
    assert manifest["signal"]["bytes_per_token"] == 4 * manifest["signal"]["k"]
    flops = [read_json(d / "student" / "manifest.json")["flops"] for d in (run_dir, live_dir)]
    assert flops[0] < flops[1]


def test_what_stored_states_cannot_give_is_refused_before_anything_is_done(make_recipe, run_cli):
    path, run_dir = make_recipe(name="refused")
    for more in (
        ["train.objectives=[{name: reverse_kl}]", "train.on_policy={fraction: 0.5}"],
        ["train.objectives=[{name: reverse_kl}]", "train.teachers={own_start: true}"],
        ["train.objectives=[{name: hidden_cosine}]"],
        ["train.objectives=[{name: sparse_forward_kl}]"],
        ["train.objectives=[{name: forward_kl}]", "filter.completions=answer"],
    ):
        code, _, err = run_cli("run", path, SHORT, *more)
        assert code == 2 and "Traceback" not in err, (more, err)
    assert not run_dir.exists()


def test_a_row_without_its_head_or_with_another_is_told(make_recipe, run_cli):
    path, run_dir = make_recipe(name="damaged")
    made(run_cli, path, SHORT)
    head = run_dir / "dataset" / "head.safetensors"
    data = bytearray(head.read_bytes())
    data[-1] ^= 1
    head.write_bytes(bytes(data))
    code, _, err = run_cli("train", path, SHORT, *OPTIONS, KL)
    assert code == 2 and "head.safetensors" in err and "Traceback" not in err


# ---- a live teacher that remembers -----------------------------------------------------------------------------


def counting(model):
    calls = []
    model.register_forward_pre_hook(
        lambda _m, _a, named: calls.append(named["input_ids"].shape), with_kwargs=True
    )
    return calls


@pytest.mark.parametrize("packed", [False, True])
def test_rows_that_were_read_are_not_read_again(hub, packed):
    model = AutoModelForCausalLM.from_pretrained(hub["llama"]).eval()
    rng = np.random.default_rng(0)
    rows = TokenRows(*([rng.integers(2, 250, rng.integers(1, 12)).tolist() for _ in range(6)] for _ in "pc"))
    batch = (lambda i: rows.pack(np.array(i))) if packed else (lambda i: rows.collate(np.array(i), 0))
    plain, remembering = FrozenTeacher(model), FrozenTeacher(model, 1e6)

    def logits(teacher, indices):
        return teacher(batch(indices))["dense"].chunk(slice(0, 10**6), None)[0].clone()

    calls = counting(model)
    for indices, read in (([0, 1, 2], 3), ([2, 0], 0), ([3, 1, 4], 2), ([4, 3], 0), ([5], 1)):
        want = logits(plain, indices)
        calls.clear()
        torch.testing.assert_close(logits(remembering, indices), want, rtol=0, atol=1e-5)
        if packed:
            assert len(calls) == (read > 0)
        else:
            assert [shape[0] for shape in calls] == ([read] if read else [])


def test_a_full_memory_takes_no_more_and_stays_right(hub):
    model = AutoModelForCausalLM.from_pretrained(hub["llama"]).eval()
    rng = np.random.default_rng(1)
    rows = TokenRows(*([rng.integers(2, 250, 6).tolist() for _ in range(5)] for _ in "pc"))
    one = 6 * model.config.hidden_size * 4
    teacher, calls = FrozenTeacher(model, 2.5 * one), counting(model)
    for _ in range(2):
        found = teacher(rows.collate(np.arange(5), 0))["dense"].chunk(slice(0, 99), None)[0]
    assert [shape[0] for shape in calls[-2:]] == [5, 3]
    want = FrozenTeacher(model)(rows.collate(np.arange(5), 0))["dense"].chunk(slice(0, 99), None)[0]
    torch.testing.assert_close(found, want, rtol=0, atol=1e-5)


def test_a_student_of_a_remembering_teacher_is_the_same(make_recipe, run_cli):
    path, run_dir = make_recipe(name="forgets")
    other, other_dir = make_recipe(name="remembers")
    for p in (path, other):
        made(run_cli, p)
    plain = trained(run_cli, path, run_dir, *OPTIONS, "train.steps=12", KL)
    kept = trained(
        run_cli, other, other_dir, *OPTIONS, "train.steps=12", KL, "train.teachers={remember_gb: 1}"
    )
    assert kept == pytest.approx(plain, abs=5e-6)
