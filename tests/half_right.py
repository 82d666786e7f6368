"""Answers to the exercises of the workshop that are half right: a common slip each. None may count as solved."""

HALF_RIGHT = {
    "0.1": """
tokens = asked.answers["student"].tokens
place = max(range(len(tokens)), key=lambda i: tokens[i].probability)  # the most certain
""",
    "0.2": "more = round(420 * results['student']['hard']['accuracy'])  # not more than the control",
    "1.1": "tempered = lambda logits, T: logits.softmax(-1) / T  # the division after the softmax",
    "1.2": "pass_at = lambda n, c, k: 1 - (1 - c / n) ** k  # drawn with replacement",
    "1.3": "best = max(samples, key=lambda T: accuracy(samples[T]))  # right, but the same again and again",
    "2.1": "my_forward_kl = lambda p, q: (q.exp() * (q - p)).sum(-1)  # the other direction",
    "2.2": "centre = 1.0  # the larger mode",
    "2.3": """
log_p = teacher.log_softmax(-1)
difference = float((log_p.exp() * log_p).sum())  # the sign
""",
    "3.1": "lora_size = lambda n_in, n_out, r: 2 * r * n_in  # right for square layers",
    "3.2": "merged = lambda W, A, B, alpha, r: W + B @ A  # without the scale",
    "3.3": """
def energy(delta, r):
    s = torch.linalg.svdvals(delta)  # not squared
    return float(s[:r].sum() / s.sum())
""",
    "4.1": "loss_scale = lambda g: 2.0 ** torch.floor(torch.log2(32752 / g.abs().max())).item()  # half of it",
    "4.2": """
def fp8_rows(x):
    scale = x.abs().max() / 448  # one for all rows
    return (x / scale).to(torch.float8_e4m3fn).float() * scale
""",
    "4.3": "stops_at = 0.25",
    "5.1": "my_max_violation = lambda counts: max(counts) / (sum(counts) / len(counts))  # not above the mean",
    "5.2": "balance_step = lambda bias, counts, u: bias + u * (counts.mean() - counts)  # not a fixed step",
    "5.3": "told_apart = not told_apart  # the right expert, the wrong conclusion",
    "6.1": "v3_bill = lambda trillions, hours, more, usd: trillions * hours * usd  # pre-training alone",
    "6.2": "break_even = lambda fixed, t, s: fixed / (t - s) if t != s else 0  # never is not at once",
    "6.3": "verdict = lambda low, high: 'SUPPORTED' if low > 0 else 'NOT SUPPORTED'  # nothing in between",
    "7.1": "perplexity = lambda nats: float(nats.exp().mean())  # the mean after exp",
    "7.2": "evenly = lambda n, total: [i * total // n for i in range(n)]  # the last layer is lost",
    "7.3": """
def apart(a, b):
    spread = (a.var() / len(a) + b.var() / len(b)) ** 0.5  # as if the pieces were others
    return float((a - b).mean()), float(spread)
""",
    "8.1": "reap = lambda weights, outputs: float((weights * outputs.norm(dim=-1)).sum())  # more used, more worth",
    "8.2": "kept = lambda worth, share: list(range(len(worth) - round(share * len(worth))))  # the first ones",
    "8.3": "nvfp4_bytes = lambda n: n // 2 + n // 16  # the last block has a scale too",
}
