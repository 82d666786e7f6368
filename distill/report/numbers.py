"""Numbers as people read them: rounded, with unit and interval, and a dash where there is none.

percent({"accuracy": 0.82, "ci95": [0.78, 0.86]})      # 82.0 % [78.0, 86.0]
si(2.1e9), duration(125)
"""

import math

from distill.console import parameters
from distill.report.words import say

LONGEST_TEXT = 2000
# Control characters are invisible on a page, so each shows as its picture (U+2400 and on).
CONTROL_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}

NB = "\u00a0"  # keeps a number and its unit on one line
DASH = "–"


# ---- numbers into words (filters of the template); what is not there becomes a dash


def absent(value) -> bool:
    """True for None and for NaN, which JSON files hold where nothing could be measured."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def number(value, digits: int = 3) -> str:
    """Thousands are separated; what is below 1,000 and not whole has `digits` decimals; a list counts its members."""
    if absent(value):
        return DASH
    if isinstance(value, list):
        value = len(value)
    return f"{value:.{digits}f}" if isinstance(value, float) and abs(value) < 999.5 else f"{value:,.0f}"


def rate(value) -> str:
    """A speed: three significant digits, with thousands separators."""
    if absent(value):
        return DASH
    whole = round(value, 2 - math.floor(math.log10(abs(value)))) if value else 0.0
    return f"{whole:,.0f}" if abs(whole) >= 100 else f"{whole:.3g}"


def size(model: dict | None) -> str:
    """Parameters of a checkpoint, as everywhere: `0.84 M + 0.16 M adapter`. `model` as in metrics.json."""
    about = model or {}
    if absent(about.get("parameters_total")):
        return DASH
    base, adapter = (
        parameters(about.get(key) or 0).replace(" ", NB) for key in ("parameters_total", "parameters_adapter")
    )
    if not about.get("parameters_adapter"):
        return base
    return say("%(base)s + %(adapter)s adapter", base=base, adapter=adapter)


def millions(count) -> str:
    """A number of parameters that stands alone: `1.46 M`."""
    return DASH if absent(count) else parameters(count).replace(" ", NB)


def si(value, unit: str = "") -> str:
    """`value` with three significant digits and an SI prefix: 3,650,000 -> 3.65 M."""
    if absent(value):
        return DASH
    for scale, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * scale:  # 999,700 is 1 M, not 1e+03 k
            return f"{value / scale:.3g}{NB}{prefix}{unit}"
    return f"{value:.3g}{NB}{unit}".rstrip(NB)


def duration(seconds: float | None) -> str:
    """Wall-clock time in the two largest units that fit."""
    if absent(seconds):
        return DASH
    if seconds < 59.95:
        return _joined(say("%(seconds)s s", seconds=f"{seconds:.1f}"))
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return _joined(say("%(minutes)s min, %(seconds)s s", minutes=minutes, seconds=rest))
    return _joined(say("%(hours)s h, %(minutes)s min", hours=minutes // 60, minutes=minutes % 60))


def _joined(text: str) -> str:
    """Each number stays beside its unit; the comma only marks where a line may break."""
    return " ".join(part.replace(" ", NB) for part in text.split(", "))


def share(value: float | None, digits: int = 1) -> str:
    """A fraction of 1 as a percentage."""
    if absent(value):
        return DASH
    return f"{hundredfold(value, digits)}{NB}%"


def percent(score: dict | None, digits: int = 1) -> str:
    """Accuracy of a score with its 95 % interval: `82.0 % [78.1, 85.9]`."""
    if not score or absent(score.get("accuracy")):
        return DASH
    low, high = (hundredfold(bound, digits) for bound in score["ci95"])
    return f"{share(score['accuracy'], digits)} [{low},{NB}{high}]"


def points(comparison: dict) -> str:
    """Difference of a comparison in percentage points with its 95 % interval."""
    if absent(comparison.get("difference")):
        return DASH
    low, high = comparison["ci95"]
    difference, low, high = (f"{100 * x:+.1f}" for x in (comparison["difference"], low, high))
    text = say("%(n)s points [%(low)s, %(high)s]", n=difference, low=low, high=high)
    unit, bracket, bounds = text.partition(" [")
    return (unit.replace(" ", NB) + bracket + bounds.replace(" ", NB)).replace("-", "−")


def points_alone(comparison: dict) -> str:
    """The same without the unit, for a column that names it."""
    if absent(comparison.get("difference")):
        return DASH
    low, high = comparison["ci95"]
    text = f"{100 * comparison['difference']:+.1f} [{100 * low:+.1f},{NB}{100 * high:+.1f}]"
    return text.replace("-", "−")


def p_value(value: float | None) -> str:
    """`0.023`, or `< 0.001` where more digits would claim more than the data can tell."""
    if absent(value):
        return DASH
    return f"<{NB}0.001" if value < 0.001 else f"{value:.3f}"


def clip(text: str | None) -> str:
    """Text of a model, its control characters made visible, its length bounded."""
    text = (text or "").translate(CONTROL_PICTURES)
    left_out = len(text) - LONGEST_TEXT
    if left_out <= 0:
        return text
    return text[:LONGEST_TEXT] + say("… (%(n)s more characters)", n=f"{left_out:,}")


def hundredfold(value: float, digits: int) -> str:
    return f"{round(100 * value, digits) + 0.0:.{digits}f}"  # adding 0.0 turns -0.0 into 0.0
