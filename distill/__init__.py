"""distill: teacher outputs -> student (LoRA, mixed precision) -> MoE-aware evaluation -> report.

The package is one flat module per idea; README.md lists them in pipeline order.
Nothing is imported here, so that `distill --help` never waits for torch.
"""

__version__ = "0.1.0"
