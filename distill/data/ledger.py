"""What a run will use and has used: a budget before and while it is spent, and a ledger by stage.

What a run used, stage by stage: tokens, FLOPs, seconds, device- and GPU-hours, kWh, USD, and what is not counted.

    distill cost RUN_DIR | RECIPE [--usd-per-hour USD] [--json]       at the recipe's `prices`
    run_ledger("checkpoints/demo", prices={"usd_per_device_hour": 0.35})["totals"]["usd"]

It ends in `not_counted`: a cost without its exclusions is how $5.576M came to be quoted as the price of a
laboratory. A number that nobody recorded is null, never an estimate. Imports no torch.

What generation will cost, what it has cost, and where it stops: tokens, seconds, USD. Nothing is assumed.

    prices: {usd_per_million_input_tokens: 0.3, usd_per_million_output_tokens: 1.2, usd_per_device_hour: 2}
    generate: {max_tokens: 2000000, max_cost_usd: 5}

`forecast(recipe)` is what `--dry-run` prints: bounds from the recipe, expectations from finished parts, None
for what neither says. `Limits` ends the stage after the part that reaches a limit; all parts stay, and the same
command with a higher limit continues, which is why limits are no part of a stage's identity.
"""

import math
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from distill.config.data import Prices
from distill.config.recipe import Recipe
from distill.console import text_table
from distill.errors import RunError, UserError
from distill.stages import IDENTITY
from distill.storage import MANIFEST, parts, read_json, read_table

STAGES = ("prompts", "generations", "dataset", "student", "control", "eval")
PRICES = ("usd_per_device_hour", "usd_per_million_input_tokens", "usd_per_million_output_tokens")
SUMMED = ("tokens", "flops", "seconds", "device_hours", "gpu_hours", "kwh", "usd")


def run_ledger(run_dir: str | Path, prices: dict[str, float] | None = None) -> dict[str, Any]:
    """What every finished stage of a run used: read from the stages' `manifest.json`, nothing else.

    prices: any of `PRICES`, not all 0; without them every `usd` is null. A machine that is already paid for has
    a price too (that of renting the same device), so 0 alone is refused. Prices of tokens are the teacher's:
    they apply to `generations`, as in `distill.data.ledger`.
    Returns `run_dir`, `prices`, `stages.<name>` and `totals` with `tokens`, `flops`, `seconds`, `device_hours`,
    `gpu_hours` (0 on a CPU), `kwh` and `usd` (stages also `device`, `devices` and `meter`, the counters read),
    and `not_counted` (`item`, `reason`). Null is what the stage did not record. A total is the sum of the stages
    that did; `not_counted` names the others. Device-hours are seconds / 3600 times the N of a device named
    "N x ...", as ranks write it.
    Raises UserError if no stage has finished, a manifest is damaged or a price is not one.
    """
    run_dir = Path(run_dir)
    given = check_prices(prices)
    paths = {name: run_dir / name / MANIFEST for name in STAGES}
    stages = {name: _stage(name, path, given) for name, path in paths.items() if path.is_file()}
    if not stages:
        raise UserError(
            f"{run_dir} has no finished stage (no {MANIFEST} in {', '.join(STAGES)}); "
            "name the run_dir of a recipe that has been run"
        )
    partly = {name: stage.pop("metered_seconds") for name, stage in stages.items()}
    return {
        "run_dir": str(run_dir),
        "prices": given,
        "stages": stages,
        "totals": {key: _sum(stage[key] for stage in stages.values()) for key in SUMMED},
        "not_counted": _not_counted(stages, given, partly),
    }


def recipe_prices(run_dir: str | Path) -> dict[str, float] | None:
    """The section `prices` of the resolved recipe that a run keeps beside its stages; None where it has none."""
    path = Path(run_dir) / "recipe.yaml"
    try:
        section = yaml.safe_load(path.read_text(encoding="utf-8")).get("prices") or {}
        known = {key: section[key] for key in PRICES if section.get(key) is not None}
    except (OSError, ValueError, RecursionError, yaml.YAMLError, AttributeError):
        return None
    return known or None


def check_prices(prices: dict[str, float] | None) -> dict[str, float | None]:
    """All of `PRICES`, None for one that was not given. Raises UserError for what is not a price."""
    if prices is None:
        return dict.fromkeys(PRICES)
    named = set(prices) <= set(PRICES)
    if not named or not all(_is_amount(value) for value in prices.values()) or not any(prices.values()):
        raise UserError(
            f"prices {prices!r}: give usd_per_device_hour above 0 (what the device costs to rent), a teacher's "
            f"{PRICES[1]} and {PRICES[2]}, or none"
        )
    return dict.fromkeys(PRICES) | prices


def _stage(name: str, path: Path, prices: dict[str, float | None]) -> dict[str, Any]:
    manifest = read_json(path)
    counts = manifest.get("counts") if isinstance(manifest, dict) else None
    if not isinstance(counts, dict):
        raise UserError(f"{path} is no stage manifest (no counts); delete it and run the stage again")
    device = manifest.get("device")
    times = re.match(r"(\d+) x ", str(device))
    devices = int(times[1]) if times else 1
    energy = manifest.get("energy") or {}
    amounts = {
        "tokens": counts.get("tokens"),
        "flops": manifest.get("flops"),
        "seconds": manifest.get("seconds"),
        "kwh": energy.get("kwh") if isinstance(energy, dict) else energy,
    }
    for key, value in amounts.items():
        if value is not None and not _is_amount(value):
            raise UserError(f"{path}: {key} is {value!r}, not a number from 0 up; run the stage again")
    hours = None if amounts["seconds"] is None else amounts["seconds"] / 3600 * devices
    usd = [_times(prices["usd_per_device_hour"], hours)]
    if name == "generations":
        usd.append(_times(prices["usd_per_million_input_tokens"], counts.get("prompt_tokens"), 1e6))
        usd.append(_times(prices["usd_per_million_output_tokens"], counts.get("tokens"), 1e6))
    return {
        **amounts,
        "device": device,
        "devices": devices,
        "device_hours": hours,
        "gpu_hours": _gpu_hours(device, hours),
        "meter": ", ".join(energy.get("counters", {})) or None,
        "metered_seconds": energy.get("seconds"),
        "usd": _sum(usd),
    }


def _gpu_hours(device: Any, hours: float | None) -> float | None:
    """Device-hours where the devices are GPUs; 0 on a CPU; None where the device is unknown or a server's address."""
    if device is None or hours is None or "://" in str(device):
        return None
    return 0.0 if re.match(r"(\d+ x )?cpu\b", str(device)) else hours


def _is_amount(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and value >= 0


def _times(price: float | None, amount: float | None, per: float = 1) -> float | None:
    return None if price is None or amount is None else price * amount / per


def _sum(values) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _not_counted(
    stages: dict[str, dict], prices: dict, metered: dict[str, float | None]
) -> list[dict[str, str]]:
    items = []
    if prices["usd_per_device_hour"] is None:
        items.append(("USD of devices" if any(p is not None for p in prices.values()) else "USD",
                      "no price per device-hour was given, and none is assumed"))  # fmt: skip
    for key, label in (("tokens", "tokens"), ("flops", "FLOPs"), ("seconds", "time")):
        silent = [name for name, stage in stages.items() if stage[key] is None]
        if silent:
            modelless = key == "flops" and set(silent) <= {"prompts", "dataset"}
            reason = "no model runs there" if modelless else "not recorded; the total is without them"
            items.append((f"{label} of {', '.join(silent)}", reason))
    items += _energy_not_counted(stages, metered)
    servers = [name for name, stage in stages.items() if "://" in str(stage["device"])]
    if servers:
        items.append(
            (f"the server's devices in {', '.join(servers)}", "its hours are not known on this side")
        )
    unfinished = [name for name in STAGES if name not in stages]
    if unfinished:
        items.append((f"stages without a manifest: {', '.join(unfinished)}", "not run, or not finished"))
    items += [
        ("the teacher's own training", "the teacher existed before this run"),
        ("the base student's own training", "the base existed before this run"),
        ("failed attempts and what --redo replaced", "a manifest knows only what it finished"),
        ("idle time, storage, network", "not measured"),
        ("people's time", "not measured"),
    ]
    return [{"item": item, "reason": reason} for item, reason in items]


def _energy_not_counted(stages: dict[str, dict], metered: dict[str, float | None]) -> list[tuple[str, str]]:
    silent = [name for name, stage in stages.items() if stage["kwh"] is None]
    items = []
    if silent:
        reason = "no counter could be read where it ran (CPU: RAPL, GPU: NVML), and nothing is estimated"
        items.append((f"energy of {', '.join(silent)}", reason))
    for name, seconds in metered.items():
        whole = stages[name]["seconds"]
        if seconds is not None and whole and seconds < 0.95 * whole:
            items.append(
                (f"energy of part of {name}", f"the counters cover {seconds:,.0f} of {whole:,.0f} s")
            )
    if len(silent) < len(stages):
        reason = "the counters see CPU packages, their memory where it has one, and GPUs, with all that ran on them"
        items.append(("energy of disks, fans, power supply, cooling, other machines", reason))
    return items


_STYLES = {
    "tokens": ",.0f", "flops": ".2e", "seconds": ",.1f", "device_hours": ",.4f", "gpu_hours": ",.4f",
    "kwh": ",.4f", "usd": ",.4f",
}  # fmt: skip
_HEAD = ("stage", "tokens", "FLOPs", "seconds", "device-hours", "GPU-hours", "kWh", "USD", "device")


def format_ledger(ledger: dict[str, Any]) -> str:
    """The ledger of `run_ledger` as text; `-` is what was not recorded."""
    rows = [_HEAD]
    for name, stage in [*ledger["stages"].items(), ("total", {**ledger["totals"], "device": ""})]:
        cells = ["-" if stage[key] is None else format(stage[key], style) for key, style in _STYLES.items()]
        rows.append((name, *cells, "-" if stage["device"] is None else str(stage["device"])))
    given = [
        f"${value:g} {key.removeprefix('usd_').replace('_', ' ')}"
        for key, value in ledger["prices"].items()
        if value is not None
    ]
    return "\n".join(
        [
            f"{ledger['run_dir']}, {'at ' + ', '.join(given) if given else 'no price given'}",
            *text_table(rows, text_columns=(0, len(_HEAD) - 1)),
            "Not counted:",
            *(f"  {entry['item']}: {entry['reason']}" for entry in ledger["not_counted"]),
        ]
    )


# ==== What generation will cost, what it has cost, and where it stops ====

# Where generation stops, not what it makes.
LIMITS = {"max_tokens", "max_cost_usd"}


@dataclass(frozen=True)
class Spent:
    """Of finished parts: answers, tokens of prompts (input) and answers (output), seconds, devices."""

    answers: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    seconds: float = 0.0
    devices: int = 1

    def usd(self, prices: Prices) -> float | None:
        """At the given prices, the sum of what has one; None where no price is given."""
        return _sum(
            (
                _times(prices.usd_per_million_input_tokens, self.input_tokens, 1e6),
                _times(prices.usd_per_million_output_tokens, self.output_tokens, 1e6),
                _times(prices.usd_per_device_hour, self.seconds / 3600 * self.devices),
            )
        )


class Limits:
    """The limits of one `generate`, asked before every part; they count all finished parts, of every process.

    limits = Limits(recipe, folder, devices)      # after the stage has begun
    limits.reached()                              # None, or which limit
    limits.error(total_parts)                     # the RunError that ends the stage
    """

    def __init__(self, recipe: Recipe, folder: Path, devices: int = 1):
        self.recipe, self.folder, self.devices = recipe, folder, devices
        self._earlier = read_json(folder / IDENTITY).get("seconds", 0.0)
        self._start = time.perf_counter()
        self._counts: dict[str, tuple[int, int, int]] = {}

    def spent(self) -> Spent:
        """Of all finished parts; seconds of work, interrupted runs included."""
        for path in parts(self.folder):
            if path.name not in self._counts:
                self._counts[path.name] = count_part(path)
        seconds = self._earlier + time.perf_counter() - self._start
        return Spent(*_column_sums(self._counts.values()), seconds, self.devices)

    def reached(self) -> str | None:
        section = self.recipe.generate
        if section.max_tokens is None and section.max_cost_usd is None:
            return None
        spent = self.spent()
        if section.max_tokens is not None and spent.output_tokens >= section.max_tokens:
            return f"generate.max_tokens={section.max_tokens} is reached"
        usd = spent.usd(self.recipe.prices)
        if section.max_cost_usd is not None and usd is not None and usd >= section.max_cost_usd:
            return f"generate.max_cost_usd={section.max_cost_usd:g} is reached"
        return None

    def error(self, total_parts: int) -> RunError:
        """What was spent, what is kept and how to go on, as one line."""
        spent = self.spent()
        usd = spent.usd(self.recipe.prices)
        cost = "" if usd is None else f", {usd:.4f} USD"
        return RunError(
            f"{self.reached()}: {spent.output_tokens:,} answer tokens, {spent.input_tokens:,} prompt tokens, "
            f"{spent.seconds:.0f} s{cost} spent; {len(self._counts)} of {total_parts} parts are kept in "
            f"{self.folder}; the same command with a higher limit continues"
        )


def count_part(path: Path) -> tuple[int, int, int]:
    """(answers, input tokens, output tokens) of one part of generations."""
    columns = ("prompt_ids", "completion_ids", "prompt_tokens", "completion_tokens")
    table = read_table(path, [name for name in columns if name in pq.read_schema(path).names])
    counts = []
    for counted, ids in (("prompt_tokens", "prompt_ids"), ("completion_tokens", "completion_ids")):
        # A teacher that gives text alone has no ids; what it billed is counted where it said so.
        lengths = pc.sum(pc.list_value_length(table[ids])).as_py() or 0
        billed = (pc.sum(table[counted]).as_py() or 0) if counted in table.column_names else 0
        counts.append(max(lengths, billed))
    return table.num_rows, counts[0], counts[1]


def forecast(recipe: Recipe) -> dict[str, Any]:
    """Answers, tokens, seconds and USD of the whole stage `generations/`, for `--dry-run`.

    `answer_tokens_at_most` follows from generate.max_new_tokens. `answer_tokens_expected`,
    `prompt_tokens_expected` and `seconds_expected` (wall time) follow from the means of finished parts of the
    same settings; without any they are None, and so is every USD figure that needs one. {} while the number
    of prompts is not known.
    """
    answers = _answers(recipe)
    if answers is None:
        return {}
    spent = _finished(recipe)
    share = answers / spent.answers if spent.answers else None
    whole = None
    if share:
        whole = Spent(
            answers,
            round(spent.input_tokens * share),
            round(spent.output_tokens * share),
            spent.seconds * share,
            spent.devices,
        )
    at_most = answers * recipe.generate.max_new_tokens
    values = {
        "answers": answers,
        "answers_finished": spent.answers,
        "answer_tokens_at_most": at_most,
        "answer_tokens_expected": whole and whole.output_tokens,
        "prompt_tokens_expected": whole and whole.input_tokens,
        "seconds_expected": round(whole.seconds, 1) if whole and whole.seconds else None,
    }
    if _priced(recipe.prices):
        values["usd_spent"] = _rounded(spent.usd(recipe.prices))
        values["usd_expected"] = _rounded(whole.usd(recipe.prices)) if whole else None
        values["usd_at_most"] = _rounded(_usd_at_most(recipe.prices, at_most, whole))
    return values


def _usd_at_most(prices: Prices, tokens: int, whole: Spent | None) -> float | None:
    """Every answer as long as allowed, and time with it. None where only a finished part could tell."""
    if whole is None:
        needs_parts = prices.usd_per_million_input_tokens or prices.usd_per_device_hour
        return None if needs_parts else Spent(output_tokens=tokens).usd(prices)
    slower = tokens / max(whole.output_tokens, 1)
    return Spent(whole.answers, whole.input_tokens, tokens, whole.seconds * slower, whole.devices).usd(prices)


def _answers(recipe: Recipe) -> int | None:
    """How many the stage will hold; None while the prompts of a file are not read."""
    manifest = recipe.path / "prompts" / MANIFEST
    if recipe.prompts.source == "tasks":
        prompts = sum(recipe.prompts.levels.values())
    elif manifest.is_file():
        prompts = read_json(manifest)["counts"]["rows"]
    else:
        return None
    return prompts * recipe.generate.samples


def _finished(recipe: Recipe) -> Spent:
    """What finished parts made with these settings took; nothing where the folder was made with others."""
    folder = recipe.path / "generations"
    for name in (MANIFEST, IDENTITY):
        if not (folder / name).is_file():
            continue
        found = read_json(folder / name)
        config = found["config"]
        now = recipe.generate.model_dump(mode="json")
        same = all(now.get(key) == value for key, value in config["generate"].items())
        if not same or config.get("teacher", {}).get("model") != recipe.teacher.model:
            return Spent()
        times = re.match(r"(\d+) x ", str(found.get("device")))
        counts = _column_sums(count_part(path) for path in parts(folder))
        return Spent(*counts, found.get("seconds", 0.0), int(times[1]) if times else 1)
    return Spent()


def _column_sums(counts: Iterable[tuple[int, int, int]]) -> list[int]:
    return [sum(column) for column in zip((0, 0, 0), *counts)]


def _priced(prices: Prices) -> bool:
    return any(value is not None for value in prices.model_dump().values())


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
