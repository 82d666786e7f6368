"""Shift and mask against brute force; the batch plan against its promises."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distill.data.batches import BatchPlan, TokenRows, even_pieces, micro_batches
from distill.errors import UserError

token_lists = st.lists(st.integers(1, 99), min_size=1, max_size=7)


@given(st.lists(st.tuples(token_lists, token_lists), min_size=1, max_size=6))
def test_collate_is_the_definition(pairs):
    """Kept positions, in order, predict exactly the completion tokens, each from the tokens before it."""
    rows = TokenRows([p for p, _ in pairs], [c for _, c in pairs])
    batch = rows.collate(np.arange(len(pairs)), pad_id=0)
    expected = []
    for b, (prompt, completion) in enumerate(pairs):
        whole = prompt + completion
        for t in range(batch.input_ids.shape[1]):
            assert batch.attention_mask[b, t] == (t < len(whole) - 1)
            assert batch.input_ids[b, t] == (whole[t] if t < len(whole) - 1 else 0)
            kept = len(prompt) <= t + 1 < len(whole)
            assert batch.keep[b, t] == kept
            if kept:
                expected.append(whole[t + 1])
    assert batch.targets.tolist() == expected == [t for _, c in pairs for t in c]


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=40),
    st.integers(1, 12),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(0, 9),
)
def test_any_split_over_processes_and_micro_batches_is_the_same_step(lengths, batch_size, micro, world, step):
    plan = BatchPlan(np.array(lengths), batch_size, seed=3)
    whole = plan.step_rows(step)
    shares = [plan.share(step, rank, world) for rank in range(world)]
    pieces = [i for share in shares for m in micro_batches(share, plan.lengths, micro) for i in m]
    assert sorted(pieces) == sorted(whole)
    assert len(whole) == batch_size


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=40),
    st.integers(1, 12),
    st.integers(1, 120),
    st.booleans(),
)
def test_pieces_stay_within_their_tokens(lengths, most_rows, most_tokens, padded):
    lengths = np.sort(np.array(lengths))
    every = np.arange(len(lengths))
    pieces = list(micro_batches(every, lengths, most_rows, most_tokens, padded))
    assert np.concatenate(pieces).tolist() == every.tolist()
    for a, b in zip(pieces, [*pieces[1:], None]):
        cost = lambda i: len(i) * lengths[i].max() if padded else lengths[i].sum()  # noqa: E731
        assert len(a) == 1 or (cost(a) <= most_tokens and len(a) <= most_rows)
        if b is not None:  # and none could have taken the next row too
            more = np.append(a, b[0])
            assert cost(more) > most_tokens or len(more) > most_rows


@given(st.integers(1, 30), st.integers(1, 12))
def test_every_epoch_sees_every_row_once(rows, batch_size):
    plan = BatchPlan(np.ones(rows), batch_size, seed=1)
    stream = [i for step in range(3 * rows) for i in plan.step_rows(step)]
    # Within a step rows are sorted, so count over whole epochs that end where a step ends.
    seen = stream[: rows * batch_size]
    assert np.bincount(seen, minlength=rows).tolist() == [batch_size] * rows


def test_shapes_differ_by_seed_and_epoch():
    plans = [BatchPlan(np.arange(64), 64, seed) for seed in (0, 1)]
    one = BatchPlan(np.ones(64), 16, 0)
    assert sorted(plans[0].step_rows(0)) == sorted(plans[1].step_rows(0)) == list(range(64))
    assert set(one.step_rows(0)) != set(one.step_rows(4))


def test_steps_are_cut_from_the_permutations_of_seed_and_epoch():
    """Seven rows, three a step: the stream is numpy's own permutations end to end, each step sorted by length."""
    lengths = np.array([5, 1, 4, 1, 3, 9, 2])
    for seed in (0, 3):
        stream = np.concatenate([np.random.default_rng([seed, epoch]).permutation(7) for epoch in range(4)])
        plan = BatchPlan(lengths, 3, seed)
        for step in range(9):
            rows = stream[3 * step : 3 * step + 3]
            want = sorted(rows, key=lambda i: (lengths[i], rows.tolist().index(i)))
            assert plan.step_rows(step).tolist() == want
            assert [plan.share(step, rank, 2).tolist() for rank in (0, 1)] == [want[::2], want[1::2]]
    first, other = (set(BatchPlan(lengths, 3, seed).step_rows(0).tolist()) for seed in (0, 3))
    assert first != other


class Told:
    """Signals of three rows: the first row's tokens say 0, 1, ..., the second's 100, 101, ..."""

    form = None

    def __init__(self, rows=(0, 1, 2)):
        self.ids = self.values = list(rows)

    def take(self, indices, lengths):
        told = [100 * self.ids[i] + np.arange(n) for i, n in zip(indices, lengths)]
        return torch.from_numpy(np.concatenate(told))


@pytest.mark.parametrize("how", ["collate", "pack"])
def test_what_is_known_of_a_row_stands_at_its_own_tokens(how):
    rows = TokenRows([[5], [6, 6], [7]], [[1, 1], [2, 2, 2], [3]], Told())
    rows.tags, rows.messages = np.array(["a", "b", "c"], dtype=object), ["first", "second", "third"]
    rows.sampled = np.array([False, True, False])
    order = np.array([2, 1, 0])
    batch = rows.collate(order, 0) if how == "collate" else rows.pack(order)
    assert batch.targets.tolist() == [3, 2, 2, 2, 1, 1]
    assert batch.signal.tolist() == [200, 100, 101, 102, 0, 1]
    assert batch.from_teacher.tolist() == [1, 0, 0, 0, 1, 1]
    assert batch.tags.tolist() == ["c", "b", "a"] and batch.messages == ["third", "second", "first"]
    assert batch.row_tokens.tolist() == [1, 3, 2]
    if how == "pack":
        assert batch.input_ids.tolist() == [[7, 6, 6, 2, 2, 5, 1]]
        assert batch.position_ids.tolist() == [[0, 0, 1, 2, 3, 0, 1]]
        assert batch.keep.int().tolist() == [[1, 0, 1, 1, 1, 1, 1]] and batch.attention_mask is None
    rows.signals = None
    some = rows.subset(np.array([2, 0]))
    assert some.tags.tolist() == ["c", "a"] and some.messages == ["third", "first"]
    assert some.sampled.tolist() == [False, False] and some.row(1)[1].tolist() == [1, 1]


def test_pieces_are_filled_up_with_weight_nothing():
    pieces = [np.array([4, 2]), np.array([7])]
    found = even_pieces(pieces, 4)
    assert [(p.tolist(), w) for p, w in found] == [([4, 2], 1.0), ([7], 1.0), ([7], 0.0), ([7], 0.0)]
    assert [(p.tolist(), w) for p, w in even_pieces([], 1)] == [([0], 0.0)]
    assert [w for _, w in even_pieces(pieces, 2)] == [1.0, 1.0]


def test_a_row_without_its_signal_is_refused(tmp_path):
    from distill.data.signals import SignalFormat
    from distill.storage import DATASET_SCHEMA, PartWriter

    row = {"prompt_id": "a", "prompt_ids": [1], "completion_ids": [1]}
    PartWriter(tmp_path, DATASET_SCHEMA).write_all([row])
    assert len(TokenRows.from_folder(tmp_path)) == 1
    with pytest.raises(UserError, match="rows without a stored teacher signal"):
        TokenRows.from_folder(tmp_path, SignalFormat("top_k", 1, 9, 1.0, 8, {}))


def test_empty_rows_are_refused(tmp_path):
    from distill.storage import DATASET_SCHEMA, PartWriter

    writer = PartWriter(tmp_path, DATASET_SCHEMA)
    writer.write_all([])
    with pytest.raises(UserError, match="no rows to train on"):
        TokenRows.from_folder(tmp_path)
    for prompt, completion in (([1], []), ([], [1])):
        writer.write_all([{"prompt_id": "a", "prompt_ids": prompt, "completion_ids": completion}])
        with pytest.raises(UserError, match="empty prompt or completion"):
            TokenRows.from_folder(tmp_path)
