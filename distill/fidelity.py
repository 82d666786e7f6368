"""How closely a model follows its teacher, token by token: on the teacher's answers and on the model's own.

Accuracy and agreement diverge (arXiv 2505.15442): a student can be right by another route, or agree and be
wrong. So both are reported. Teacher-forced: both models read the same answer, and at every one of its tokens
their next-token distributions are compared. On the teacher's text a student stands where the teacher led it;
on its own text it stands where it led itself, which is where it will be used (the exposure gap that on-policy
distillation is about: GKD, arXiv 2306.13649).

    fidelity(student, teacher, rows, pad_id)
    # {"answers": 200, "tokens": 9041, "top1_agreement": 0.998, "top1_agreement_stderr": ..., "forward_kl": ...}

Tokens of one answer are not independent, so standard errors and intervals have the answer as their unit.

Shapes: N tokens of a batch, G answers, V vocabulary.
"""

from typing import Any

import numpy as np
import torch

from distill.calibration import TokenCalibration
from distill.clustered import ratio
from distill.data import TokenRows
from distill.fused import match_vocabulary
from distill.kept import KeptLogits
from distill.losses import forward_kl, reverse_kl

_MEASURES = ("top1_agreement", "forward_kl", "reverse_kl")


@torch.inference_mode()
def fidelity(
    student,
    teacher,
    rows: TokenRows,
    pad_id: int,
    batch_size: int = 64,
    calibration: TokenCalibration | None = None,
) -> dict[str, Any]:
    """`Agreement` of metrics.json: means over the completion tokens of `rows`, with clustered errors.

    top1_agreement: share of tokens at which both models' most likely next token is the same.
    forward_kl: KL(teacher || student); reverse_kl: KL(student || teacher). In nats, both at temperature 1.
    Tokens at which either model's logits are not finite are left out and counted. `calibration`, where given,
    is fed the student's logits and the tokens of `rows`.
    """
    ask_student, ask_teacher = KeptLogits(student), KeptLogits(teacher)
    device = next(student.parameters()).device
    sums, counts = np.zeros((3, len(rows))), np.zeros(len(rows))
    order = np.argsort(rows.lengths, kind="stable")
    with ask_student, ask_teacher:
        for start in range(0, len(order), batch_size):
            picked = order[start : start + batch_size]
            batch = rows.collate(picked, pad_id).to(device)
            q = ask_student(batch.input_ids, batch.attention_mask, batch.keep)  # [N, V]
            p = match_vocabulary(ask_teacher(batch.input_ids, batch.attention_mask, batch.keep), q.shape[-1])
            finite = q.logsumexp(-1).isfinite() & p.logsumexp(-1).isfinite()
            answer = np.repeat(picked, rows.completion_lengths[picked])[finite.cpu().numpy()]  # [N]
            q, p = q[finite], p[finite]
            if calibration:
                calibration.add(q, batch.targets[finite])
            found = (p.argmax(-1) == q.argmax(-1), forward_kl(q, p), reverse_kl(q, p))
            for into, values in zip([*sums, counts], [*found, torch.ones(len(q))]):
                into += np.bincount(answer, weights=values.double().cpu().numpy(), minlength=len(rows))
    result: dict[str, Any] = {
        "answers": len(rows),
        "tokens": int(counts.sum()),
        "not_finite": int(rows.completion_lengths.sum() - counts.sum()),
    }
    for name, totals in zip(_MEASURES, sums):
        mean, stderr, interval = ratio(totals, counts)
        top = 1.0 if name == "top1_agreement" else np.inf
        clipped = None if interval is None else [max(0.0, interval[0]), min(top, interval[1])]
        result |= {name: mean, f"{name}_stderr": stderr, f"{name}_ci95": clipped}
    return result


def answer_rows(problems_ids: list[list[int]], answers: list[dict], limit: int) -> TokenRows | None:
    """The first `limit` answers (one per problem) as rows, cut-off ones included; None if there are none."""
    usable = [
        (prompt, answer["completion_ids"])
        for prompt, answer in zip(problems_ids, answers, strict=True)
        if answer["completion_ids"] and not answer["error"]
    ][:limit]
    return TokenRows([p for p, _ in usable], [c for _, c in usable]) if usable else None
