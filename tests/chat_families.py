"""Tokenizers with the chat formats of well-known families, written anew from their documented form; no download.

Each is byte-level without merges, with the family's control tokens, and its own call adds BOS where the family's does.
"""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# name: (template, bos or None, end, special tokens, added tokens that are not marked as special)
FAMILIES: dict[str, tuple[str | None, str | None, str, tuple[str, ...], tuple[str, ...]]] = {
    "llama3": (
        "{{- bos_token }}{%- if strftime_now is defined %}{%- set day = strftime_now('%d %b %Y') %}{%- else %}"
        "{%- set day = '26 Jul 2024' %}{%- endif %}"
        "{{- '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + day + '\n\n' }}"
        "{%- if messages[0]['role'] == 'system' %}{{- messages[0]['content'] | trim }}{%- set rest = messages[1:] %}"
        "{%- else %}{%- set rest = messages %}{%- endif %}{{- '<|eot_id|>' }}"
        "{%- for m in rest %}{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
        "{{- m['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}",
        "<|begin_of_text|>", "<|eot_id|>", ("<|start_header_id|>", "<|end_header_id|>"), (),
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) "
        "+ '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        "<bos>", "<eos>", ("<start_of_turn>", "<end_of_turn>"), (),
    ),
    "mistral": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + '[/INST]' }}"
        "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}",
        "<s>", "</s>", ("[INST]", "[/INST]"), (),
    ),
    "qwen2.5": (
        "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
        "{% endif %}" + CHATML,
        None, "<|im_end|>", ("<|im_start|>", "<|endoftext|>"), (),
    ),
    "qwen3": (
        CHATML.replace(
            "assistant\n' }}{% endif %}",
            "assistant\n' }}{% if enable_thinking is defined and enable_thinking is false %}"
            "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}",
        ),
        None, "<|im_end|>", ("<|im_start|>", "<|endoftext|>"), ("<think>", "</think>"),
    ),
    "deepseek-r1-distill": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}"
        "{% elif m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}{% else %}"
        "{{ '<｜Assistant｜>' + m['content'].split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}",
        "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", (),
        ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"),
    ),
    "deepseek-v3": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}"
        "{% elif m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}{% else %}"
        "{{ '<｜Assistant｜>' + m['content'] + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}",
        "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", (), ("<｜User｜>", "<｜Assistant｜>"),
    ),
    "gpt-oss": (
        "{{ '<|start|>system<|message|>You are ChatGPT.\nCurrent date: ' + strftime_now('%Y-%m-%d') + '<|end|>' }}"
        "{% for m in messages %}{{ '<|start|>' + ('developer' if m['role'] == 'system' else m['role']) + '<|message|>' "
        "+ m['content'] + '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}",
        "<|startoftext|>", "<|return|>", ("<|start|>", "<|message|>", "<|end|>", "<|channel|>"), (),
    ),
    "smollm2": (
        "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM<|im_end|>\n' }}{% endif %}"
        "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        "<|im_start|>", "<|im_end|>", ("<|endoftext|>",), (),
    ),
    "phi": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        None, "<|endoftext|>", ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"), (),
    ),
    "no template": (None, None, "<|endoftext|>", (), ()),
    "no template, adds BOS": (None, "<bos>", "<eos>", ("<pad>",), ()),
}  # fmt: skip
# Whose own call puts BOS first; SmolLM2 has one and does not, as gpt-oss.
ADD_BOS = ("llama3", "gemma", "mistral", "deepseek-r1-distill", "deepseek-v3", "no template, adds BOS")


def family(name: str) -> PreTrainedTokenizerFast:
    template, bos, end, special, plain = FAMILIES[name]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = list(dict.fromkeys(filter(None, [bos, end, *special])))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        [], trainers.BpeTrainer(special_tokens=names, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in plain])
    if name in ADD_BOS:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos}:0 $A:0",
            pair=f"{bos}:0 $A:0 $B:1",
            special_tokens=[(bos, tokenizer.token_to_id(bos))],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=end, chat_template=template, pad_token=end
    )
