"""Recipes: typed, bounded, all problems at once."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "data": ["Endpoint", "Filter", "Generate", "Prompts", "TeacherSection", "Terms"],
        "evaluation": ["Evaluate"],
        "objectives": ["ObjectiveSpec", "Option"],
        "recipe": ["Recipe", "load_evaluate", "load_prompts", "load_recipe", "read_recipe"],
        "section": ["Section"],
        "training": ["Control", "Lora", "Objective", "StudentSection", "Train"],
    },
)
