"""A distillation toolkit that shows, measured, what DeepSeek combined. See README.md.

    import distill
    recipe = distill.load_recipe("recipes/demo.yaml", ["run_dir=checkpoints/mine"])
    distill.run(recipe, "run", redo=False, say=print)
    loss = distill.forward_kl(student_logits, teacher_logits, temperature=2.0)       # [N, V] twice -> [N]
    with distill.record_routing(model) as recording:                                 # any MoE causal LM
        model(**batch)

Names are loaded when they are first used, so that the import itself takes no torch. Every folder offers its own in the
same way (`distill.moe.max_violation`); what is offered is the public interface, everything else may change.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=["commands", "config", "data", "evaluation", "models", "moe", "report", "tasks", "training"],
    submod_attrs={
        "config.recipe": ["Recipe", "load_recipe"],
        "pipeline": ["run"],
        "errors": ["RunError", "UserError"],
        "tasks.problems": ["sample_problems"],
        "tasks.verify": ["judge"],
        "models.load": ["load_model", "load_tokenizer"],
        "models.decode": ["Sampling", "decode"],
        "models.describe": ["describe"],
        "moe.recording": ["record_routing"],
        "moe.interventions": ["drop_experts", "route", "use_top_k"],
        "training.losses.divergences": [
            "adaptive_kl",
            "alpha_beta_divergence",
            "cross_entropy",
            "forward_kl",
            "generalized_jsd",
            "reverse_kl",
            "skew_forward_kl",
            "skew_reverse_kl",
            "total_variation",
        ],
        "training.losses.sparse": ["sampled_cross_entropy", "sparse_forward_kl"],
        "training.losses.fused": ["fused_loss"],
        "training.merge": ["merge_adapter"],
        "evaluation.evaluate": ["evaluate_checkpoints"],
        "evaluation.fidelity": ["fidelity"],
        "evaluation.answers": ["compare"],
        "evaluation.stats": ["pass_at_k", "wilson_interval"],
        "report.report": ["build_report"],
    },
)
