"""What all sections of params.yaml's schema are made of."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ValueLoss(Section):
    """Every state's value against its return."""

    kind: Literal["bce", "mse", "huber"]
    gamma: Annotated[float, Field(gt=0, le=1)]
    lam: Fraction
