"""Student training: one plain loop on Accelerate, from a dataset folder to an ordinary Hugging Face folder.

    distill train RECIPE                                                     (this machine, one process)
    accelerate launch --config_file recipes/accelerate/cpu2.yaml -m distill train RECIPE     (two CPU processes)
    accelerate launch --config_file recipes/accelerate/ddp.yaml -m distill train RECIPE      (N GPUs)

Leaves in the arm's folder: weights or adapter, tokenizer, card, `metrics.jsonl` (one line per optimizer
step), `manifest.json`. The loss is the sum over all kept tokens of the optimizer step, over all processes
and micro-batches, divided once by their number; so 1 x 64 = 2 x 32 = 8 x 8. A flat twin to read first:
recipes/minimal_kd.py, which a test holds this loop to.

The loop knows neither where rows come from (`distill.training.sources`) nor what a teacher is
(`distill.training.live_teachers`) nor how a loss is computed (`distill.training.step`). Shapes: B rows, T time, N
kept tokens of a micro-batch.

Optimizer and learning rate are pure functions of the recipe and the step (`make_optimizer`, `learning_rate`).
"""

import contextlib
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, DistributedType
from torch import nn
from torch.distributed.tensor import DTensor

from distill.config.recipe import Recipe
from distill.config.training import Train
from distill.data.batches import Batch, TokenRows, check_packing, even_pieces, micro_batches
from distill.errors import RunError, UserError
from distill.models.layers import attend_by_row, choose_attention, compile_layers, rows_apart
from distill.models.precision import Precision, arithmetic
from distill.models.routers import bare_model, find_routers
from distill.models.student import BuiltStudent
from distill.training.checkpoint import Interrupts, Saver
from distill.training.log import StepLog, Validator
from distill.training.losses.routers import ExpertBiasBalancer
from distill.training.memory import Lean, OutOfMemory, memory_advice, saved_for_backward
from distill.training.sources import Lot, Source
from distill.training.step import StudentStep, of_step, state_objectives, whole_step

# What `compile: auto` goes by, measured on one thread (LOG.md, "Training"): compiling takes 40 s and saves 4 to 19 % of
# a step, and a thread does so many FLOPs a second in a step.
_LEAST_MINUTES = 30
_FLOPS_PER_THREAD = {"fp32": 7e10, "half": 1.2e11}


def make_accelerator(recipe: Recipe, precision: Precision, folder: Path) -> Accelerator:
    # Accelerate keeps its first precision for the life of the process; each run here states its own.
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        mixed_precision=precision.accelerate,
        cpu=recipe.device == "cpu" or not torch.cuda.is_available(),
        # Gradients lie in the memory that they are sent from: one copy of all of them less.
        kwargs_handlers=[*precision.handlers(), DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        log_with=list(recipe.train.trackers) or None,
        project_dir=str(folder),
        step_scheduler_with_optimizer=False,
    )
    kind = accelerator.distributed_type
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" and kind != DistributedType.FSDP:
        raise UserError(
            f"this launch asks for FSDP and Accelerate would run {kind.value} instead, since it shards on "
            "accelerators only; on CPU use recipes/accelerate/cpu2.yaml"
        )
    half = accelerator.mixed_precision != "no"
    found = launch_problems(
        recipe,
        accelerator.num_processes,
        kind == DistributedType.FSDP,
        half,
        kind == DistributedType.DEEPSPEED,
    )
    if found:
        raise UserError(*found)
    if kind == DistributedType.FSDP:
        _shard_exactly(accelerator)
    return accelerator


def launch_problems(
    recipe: Recipe, world: int, sharded: bool, half: bool, deepspeed: bool = False
) -> list[str]:
    """What this training cannot do in a launch of `world` processes. Asked before a run begins, too.

    sharded: under FSDP2. half: products in 16 bits or fewer.
    """
    train, found = recipe.train, []
    if deepspeed:
        return [
            "DeepSpeed takes an optimizer step of its own for every micro-batch, clips by its own file and keeps its "
            "own state; use recipes/accelerate/fsdp2.yaml, which shards the same things under this loop"
        ]
    if train.batch_size < world:
        found.append(
            f"train.batch_size={train.batch_size} is below the {world} processes; raise it to {world}"
        )
    if sharded and train.on_policy.fraction:
        found.append(
            "train.on_policy: a student whose weights are sharded cannot write by itself, since processes decode "
            "unequally long; use recipes/accelerate/ddp.yaml, or train.on_policy.fraction=0"
        )
    if sharded and train.teachers.own_start and recipe.student.adapter == "lora":
        found.append(
            "train.teachers.own_start: the starting weights of a sharded LoRA student lie inside what trains, where "
            "they cannot be asked without it; use recipes/accelerate/ddp.yaml, or student.adapter=full"
        )
    if sharded and any(o.signal == "ahead" for o in train.objectives):
        found.append(
            "multi_token: a sharded student's embedding and head are whole inside its own forward pass alone; use "
            "recipes/accelerate/ddp.yaml"
        )
    if sharded and half and train.head_precision == "fp32":
        found.append(
            "train.head_precision=fp32: a sharded student's weights come together in 16 bits, the head's too; use "
            "recipes/accelerate/ddp.yaml, or train.precision=fp32"
        )
    return found


def _shard_exactly(accelerator: Accelerator) -> None:
    """Sharded as in one process: gradients are summed in float32, and neither inputs nor losses are rounded.

    Accelerate's policy does all three in 16 bits.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy

    plugin = accelerator.state.fsdp_plugin
    if plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=plugin.mixed_precision_policy.param_dtype, reduce_dtype=torch.float32,
            output_dtype=None, cast_forward_inputs=False,
        )  # fmt: skip


def train_student(
    recipe: Recipe,
    accelerator: Accelerator,
    student: BuiltStudent,
    teacher,
    source: Source,
    folder: Path,
    title: str,
    held_out: TokenRows | None = None,
    flops_per_token: float = 0.0,
) -> dict[str, Any]:
    """Train `student` in place for `recipe.train.steps` optimizer steps on what `source` gives; returns counts.

    `teacher(batch)` returns signals by form, or is None. Goes on from the newest state in `folder`. UserError for
    rows that cannot be trained on, RunError for a loss that is not finite or want of memory, Interrupted by SIGTERM.
    """
    train, rank = recipe.train, accelerator.process_index

    # ---- model, optimizer, state -------------------------------------------------------------------
    bare = student.model
    prepare_model(train, student, teacher)
    lean = contextlib.nullcontext() if train.compile else Lean(bare)  # compiled layers see to it themselves
    student.states = states = state_objectives(train.objectives, bare, teacher, recipe.seed)
    step_module = StudentStep(bare, train.objectives, states, train.head_precision == "fp32")
    optimizer = make_optimizer(train, [p for p in step_module.parameters() if p.requires_grad])
    model, optimizer = accelerator.prepare(step_module, optimizer)
    # Only now: what `prepare` wraps may hold other tensors than before, and a bias moved there moves nothing.
    balancer = ExpertBiasBalancer(step_module.model) if train.expert_bias_step else None
    validator = Validator(train, held_out, student.tokenizer.pad_token_id, accelerator, folder)
    saver = Saver(folder, step_module, optimizer, accelerator, source, validator)
    first, tokens, read, counted = saver.restore()
    micro = MicroBatches(train, student.tokenizer.pad_token_id, accelerator, step_module, saver, counted)
    log = StepLog(folder, first, tokens, read, accelerator, train, flops_per_token, saver.log)

    # ---- the loop ----------------------------------------------------------------------------------
    with Interrupts() as interrupts, arithmetic(train.tf32, train.deterministic):
        for step in log.progress(first, train.steps, title):
            rate = learning_rate(train, step)
            for group in optimizer.param_groups:
                group["lr"] = rate
            torch.manual_seed(hash((recipe.seed, step, rank)) % 2**63)  # dropout; so no RNG state to save
            lot = micro.lot(source, step)
            _check_lengths(train, student, lot.rows)

            # ---- forward and backward, micro-batch by micro-batch ----------------------------------
            with lean:
                sums = micro.accumulate(model, optimizer, lot, teacher, balancer)

            # ---- check, clip, step -----------------------------------------------------------------
            # One number more than objectives travels along: how many processes were told to stop.
            told = torch.full_like(sums[:1], float(interrupts.told))
            totals = accelerator.reduce(torch.cat([sums, told]))
            norm = accelerator.clip_grad_norm_(step_module.parameters(), train.max_grad_norm)
            frozen = step >= train.steps * (1 - train.expert_bias_freeze)
            speed = 0.0 if frozen else train.expert_bias_step
            violation = balancer.update(speed, accelerator.reduce) if balancer else None
            micro.look_ahead(source, step + 1)
            found = StepFound(totals, norm, violation, lot.tokens)
            _check_finite(step, found, scaled=accelerator.scaler is not None)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            # ---- log, save -------------------------------------------------------------------------
            seen = validator.look(step, model, step_module, teacher) if validator.due(step) else None
            more = {"max_violation": found.violation, "on_policy": source.stats, "validation": seen}
            more["validation_objective"] = None if seen is None else validator.objective
            log.write(step, found.means, rate, found.norm, lot, **more)
            if validator.finished:
                break
            due = train.checkpoint_every and (step + 1) % train.checkpoint_every == 0
            if step + 1 < train.steps and (due or found.stop):
                saver.saved_bytes = micro.saved_bytes
                saver.save(step + 1, log.tokens, log.read, micro.counted, train.keep_states, log.sync())
            if found.stop:
                log.close()
                interrupts.leave(step + 1, train.steps)
    accelerator.wait_for_everyone()
    log.close()
    return {
        "steps": log.steps,
        "rows": log.steps * train.batch_size,
        **validator.close(step_module),
        "tokens": log.tokens,  # trained: completion tokens
        "tokens_read": log.read,  # passed through the model: prompts too
        "tokens_sampled": source.passed,  # passed through it before, to write what it trains on: prompts too
        "tokens_counted": micro.counted,  # passed through its body once more, for an objective of the whole step
        "head": step_module.head_form,
        "micro_batch_size": micro.size,
        "saved_bytes": micro.saved_bytes,  # of the first micro-batch: its activations, for the backward pass
    }


def compilation(
    recipe: Recipe,
    flops_per_row: float,
    student: BuiltStudent,
    teacher,
    accelerator: Accelerator,
    say: Callable[[str], None],
) -> Recipe:
    """The recipe with `train.compile: auto` decided, and the decision said.

    The rule counts and does not time: a run that is repeated or resumed chooses alike, and so do all processes.
    """
    train = recipe.train
    if train.compile != "auto":
        return recipe
    threads, device = torch.get_num_threads(), accelerator.device
    per_second = _FLOPS_PER_THREAD["fp32" if accelerator.mixed_precision == "no" else "half"] * threads
    rows = train.steps * train.batch_size / accelerator.num_processes
    minutes = flops_per_row * rows / per_second / 60
    foreseen = f"{minutes:.0f} minutes of training are foreseen, and it repays from {_LEAST_MINUTES} on"
    models = [student.model, *(teacher.models if teacher else [])]
    compilers = [os.environ.get("CXX"), "g++", "clang++"]
    reasons = {
        f"not measured on {device.type}": device.type != "cpu",
        "no C++ compiler is here (g++)": not any(name and shutil.which(name) for name in compilers),
        "text is written between the steps, by plain code": train.on_policy.fraction > 0,
        "the teacher's routing changes at every batch": bool(train.teachers.routings),
        "a mixture of experts is not measured": any(find_routers(bare_model(model)) for model in models),
        foreseen: minutes < _LEAST_MINUTES,
    }
    against = next((reason for reason, holds in reasons.items() if holds), None)
    if accelerator.is_main_process:
        say(f"compile: auto is {'off' if against else 'on'}: {against or foreseen}")
    return recipe.model_copy(update={"train": train.model_copy(update={"compile": against is None})})


def prepare_model(train: Train, student: BuiltStudent, teacher=None) -> None:
    """What the recipe asks of the models' own forward: checkpointing, packing, compilation (the teacher's too).

    And what it need not ask: attention without masks of the whole batch.
    """
    if train.gradient_checkpointing:
        student.base.gradient_checkpointing_enable({"use_reentrant": False})
        student.base.enable_input_require_grads()
    for model in (student.model, *(teacher.models if teacher else [])):
        if train.attention != "auto":
            choose_attention(model, train.attention)
        attend_by_row(model)
    if train.packing:
        check_packing(student.model, len(student.tokenizer))
    if train.compile:
        compile_layers(
            student.model, *(m for m in (teacher.models if teacher else []) if m is not student.model)
        )


class StepFound:
    """What the host must know of an optimizer step before the update: the one time that it waits for the device."""

    def __init__(self, totals: torch.Tensor, norm: Any, violation: torch.Tensor | None, tokens: int):
        """totals: each objective's sum over the `tokens` of the step, then how many processes were told to stop."""
        norm = torch.as_tensor(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        more = [norm] if violation is None else [norm, violation]
        *sums, told, norm, violation = torch.cat(
            [totals.double(), *(x.detach().double().reshape(1).to(totals.device) for x in more)]
        ).tolist() + ([None] if violation is None else [])
        self.means, self.stop = [x / tokens for x in sums], bool(told)
        self.norm, self.violation = norm, violation


class MicroBatches:
    """Forward and backward of one lot in pieces that fit; halves the pieces when memory runs out, if asked to."""

    def __init__(
        self,
        train: Train,
        pad_id: int,
        accelerator: Accelerator,
        step: StudentStep,
        saver: Saver | None = None,
        counted: int = 0,
    ):
        self.train, self.pad_id, self.accelerator, self.step = train, pad_id, accelerator, step
        self.counted = counted  # tokens, over all processes, that passed before their step, to be counted
        self._next: tuple[int, Lot] | None = None  # a step to come, and its rows
        self._made: Batch | None = None  # its first micro-batch, on its way to the device
        self.size = train.micro_batch_size
        # What the run's first forward pass kept for the backward pass; after a resume it is known.
        self.saved_bytes: int | None = saver.saved_bytes if saver else None

    def lot(self, source: Source, step: int) -> Lot:
        """The rows of `step`."""
        if self._next is not None and self._next[0] == step:
            return self._next[1]
        self._next = self._made = None
        return source.lot(step, self.accelerator.process_index, self.accelerator.num_processes)

    def look_ahead(self, source: Source, step: int) -> None:
        """While the device still works: the rows of `step` and its first micro-batch, on their way already.

        The loop waits for the device next. What is made here need not be made after that, with an idle device. A CPU
        has no such time: there this does nothing.
        """
        if self.accelerator.device.type == "cpu" or not source.fixed or step >= self.train.steps:
            return
        lot = self.lot(source, step)
        indices, _ = self._pieces(lot)[0]
        with contextlib.suppress(OutOfMemory):  # what has no room now is made in its own step
            self._next, self._made = (step, lot), self._batch(lot.rows, indices)

    def _pieces(self, lot: Lot) -> list[tuple[np.ndarray, float]]:
        """This process's micro-batches with their weights: as many as the process has that needs most.

        Every process knows the lengths of all, so none need ask: on a GPU everyone would wait for the answers.
        """
        train = self.train

        def cut(lengths: np.ndarray) -> list[np.ndarray]:
            every, tokens = np.arange(len(lengths)), train.micro_batch_tokens
            return list(micro_batches(every, lengths, self.size, tokens, padded=not train.packing))

        own = [lot.share[piece] for piece in cut(lot.rows.lengths[lot.share])]
        return even_pieces(own, max([len(own), *(len(cut(lengths)) for lengths in lot.lengths)]))

    def _batch(self, rows: TokenRows, indices: np.ndarray) -> Batch:
        batch = rows.pack(indices) if self.train.packing else rows.collate(indices, self.pad_id)
        return self.step.ready(batch, self.accelerator.device)

    def accumulate(self, model: nn.Module, optimizer, lot: Lot, teacher, balancer) -> torch.Tensor:
        """Gradients of the whole lot into the model; each objective's sum over this process's kept tokens."""
        while True:
            try:
                return self._once(model, lot, teacher, balancer)
            except OutOfMemory as error:
                # The loss is a sum over the step, so smaller pieces give the same step. Processes would have
                # to agree on it, so only one process goes on by itself.
                again = self.train.auto_micro_batch and self.size > 1 and self.accelerator.num_processes == 1
                if not again:
                    raise memory_advice(error, self.train, self.size) from None
                optimizer.zero_grad(set_to_none=True)
                self.size, self.saved_bytes = self.size // 2, None
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _once(self, model: nn.Module, lot: Lot, teacher, balancer) -> torch.Tensor:
        accelerator, pieces, made = self.accelerator, self._pieces(lot), self._made
        self._made = None
        sums = torch.zeros(len(self.train.objectives), dtype=torch.float64, device=accelerator.device)

        def batches():
            for i, (indices, weight) in enumerate(pieces):
                yield made if made and not i else self._batch(lot.rows, indices), weight

        if balancer:
            balancer.mask = None
        # One batch is the whole step: it counts itself.
        alone = len(pieces) == 1 and accelerator.num_processes == 1
        counted = whole_step(self.step, model, batches, accelerator.reduce, lot.tokens)
        with contextlib.nullcontext() if alone else counted:
            if balancer:
                balancer.forget()  # what a pass over the step, or one that ran out of memory, has counted
            for i, (batch, weight) in enumerate(batches()):
                if balancer:
                    balancer.mask = batch.attention_mask if weight else torch.zeros_like(batch.input_ids)
                last = i == len(pieces) - 1
                joined = contextlib.nullcontext() if last else accelerator.no_sync(model)
                with joined, rows_apart(batch.rows):
                    total, terms = self._forward(model, batch, teacher(batch) if teacher else {})
                    # Gradients are averaged over processes, hence the world; one division by all kept tokens.
                    accelerator.backward(total * (weight * accelerator.num_processes / lot.tokens))
                sums += terms * weight
        if of_step(self.step) and not alone:
            self.counted += lot.read
        return sums

    def _forward(self, model: nn.Module, batch, signals: dict) -> tuple[torch.Tensor, torch.Tensor]:
        if self.saved_bytes is not None or self.train.gradient_checkpointing or self.train.compile:
            return model(batch, signals)
        with saved_for_backward(model) as saved:
            total, terms = model(batch, signals)
        self.saved_bytes = saved()
        return total, terms


def _check_lengths(train: Train, student: BuiltStudent, rows: TokenRows) -> None:
    longest = int(rows.lengths.max())
    context = getattr(student.base.config.get_text_config(), "max_position_embeddings", None)
    limit = min(x for x in (train.max_length, context, longest) if x)
    if longest > limit:
        raise UserError(
            f"the dataset has rows of {longest} tokens and the student takes {limit}; "
            f"set filter.max_tokens={limit} and run filter with --redo"
        )


def _check_finite(step: int, found: StepFound, scaled: bool) -> None:
    """Stop before a non-finite update reaches the weights. A loss scaler skips such steps by itself."""
    if not all(map(math.isfinite, found.means)):
        raise RunError(f"step {step + 1}: the loss is {found.means}; lower train.learning_rate or use fp32")
    if not scaled and not math.isfinite(found.norm):
        raise RunError(
            f"step {step + 1}: the gradient norm is {found.norm}; lower train.learning_rate or use fp32"
        )


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
