"""Out of memory in training: what it was, and what to halve. One step's arithmetic does not depend on it.

except OutOfMemory as error: raise memory_advice(error, train, micro_batch_size)
"""

import torch

from distill.errors import RunError
from distill.train_sections import Train

# What torch raises for an accelerator. A CPU allocation that fails is a RuntimeError of other text, and Linux
# usually kills the process instead; both end the run with the last state saved.
OutOfMemory = torch.OutOfMemoryError


def memory_advice(error: Exception, train: Train, size: int) -> RunError:
    """One line: how much was asked for, and the cheapest things that halve it, none of which changes the loss."""
    asked = str(error).split(".")[0].strip()
    advice = []
    if size > 1:
        advice.append(
            f"train.micro_batch_size={max(1, size // 2)} (same result: gradients are summed over the step), or "
            "train.auto_micro_batch=true to halve it until it fits"
        )
    if not train.gradient_checkpointing:
        advice.append("train.gradient_checkpointing=true (about a third more time)")
    advice.append("filter.max_tokens for shorter rows")
    return RunError(f"out of memory at {size} rows a pass ({asked}); set {'; '.join(advice)}")
