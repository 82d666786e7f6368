"""What every section of a recipe is made of, and the section about teacher signals. See distill/config/recipe.py."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Signal(Section):
    """What is kept of the teacher's distribution at every completion token, to train without the teacher."""

    kind: Literal["none", "top_k", "sampled"] = Field(
        "none", description="top_k: for sparse_forward_kl; sampled: for sampled_cross_entropy, unbiased"
    )
    k: Count = Field(32, description="tokens kept, or drawn, per completion token")
    bits: Literal[8, 16, 32] = Field(8, description="top_k: bits of a log-probability; 32 is exact")
    temperature: Annotated[float, Field(gt=0)] = Field(
        1.0, description="sampled: the teacher's, for the draws"
    )

    @model_validator(mode="after")
    def _tempered_by_the_loss(self):
        if self.kind == "top_k" and self.temperature != 1:
            raise ValueError("top_k is stored at temperature 1; set the temperature of the objective instead")
        return self
