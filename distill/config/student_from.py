"""The recipe section `student.from`: how a student is made from a model before it trains (distill/convert/derive.py).

    student: {from: {model: checkpoints/smollm2, layers: 10, by: angle}}
    student: {from: {model: checkpoints/teacher, experts: {drop: 0.5, how: reap}}}
    student: {from: {model: checkpoints/base, mixture: {experts: 4, experts_per_token: 2}}}

Models are averaged first, then layers are dropped, then widths are cut, then experts are taken out, joined or copied.
What chooses by activation reads prompts of the recipe, with answers that the model itself writes to them.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_serializer, model_validator

from distill.config.section import Count, Section


class Calibration(Section):
    """What a choice by activation reads: the recipe's own prompts, or windows of its documents."""

    rows: Count = Field(64, description="prompts (or windows of text) that are read, drawn by `seed`")
    answers: bool = Field(
        True, description="with the greedy answers of the model itself; false reads the questions alone"
    )
    max_new_tokens: Count = Field(64, description="tokens of such an answer")


class Width(Section):
    """Less of every layer, after Minitron (arXiv 2407.14679, section 2.2)."""

    intermediate: Count | None = Field(None, description="neurons of every MLP that are kept; empty: all")
    kv_heads: Count | None = Field(
        None,
        description="heads of keys and values that are kept, each with the queries that read it; empty: all",
    )
    hidden: Count | None = Field(
        None, description="channels of the hidden states that are kept, the same in every layer; empty: all"
    )
    by: Literal["activation", "random"] = Field(
        "activation", description="which: the largest mean activations, or drawn by `seed` (a control)"
    )

    @model_validator(mode="after")
    def _something(self):
        if not (self.intermediate or self.kv_heads or self.hidden):
            raise ValueError("name what becomes narrower: `intermediate`, `kv_heads` or `hidden`")
        return self


class Experts(Section):
    """Fewer experts in every routed layer; the router keeps the rows of those that stay."""

    drop: Annotated[float, Field(gt=0, lt=1)] = Field(description="share of the experts that goes")
    how: Literal["reap", "frequency", "random", "merge"] = Field(
        "reap",
        description="which stay: the largest router weight times norm of the output (REAP, arXiv 2510.13999), the most "
        "used, drawn by `seed`; merge: as reap, the others averaged into the likest of them (REAM, arXiv 2604.04356)",
    )


class Dense(Section):
    """A mixture made dense: one MLP for the experts of a layer (arXiv 2605.28207)."""

    how: Literal["concatenate", "average"] = Field(
        "concatenate",
        description="concatenate: experts side by side, each scaled by its mean router weight; average: one expert, "
        "the mean of all weighted by that",
    )
    experts: Count | None = Field(
        None, description="concatenate: so many, those of the largest weight; empty: as many as a token used"
    )


class Mixture(Section):
    """A dense model made a mixture: sparse upcycling (arXiv 2212.05055). It computes what the dense one computed."""

    experts: Annotated[int, Field(ge=2, le=4096)] = Field(4, description="copies of every MLP")
    experts_per_token: Count = Field(2, description="of them, chosen by a new router for every token")
    shared: bool = Field(
        False, description="one more copy that every token uses; it and the chosen ones count half"
    )

    @model_validator(mode="after")
    def _enough(self):
        if self.experts_per_token > self.experts:
            raise ValueError(
                f"a token cannot use {self.experts_per_token} of {self.experts} experts; lower `experts_per_token`"
            )
        return self


class From(Section):
    """A student made from a model before it trains (distill/convert/derive.py)."""

    later: ClassVar = ("average", "by", "width", "experts", "dense", "mixture", "calibration")

    model: str = Field(description="folder or hub name of the model it is made from")
    average: tuple[str, ...] = Field(
        (),
        description="further models of the same shape: every weight is the mean of all (model soups, arXiv 2203.05482)",
    )
    layers: Count | tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        None, description="decoder layers that are kept: so many, or a list from 0; empty: all"
    )
    by: Literal["even", "angle"] = Field(
        "even",
        description="which, where `layers` is a number: evenly with the first and the last, or without the run of "
        "layers that turns the hidden state least (arXiv 2403.17887, section 3.2)",
    )
    width: Width | None = Field(None, description="less of every layer")
    experts: Experts | None = Field(None, description="a mixture with fewer experts")
    dense: Dense | None = Field(None, description="a mixture made dense")
    mixture: Mixture | None = Field(None, description="a dense model made a mixture")
    calibration: Calibration = Field(Calibration(), description="what a choice by activation reads")

    @model_serializer(mode="wrap")
    def _as_before(self, handler):
        """Keys that recipes from before did not have are left out while they are at their default."""
        values = handler(self)
        return {
            key: value
            for key, value in values.items()
            if key not in self.later or getattr(self, key) != type(self).model_fields[key].default
        }

    @model_validator(mode="after")
    def _something_one_way(self):
        asked = [name for name in ("experts", "dense", "mixture") if getattr(self, name)]
        if len(asked) > 1:
            raise ValueError(f"`{asked[0]}` and `{asked[1]}` exclude each other; leave one out")
        if self.layers is None and self.width is None and not asked and not self.average:
            raise ValueError(
                "say what becomes of the model: `average`, `layers`, `width`, `experts`, `dense` or `mixture`"
            )
        if self.by == "angle" and not isinstance(self.layers, int):
            raise ValueError("`by: angle` chooses layers: give their number in `layers`")
        return self

    @property
    def reads(self) -> bool:
        """Whether a choice reads the recipe's prompts."""
        by_use = self.experts is not None and self.experts.how != "random"
        by_size = self.width is not None and self.width.by == "activation"
        return self.by == "angle" or by_use or by_size or self.dense is not None

    @property
    def draws(self) -> bool:
        """Whether something is drawn by the recipe's seed."""
        at_random = self.experts is not None and self.experts.how == "random"
        return at_random or self.mixture is not None or (self.width is not None and self.width.by == "random")

    def identity(self, **how: Any) -> dict[str, Any]:
        return self.model_dump(mode="json", **how)
