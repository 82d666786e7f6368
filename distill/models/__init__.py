"""Any causal LM: load it, adapt it, describe it, decode with it."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "chat": ["opening", "prompt_ids", "text_ids", "whole_turn"],
        "decode": ["Completion", "Sampling"],
        "describe": ["describe_config", "describe_model"],
        "fp8": ["Tile", "VARIANTS", "emulate_fp8", "fp8_emulated", "restore", "round_trip"],
        "head": ["KeptLogits"],
        "load": [
            "load_config",
            "load_model",
            "load_tokenizer",
            "same_vocabulary",
            "tokenizer_fingerprint",
        ],
        "lora": ["add_lora", "assert_trained", "plan_lora"],
        "parameters": ["format_trainable"],
        "precision": ["Precision", "resolve_precision"],
        "routers": ["find_routers"],
        "student": ["build_student", "save_student"],
    },
)
