"""What of a row counts: guards on what the student wrote, tags in balance, and the log-probabilities of its draws."""

import json

import numpy as np
import pytest
import torch
from conftest import byte_tokenizer
from training_example import SGD, losses_of, stopped_after, stored

from distill.config.recipe import load_recipe
from distill.config.training import OnPolicy
from distill.errors import UserError
from distill.models.load import load_model
from distill.training.sources import OnPolicyRows, StoredRows, balanced

DRAWN = "train.objectives=[{name: sampled_reverse_kl, clip: 0.2}]"
ALL_ITS_OWN = "train.on_policy={fraction: 1.0, buffer_steps: 4, max_new_tokens: 6, most_truncated: 1.0}"


@pytest.fixture(scope="module")
def student(hub):
    return load_model(hub["llama"], "fp32")


@pytest.fixture
def source(student):
    tokenizer = byte_tokenizer(None)
    tokenizer.pad_token = tokenizer.eos_token

    def make(gather=lambda v: [v], balance=False, **section):
        options = {"fraction": 1.0, "buffer_steps": 2, "max_new_tokens": 6, "most_truncated": 1.0, **section}
        rows = stored()
        rows.tags = np.array(["long" if i % 4 else "short" for i in range(12)], dtype=object)
        return OnPolicyRows(rows, 6, 0, OnPolicy(**options), student, tokenizer, {1}, gather, balance)

    return make


def completions(rows) -> list[tuple[list[int], np.ndarray]]:
    spans = zip(rows.completion_starts, rows.completion_starts[1:])
    return [(rows.completion_tokens[a:b].tolist(), rows.weights[a:b]) for a, b in spans]


def test_guards_leave_out_what_they_say_and_the_step_divides_by_the_rest(source):
    free = source().lot(0)
    assert free.rows.weights is None and free.tokens == free.rows.completion_lengths.sum()
    made = source(first_tokens=3, skip_special=True)
    made.special = {int(free.rows.completion_tokens[0])}
    lot = made.lot(0)
    for written, weights in completions(lot.rows):
        wanted = [float(i < 3 and token not in made.special) for i, token in enumerate(written)]
        assert weights.tolist() == wanted
    assert lot.tokens == np.count_nonzero(lot.rows.weights) < free.tokens
    whole = source(skip_truncated=True).lot(0)
    ends = [written[-1] == 1 for written, _ in completions(whole.rows)]
    assert [bool(weights.any()) for _, weights in completions(whole.rows)] == ends
    assert whole.tokens == max(1, sum(len(w) for w, _ in completions(whole.rows) if w[-1] == 1))


def test_a_teachers_row_is_left_whole(source):
    lot = source(fraction=0.5, first_tokens=1).lot(0)
    counted = [weights.sum() for _, weights in completions(lot.rows)]
    lengths = lot.rows.completion_lengths
    assert counted == np.where(lot.rows.sampled, 1, lengths).tolist() and 0 < lot.rows.sampled.mean() < 1


def test_tags_count_the_same_whatever_their_tokens(source):
    """Over two processes as in one: each knows its own rows, and the shares are of the whole step."""
    lot = source(balance=True).lot(3)
    by_tag = {tag: lot.rows.weights[np.repeat(lot.rows.tags == tag, lot.rows.completion_lengths)] for tag in
              set(lot.rows.tags)}  # fmt: skip
    assert len(by_tag) == 2 and len({len(w) for w in by_tag.values()}) == 2, "tags of different sizes"
    sums = [float(w.sum()) for w in by_tag.values()]
    assert sums == pytest.approx([lot.tokens / 2] * 2) and lot.tokens == lot.rows.completion_lengths.sum()
    everyone: dict[int, list] = {}  # what the two processes hand each other, meeting by meeting

    def gather_of(rank, round_):
        met = iter(range(99))

        def gather(value):
            place = next(met)
            everyone.setdefault(place, [None, None])[rank] = value
            return everyone[place] if round_ else [value]

        return gather

    for round_ in range(2):  # the first round only collects
        shares = [source(gather_of(rank, round_), balance=True).lot(3, rank, 2) for rank in range(2)]
    weights = {tag: {float(w) for w in values} for tag, values in by_tag.items()}
    mixes = {float(np.mean(share.rows.tags == "long")) for share in shares}
    assert len(mixes) == 2, "each process alone would give other weights"
    for share in shares:
        for tag, (_, found) in zip(share.rows.tags, completions(share.rows)):
            assert {float(w) for w in found} == weights[tag]
    assert {share.tokens for share in shares} == {lot.tokens}


def test_stored_rows_are_balanced_step_by_step():
    rows = stored(12)
    rows.tags = np.array(["a", "b", "b", "b"] * 3, dtype=object)
    plain = StoredRows(rows, 6, 0, balance=True)
    for step in range(4):
        chosen = plain.plan.step_rows(step)
        lots = [plain.lot(step, rank, 2) for rank in range(2)]
        batch = rows.collate(chosen, 0)
        owner = np.repeat(rows.tags[chosen], rows.completion_lengths[chosen])
        sums = {tag: float(batch.weights.numpy()[owner == tag].sum()) for tag in set(owner)}
        assert list(sums.values()) == pytest.approx([lots[0].tokens / len(sums)] * len(sums))
    assert balanced({"a": 0, "b": 5}) == {"a": 0.0, "b": 1.0}


def test_log_probabilities_are_those_of_the_draws(source, student):
    lot = source().lot(0)
    batch = lot.rows.collate(np.arange(6), 0)
    with torch.no_grad():
        logs = student(**batch.inputs(), use_cache=False).logits.log_softmax(-1)
    now = logs[batch.keep].gather(1, batch.targets[:, None])[:, 0]
    torch.testing.assert_close(batch.drawn, now, rtol=1e-4, atol=1e-4)


def test_a_resume_weighs_the_very_draws(trained, monkeypatch):
    """Ratios are of the weights that drew: without what was kept of them the steps after a resume would differ."""
    guards = ["train.on_policy.first_tokens=4", "train.teachers.balance=true"]
    options = [DRAWN, ALL_ITS_OWN, *guards, "control.enabled=false", *SGD]
    whole, whole_dir = trained("whole", *options)
    stopped_after(2, monkeypatch, lambda: trained("stopped", *options))
    state = next((whole_dir.parent / "stopped" / "student").glob("state-*"))
    kept = [json.loads(p.read_text()) for p in state.glob("*.json") if "buffer" in p.read_text()]
    assert kept, "the state holds what was sampled"
    resumed, run_dir = trained("stopped", *options)
    assert losses_of(run_dir) == losses_of(whole_dir)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ([DRAWN], "from its own distribution: set `on_policy.fraction`"),
        ([DRAWN, ALL_ITS_OWN.replace("1.0, b", "1.0, top_p: 0.9, b")], "set `on_policy.fraction`"),
        ([DRAWN, ALL_ITS_OWN, "train.validation.rows=2"], "`validation.rows` to 0"),
        (["train.teachers.balance=true", "train.objectives=[{name: hidden_cosine}]"], "of single tokens"),
        (["generate.by_tag=true"], "named in `train.teachers.models`"),
    ],
)
def test_what_cannot_be_weighed_is_refused(make_recipe, overrides, line):
    with pytest.raises(UserError, match=line):
        load_recipe(make_recipe()[0], overrides)
