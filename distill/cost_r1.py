"""The published figure of DeepSeek-R1, $294K, as an exercise: what was it the price of?

    distill cost deepseek-r1 [--json]

A small table makes a good exercise because all of it can be checked: hours are GPUs times time, dollars are hours
times a price, and reports that quote it contradict it. Imports no torch.
"""

from typing import Any

from distill.cost_v3 import USD_PER_H800_HOUR, deepseek_v3_bill, format_not_counted
from distill.text_table import text_table

R1_PAPER = (
    "DeepSeek-R1, arXiv 2501.12948 version 2, appendix B.4.4 and table 7; with the article in Nature 645 (2025), "
    "doi 10.1038/s41586-025-09422-z"
)
R1_QUALITY = (
    "primary, of a peer-reviewed article, but the authors' own account of their cost; taken from several independent "
    "quotations of the table, which agree"
)
# Table 7, rounded to thousands there: hours, USD.
R1_TABLE = {
    "r1_zero": (101_000, 202_000),
    "sft_data": (5_000, 10_000),
    "r1": (41_000, 82_000),
}
R1_GPUS = 64 * 8
R1_ZERO_HOURS, R1_HOURS = 198, 80  # wall clock, "approximately"


def deepseek_r1_bill(usd_per_gpu_hour: float | None = None) -> dict[str, Any]:
    """Table 7 of the R1 paper, held to its own text, on top of V3's bill, with what it leaves out.

    usd_per_gpu_hour: another price than the paper's $2, above 0.
    Keys as of `deepseek_v3_bill`, and `source_quality`, `checks` (`claim`, `gives` in GPU hours, `published`,
    `agrees`), `with_v3` (`gpu_hours`, `usd`, `share_of_r1`) and `exercise` (`question`, `answer`).
    """
    base = deepseek_v3_bill(usd_per_gpu_hour)
    price = base["usd_per_gpu_hour"]
    stages = {
        name: {"gpu_hours": hours, "usd": usd if price == USD_PER_H800_HOUR else hours * price}
        for name, (hours, usd) in R1_TABLE.items()
    }
    hours = sum(stage["gpu_hours"] for stage in stages.values())
    usd = sum(stage["usd"] for stage in stages.values())
    return {
        "gpu": "NVIDIA H800",
        "usd_per_gpu_hour": price,
        "source": R1_PAPER,
        "source_quality": R1_QUALITY,
        "gpu_hours": hours,
        "usd": usd,
        "stages": stages,
        "checks": _checks(),
        "with_v3": {
            "gpu_hours": hours + base["gpu_hours"],
            "usd": usd + base["usd"],
            "share_of_r1": usd / (usd + base["usd"]),
        },
        "exercise": _exercise(usd, base["usd"]),
        "not_counted": _not_counted(base),
    }


def _checks() -> list[dict[str, Any]]:
    """GPUs x time against the table, in thousands of hours as it rounds."""
    claims = [
        ("R1-Zero: 64*8 GPUs for about 198 hours", R1_GPUS * R1_ZERO_HOURS, R1_TABLE["r1_zero"][0]),
        ("R1: the same GPUs for about 80 hours", R1_GPUS * R1_HOURS, R1_TABLE["r1"][0]),
        ("R1: the same text calls it 'about 4 days'", R1_GPUS * 4 * 24, R1_TABLE["r1"][0]),
        ("reports that read 64*8 as 648 GPUs, R1-Zero", 648 * R1_ZERO_HOURS, R1_TABLE["r1_zero"][0]),
    ]
    return [
        {"claim": claim, "gives": gives, "published": table, "agrees": round(gives, -3) == table}
        for claim, gives, table in claims
    ]


def _exercise(usd: float, base: float) -> list[dict[str, str]]:
    return [
        {
            "question": "A headline says that R1 was trained for $294K. What is missing from the sentence?",
            "answer": f"'On top of DeepSeek-V3-Base': with the base it is ${(usd + base) / 1e6:.2f}M, of which R1's "
            f"part is {usd / (usd + base):.0%}.",
        },
        {
            "question": "How many GPUs were it, 512 or 648?",
            "answer": "512: 64 nodes of 8. 512 x 198 h = 101K hours as in the table; 648 x 198 h would be 128K.",
        },
        {
            "question": "Which line could a distilled student have spared?",
            "answer": "A student of R1 needs none of the reinforcement learning, only answers: by the table 5K of "
            "147K hours made the training data of R1 itself. The teacher has to exist, though.",
        },
        {
            "question": "What would the same hours cost at your price?",
            "answer": "147,000 times it; a rental price contains hardware, power and margin, but no idle hour.",
        },
    ]


def _not_counted(base: dict[str, Any]) -> list[dict[str, Any]]:
    said = {"source": R1_PAPER, "source_quality": "primary: mentions it, gives no amount"}
    unpublished = {"source": None, "source_quality": "none: no figure published"}
    return [
        {
            "item": "DeepSeek-V3-Base, on which all of it stands (`distill cost deepseek-v3`, itself incomplete)",
            "range": [base["usd"], base["usd"]],
            "source": base["source"],
            "source_quality": "primary: the authors' own table",
        },
        {"item": "experiments beforehand with a smaller model (30B) on A100 GPUs", "range": None, **said},
        {"item": "failed runs and the search for settings", "range": None, **unpublished},
        {"item": "people who wrote and judged data; salaries", "range": None, **unpublished},
        {"item": "training the distilled students on R1's outputs", "range": None, **unpublished},
    ]


def format_r1(found: dict[str, Any]) -> str:
    """The exercise of `deepseek_r1_bill` as text."""
    rows = [("stage", "GPU hours", "USD")]
    rows += [
        (name.replace("_", " "), f"{stage['gpu_hours']:,}", f"${stage['usd']:,.0f}")
        for name, stage in found["stages"].items()
    ]
    rows.append(("total", f"{found['gpu_hours']:,}", f"${found['usd']:,.0f}"))
    checks = [("check", "GPU hours", "published", "")]
    checks += [
        (c["claim"], f"{c['gives']:,}", f"{c['published']:,}", "agrees" if c["agrees"] else "does not agree")
        for c in found["checks"]
    ]
    whole = found["with_v3"]
    lines = [
        f"DeepSeek-R1, on {found['gpu']} at ${found['usd_per_gpu_hour']:g} per GPU hour, on top of DeepSeek-V3-Base",
        f"({found['source']}; {found['source_quality']})",
        *text_table(rows),
        *text_table(checks, text_columns=(0, 3)),
        f"With V3's own bill: {whole['gpu_hours']:,} hours, ${whole['usd']:,.0f}; "
        f"R1's part is {whole['share_of_r1']:.1%}",
        "Exercise:",
    ]
    for entry in found["exercise"]:
        lines += [f"  {entry['question']}", f"    {entry['answer']}"]
    return "\n".join([*lines, "Not counted:", *format_not_counted(found["not_counted"])])
