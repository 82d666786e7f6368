"""The embedded tokenizer: byte-level BPE over the tasks' own text, digits kept single, with a chat template.

Why not a hub tokenizer: a 150,000-row embedding would be 95 % of a million-parameter student. Why bytes
underneath: any text encodes and decodes unchanged, so nothing a person types is ever "unknown".
The teacher and the base student share it, which whole-vocabulary divergences need.

    tokenizer = build_tokenizer(); tokenizer.save_pretrained("some/folder")
"""

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from distill.tasks.problems import LEVELS, sample_problems

PAD, END, SYSTEM, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"
THINK, END_THINK = "<think>", "</think>"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def build_tokenizer(vocabulary: int = 512, context: int = 256) -> PreTrainedTokenizerFast:
    """Train the tokenizer on 2,100 training problems of fixed seed: the same files every time.

    `vocabulary` is an upper limit; training stops earlier when every word of the tasks is one token.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            # Single digits, so that place value is visible; everything else in words as GPT-2 splits them.
            pre_tokenizers.Split(Regex(r"\d"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=5,
        special_tokens=[PAD, END, SYSTEM, USER, ASSISTANT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    problems = sample_problems("train", dict.fromkeys(LEVELS, 700), seed=0)
    tokenizer.train_from_iterator(
        (text for p in problems for text in (p.question, p.steps, p.answer)), trainer
    )
    # Thinking tags are ordinary text to a reader: kept by decode(skip_special_tokens=True).
    tokenizer.add_tokens([AddedToken(THINK, special=False), AddedToken(END_THINK, special=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        chat_template=CHAT_TEMPLATE,
        model_max_length=context,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
