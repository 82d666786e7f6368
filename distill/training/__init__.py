"""The student: arms, the loop, what makes it resume."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "arms": ["train_arm", "train_arms"],
        "merge": ["format_errors", "merge_adapter"],
    },
)
