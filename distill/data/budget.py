"""What generation will cost, what it has cost, and where it stops: tokens, seconds, USD. Nothing is assumed.

    prices: {usd_per_million_input_tokens: 0.3, usd_per_million_output_tokens: 1.2, usd_per_device_hour: 2}
    generate: {max_tokens: 2000000, max_cost_usd: 5}

`forecast(recipe)` is what `--dry-run` prints: bounds from the recipe, expectations from finished parts, None
for what neither says. `Limits` ends the stage after the part that reaches a limit; all parts stay, and the same
command with a higher limit continues, which is why limits are no part of a stage's identity.
"""

import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from distill.config.data import Prices
from distill.config.recipe import Recipe
from distill.errors import RunError
from distill.stages import IDENTITY
from distill.storage import MANIFEST, parts, read_json, read_table

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
            _times(prices.usd_per_million_input_tokens, self.input_tokens / 1e6),
            _times(prices.usd_per_million_output_tokens, self.output_tokens / 1e6),
            _times(prices.usd_per_device_hour, self.seconds / 3600 * self.devices),
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


def _times(price: float | None, amount: float) -> float | None:
    return None if price is None else price * amount


def _sum(*values: float | None) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
