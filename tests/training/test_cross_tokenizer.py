"""Alignment against a search over all byte prefixes, tokenizers that split differently, ULD by definition."""

import itertools
import json

import numpy as np
import pytest
import torch
from conftest import CHATML, byte_tokenizer, save_model
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from distill.errors import RunError, UserError
from distill.models.chat import prompt_ids
from distill.models.hooks import KeptLogits
from distill.models.load import load_model
from distill.tasks.problems import build_tokenizer
from distill.training.cross_tokenizer import (
    TeacherView,
    TokenBytes,
    align,
    aligned_share,
    byte_level_alphabet,
)
from distill.training.losses.rowwise import per_row
from distill.training.losses.sparse import uld, uld_rows

TURNS = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[me]{% endif %}"
)
CORPUS = [
    "the theme of these themes is there",
    "caf\u00e9 na\u00efve \u6f22\u5b57 \u6f22\u8a9e \U0001f642\U0001f643 12 + 34 = 46",
] * 20
WORDS = [
    "the theme",
    " these",
    "caf\u00e9",
    "\u6f22\u5b57",
    "\U0001f642",
    "  ",
    "\n",
    "12 + 34",
    "x",
    "<think>",
    "\u00df",
]


def trained_bytes(vocabulary, template=CHATML, special=("<|im_end|>",), normalizer=None):
    """Byte-level BPE with merges, so that tokens are words or end inside a character."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<pad>", *special], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=special[-1], pad_token="<pad>", chat_template=template
    )


def sentence_pieces():
    """As Llama 2: a space is a letter, one is put before every text, unknown characters are bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(["the theme of these themes", "there 12 + 34"] * 10, trainer)
    saved = json.loads(tokenizer.to_str())
    vocabulary = saved["model"]["vocab"]
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    tokenizer = Tokenizer.from_str(json.dumps(saved))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>", unk_token="<unk>", chat_template=TURNS
    )


TOKENIZERS = {
    "plain bytes": lambda: byte_tokenizer(CHATML),
    "merged bytes": lambda: trained_bytes(330),
    "few merges": lambda: trained_bytes(275, TURNS, ("[x]", "</s>")),
    "embedded": build_tokenizer,
    "sentence pieces": sentence_pieces,
}


@pytest.fixture(scope="module")
def tokenizers():
    return {name: make() for name, make in TOKENIZERS.items()}


# ------------------------------------------------------------------------------------------------- the loss


def uld_by_definition(student, teacher, temperature):
    rows = []
    for z, t in zip(student.tolist(), teacher.tolist()):
        q, p = (np.exp(np.array(x) / temperature) for x in (z, t))
        q, p = (sorted(x / x.sum(), reverse=True) for x in (q, p))
        size = max(len(q), len(p))
        q, p = (list(x) + [0.0] * (size - len(x)) for x in (q, p))
        rows.append(sum(abs(a - b) for a, b in zip(q, p)))
    return np.array(rows)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(0, 5),
    mine=st.integers(1, 12),
    theirs=st.integers(1, 12),
    temperature=st.floats(0.3, 5),
)
def test_uld_is_the_distance_of_sorted_probabilities(seed, rows, mine, theirs, temperature):
    generator = torch.Generator().manual_seed(seed)
    student = 2 * torch.randn(rows, mine, generator=generator, dtype=torch.float64)
    teacher = 2 * torch.randn(rows, theirs, generator=generator, dtype=torch.float64)
    loss = uld_rows(student, teacher, temperature=temperature)
    np.testing.assert_allclose(loss, uld_by_definition(student, teacher, temperature), atol=1e-12)
    assert loss.shape == (rows,) and (loss >= 0).all() and (loss <= 2 + 1e-12).all()
    order = torch.randperm(mine, generator=generator)
    torch.testing.assert_close(uld_rows(student[:, order], teacher, temperature=temperature), loss)
    padded = torch.cat([teacher, torch.full((rows, 3), -torch.inf, dtype=torch.float64)], 1)
    torch.testing.assert_close(uld_rows(student, padded, temperature=temperature), loss)
    chunked = per_row(lambda s, t: uld_rows(s, t, temperature=temperature), student, teacher)
    torch.testing.assert_close(chunked, loss)


def test_tokens_without_a_counterpart_cost_nothing():
    student, teacher = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 9, dtype=torch.float64)
    found = uld(student, teacher, torch.tensor([1, 0, 1, 0]), temperature=2.0)
    expected = uld_rows(student, teacher, temperature=2.0)
    assert found.tolist() == [float(expected[0]), 0.0, float(expected[2]), 0.0] and (expected > 0).all()


def test_uld_gradient_and_identities():
    student, teacher = torch.randn(3, 6, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: uld_rows(s, teacher, temperature=2.0), student.requires_grad_())
    torch.testing.assert_close(uld_rows(teacher.flip(1), teacher), torch.zeros(3, dtype=torch.float64))
    uld_rows(student, teacher.requires_grad_()).sum().backward()
    assert teacher.grad is None
    certain, even = torch.tensor([[99.0, 0.0]]), torch.zeros(1, 4)
    assert uld_rows(certain, even).item() == pytest.approx(1.5)
    with pytest.raises(UserError, match="same n positions"):
        uld_rows(student, teacher[:2])


# ------------------------------------------------------------------------------------------------ positions


def align_by_search(student, teacher):
    """Every pair of positions that have read the same bytes; of several at one byte the last."""
    pairs = {}
    for j in range(len(student)):
        for i in range(len(teacher)):
            if b"".join(student[:j]) == b"".join(teacher[:i]):
                pairs[b"".join(student[:j])] = (j, i)
    return sorted(pairs.values())


@settings(max_examples=60, deadline=None)
@given(
    text=st.binary(max_size=12),
    cuts=st.tuples(*[st.lists(st.integers(0, 12), max_size=8)] * 2),
    other=st.binary(max_size=3),
    end=st.booleans(),
)
def test_align_finds_every_common_prefix(text, cuts, other, end):
    def pieces(text, cuts):
        edges = [0, *sorted(min(c, len(text)) for c in cuts), len(text)]
        return [text[a:b] for a, b in itertools.pairwise(edges)] + [b""] * end

    student, teacher = pieces(text, cuts[0]), pieces(text[: len(text) // 2] + other, cuts[1])
    pairs = align(student, teacher)
    assert [tuple(pair) for pair in pairs.tolist()] == align_by_search(student, teacher)
    same = align(student, student)
    assert same[:, 0].tolist() == same[:, 1].tolist()


def test_align_by_hand():
    assert align([b"he", b"llo", b" you", b""], [b"hello", b" y", b"ou", b""]).tolist() == [
        [0, 0],
        [2, 1],
        [3, 3],
    ]
    assert align([], []).shape == (0, 2) == align([b"a"], []).shape
    assert align([b""], [b""]).tolist() == [[0, 0]]
    assert align([b"ab", b"c"], [b"ab", b"x", b"c"]).tolist() == [[0, 0], [1, 1]]


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=30, deadline=None)
@given(text=st.one_of(st.text(max_size=20), st.lists(st.sampled_from(WORDS), max_size=8).map("".join)))
def test_pieces_spell_the_text(tokenizers, name, text):
    tokenizer = tokenizers[name]
    if name == "sentence pieces":
        text = text.replace("\u2581", "_")  # its space; it cannot tell the two apart
    pieces = TokenBytes(tokenizer).pieces(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert b"".join(pieces) == text.encode()


def test_byte_alphabet_is_that_of_the_library():
    alphabet = byte_level_alphabet()
    assert sorted(alphabet.values()) == list(range(256))
    assert set(alphabet) == set(pre_tokenizers.ByteLevel.alphabet())
    pre = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for character in "a \n\u00e9\u6f22\U0001f642\u00ad":
        ((written, _),) = pre.pre_tokenize_str(character)
        assert bytes(alphabet[c] for c in written) == character.encode()


@pytest.mark.parametrize("mine", TOKENIZERS)
@pytest.mark.parametrize("theirs", TOKENIZERS)
def test_both_have_read_the_same_text_at_every_pair(tokenizers, mine, theirs):
    student, teacher = tokenizers[mine], tokenizers[theirs]
    view, text = (
        TeacherView(student, teacher),
        "the theme: caf\u00e9 \u6f22\u5b57\U0001f642  12 + 34 = 46\n<think>",
    )
    ids = [*student(text, add_special_tokens=False)["input_ids"], student.eos_token_id]
    translated, pairs = view.completion(ids)
    assert translated[-1] == teacher.eos_token_id
    assert pairs[0].tolist() == [0, 0] and pairs[-1].tolist() == [len(ids) - 1, len(translated) - 1]
    mine, theirs = TokenBytes(student).pieces(ids[:-1]), TokenBytes(teacher).pieces(translated[:-1])
    expected = align_by_search([*mine, b""], [*theirs, b""])
    assert [tuple(pair) for pair in pairs.tolist()] == expected
    for j, i in expected:
        assert b"".join(mine[:j]) == b"".join(theirs[:i])
    if student is teacher:
        assert translated == ids and len(pairs) == len(ids)


@pytest.mark.parametrize("opens", ["student", "teacher"])
def test_what_one_template_opens_is_no_part_of_the_other_s_completion(tokenizers, opens):
    """<think> stands in one prompt and in the other's completion: pairs count within completions, and fit as texts."""
    models = {"student": tokenizers["merged bytes"], "teacher": tokenizers["few merges"]}
    before = models[opens].chat_template
    models[opens].chat_template = before + "{% if add_generation_prompt %}<think>{% endif %}"
    try:
        student, teacher = models["student"], models["teacher"]
        text = "the theme</think>these"
        ids = student(text if opens == "student" else f"<think>{text}", add_special_tokens=False)["input_ids"]
        translated, pairs = TeacherView(student, teacher).completion(ids)
    finally:
        models[opens].chat_template = before
    mine, theirs = TokenBytes(student).pieces(ids), TokenBytes(teacher).pieces(translated)
    lead = {name: b"<think>" * (name == opens) for name in models}
    for i, j in pairs:
        read = [lead["student"] + b"".join(mine[:i]), lead["teacher"] + b"".join(theirs[:j])]
        assert read[0] == read[1], (i, j)
    assert len(pairs) >= 3 and b"".join(theirs).decode() == (text if opens == "teacher" else f"<think>{text}")


def test_splits_inside_a_character(tokenizers):
    """Both models may stop inside a character; the pair counts, because the bytes read are the same."""
    plain, merged = tokenizers["plain bytes"], tokenizers["merged bytes"]
    ids = plain("\U0001f642", add_special_tokens=False)["input_ids"]
    assert len(ids) == 4
    same, pairs = TeacherView(plain, plain).completion(ids[:2])  # a completion cut inside the character
    assert pairs.tolist() == [[0, 0]] and len(same) == 3  # the teacher reads a replacement character
    translated, pairs = TeacherView(plain, merged).completion([*ids, plain.eos_token_id])
    assert 2 <= len(translated) < 5 and len(pairs) == len(translated)


def test_empty_and_unfinished_completions(tokenizers):
    student, teacher = tokenizers["merged bytes"], tokenizers["sentence pieces"]
    view = TeacherView(student, teacher)
    assert view.completion([])[0] == [] and view.completion([])[1].shape == (0, 2)
    translated, pairs = view.completion([student.eos_token_id])
    assert translated == [teacher.eos_token_id] and pairs.tolist() == [[0, 0]]
    ids = student("the theme of", add_special_tokens=False)["input_ids"]
    translated, pairs = view.completion(ids)
    assert teacher.eos_token_id not in translated and (pairs < [len(ids), len(translated)]).all()
    other_end = student.convert_tokens_to_ids("<pad>")
    twice, pairs = TeacherView(student, teacher, ends=[other_end]).completion(
        [*ids, other_end, student.eos_token_id]
    )
    assert twice == [*translated, teacher.eos_token_id] and pairs[-1].tolist() == [len(ids), len(twice) - 1]


def test_a_teacher_that_normalises_is_aligned_up_to_the_first_difference():
    student = byte_tokenizer(CHATML)
    teacher = trained_bytes(330, normalizer=normalizers.NFC())
    ids = student("the e\u0301 end", add_special_tokens=False)["input_ids"]
    _, pairs = TeacherView(student, teacher).completion([*ids, student.eos_token_id])
    assert pairs[-1, 0] == 4 and len(ids) > 8  # "the " and nothing after the accent is written differently


# ------------------------------------------------------------------------------------------- rows and batches

MESSAGES = [{"role": "user", "content": "12 + 34?"}]


def test_rows_use_the_teachers_own_markup(tokenizers):
    student, teacher = tokenizers["merged bytes"], tokenizers["few merges"]
    ids = [*student("the theme", add_special_tokens=False)["input_ids"], student.eos_token_id]
    row = TeacherView(student, teacher).row(MESSAGES, ids)
    assert teacher.decode(row.ids) == "[user] 12 + 34?</s>[me]the theme</s>"
    assert row.ids[: row.prompt_tokens].tolist() == prompt_ids(teacher, MESSAGES)
    assert "im_start" not in teacher.decode(row.ids) and row.student_tokens == len(ids)


@pytest.mark.parametrize("names", [("few merges", "merged bytes"), ("plain bytes", "few merges")])
def test_batch_puts_both_models_at_the_same_text(tokenizers, names, tmp_path):
    student, teacher = (tokenizers[name] for name in names)
    texts = ["the theme of caf\u00e9", "x", "12 + 34 = 46 these \U0001f643", ""]
    completions = [
        [*student(text, add_special_tokens=False)["input_ids"], student.eos_token_id] for text in texts
    ]
    view = TeacherView(student, teacher)
    rows = [view.row(MESSAGES, ids) for ids in completions]
    batch = view.collate(rows)
    assert batch.kept == sum(map(len, completions)) and batch.input_ids.shape == batch.keep.shape
    assert len(batch.rows) == int(batch.keep.sum()) and batch.rows.diff().min() > 0
    assert aligned_share(rows) == len(batch.rows) / batch.kept
    assert (batch.keep <= batch.attention_mask.bool()).all()

    mine = [(text, j, ids) for text, ids in zip(texts, completions) for j in range(len(ids))]
    read = TokenBytes(student)
    positions = batch.keep.nonzero().tolist()
    start = len(prompt_ids(teacher, MESSAGES))
    theirs = TokenBytes(teacher)
    for n, (b, t) in zip(batch.rows.tolist(), positions):
        text, j, ids = mine[n]
        assert text == texts[b]
        assert b"".join(theirs.pieces(batch.input_ids[b, start : t + 1].tolist())) == b"".join(
            read.pieces(ids[:j])
        )
    assert [text for text, j, ids in mine if j == len(ids) - 1] == texts
    ends = [n for n, (_, j, ids) in enumerate(mine) if j == len(ids) - 1]
    assert set(ends) <= set(batch.rows.tolist())

    model = load_model(save_model(tmp_path / "teacher", {"model_type": "llama"}, teacher), "fp32")
    with torch.no_grad():
        logits = KeptLogits(model)(batch.input_ids, batch.attention_mask, batch.keep)
    student_logits = torch.randn(batch.kept, len(student), requires_grad=True)
    loss = batch.to("cpu").spread(uld_rows(student_logits[batch.rows], logits))
    assert loss.shape == (batch.kept,)
    loss.sum().backward()
    apart = sorted(set(range(batch.kept)) - set(batch.rows.tolist()))
    assert apart, "every token has a counterpart: this pair of tokenizers tests nothing"
    assert not loss[apart].any() and not student_logits.grad[apart].any()
    assert student_logits.grad[batch.rows].abs().sum(1).min() > 0


def test_one_tokenizer_for_both_gives_the_students_own_batch(tokenizers):
    tokenizer = tokenizers["merged bytes"]
    completion = [*tokenizer("the theme", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    view = TeacherView(tokenizer, tokenizer)
    rows = [view.row(MESSAGES, completion)]
    batch, prompt = view.collate(rows), prompt_ids(tokenizer, MESSAGES)
    assert batch.input_ids.tolist() == [[*prompt, *completion[:-1]]]
    assert batch.rows.tolist() == list(range(len(completion))) and aligned_share(rows) == 1
    assert batch.keep[0].nonzero().flatten().tolist() == list(range(len(prompt) - 1, batch.keep.shape[1]))


def test_a_batch_without_counterparts_is_a_zero_loss(tokenizers):
    view = TeacherView(tokenizers["plain bytes"], tokenizers["few merges"])
    batch = view.collate([view.row(MESSAGES, [])])
    assert batch.kept == 0 and aligned_share([]) == 0
    assert batch.spread(uld_rows(torch.zeros(0, 4), torch.zeros(0, 5))).shape == (0,)


def test_mistakes_are_named(tokenizers):
    words = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    words.decoder = decoders.WordPiece()
    with pytest.raises(UserError, match="WordPiece"):
        TokenBytes(PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]"))
    with pytest.raises(RunError, match="no token"):
        TokenBytes(tokenizers["few merges"]).pieces([0, 10**6])
    strict = byte_tokenizer(
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    )
    with pytest.raises(UserError, match="no system"):
        TeacherView(tokenizers["plain bytes"], strict).row([{"role": "system", "content": "x"}], [])
