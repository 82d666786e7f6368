"""Every objective: a loss per kept token, and head and loss as one."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "divergences": [
            "adaptive_kl",
            "alpha_beta_divergence",
            "cross_entropy",
            "forward_kl",
            "generalized_jsd",
            "reverse_kl",
            "sampled_reverse_kl",
            "skew_forward_kl",
            "skew_reverse_kl",
            "top_reverse_kl",
            "total_variation",
        ],
        "fused": ["fused_loss"],
        "hidden": ["Projection", "hidden_cosine", "hidden_mse", "layer_pairs"],
        "sparse": ["ranking_hinge", "ranking_logistic", "sampled_cross_entropy", "sparse_forward_kl", "uld"],
        "routers": ["batch_balance", "router_distillation", "sequence_balance"],
    },
)
