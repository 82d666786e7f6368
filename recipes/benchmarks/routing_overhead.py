"""What recording costs: forward passes and decoding steps with and without `record_routing`, as ratios.

    python recipes/benchmarks/routing_overhead.py [--json] [--rounds N]        # about a minute on one CPU thread

Two models, the embedded teacher (MLA, 3 routed layers, experts as the loop that decodes fastest) and a tiny
Mixtral (GQA, 4 routed layers), each in two uses: a forward pass over 16 x 128 = 2,048 tokens, and 32 steps that
decode 8 rows from a cache of 64 tokens. keep="counts". Every round times both ways one after the other, order
alternating, and the ratio is the median over rounds: what the machine does meanwhile hits both. A unit is two
forward passes, after which the hooks digest the 4,096 tokens they hold; the steps digest their 256 tokens at
once, where a long evaluation would gather 4,096, so the figure for a step is an upper one. Which function scores
is settled once per recording (some 2 ms a layer) and not counted.

On a CPU the clock is this process's CPU time, which neighbours on the machine disturb less than the wall.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from distill.devices import describe_device
from distill.models.load import cache_name, fit_for_inference, load_model
from distill.moe.recording import record_routing

FORWARD, STEPS = (16, 128), 32  # rows and tokens of a pass; decoding steps of a unit
TARGETS = {"forward": 0.03, "decode_step": 0.10}


def overhead(rounds: int = 15) -> dict[str, Any]:
    """{"models": {name: {forward | decode_step: {plain_ms, recorded_ms, overhead}}}, ...}; ms per pass or step.

    `overhead` is the median of recorded / plain - 1 over rounds, `low` and `high` its quartiles.
    """
    found = {}
    for name, model in {"teacher": load_model("checkpoints/teacher", "fp32"), "mixtral": _mixtral()}.items():
        found[name] = {
            "forward": {**_paired(model, _passes(model), rounds, 2), "target": TARGETS["forward"]},
            "decode_step": {**_paired(model, _steps(model), rounds, STEPS), "target": TARGETS["decode_step"]},
        }
    device = describe_device(torch.device("cpu"))
    return {"models": found, "rounds": rounds, "device": device, "threads": torch.get_num_threads()}


def _mixtral():
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "mixtral", vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2,
    )  # fmt: skip
    return fit_for_inference(AutoModelForCausalLM.from_config(config)).eval()


def _ids(*shape: int) -> torch.Tensor:
    return torch.randint(3, 300, shape, generator=torch.Generator().manual_seed(0))


def _passes(model) -> Callable[[], None]:
    ids = _ids(*FORWARD)

    def unit() -> None:
        for _ in range(2):
            model(input_ids=ids, use_cache=False)

    return unit


def _steps(model) -> Callable[[], None]:
    cache, new = DynamicCache(config=model.config), _ids(8, 1)
    given = {cache_name(model): cache, "use_cache": True}
    with torch.inference_mode():
        model(input_ids=_ids(8, 64), **given)

    def unit() -> None:
        for _ in range(STEPS):
            model(input_ids=new, **given)
        cache.crop(-STEPS)

    return unit


@torch.inference_mode()
def _paired(model, unit: Callable[[], None], rounds: int, per_unit: int) -> dict[str, float]:
    def plain() -> float:
        start = time.process_time()
        unit()
        return time.process_time() - start

    def recorded() -> float:
        with record_routing(model, keep="counts") as recording:
            model(input_ids=_ids(2, 64), use_cache=False)
            for record in recording.layers.values():
                record.flush()
            start = time.process_time()
            unit()
            for record in recording.layers.values():
                record.flush()
            return time.process_time() - start

    plain(), recorded()
    pairs = []
    for round_ in range(rounds):
        first, second = (plain, recorded) if round_ % 2 else (recorded, plain)
        times = {first: first(), second: second()}
        pairs.append((times[plain], times[recorded]))
    ratios = [b / a - 1 for a, b in pairs]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    without, with_ = (statistics.median(column) * 1e3 / per_unit for column in zip(*pairs))
    return {"plain_ms": without, "recorded_ms": with_, "overhead": middle, "low": low, "high": high}


def format_overhead(found: dict[str, Any]) -> str:
    lines = [f"recording routing, median of {found['rounds']} pairs, {found['threads']} thread(s)"]
    for name, uses in found["models"].items():
        for use, v in uses.items():
            met = "within" if v["overhead"] <= v["target"] else "ABOVE"
            lines.append(
                f"  {name:<8} {use:<12} {v['plain_ms']:8.2f} -> {v['recorded_ms']:8.2f} ms  {v['overhead']:+6.1%} "
                f"(quartiles {v['low']:+.1%} to {v['high']:+.1%}), {met} {v['target']:.0%}"
            )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python recipes/benchmarks/routing_overhead.py", description="cost of recording"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="pairs per figure, at least 1")
    arguments = parser.parse_args(argv)
    found = overhead(max(1, arguments.rounds))
    print(json.dumps(found, indent=2) if arguments.json else format_overhead(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
