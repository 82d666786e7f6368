"""How closely a model follows its teacher, token by token, on the teacher's own answers.

Accuracy and agreement diverge (arXiv 2505.15442): a student can be right by another route, or agree and be
wrong. So both are reported. Teacher-forced: both models read the same teacher answer, and at every one of its
tokens their next-token distributions are compared.

    fidelity(student, teacher, rows, pad_id)
    # {"top1_agreement": ..., "tokens": ..., "forward_kl": ..., "reverse_kl": ...}
"""

from typing import Any

import numpy as np
import torch

from distill.data import TokenRows
from distill.kept import KeptLogits
from distill.live import match_vocabulary
from distill.losses import forward_kl, reverse_kl
from distill.stats import binomial_stderr


@torch.inference_mode()
def fidelity(student, teacher, rows: TokenRows, pad_id: int, batch_size: int = 64) -> dict[str, Any]:
    """Means over the N completion tokens of `rows` (teacher answers), in nats for the divergences.

    top1_agreement: share of tokens at which both models' most likely next token is the same.
    forward_kl: KL(teacher || student); reverse_kl: KL(student || teacher). Both at temperature 1.
    """
    ask_student, ask_teacher = KeptLogits(student), KeptLogits(teacher)
    device = next(student.parameters()).device
    agree = tokens = 0
    sums = np.zeros(2)
    order = np.argsort(rows.lengths, kind="stable")
    with ask_student, ask_teacher:
        for start in range(0, len(order), batch_size):
            batch = rows.collate(order[start : start + batch_size], pad_id).to(device)
            q = ask_student(batch.input_ids, batch.attention_mask, batch.keep)  # [N, V]
            p = match_vocabulary(ask_teacher(batch.input_ids, batch.attention_mask, batch.keep), q.shape[-1])
            agree += int((p.argmax(-1) == q.argmax(-1)).sum())
            tokens += len(q)
            sums += [float(forward_kl(q, p).sum()), float(reverse_kl(q, p).sum())]
    return {
        "top1_agreement": agree / tokens,
        "top1_agreement_stderr": binomial_stderr(agree, tokens),
        "tokens": tokens,
        "forward_kl": sums[0] / tokens,
        "reverse_kl": sums[1] / tokens,
    }


def teacher_rows(problems_ids: list[list[int]], answers: list[dict], limit: int) -> TokenRows | None:
    """The first `limit` teacher answers as rows, cut-off ones included; None if there are none."""
    usable = [
        (prompt, answer["completion_ids"])
        for prompt, answer in zip(problems_ids, answers)
        if answer["completion_ids"] and not answer["error"]
    ][:limit]
    return TokenRows([p for p, _ in usable], [c for _, c in usable]) if usable else None
