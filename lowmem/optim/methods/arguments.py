"""Types of the arguments that several methods take; they carry the range checks."""

from typing import Annotated, Literal

from pydantic import Field

Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
Betas = tuple[Beta, Beta]
Eps = Annotated[float, Field(gt=0.0)]
Gamma = Annotated[float, Field(ge=1.0)]
Bias = Literal["inside", "step", "off"]
"""Adam's correction of the moments' bias: see `rules.Adam`."""
