"""Objectives against float64 numpy written from their definitions, and against what must hold of them.

The references below use numpy only and sums over the vocabulary as the papers write them; gradients are
checked by finite differences of those references, so nothing here trusts the code under test.
"""

import inspect
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.config.section import OBJECTIVES, problems, resolve
from distill.errors import UserError
from distill.training import losses
from distill.training.losses import rowwise

# ---------------------------------------------------------------------------------------------- references


def log_softmax(z, temperature=1.0):
    z = np.asarray(z, dtype=np.float64) / temperature
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def xlogy(x, log_y):
    """x * log y with 0 log 0 = 0."""
    return np.where(x > 0, x * np.where(x > 0, log_y, 0.0), 0.0)


def kl(a, b):
    with np.errstate(invalid="ignore"):
        return xlogy(np.exp(a), np.where(np.exp(a) > 0, a - b, 0.0)).sum(-1)


def mix(a, b, weight):
    with np.errstate(divide="ignore"):
        return np.logaddexp(a + np.log(weight), b + np.log(1 - weight))


def jsd(p, q, beta):
    if beta in (0, 1):
        return kl(p, q) if beta == 0 else kl(q, p)
    m = mix(p, q, beta)
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def adaptive_share(p, q, mu):
    shares = []
    for row_p, row_q in zip(np.exp(p), np.exp(q)):
        mass, head, tail = 0.0, 0.0, 0.0
        for rank, token in enumerate(sorted(range(len(row_p)), key=lambda i: -row_p[i])):
            mass += row_p[token]
            gap = abs(row_p[token] - row_q[token])
            if rank == 0 or mass <= mu:
                head += gap
            else:
                tail += gap
        shares.append(head / (head + tail) if head + tail else 0.5)
    return np.array(shares)


def adaptive(p, q, mu):
    share = adaptive_share(p, q, mu)
    return share * kl(p, q) + (1 - share) * kl(q, p)


def alpha_beta(p, q, alpha, beta):
    if beta == 0:
        return (alpha * np.exp(alpha * p) * (p - q) - np.exp(alpha * p) + np.exp(alpha * q)).sum(
            -1
        ) / alpha**2
    if alpha == 0:
        return alpha_beta(q, p, beta, 0)
    p, q, total = np.exp(p), np.exp(q), alpha + beta
    terms = p**alpha * q**beta - alpha / total * p**total - beta / total * q**total
    return -terms.sum(-1) / (alpha * beta)


REFERENCES = {
    "forward_kl": lambda p, q: kl(p, q),
    "reverse_kl": lambda p, q: kl(q, p),
    "generalized_jsd": jsd,
    "skew_forward_kl": lambda p, q, alpha: kl(p, mix(p, q, alpha)),
    "skew_reverse_kl": lambda p, q, alpha: kl(q, mix(q, p, alpha)),
    "adaptive_kl": adaptive,
    "total_variation": lambda p, q: np.abs(np.exp(p) - np.exp(q)).sum(-1) / 2,
    "alpha_beta_divergence": alpha_beta,
}
CASES = [
    ("forward_kl", {}),
    ("reverse_kl", {}),
    ("generalized_jsd", {"beta": 0.5}),
    ("generalized_jsd", {"beta": 0.1}),
    ("generalized_jsd", {"beta": 0}),
    ("generalized_jsd", {"beta": 1}),
    ("skew_forward_kl", {"alpha": 0.1}),
    ("skew_forward_kl", {"alpha": 0}),
    ("skew_reverse_kl", {"alpha": 0.1}),
    ("skew_reverse_kl", {"alpha": 0}),
    ("adaptive_kl", {"mu": 0.5}),
    ("adaptive_kl", {"mu": 0.9}),
    ("total_variation", {}),
    ("alpha_beta_divergence", {"alpha": 0.2, "beta": 0.7}),
    ("alpha_beta_divergence", {"alpha": 0.6, "beta": 0}),
    ("alpha_beta_divergence", {"alpha": 0, "beta": 1.3}),
]
each_case = pytest.mark.parametrize(
    "name, options", CASES, ids=[f"{n}-{'-'.join(map(str, o.values()))}" for n, o in CASES]
)


def reference(name, student, teacher, temperature=1.0, **options):
    return REFERENCES[name](log_softmax(teacher, temperature), log_softmax(student, temperature), **options)


def logits(seed, tokens=5, vocabulary=9, scale=2.0):
    generator = np.random.default_rng(seed)
    return scale * generator.standard_normal((2, tokens, vocabulary))


def value_and_gradient(function, student, *rest, dtype=torch.float64, **options):
    student = torch.tensor(student, dtype=dtype, requires_grad=True)
    loss = function(student, *rest, **options)
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    return loss.detach(), gradient


# ------------------------------------------------------------------------------------- values and gradients


@each_case
@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_value_is_the_definition(name, options, temperature):
    student, teacher = logits(0)
    loss = getattr(losses, name)(
        torch.tensor(student), torch.tensor(teacher), temperature=temperature, **options
    )
    assert loss.dtype == torch.float64 and loss.shape == (5,)
    np.testing.assert_allclose(loss, reference(name, student, teacher, temperature, **options), rtol=1e-10)


@each_case
def test_gradient_is_the_slope_of_the_definition(name, options):
    student, teacher = logits(1, tokens=3, vocabulary=6)
    function, temperature, step = getattr(losses, name), 1.7, 1e-5
    _, gradient = value_and_gradient(
        function, student, torch.tensor(teacher), temperature=temperature, **options
    )

    def definition(student):
        if name != "adaptive_kl":
            return reference(name, student, teacher, temperature, **options).sum()
        # AKL's weights carry no gradient: they stay those of the unperturbed student.
        p, q = log_softmax(teacher, temperature), log_softmax(student, temperature)
        return (share * kl(p, q) + (1 - share) * kl(q, p)).sum()

    share = adaptive_share(
        log_softmax(teacher, temperature), log_softmax(student, temperature), options.get("mu", 1)
    )
    slopes = np.zeros_like(student)
    for index in np.ndindex(*student.shape):
        moved = np.zeros_like(student)
        moved[index] = step
        slopes[index] = (definition(student + moved) - definition(student - moved)) / (2 * step)
    np.testing.assert_allclose(gradient, slopes, atol=2e-9)


@pytest.mark.parametrize("name, options", [c for c in CASES if c[0] != "adaptive_kl"])
def test_gradcheck(name, options):
    student, teacher = (torch.tensor(z) for z in logits(2, tokens=2, vocabulary=5))
    function = getattr(losses, name)
    assert torch.autograd.gradcheck(
        lambda s: function(s, teacher, temperature=2.0, temperature_squared=True, **options),
        student.requires_grad_(),
    )


@each_case
@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    tokens=st.integers(0, 7),
    vocabulary=st.integers(2, 40),
    scale=st.floats(0.01, 30),
    temperature=st.floats(0.3, 8),
)
def test_float32_over_shapes_and_scales(name, options, seed, tokens, vocabulary, scale, temperature):
    student, teacher = logits(seed, tokens, vocabulary, scale).astype(np.float32)
    loss, gradient = value_and_gradient(
        getattr(losses, name),
        student,
        torch.tensor(teacher),
        dtype=torch.float32,
        temperature=temperature,
        **options,
    )
    expected = reference(name, student, teacher, temperature, **options)
    assert loss.dtype == torch.float32 and gradient.shape == student.shape
    np.testing.assert_allclose(loss, expected, rtol=3e-4, atol=3e-5)
    assert gradient.isfinite().all() and loss.numpy().min(initial=0) > -3e-5
    # Adding a constant to a row of logits changes no probability, so gradients sum to 0 over the vocabulary.
    np.testing.assert_allclose(gradient.sum(-1), 0, atol=1e-3)


@each_case
def test_bf16_logits_are_computed_in_float32(name, options):
    student, teacher = (torch.tensor(z).bfloat16() for z in logits(3, vocabulary=200))
    student.requires_grad_()
    loss = getattr(losses, name)(student, teacher, **options)
    assert loss.dtype == torch.float32
    exact = reference(name, student.detach().double().numpy(), teacher.double().numpy(), **options)
    np.testing.assert_allclose(loss.detach(), exact, rtol=2e-5)
    loss.sum().backward()
    assert student.grad.dtype == torch.bfloat16


@each_case
def test_extreme_logits(name, options):
    student, teacher = 1e4 * logits(4, tokens=4, scale=1.0).astype(np.float32)
    loss, gradient = value_and_gradient(
        getattr(losses, name), student, torch.tensor(teacher), dtype=torch.float32, **options
    )
    assert gradient.isfinite().all()
    np.testing.assert_allclose(loss, reference(name, student, teacher, **options), rtol=1e-4, atol=1e-4)


def test_cross_entropy_is_minus_log_probability_of_the_target():
    student, _ = logits(5)
    targets = np.array([0, 8, 3, 3, 1])
    loss, gradient = value_and_gradient(losses.cross_entropy, student, torch.tensor(targets))
    np.testing.assert_allclose(loss, -log_softmax(student)[np.arange(5), targets], rtol=1e-12)
    np.testing.assert_allclose(gradient, np.exp(log_softmax(student)) - np.eye(9)[targets], atol=1e-12)


def test_cross_entropy_has_no_ignored_label():
    with pytest.raises((IndexError, RuntimeError)):
        losses.cross_entropy(torch.zeros(2, 5), torch.tensor([1, -100]))


# ----------------------------------------------------------------------------------------------- identities


@each_case
def test_zero_loss_and_gradient_at_agreement(name, options):
    student, _ = logits(6)
    shifted = torch.tensor(student + 3.0)
    loss, gradient = value_and_gradient(getattr(losses, name), student, shifted, temperature=1.5, **options)
    np.testing.assert_allclose(loss, 0, atol=1e-13)
    if name != "total_variation":  # not smooth there: rounding decides the sign of each |p - q|
        np.testing.assert_allclose(gradient, 0, atol=1e-13)


def test_known_two_token_answers():
    teacher = torch.tensor([[0.75, 0.25]], dtype=torch.float64).log()
    student = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log()
    assert losses.forward_kl(student, teacher).item() == pytest.approx(
        0.75 * np.log(1.5) + 0.25 * np.log(0.5)
    )
    assert losses.reverse_kl(student, teacher).item() == pytest.approx(0.5 * np.log(2 / 3) + 0.5 * np.log(2))
    assert losses.total_variation(student, teacher).item() == pytest.approx(0.25)
    # Head is the first token (0.75 > mu, but the first always counts); each token holds half of the gap.
    both = losses.forward_kl(student, teacher) + losses.reverse_kl(student, teacher)
    assert losses.adaptive_kl(student, teacher, mu=0.5).item() == pytest.approx(both.item() / 2)


def test_generalized_jsd_is_trls_definition():
    """GKDTrainer.generalized_jsd_loss: m = logsumexp([student + log(1 - beta), teacher + log(beta)]), then
    beta * kl_div(m, teacher) + (1 - beta) * kl_div(m, student) with log_target=True, where
    kl_div(x, y) = sum exp(y) (y - x); beta = 0: kl_div(student, teacher), beta = 1: kl_div(teacher, student).
    """
    student, teacher = (torch.tensor(z) for z in logits(7))
    q, p = student.log_softmax(-1), teacher.log_softmax(-1)

    def kl_div(x, y):
        return torch.nn.functional.kl_div(x, y, reduction="none", log_target=True).sum(-1)

    for beta in (0.0, 0.2, 0.5, 0.9, 1.0):
        if beta in (0.0, 1.0):
            expected = kl_div(q, p) if beta == 0 else kl_div(p, q)
        else:
            m = torch.logsumexp(torch.stack([q + np.log1p(-beta), p + np.log(beta)]), dim=0)
            expected = beta * kl_div(m, p) + (1 - beta) * kl_div(m, q)
        torch.testing.assert_close(losses.generalized_jsd(student, teacher, beta=beta), expected)


def test_generalized_jsd_symmetry_bound_and_limits():
    student, teacher = (torch.tensor(z) for z in logits(8))
    jsd_half = losses.generalized_jsd(student, teacher, beta=0.5)
    torch.testing.assert_close(jsd_half, losses.generalized_jsd(teacher, student, beta=0.5))
    assert (jsd_half < np.log(2)).all()
    small = 1e-6
    torch.testing.assert_close(
        losses.generalized_jsd(student, teacher, beta=small) / small,
        losses.forward_kl(student, teacher),
        rtol=1e-4,
        atol=1e-6,
    )
    torch.testing.assert_close(
        losses.generalized_jsd(student, teacher, beta=1 - small) / small,
        losses.reverse_kl(student, teacher),
        rtol=1e-4,
        atol=1e-6,
    )


def test_reverse_is_forward_with_the_roles_exchanged_and_skews_shrink():
    student, teacher = (torch.tensor(z) for z in logits(9))
    torch.testing.assert_close(losses.reverse_kl(student, teacher), losses.forward_kl(teacher, student))
    assert (losses.skew_forward_kl(student, teacher, alpha=0.3) < losses.forward_kl(student, teacher)).all()
    assert (losses.skew_reverse_kl(student, teacher, alpha=0.3) < losses.reverse_kl(student, teacher)).all()
    torch.testing.assert_close(
        losses.skew_forward_kl(student, teacher, alpha=0), losses.forward_kl(student, teacher)
    )


def test_alpha_beta_special_cases_and_no_jump_at_its_limits():
    student, teacher = (torch.tensor(z) for z in logits(10))
    p, q = teacher.softmax(-1), student.softmax(-1)

    def ab(alpha, beta):
        return losses.alpha_beta_divergence(student, teacher, alpha=alpha, beta=beta)

    torch.testing.assert_close(ab(1, 0), losses.forward_kl(student, teacher))
    torch.testing.assert_close(ab(0, 1), losses.reverse_kl(student, teacher))
    torch.testing.assert_close(ab(1, 1), ((p - q) ** 2).sum(-1) / 2)
    torch.testing.assert_close(ab(0.5, 0.5), 2 * ((p.sqrt() - q.sqrt()) ** 2).sum(-1))
    torch.testing.assert_close(ab(0.6, 1e-7), ab(0.6, 0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ab(1e-7, 0.6), ab(0, 0.6), rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match="both be 0"):
        ab(0, 0)


# ---------------------------------------------------------------------------------------------- temperature


@each_case
def test_temperature_divides_both_and_the_square_is_a_factor(name, options):
    student, teacher = (torch.tensor(z) for z in logits(11))
    function = getattr(losses, name)
    tempered = function(student, teacher, temperature=2.5, **options)
    torch.testing.assert_close(tempered, function(student / 2.5, teacher / 2.5, **options))
    squared = function(student, teacher, temperature=2.5, temperature_squared=True, **options)
    torch.testing.assert_close(squared, 6.25 * tempered)


def test_squared_temperature_keeps_the_gradient_of_a_hot_softmax():
    """Hinton et al. 2015, section 2.1: for large T, T^2 dC/dz_i -> (z_i - v_i) / V, both logits centred."""
    student, teacher = logits(12)
    _, gradient = value_and_gradient(
        losses.forward_kl, student, torch.tensor(teacher), temperature=1e5, temperature_squared=True
    )
    gap = student - student.mean(-1, keepdims=True) - teacher + teacher.mean(-1, keepdims=True)
    np.testing.assert_allclose(gradient, gap / student.shape[1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("temperature", [0, -1.0, float("inf"), float("nan"), True])
def test_temperature_must_be_positive(temperature):
    with pytest.raises(UserError, match="temperature must be"):
        losses.forward_kl(torch.zeros(1, 3), torch.zeros(1, 3), temperature=temperature)


# ------------------------------------------------------------------------------------------ masked vocabulary


@each_case
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_tokens_masked_in_both_count_for_nothing(name, options, temperature):
    student, teacher = logits(13)
    function = getattr(losses, name)
    padding = np.full((5, 4), -np.inf)
    plain = value_and_gradient(function, student, torch.tensor(teacher), temperature=temperature, **options)
    padded = value_and_gradient(
        function,
        np.hstack([student, padding]),
        torch.tensor(np.hstack([teacher, padding])),
        temperature=temperature,
        **options,
    )
    torch.testing.assert_close(padded[0], plain[0])
    torch.testing.assert_close(padded[1][:, :9], plain[1])
    assert (padded[1][:, 9:] == 0).all()


@each_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_tokens_the_teacher_masks(name, options, dtype):
    student, teacher = logits(14)
    teacher[:, [2, 5]] = -np.inf
    loss, gradient = value_and_gradient(
        getattr(losses, name), student, torch.tensor(teacher, dtype=dtype), dtype=dtype, **options
    )
    assert loss.isfinite().all() and gradient.isfinite().all() and (loss > 0).all()
    assert (gradient[:, [2, 5]].sum(-1) > 0).all()  # descent lowers what the teacher forbids
    p, q = log_softmax(teacher), log_softmax(student)
    with np.errstate(invalid="ignore", divide="ignore"):
        exact = REFERENCES[name](p, q, **options)
    known = np.isfinite(exact)  # infinite where the student's weight meets the teacher's zero
    assert known.all() or name in (
        "reverse_kl",
        "adaptive_kl",
        "generalized_jsd",
        "skew_reverse_kl",
        "alpha_beta_divergence",
    )
    np.testing.assert_allclose(loss[torch.tensor(known)], exact[known], rtol=1e-4)


def test_reverse_kl_of_a_forbidden_token_is_bounded_by_its_mass():
    teacher = torch.tensor([[0.0, 0.0, -torch.inf]])
    student = torch.tensor([[0.0, 0.0, 0.0]])
    expected = 2 / 3 * np.log(2 / 3) + 1 / 3 * (np.log(1 / 3) + 100)
    assert losses.reverse_kl(student, teacher).item() == pytest.approx(expected, rel=1e-6)
    # A finite logit is never clipped, however small.
    teacher[0, 2] = -1e6
    assert losses.reverse_kl(student, teacher).item() == pytest.approx(1e6 / 3, rel=1e-3)


def test_a_nan_stays_a_nan():
    teacher = torch.tensor([[0.0, torch.nan, 1.0], [0.0, -torch.inf, 1.0]])
    loss = losses.forward_kl(torch.zeros(2, 3), teacher)
    assert loss[0].isnan() and loss[1].isfinite()


# --------------------------------------------------------------------------------------------- the machinery


@each_case
def test_teacher_receives_no_gradient_and_inputs_are_untouched(name, options):
    student, teacher = (torch.tensor(z, requires_grad=True) for z in logits(15))
    before = student.detach().clone(), teacher.detach().clone()
    getattr(losses, name)(student, teacher, **options).sum().backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0
    assert torch.equal(before[0], student) and torch.equal(before[1], teacher)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_chunks_do_not_show(monkeypatch, dtype):
    student, teacher = (torch.tensor(z, dtype=dtype) for z in logits(16, tokens=7, vocabulary=11))
    weights = torch.linspace(0.1, 2, 7)
    found = []
    for chunk in (1, 25, 10**6):
        monkeypatch.setattr(rowwise, "CPU_CHUNK", chunk)
        student.requires_grad_().grad = None
        loss = losses.generalized_jsd(student, teacher, beta=0.3)
        (loss * weights).sum().backward()
        found.append((loss.detach(), student.grad))
    for loss, gradient in found[1:]:
        torch.testing.assert_close(loss, found[0][0])
        torch.testing.assert_close(gradient, found[0][1])


def test_a_token_does_not_see_its_neighbours():
    student, teacher = (torch.tensor(z) for z in logits(17, tokens=8))
    whole = losses.adaptive_kl(student, teacher)
    torch.testing.assert_close(
        whole, torch.cat([losses.adaptive_kl(student[i : i + 1], teacher[i : i + 1]) for i in range(8)])
    )


@pytest.mark.parametrize("dtype, kept", [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)])
def test_only_one_large_tensor_waits_for_backward(dtype, kept):
    student, teacher = (torch.tensor(z, dtype=dtype) for z in logits(18, tokens=6, vocabulary=50))
    loss = losses.adaptive_kl(student.requires_grad_(), teacher, temperature=2.0)
    assert [(t.shape, t.dtype) for t in loss.grad_fn.saved_tensors] == [((6, 50), kept)]


def test_upstream_weight_is_not_rounded_to_the_student_type():
    """1/3 in bfloat16 is off by 0.2 %: as a weight it would scale every gradient of the run."""
    student, teacher = (torch.tensor(z) for z in logits(19, tokens=64, vocabulary=200))
    rounded = student.bfloat16().requires_grad_()
    exact = rounded.detach().double().requires_grad_()
    for s, t in ((rounded, teacher.bfloat16()), (exact, teacher.bfloat16().double())):
        (losses.forward_kl(s, t) / 3).sum().backward()
    ratio = (rounded.grad.double() * exact.grad).sum() / (exact.grad**2).sum()
    assert abs(ratio.item() - 1) < 3e-4


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_no_gradient_is_formed_when_none_is_wanted(context, monkeypatch):
    student, teacher = (torch.tensor(z, requires_grad=True) for z in logits(20))
    expected = losses.forward_kl(student, teacher)
    monkeypatch.setattr(torch.autograd, "grad", lambda *_: pytest.fail("a gradient was formed"))
    with context():
        loss = losses.forward_kl(student, teacher)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected.detach())


@each_case
def test_mismatched_shapes_are_refused(name, options):
    function = getattr(losses, name)
    with pytest.raises(UserError, match=r"151936.*152064.*tokenizer"):
        function(torch.zeros(1, 151936), torch.zeros(1, 152064), **options)
    with pytest.raises(UserError, match="3 student rows against 2"):
        function(torch.zeros(3, 4), torch.zeros(2, 4), **options)
    with pytest.raises(UserError, match="kept tokens"):
        function(torch.zeros(3, 4, 5), torch.zeros(3, 4, 5), **options)


# --------------------------------------------------------------------------------------------- stored signals

TAILS = ("renormalise", "tail_bucket", "zero")


def sparse_reference(student, ids, stored, tail, temperature):
    """One row at a time, dictionaries instead of gathers."""
    out = []
    for z, row_ids, row in zip(student, ids, np.exp(stored)):
        p = {int(i): v for i, v in zip(row_ids, row) if v > 0}
        total = sum(v ** (1 / temperature) for v in p.values())
        q = np.exp(log_softmax(z, temperature))
        if tail == "tail_bucket":
            q1 = np.exp(log_softmax(z))
            bucket = {i: (v, q1[i]) for i, v in p.items()}
            bucket["other"] = (1 - sum(p.values()), sum(v for i, v in enumerate(q1) if i not in p))
            pairs = np.array([pair for pair in bucket.values() if pair[0] > 1e-12])
            hot = np.array(list(bucket.values())).clip(0) ** (1 / temperature)
            pairs = pairs ** (1 / temperature) / hot.sum(0)
            out.append((pairs[:, 0] * np.log(pairs[:, 0] / pairs[:, 1])).sum())
            continue
        mass = sum(p.values()) if tail == "zero" else 1.0
        hot = {i: mass * v ** (1 / temperature) / total for i, v in p.items()}
        out.append(sum(v * np.log(v / q[i]) for i, v in hot.items()))
    return np.array(out)


def stored_signals(teacher, kept, seed=0):
    """The `kept` most likely tokens of each row, in random order."""
    p = log_softmax(teacher)
    ids = np.argsort(-p, axis=-1)[:, :kept]
    ids = np.random.default_rng(seed).permuted(ids, axis=-1)
    return ids, np.take_along_axis(p, ids, -1)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("squared", [False, True])
def test_all_tokens_stored_is_dense(tail, temperature, squared):
    student, teacher = logits(21)
    ids, stored = stored_signals(teacher, 9)
    options = {"temperature": temperature, "temperature_squared": squared}
    dense = value_and_gradient(losses.forward_kl, student, torch.tensor(teacher), **options)
    sparse = value_and_gradient(
        losses.sparse_forward_kl, student, torch.tensor(ids), torch.tensor(stored), tail=tail, **options
    )
    torch.testing.assert_close(sparse, dense)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kept", [1, 4])
def test_sparse_value_and_gradient(tail, temperature, kept):
    student, teacher = logits(22)
    ids, stored = stored_signals(teacher, kept)
    loss = losses.sparse_forward_kl(
        torch.tensor(student), torch.tensor(ids), torch.tensor(stored), tail=tail, temperature=temperature
    )
    np.testing.assert_allclose(loss, sparse_reference(student, ids, stored, tail, temperature), rtol=1e-9)
    assert torch.autograd.gradcheck(
        lambda s: losses.sparse_forward_kl(
            s, torch.tensor(ids), torch.tensor(stored), tail=tail, temperature=temperature
        ),
        torch.tensor(student, requires_grad=True),
    )


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), vocabulary=st.integers(2, 30), data=st.data())
def test_tail_bucket_is_a_lower_bound_and_zero_at_agreement(seed, vocabulary, data):
    kept = data.draw(st.integers(1, vocabulary))
    student, teacher = logits(seed, 4, vocabulary)
    ids, stored = (torch.tensor(x) for x in stored_signals(teacher, kept))
    student, teacher = torch.tensor(student), torch.tensor(teacher)
    bound = losses.sparse_forward_kl(student, ids, stored, tail="tail_bucket")
    assert (bound <= losses.forward_kl(student, teacher) + 1e-12).all() and (bound > -1e-12).all()
    same = losses.sparse_forward_kl(teacher, ids, stored, tail="tail_bucket")
    torch.testing.assert_close(same, torch.zeros(4, dtype=torch.float64), atol=1e-9, rtol=0)


def test_top_k_renormalised_is_biased_and_sampled_tokens_are_not():
    """Mean gradient over one token sampled from the teacher = the dense gradient (arXiv 2503.16870)."""
    student, teacher = logits(23, tokens=1)
    p = np.exp(log_softmax(teacher))[0]
    _, dense = value_and_gradient(losses.forward_kl, student, torch.tensor(teacher))
    sampled = torch.zeros_like(dense)
    for token, chance in enumerate(p):
        signal = torch.tensor([[token]]), torch.zeros(1, 1, dtype=torch.float64)
        sampled += chance * value_and_gradient(losses.sparse_forward_kl, student, *signal)[1]
    torch.testing.assert_close(sampled, dense)
    top = (torch.tensor(x) for x in stored_signals(teacher, 3))
    assert (value_and_gradient(losses.sparse_forward_kl, teacher, *top)[1].abs() > 1e-2).any()


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_absent_entries_pad_shorter_rows(tail, temperature):
    student, teacher = logits(24)
    ids, stored = stored_signals(teacher, 4)
    padded_ids = np.hstack([ids, np.zeros((5, 3), dtype=int)])
    padded = np.hstack([stored, np.full((5, 3), -np.inf)])
    options = {"tail": tail, "temperature": temperature}
    plain = value_and_gradient(
        losses.sparse_forward_kl, student, torch.tensor(ids), torch.tensor(stored), **options
    )
    found = value_and_gradient(
        losses.sparse_forward_kl, student, torch.tensor(padded_ids), torch.tensor(padded), **options
    )
    torch.testing.assert_close(found, plain)


def test_stored_signals_that_cannot_be_right_are_refused():
    student = torch.zeros(2, 5)
    stored = torch.full((2, 3), 0.2).log()
    with pytest.raises(UserError, match="names one id twice"):
        losses.sparse_forward_kl(student, torch.tensor([[0, 1, 2], [3, 1, 3]]), stored)
    with pytest.raises(UserError, match="from 0 to 7 but the student has 5"):
        losses.sparse_forward_kl(student, torch.tensor([[0, 1, 2], [3, 1, 7]]), stored)
    with pytest.raises(UserError, match="not logits"):
        losses.sparse_forward_kl(student, torch.tensor([[0, 1, 2], [3, 1, 2]]), torch.ones(2, 3))
    with pytest.raises(UserError, match="2 student rows against 1"):
        losses.sparse_forward_kl(student, torch.tensor([[0, 1, 2]]), stored[:1])
    with pytest.raises(UserError, match="tail must be one of"):
        losses.sparse_forward_kl(student, torch.tensor([[0, 1, 2], [3, 1, 2]]), stored, tail="drop")


def test_stored_in_half_precision_and_empty():
    student, teacher = logits(25)
    ids, stored = stored_signals(teacher, 5)
    exact = losses.sparse_forward_kl(torch.tensor(student), torch.tensor(ids), torch.tensor(stored))
    half = losses.sparse_forward_kl(torch.tensor(student), torch.tensor(ids), torch.tensor(stored).half())
    torch.testing.assert_close(half, exact, rtol=1e-2, atol=1e-3)
    # Rounded probabilities may sum to more than 1; what is left for the bucket is then nothing.
    above = torch.tensor([[0.7, 0.305]]).log()
    bucket = losses.sparse_forward_kl(torch.zeros(1, 9), torch.tensor([[2, 4]]), above, tail="tail_bucket")
    p = np.array([0.7, 0.305]) / 1.005
    assert bucket.item() == pytest.approx((p * np.log(p * 9)).sum(), rel=1e-5)
    assert losses.sparse_forward_kl(
        torch.zeros(0, 9), torch.zeros(0, 5, dtype=torch.long), torch.zeros(0, 5)
    ).shape == (0,)


# ----------------------------------------------------------------------------------------------- the registry


ELSEWHERE = ("hidden", "routers", "own_routers", "ahead")  # not on logits: tests/training/test_step_states.py


def test_registry_agrees_with_the_functions():
    on_logits = {name: o for name, o in OBJECTIVES.items() if o.signal not in ELSEWHERE}
    assert set(on_logits) < set(losses.__all__)
    positional = {"targets": ["targets"], "dense": ["teacher_logits"], "sparse": ["ids", "logprobs"]}
    positional["sampled"] = ["ids", "weights"]
    positional["aligned"] = ["teacher_logits", "aligned"]
    positional["drawn"] = ["teacher_logits", "targets", "drawn"]
    for name, objective in on_logits.items():
        parameters = inspect.signature(getattr(losses, name)).parameters
        keywords = {k: p.default for k, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
        assert keywords == {k: option.default for k, option in objective.options.items()}, name
        others = [k for k, p in parameters.items() if p.kind is not p.KEYWORD_ONLY]
        assert others == ["student_logits", *positional[objective.signal]], name
        assert objective.name == name and objective.live == (
            objective.signal in ("dense", "drawn", "aligned")
        )


@pytest.mark.parametrize("name", sorted(n for n, o in OBJECTIVES.items() if o.signal not in ELSEWHERE))
def test_a_recipe_and_a_function_refuse_the_same_values(name):
    student = torch.randn(2, 4)
    signal = {
        "targets": (torch.tensor([0, 1]),),
        "dense": (torch.randn(2, 4),),
        "sparse": (torch.tensor([[0], [1]]), torch.full((2, 1), -0.5)),
        "sampled": (torch.tensor([[0], [1]]), torch.ones(2, 1)),
        "aligned": (torch.randn(2, 5), torch.tensor([True, False])),
        "drawn": (torch.randn(2, 4), torch.tensor([0, 1]), torch.full((2,), -1.0)),
    }[OBJECTIVES[name].signal]
    for key in OBJECTIVES[name].options:
        for value in (-1, 0, 0.5, 1, 2, float("inf"), "renormalise", "zero", None):
            if key == "temperature_squared" or (key in ("alpha", "beta") and value == 0):
                continue
            refused = bool(problems({"name": name, key: value}))
            try:
                getattr(losses, name)(student, *signal, **{key: value})
                assert not refused, (key, value)
            except UserError:
                assert refused, (key, value)


def test_problems_of_a_recipe_entry_name_the_fix():
    assert problems({"name": "forward_kl", "weight": 1.0, "temperature": 2}) == []
    (line,) = problems({"name": "foward_kl"})
    assert "did you mean forward_kl" in line
    lines = problems(
        {"name": "generalized_jsd", "bta": 0.5, "temperature": 0, "temperature_squared": 1, "weight": -1}
    )
    assert len(lines) == 4
    assert any("did you mean beta" in line for line in lines)
    assert any("temperature must be above 0, not 0" in line for line in lines)
    (line,) = problems({"name": "skew_forward_kl", "alpha": 1})
    assert "at least 0 and below 1" in line
    (line,) = problems({"name": "alpha_beta_divergence", "alpha": 0, "beta": 0})
    assert "both be 0" in line
    assert problems({"weight": 1.0})[0].startswith("objective None")


def test_resolve_writes_every_default_down():
    assert resolve({"name": "generalized_jsd", "temperature": 2.0}) == {
        "name": "generalized_jsd",
        "weight": 1.0,
        "temperature": 2.0,
        "temperature_squared": False,
        "beta": 0.5,
    }


def test_the_registry_does_not_import_torch():
    code = "import sys, distill.config.section; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
