"""Whether this toolkit is right and how fast it is on this device: one run of some minutes, one small JSON.

    python recipes/benchmarks/device.py                        # on a GPU: 8 minutes, recipes/results/device-NAME.json
    python recipes/benchmarks/device.py --quick --out x.json   # small models, a minute on a CPU
    python recipes/benchmarks/device.py --only equality,kd

Parts, in order of importance. Each is a process of its own with a time limit, and the JSON is written after each, so
that a crash or a hang loses one part:

    equality   loss and gradients of objectives on the device against the CPU, in float32
    resume     the fused optimizer stopped after two steps, saved and read: the weights of an undisturbed run
    precision  bf16, fp16 with a loss scaler, float8 where the chip has it: one step's loss and gradient against float32
    decode     tokens a second of the decoder, greedy and top-p, and of `model.generate`
    kd         a step of forward KL, LoRA and full, fused and on whole logits: tokens a second, MFU, memory
    trl        TRL's divergence on logits of the same vocabulary, where TRL is installed

kd and decode use random weights in the shapes of a 0.6B student and a 1.7B teacher. MFU counts the products of the
models' passes (no recomputation) over the datasheet's dense 16-bit peak.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from script import run_script
from transformers import AutoModelForCausalLM, Qwen3Config

from distill.config.training import Lora, Objective, Train
from distill.data.batches import TokenRows
from distill.devices import describe_device, peak_flops, peak_memory, pick_device
from distill.errors import UserError
from distill.models.decode import Sampling, decode
from distill.models.student import add_lora
from distill.stages import versions
from distill.storage import PROJECT_ROOT, write_json
from distill.training.checkpoint import load_state, save_state
from distill.training.live_teachers import FrozenTeacher
from distill.training.step import StudentStep
from distill.training.train import make_optimizer

RESULTS = PROJECT_ROOT / "recipes" / "results"
LIMITS = {"equality": 90, "resume": 60, "precision": 90, "decode": 100, "kd": 120, "trl": 60}  # seconds


def shape(hidden: int, inner: int, quick: bool) -> Qwen3Config:
    """A Qwen3 of this width with 28 layers and its vocabulary; two small layers for --quick."""
    if quick:
        return Qwen3Config(
            vocab_size=1024, hidden_size=hidden // 16, intermediate_size=inner // 16, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True,
            max_position_embeddings=2048, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        )  # fmt: skip
    return Qwen3Config(
        vocab_size=151_936, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=True, max_position_embeddings=4096, pad_token_id=0,
        eos_token_id=1, bos_token_id=None,
    )  # fmt: skip


def student(quick: bool) -> Qwen3Config:
    return shape(1024, 3072, quick)


def teacher(quick: bool) -> Qwen3Config:
    return shape(2048, 6144, quick)


def built(config: Qwen3Config, dtype: torch.dtype, device: torch.device, seed: int = 0):
    torch.manual_seed(seed)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")


def ragged(n: int, prompt: int, completion: int, vocabulary: int) -> TokenRows:
    rng = np.random.default_rng(0)
    draw = lambda most: rng.integers(2, vocabulary, rng.integers(max(1, most // 2), most + 1)).tolist()  # noqa: E731
    return TokenRows([draw(prompt) for _ in range(n)], [draw(completion) for _ in range(n)])


def batch_of(rows: TokenRows):
    return rows.collate(np.argsort(rows.lengths, kind="stable"), 0)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], Any], device: torch.device, times: int) -> float:
    """Median of `times` calls after two unmeasured ones."""
    found = []
    for i in range(times + 2):
        wait(device)
        start = time.perf_counter()
        work()
        wait(device)
        if i > 1:
            found.append(time.perf_counter() - start)
    return statistics.median(found)


# ------------------------------------------------------------------------------------------------ the parts


def equality(device: torch.device, _quick: bool) -> dict[str, Any]:
    config, other = student(True), teacher(True)
    batch, found = batch_of(ragged(8, 12, 12, 1024)), {}
    for name in ("cross_entropy", "forward_kl", "reverse_kl", "generalized_jsd", "total_variation"):
        sides = []
        for where in (torch.device("cpu"), device):
            step = StudentStep(built(config, torch.float32, "cpu").to(where), [Objective(name=name)])
            asks = FrozenTeacher(built(other, torch.float32, "cpu", seed=1).to(where))
            here = step.ready(batch, where)
            total, _ = step(here, asks(here))
            (total / len(batch.targets)).backward()
            sides.append((float(total.detach()), {n: p.grad.cpu() for n, p in step.named_parameters()}))
        (loss, grads), (there, theirs) = sides
        norm = sum(float(g.square().sum()) for g in grads.values()) ** 0.5
        away = sum(float((theirs[n] - g).square().sum()) for n, g in grads.items()) ** 0.5
        found[name] = {"loss_relative": abs(there - loss) / abs(loss), "gradient_relative": away / norm}
    worst = max(value for one in found.values() for value in one.values())
    return {"objectives": found, "worst": worst, "ok": worst < 1e-4}


def resume(device: torch.device, _quick: bool) -> dict[str, Any]:
    train = Train(objectives=[Objective(name="cross_entropy")], learning_rate=1e-3)
    batch = batch_of(ragged(8, 24, 24, 1024))

    def run(folder: Path | None, stop: bool = False, go_on: bool = False) -> dict[str, torch.Tensor]:
        step = StudentStep(built(student(True), torch.float32, device).train(), train.objectives)
        optimizer = make_optimizer(train, list(step.parameters()))
        first = load_state(folder / "state-0000002", step, optimizer)["step"] if go_on else 0
        here = step.ready(batch, device)
        for number in range(first, 4):
            total, _ = step(here, {})
            (total / len(batch.targets)).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if stop and number == 1:
                save_state(folder, 2, step, optimizer, {})
                break
        return {name: p.detach().cpu() for name, p in step.named_parameters()}

    def apart(a: dict, b: dict) -> float:
        return max(float((a[name] - b[name]).abs().max()) for name in a)

    with tempfile.TemporaryDirectory() as folder:
        whole, again = run(None), run(None)
        run(Path(folder), stop=True)
        resumed = apart(whole, run(Path(folder), go_on=True))
    twice = apart(whole, again)
    # Attention's backward pass may add up in any order on a GPU: a resumed run is as near as a repeated one.
    return {"repeated_differs": twice, "resumed_differs": resumed, "ok": resumed <= max(10 * twice, 1e-6)}


def precision(device: torch.device, _quick: bool) -> dict[str, Any]:
    config, batch, reference, found = student(True), batch_of(ragged(8, 24, 24, 1024)), None, {}
    kinds: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
    for name, dtype in kinds.items():
        if name == "fp16" and device.type == "cpu":
            found[name] = {"ran": False, "why": "no CPU path"}
            continue
        step = StudentStep(built(config, torch.float32, device).train(), [Objective(name="cross_entropy")])
        optimizer = torch.optim.SGD(step.parameters(), lr=0.0)
        scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")
        here = step.ready(batch, device)
        with torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            total, _ = step(here, {})
        scaler.scale(total / len(batch.targets)).backward()
        scaler.unscale_(optimizer) if name == "fp16" else None
        flat = torch.cat([p.grad.double().flatten() for p in step.parameters()]).cpu()
        reference = flat if reference is None else reference
        cosine = float(flat @ reference / (flat.norm() * reference.norm()))
        loss = float(total.detach()) / len(batch.targets)
        found[name] = {
            "ran": True,
            "loss": loss,
            "gradient_cosine": cosine,
            "finite": bool(flat.isfinite().all()),
        }
    found["fp8"] = _float8(device)
    ran = [one for one in found.values() if one["ran"]]
    return found | {
        "ok": all(one["finite"] and one["gradient_cosine"] > 0.98 for one in ran if "finite" in one)
    }


def _float8(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        return {"ran": False, "why": "no float8 units"}
    a = torch.randn(64, 64, device=device).to(torch.float8_e4m3fn)
    b = torch.randn(64, 64, device=device).to(torch.float8_e4m3fn)
    one = torch.ones((), device=device)
    product = torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
    exact = a.float() @ b.float().t()
    return {"ran": True, "relative": float((product.float() - exact).norm() / exact.norm())}


def decoding(device: torch.device, quick: bool) -> dict[str, Any]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = built(student(quick), dtype, device).eval()
    n, new, most = (8, 12, 8) if quick else (256, 96, 128)
    rows = ragged(n, most, 1, model.config.vocab_size)
    prompts = [rows.row(i)[0].tolist() for i in range(n)]
    found: dict[str, Any] = {"rows": n, "new_tokens": new, "dtype": str(dtype)}
    for name, sampling in {
        "greedy": Sampling(max_new_tokens=new),
        "top_p": Sampling(temperature=1.0, top_p=0.95, max_new_tokens=new),
    }.items():
        keys = [(0, i) for i in range(n)]
        run = lambda s=sampling, k=keys: decode(  # noqa: E731
            model, prompts, s, eos_ids=set(), pad_id=0, keys=k, batch_size=n
        )
        found[name] = {"tokens_per_second": round(n * new / seconds(run, device, 1))}
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    with torch.inference_mode():
        run = lambda: model.generate(  # noqa: E731
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
        )
        found["generate_greedy"] = {"tokens_per_second": round(n * new / seconds(run, device, 1))}
    return found | {"ok": True}


def products(config: Qwen3Config, tokens: int, kept: int, passes: int) -> float:
    """FLOPs of `passes` passes over the matrices: 1 forward, 2 with gradients of inputs, 3 with those of weights."""
    heads = config.head_dim * (2 * config.num_attention_heads + 2 * config.num_key_value_heads)
    layer = config.hidden_size * (heads + 3 * config.intermediate_size)
    return (
        2.0
        * passes
        * (config.num_hidden_layers * layer * tokens + config.vocab_size * config.hidden_size * kept)
    )


def kd(device: torch.device, quick: bool) -> dict[str, Any]:
    n, length, times = (4, 32, 2) if quick else (8, 1024, 5)
    mine, theirs = student(quick), teacher(quick)
    rng = np.random.default_rng(0)
    draw = lambda: rng.integers(2, mine.vocab_size, length // 2).tolist()  # noqa: E731
    batch = TokenRows([draw() for _ in range(n)], [draw() for _ in range(n)]).collate(np.arange(n), 0)
    tokens, kept = int(batch.attention_mask.sum()), len(batch.targets)
    found: dict[str, Any] = {"rows": n, "tokens": length}
    for adapter in ("lora", "full"):
        for head in ("fused", "whole"):
            found[f"{adapter} {head}"] = _kd_step(device, adapter, head, mine, theirs, batch, times)
            passes = 2 if adapter == "lora" else 3
            work = products(mine, tokens, kept, passes) + products(theirs, tokens, kept, 1)
            taken = found[f"{adapter} {head}"].pop("seconds")
            peak = peak_flops(device, "bf16")
            found[f"{adapter} {head}"] |= {
                "tokens_per_second": round(tokens / taken), "tflops": round(work / taken / 1e12, 2),
                "mfu": round(work / taken / peak, 4) if peak else None,
            }  # fmt: skip
    ratio = found["full fused"]["loss"] / found["full whole"]["loss"]
    return found | {"ok": abs(ratio - 1) < 1e-2}


def _kd_step(
    device: torch.device, adapter: str, head: str, mine, theirs, batch, times: int
) -> dict[str, Any]:
    model = built(mine, torch.bfloat16 if adapter == "lora" else torch.float32, device)
    if adapter == "lora":
        model = add_lora(model, Lora(rank=16), "none").to(device)
    asks = FrozenTeacher(built(theirs, torch.bfloat16, device, seed=1))
    step = StudentStep(model.train(), [Objective(name="forward_kl")])
    optimizer = torch.optim.AdamW([p for p in step.parameters() if p.requires_grad], lr=0.0, fused=True)
    here, kept, losses = step.ready(batch, device), len(batch.targets), []

    def once() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            if head == "fused":
                total, _ = step(here, asks(here))
            else:
                q = model(**here.inputs(), use_cache=False).logits[here.keep]
                with torch.no_grad():
                    p = asks.model(**here.inputs(), use_cache=False).logits[here.keep]
                total = F.kl_div(
                    q.float().log_softmax(-1), p.float().log_softmax(-1), reduction="sum", log_target=True
                )
        (total / kept).backward()
        losses.append(total.detach() / kept)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    taken = seconds(once, device, times)
    return {"seconds": taken, "loss": float(losses[-1]), "peak_bytes": peak_memory(device)}


def trl(device: torch.device, quick: bool) -> dict[str, Any]:
    try:
        from trl.experimental.gkd.gkd_trainer import GKDTrainer  # its loss is a static function of two logits
    except Exception as error:  # not installed, or moved: then there is nothing to compare with
        return {"ran": False, "why": f"{type(error).__name__}: {str(error)[:100]}"}
    n = 256 if quick else 4096
    q = torch.randn(1, n, student(quick).vocab_size, device=device, requires_grad=True)
    p = torch.randn(1, n, student(quick).vocab_size, device=device)

    def once() -> None:
        GKDTrainer.generalized_jsd_loss(q, p, beta=0.5).backward()

    return {"ran": True, "loss_alone_seconds": seconds(once, device, 2), "tokens": n, "ok": True}


PARTS = {
    "equality": equality,
    "resume": resume,
    "precision": precision,
    "decode": decoding,
    "kd": kd,
    "trl": trl,
}


# ------------------------------------------------------------------------------------------------ the run


def verdict(part: dict[str, Any]) -> str:
    """ok, FAILED with its error, or why it did not run."""
    if part.get("ran") is False:
        return f"not run ({part['why']})"
    return "ok" if part.get("ok") else f"FAILED {part.get('error', '')}".strip()


def one_part(name: str, quick: bool, device: torch.device, out: Path) -> None:
    try:
        found = PARTS[name](device, quick)
    except Exception as error:  # the other parts still say what they have to
        traceback.print_exc()
        found = {"ok": False, "error": f"{type(error).__name__}: {str(error)[:300]}"}
    write_json(out, found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small models: a minute on a CPU")
    parser.add_argument("--only", default=",".join(PARTS), metavar="PART,...")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--out", metavar="FILE", help="instead of recipes/results/device-NAME.json")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # a child's work
    arguments = parser.parse_args()
    device = pick_device(arguments.device)
    if arguments.part:
        one_part(arguments.part, arguments.quick, device, Path(arguments.out))
        return 0
    wanted = arguments.only.split(",")
    if unknown := set(wanted) - PARTS.keys():
        raise UserError(f"--only {','.join(sorted(unknown))}: the parts are {', '.join(PARTS)}")
    name = describe_device(device)
    slug = re.sub(r"[^a-z0-9]+", "-", (name if device.type == "cuda" else "cpu").lower()).strip("-")
    out = Path(arguments.out or RESULTS / f"device-{slug}.json")
    found: dict[str, Any] = {
        "device": name, "quick": arguments.quick, "system": platform.system(), "versions": versions(), "parts": {}
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        for part in wanted:
            answer = Path(folder) / f"{part}.json"
            command = [
                sys.executable,
                __file__,
                "--part",
                part,
                "--device",
                device.type,
                "--out",
                str(answer),
            ]
            start = time.perf_counter()
            try:
                subprocess.run(
                    [*command, *(["--quick"] if arguments.quick else [])],
                    timeout=LIMITS[part] * 3,
                    env=os.environ,
                )
                result = (
                    json.loads(answer.read_text())
                    if answer.is_file()
                    else {"ok": False, "error": "it crashed"}
                )
            except subprocess.TimeoutExpired:
                result = {"ok": False, "error": f"more than {LIMITS[part] * 3} s"}
            found["parts"][part] = {**result, "seconds": round(time.perf_counter() - start, 1)}
            write_json(out, found)
            print(f"{part}: {verdict(result)}", flush=True)
    print(out)
    return 0 if all(part.get("ok", part.get("ran") is False) for part in found["parts"].values()) else 1


if __name__ == "__main__":
    raise SystemExit(run_script(main))
