"""The recipe section `evaluate`: which held-out problems, and how they are answered.

Read and checked as part of a `Recipe` (distill/config.py); `distill evaluate CHECKPOINT` fills it from options.
"""

from typing import Annotated, Any

from pydantic import Field, model_validator

from distill.data_sections import PresetName, nearest
from distill.presets import fill_in
from distill.sections import Count, Section
from distill.tasks import SPLITS


class Evaluate(Section):
    levels: dict[str, Annotated[int, Field(ge=0)]] = Field(
        {"easy": 210, "medium": 210, "hard": 210}, description="embedded tasks: held-out problems per level"
    )
    source: str | None = Field(
        None, description="or a file or 'hub:org/name' of held-out problems, as in `prompts`"
    )
    preset: PresetName | None = Field(
        None, description="a benchmark, as in `prompts`; empty: that of `prompts`"
    )
    config: str | None = Field(None, description="hub: the dataset's config; empty: that of `prompts`")
    split: str = Field("test", description="embedded tasks: validation or test; hub: the dataset's split")
    limit: Count | None = Field(None, description="files and hub: use the first rows only")
    max_new_tokens: Count = 96
    batch_size: Count = 256
    fidelity_rows: Annotated[int, Field(ge=0)] = Field(200, description="teacher answers compared; 0 is off")

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, data: Any):
        return fill_in(data, "test")

    @model_validator(mode="after")
    def _known_split(self):
        if not self.source and self.split not in SPLITS[1:]:
            raise ValueError(
                f"embedded tasks have no held-out split '{self.split}'{nearest(self.split, SPLITS[1:])}"
            )
        return self
