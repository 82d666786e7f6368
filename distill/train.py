"""Student training: one plain loop on Accelerate, from a dataset folder to an ordinary Hugging Face folder.

    distill train RECIPE                                                     (this machine, one process)
    accelerate launch --num_processes 2 --cpu -m distill train RECIPE        (two CPU processes)
    accelerate launch --config_file recipes/accelerate/ddp.yaml -m distill train RECIPE      (N GPUs)

Leaves in the arm's folder: weights or adapter, tokenizer, card, `metrics.jsonl` (one line per optimizer
step), `manifest.json`. The loss is the sum over all kept tokens of the optimizer step, over all processes
and micro-batches, divided once by their number; so 1 x 64 = 2 x 32 = 8 x 8. A flat twin to read first:
recipes/minimal_kd.py, which a test holds this loop to.

Shapes: B rows, T time, N kept tokens of a micro-batch, V vocabulary.
"""

import contextlib
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from tqdm import tqdm

from distill import losses
from distill.balance import ExpertBiasBalancer
from distill.checkpoint import latest_state, load_state, save_state
from distill.config import Recipe
from distill.data import BatchPlan, TokenRows
from distill.errors import RunError, UserError
from distill.kept import KeptLogits
from distill.live import LiveTeacher
from distill.precision import Precision
from distill.signals import Dense, Sampled, TopK
from distill.students import BuiltStudent
from distill.train_sections import Train


def learning_rate(train: Train, step: int) -> float:
    """Rate of 0-based optimizer step `step`: linear warm-up, then cosine to `final_fraction` of the peak."""
    if step < train.warmup_steps:
        return train.learning_rate * (step + 1) / train.warmup_steps
    if train.schedule == "constant":
        return train.learning_rate
    progress = (step - train.warmup_steps) / max(train.steps - 1 - train.warmup_steps, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return train.learning_rate * (train.final_fraction + (1 - train.final_fraction) * cosine)


def make_optimizer(train: Train, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Rate is set per step by the loop. Matrices decay, vectors (norms, biases) do not."""
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    if train.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=train.learning_rate)
    return torch.optim.AdamW(groups, lr=train.learning_rate, betas=train.betas, fused=True)


def make_accelerator(recipe: Recipe, precision: Precision, folder: Path) -> Accelerator:
    # Accelerate keeps its first precision for the life of the process; each run here states its own.
    AcceleratorState._reset_state()
    return Accelerator(
        mixed_precision=precision.accelerate,
        cpu=recipe.device == "cpu" or not torch.cuda.is_available(),
        kwargs_handlers=precision.handlers(),
        log_with=list(recipe.train.trackers) or None,
        project_dir=str(folder),
        step_scheduler_with_optimizer=False,
    )


def train_student(
    recipe: Recipe,
    accelerator: Accelerator,
    student: BuiltStudent,
    teacher: LiveTeacher | None,
    rows: TokenRows,
    folder: Path,
    title: str,
) -> dict[str, Any]:
    """Train `student` in place on `rows` for `recipe.train.steps` optimizer steps; returns counts.

    Continues from the newest state in `folder`. Raises UserError for rows that cannot be trained on, and
    RunError where a loss or gradient stops being finite (the last saved state is kept).
    """
    train, world, rank = recipe.train, accelerator.num_processes, accelerator.process_index
    _check_rows(train, student, rows, world)
    plan = BatchPlan(rows.lengths, train.batch_size, recipe.seed)

    # ---- model, optimizer, state -------------------------------------------------------------------
    if train.gradient_checkpointing:
        student.base.gradient_checkpointing_enable({"use_reentrant": False})
        student.base.enable_input_require_grads()
    bare = student.model
    optimizer = make_optimizer(train, list(student.trainable.values()))
    balancer = ExpertBiasBalancer(bare) if train.expert_bias_step else None
    first, tokens_seen = 0, 0
    if state := latest_state(folder):
        saved = load_state(state, bare, optimizer)
        first, tokens_seen = saved["step"], saved["tokens"]
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(saved["scaler"])
    model, optimizer = accelerator.prepare(KeptLogits(bare), optimizer)
    log = StepLog(folder, first, tokens_seen, accelerator, train)

    # ---- the loop ----------------------------------------------------------------------------------
    for step in log.progress(first, train.steps, title):
        rate = learning_rate(train, step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(hash((recipe.seed, step, rank)) % 2**63)  # dropout; so no RNG state to save
        step_tokens = int(rows.completion_lengths[plan.step_rows(step)].sum())
        sums = torch.zeros(len(train.objectives), dtype=torch.float64)
        micro_batches = list(plan.micro_batches(step, train.micro_batch_size, rank, world))
        for i, indices in enumerate(micro_batches):
            batch = rows.collate(indices, student.tokenizer.pad_token_id).to(accelerator.device)
            if balancer:
                balancer.mask = batch.attention_mask
            last = i == len(micro_batches) - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(model):
                logits = model(batch.input_ids, batch.attention_mask, batch.keep)  # [N, V]
                signals = [batch.signal, teacher(batch, logits.shape[-1]) if teacher else None]
                loss, terms = weighted_sum(train, logits, batch.targets, signals)
                # Gradients are averaged over processes, hence `world`; one division by all kept tokens.
                accelerator.backward(loss * (world / step_tokens))
            sums += terms

        # ---- check, clip, step ---------------------------------------------------------------------
        means = accelerator.reduce(sums.to(accelerator.device)).cpu() / step_tokens
        norm = accelerator.clip_grad_norm_(student.trainable.values(), train.max_grad_norm)
        _check_finite(step, means, norm, scaled=accelerator.scaler is not None)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        violation = None
        if balancer:
            frozen = step >= train.steps * (1 - train.expert_bias_freeze)
            violation = balancer.update(0.0 if frozen else train.expert_bias_step, accelerator.reduce)

        # ---- log, save -----------------------------------------------------------------------------
        log.write(step, means, rate, float(norm), step_tokens, violation)
        if train.checkpoint_every and (step + 1) % train.checkpoint_every == 0 and step + 1 < train.steps:
            if accelerator.is_main_process:
                scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
                extra = {"tokens": log.tokens, "scaler": scaler}
                save_state(folder, step + 1, bare, optimizer.optimizer, extra)
            accelerator.wait_for_everyone()
    accelerator.wait_for_everyone()
    log.close()
    read = sum(int(rows.lengths[plan.step_rows(step)].sum()) for step in range(train.steps))
    return {
        "steps": train.steps,
        "rows": train.steps * train.batch_size,
        "tokens": log.tokens,  # trained: completion tokens
        "tokens_read": read,  # passed through the model: prompts too
    }


def weighted_sum(
    train: Train, logits: torch.Tensor, targets: torch.Tensor, signals: list[Dense | TopK | Sampled | None]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(weighted sum of all objectives over the N kept tokens, each objective's own unweighted sum).

    `signals` are what the teacher said, live or from disk; an objective takes the one of its form. The pieces
    stay sums: the caller divides once, by the tokens of the whole optimizer step.
    """
    given = {"targets": (targets,), **{signal.form: signal.tensors for signal in signals if signal}}
    total, terms = logits.new_zeros((), dtype=torch.float32), []
    for objective in train.objectives:
        loss = getattr(losses, objective.name)
        per_token = loss(logits, *given[objective.signal], **objective.options)  # [N]
        term = per_token.sum()
        total = total + objective.weight * term
        terms.append(term.detach().double().cpu())
    return total, torch.stack(terms)


def _check_rows(train: Train, student: BuiltStudent, rows: TokenRows, world: int) -> None:
    longest = int(rows.lengths.max())
    context = getattr(student.base.config.get_text_config(), "max_position_embeddings", None)
    limit = min(x for x in (train.max_length, context, longest) if x)
    if longest > limit:
        raise UserError(
            f"the dataset has rows of {longest} tokens and the student takes {limit}; "
            f"set filter.max_tokens={limit} and run filter with --redo"
        )
    if train.batch_size < world:
        raise UserError(
            f"train.batch_size={train.batch_size} is below the {world} processes; raise it to {world}"
        )


def _check_finite(step: int, means: torch.Tensor, norm: torch.Tensor, scaled: bool) -> None:
    """Stop before a non-finite update reaches the weights. A loss scaler skips such steps by itself."""
    if not bool(means.isfinite().all()):
        raise RunError(
            f"step {step + 1}: the loss is {means.tolist()}; lower train.learning_rate or use fp32"
        )
    if not scaled and not math.isfinite(float(norm)):
        raise RunError(
            f"step {step + 1}: the gradient norm is {float(norm)}; lower train.learning_rate or use fp32"
        )


class StepLog:
    """metrics.jsonl (one line per optimizer step), the trackers asked for, and the progress bar."""

    def __init__(self, folder: Path, first: int, tokens: int, accelerator: Accelerator, train: Train):
        self.tokens, self.train, self.accelerator = tokens, train, accelerator
        self.start, self.bar, self.file = time.perf_counter(), None, None
        if train.trackers:
            accelerator.init_trackers("distill")
        if accelerator.is_main_process:
            path = folder / "metrics.jsonl"
            # Lines past the resumed state belong to steps that run again.
            kept = path.read_text().splitlines()[:first] if path.is_file() else []
            self.earlier = float(_seconds_of(kept[-1])) if kept else 0.0
            self.file = open(path, "w", encoding="utf-8")  # noqa: SIM115 - closed by close()
            self.file.writelines(line + "\n" for line in kept)

    def progress(self, first: int, steps: int, title: str):
        self.bar = tqdm(
            range(first, steps), initial=first, total=steps, desc=title, unit="step",
            disable=not self.accelerator.is_main_process, mininterval=0.5,
        )  # fmt: skip
        return self.bar

    def write(self, step: int, means, rate: float, norm: float, tokens: int, violation: float | None) -> None:
        self.tokens += tokens
        values = {o.name: float(m) for o, m in zip(self.train.objectives, means)}
        loss = sum(o.weight * float(m) for o, m in zip(self.train.objectives, means))
        if self.train.trackers:
            self.accelerator.log({"loss": loss, "lr": rate, "grad_norm": norm, **values}, step=step + 1)
        if self.file is None:
            return
        seconds = self.earlier + time.perf_counter() - self.start
        extra = {} if violation is None else {"max_violation": round(violation, 4)}
        self.file.write(
            _line(step=step + 1, loss=loss, lr=rate, grad_norm=norm, tokens=tokens,
                        seconds=round(seconds, 3), objectives=values, **extra)
        )  # fmt: skip
        self.file.flush()
        rate_now = (self.tokens) / max(seconds, 1e-9)
        self.bar.set_postfix_str(f"loss {loss:.3f}, {rate_now:,.0f} tok/s", refresh=False)

    def close(self) -> None:
        if self.file:
            self.file.close()
        if self.train.trackers:
            self.accelerator.end_training()


def _line(**values: Any) -> str:
    return json.dumps(values) + "\n"


def _seconds_of(line: str) -> float:
    return json.loads(line)["seconds"]
