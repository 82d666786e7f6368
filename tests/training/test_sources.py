"""On-policy rows and live teachers: who writes, who scores, and that a resume trains on the very same text."""

import json
import re

import numpy as np
import pytest
import torch
from conftest import byte_tokenizer
from launching import forked, processes_of
from safetensors.torch import load_file
from training_example import SGD, assert_same, losses_of, stopped_after, stored

import distill.training.sources as module
from distill.config.recipe import load_recipe
from distill.config.training import Objective, OnPolicy
from distill.errors import RunError, UserError
from distill.models.decode import Completion
from distill.models.load import load_model
from distill.training.live_teachers import FrozenTeacher, OwnStart, RoutedTeachers
from distill.training.sources import OnPolicyRows, StoredRows
from distill.training.step import StudentStep

REVERSE = "train.objectives=[{name: reverse_kl}]"
ON_POLICY = "train.on_policy={fraction: 0.5, buffer_steps: 2, max_new_tokens: 6, most_truncated: 1.0}"
RUN = [REVERSE, ON_POLICY, *SGD]


@pytest.fixture
def source(hub):
    model = load_model(hub["llama"], "fp32")
    tokenizer = byte_tokenizer(None)
    tokenizer.pad_token = tokenizer.eos_token

    def make(gather=lambda v: [v], ends=frozenset({1}), **section):
        options = {"fraction": 0.5, "buffer_steps": 2, "max_new_tokens": 6, "most_truncated": 1.0, **section}
        return OnPolicyRows(stored(), 6, 0, OnPolicy(**options), model, tokenizer, set(ends), gather)

    return make


def contents(lot) -> list[tuple]:
    return sorted(
        (tuple(map(int, p)), tuple(map(int, c))) for p, c in map(lot.rows.row, range(len(lot.rows)))
    )


def test_the_student_writes_its_share_and_the_teacher_the_rest(source):
    half = source()
    sampled = np.concatenate([half.lot(step).rows.sampled for step in range(20)])
    assert 0.3 < sampled.mean() < 0.7 and half.stats["mean_tokens"] <= 6
    all_of_it = source(fraction=1.0).lot(3)
    assert all_of_it.rows.sampled.all()
    plain = source(fraction=0.0).lot(3)
    expected = [tuple(map(tuple, stored().row(i))) for i in half.plan.step_rows(3)]
    assert contents(plain) == sorted((tuple(map(int, p)), tuple(map(int, c))) for p, c in expected)
    # Prompts are the dataset's in any case.
    assert sorted(p for p, _ in contents(all_of_it)) == sorted(p for p, _ in contents(plain))


def test_plain_text_is_continued_from_its_beginning(source):
    """The first tokens of a row, of its prompt and of what follows; short rows keep a token to be written."""
    never = {60_000}  # no piece of text ends with the student's end token
    plain = source(fraction=0.0).lot(3)
    text = source(ends=never, fraction=1.0, context=4, most_truncated=0.0)
    with pytest.raises(UserError, match="no stored answer ends"):
        source(ends=never)
    lot = text.lot(3)
    whole = sorted(
        (tuple(map(int, p)) + tuple(map(int, c))) for p, c in map(plain.rows.row, range(len(plain.rows)))
    )
    read = sorted(p for p, _ in contents(lot))
    assert read == sorted(row[: min(4, len(row) - 1)] for row in whole)
    for step in range(4, 12):
        text.lot(step)  # that no text ends is no alarm


def test_what_is_drawn_does_not_depend_on_processes_or_order(source):
    whole = contents(source().lot(4))
    shares = [source().lot(4, rank, 2) for rank in range(2)]
    assert sorted(row for share in shares for row in contents(share)) == whole
    late, early = source(), source()
    for step in range(4):
        early.lot(step)
    assert contents(late.lot(4)) == contents(early.lot(4)) == whole


def test_a_lot_of_stored_rows_counts_the_step_and_holds_one_share_of_it():
    rows = stored(12)
    plain = StoredRows(rows, 5, 0)
    shares, seen = [], []
    for step in range(12):  # five epochs of twelve rows, five at a time
        lots = [plain.lot(step, rank, 2) for rank in range(2)]
        both = np.concatenate([lot.share for lot in lots])
        assert {lot.tokens for lot in lots} == {int(rows.completion_lengths[both].sum())}
        assert {lot.read for lot in lots} == {
            int((rows.prompt_lengths + rows.completion_lengths)[both].sum())
        }
        assert [len(lot.share) for lot in lots] == [3, 2] and lots[0].rows is rows
        for lot in lots:  # each process knows how long all rows of the step are, and whose
            assert all(
                (n == rows.lengths[other.share]).all() for n, other in zip(lot.lengths, lots, strict=True)
            )
        shares.append(sorted(both.tolist()))
        seen += both.tolist()
    assert np.bincount(seen).tolist() == [5] * 12 and shares[0] != shares[5]
    assert plain.state() is None and plain.stats == {}


def test_what_is_asked_of_the_decoder_is_what_the_recipe_says(source, monkeypatch):
    """Sampling, end tokens, vocabulary, and one key for each place: seed, step and place all count."""
    calls = []

    def decode(_model, prompts, sampling, **more):
        calls.append((prompts, sampling, more))
        return [Completion([7, 1], "stop" if i % 4 else "length", [0.0, 0.0]) for i in range(len(prompts))]

    monkeypatch.setattr(module, "decode", decode)
    made = source(fraction=1.0, temperature=0.7, top_p=0.9, max_new_tokens=5, batch_size=3)
    lot = made.lot(3)
    ((prompts, sampling, more),) = calls
    assert (sampling.temperature, sampling.top_p, sampling.max_new_tokens) == (0.7, 0.9, 5)
    assert (more["eos_ids"], more["batch_size"]) == ({1}, 3) and more["vocab_limit"] == len(made.tokenizer)
    # Buffers of two steps end at multiples of two, whatever step is asked for first.
    assert more["keys"] == [(0, "rollout", 3, place) for place in range(6)] and made.filled == (3, 4)
    assert prompts == [stored().row(i)[0].tolist() for i in made.plan.step_rows(3)]
    assert (lot.tokens, lot.read) == (12, 12 + sum(map(len, prompts)))
    assert [c for _, c in contents(lot)] == [(7, 1)] * 6 and lot.rows.lengths[lot.share].tolist() == sorted(
        lot.rows.lengths
    )
    assert made.stats == {"sampled": 6, "truncated": round(2 / 6, 4), "mean_tokens": 2.0}
    made.lot(4)
    assert made.filled == (4, 6) and len(calls) == 2, "step 4 is not in the buffer that ended before it"
    assert calls[1][2]["keys"] == [(0, "rollout", step, place) for step in (4, 5) for place in range(6)]
    made.lot(5)
    assert len(calls) == 2


def test_who_writes_depends_on_seed_and_step(source):
    made = source()
    of = lambda seed, step: tuple(OnPolicyRows._writes(_like(made, seed), step))  # noqa: E731
    drawn = {(seed, step): of(seed, step) for seed in (0, 1) for step in range(6)}
    assert len(set(drawn.values())) > 8 and drawn == {key: of(*key) for key in drawn}
    rare = source(fraction=0.1)
    assert 0.03 < np.mean([rare._writes(step) for step in range(100)]) < 0.2


def _like(made: OnPolicyRows, seed: int) -> OnPolicyRows:
    other = OnPolicyRows.__new__(OnPolicyRows)
    other.seed, other.plan, other.section = seed, made.plan, made.section
    return other


def test_tags_and_who_wrote_go_with_their_rows(source):
    made = source(fraction=0.5)
    made.rows.tags = np.array([f"row {i}" for i in range(12)], dtype=object)
    for rank in range(2):
        rows = made.lot(3, rank, 2).rows
        places = np.arange(6)[rank::2]
        assert rows.tags.tolist() == [f"row {i}" for i in made.plan.step_rows(3)[places]]
        assert rows.sampled.tolist() == made._writes(3)[places].tolist()
        for i, (place, sampled) in enumerate(zip(places, rows.sampled)):
            own, *_ = made.buffer.get((3, int(place)), (None,))
            given = made.rows.row(made.plan.step_rows(3)[place])[1].tolist()
            assert rows.row(i)[1].tolist() == (own if sampled else given)


def test_the_alarm_counts_buffers_running_and_comes_back_on_a_resume(source, monkeypatch):
    cut = []
    reasons = lambda n: ["length" if i < cut[-1] * n else "stop" for i in range(n)]  # noqa: E731
    decode = lambda _m, prompts, *_a, **_k: [Completion([7, 1], r, []) for r in reasons(len(prompts))]  # noqa: E731
    monkeypatch.setattr(module, "decode", decode)
    made = source(fraction=1.0, most_truncated=0.5)
    for step, (share, bad) in enumerate([(1.0, 1), (0.5, 0), (0.75, 1), (0.0, 0), (0.75, 1)]):
        cut.append(share)
        made.lot(2 * step)
        assert made.bad_buffers == bad, "as many as allowed is not too many"
    other = source(fraction=1.0, most_truncated=0.5)
    other.restore(json.loads(json.dumps(made.state())))
    assert (other.buffer, other.filled, other.bad_buffers) == (made.buffer, (8, 10), 1)
    with pytest.raises(RunError, match="step 11: 75% of the student's answers"):
        other.lot(10)


def test_the_state_has_the_buffers_of_all_processes(source):
    other = [((0, 9), ([5, 5], [-1.0, -2.0]))]
    made = source(gather=lambda v: [v, other] if isinstance(v, list) else [v])
    made.lot(0)
    assert [0, 9, [5, 5], [-1.0, -2.0]] in made.state()["buffer"] and len(made.state()["buffer"]) == 1 + len(
        made.buffer
    )


def test_tokens_are_those_of_all_processes(source):
    alone = source().lot(0)
    counts = [source().lot(0, rank, 2) for rank in range(2)]
    assert sum(lot.tokens for lot in counts) == alone.tokens == int(alone.rows.completion_lengths.sum())
    theirs = np.array([400, 600])
    both = source(gather=lambda v: [v, (100, theirs)] if len(v) == 2 and isinstance(v[0], int) else [v]).lot(
        0
    )
    assert both.tokens == alone.tokens + 100 and both.read == alone.read + 1000
    assert both.lengths[1] is theirs and (both.lengths[0] == both.rows.lengths[both.share]).all()


def test_cross_entropy_is_not_taken_on_the_students_own_words(hub):
    """On sampled rows the gradient of cross-entropy is 0; on stored rows it is what it was."""
    model = load_model(hub["llama"], "fp32", training=True)
    rows = stored(4)
    step = StudentStep(model, [Objective(name="cross_entropy")])
    sums = {}
    for name, mask in {"all": None, "some": [True, False, True, False], "none": [True] * 4}.items():
        rows.sampled = None if mask is None else np.array(mask)
        total, _ = step(rows.collate(np.arange(4), 0), {})
        total.backward()
        sums[name] = total.item(), model.lm_head.weight.grad.abs().sum().item()
        model.zero_grad()
    rows.sampled = None
    two, _ = step(rows.collate(np.array([1, 3]), 0), {})
    assert sums["none"] == (0.0, 0.0)
    assert sums["some"][0] == pytest.approx(two.item(), rel=1e-5) and sums["some"][0] < sums["all"][0]


def test_accumulation_and_another_number_of_processes_change_nothing(trained, make_recipe, monkeypatch):
    """One process is stopped in the middle of its second buffer; two go on, with its text and then with their own."""
    options = [*RUN, "train.steps=6"]
    whole, run_dir = trained("whole", *options, "train.micro_batch_size=6")
    split, _ = trained("split", *options, "train.micro_batch_size=2")
    assert_same(whole, split, 2e-6)
    lines = [json.loads(line) for line in (run_dir / "student" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["on_policy"]["sampled"] for line in lines)
    stopped_after(3, monkeypatch, lambda: trained("two", *options, "train.micro_batch_size=6"))
    path, two_dir = make_recipe(name="two")
    assert [p.name for p in (two_dir / "student").glob("state-*")] == ["state-0000003"]
    forked(["train", path, *options], 2)
    assert processes_of(two_dir / "student") == 2
    assert losses_of(two_dir) == pytest.approx(losses_of(run_dir), abs=1e-5)
    assert_same(whole, load_file(next((two_dir / "student").glob("*.safetensors"))), 1e-5)


def test_processes_sample_together_whatever_falls_to_them(source, hub):
    """With few sampled rows some processes have none in a step; they must still meet the others as often, and
    the text must be that of weights of the same age as in one process."""
    meetings = {"alone": [], 0: [], 1: []}
    written = {}
    for who, rank, world in (("alone", 0, 1), (0, 0, 2), (1, 1, 2)):
        model = load_model(hub["llama"], "fp32")
        rows = source(
            gather=lambda v, w=who: (meetings[w].append(len(v)), [v])[1], fraction=0.15, buffer_steps=4
        )
        rows.student = model
        for step in range(12):
            written[who, step] = contents(rows.lot(step, rank, world))
            with torch.no_grad():  # an update
                for p in model.parameters():
                    p.mul_(-1.0 if step % 2 else 0.5)
    assert meetings[0] == meetings[1] == meetings["alone"]
    for step in range(12):
        assert sorted(written[0, step] + written[1, step]) == written["alone", step]


def test_a_resume_trains_on_the_text_that_was_sampled(trained, monkeypatch):
    """Stopped in the middle of a buffer: its text was written by older weights, and is kept."""
    options = [REVERSE, ON_POLICY.replace("buffer_steps: 2", "buffer_steps: 4"), "control.enabled=false"]
    whole, whole_dir = trained("whole", *options)
    stopped_after(5, monkeypatch, lambda: trained("stopped", *options))
    resumed, run_dir = trained("stopped", *options)
    assert losses_of(run_dir) == losses_of(whole_dir)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    counts = [
        json.loads((d / "student" / "manifest.json").read_text())["counts"] for d in (whole_dir, run_dir)
    ]
    assert counts[0]["tokens_sampled"] == counts[1]["tokens_sampled"] > 0


def test_what_the_student_writes_is_in_its_training_flops(trained):
    """One forward pass for every token that it read or wrote to make a row, beside those of training."""
    found = {}
    for name, extra in (("own", ON_POLICY), ("stored", "seed=0")):
        _, run_dir = trained(name, REVERSE, extra, "control.enabled=false")
        found[name] = json.loads((run_dir / "student" / "manifest.json").read_text())
    stored = found["stored"]
    per_token = stored["flops"] / stored["counts"]["tokens_read"]
    sampled = found["own"]["counts"]["tokens_sampled"]
    assert stored["counts"]["tokens_sampled"] == 0 < sampled
    forward = (found["own"]["flops"] - per_token * found["own"]["counts"]["tokens_read"]) / sampled
    # Full training reads each token for three forward passes of the student and one of the teacher.
    assert per_token / 6 < forward < per_token / 3


def test_another_end_token_is_refused_before_anything_is_sampled(hub):
    tokenizer = byte_tokenizer(None)
    with pytest.raises(
        UserError, match=r"no stored answer ends with the student's end token \[0\]; they end with"
    ):
        OnPolicyRows(stored(), 6, 0, OnPolicy(fraction=1.0), torch.nn.Identity(), tokenizer, {0})


def test_exploding_lengths_stop_the_run_with_advice(source):
    endless = source(fraction=1.0, most_truncated=0.2)
    endless.eos_ids = {249}  # an end that random weights hardly ever say
    endless.lot(0)
    with pytest.raises(
        RunError, match=r"ran into train.on_policy.max_new_tokens=6 in two buffers running \(stored"
    ):
        endless.lot(2)


def test_recipes_that_cannot_mean_anything_are_refused(make_recipe):
    path, _ = make_recipe()
    with pytest.raises(UserError, match="needs a live divergence to score what the student writes"):
        load_recipe(path, [ON_POLICY])
    signal = "generate.signal={kind: top_k}"
    with pytest.raises(UserError, match="reads stored signals"):
        load_recipe(
            path, [ON_POLICY, signal, "train.objectives=[{name: reverse_kl}, {name: sparse_forward_kl}]"]
        )
    with pytest.raises(UserError, match="exclude each other"):
        load_recipe(path, ["train.teachers={own_start: true, models: {a: b}}"])


# ---- who scores ------------------------------------------------------------------------------------------


def dense(signal, batch, vocabulary):
    n = len(batch.targets)
    return signal["dense"].chunk(slice(0, n), torch.empty(n, vocabulary))[0].clone()


def test_each_row_is_scored_by_the_teacher_of_its_tag(hub):
    a, b = (load_model(hub[name], "fp32") for name in ("llama", "qwen3_moe"))
    one, other = FrozenTeacher(a), FrozenTeacher(b)
    rows = stored(5)
    rows.tags = np.array(["x", "y", "x", "z", "y"], dtype=object)
    batch = rows.collate(np.array([3, 1, 0, 4]), 0)
    found = dense(RoutedTeachers({"y": other}, one)(batch), batch, 258)
    alone = {"y": dense(other(batch), batch, 258), "": dense(one(batch), batch, 258)}
    start = 0
    for i in (3, 1, 0, 4):
        stop = start + rows.completion_lengths[i]
        expected = alone["y" if rows.tags[i] == "y" else ""][start:stop]
        torch.testing.assert_close(found[start:stop], expected)
        start = stop
    assert not torch.allclose(alone["y"], alone[""])


def test_self_distillation_scores_with_the_weights_it_started_from(hub, trained):
    from peft import LoraConfig, get_peft_model

    base = load_model(hub["llama"], "fp32", training=True)
    batch = stored(4).collate(np.arange(4), 0)
    expected = dense(FrozenTeacher(load_model(hub["llama"], "fp32"))(batch), batch, 258)
    adapted = get_peft_model(
        base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    ).train()
    teacher = OwnStart(adapted)
    torch.testing.assert_close(dense(teacher(batch), batch, 258), expected)
    assert adapted.training and any(p.requires_grad for p in adapted.parameters())
    # At the start student and teacher are one, so the divergence is 0; then data moves it away.
    options = "train.objectives=[{name: cross_entropy}, {name: forward_kl}]"
    for adapter in ("lora", "full"):
        _, run_dir = trained(
            adapter, options, "train.teachers={own_start: true}", f"student.adapter={adapter}"
        )
        lines = (run_dir / "student" / "metrics.jsonl").read_text().splitlines()
        kl = [json.loads(line)["objectives"]["forward_kl"] for line in lines]
        assert abs(kl[0]) < 1e-6 < kl[-1]


def test_teachers_by_tag_train_end_to_end(trained, hub):
    tags = f"train.teachers={{by: level, models: {{easy: {hub['llama']}}}}}"
    _, run_dir = trained("tags", "train.objectives=[{name: forward_kl}]", tags)
    assert all(np.isfinite(losses_of(run_dir)))


def test_the_message_of_another_vocabulary_names_every_such_teacher(trained, hub):
    tags = f"train.teachers={{models: {{a: {hub['other_vocabulary']}}}}}"
    with pytest.raises(UserError, match=re.escape(hub["other_vocabulary"])):
        trained("refused", "train.objectives=[{name: forward_kl}]", tags)
