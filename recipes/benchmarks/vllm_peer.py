"""vLLM as a peer of the decoding benchmark: a process of an interpreter in which vLLM is installed, on one thread.

    PYTHON recipes/benchmarks/vllm_peer.py FOLDER [DTYPE]       reads lines of JSON, answers each with a line of JSON

A line `{"prompts": [[ids]], "lengths": [n], "temperature": t, "top_p": p, "together": rows}` is answered by
`{"cpu_seconds": s, "tokens": n}`: CPU seconds of this process and all its children from the moment the requests are
handed over until the last answer is there. Loading, compiling and warming up come before the first answer. Prefix
caching is off, since prompts of several rounds are the same; an answer has the length that it is told, whatever the
model thinks of it. Compiling takes vLLM an hour on some CPUs: with TORCHDYNAMO_DISABLE=1 it runs layers as they are.
"""

import json
import os
import sys
from typing import Any

EAGER = "TORCHDYNAMO_DISABLE"
SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    # On a busy machine a step may take long.
    "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": "3600",
    "VLLM_ENGINE_ITERATION_TIMEOUT_S": "3600",
}


def cpu_seconds() -> float:
    """Of this process and of all below it, those that run."""
    import psutil

    own = psutil.Process()
    times = [process.cpu_times() for process in (own, *own.children(recursive=True))]
    return sum(t.user + t.system for t in times)


def answer(engine: Any, asked: dict[str, Any]) -> dict[str, float]:
    from vllm import SamplingParams

    wanted = [
        SamplingParams(
            temperature=asked["temperature"], top_p=asked["top_p"], max_tokens=n, min_tokens=n, ignore_eos=True,
            detokenize=False,
        )
        for n in asked["lengths"]
    ]  # fmt: skip
    start = cpu_seconds()
    found = engine.generate([{"prompt_token_ids": ids} for ids in asked["prompts"]], wanted, use_tqdm=False)
    seconds = cpu_seconds() - start
    return {"cpu_seconds": seconds, "tokens": sum(len(r.outputs[0].token_ids) for r in found)}


def main(folder: str, dtype: str = "bfloat16") -> None:
    # What the engine prints must not stand between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from vllm import LLM

    engine = LLM(
        folder, dtype=dtype, max_model_len=512, max_num_seqs=256, enable_prefix_caching=False, seed=0,
        enforce_eager=EAGER in os.environ,
    )  # fmt: skip
    for line in sys.stdin:
        print(json.dumps(answer(engine, json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    os.environ.update(SETTINGS)
    main(*sys.argv[1:])
