"""A stand-in for the package `vllm`, of the names and shapes that this project uses (vLLM 0.32), over transformers.

    install(monkeypatch)             # `import vllm` finds it; `LLM.made` are the engines, with what they were given

It answers greedily whatever the temperature, token by token, and names the K likeliest tokens with rank and natural
log-probability, and the token that stands there, as vLLM does.
"""

import importlib.machinery
import sys
import types
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


@dataclass
class Logprob:
    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass
class SamplingParams:
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: list[str] = field(default_factory=list)
    stop_token_ids: list[int] = field(default_factory=list)
    include_stop_str_in_output: bool = False
    max_tokens: int = 16
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True


@dataclass
class CompletionOutput:
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str
    index: int = 0


@dataclass
class RequestOutput:
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput]


def table(logits: torch.Tensor, token: int, k: int) -> dict[int, Logprob]:
    logs = logits.log_softmax(-1)
    order = logs.argsort(descending=True, stable=True)
    found = {int(i): Logprob(float(logs[i]), rank + 1) for rank, i in enumerate(order[:k].tolist())}
    found.setdefault(token, Logprob(float(logs[token]), 1 + int((logs > logs[token]).sum())))
    return found


class LLM:
    made: list["LLM"] = []
    ends_at: int | None = None  # so many tokens on, the end token, which random weights hardly ever say

    def __init__(self, model: str, dtype: str = "auto", max_logprobs: int = 20, **options: Any):
        if options.get("gpu_memory_utilization", 0.9) > 1:
            raise ValueError("gpu_memory_utilization must be at most 1\nand more lines")
        self.given = {"model": model, "dtype": dtype, "max_logprobs": max_logprobs, **options}
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.tokenizer, self.asked, self.stopped = AutoTokenizer.from_pretrained(model), [], False
        core = types.SimpleNamespace(shutdown=lambda: setattr(self, "stopped", True))
        self.llm_engine = types.SimpleNamespace(engine_core=core)
        self.changed = lambda output: output  # a test's way to make it misbehave
        LLM.made.append(self)

    @torch.no_grad()
    def generate(self, prompts: list[dict], params, use_tqdm: bool = True) -> list[RequestOutput]:
        params = params if isinstance(params, list) else [params] * len(prompts)
        self.asked += params
        return [
            self.changed(self._one(p["prompt_token_ids"], s)) for p, s in zip(prompts, params, strict=True)
        ]

    def _logits(self, ids: list[int]) -> torch.Tensor:
        vocabulary = len(self.tokenizer)
        return self.model(torch.tensor([ids])).logits[0, :, :vocabulary].float()

    def _one(self, prompt: list[int], asked: SamplingParams) -> RequestOutput:
        for wanted in (asked.logprobs, asked.prompt_logprobs):
            if wanted is not None and wanted > self.given["max_logprobs"]:
                raise ValueError(f"Requested {wanted} logprobs, which is greater than max allowed")
        ids, tables, reason = [], [], "length"
        while len(ids) < asked.max_tokens:
            logits = self._logits([*prompt, *ids])[-1]
            at_end = len(ids) + 1 == self.ends_at
            ids.append(asked.stop_token_ids[0] if at_end else int(logits.argmax()))
            tables.append(table(logits, ids[-1], asked.logprobs or 0))
            ended = ids[-1] in asked.stop_token_ids
            if ended or (asked.stop and any(s in self.tokenizer.decode(ids) for s in asked.stop)):
                reason = "stop"
                break
        scored = None
        if asked.prompt_logprobs is not None:
            logits = self._logits(prompt)
            scored = [None, *(table(logits[i], t, asked.prompt_logprobs) for i, t in enumerate(prompt[1:]))]
        output = CompletionOutput(ids, tables if asked.logprobs is not None else None, reason)
        return RequestOutput(prompt, scored, [output])


def install(monkeypatch) -> type[LLM]:
    module = types.ModuleType("vllm")
    module.__spec__ = importlib.machinery.ModuleSpec("vllm", loader=None)
    module.LLM, module.SamplingParams = LLM, SamplingParams
    monkeypatch.setitem(sys.modules, "vllm", module)
    LLM.made, LLM.ends_at = [], None
    return LLM
