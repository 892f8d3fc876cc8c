"""FRUGAL: a part of the gradient with moments, the rest without."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from lowmem.config.schema import StateFormat
from lowmem.errors import ConfigError
from lowmem.optim.bases import Solver
from lowmem.optim.blocks import Blocks, Order
from lowmem.optim.coordinates import Lines, RandK
from lowmem.optim.formats import format_named
from lowmem.optim.lifts import Lift, ProjectBack
from lowmem.optim.method import ByRole, Dense, Method, Projected
from lowmem.optim.methods.arguments import Beta, Betas, Bias, Eps
from lowmem.optim.methods.spec import MethodSpec
from lowmem.optim.orthonormal import (
    LeadingPairs,
    LeadingVectors,
    RandomPairs,
    RandomVectors,
    Sides,
)
from lowmem.optim.projectors import Projector
from lowmem.optim.refresh import Every
from lowmem.optim.residuals import ROUNDING, SgdResidual, SignResidual
from lowmem.optim.rules import Adam, Lion, Sgd, SubspaceRule

Projection = Literal["blocks", "svd", "random", "randperm", "columns", "rows", "randk"]
StateFree = Literal["sign_sgd", "sgd", "no"]
Base = Literal["adam", "lion", "sgd"]


def frugal(
    *,
    density: Annotated[float, Field(ge=0.0, le=1.0)] = 0.25,
    gap: PositiveInt = 200,
    projection: Projection = "blocks",
    order: Order = "descending",
    side: Sides = "std",
    solver: Solver = "iteration",
    scale: PositiveFloat = 1.0,
    state_free: StateFree = "sign_sgd",
    state_free_scale: NonNegativeFloat = 1.0,
    base: Base = "adam",
    betas: Betas | None = None,
    eps: Eps = 1e-8,
    bias: Bias = "inside",
    momentum: Beta = 0.9,
    dampening: Beta = 0.0,
    nesterov: bool = False,
    sign: bool = False,
    on_refresh: Literal["reset", "keep"] = "reset",
    staggered: bool = True,
    states: StateFormat = "fp32",
    min_8bit: NonNegativeInt = 4096,
    floor_codes: bool = True,
) -> ByRole:
    """FRUGAL: moments for a changing part of the gradient, its sign for the rest.

    Every `gap` updates a share `density` is chosen anew, and its moments start from zero
        R = P'G;  Z = G - P R
        W <- (1 - lr wd) W - lr * scale * (P Adam(R) + state_free_scale * sign(Z))

    projection: whole matrices that take turns (blocks; order: which are next), leading singular
    vectors of G (svd) or random ones on `side`, random lines on it (randperm), random columns, rows
    or entries (randk). state_free: sign_sgd, sgd (Z itself) or no (blocks: BAdam; svd: GaLore).
    base: what the part with moments follows; lion and sgd have betas (0.9, 0.99) and momentum,
    dampening, nesterov, sign. At density 0 nothing in the matrices has moments. `scale` and
    `state_free_scale` do not touch decay. Embedding, head and norms follow the base, full.

    The published results have descending blocks, which is the default here; the released code's is
    random. Blocks change together and always start anew; the others are staggered and may keep
    their moments. As published: solver = "svd", staggered = false.

    Source: Zmushko et al. 2024, arXiv:2411.07837, and released code. State per matrix:
    two moments of density * m n elements; svd and random also P in float32, randk int32 positions.
    """
    format = format_named(states, min_8bit, floor_codes)
    rule: SubspaceRule
    match base:
        case "adam":
            rule = Adam(betas or (0.9, 0.999), eps, bias, format)
        case "lion":
            rule = Lion(betas or (0.9, 0.99), format)
        case "sgd":
            rule = Sgd(momentum, dampening, nesterov, sign, format)
    free_share = scale * state_free_scale
    free = {
        "sign_sgd": Dense(Sgd(sign=True), multiplier=free_share),
        "sgd": Dense(Sgd(), multiplier=free_share),
        "no": None,
    }[state_free]
    matrix: Method
    if projection == "blocks":
        if on_refresh == "keep":
            raise ConfigError(
                'optimizer.on_refresh = "keep" with projection = "blocks"',
                "a matrix has no moments between its turns that it could keep",
                'on_refresh = "reset", or another projection',
            )
        matrix = Blocks(density, order, gap, Dense(rule, multiplier=scale), free)
    elif density == 0.0 and free is not None:
        matrix = free
    else:
        projector = _projector(projection, density, side, solver)
        lift: Lift
        match state_free:
            case "sign_sgd":
                noise = ROUNDING if projection in ("svd", "random") else 0.0
                lift = SignResidual(scale, state_free_scale, noise)
            case "sgd":
                lift = SgdResidual(scale, state_free_scale)
            case "no":
                lift = ProjectBack(scale)
        matrix = Projected(
            projector, rule, lift, Every(gap, staggered), on_refresh, decay_first=True
        )
    return ByRole(matrix, Dense(rule))


def _projector(projection: str, density: float, side: Sides, solver: Solver) -> Projector:
    match projection:
        case "svd":
            if side == "full":
                return LeadingPairs(density, solver)
            return LeadingVectors(density, side, solver)
        case "random":
            return RandomPairs(density) if side == "full" else RandomVectors(density, side)
        case "randperm":
            return Lines(density, side)
        case "columns":
            return Lines(density, "right", rounded=False)
        case "rows":
            return Lines(density, "left", rounded=False)
    return RandK(density)


def _sheet(lr: float, density: float, gap: int, scale: float) -> dict[str, object]:
    return {
        "lr": lr,
        "projection": "blocks",
        "order": "descending",
        "density": density,
        "gap": gap,
        "scale": scale,
    }


SPEC = MethodSpec(
    frugal,
    {size: _sheet(1e-3, 0.25, 200, 1.0) for size in ("60m", "130m", "350m", "1b")}
    | {"7b": _sheet(5e-4, 0.0, 500, 0.3)},
    "arXiv:2411.07837, released C4 scripts; the schedule restarts there",
)
