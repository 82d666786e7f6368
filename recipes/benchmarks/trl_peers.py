"""TRL's two distillation trainers as runners of the training-speed benchmark, each at its best.

What is timed is their own `training_step` (forward of both models, their loss, backward) on a batch that lies ready
in memory, as the toolkit's does: the data loader, generation and logging are left out for everyone, gradient
checkpointing (on by default in TRL) is off, and the batch is off-policy, so nobody generates. The model goes
through their own Accelerator, as in `trainer.train()`. Objectives by their `beta`: 0 is forward KL, 1 reverse KL,
and between them M = beta teacher + (1 - beta) student, the same direction as
`distill.training.losses.divergences.generalized_jsd`; the temperature is 1 and the sum over kept tokens is divided
by their number, so loss and gradient are comparable.

    runner = distillation_runner(work, {"name": "forward_kl"}, "fp32"); runner()          # needs trl 1.16

Shapes: B rows, P prompt tokens, C completion tokens.
"""

import os
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from worker import Workload

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

BETA = {"forward_kl": 0.0, "reverse_kl": 1.0}
_FOLDER = tempfile.TemporaryDirectory(prefix="distill-bench-")  # trainers want one; gone with the process


def _beta(objective: dict[str, Any]) -> float:
    return BETA.get(objective["name"], objective.get("beta", 0.5))


def _arguments(objective: dict[str, Any], precision: str, rows: int) -> dict[str, Any]:
    """What both trainers are told; bf16 is autocast, as the toolkit's."""
    return {
        "output_dir": _FOLDER.name,
        "per_device_train_batch_size": rows,
        "bf16": precision == "bf16",
        "use_cpu": True,
        "gradient_checkpointing": False,
        "beta": _beta(objective),
        "temperature": 1.0,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "max_steps": 1,
    }


def _tokenizer() -> PreTrainedTokenizerFast:
    """A trainer wants one; no text is ever tokenized."""
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def _step(trainer: Any, inputs: dict[str, torch.Tensor], kept: torch.Tensor) -> Callable[[], float]:
    model = trainer.accelerator.prepare(trainer.model)
    trainer.model_wrapped = model
    trainer.current_gradient_accumulation_steps = 1

    def forward_backward() -> float:
        return trainer.training_step(model, dict(inputs), kept).item()

    return forward_backward


def distillation_runner(work: Workload, objective: dict[str, Any], precision: str) -> Callable[[], float]:
    """`trl.DistillationTrainer`: heads on the completion tokens, in tiles. Its bf16 leaves the heads in float32."""
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    class ReadyBatch(DistillationTrainer):
        """Takes the batch as generation would have left it."""

        def _prepare_inputs(self, inputs):
            return inputs

    trainer = ReadyBatch(
        model=work.student,
        teacher_model=work.teacher,
        args=DistillationConfig(**_arguments(objective, precision, len(work.prompts))),
        train_dataset=Dataset.from_dict({"prompt": ["a"]}),
        processing_class=_tokenizer(),
    )
    kept = torch.tensor(float(work.kept))
    inputs = {
        "prompt_ids": work.prompts,
        "prompt_mask": torch.ones_like(work.prompts),
        "completion_ids": work.completions,
        "completion_mask": torch.ones_like(work.completions),
        "num_items_in_batch": kept,
    }
    return _step(trainer, inputs, kept)


def autocast_distillation_runner(
    work: Workload, objective: dict[str, Any], precision: str
) -> Callable[[], float]:
    """The same with everything under autocast, as this toolkit's step is.

    In one process TRL 1.16 calls the student's body around the `forward` that Accelerate has wrapped in autocast
    (`_ForwardRedirection` puts its own function in that place), so its bf16 trains a float32 body.
    """
    step = distillation_runner(work, objective, precision)

    def forward_backward() -> float:
        with torch.autocast("cpu", torch.bfloat16):
            return step()

    return forward_backward


def gkd_runner(work: Workload, objective: dict[str, Any], precision: str) -> Callable[[], float]:
    """`trl.experimental.gkd.GKDTrainer` with lmbda = 0: all logits of both models, then its loss."""
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    messages = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]]
    trainer = GKDTrainer(
        model=work.student,
        teacher_model=work.teacher,
        args=GKDConfig(lmbda=0.0, **_arguments(objective, precision, len(work.prompts))),
        data_collator=lambda rows: rows,
        train_dataset=Dataset.from_dict({"messages": messages}),
        processing_class=_tokenizer(),
    )
    ids = work.ids
    labels = ids.clone()
    labels[:, : work.prompts.shape[1]] = -100
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return _step(trainer, inputs, torch.tensor(work.kept))


def gkd_compiled_runner(work: Workload, objective: dict[str, Any], precision: str) -> Callable[[], float]:
    """The same, every decoder layer of both models compiled as `train.compile` does it."""
    from distill.models.layers import compile_layers

    compile_layers(work.student, work.teacher)
    return gkd_runner(work, objective, precision)
