"""From questions to training rows: teachers, answers, filters, batches, and the papers that go with them."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "batches": ["Batch", "BatchPlan", "TokenRows", "micro_batches"],
        "endpoint": ["EndpointTeacher"],
        "filter": ["explain", "make_dataset"],
        "ledger": ["run_ledger"],
        "prompts": ["held_out", "make_prompts", "training_prompts"],
        "scoring": ["draw", "score_rows"],
        "signals": ["Dense", "Sampled", "SignalFormat", "States", "StoredSignals", "TopK"],
        "teachers": ["Answer", "LocalTeacher", "Question"],
        "provenance": ["decide"],
        "vllm": ["VllmTeacher"],
    },
)
