"""The fused head and loss equals autograd through whole logits, whatever the head, the chunk or the objective."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.config.section import OBJECTIVES, resolve
from distill.errors import UserError
from distill.models.hooks import Head
from distill.training import losses
from distill.training.losses import fused
from distill.training.losses.fused import (
    Drawn,
    Given,
    Projected,
    Term,
    fused_loss,
    match_vocabulary,
    whole_loss,
)
from distill.training.losses.rowwise import RowFormula, closed

N, V, D, DT, K = 37, 23, 6, 5, 4
DENSE = [name for name, objective in OBJECTIVES.items() if objective.signal == "dense"]


def term(name: str, weight: float = 1.0, **options) -> Term:
    filled = resolve({"name": name, **options})
    return Term(
        name,
        OBJECTIVES[name].signal,
        weight,
        {k: v for k, v in filled.items() if k not in ("name", "weight")},
    )


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks of several pieces even at this size."""
    monkeypatch.setattr(fused, "HEAD_CHUNK", 10 * V)
    monkeypatch.setattr(fused, "LEAST_ROWS", 8)
    monkeypatch.setattr(fused, "ENOUGH_ROWS", 8)
    monkeypatch.setattr(fused, "CPU_CHUNK", 3 * V)
    monkeypatch.setattr(fused, "HEAD_SLICE", 7)


def parts(seed: int = 0, dtype=torch.float64, teacher_vocabulary: int = V):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    hidden, weight, bias = normal(N, D), normal(V, D), normal(V)
    states, teacher = normal(N, DT), Head(normal(teacher_vocabulary, DT), normal(teacher_vocabulary))
    logprobs, ids = (states @ teacher.weight.T)[:, :V].log_softmax(-1).topk(K, dim=-1)
    signals = {
        "targets": Given((torch.randint(0, V, (N,), generator=g),)),
        "dense": Projected(states, teacher),
        "sparse": Given((ids, logprobs)),
        "sampled": Given((ids, torch.full((N, K), 1 / K, dtype=dtype))),
    }
    drawn = torch.randn(N, generator=g, dtype=torch.float64).to(dtype) - 3
    signals["drawn"] = Drawn(signals["dense"], signals["targets"].tensors[0], drawn)
    return hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), signals


def both_ways(terms, make_head, seed=0, upstream=0.37, **kwargs):
    """[(total, sums, d hidden, d weight, d bias)] of the fused form and of plain autograd."""
    found = []
    for fuse in (True, False):
        hidden, weight, bias, signals = parts(seed, **kwargs)
        head = make_head(weight, bias)
        if fuse:
            total, sums = fused_loss(hidden, head, terms, signals)
        else:
            raw = torch.nn.functional.linear(hidden, head.weight, head.bias)
            total, sums = whole_loss(head.transform(raw), terms, signals)
        (upstream * total).backward()
        found.append((total.detach(), sums, hidden.grad, weight.grad, bias.grad))
    return found


def assert_equal(ours, theirs, tolerance=1e-10):
    for a, b in zip(ours, theirs):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_every_objective_equals_autograd(name):
    if OBJECTIVES[name].signal not in ("targets", "dense", "drawn", "sparse", "sampled"):
        pytest.skip("does not read the head's logits")
    known = OBJECTIVES[name].options
    options = {k: v for k, v in {"temperature": 1.7, "temperature_squared": True}.items() if k in known}
    assert_equal(*both_ways([term(name, 0.6, **options)], lambda w, b: Head(w, b)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_weights_multiply_every_loss_of_a_token_and_nothing_else(dtype):
    """Token by token through plain autograd; a weight of 0 leaves a token out altogether."""
    terms = [term("cross_entropy", 0.7), term("sampled_reverse_kl"), term("reverse_kl", 0.3, temperature=2.0)]
    weights = torch.rand(N, generator=torch.Generator().manual_seed(1), dtype=torch.float64).round(decimals=1)
    weights[::4] = 0
    hidden, weight, bias, signals = parts(dtype=dtype)
    written = torch.arange(N) % 3 > 0
    more = {"weights": Given((weights.to(torch.float32),)), "from_teacher": Given((written.float(),))}
    total, sums = fused_loss(hidden, Head(weight, bias), terms, {**signals, **more})
    gradient = torch.autograd.grad(total, hidden)[0]
    hidden, weight, bias, signals = parts()
    expected, raw = 0, torch.nn.functional.linear(hidden, weight, bias)
    for t, one in zip(terms, sums):
        value = getattr(losses, t.name)(raw, *signals[t.form].chunk(slice(0, N), raw), **t.options)
        value = (value * weights.float() * (written if t.form == "targets" else 1)).sum()
        expected = expected + t.weight * value
        assert one.item() == pytest.approx(value.item(), abs=1e-9 if dtype == torch.float64 else 0.2)
    wanted = torch.autograd.grad(expected, hidden)[0]
    tolerance = 1e-10 if dtype == torch.float64 else 0.02 * float(wanted.abs().max())
    torch.testing.assert_close(gradient.double(), wanted, rtol=0, atol=tolerance)
    assert not gradient[::4].any() and gradient[1::4].any()
    whole, _ = whole_loss(raw, terms, {**signals, **more})
    torch.testing.assert_close(whole.double(), expected, rtol=1e-6, atol=1e-6)


HEADS = {
    "without a bias": lambda w, _b: Head(w),
    "frozen": lambda w, b: Head(w.detach(), b.detach()),
    "scaled": lambda w, b: Head(w, b, scale=0.3),
    "capped": lambda w, b: Head(w, b, scale=2.0, softcap=1.5),
}


@pytest.mark.parametrize("head", HEADS)
def test_every_head_equals_autograd(head):
    """A mixture of closed forms and a formula, one temperature apart, against every kind of head."""
    terms = [term("cross_entropy"), term("forward_kl", 0.5, temperature=2.0), term("total_variation", 0.25)]
    assert_equal(*both_ways(terms, HEADS[head]))


@pytest.mark.parametrize("upstream", [0.37, -2.0])
@pytest.mark.parametrize(
    "terms",
    [
        [term("cross_entropy", 0.7), term("forward_kl", 0.3)],
        [term("reverse_kl", 0.3, temperature=2.0), term("cross_entropy", 0.1)],
        [term("cross_entropy"), term("generalized_jsd", 0.5, beta=0.2, temperature=0.5)],
        [term("sparse_forward_kl"), term("sampled_cross_entropy", 0.2), term("forward_kl", temperature=3.0)],
        [term("total_variation", 2.0), term("cross_entropy")],
    ],
    ids=lambda terms: "+".join(t.name for t in terms),
)
def test_mixtures_equal_autograd(terms, upstream):
    """One reader of the teacher's logits writes over them, several readers of the student's do not."""
    assert_equal(*both_ways(terms, lambda w, b: Head(w, b), upstream=upstream))


def test_a_frozen_head_gets_no_gradient_and_costs_none():
    hidden, weight, _, signals = parts()
    fused_loss(hidden, Head(weight.detach()), [term("forward_kl")], signals)[0].backward()
    assert weight.grad is None and hidden.grad is not None


def test_a_tied_head_sums_both_uses_of_the_matrix():
    _, weight, _, signals = parts()
    ids = torch.arange(N) % V
    embedded = weight[ids]
    total, _ = fused_loss(embedded, Head(weight), [term("cross_entropy")], signals)
    total.backward()
    ours, weight.grad = weight.grad, None
    whole_loss(weight[ids] @ weight.T, [term("cross_entropy")], signals)[0].backward()
    torch.testing.assert_close(ours, weight.grad)


@settings(max_examples=30, deadline=None)
@given(
    chunk=st.integers(1, 60),
    piece=st.integers(1, 60),
    name=st.sampled_from(["forward_kl", "skew_reverse_kl"]),
)
def test_chunk_and_piece_size_change_nothing(chunk, piece, name):
    hidden, weight, _, signals = parts()
    saved = fused.HEAD_CHUNK, fused.LEAST_ROWS, fused.ENOUGH_ROWS, fused.CPU_CHUNK
    try:
        fused.HEAD_CHUNK, fused.LEAST_ROWS, fused.ENOUGH_ROWS, fused.CPU_CHUNK = (
            8 * chunk * V,
            1,
            1,
            piece * V,
        )
        total, _ = fused_loss(hidden, Head(weight), [term(name)], signals)
        total.backward()
    finally:
        fused.HEAD_CHUNK, fused.LEAST_ROWS, fused.ENOUGH_ROWS, fused.CPU_CHUNK = saved
    again, other, _, signals = parts()
    whole, _ = whole_loss(again @ other.T, [term(name)], signals)
    whole.backward()
    torch.testing.assert_close(total, whole)
    torch.testing.assert_close(hidden.grad, again.grad)
    torch.testing.assert_close(weight.grad, other.grad)


@pytest.mark.parametrize("teacher_vocabulary", [V - 3, V + 3])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "generalized_jsd"])
def test_a_padded_vocabulary_is_what_the_formula_says(name, teacher_vocabulary):
    """Surplus rows of a wider teacher are cut, those of the student count as forbidden by a narrower one."""
    ours, theirs = both_ways([term(name)], lambda w, b: Head(w, b), teacher_vocabulary=teacher_vocabulary)
    assert_equal(ours, theirs)
    assert all(bool(t.isfinite().all()) for t in ours)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "generalized_jsd"])
def test_a_padded_vocabulary_keeps_the_closed_form(name, monkeypatch):
    """A teacher with fewer rows (Qwen2.5's 0.5B for its 7B) is not sent through autograd chunk by chunk."""
    monkeypatch.setattr(Term, "formula", lambda *_: pytest.fail("the slow form was asked"))
    hidden, weight, bias, signals = parts(teacher_vocabulary=V - 3)
    total, _ = fused_loss(hidden, Head(weight, bias), [term(name)], signals)
    assert total.isfinite()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 4e-2)])
def test_autocast_and_single_precision_stay_near_double(dtype, tolerance):
    terms = [term("cross_entropy"), term("forward_kl", 0.5)]
    exact = both_ways(terms, lambda w, b: Head(w, b))[1]
    hidden, weight, bias, signals = parts(dtype=torch.float32)
    with torch.autocast("cpu", dtype, enabled=dtype is torch.bfloat16):
        total, _ = fused_loss(hidden, Head(weight, bias), terms, signals)
    (0.37 * total).backward()
    assert total.dtype == torch.float32 and weight.grad.dtype == torch.float32
    for a, b in zip((total.detach(), hidden.grad, weight.grad, bias.grad), (exact[0], *exact[2:])):
        assert float((a.double() - b).norm() / b.norm()) < tolerance


def test_float16_gradients_do_not_vanish():
    """A confident student's gradient is far below float16's smallest number until the loss scale arrives."""
    hidden, weight, _, signals = parts(dtype=torch.float32)
    with torch.no_grad():
        weight.mul_(1e-3)
    low, head = hidden.detach().half().requires_grad_(), Head(weight.detach().half())
    tiny = term("forward_kl", 1e-6)
    signals["dense"] = Given((torch.zeros(N, V),))
    total, _ = fused_loss(low, head, [tiny], signals)
    (total * 2.0**34).backward()
    again = low.detach().float().requires_grad_()
    reference, _ = whole_loss(again @ head.weight.float().T, [tiny], signals)
    (reference * 2.0**34).backward()
    assert float((low.grad.float() - again.grad).norm() / again.grad.norm()) < 0.02


def test_the_heads_float16_gradient_keeps_each_rows_size():
    """Rows of very different gradients, the largest of a chunk far below float16's smallest number."""
    hidden, weight, _, signals = parts(dtype=torch.float32)
    signals["dense"] = Given((torch.zeros(N, V),))
    with torch.no_grad():
        weight.mul_(1e-3)
        hidden.mul_(1e-2 * 4.0 ** -(torch.arange(N) % 3)[:, None])  # a gradient of 1e-7 and less
    low = weight.detach().half().requires_grad_()
    states = hidden.detach().half()
    total, _ = fused_loss(states, Head(low), [term("forward_kl")], signals)
    (total * 2.0**20).backward()
    again = low.detach().float().requires_grad_()
    reference, _ = whole_loss(states.float() @ again.T, [term("forward_kl")], signals)
    (reference * 2.0**20).backward()
    assert float((low.grad.float() - again.grad).norm() / again.grad.norm()) < 0.02


def test_no_tensor_of_all_tokens_and_the_vocabulary_is_made():
    """Every storage that autograd keeps or the forward allocates is below [N, V]."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, _types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for t in torch.utils._pytree.tree_leaves(out):
                if isinstance(t, torch.Tensor):
                    largest = max(largest, t.numel())
            return out

    hidden, weight, bias, signals = parts()
    with Watch():
        total, _ = fused_loss(
            hidden, Head(weight, bias), [term("forward_kl"), term("skew_forward_kl")], signals
        )
        total.backward()
    assert 0 < largest <= 10 * V < N * V


OURS = frozenset({"student", "dense"})


def in_closed_form(name: str, options: dict, rows: RowFormula):
    form = closed(name, options)
    value, make = form(rows)
    return value, make(rows.student if rows.alone else None) * form.factor


@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_closed_forms_are_their_formulas(beta, temperature, alone, rows):
    """For one row or several; in memory of their own, or (`alone`) in that of the logits."""
    student, teacher = torch.randn(rows, V, dtype=torch.float64), torch.randn(rows, V, dtype=torch.float64)
    options = {"temperature": temperature, "temperature_squared": False}
    for name, extra in (("forward_kl", {}), ("reverse_kl", {}), ("generalized_jsd", {"beta": beta})):
        given = (student.clone(), {"dense": (teacher.clone(),)})
        value, gradient = in_closed_form(
            name, options | extra, RowFormula(*given, *(OURS, OURS) if alone else ())
        )
        if not alone:
            assert torch.equal(given[0], student) and torch.equal(given[1]["dense"][0], teacher), "written to"
        leaf = student.clone().requires_grad_()
        expected = getattr(losses, name)(leaf, teacher, **options, **extra)
        expected.sum().backward()
        torch.testing.assert_close(value, expected.detach())
        torch.testing.assert_close(gradient, leaf.grad)


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_closed_forms_of_stored_signals_are_their_formulas(temperature, alone):
    """Absent entries, an id drawn twice, and both tails that have a closed form."""
    student = torch.randn(9, V, dtype=torch.float64)
    logprobs, ids = torch.randn(9, V, dtype=torch.float64).log_softmax(-1).topk(K, dim=-1)
    logprobs[2, -2:], ids[2, -2:] = -torch.inf, ids[2, 0]
    drawn, weights = ids.clone(), torch.rand(9, K, dtype=torch.float64)
    drawn[4, 1] = drawn[4, 0]
    common = {"temperature": temperature, "temperature_squared": True}
    for name, form, stored, extra in (
        ("sparse_forward_kl", "sparse", (ids, logprobs), {"tail": "renormalise"}),
        ("sparse_forward_kl", "sparse", (ids, logprobs), {"tail": "zero"}),
        ("sampled_cross_entropy", "sampled", (drawn, weights), {}),
    ):
        rows = RowFormula(student.clone(), {form: stored}, *(OURS, OURS) if alone else ())
        value, gradient = in_closed_form(name, common | extra, rows)
        leaf = student.clone().requires_grad_()
        expected = getattr(losses, name)(leaf, *stored, **common, **extra)
        expected.sum().backward()
        torch.testing.assert_close(value, expected.detach())
        torch.testing.assert_close(gradient, leaf.grad)
    assert closed("sparse_forward_kl", common | {"tail": "tail_bucket"}) is None


@pytest.mark.parametrize(
    "name, form, broken, message",
    [
        ("sparse_forward_kl", "sparse", lambda ids, values: (ids + V, values), "another tokenizer"),
        ("sparse_forward_kl", "sparse", lambda ids, values: (ids * 0, values), "names one id twice"),
        ("sampled_cross_entropy", "sampled", lambda ids, values: (ids, -values), "weight is negative"),
    ],
)
def test_stored_signals_that_cannot_be_right_are_refused_here_too(name, form, broken, message):
    hidden, weight, _, signals = parts(0)
    signals[form] = Given(broken(*signals[form].tensors))
    with pytest.raises(UserError, match=message):
        fused_loss(hidden, Head(weight), [term(name)], {form: signals[form]})


def test_second_objective_does_not_see_the_first_ones_scratch():
    """Closed forms share softmaxes: none may write to them."""
    student, teacher = torch.randn(5, V, dtype=torch.float64), torch.randn(5, V, dtype=torch.float64)
    options = {"temperature": 1.0, "temperature_squared": False}
    jsd = ("generalized_jsd", {**options, "beta": 0.4})
    alone = in_closed_form(*jsd, RowFormula(student, {"dense": (teacher,)}))
    shared = RowFormula(student, {"dense": (teacher,), "targets": (torch.arange(5),)})
    for name in ("forward_kl", "reverse_kl"):
        in_closed_form(name, options, shared)
    in_closed_form("cross_entropy", {}, shared)
    again = in_closed_form(*jsd, shared)
    for a, b in zip(alone, again):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@given(rows=st.integers(0, 5000), vocabulary=st.integers(1, 200_000), itemsize=st.sampled_from([2, 4, 8]))
def test_chunks_are_of_one_size_and_fit(rows, vocabulary, itemsize):
    size = fused.chunk_rows(rows, vocabulary, itemsize, torch.device("cpu"))
    row = vocabulary * itemsize
    enough = min(fused.ENOUGH_ROWS, 2 * fused.HEAD_CHUNK // row)  # of a large vocabulary, in twice the room
    room = max(fused.HEAD_CHUNK // row, enough, fused.LEAST_ROWS)
    assert 1 <= size <= min(room, fused.MOST_ROWS)
    chunks = -(-rows // size)
    assert rows == 0 or chunks * size - rows < chunks  # each as large as the next, but for one row
    assert chunks == -(-rows // min(room, fused.MOST_ROWS)), "no more chunks than must be"


@pytest.mark.parametrize(
    "vocabulary, itemsize, rows", [(151_936, 4, 147), (49_152, 4, 256), (49_152, 2, 512)]
)
def test_a_large_vocabulary_has_enough_rows_in_a_chunk(vocabulary, itemsize, rows, monkeypatch):
    """1,024 tokens, by the constants as they are shipped: 48 MiB, or up to 96 for rows enough."""
    monkeypatch.undo()
    assert fused.chunk_rows(1024, vocabulary, itemsize, torch.device("cpu")) == rows


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("slices", [7, 10**6])
def test_the_heads_gradient_is_summed_slice_by_slice(dtype, slices, monkeypatch):
    """Over two chunks of 16-bit products in float32: the numbers of whole products, of chunk after chunk."""
    monkeypatch.setattr(fused, "HEAD_SLICE", slices)
    torch.manual_seed(0)
    chunks = [(torch.randn(5, V).to(dtype), torch.randn(5, 4).to(dtype)) for _ in range(2)]
    found, right = torch.full((V, 4), torch.nan), torch.zeros(V, 4)
    for i, (logits, rows) in enumerate(chunks):
        fused._add_products(found, logits, rows, None, first=i == 0)
        right += (logits.t() @ rows).float()
    torch.testing.assert_close(found, right, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "generalized_jsd", "cross_entropy"])
@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_a_token_that_a_bias_forbids_is_what_the_formula_says(name, whose):
    """A logit of -inf in the middle of the vocabulary: whoever forbids it, nothing needed is written over."""
    if (name, whose) == ("cross_entropy", "teacher"):
        pytest.skip("hears no teacher")

    def forbidden():
        hidden, weight, bias, signals = parts()
        signals["targets"] = Given((signals["targets"].tensors[0] % 7,))
        theirs = signals["dense"].head
        (bias.detach() if whose == "student" else theirs.bias)[11] = -torch.inf
        return hidden, weight, bias.detach(), signals

    hidden, weight, bias, signals = forbidden()
    total, _ = fused_loss(hidden, Head(weight, bias), [term(name)], signals)
    total.backward()
    again, other, bias, signals = forbidden()
    whole, _ = whole_loss(again @ other.T + bias, [term(name)], signals)
    whole.backward()
    assert total.isfinite()
    torch.testing.assert_close(total, whole)
    torch.testing.assert_close(hidden.grad, again.grad)
    torch.testing.assert_close(weight.grad, other.grad)


def test_a_signal_that_is_not_ours_is_left_as_it_was():
    """Logits that somebody gave, or a model made whole, are read again by the next objective or the next step."""
    hidden, weight, _, signals = parts()
    given = Given(signals["dense"].chunk(slice(0, N), None))
    before = given.tensors[0].clone()
    fused_loss(hidden, Head(weight), [term("forward_kl")], {"dense": given})[0].backward()
    assert torch.equal(given.tensors[0], before)


@pytest.mark.parametrize(
    "name", ["forward_kl", "reverse_kl", "generalized_jsd", "cross_entropy", "sparse_forward_kl"]
)
def test_a_diverged_student_has_no_finite_loss(name):
    hidden, weight, _, signals = parts()
    with torch.no_grad():
        hidden[5, 2] = torch.nan
    total, _ = fused_loss(hidden, Head(weight), [term(name)], signals)
    assert not total.isfinite()


def test_nothing_to_learn_from_is_a_gradient_of_zero():
    _, weight, _, _ = parts()
    hidden = torch.zeros(0, D, dtype=torch.float64, requires_grad=True)
    total, _ = fused_loss(
        hidden, Head(weight), [term("cross_entropy")], {"targets": Given((torch.zeros(0, dtype=torch.long),))}
    )
    total.backward()
    assert total == 0 and torch.equal(weight.grad, torch.zeros_like(weight))


def test_scratch_is_kept_from_step_to_step_and_shared_by_nobody():
    scratch, like = fused.Scratch(), torch.zeros(1)
    first = scratch.take(5, like, 7, torch.float32)
    assert scratch.take(3, like, 7, torch.float32).data_ptr() == first.data_ptr()
    assert scratch.take(6, like, 7, torch.float32).shape == (6, 7)
    assert scratch.take(2, like, 7, torch.bfloat16).dtype == torch.bfloat16
    hidden, weight, _, signals = parts()
    expected = fused_loss(hidden, Head(weight), [term("forward_kl")], signals)[0]
    for _ in range(2):  # what is left in it from before is of no consequence
        found = fused_loss(hidden, Head(weight), [term("forward_kl")], signals, scratch)[0]
        assert torch.equal(found, expected)


def test_padding_of_the_other_vocabulary_stands_for_no_token():
    logits = torch.tensor([[1.0, 2.0, 3.0]])
    wider = match_vocabulary(logits, 5)
    assert wider.tolist() == [[1, 2, 3, -torch.inf, -torch.inf]]
    torch.testing.assert_close(wider.softmax(-1)[:, :3], logits.softmax(-1))  # no probability goes there
    assert match_vocabulary(logits, 2).tolist() == [[1, 2]]
