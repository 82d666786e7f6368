"""Recipes: typed, bounded, all problems at once."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "data": ["Endpoint", "Filter", "Generate", "Prompts", "TeacherSection", "Terms"],
        "section": ["ObjectiveSpec", "Option", "Section"],
        "evaluation": ["Evaluate"],
        "recipe": ["Recipe", "load_evaluate", "load_prompts", "load_recipe", "read_recipe"],
        "training": ["Control", "Lora", "Objective", "StudentSection", "Train"],
    },
)
