"""What the workshop's lessons stand on: ranges that can fail, exercises and quizzes that score themselves, sliders."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "shown": ["answer", "players", "show", "slider"],
        "lesson": [
            "account",
            "accuracy",
            "ask",
            "begin",
            "certificate",
            "exercise",
            "expect",
            "experiment",
            "held_out_problems",
            "needs",
            "quiz",
            "scaled",
            "share",
            "step_log",
        ],
    },
)
