"""What the workshop's lessons stand on: ranges that can fail, exercises and quizzes that score themselves, sliders."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "explore": ["slider"],
        "lesson": [
            "accuracy",
            "ask",
            "begin",
            "exercise",
            "expect",
            "experiment",
            "held_out_problems",
            "needs",
            "scaled",
            "share",
            "step_log",
        ],
        "record": ["account", "certificate", "quiz"],
        "shown": ["answer", "players", "show"],
    },
)
