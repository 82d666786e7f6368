"""What a stored teacher signal costs and what it gets wrong, measured: `recipes/results/signals.json`.

    python recipes/benchmarks/signals.py       (the embedded teacher, and Zipf teachers of 151,936 tokens; a minute)

Every way of storing goes through the real codec and the real losses, against the dense distribution p:

- bytes: a token, of the encoded blobs
- tv: total variation between p and the distribution one stored token stands for
- kl bias: mean of (loss on the stored token - dense forward KL) for a fixed student, with its standard error;
  `sampled` estimates the cross-entropy, so the teacher's entropy is taken off
- kl rms: root mean square of the same difference, token by token: the noise of one stored token
- fitted: KL(p || s) and confidence - accuracy of a student s free to fit any distribution, after SEEN stored
  tokens of the same context. It minimises the sum of their losses plus PRIOR times the cross-entropy from q0,
  where it began, in closed form: s = (sum of stored distributions + PRIOR q0) / (SEEN + PRIOR); for
  `tail_bucket` the tail keeps the shape of q0. Confidence is s's largest probability, accuracy p of that
  token: above 0 is overconfident.

Shapes: N contexts, V vocabulary, K stored tokens.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distill.config.data import Prompts, TeacherSection
from distill.data.batches import TokenRows
from distill.data.prompts import task_prompts
from distill.data.scoring import draw
from distill.data.signals import SignalFormat, decode_sampled, decode_top_k, encode_sampled, encode_top_k
from distill.data.teachers import LocalTeacher, Question
from distill.devices import describe_device, pick_device
from distill.models.decode import Sampling
from distill.models.hooks import KeptLogits
from distill.models.load import load_model
from distill.stages import versions
from distill.storage import PROJECT_ROOT, write_json
from distill.training import losses

SEEN, PRIOR = 256, 2.56
RESULTS = PROJECT_ROOT / "recipes" / "results" / "signals.json"


def embedded(contexts: int = 400) -> tuple[Tensor, Tensor]:
    """(teacher, student) log-probabilities [N, V] at tokens of the shipped teacher's own answers."""
    teacher = LocalTeacher(TeacherSection(model="checkpoints/teacher"), torch.device("cpu"), 64)
    prompts = task_prompts("test", {"medium": 30, "hard": 30}, Prompts(), seed=0)
    questions = [Question(p["messages"], (0, p["prompt_id"], 0)) for p in prompts]
    answers = teacher.answer(questions, Sampling(1.0, max_new_tokens=80), lambda _: None)
    rows = TokenRows([a.prompt_ids for a in answers], [a.completion_ids for a in answers])
    batch = rows.collate(np.arange(len(rows)), teacher.tokenizer.pad_token_id)
    found = []
    for model in (teacher.model, load_model("checkpoints/base", "fp32")):
        with torch.no_grad(), KeptLogits(model) as kept:
            found.append(kept(batch.input_ids, batch.attention_mask, batch.keep).double().log_softmax(-1))
    pick = torch.from_numpy(np.random.default_rng(0).choice(len(found[0]), contexts, replace=False))
    return found[0][pick], found[1][pick]


def zipf(vocabulary: int = 151_936, copies: int = 4) -> tuple[Tensor, Tensor]:
    """Teachers p ~ rank**-s for s = 1, 1.2, 1.5, 2 over shuffled ids; students with logits off by N(0, 1)."""
    rng = np.random.default_rng(0)
    ranks = np.log(np.arange(1, vocabulary + 1))
    teacher = np.stack([-s * rng.permutation(ranks) for s in (1.0, 1.2, 1.5, 2.0) for _ in range(copies)])
    student = teacher + rng.normal(size=teacher.shape)
    return tuple(torch.from_numpy(x).log_softmax(-1) for x in (teacher, student))


class Stored:
    """One way of storing, through its codec: `once(u)` is (loss - dense KL [N], what is stored [N, V])."""

    def __init__(self, kind: str, k: int, teacher: Tensor, student: Tensor, variant: str = ""):
        self.teacher, self.student, self.k, self.variant = teacher, student, k, variant
        self.form = SignalFormat(kind, k, teacher.shape[1], 1.0, 8, {})
        self.p = teacher.exp()
        self.entropy = -(self.p * teacher).sum(-1)
        self.dense = losses.forward_kl(student, teacher)
        self.name = f"{kind} {k}{variant and ', ' + variant}"
        self.random = kind == "sampled"

    def once(self, u: Tensor) -> tuple[Tensor, Tensor]:
        n = len(self.p)
        if self.random:
            ids = draw(self.p, self.k, u)
            if self.variant == "independent":
                ids = self.p.multinomial(self.k, replacement=True).sort(-1).values
            blobs = encode_sampled(self.form, ids.numpy())
            ids, values = map(torch.from_numpy, decode_sampled(self.form, n, *blobs))
            loss = losses.sampled_cross_entropy(self.student, ids, values.double()) - self.entropy
        else:
            logprobs, ids = self.teacher.topk(self.k)
            blobs = encode_top_k(self.form, ids.numpy(), logprobs.float().numpy())
            ids, values = map(torch.from_numpy, decode_top_k(self.form, n, *blobs))
            if self.variant == "plain bf16":
                values = logprobs.bfloat16().float()
            tail = "tail_bucket" if self.variant == "tail_bucket" else "renormalise"
            loss = losses.sparse_forward_kl(self.student, ids, values, tail=tail)
            values = values.exp() if tail == "tail_bucket" else values.softmax(-1)
        self.bytes = 6 * self.k if self.variant == "plain bf16" else sum(map(len, blobs)) / n
        stored = torch.zeros_like(self.p).scatter_add_(1, ids, values.double())
        if self.variant == "tail_bucket":
            rest = self.student.exp().scatter(1, ids, 0.0)
            stored += rest * ((1 - stored.sum(-1)).clamp(min=0) / rest.sum(-1))[:, None]
        return loss - self.dense, stored


def measure(stored: Stored, generator: torch.Generator) -> dict[str, float | str]:
    """The row of the table for one way of storing."""
    n, errors, total = len(stored.p), [], torch.zeros_like(stored.p)
    copies = SEEN if stored.random else 1
    tv = 0.0
    for _ in range(copies):
        error, q = stored.once(torch.rand(n, dtype=torch.float64, generator=generator))
        errors.append(error)
        total += q
        tv += float((q - stored.p).abs().sum(-1).mean() / 2) / copies
    error = torch.stack(errors)  # [copies, N]
    fitted = (total * (SEEN / copies) + PRIOR * stored.student.exp()) / (SEEN + PRIOR)
    confidence, top = fitted.max(-1)
    accuracy = stored.p.gather(1, top[:, None])[:, 0]
    stderr = float((error.var(0) / copies).sum().sqrt() / n) if stored.random else 0.0
    return {
        "name": stored.name,
        "bytes_per_token": round(stored.bytes, 2),
        "tv": tv,
        "kl_bias": float(error.mean()),
        "kl_bias_stderr": stderr,
        "kl_rms": float(error.pow(2).mean().sqrt()),
        "fitted_kl": float((stored.p * (stored.teacher - fitted.log())).sum(-1).mean()),
        "fitted_confidence_minus_accuracy": float((confidence - accuracy).mean()),
    }


def table() -> dict:
    """All sources and ways of storing; deterministic."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    ways = [("top_k", 8, ""), ("top_k", 32, "plain bf16"), ("top_k", 32, ""), ("top_k", 32, "tail_bucket")]
    ways += [("top_k", 128, ""), ("sampled", 32, "independent"), *(("sampled", k, "") for k in (8, 32, 64))]
    sources = {}
    for name, (teacher, student) in {"embedded teacher": embedded(), "zipf": zipf()}.items():
        rows = [measure(Stored(kind, k, teacher, student, v), generator) for kind, k, v in ways]
        sources[name] = {
            "contexts": len(teacher),
            "vocabulary": teacher.shape[1],
            "entropy": float(-(teacher.exp() * teacher).sum(-1).mean()),
            "dense_kl": float(losses.forward_kl(student, teacher).mean()),
            "rows": rows,
        }
    device = describe_device(pick_device("cpu"))
    return {"seen": SEEN, "prior": PRIOR, "sources": sources, "device": device, "versions": versions()}


def format_table(found: dict) -> str:
    lines = []
    for name, source in found["sources"].items():
        lines += [
            f"{name}: {source['contexts']} contexts, V = {source['vocabulary']:,}, entropy "
            f"{source['entropy']:.3f}, KL(p || student) {source['dense_kl']:.3f} nats",
            "",
            "| stored | bytes/token | tv | kl bias (s.e.) | kl rms | fitted KL | confidence - accuracy |",
            "|---|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {r['name']} | {r['bytes_per_token']:.1f} | {r['tv']:.4f} | {r['kl_bias']:+.4f} "
            f"({r['kl_bias_stderr']:.4f}) | {r['kl_rms']:.4f} | {r['fitted_kl']:.4f} "
            f"| {r['fitted_confidence_minus_accuracy']:+.4f} |"
            for r in source["rows"]
        ]
        lines.append("")
    return "\n".join(lines)


def main(path: Path = RESULTS) -> None:
    found = table()
    write_json(path, found)
    print(format_table(found))


if __name__ == "__main__":
    main()
