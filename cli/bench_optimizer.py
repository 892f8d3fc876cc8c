"""`lowmem bench optimizer`: one step of ours and of others on a model's weights."""

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem.cli.console import Console
from lowmem.cli.options import Given
from lowmem.cli.settings import loaded
from lowmem.config.presets import resolve_model
from lowmem.units import format_bytes

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lowmem.config.schema import ModelConfig

_PRESET = "llama-60m"
_RANK = 128
_METHODS = ("adamw", "adam8bit", "galore", "apollo", "apollo_mini", "fira")
_RANKLESS = ("adamw", "adam8bit")
_NEVER = 10_000  # updates between refreshes: the first refreshes, those that are timed do not
_REPEATS = 5

Weights = dict[str, "Tensor"]
Step = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """bytes: weights and states read and written, gradients read. ratio: to fused AdamW."""

    optimizer: str
    seconds: float
    ratio: float
    bytes: int
    of_a_copy: float


@dataclass(frozen=True)
class Contender:
    """make(weights, gradients) -> (a step, what is in its states)."""

    name: str
    make: Callable[[Weights, Weights], tuple[Step, Callable[[], list["Tensor"]]]]


def bench_optimizer(given: Given, *, as_json: bool) -> None:
    """Median of a step without a refresh, of the settings' model or of llama-60m."""
    import torch

    console = Console(quiet=given.quiet)
    model, name = _model(given, console)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    console.say(f"{name} on {device}, {torch.get_num_threads()} threads, rank {_RANK}")
    rows = list(measured(model, device))
    if as_json:
        facts = {"model": name, "device": str(device), "threads": torch.get_num_threads()}
        console.json({"schema_version": 1, **facts, "steps": [asdict(row) for row in rows]})
        return
    columns = ["optimizer", ">step", ">x fused AdamW", ">bytes", ">of a copy"]
    console.table(
        columns,
        [
            [
                row.optimizer,
                f"{1e3 * row.seconds:.1f} ms",
                f"{row.ratio:.2f}",
                format_bytes(row.bytes),
                f"{row.of_a_copy:.0%}",
            ]
            for row in rows
        ],
    )


def _model(given: Given, console: Console) -> tuple["ModelConfig", str]:
    asked = loaded(given, console).config.model
    chosen = _PRESET if asked == "auto" else asked
    return resolve_model(chosen, Path.cwd()), chosen if isinstance(chosen, str) else "the model"


def measured(model: "ModelConfig", device: "torch.device") -> Iterator[Row]:
    """Fused AdamW first, then what there is; each alone in memory."""
    from lowmem.kernels.measure import copy_bandwidth, median_seconds

    shapes, roles = _shapes(model)
    bandwidth, fused = copy_bandwidth(device), 0.0
    for contender in _contenders(roles, model.head_dim):
        weights, gradients = (_drawn(shapes, seed, device) for seed in (0, 1))
        step, states = contender.make(weights, gradients)
        seconds = median_seconds(step, device, _REPEATS)
        fused = fused or seconds
        moved = 2 * _bytes(weights.values()) + _bytes(gradients.values()) + 2 * _bytes(states())
        yield Row(contender.name, seconds, seconds / fused, moved, moved / seconds / bandwidth)


def _shapes(model: "ModelConfig") -> tuple[dict[str, tuple[int, ...]], dict[str, Any]]:
    import torch

    from lowmem.model.llama import Llama

    llama = Llama(model, dtype=torch.float32, device="meta", attention="cpu")
    return {name: tuple(p.shape) for name, p in llama.named_parameters()}, dict(llama.roles())


def _drawn(shapes: dict[str, tuple[int, ...]], seed: int, device: "torch.device") -> Weights:
    """bfloat16 on a card, where that is trained, float32 on a CPU."""
    import torch

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator, device=device).mul_(0.01).to(dtype)
        for name, shape in shapes.items()
    }


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _contenders(roles: dict[str, Any], head_dim: int) -> Iterator[Contender]:
    import torch

    yield Contender("torch AdamW, fused", _torch_step(lambda p: torch.optim.AdamW(p, fused=True)))
    for method in _METHODS:
        yield Contender(f"lowmem {method}", _our_step(method, roles, head_dim))
    if importlib.util.find_spec("bitsandbytes"):
        import bitsandbytes

        yield Contender("bitsandbytes AdamW8bit", _torch_step(bitsandbytes.optim.AdamW8bit))


def _torch_step(build: Callable[[list["Tensor"]], Any]) -> Any:
    def make(weights: Weights, gradients: Weights) -> tuple[Step, Callable[[], list["Tensor"]]]:
        for name, weight in weights.items():
            weight.requires_grad_().grad = gradients[name]
        optimizer = build(list(weights.values()))

        def states() -> list["Tensor"]:
            values = (v for state in optimizer.state.values() for v in state.values())
            return [value for value in values if hasattr(value, "element_size")]

        return optimizer.step, states

    return make


def _our_step(method: str, roles: dict[str, Any], head_dim: int) -> Any:
    def make(weights: Weights, gradients: Weights) -> tuple[Step, Callable[[], list["Tensor"]]]:
        from lowmem.config.schema import OptimizerConfig
        from lowmem.optim.assign import build_optimizer

        options: dict[str, Any] = {"method": method}
        if method not in _RANKLESS:
            rank = 1 if method == "apollo_mini" else _RANK
            options |= {"rank": rank, "gap": _NEVER, "staggered": False}
        config = OptimizerConfig.model_validate(options)
        optimizer = build_optimizer(
            config, weights, roles, mode="unfused", seed=0, head_dim=head_dim
        )

        def step() -> None:
            optimizer.begin(1e-3, 1)
            for name, gradient in gradients.items():
                optimizer.receive(name, gradient)
            optimizer.step()

        return step, lambda: [value for _, value in optimizer.state_tensors()]

    return make
