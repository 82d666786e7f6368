"""The embedded tokenizer: lossless, digits single, the same every time."""

from hypothesis import given
from hypothesis import strategies as st

from distill.tasks.problems import LEVELS, build_tokenizer, sample_problems

TOKENIZER = build_tokenizer()


@given(st.text(st.characters(blacklist_categories=("Cs",))))
def test_any_text_survives(text):
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    if "<|" not in text:
        assert TOKENIZER.decode(ids, skip_special_tokens=True) == text


def test_digits_are_single_and_tasks_are_short():
    assert len(TOKENIZER("90210", add_special_tokens=False)["input_ids"]) == 5
    for p in sample_problems("test", dict.fromkeys(LEVELS, 70), seed=0):
        messages = [{"role": "user", "content": p.question}]
        prompt = TOKENIZER.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
        completion = TOKENIZER(p.solution, add_special_tokens=False)["input_ids"]
        assert len(prompt) + len(completion) <= 96
        assert TOKENIZER.decode(completion, skip_special_tokens=True) == p.solution


def test_same_every_time_and_small():
    again = build_tokenizer()
    assert again.get_vocab() == TOKENIZER.get_vocab()
    assert again.chat_template == TOKENIZER.chat_template
    assert len(TOKENIZER) <= 512
    assert TOKENIZER.pad_token_id != TOKENIZER.eos_token_id
