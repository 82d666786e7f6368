"""A tiny GGUF file of the Llama family, written with the package `gguf`: blocks of 8 bits, a byte-level tokenizer."""

from pathlib import Path

import numpy as np

TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
SIZES = {"width": 32, "layers": 2, "heads": 4, "kv_heads": 2, "inner": 64}


def tokens() -> list[str]:
    """Two control tokens, the byte alphabet, and one token of two spaces."""
    from tokenizers import pre_tokenizers

    return ["<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ĠĠ"]


def write_gguf(
    path: Path,
    pre: str = "smollm",
    template: str | None = TEMPLATE,
    architecture: str = "llama",
    ends: dict[str, int] | None = None,
) -> Path:
    """A model of random weights. `ends`: further end tokens, as {"eot": 0}."""
    import gguf

    writer, vocabulary, random = gguf.GGUFWriter(path, architecture), tokens(), np.random.default_rng(0)
    writer.add_context_length(128)
    writer.add_embedding_length(SIZES["width"])
    writer.add_block_count(SIZES["layers"])
    writer.add_feed_forward_length(SIZES["inner"])
    writer.add_head_count(SIZES["heads"])
    writer.add_head_count_kv(SIZES["kv_heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_license("mit")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(vocabulary)
    writer.add_token_types([3, 3] + [1] * (len(vocabulary) - 2))
    writer.add_token_merges(["Ġ Ġ"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, token in (ends or {}).items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token)
    if template:
        writer.add_chat_template(template)
    width, inner = SIZES["width"], SIZES["inner"]
    narrow = width // SIZES["heads"] * SIZES["kv_heads"]
    weights = {"token_embd": (len(vocabulary), width)}
    for layer in range(SIZES["layers"]):
        block = f"blk.{layer}"
        weights |= {f"{block}.attn_q": (width, width), f"{block}.attn_k": (narrow, width)}
        weights |= {f"{block}.attn_v": (narrow, width), f"{block}.attn_output": (width, width)}
        weights |= {f"{block}.ffn_gate": (inner, width), f"{block}.ffn_up": (inner, width)}
        weights |= {f"{block}.ffn_down": (width, inner)}
    for name, shape in weights.items():
        blocks = gguf.quants.quantize(
            random.normal(0, 0.3, shape).astype(np.float32), gguf.GGMLQuantizationType.Q8_0
        )
        writer.add_tensor(f"{name}.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    norms = [f"blk.{i}.{name}" for i in range(SIZES["layers"]) for name in ("attn_norm", "ffn_norm")]
    for name in [*norms, "output_norm"]:
        writer.add_tensor(f"{name}.weight", np.ones(width, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
