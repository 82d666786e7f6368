"""Optimizer and learning rate of a training run, as pure functions of the recipe and the step.

optimizer = make_optimizer(train, parameters); learning_rate(train, step)
"""

import math

import torch
from torch import nn

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
