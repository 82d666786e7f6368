"""Stored signals: what is written is what is read, in the bytes it is said to take; `sampled` is unbiased."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.config.section import Signal
from distill.config.training import Objective
from distill.data.scoring import draw
from distill.data.signals import (
    SignalFormat,
    StoredSignals,
    decode_sampled,
    decode_top_k,
    encode_sampled,
    encode_top_k,
    pack,
    signal_problems,
    unpack,
)
from distill.errors import UserError
from distill.training import losses

IDENTITY = {"vocabulary": "a", "chat_template": "b", "eos": "<end>"}


def form(kind: str, k: int, vocabulary: int, bits: int = 8, temperature: float = 1.0) -> SignalFormat:
    return SignalFormat(kind, k, vocabulary, temperature, bits, IDENTITY)


def teacher_rows(seed: int, tokens: int, vocabulary: int, spread: float = 3.0):
    """(probabilities [T, V], log-probabilities [T, V]) in float64, by definition."""
    z = np.random.default_rng(seed).normal(size=(tokens, vocabulary)) * spread
    z -= z.max(1, keepdims=True)
    logs = z - np.log(np.exp(z).sum(1, keepdims=True))
    return np.exp(logs), logs


def likeliest(logs: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    ids = np.argsort(-logs, axis=1, kind="stable")[:, :k]
    return ids, np.take_along_axis(logs, ids, 1).astype(np.float32)


# ---- codec --------------------------------------------------------------------------------------------


@given(st.integers(1, 32), st.data())
def test_integers_come_back_in_as_few_bits(bits, data):
    values = data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=40))
    blob = pack(np.array(values, dtype=np.int64), bits)
    assert len(blob) == -(-len(values) * bits // 8)
    assert unpack(blob, bits, len(values)).tolist() == values


def test_bytes_too_many_are_as_wrong_as_too_few():
    blob = pack(np.array([5, 6, 7]), 7)
    assert unpack(blob, 7, 3).tolist() == [5, 6, 7]
    for wrong in (blob[:-1], blob + b"\0"):
        with pytest.raises(UserError, match=f"has {len(wrong)} bytes where 3 are due"):
            unpack(wrong, 7, 3)


def test_packing_is_most_significant_first():
    assert pack(np.array([1, 2, 7]), 3) == bytes([0b00101011, 0b10000000])
    with pytest.raises(UserError, match="has 1 bytes where 2 are due"):
        unpack(b"\x00", 3, 3)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    tokens=st.integers(1, 5),
    vocabulary=st.integers(2, 300),
    spread=st.floats(0.0, 30.0),
    bits=st.sampled_from([8, 16, 32]),
    data=st.data(),
)
def test_top_k_comes_back_to_its_precision(seed, tokens, vocabulary, spread, bits, data):
    k = data.draw(st.integers(1, vocabulary))
    _, logs = teacher_rows(seed, tokens, vocabulary, spread)
    ids, values = likeliest(logs, k)
    stored = form("top_k", k, vocabulary, bits)
    blobs = encode_top_k(stored, ids, values)
    found_ids, found = decode_top_k(stored, tokens, *blobs)
    assert (found_ids == ids).all() and found.dtype == np.float32
    if bits == 32:
        assert (found == values).all()
        return
    assert len(blobs[0]) == -(-tokens * k * stored.id_bits // 8)
    assert len(blobs[1]) == 4 * tokens + -(-tokens * k * bits // 8)
    # Codes are even in sqrt(distance), which makes half a step this much; the two ends are float16.
    floor = np.maximum(values, -100).astype(np.float64)
    depth, span = floor[:, :1] - floor, floor[:, :1] - floor[:, -1:]
    top = 2**bits - 1
    error = np.sqrt(depth * span) / top + span / (4 * top**2) + 2**-9 * (span - floor[:, :1]) + 1e-6
    shift = np.log(np.exp(floor + error).sum(1, keepdims=True)).clip(min=0)  # back to a sum of 1
    assert (np.abs(found - floor) <= error + shift).all()
    assert (np.exp(found.astype(np.float64)).sum(1) <= 1 + 1e-5).all()


def test_eight_bits_are_closer_than_bfloat16_where_it_counts():
    """Weighted by probability, stored log-probabilities of a long-tailed teacher are nearer than bf16's."""
    p = 1 / np.arange(1, 151_937)
    logs = np.log(p / p.sum())[None].repeat(2, 0)
    ids, values = likeliest(logs, 32)
    stored = form("top_k", 32, 151_936)
    _, found = decode_top_k(stored, 2, *encode_top_k(stored, ids, values))
    bfloat16 = torch.from_numpy(values).bfloat16().float().numpy()
    errors = [(np.exp(values) * np.abs(x - values)).sum() for x in (found, bfloat16)]
    assert errors[0] < errors[1]


def test_minus_infinity_and_equal_values_are_stored():
    ids, values = np.array([[3, 1], [0, 2]]), np.array([[0.0, -np.inf], [-np.log(2)] * 2], dtype=np.float32)
    stored = form("top_k", 2, 5)
    found = decode_top_k(stored, 2, *encode_top_k(stored, ids, values))[1]
    np.testing.assert_allclose(found, [[0, -100], [-np.log(2)] * 2], rtol=1e-3)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 12), st.integers(1, 400), st.data())
def test_sampled_comes_back_exactly(tokens, k, vocabulary, data):
    one = st.lists(st.integers(0, vocabulary - 1), min_size=k, max_size=k).map(sorted)
    ids = np.array(data.draw(st.lists(one, min_size=tokens, max_size=tokens)))
    stored = form("sampled", k, vocabulary)
    blobs = encode_sampled(stored, ids)
    found, weights = decode_sampled(stored, tokens, *blobs)
    assert (found == ids).all() and (weights == np.float32(1 / k)).all()
    distinct = sum(len(set(row)) for row in ids.tolist())
    assert len(blobs[0]) == -(-distinct * stored.id_bits // 8) and len(blobs[1]) == -(-tokens * k // 8)
    # Whole bits, not mean bytes a token times tokens: that product rounds up to 26.000000000000004.
    total = (distinct * stored.id_bits + tokens * k) / 8
    assert total <= len(blobs[0]) + len(blobs[1]) < total + 2
    assert stored.bytes_per_token(distinct / tokens) * tokens == pytest.approx(total)
    assert distinct < tokens * k or stored.bytes_per_token() * tokens == pytest.approx(total)


def test_stated_bytes():
    assert form("top_k", 32, 151_936).bytes_per_token() == 32 * (18 + 8) / 8 + 4 == 108
    assert form("top_k", 32, 151_936, bits=32).bytes_per_token() == 32 * (18 + 32) / 8
    assert form("sampled", 32, 151_936).bytes_per_token() == (32 * 18 + 32) / 8
    assert form("sampled", 50, 151_936).bytes_per_token(12) == (12 * 18 + 50) / 8


def test_manifest_round_trip_and_rows_as_a_batch():
    stored = form("sampled", 4, 9, temperature=2.0)
    again = SignalFormat.from_manifest(stored.to_manifest())
    assert again == stored and SignalFormat.from_manifest(None) is None
    rows = [np.sort(np.random.default_rng(i).integers(0, 9, (n, 4)), axis=1) for i, n in enumerate((3, 1, 2))]
    signals = StoredSignals(stored, *zip(*(encode_sampled(stored, row) for row in rows)))
    taken = signals.take([2, 0], [2, 3]).to("cpu")
    assert taken.form == "sampled" and taken.ids.tolist() == [*rows[2].tolist(), *rows[0].tolist()]
    with pytest.raises(UserError, match="are due"):
        signals.take([0], [5])


def test_the_form_that_a_recipe_asks_for():
    def asked(**section) -> tuple[int, int]:
        made = SignalFormat.from_recipe(Signal(**section), 9, IDENTITY, width=6)
        return made.k, made.bits

    assert asked(kind="top_k", k=4) == (4, 8)
    assert asked(kind="top_k", k=32) == (9, 8), "no more tokens than there are"
    assert asked(kind="sampled", k=32) == (32, 8), "draws may be more than there are tokens"
    assert asked(kind="hidden") == (6, 16) and asked(kind="hidden", bits=32) == (6, 32)


def test_another_reader_is_refused():
    stored = form("top_k", 4, 9)
    assert stored.problems(IDENTITY, [Objective(name="sparse_forward_kl", temperature=2.0)]) == []
    for key, text in (("vocabulary", "vocabulary"), ("chat_template", "chat template"), ("eos", "end token")):
        (line,) = stored.problems({**IDENTITY, key: "x"})
        assert f"another {text} than" in line
    (line,) = stored.problems(IDENTITY, [Objective(name="sampled_cross_entropy")])
    assert "of kind sampled, and generate.signal.kind is top_k" in line
    (line,) = signal_problems("none", 1.0, [Objective(name="sparse_forward_kl")])
    assert "generate.signal='{kind: top_k}'" in line
    (line,) = signal_problems("sampled", 1.0, [Objective(name="sampled_cross_entropy", temperature=2.0)])
    assert "temperature 2 and the signals were drawn at 1" in line
    same = [Objective(name="sampled_cross_entropy", temperature=2.0), Objective(name="cross_entropy")]
    assert signal_problems("sampled", 2.0, same) == []


# ---- drawing and its loss -----------------------------------------------------------------------------


def value_and_gradient(loss, student: torch.Tensor, *signal, **options):
    student = student.clone().requires_grad_()
    value = loss(student, *signal, **options)
    return value.detach(), torch.autograd.grad(value.sum(), student)[0]


@pytest.mark.parametrize("k", [1, 7, 32])
def test_systematic_draws_have_the_right_counts_and_expectation(k):
    p, _ = teacher_rows(3, 4, 20)
    p[0] = np.eye(20)[7]
    p[1, 5:] = 0
    p /= p.sum(1, keepdims=True)
    grid = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    for row in torch.from_numpy(p):
        ids = draw(row.expand(2000, -1), k, grid)
        assert (ids.diff(dim=1) >= 0).all()
        counts = torch.nn.functional.one_hot(ids, 20).sum(1)
        expected = k * row
        assert (counts >= (expected - 1e-9).floor()).all() and (counts <= (expected + 1e-9).ceil()).all()
        torch.testing.assert_close(counts.double().mean(0), expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_sampled_cross_entropy_is_its_definition(temperature):
    student = torch.from_numpy(teacher_rows(1, 5, 11)[1])
    ids = torch.randint(0, 11, (5, 4), generator=torch.Generator().manual_seed(0))
    weights = torch.rand(5, 4, dtype=torch.float64)
    logs = student.numpy() / temperature
    logs = logs - np.log(np.exp(logs).sum(1, keepdims=True))
    want = [-sum(w * logs[n, i] for i, w in zip(ids[n], weights[n].numpy())) for n in range(5)]
    found = losses.sampled_cross_entropy(student, ids, weights, temperature=temperature)
    np.testing.assert_allclose(found, want, rtol=1e-12)
    squared = losses.sampled_cross_entropy(
        student, ids, weights, temperature=temperature, temperature_squared=True
    )
    torch.testing.assert_close(squared, found * temperature**2)
    assert torch.autograd.gradcheck(
        lambda s: losses.sampled_cross_entropy(s, ids, weights, temperature=temperature),
        student.clone().requires_grad_(),
    )


@pytest.mark.parametrize("proposal", ["teacher", "flatter", "uniform"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_expectation_over_every_draw_is_the_dense_loss(proposal, temperature):
    """Enumerated, not sampled: both tokens of K = 2 draws from a proposal, importance-weighted."""
    student, teacher = (torch.from_numpy(teacher_rows(seed, 1, 6)[1]) for seed in (5, 6))
    p = (teacher / temperature).softmax(-1)[0]
    g = {"teacher": p, "flatter": p**0.5 / (p**0.5).sum(), "uniform": torch.full_like(p, 1 / 6)}[proposal]
    value, gradient = torch.zeros(1, dtype=torch.float64), torch.zeros_like(student)
    for a in range(6):
        for b in range(6):
            ids = torch.tensor([[a, b]])
            weights = (p / (2 * g))[ids]
            v, d = value_and_gradient(
                losses.sampled_cross_entropy, student, ids, weights, temperature=temperature
            )
            value += g[a] * g[b] * v
            gradient += g[a] * g[b] * d
    dense, dense_gradient = value_and_gradient(losses.forward_kl, student, teacher, temperature=temperature)
    torch.testing.assert_close(gradient, dense_gradient)
    torch.testing.assert_close(value, dense - (p * p.log()).sum())


def looks_unbiased(gradients: torch.Tensor, dense: torch.Tensor) -> bool:
    """Every entry of the mean of `gradients` [R, V] within 5 standard errors of `dense` [V]."""
    error = gradients.std(0) / len(gradients) ** 0.5
    return bool(((gradients.mean(0) - dense).abs() <= 5 * error + 1e-6).all())


@pytest.mark.parametrize("k", [2, 8, 24])
def test_sampled_passes_the_test_of_bias_that_top_k_fails(k):
    """Through the codec and the loss: 4,000 stored copies of one token, against the dense gradient."""
    vocabulary, copies = 40, 4000
    p, logs = teacher_rows(8, 1, vocabulary, spread=1.5)
    student = torch.from_numpy(teacher_rows(9, 1, vocabulary, spread=1.5)[1])
    _, dense = value_and_gradient(losses.forward_kl, student, torch.from_numpy(logs))
    many = student.expand(copies, -1)
    u = torch.rand(copies, dtype=torch.float64, generator=torch.Generator().manual_seed(k))
    drawn = draw(torch.from_numpy(p).expand(copies, -1), k, u).numpy()
    sampled = form("sampled", k, vocabulary)
    signal = [torch.from_numpy(x) for x in decode_sampled(sampled, copies, *encode_sampled(sampled, drawn))]
    assert looks_unbiased(value_and_gradient(losses.sampled_cross_entropy, many, *signal)[1], dense[0])

    top = form("top_k", k, vocabulary, bits=32)
    ids, values = likeliest(logs.repeat(copies, 0), k)
    signal = [torch.from_numpy(x.copy()) for x in decode_top_k(top, copies, *encode_top_k(top, ids, values))]
    for tail in ("renormalise", "tail_bucket"):
        gradients = value_and_gradient(losses.sparse_forward_kl, many, *signal, tail=tail)[1]
        assert not looks_unbiased(gradients, dense[0]), tail


def test_systematic_draws_are_quieter_than_independent_ones():
    p = torch.from_numpy(teacher_rows(4, 1, 40)[0])
    generator = torch.Generator().manual_seed(0)
    u = torch.rand(3000, dtype=torch.float64, generator=generator)
    ids = {
        "systematic": draw(p.expand(3000, -1), 16, u),
        "independent": torch.multinomial(p[0], 3000 * 16, replacement=True, generator=generator).view(
            3000, 16
        ),
    }
    spread = {
        name: float(torch.nn.functional.one_hot(i, 40).sum(1).double().div(16).var(0).sum())
        for name, i in ids.items()
    }
    assert spread["systematic"] < 0.5 * spread["independent"]


def test_sampled_signals_that_cannot_be_right_are_refused():
    student, ids, weights = torch.zeros(2, 5), torch.tensor([[0, 1], [4, 4]]), torch.full((2, 2), 0.5)
    assert losses.sampled_cross_entropy(student, ids, weights).shape == (2,)
    with pytest.raises(UserError, match="from 0 to 5 but the student has 5"):
        losses.sampled_cross_entropy(student, ids + torch.tensor([[0, 0], [1, 1]]), weights)
    with pytest.raises(UserError, match="negative or NaN"):
        losses.sampled_cross_entropy(student, ids, weights.log())
    with pytest.raises(UserError, match="2 student rows against 1"):
        losses.sampled_cross_entropy(student, ids[:1], weights[:1])
    assert losses.sampled_cross_entropy(student[:0], ids[:0], weights[:0]).shape == (0,)
