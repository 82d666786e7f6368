"""One checkpoint measured, several compared: metrics.json."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "evaluate": ["evaluate_checkpoints", "evaluate_recipe"],
        "fidelity": ["Reliability", "answer_calibration", "answer_rows"],
        "inherit": ["audit", "compare_flaws", "inherited_share", "measure_probes", "summarise_flaws"],
        "interventions": ["intervention_sweep"],
        "likelihood": ["text_nll"],
        "routing": ["saturation_between"],
        "usage": ["precision_sweep"],
        "answers": ["compare", "forgetting"],
        "stats": [
            "binomial_stderr",
            "holm",
            "majority_at_k",
            "mcnemar_p",
            "paired_comparison",
            "paired_interval",
            "pass_at_k",
            "score",
            "wilson_interval",
        ],
    },
)
