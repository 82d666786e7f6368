"""What the routers of a mixture of experts decide: record it, measure it, change it."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "interventions": ["drop_experts", "route", "use_top_k"],
        "metrics": [
            "coactivation",
            "coefficient_of_variation",
            "confidence",
            "dead_experts",
            "effective_experts",
            "load_entropy",
            "load_fraction",
            "max_violation",
            "max_violation_noise_floor",
            "max_violation_per_batch",
            "overlap",
            "router_entropy",
            "strongest_pairs",
            "token_drop",
            "whole_model",
        ],
        "recording": ["Decisions", "LayerRecord", "Recording", "record_routing"],
        "totals": ["GroupShares"],
    },
)
