"""Knowledge distillation in one flat loop: read this first.

A teacher's answers are already on disk (`distill generate` and `distill filter` wrote them). A student
with LoRA learns from them in two ways at once: to say what the teacher said (cross-entropy), and to weigh
every possible next token as the teacher does (forward KL, teacher || student).

    distill run recipes/demo.yaml                                    # leaves checkpoints/demo/dataset
    python recipes/minimal_kd.py checkpoints/demo/dataset --steps 50

`distill train` does the same with checkpoints, bf16, several processes and kept-token logits; a test holds
its losses to the ones printed here. Shapes: B rows, T time, V vocabulary, N kept (completion) tokens.
"""

import argparse
from pathlib import Path

import numpy as np
import pyarrow.dataset
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM


def main() -> list[float]:
    parser = argparse.ArgumentParser()
    parser.add_argument("dataset", help="folder with part-*.parquet of prompt_ids and completion_ids")
    parser.add_argument("--teacher", default="checkpoints/teacher")
    parser.add_argument("--student", default="checkpoints/base")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1e-2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rank", type=int, default=16)
    args = parser.parse_args()

    # ---- two models: one frozen, one with small trainable matrices beside its linear layers ---------
    teacher = AutoModelForCausalLM.from_pretrained(args.teacher, dtype=torch.float32).eval()
    student = AutoModelForCausalLM.from_pretrained(args.student, dtype=torch.float32)
    torch.manual_seed(args.seed)
    targets = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    lora = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules=targets, task_type="CAUSAL_LM")
    student = get_peft_model(student, lora).train()
    trainable = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=args.rate, betas=(0.9, 0.95), weight_decay=0.0)

    # ---- the rows: prompt and completion token ids ---------------------------------------------------
    parts = sorted(map(str, Path(args.dataset).glob("part-*.parquet")))
    table = pyarrow.dataset.dataset(parts).to_table(columns=["prompt_ids", "completion_ids"])
    rows = list(zip(table["prompt_ids"].to_pylist(), table["completion_ids"].to_pylist()))

    # ---- the loop ------------------------------------------------------------------------------------
    losses, position = [], 0
    for step in range(args.steps):
        # Epochs are fresh permutations laid end to end.
        batch = []
        while len(batch) < args.batch_size:
            epoch, offset = divmod(position, len(rows))
            order = np.random.default_rng([args.seed, epoch]).permutation(len(rows))
            batch.append(rows[order[offset]])
            position += 1

        # Right-pad, and mark the positions whose *next* token belongs to the completion.
        width = max(len(p) + len(c) for p, c in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.long)  # what stands in the padding is never read
        real = torch.zeros(len(batch), width, dtype=torch.long)
        keep = torch.zeros(len(batch), width, dtype=torch.bool)
        for b, (prompt, completion) in enumerate(batch):
            length = len(prompt) + len(completion)
            ids[b, :length] = torch.tensor(prompt + completion)
            real[b, :length] = 1
            keep[b, len(prompt) - 1 : length - 1] = True
        targets_next = ids.roll(-1, dims=1)[keep]  # [N]

        q = student(input_ids=ids, attention_mask=real).logits[keep].log_softmax(-1)  # [N, V]
        with torch.no_grad():
            p = teacher(input_ids=ids, attention_mask=real).logits[keep].log_softmax(-1)  # [N, V]

        cross_entropy = F.nll_loss(q, targets_next)
        forward_kl = (p.exp() * (p - q)).sum(-1).mean()
        loss = cross_entropy + forward_kl
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(
            f"step {step + 1}: loss {losses[-1]:.5f} = ce {cross_entropy:.5f} + kl {forward_kl:.5f}",
            flush=True,
        )
    return losses


if __name__ == "__main__":
    main()
