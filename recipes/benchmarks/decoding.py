"""How fast the toolkit decodes, against `model.generate` in the same run, as ratios.

    python recipes/benchmarks/decoding.py [--quick] [--rounds N] [--out FILE] [--json]

256 prompts of the embedded tasks, sampled answers of 16 to 192 tokens, the embedded teacher (MLA, MoE) and a
GQA model of its size. Lengths are forced, and the same for everyone: a hook on the model makes each row count
down from its own number of tokens to the end token, so that no peer can be lucky. Useful tokens are those up to a
row's end; what a static batch computes for rows that have ended is its own loss. Machines are noisy: every
figure is the median of `rounds` interleaved rounds, and the ratio is what carries over.
"""

import random
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from script import benchmark_parser, check, leave, run_script
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from distill.devices import describe_device, pick_device
from distill.models.chat import prompt_ids
from distill.models.decode import Sampling, decode
from distill.models.load import load_model, load_tokenizer
from distill.stages import versions
from distill.tasks.problems import LEVELS, sample_problems

LENGTHS = (16, 192)  # tokens of an answer, uniform
_END = 1  # the embedded tokenizer's end token
_FIRST = 190  # ids from here on count down: _FIRST + n is followed by _FIRST + n - 1, and at last by _END
_SAMPLING = {"temperature": 0.8, "top_p": 0.95}


def count_down(_module, _args, kwargs: dict, output):
    """Forward hook: the next token is one less than the last, whatever the model thinks of it."""
    last = kwargs["input_ids"][:, -1]
    following = torch.where(last > _FIRST, last - 1, _END)
    output.logits[:, -1].scatter_(1, following.unsqueeze(1), 1e4)
    return output


def workload(prompts: int, seed: int = 0) -> tuple[list[list[int]], list[int]]:
    """(prompts whose last token says how long the answer will be, those lengths)."""
    tokenizer = load_tokenizer("checkpoints/teacher")
    rng = random.Random(seed)
    problems = sample_problems("test", dict.fromkeys(LEVELS, prompts), seed)[:prompts]
    lengths = [rng.randint(*LENGTHS) for _ in problems]
    ids = [prompt_ids(tokenizer, [{"role": "user", "content": p.question}]) for p in problems]
    return [[*i, _FIRST + length - 1] for i, length in zip(ids, lengths)], lengths


def static_batches(model: nn.Module, prompts: list[list[int]], lengths: list[int], size: int) -> None:
    """The peer: `model.generate`, left-padded batches in the given order, each as long as its longest row."""
    for start in range(0, len(prompts), size):
        batch = prompts[start : start + size]
        width = max(map(len, batch))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in batch])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch])
        out = model.generate(
            ids.to(model.device), attention_mask=mask.to(model.device), do_sample=True, top_k=0, **_SAMPLING,
            max_new_tokens=LENGTHS[1], eos_token_id=_END, pad_token_id=0,
        )  # fmt: skip
        for row, length in zip(out[:, width:].tolist(), lengths[start : start + size]):
            if row[length - 1] != _END:
                raise RuntimeError("the peer did not produce the forced lengths")


def ours(model: nn.Module, prompts: list[list[int]], lengths: list[int], size: int) -> None:
    found = decode(
        model, prompts, Sampling(**_SAMPLING, max_new_tokens=LENGTHS[1]), eos_ids={_END}, pad_id=0,
        keys=[(0, i, 0) for i in range(len(prompts))], batch_size=size,
    )  # fmt: skip
    if [len(c.ids) for c in found] != lengths:
        raise RuntimeError("decode did not produce the forced lengths")


METHODS: dict[str, tuple[Callable, int]] = {
    "model.generate, batches of 32": (static_batches, 32),
    "model.generate, batches of 256": (static_batches, 256),
    "distill, 32 slots": (ours, 32),
    "distill, 256 slots": (ours, 256),
}


def generation_speed(prompts: int = 256, rounds: int = 3) -> dict[str, Any]:
    """Useful tokens per second of every method for both models, and ratios to static batches of 32."""
    device = pick_device()
    questions, lengths = workload(prompts)
    models = {"teacher (DeepSeek-V3: MLA, MoE)": load_model("checkpoints/teacher", device=device)}
    models["Qwen3 (GQA, dense), same width"] = _gqa_model(device)
    results: dict[str, Any] = {}
    for name, model in models.items():
        hook = model.register_forward_hook(count_down, with_kwargs=True)
        seconds: dict[str, list[float]] = {method: [] for method in METHODS}
        try:
            for _ in range(rounds):
                for method, (run, size) in METHODS.items():
                    start = time.perf_counter()
                    with torch.inference_mode():
                        run(model, questions, lengths, size)
                    seconds[method].append(time.perf_counter() - start)
        finally:
            hook.remove()
        median = {method: statistics.median(times) for method, times in seconds.items()}
        peer = median["model.generate, batches of 32"]
        results[name] = {
            method: {
                "tokens_per_second": round(sum(lengths) / median[method], 1),
                "ratio": round(peer / median[method], 2),
                "seconds": [round(t, 3) for t in seconds[method]],
            }
            for method in METHODS
        }
    return {
        "prompts": prompts,
        "answer_tokens": {"total": sum(lengths), "shortest": min(lengths), "longest": max(lengths)},
        "results": results,
        "device": describe_device(device),
        "versions": versions(),
    }


def _gqa_model(device):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen3", hidden_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        intermediate_size=512, vocab_size=391, max_position_embeddings=512, eos_token_id=_END, pad_token_id=0,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).to(device).eval()


def format_speed(found: dict[str, Any]) -> str:
    lines = [f"{found['prompts']} prompts, answers of {found['answer_tokens']['shortest']} to "
             f"{found['answer_tokens']['longest']} tokens, sampled; {found['device']}"]  # fmt: skip
    for model, methods in found["results"].items():
        lines += ["", model]
        for method, figures in methods.items():
            lines.append(
                f"  {method:32} {figures['tokens_per_second']:>9,.0f} tokens/s   x{figures['ratio']:.2f}"
            )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = benchmark_parser(__doc__)
    arguments = parser.parse_args(argv)
    check(arguments)
    quick = {"prompts": 64, "rounds": 1} if arguments.quick else {}
    rounds = {} if arguments.rounds is None else {"rounds": arguments.rounds}
    found = generation_speed(**{**quick, **rounds})
    leave(found, format_speed(found), arguments)
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
