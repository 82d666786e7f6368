"""Shift and mask against brute force; the batch plan against its promises."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.data.batches import BatchPlan, TokenRows, micro_batches
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


def test_empty_rows_are_refused(tmp_path):
    from distill.storage import DATASET_SCHEMA, PartWriter

    writer = PartWriter(tmp_path, DATASET_SCHEMA)
    writer.write_all([])
    with pytest.raises(UserError, match="no rows to train on"):
        TokenRows.from_folder(tmp_path)
    writer.write_all([{"prompt_id": "a", "prompt_ids": [1], "completion_ids": []}])
    with pytest.raises(UserError, match="empty prompt or completion"):
        TokenRows.from_folder(tmp_path)
