"""What a run cost and what that leaves out: the published bill of DeepSeek-V3, the ledger of a run folder.

    distill cost deepseek-v3 [--json]        $5.576M: what it is the price of, and what it is not
    distill cost RUN_DIR [--json]            tokens, FLOPs, device-hours and USD of every finished stage
    run_ledger("checkpoints/demo", prices={"usd_per_device_hour": 0.35})["totals"]["usd"]

Both end in `not_counted`: a cost without its exclusions is how $5.576M came to be quoted as the price of a
laboratory. A number that nobody recorded is null, never an estimate. Imports no torch.
"""

import math
import re
from pathlib import Path
from typing import Any

from distill.errors import UserError
from distill.shards import MANIFEST, read_json

V3_PAPER = "DeepSeek-V3 technical report, arXiv 2412.19437, section 1 and table 1"
USD_PER_H800_HOUR = 2  # the paper's assumption: a rental price, not what DeepSeek paid
V3_GPU_HOURS = {"pre_training": 2_664_000, "context_extension": 119_000, "post_training": 5_000}
V3_ACTIVE_PARAMETERS = 37e9
V3_TOKENS = 14.8e12
V3_GPU_HOURS_PER_TRILLION = 180_000
V3_CLUSTER = 2048
# Dense peaks of one H800, FLOP/s: NVIDIA's H100 SXM data sheet, whose compute the H800 keeps.
H800_PEAK = {"bf16": 989e12, "fp8": 1979e12}

STAGES = ("prompts", "generations", "dataset", "student", "control", "eval")


# ----------------------------------------------------------------------------- the published DeepSeek-V3 bill


def deepseek_v3_bill() -> dict[str, Any]:
    """Table 1 of the V3 paper exactly, what follows from it by arithmetic, and what it does not count.

    Keys: `gpu`, `usd_per_gpu_hour`, `source`, `gpu_hours`, `usd`, `stages.<name>.gpu_hours|usd`,
    `first_principles`, and `not_counted`, a list of `item`, `range` (USD, [low, high] or null), `source` and
    `source_quality`.
    """
    stages = {
        name: {"gpu_hours": hours, "usd": hours * USD_PER_H800_HOUR} for name, hours in V3_GPU_HOURS.items()
    }
    return {
        "gpu": "NVIDIA H800",
        "usd_per_gpu_hour": USD_PER_H800_HOUR,
        "source": V3_PAPER,
        "gpu_hours": sum(stage["gpu_hours"] for stage in stages.values()),
        "usd": sum(stage["usd"] for stage in stages.values()),
        "stages": stages,
        "first_principles": _v3_first_principles(),
        "not_counted": _v3_not_counted(),
    }


def _v3_first_principles() -> dict[str, Any]:
    """Does the bill fit the model? 6 FLOPs per active parameter and token (Kaplan, arXiv 2001.08361, 2.1).

    That count leaves out attention over the context, so the utilisation (model FLOPs / peak) is a lower
    bound. V3 ran most matrix products in FP8, the rest in BF16: the two peaks bracket the achievable one.
    """
    flops = 6 * V3_ACTIVE_PARAMETERS * V3_TOKENS
    seconds = V3_GPU_HOURS["pre_training"] * 3600
    trillions = V3_TOKENS / 1e12
    return {
        "active_parameters": V3_ACTIVE_PARAMETERS,
        "tokens": V3_TOKENS,
        "flops": flops,
        "flops_per_second_per_gpu": flops / seconds,
        "peak_flops_per_second": dict(H800_PEAK),
        "utilisation": {name: flops / seconds / peak for name, peak in H800_PEAK.items()},
        "gpu_hours_per_trillion_tokens": V3_GPU_HOURS_PER_TRILLION,
        "gpu_hours_from_rate": V3_GPU_HOURS_PER_TRILLION * trillions,
        "gpus": V3_CLUSTER,
        "days_per_trillion_tokens": V3_GPU_HOURS_PER_TRILLION / V3_CLUSTER / 24,
        "days_of_pre_training": V3_GPU_HOURS["pre_training"] / V3_CLUSTER / 24,
    }


def _v3_not_counted() -> list[dict[str, Any]]:
    excluded = {"source": V3_PAPER, "source_quality": "primary: names the exclusion, gives no amount"}
    unpublished = {"source": None, "source_quality": "none: no figure published"}
    semianalysis = {
        "source": "SemiAnalysis, 31 January 2025, as quoted in the press",
        "source_quality": "secondary: an analyst's estimate of the whole company, not confirmed by it",
    }
    return [
        {"item": "research before the final run (architecture, algorithms, data)", "range": None, **excluded},
        {"item": "ablation experiments", "range": None, **excluded},
        {"item": "salaries", "range": None, **unpublished},
        {"item": "data: collecting, cleaning, licences, labels", "range": None, **unpublished},
        {
            "item": "the R1-series model whose outputs post-training uses",
            "range": None,
            **unpublished,
        },
        {
            "item": "capital: GPUs and servers (well over $500M of hardware over the company's history; "
            "about $1.6B of servers for about 50,000 Hopper GPUs)",
            "range": [500_000_000, 1_600_000_000],
            **semianalysis,
        },
        {"item": "operating those servers", "range": [944_000_000, 944_000_000], **semianalysis},
    ]


# ---------------------------------------------------------------------------------------- the ledger of a run


def run_ledger(run_dir: str | Path, prices: dict[str, float] | None = None) -> dict[str, Any]:
    """What every finished stage of a run used: read from the stages' `manifest.json`, nothing else.

    prices: {"usd_per_device_hour": above 0}; without it every `usd` is null. A machine that is already paid
    for has a price too (that of renting the same device), so 0 is refused.
    Returns `run_dir`, `prices`, `stages.<name>` and `totals` with `tokens`, `flops`, `seconds`,
    `device_hours` and `usd` (stages also `device` and `devices`), and `not_counted` (`item`, `reason`). Null
    is what the stage did not record. A total is the sum of the stages that did; `not_counted` names the
    others. Device-hours are seconds / 3600 times the N of a device named "N x ...", as ranks write it.
    Raises UserError if no stage has finished, a manifest is damaged or the price is not one.
    """
    run_dir = Path(run_dir)
    price = _usd_per_device_hour(prices)
    paths = {name: run_dir / name / MANIFEST for name in STAGES}
    stages = {name: _stage(path, price) for name, path in paths.items() if path.is_file()}
    if not stages:
        raise UserError(
            f"{run_dir} has no finished stage (no {MANIFEST} in {', '.join(STAGES)}); "
            "name the run_dir of a recipe that has been run"
        )
    summed = ("tokens", "flops", "seconds", "device_hours", "usd")
    return {
        "run_dir": str(run_dir),
        "prices": {"usd_per_device_hour": price},
        "stages": stages,
        "totals": {key: _sum(stage[key] for stage in stages.values()) for key in summed},
        "not_counted": _run_not_counted(stages, price),
    }


def _usd_per_device_hour(prices: dict[str, float] | None) -> float | None:
    if prices is None:
        return None
    price = prices.get("usd_per_device_hour")
    if set(prices) != {"usd_per_device_hour"} or not _is_amount(price) or price == 0:
        raise UserError(
            f"prices {prices!r}: give usd_per_device_hour above 0 (what the device costs to rent), or none"
        )
    return price


def _stage(path: Path, price: float | None) -> dict[str, Any]:
    manifest = read_json(path)
    counts = manifest.get("counts") if isinstance(manifest, dict) else None
    if not isinstance(counts, dict):
        raise UserError(f"{path} is no stage manifest (no counts); delete it and run the stage again")
    device = manifest.get("device")
    times = re.match(r"(\d+) x ", str(device))
    devices = int(times[1]) if times else 1
    amounts = {
        "tokens": counts.get("tokens"),
        "flops": manifest.get("flops"),
        "seconds": manifest.get("seconds"),
    }
    for key, value in amounts.items():
        if value is not None and not _is_amount(value):
            raise UserError(f"{path}: {key} is {value!r}, not a number from 0 up; run the stage again")
    hours = None if amounts["seconds"] is None else amounts["seconds"] / 3600 * devices
    usd = None if hours is None or price is None else hours * price
    return {**amounts, "device": device, "devices": devices, "device_hours": hours, "usd": usd}


def _is_amount(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and value >= 0


def _sum(values) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _run_not_counted(stages: dict[str, dict[str, Any]], price: float | None) -> list[dict[str, str]]:
    items = []
    if price is None:
        items.append(("USD", "no price per device-hour was given, and none is assumed"))
    for key, label in (("tokens", "tokens"), ("flops", "FLOPs"), ("seconds", "time")):
        silent = [name for name, stage in stages.items() if stage[key] is None]
        if silent:
            items.append((f"{label} of {', '.join(silent)}", "not recorded; the total is without them"))
    unfinished = [name for name in STAGES if name not in stages]
    if unfinished:
        items.append((f"stages without a manifest: {', '.join(unfinished)}", "not run, or not finished"))
    items += [
        ("the teacher's own training", "the teacher existed before this run"),
        ("the base student's own training", "the base existed before this run"),
        ("failed attempts and what --redo replaced", "a manifest knows only what it finished"),
        ("energy", "not measured"),
        ("idle time, storage, network", "not measured"),
        ("people's time", "not measured"),
    ]
    return [{"item": item, "reason": reason} for item, reason in items]


# --------------------------------------------------------------------------------------------------- printing


def format_bill(bill: dict[str, Any]) -> str:
    """The bill of `deepseek_v3_bill` as text."""
    rows = [("stage", "GPU hours", "USD")]
    rows += [
        (name.replace("_", " "), f"{stage['gpu_hours']:,}", f"${stage['usd']:,}")
        for name, stage in bill["stages"].items()
    ]
    rows.append(("total", f"{bill['gpu_hours']:,}", f"${bill['usd']:,}"))
    first = bill["first_principles"]
    peaks = ", ".join(
        f"{share:.1%} of {first['peak_flops_per_second'][name] / 1e12:.0f} TFLOP/s ({name.upper()})"
        for name, share in first["utilisation"].items()
    )
    days = f"{first['days_per_trillion_tokens']:.1f} days per trillion tokens on {first['gpus']:,} GPUs"
    lines = [
        f"DeepSeek-V3, the final training run, on {bill['gpu']} at ${bill['usd_per_gpu_hour']} per GPU hour",
        f"({bill['source']})",
        *_table(rows),
        "From first principles, pre-training:",
        f"  6 x {first['active_parameters'] / 1e9:.0f} B active parameters x "
        f"{first['tokens'] / 1e12:.1f} T tokens = {first['flops']:.2e} FLOPs (attention left out)",
        f"  {first['flops_per_second_per_gpu'] / 1e12:.0f} TFLOP/s per GPU: {peaks}",
        f"  {first['gpu_hours_per_trillion_tokens']:,} GPU hours per trillion tokens x "
        f"{first['tokens'] / 1e12:.1f} = {first['gpu_hours_from_rate']:,.0f}; {days}, "
        f"{first['days_of_pre_training']:.0f} days in all",
        "Not counted:",
    ]
    for entry in bill["not_counted"]:
        amount = _range(entry["range"]) if entry["range"] else "no amount known"
        source = "; ".join(part for part in (entry["source"], entry["source_quality"]) if part)
        lines += [f"  {entry['item']}: {amount}", f"    [{source}]"]
    return "\n".join(lines)


_LEDGER = {"tokens": ",.0f", "flops": ".2e", "seconds": ",.1f", "device_hours": ",.4f", "usd": ",.4f"}


def format_ledger(ledger: dict[str, Any]) -> str:
    """The ledger of `run_ledger` as text; `-` is what was not recorded."""
    rows = [("stage", "tokens", "FLOPs", "seconds", "device-hours", "USD", "device")]
    for name, stage in [*ledger["stages"].items(), ("total", {**ledger["totals"], "device": ""})]:
        cells = ["-" if stage[key] is None else format(stage[key], style) for key, style in _LEDGER.items()]
        rows.append((name, *cells, "-" if stage["device"] is None else str(stage["device"])))
    price = ledger["prices"]["usd_per_device_hour"]
    return "\n".join(
        [
            f"{ledger['run_dir']}, {f'at ${price} per device-hour' if price else 'no price given'}",
            *_table(rows, text_columns=(0, 6)),
            "Not counted:",
            *(f"  {entry['item']}: {entry['reason']}" for entry in ledger["not_counted"]),
        ]
    )


def _range(amount: list[float]) -> str:
    low, high = (f"${value / 1e6:,.0f}M" for value in amount)
    return low if low == high else f"{low} to {high}"


def _table(rows: list[tuple[str, ...]], text_columns: tuple[int, ...] = (0,)) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if column in text_columns else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths))
        ]
        lines.append("  " + "  ".join(cells).rstrip())
    return lines
