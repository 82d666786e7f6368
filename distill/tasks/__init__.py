"""The problems, and the rules that say whether an answer is right."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "corpus": ["PRESETS", "Preset", "documents"],
        "flaws": ["Probe", "load_probes"],
        "problems": ["Problem", "sample_problem", "sample_problems", "solve", "split_of"],
        "verify": ["extract_answer", "final_answer", "judge"],
    },
)
