"""How fast the toolkit decodes, against `model.generate` in the same run, as ratios.

    python recipes/benchmarks/decoding.py [--quick] [--rounds N] [--out FILE] [--json]
    python recipes/benchmarks/decoding.py --model checkpoints/smollm2 [--dtype bf16]      a real model, one thread
        [--vllm-python PATH]                      vLLM as well, from an interpreter in which it is installed

256 prompts of the embedded tasks, sampled answers of 16 to 192 tokens, the embedded teacher (MLA, MoE) and a
GQA model of its size. Lengths are forced, and the same for everyone: a hook on the model makes each row count
down from its own number of tokens to the end token, so that no peer can be lucky. Useful tokens are those up to a
row's end; what a static batch computes for rows that have ended is its own loss. Machines are noisy: every
figure is the median of `rounds` interleaved rounds, and the ratio is what carries over.

With `--model` (dense models): prompts of 52 to 92 tokens from Python's own documentation, answers of 8 to 96, CPU
seconds on one thread, transformers' `generate_batch` and vLLM (`vllm_peer`) as well, four samples a prompt together
and apart, and the floor:
what the products alone would take at the speed of this model's largest layer at 512 rows.
"""

import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from script import benchmark_parser, check, leave, run_script
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from distill.devices import describe_device, pick_device
from distill.errors import RunError
from distill.models.chat import prompt_ids
from distill.models.decode import Sampling, decode
from distill.models.load import load_model, load_tokenizer
from distill.stages import versions
from distill.tasks.problems import LEVELS, sample_problems

LENGTHS = (16, 192)  # tokens of an answer, uniform
_END = 1  # the embedded tokenizer's end token
_FIRST = 190  # ids from here on count down: _FIRST + n is followed by _FIRST + n - 1, and at last by _END
_SPAN = 201  # ids that count down, the last ones of a vocabulary
_SURE = (
    25.0  # by which the forced token leads: certain, and without logits that nobody has (exp would underflow)
)
REAL_LENGTHS = (8, 96)
_SAMPLING = {"temperature": 0.8, "top_p": 0.95}


def counting(first: int, end: int) -> Callable:
    """Forward hook: the next token is one less than the last, whatever the model thinks of it, and at last `end`."""

    def hook(_module, _args, kwargs: dict, output):
        last, logits = kwargs["input_ids"][:, -1], output.logits[:, -1]
        following = torch.where((last > first) & (last < first + _SPAN), last - 1, end)
        logits.scatter_(1, following.unsqueeze(1), logits.amax(-1, keepdim=True) + _SURE)
        return output

    return hook


count_down = counting(_FIRST, _END)


def workload(prompts: int, seed: int = 0) -> tuple[list[list[int]], list[int]]:
    """(prompts whose last token says how long the answer will be, those lengths)."""
    tokenizer = load_tokenizer("checkpoints/teacher")
    rng = random.Random(seed)
    problems = sample_problems("test", dict.fromkeys(LEVELS, prompts), seed)[:prompts]
    lengths = [rng.randint(*LENGTHS) for _ in problems]
    ids = [prompt_ids(tokenizer, [{"role": "user", "content": p.question}]) for p in problems]
    return [[*i, _FIRST + length - 1] for i, length in zip(ids, lengths)], lengths


def static_batches(
    model: nn.Module, prompts: list[list[int]], lengths: list[int], size: int, end: int = _END
) -> None:
    """The peer: `model.generate`, left-padded batches in the given order, each as long as its longest row."""
    for start in range(0, len(prompts), size):
        batch = prompts[start : start + size]
        width = max(map(len, batch))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in batch])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch])
        out = model.generate(
            ids.to(model.device), attention_mask=mask.to(model.device), do_sample=True, top_k=0, **_SAMPLING,
            max_new_tokens=max(lengths), eos_token_id=end, pad_token_id=0,
        )  # fmt: skip
        for row, length in zip(out[:, width:].tolist(), lengths[start : start + size]):
            if row[length - 1] != end:
                raise RuntimeError("the peer did not produce the forced lengths")


def ours(model: nn.Module, prompts: list[list[int]], lengths: list[int], size: int, end: int = _END) -> None:
    found = decode(
        model, prompts, Sampling(**_SAMPLING, max_new_tokens=max(lengths)), eos_ids={end}, pad_id=0,
        keys=[(0, i, 0) for i in range(len(prompts))], batch_size=size,
    )  # fmt: skip
    if [len(c.ids) for c in found] != lengths:
        raise RuntimeError("decode did not produce the forced lengths")


VLLM = "vLLM, not compiled" if "TORCHDYNAMO_DISABLE" in os.environ else "vLLM"
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


def real_workload(folder: str, prompts: int, seed: int = 0) -> tuple[list[list[int]], list[int], int, int]:
    """(prompts of ordinary English, lengths of their answers, first id that counts down, end token)."""
    import pydoc_data.topics

    tokenizer, rng = load_tokenizer(folder), random.Random(seed)
    text = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    ids = tokenizer(text[: 1000 * prompts], add_special_tokens=False, verbose=False)["input_ids"]
    first = len(tokenizer) - _SPAN
    ids = [i for i in ids if i < first]
    questions, lengths = [], [rng.randint(*REAL_LENGTHS) for _ in range(prompts)]
    for length in lengths:
        size = rng.randint(51, 91)
        start = rng.randrange(len(ids) - size)
        questions.append([*ids[start : start + size], first + length - 1])
    return questions, lengths, first, tokenizer.eos_token_id


def continuous(model: nn.Module, prompts: list[list[int]], lengths: list[int], size: int, end: int) -> None:
    """The other peer: transformers' continuous batching. Its hooks see packed tokens, so it is told the lengths."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    blocks = sum(-(-(len(p) + n) // 32) for p, n in zip(prompts, lengths))
    how = ContinuousBatchingConfig(page_size=32, num_blocks=blocks + 64, max_batch_tokens=4 * size)
    chosen = GenerationConfig(do_sample=True, top_k=0, **_SAMPLING, eos_token_id=-1, pad_token_id=0)
    with model.continuous_batching_context_manager(chosen, continuous_batching_config=how) as manager:
        for prompt, length in zip(prompts, lengths):
            manager.add_request(prompt, max_new_tokens=length, eos_token_id=-1)
        made = 0
        for _ in prompts:
            result = manager.get_result(timeout=600)
            if result is None or result.error:
                raise RuntimeError(f"generate_batch: {result and result.error}")
            made += len(result.generated_tokens)
    if made != sum(lengths):
        raise RuntimeError("generate_batch did not produce the forced lengths")


class Vllm:
    """vLLM in a process of another interpreter; like `continuous` it is told the lengths."""

    def __init__(self, python: str, folder: str, dtype: str):
        script = Path(__file__).with_name("vllm_peer.py")
        form = {"bf16": "bfloat16", "fp32": "float32"}[dtype]
        self._process = subprocess.Popen(
            [python, str(script), folder, form], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def seconds(self, prompts: list[list[int]], lengths: list[int]) -> float:
        """CPU seconds of all its processes. Raises RunError where it ended (what it said stands above)."""
        asked = {"prompts": prompts, "lengths": lengths, **_SAMPLING}
        try:
            print(json.dumps(asked), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RunError("vLLM's process ended; its own words stand above")
        found = json.loads(line)
        if found["tokens"] != sum(lengths):
            raise RunError(f"vLLM wrote {found['tokens']} tokens where {sum(lengths)} were asked for")
        return found["cpu_seconds"]

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=60)


def floor_seconds(model: nn.Module, prompt_tokens: int, answer_tokens: int) -> float:
    """CPU seconds of the products alone, each at the speed of the largest layer of the body at 512 rows."""
    head = model.get_output_embeddings()
    linears = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    largest = max(linears, key=lambda m: m.weight.numel())
    x = torch.randn(512, largest.in_features, dtype=largest.weight.dtype)
    seconds = min(_cpu_seconds(lambda: [largest(x) for _ in range(8)]) for _ in range(5)) / 8
    rate = 2 * 512 * largest.weight.numel() / seconds
    body = 2 * sum(m.weight.numel() for m in linears)
    return (body * (prompt_tokens + answer_tokens) + 2 * head.weight.numel() * answer_tokens) / rate


def _cpu_seconds(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def real_speed(
    folder: str, dtype: str, prompts: int = 256, rounds: int = 3, vllm_python: str | None = None
) -> dict[str, Any]:
    """Useful tokens per CPU second on one thread, ratios to static batches of 32, and to the floor."""
    vllm = Vllm(vllm_python, folder, dtype) if vllm_python else None
    torch.set_num_threads(1)
    model = load_model(folder, dtype, torch.device("cpu"))
    questions, lengths, first, end = real_workload(folder, prompts)
    few = max(1, prompts // 16)
    four = [[item for item in column[:few] for _ in range(4)] for column in (questions, lengths)]
    methods: dict[str, tuple[Callable[[], Any], int]] = {
        "model.generate, batches of 32": (lambda: static_batches(model, questions, lengths, 32, end), sum(lengths)),
        "generate_batch": (lambda: continuous(model, questions, lengths, 64, end), sum(lengths)),
        "distill, 32 slots": (lambda: ours(model, questions, lengths, 32, end), sum(lengths)),
        "distill, 256 slots": (lambda: ours(model, questions, lengths, 256, end), sum(lengths)),
        "distill, 4 samples a prompt": (lambda: ours(model, *four, 256, end), sum(four[1])),
        "distill, the same apart": (
            lambda: [ours(model, questions[:few], lengths[:few], 256, end) for _ in range(4)], sum(four[1]),
        ),
    }  # fmt: skip
    seconds: dict[str, list[float]] = {method: [] for method in methods}
    floors = []
    hook = model.register_forward_hook(counting(first, end), with_kwargs=True)
    try:
        for _ in range(rounds):
            floors.append(floor_seconds(model, sum(map(len, questions)), sum(lengths)))
            for method, (run, _) in methods.items():
                if method == "generate_batch":
                    hook.remove()
                with torch.inference_mode():
                    seconds[method].append(_cpu_seconds(run))
                if method == "generate_batch":
                    hook = model.register_forward_hook(counting(first, end), with_kwargs=True)
            if vllm is not None:
                if VLLM not in methods:
                    methods[VLLM], seconds[VLLM] = (vllm.seconds, sum(lengths)), []
                    vllm.seconds(questions[:8], lengths[:8])  # the first ones compile
                seconds[VLLM].append(vllm.seconds(questions, lengths))
    finally:
        hook.remove()
        if vllm is not None:
            vllm.close()
    median = {method: statistics.median(times) for method, times in seconds.items()}
    floor, peer = statistics.median(floors), median["model.generate, batches of 32"] / sum(lengths)
    found = {
        method: {
            "tokens_per_second": round(tokens / median[method], 1),
            "ratio": round(peer * tokens / median[method], 2),
            "times_the_floor": round(median[method] / floor, 2) if tokens == sum(lengths) else None,
            "seconds": [round(t, 3) for t in seconds[method]],
        }
        for method, (_, tokens) in methods.items()
    }
    return {
        "prompts": prompts,
        "answer_tokens": {"total": sum(lengths), "shortest": min(lengths), "longest": max(lengths)},
        "results": {f"{Path(folder).name}, {dtype}, CPU seconds": found},
        "floor_seconds": round(floor, 3),
        "device": describe_device(torch.device("cpu")),
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
    parser.add_argument("--model", metavar="FOLDER", help="a dense model of yours instead, on one CPU thread")
    parser.add_argument("--dtype", default="bf16", choices=["fp32", "bf16"], help="with --model")
    parser.add_argument(
        "--vllm-python", metavar="PATH", help="with --model: an interpreter in which vLLM is installed"
    )
    arguments = parser.parse_args(argv)
    check(arguments)
    quick = {"prompts": 64, "rounds": 1} if arguments.quick else {}
    rounds = {} if arguments.rounds is None else {"rounds": arguments.rounds}
    if arguments.model:
        found = real_speed(
            arguments.model, arguments.dtype, vllm_python=arguments.vllm_python, **{**quick, **rounds}
        )
    else:
        found = generation_speed(**{**quick, **rounds})
    leave(found, format_speed(found), arguments)
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
