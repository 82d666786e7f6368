"""Any causal LM: load it, adapt it, describe it, decode with it."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "chat": ["opening", "prompt_ids", "text_ids", "whole_turn"],
        "decode": ["Completion", "Sampling"],
        "describe": ["describe_config", "describe_model", "format_trainable"],
        "fp8": ["Tile", "VARIANTS", "emulate_fp8", "fp8_emulated", "restore", "round_trip"],
        "hooks": ["KeptLogits"],
        "load": ["load_config", "load_model", "load_tokenizer", "same_vocabulary", "tokenizer_fingerprint"],
        "student": ["add_lora", "assert_trained", "build_student", "plan_lora", "save_student"],
        "precision": ["Precision", "resolve_precision"],
        "routers": ["find_routers"],
    },
)
