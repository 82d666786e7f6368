"""Signals from a real pass over text, through every stage to a student: the teacher is not needed again."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import signals as signal_table
import torch
from training_example import assert_same, losses_of
from transformers import AutoModelForCausalLM

import distill.data.scoring
import distill.data.teachers
import distill.training.arms
from distill.config.data import TeacherSection
from distill.config.section import Signal
from distill.data import scoring
from distill.data.batches import TokenRows
from distill.data.scoring import chunk_tokens, given_answers, score_answers, score_rows
from distill.data.signals import SignalFormat, StoredSignals
from distill.data.teachers import LocalTeacher, Question
from distill.models.describe import describe_model
from distill.storage import parts, read_json, read_rows

SGD = ["train.optimizer=sgd", "train.learning_rate=0.5", "control.enabled=false", "train.max_grad_norm=1000"]
WHOLE = "generate.signal={kind: top_k, k: 100000, bits: 32}"
SAMPLED = "generate.signal={kind: sampled, k: 16}"
TRAIN_SAMPLED = "train.objectives=[{name: sampled_cross_entropy}]"


def signal_form(kind: str, k: int, vocabulary: int, temperature: float = 1.0) -> SignalFormat:
    return SignalFormat(kind, k, vocabulary, temperature, 32, {})


@pytest.fixture(scope="module")
def scored(hub):
    """A tiny MoE, ragged rows, and by row the float64 logits [T, V] that predict its completion tokens."""
    model = AutoModelForCausalLM.from_pretrained(hub["qwen3_moe"]).eval()
    rng = np.random.default_rng(0)
    rows = TokenRows(*([rng.integers(2, 250, rng.integers(1, 12)).tolist() for _ in range(9)] for _ in "pc"))
    dense = []
    for prompt, completion in map(rows.row, range(9)):
        with torch.no_grad():
            z = model(torch.tensor([[*prompt, *completion]])).logits[0].double()
        dense.append(z[len(prompt) - 1 : -1])
    return model, rows, dense


def score(model, rows, form, batch_size=4, vocabulary=258, keys=None):
    keys = keys or [(0, f"p{i}", 0) for i in range(len(rows))]
    return score_rows(model, rows, form, keys=keys, pad_id=0, vocabulary=vocabulary, batch_size=batch_size)


def taken(form, scores, rows):
    stored = StoredSignals(form, [s.signal_ids for s in scores], [s.signal_values for s in scores])
    return stored.take(range(len(rows)), rows.completion_lengths)


def test_top_k_and_logprobs_are_the_models_own(scored, monkeypatch):
    model, rows, dense = scored
    monkeypatch.setattr(distill.data.scoring, "BATCH_LOGITS", 258 * 15)  # several passes, some rows alone
    monkeypatch.setattr(distill.data.scoring, "CHUNK_LOGITS", 258 * 4)
    form = signal_form("top_k", 5, 258)
    scores = score(model, rows, form)
    logs = torch.cat([z.log_softmax(-1) for z in dense])
    values, ids = logs.topk(5)
    signal = taken(form, scores, rows)
    assert torch.equal(signal.ids, ids)
    torch.testing.assert_close(signal.logprobs.double(), values, rtol=0, atol=1e-5)
    targets = torch.cat([torch.from_numpy(rows.row(i)[1]).long() for i in range(9)])
    found = torch.tensor([x for s in scores for x in s.logprobs]).double()
    torch.testing.assert_close(found, logs.gather(1, targets[:, None])[:, 0], rtol=0, atol=1e-5)
    only = score(model, rows, None)
    assert only[3].signal_ids is None and only[3].logprobs == pytest.approx(scores[3].logprobs, abs=1e-5)


def test_padding_of_the_embedding_is_no_token(scored):
    model, rows, dense = scored
    form = signal_form("top_k", 255, 255)
    signal = taken(form, score(model, rows, form, vocabulary=255), rows)
    assert int(signal.ids.max()) < 255
    want = torch.cat([z[:, :255].log_softmax(-1) for z in dense])
    torch.testing.assert_close(signal.logprobs[:, 0].double(), want.amax(-1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_draws_follow_the_model_and_depend_on_their_key_alone(scored, temperature):
    model, rows, dense = scored
    form = signal_form("sampled", 64, 258, temperature)
    first = score(model, rows, form)
    signal = taken(form, first, rows)
    p = torch.cat([(z / temperature).softmax(-1) for z in dense])
    counts = torch.zeros_like(p).scatter_add_(1, signal.ids, signal.weights.double())
    assert ((counts - p).abs() <= 1 / 64 + 1e-5).all()
    assert [s.signal_ids for s in score(model, rows, form, batch_size=1)] == [s.signal_ids for s in first]
    order = np.random.default_rng(1).permutation(9)
    moved = TokenRows(*zip(*([part.tolist() for part in rows.row(i)] for i in order)))
    again = score(model, moved, form, batch_size=3, keys=[(0, f"p{i}", 0) for i in order])
    assert [s.signal_ids for s in again] == [first[i].signal_ids for i in order]
    other = score(model, rows, form, keys=[(1, f"p{i}", 0) for i in range(9)])
    assert other[0].signal_ids != first[0].signal_ids


class Known(torch.nn.Module):
    """A causal LM whose next token always has the same probabilities, whatever stands before it."""

    def __init__(self, probabilities: list[float]):
        super().__init__()
        self.head = torch.nn.Linear(1, len(probabilities), bias=False)
        self.head.weight.data = torch.tensor(probabilities).log()[:, None]

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, attention_mask, use_cache):
        return SimpleNamespace(logits=self.head(torch.ones(*input_ids.shape, 1)))


@pytest.mark.parametrize(
    "temperature, counts", [(1.0, [16, 4, 1]), (2.0, [12, 6, 3]), (0.5, [256 / 13, 16 / 13, 1 / 13])]
)
def test_stored_draws_are_of_the_tempered_distribution(temperature, counts):
    """21 draws of 16 : 4 : 1, whose square root is 4 : 2 : 1 and square 256 : 16 : 1: the counts are known."""
    rows = TokenRows([[0], [1, 1]], [[0, 2, 1, 2], [0]])
    form = signal_form("sampled", 21, 3, temperature)
    scores = score_rows(
        Known([16 / 21, 4 / 21, 1 / 21]), rows, form, keys=[(0,), (1,)], pad_id=0, vocabulary=3
    )
    drawn = torch.nn.functional.one_hot(taken(form, scores, rows).ids, 3).sum(1)
    assert drawn.shape == (5, 3) and ((drawn - torch.tensor(counts)).abs() < 1.01).all(), drawn
    if temperature >= 1:  # whole numbers: systematic draws come exactly so often
        assert drawn.tolist() == [counts] * 5
    # What stands there is scored under the model itself.
    assert scores[0].logprobs == pytest.approx(np.log([16 / 21, 1 / 21, 4 / 21, 1 / 21]), abs=1e-5)


# ---- through the stages ---------------------------------------------------------------------------------


def made(run_cli, path, *overrides):
    for command in ("generate", "filter"):
        code, _, err = run_cli(command, path, *overrides)
        assert code == 0, err


def trained(run_cli, path, run_dir, *overrides) -> list[float]:
    code, _, err = run_cli("train", path, *overrides)
    assert code == 0, err
    return losses_of(run_dir)


def test_every_token_stored_exactly_trains_as_the_live_teacher(make_recipe, run_cli, monkeypatch):
    """K = V at 32 bits: the losses of forward_kl with the teacher loaded, without loading it."""
    path, run_dir = make_recipe(name="stored")
    live_path, live_dir = make_recipe(name="live")
    made(run_cli, path, WHOLE)
    made(run_cli, live_path)
    options = [*SGD, "train.steps=5"]
    kl = "train.objectives=[{name: forward_kl, temperature: 2.0}, {name: cross_entropy, weight: 0.5}]"
    live = trained(run_cli, live_path, live_dir, *options, kl)
    monkeypatch.setattr(
        distill.training.arms, "live_teachers", lambda *_: pytest.fail("the teacher was loaded")
    )
    sparse = kl.replace("forward_kl", "sparse_forward_kl")
    stored = trained(run_cli, path, run_dir, WHOLE, *options, sparse)
    assert stored == pytest.approx(live, abs=1e-5) and stored[-1] < stored[0]


def test_accumulation_and_resume_with_stored_signals(make_recipe, run_cli, monkeypatch):
    from safetensors.torch import load_file

    from distill.training.step import StudentStep

    def train(name, *overrides):
        path, run_dir = make_recipe(name=name)
        if not (run_dir / "dataset").is_dir():
            made(run_cli, path, SAMPLED)
        found = trained(run_cli, path, run_dir, SAMPLED, TRAIN_SAMPLED, *SGD, *overrides)
        return load_file(next((run_dir / "student").glob("*.safetensors"))), found

    whole, losses = train("whole", "train.micro_batch_size=6")
    split, split_losses = train("split", "train.micro_batch_size=2")
    assert_same(whole, split, 2e-6)
    assert split_losses == pytest.approx(losses, abs=2e-6)

    real, calls = StudentStep.forward, []

    def stops(*arguments):
        calls.append(1)
        if len(calls) > 7:  # three micro-batches a step: in the middle of step 3
            raise KeyboardInterrupt
        return real(*arguments)

    path, _ = make_recipe(name="stopped")
    made(run_cli, path, SAMPLED)
    monkeypatch.setattr(StudentStep, "forward", stops)
    assert run_cli("train", path, SAMPLED, TRAIN_SAMPLED, *SGD, "train.micro_batch_size=2")[0] == 130
    monkeypatch.setattr(StudentStep, "forward", real)
    resumed, resumed_losses = train("stopped", "train.micro_batch_size=2")
    assert all(torch.equal(split[name], resumed[name]) for name in split) and resumed_losses == split_losses


def test_bytes_per_token_are_those_of_the_file(make_recipe, run_cli):
    import pyarrow.parquet as pq

    path, run_dir = make_recipe(name="run")
    signal = "generate.signal={kind: top_k, k: 64}"
    code, _, err = run_cli("generate", path, signal, "generate.part_size=24", "generate.max_new_tokens=40")
    assert code == 0, err
    stored = read_json(run_dir / "generations" / "manifest.json")["signal"]
    assert stored["kind"] == "top_k" and stored["k"] == 64 and stored["vocabulary"] == 258
    assert set(stored["identity"]) == {"vocabulary", "chat_template", "eos"}
    (part,) = parts(run_dir / "generations")
    group = pq.read_metadata(part).row_group(0)
    columns = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
    size = sum(columns[name].total_uncompressed_size for name in ("signal_ids", "signal_values"))
    rows = [r for r in read_rows(run_dir / "generations") if r["signal_ids"] is not None]
    tokens = sum(len(r["completion_ids"]) for r in rows)
    assert rows and tokens == stored["tokens"]
    assert stored["bytes_per_token"] == pytest.approx(64 * (9 + 8) / 8 + 4, abs=2 * len(rows) / tokens)
    # The file adds a length per blob and the pages' headers.
    assert 0 <= size - stored["bytes_per_token"] * tokens <= 8 * 48 + 200
    cut = [r for r in read_rows(run_dir / "generations") if r["finish_reason"] == "length"]
    assert cut and all(r["signal_ids"] is None for r in cut), "what is never trained on is not scored"


def test_draws_owe_nothing_to_the_chosen_text(make_recipe, run_cli):
    """One draw a token at the temperature of the text: shared random numbers would draw the text again."""
    path, run_dir = make_recipe()
    made(run_cli, path, "generate.signal={kind: sampled, k: 1}")
    form = SignalFormat.from_manifest(read_json(run_dir / "generations" / "manifest.json")["signal"])
    rows = TokenRows.from_folder(run_dir / "dataset", form)
    batch = rows.collate(np.arange(len(rows)), 0)
    assert (batch.signal.ids[:, 0] == batch.targets).float().mean() < 0.2


def test_text_of_others_is_scored_not_sampled(make_recipe, run_cli, tmp_path, monkeypatch, hub):
    path, run_dir = make_recipe("llama", "llama")
    texts = [{"prompt": f"{i} + 1?", "answer": str(i + 1), "reply": f"it is {i + 1}"} for i in range(4)]
    texts.append({"prompt": "long?", "answer": "1", "reply": "1" * 600})
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, texts)))
    (tmp_path / "test.jsonl").write_text(json.dumps({"prompt": "2 + 2?", "answer": "4"}))
    source = [
        f"prompts.source={tmp_path / 'texts.jsonl'}", f"evaluate.source={tmp_path / 'test.jsonl'}",
        "prompts.completion_column=reply", "prompts.verifier=numeric", "filter.correct_only=true",
    ]  # fmt: skip
    code, _, err = run_cli("generate", path, *source)
    assert code == 2 and "set generate.samples=1" in err
    code, _, err = run_cli("generate", path, *source, "generate.samples=1", "prompts.completion_column=text")
    assert code == 2 and "no column 'text'" in err
    monkeypatch.setattr(distill.data.teachers, "decode", lambda *_, **__: pytest.fail("text was sampled"))
    source += ["generate.samples=1", SAMPLED]
    made(run_cli, path, *source)
    *rows, long = read_rows(run_dir / "generations")
    assert [r["text"] for r in rows] == [t["reply"] for t in texts[:4]]
    assert all(r["verdict"] == "correct" and len(r["logprobs"]) == len(r["completion_ids"]) for r in rows)
    assert "the teacher takes 512" in long["error"] and long["signal_ids"] is None
    model = AutoModelForCausalLM.from_pretrained(hub["llama"])
    prompt, completion = rows[0]["prompt_ids"], rows[0]["completion_ids"]
    with torch.no_grad():
        logs = model(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
    want = [float(logs[len(prompt) - 1 + t, token]) for t, token in enumerate(completion)]
    assert rows[0]["logprobs"] == pytest.approx(want, abs=1e-5)
    losses = trained(run_cli, path, run_dir, *source, *SGD, TRAIN_SAMPLED)
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert read_json(run_dir / "dataset" / "manifest.json")["counts"]["dropped_by_rule"] == {"error": 1}


def test_a_reader_with_another_tokenizer_or_template_is_refused(make_recipe, run_cli):
    sparse = "train.objectives=[{name: sparse_forward_kl}]"
    for student, text in (("other_vocabulary", "vocabulary"), ("plain", "chat template")):
        path, run_dir = make_recipe("llama", student, name=student)
        code, _, err = run_cli("run", path, "generate.signal.kind=top_k", sparse)
        assert code == 2 and f"another {text}" in err and not (run_dir / "prompts").exists()
        # Its text can still be distilled; the signals stay behind.
        made(run_cli, path, "generate.signal={kind: top_k, k: 2}")
        assert read_json(run_dir / "generations" / "manifest.json")["signal"]["k"] == 2
        assert read_json(run_dir / "dataset" / "manifest.json")["signal"] is None
        assert all(r["signal_ids"] is None for r in read_rows(run_dir / "dataset"))


def test_recipes_that_cannot_be_are_refused_at_once(make_recipe, run_cli):
    path, run_dir = make_recipe("llama", "llama")
    sparse, sampled = "train.objectives=[{name: sparse_forward_kl}]", TRAIN_SAMPLED
    endpoint = [
        "teacher.endpoint={base_url: 'http://localhost:1/v1', api_key_env: null}",
        "teacher.terms={train_other_models: yes, name: MIT}",
    ]
    for overrides, text in (
        ([sparse], "generate.signal='{kind: top_k}'"),
        ([sparse, SAMPLED], "generate.signal='{kind: top_k}'"),
        ([sampled, "generate.signal={kind: sampled, temperature: 2}"], "were drawn at 2"),
        (["generate.signal={kind: top_k, temperature: 2}"], "stored at temperature 1"),
        (["prompts.completion_column=reply", "generate.samples=1"], "give the file as prompts.source"),
        (["teacher=null", "prompts.solutions=true", sparse], "needs a teacher, and the recipe has none"),
        ([*endpoint, SAMPLED], "generate.signal needs the logits"),
        ([*endpoint, "prompts.completion_column=reply"], "prompts.completion_column needs the logits"),
    ):
        code, _, err = run_cli("run", path, *overrides)
        assert code == 2 and text in err, (overrides, err)
    assert not run_dir.exists()


def test_signals_that_were_never_stored_are_said(make_recipe, run_cli):
    path, _ = make_recipe("llama", "llama")
    made(run_cli, path)
    code, _, err = run_cli("train", path, SAMPLED, TRAIN_SAMPLED)
    assert code == 2 and "has no teacher signals that this student can read" in err


def test_answers_are_counted_at_half_of_a_rows_length(hub):
    """A token attends to half of its row on average: 100 tokens in 5 rows are rows of 20, so 10 of context."""
    teacher = LocalTeacher(TeacherSection(model=hub["llama"]), torch.device("cpu"), 4)
    each = describe_model(teacher.model, 10)["flops_per_token"]
    assert (
        teacher.flops(60, 40, 5)
        == int(each * 100)
        != int(describe_model(teacher.model, 20)["flops_per_token"] * 100)
    )


@pytest.mark.parametrize("cut", [False, True])
def test_cut_off_answers_are_scored_where_they_are_kept(hub, cut):
    teacher = LocalTeacher(TeacherSection(model=hub["llama"]), torch.device("cpu"), 4)
    questions = [Question([{"role": "user", "content": text}], (0, text, 0)) for text in ("a", "b", "c")]
    answers = given_answers(teacher, questions, ["x", "yy", "z"], lambda _: None)
    for answer, reason in zip(answers, ("stop", "length", "error")):
        answer.finish_reason = reason
    score_answers(Signal(kind="top_k", k=3), teacher, questions, answers, cut=cut)
    assert [a.signal_ids is not None for a in answers] == [True, cut, False]
    assert [len(a.logprobs) == len(a.completion_ids) for a in answers] == [True, cut, False]


def test_a_teacher_that_breaks_gives_failed_rows(hub):
    teacher = LocalTeacher(TeacherSection(model=hub["llama"]), torch.device("cpu"), 4)
    teacher.model.lm_head.weight.data.fill_(float("nan"))
    questions = [Question([{"role": "user", "content": text}], (0, text, 0)) for text in ("a", "b")]
    answers = given_answers(teacher, questions, ["c", ""], lambda _: None)
    assert (
        answers[1].completion_ids == [teacher.tokenizer.eos_token_id] and answers[1].finish_reason == "stop"
    )
    score_answers(Signal(kind="top_k", k=3), teacher, questions, answers)
    assert all(a.error == "the teacher's logits are not finite" and a.signal_ids is None for a in answers)


def test_the_table_of_signals_tells_bias_from_noise(monkeypatch):
    monkeypatch.setattr(signal_table, "SEEN", 200)
    teacher, student = signal_table.zipf(vocabulary=400, copies=2)
    generator = torch.Generator().manual_seed(0)

    def row(*way):
        return signal_table.measure(
            signal_table.Stored(way[0], way[1], teacher, student, *way[2:]), generator
        )

    torch.manual_seed(0)
    for sampled in (row("sampled", 16), row("sampled", 16, "independent")):
        assert abs(sampled["kl_bias"]) < 4 * sampled["kl_bias_stderr"] and sampled["kl_rms"] > 0.1
        assert abs(sampled["fitted_confidence_minus_accuracy"]) < 0.02
    top = row("top_k", 16)
    assert top["kl_bias"] > 0.1 and top["fitted_confidence_minus_accuracy"] > 0.05
    assert top["bytes_per_token"] == 16 * (9 + 8) / 8 + 4
    assert row("top_k", 400)["kl_bias"] == pytest.approx(0, abs=2e-3)


def test_a_device_works_on_larger_chunks():
    """27 rows at V = 151,936 suit a CPU's cache; a device wants few, large kernels."""
    assert (
        chunk_tokens(151_936, torch.device("cpu")) == 27
        and chunk_tokens(151_936, torch.device("cuda")) == 220
    )
    assert chunk_tokens(2**30, torch.device("cpu")) == 1


@pytest.mark.parametrize("kind, k", [("sampled", 16), ("top_k", 4)])
def test_a_chunk_reads_its_own_rows_and_draws_by_its_own_numbers(monkeypatch, kind, k):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(50, 30, generator=generator)
    targets, u = (
        torch.randint(30, (50,), generator=generator),
        torch.rand(50, generator=generator, dtype=torch.float64),
    )
    whole = scoring._summaries(logits, targets, u, signal_form(kind, k, 30))
    monkeypatch.setattr(scoring, "CHUNK_LOGITS", 7 * 30)  # 7 rows at a time, and one at the end
    parts = scoring._summaries(logits, targets, u, signal_form(kind, k, 30))
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
    torch.testing.assert_close(whole[0], logits.log_softmax(-1)[torch.arange(50), targets])
