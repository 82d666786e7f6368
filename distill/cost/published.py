"""Published bills: DeepSeek-V3's table 1 to the dollar and from first principles, and R1's figure as an exercise.

    distill cost deepseek-v3 [--usd-per-hour USD] [--json]        $5.576M: the price of what, and not of what
    deepseek_v3_bill()["first_principles"]["counts"][1]["utilisation"]["bf16"]

From first principles: FLOPs per token x tokens / (peak FLOP/s x utilisation) / 3600 x price of an hour. All but
the utilisation is published, so the published hours imply it; how high it comes out depends on what is counted
as work, so three counts stand side by side, each saying what it includes. No torch: the model's sizes are a
dozen numbers of its config, and a test holds these counts to `distill.models.describe`.

DeepSeek-R1's figure, $294K: what was it the price of?

    distill cost deepseek-r1 [--json]

A small table makes a good exercise because all of it can be checked: hours are GPUs times time, dollars are hours
times a price, and reports that quote it contradict it. Imports no torch.
"""

from typing import Any

from distill.console import millions, text_table
from distill.errors import UserError

V3_PAPER = "DeepSeek-V3 technical report, arXiv 2412.19437, section 1 and table 1"
USD_PER_H800_HOUR = 2  # the paper's assumption: a rental price, not what DeepSeek paid
V3_GPU_HOURS = {"pre_training": 2_664_000, "context_extension": 119_000, "post_training": 5_000}
V3_ACTIVE_PARAMETERS = 37e9
V3_TOKENS = 14.8e12
V3_GPU_HOURS_PER_TRILLION = 180_000
V3_CLUSTER = 2048


# Dense peaks of one H800, FLOP/s: NVIDIA's H100 SXM data sheet, whose compute the H800 keeps.
H800_PEAK = {"bf16": 989e12, "fp8": 1979e12}


# Sizes of the published config.json (section 4.2 of the paper has them too).
V3_CONFIG = {
    "layers": 61, "dense_layers": 3, "hidden": 7168, "vocabulary": 129_280, "heads": 128,
    "q_rank": 1536, "kv_rank": 512, "d_nope": 128, "d_rope": 64, "d_v": 128,
    "dense_width": 18_432, "expert_width": 2048, "experts": 256, "experts_per_token": 8, "shared_experts": 1,
}  # fmt: skip
V3_CONTEXT = 4096  # section 4.2: sequences of 4K in pre-training, packed without cross-sample masks


# Section 4.3: (steps, sequences per step, tokens per sequence) of the two phases of context extension.
V3_EXTENSION = ((1000, 1920, 32 * 1024), (1000, 480, 128 * 1024))
UTILISATIONS = (0.2, 0.3, 0.4, 0.5)

SEMIANALYSIS = {
    "source": "SemiAnalysis, 31 January 2025, as quoted in the press",
    "source_quality": "secondary: an analyst's estimate of the whole company, not confirmed by it; read in reports, "
    "since the article is for subscribers; readers found its table of costs to contradict itself",
}


def deepseek_v3_bill(usd_per_gpu_hour: float | None = None) -> dict[str, Any]:
    """Table 1 of the V3 paper, what follows from it by arithmetic, and what it does not count.

    usd_per_gpu_hour: another price than the paper's $2, above 0; the hours stay.
    Keys: `gpu`, `usd_per_gpu_hour`, `source`, `gpu_hours`, `usd`, `stages.<name>.gpu_hours|usd`,
    `first_principles`, `not_counted`, a list of `item`, `range` (USD, [low, high] or null), `source` and
    `source_quality`, and `beyond_the_bill`, the range of what was spent by the figures that exist.
    Raises UserError for what is not a price.
    """
    price = USD_PER_H800_HOUR if usd_per_gpu_hour is None else usd_per_gpu_hour
    if not 0 < price < float("inf"):
        raise UserError(f"--usd-per-hour {price}: the price of an hour is above 0")
    stages = {name: {"gpu_hours": hours, "usd": hours * price} for name, hours in V3_GPU_HOURS.items()}
    return {
        "gpu": "NVIDIA H800",
        "usd_per_gpu_hour": price,
        "source": V3_PAPER,
        "gpu_hours": sum(V3_GPU_HOURS.values()),
        "usd": sum(stage["usd"] for stage in stages.values()),
        "stages": stages,
        "first_principles": first_principles(price),
        "not_counted": _not_counted(),
        "beyond_the_bill": {
            "range": [500_000_000, 2_544_000_000],
            "what": "hardware over the company's history, to servers and their operation: of a company that does "
            "more than train one model, so a bound on its spending and not a price of V3",
            **SEMIANALYSIS,
        },
    }


# ---- first principles -------------------------------------------------------------------------------------


def attention_weights() -> int:
    """Weights of one multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1)."""
    c = V3_CONFIG
    queries = c["q_rank"] * (c["hidden"] + c["heads"] * (c["d_nope"] + c["d_rope"]))
    keys = c["hidden"] * (c["kv_rank"] + c["d_rope"]) + c["kv_rank"] * c["heads"] * (c["d_nope"] + c["d_v"])
    return queries + keys + c["heads"] * c["d_v"] * c["hidden"]


def moe_weights() -> int:
    """Weights of one mixture-of-experts layer that one token passes: router, shared and chosen experts."""
    c = V3_CONFIG
    passed = c["experts_per_token"] + c["shared_experts"]
    return c["hidden"] * (c["experts"] + passed * 3 * c["expert_width"])


def multiplied_weights() -> int:
    """Weights that multiply at every token: all active ones but the embedding, which is only looked up."""
    c = V3_CONFIG
    dense = c["dense_layers"] * 3 * c["hidden"] * c["dense_width"]
    sparse = (c["layers"] - c["dense_layers"]) * moe_weights()
    return c["layers"] * attention_weights() + dense + sparse + c["vocabulary"] * c["hidden"]


def prediction_weights() -> int:
    """Of the module that predicts one more token (section 2.2): projection, one layer, and the head again."""
    c = V3_CONFIG
    return 2 * c["hidden"] ** 2 + attention_weights() + moe_weights() + c["vocabulary"] * c["hidden"]


def attention_flops(context: int, layers: int) -> float:
    """Forward FLOPs a token for scores and their weighted values: 2 each, over the mean causal context."""
    c = V3_CONFIG
    return layers * 2 * (context + 1) / 2 * c["heads"] * (c["d_nope"] + c["d_rope"] + c["d_v"])


def training_flops_per_token(context: int = V3_CONTEXT, prediction: bool = False) -> float:
    """Three forward passes (Kaplan et al., arXiv 2001.08361, section 2.1); what is recomputed is not work."""
    weights = multiplied_weights() + (prediction_weights() if prediction else 0)
    layers = V3_CONFIG["layers"] + prediction
    return 3 * (2 * weights + attention_flops(context, layers))


def first_principles(price: float = USD_PER_H800_HOUR) -> dict[str, Any]:
    """Does the bill fit the model? The utilisation that the published hours imply, and bills at others.

    `counts` holds three answers to what one token costs; the first, 6 x active parameters, is also `flops` and
    `utilisation`. V3 ran most matrix products in FP8 and the rest in BF16: the two peaks bracket the achievable.
    """
    counts = [
        _count("6 x 37 B active parameters", 6 * V3_ACTIVE_PARAMETERS, price),
        _count(
            f"6 x the {multiplied_weights() / 1e9:.2f} B weights that multiply, and causal attention over "
            f"{V3_CONTEXT:,} tokens",
            training_flops_per_token(),
            price,
        ),
        _count(
            "the same, and the module that predicts one more token",
            training_flops_per_token(prediction=True),
            price,
        ),
    ]
    simple = counts[0]
    return {
        "active_parameters": V3_ACTIVE_PARAMETERS,
        "tokens": V3_TOKENS,
        "flops": simple["flops"],
        "flops_per_second_per_gpu": simple["flops_per_second_per_gpu"],
        "peak_flops_per_second": dict(H800_PEAK),
        "utilisation": dict(simple["utilisation"]),
        "counts": counts,
        "context_extension": _extension(),
        "post_training": {"flops": None, "why": "its tokens are not published"},
        "gpu_hours_per_trillion_tokens": V3_GPU_HOURS_PER_TRILLION,
        "gpu_hours_from_rate": V3_GPU_HOURS_PER_TRILLION * V3_TOKENS / 1e12,
        "gpus": V3_CLUSTER,
        "days_per_trillion_tokens": V3_GPU_HOURS_PER_TRILLION / V3_CLUSTER / 24,
        "days_of_pre_training": V3_GPU_HOURS["pre_training"] / V3_CLUSTER / 24,
    }


def bill(flops: float, utilisation: float, price: float, peak: float = H800_PEAK["bf16"]) -> dict[str, float]:
    """Hours and USD of `flops` on GPUs of `peak` FLOP/s, used to that share, at `price` an hour."""
    hours = flops / (peak * utilisation) / 3600
    return {"utilisation": utilisation, "gpu_hours": hours, "usd": hours * price}


def _count(counted: str, per_token: float, price: float) -> dict[str, Any]:
    flops = per_token * V3_TOKENS
    return {
        "counted": counted,
        "flops_per_token": per_token,
        **_speed(flops, V3_GPU_HOURS["pre_training"]),
        "bills_at_bf16_utilisation": [bill(flops, share, price) for share in UTILISATIONS],
    }


def _speed(flops: float, hours: float) -> dict[str, Any]:
    speed = flops / hours / 3600
    return {
        "flops": flops,
        "flops_per_second_per_gpu": speed,
        "utilisation": {name: speed / peak for name, peak in H800_PEAK.items()},
    }


def _extension() -> dict[str, Any]:
    """The second line of the table: two phases whose longer contexts make attention most of the work."""
    tokens = [steps * batch * length for steps, batch, length in V3_EXTENSION]
    lengths = [length for _, _, length in V3_EXTENSION]
    flops = sum(t * training_flops_per_token(length, prediction=True) for t, length in zip(tokens, lengths))
    return {"tokens": sum(tokens), **_speed(flops, V3_GPU_HOURS["context_extension"])}


# ---- what is not in it ------------------------------------------------------------------------------------


def _not_counted() -> list[dict[str, Any]]:
    excluded = {"source": V3_PAPER, "source_quality": "primary: names the exclusion, gives no amount"}
    unpublished = {"source": None, "source_quality": "none: no figure published"}
    return [
        {"item": "research before the final run (architecture, algorithms, data)", "range": None, **excluded},
        {"item": "ablation experiments", "range": None, **excluded},
        {"item": "salaries", "range": None, **unpublished},
        {"item": "data: collecting, cleaning, licences, labels", "range": None, **unpublished},
        {
            "item": "the R1-series model whose outputs post-training uses (`distill cost deepseek-r1` is a later one)",
            "range": None,
            **unpublished,
        },
        {
            "item": "capital: GPUs and servers (well over $500M of hardware over the company's history; "
            "about $1.6B of servers for about 50,000 Hopper GPUs)",
            "range": [500_000_000, 1_600_000_000],
            **SEMIANALYSIS,
        },
        {"item": "operating those servers", "range": [944_000_000, 944_000_000], **SEMIANALYSIS},
    ]


def format_bill(found: dict[str, Any]) -> str:
    """The bill of `deepseek_v3_bill` as text."""
    rows = [("stage", "GPU hours", "USD")]
    rows += [
        (name.replace("_", " "), f"{stage['gpu_hours']:,}", f"${stage['usd']:,.0f}")
        for name, stage in found["stages"].items()
    ]
    rows.append(("total", f"{found['gpu_hours']:,}", f"${found['usd']:,.0f}"))
    price = found["usd_per_gpu_hour"]
    return "\n".join(
        [
            f"DeepSeek-V3, the final training run, on {found['gpu']} at ${price:g} per GPU hour"
            + ("" if price == USD_PER_H800_HOUR else f" (the paper: ${USD_PER_H800_HOUR})"),
            f"({found['source']})",
            *text_table(rows),
            *_format_principles(found["first_principles"]),
            "Not counted:",
            *format_not_counted(found["not_counted"]),
            f"What was spent besides, by the figures that exist: {millions(found['beyond_the_bill']['range'])}",
            f"  {found['beyond_the_bill']['what']}",
        ]
    )


def _format_principles(first: dict[str, Any]) -> list[str]:
    peaks = " and ".join(
        f"{peak / 1e12:.0f} TFLOP/s ({n.upper()})" for n, peak in first["peak_flops_per_second"].items()
    )
    lines = [
        f"From first principles, pre-training on {first['tokens'] / 1e12:.1f} T tokens (GPU peaks {peaks}):"
    ]
    for count in first["counts"]:
        shares = ", ".join(f"{share:.1%} of {name.upper()}" for name, share in count["utilisation"].items())
        bills = ", ".join(
            f"${b['usd'] / 1e6:.2f}M at {b['utilisation']:.0%}" for b in count["bills_at_bf16_utilisation"]
        )
        lines += [
            f"  {count['counted']}",
            f"    {count['flops']:.2e} FLOPs; the published hours imply "
            f"{count['flops_per_second_per_gpu'] / 1e12:.0f} TFLOP/s per GPU: {shares}",
            f"    the bill at other shares of BF16: {bills}",
        ]
    longer = first["context_extension"]
    days = f"{first['days_per_trillion_tokens']:.1f} days per trillion tokens on {first['gpus']:,} GPUs"
    return [
        *lines,
        f"  context extension, {longer['tokens'] / 1e9:.0f} B tokens: {longer['flops']:.2e} FLOPs, "
        f"{longer['flops_per_second_per_gpu'] / 1e12:.0f} TFLOP/s, {longer['utilisation']['bf16']:.1%} of BF16",
        f"  {first['gpu_hours_per_trillion_tokens']:,} GPU hours per trillion tokens x "
        f"{first['tokens'] / 1e12:.1f} = {first['gpu_hours_from_rate']:,.0f}; {days}, "
        f"{first['days_of_pre_training']:.0f} days in all",
    ]


def format_not_counted(entries: list[dict[str, Any]]) -> list[str]:
    """Item and amount, and below it the source and how good it is."""
    lines = []
    for entry in entries:
        amount = millions(entry["range"]) if entry["range"] else "no amount known"
        source = "; ".join(part for part in (entry["source"], entry["source_quality"]) if part)
        lines += [f"  {entry['item']}: {amount}", f"    [{source}]"]
    return lines


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
        "not_counted": _r1_not_counted(base),
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


def _r1_not_counted(base: dict[str, Any]) -> list[dict[str, Any]]:
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
