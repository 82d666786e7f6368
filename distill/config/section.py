"""What every section of a recipe is made of, and the section about teacher signals. See distill/config/recipe.py."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=1)]


# Names that a template can set, and values that it can write.
TemplateArguments = dict[Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")], Any]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    later: ClassVar[tuple[str, ...]] = ()  # keys that earlier versions did not have

    def identity(self, **how: Any) -> dict[str, Any]:
        """What a stage made by this section depends on, as JSON. `how`: further arguments of `model_dump`.

        A key of `later` is left out while it is at its default: what was made before there was the key is what it was.
        """
        settings = self.model_dump(mode="json", **how)
        for name in self.later:
            if name in settings and getattr(self, name) == type(self).model_fields[name].default:
                del settings[name]
        return settings


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
