"""`lowmem bench optimizer`: one step of ours and of others on a model's weights."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem.cli.bench_peers import PEERS, RANK, Peer, is_matrix
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
_METHODS = (
    *("adamw", "adam8bit", "galore", "natural_galore", "q_galore", "apollo", "apollo_mini"),
    *("fira", "frugal", "cosmos"),
)
_NEVER = 10_000  # updates between refreshes: the first refreshes, those that are timed do not
_REPEATS = 5

Weights = dict[str, "Tensor"]
Step = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """bytes: weights and states read and written, gradients read. ratio: to fused AdamW.

    of_peer: ours over what another package's optimizer of the same method takes; None of others,
    and where there is none. missing: what keeps a package from being measured; all else is None.
    """

    optimizer: str
    seconds: float | None = None
    ratio: float | None = None
    bytes: int | None = None
    of_a_copy: float | None = None
    of_peer: float | None = None
    missing: str = ""


@dataclass(frozen=True)
class Contender:
    """make(weights, gradients) -> (a step, what is in its states). method: which it is."""

    name: str
    make: Callable[[Weights, Weights], tuple[Step, Callable[[], list["Tensor"]]]]
    method: str = ""
    ours: bool = False
    missing: str = ""


def bench_optimizer(given: Given, *, as_json: bool) -> None:
    """Median of a step without a refresh, of the settings' model or of llama-60m."""
    import torch

    console = Console(quiet=given.quiet)
    model, name = _model(given, console)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    console.say(f"{name} on {device}, {torch.get_num_threads()} threads, rank {RANK}")
    rows = compared(list(measured(model, device)))
    if as_json:
        facts = {"model": name, "device": str(device), "threads": torch.get_num_threads()}
        console.json({"schema_version": 1, **facts, "steps": [asdict(row) for _, row in rows]})
        return
    columns = ["optimizer", ">step", ">x fused AdamW", ">x package", ">bytes", ">of a copy", ""]
    console.table(columns, [_cells(row) for _, row in rows])


def _cells(row: Row) -> list[str]:
    if row.seconds is None or row.ratio is None or row.bytes is None or row.of_a_copy is None:
        return [row.optimizer, *[""] * 5, row.missing]
    of_peer = "" if row.of_peer is None else f"{row.of_peer:.2f}"
    share = f"{row.of_a_copy:.0%}"
    times = [f"{1e3 * row.seconds:.1f} ms", f"{row.ratio:.2f}", of_peer]
    return [row.optimizer, *times, format_bytes(row.bytes), share, ""]


def compared(rows: list[tuple["Contender", Row]]) -> list[tuple["Contender", Row]]:
    """The same with `of_peer` of ours."""
    theirs = {c.method: row.seconds for c, row in rows if not c.ours and c.method}

    def beside(contender: Contender, row: Row) -> Row:
        peer = theirs.get(contender.method)
        if not contender.ours or row.seconds is None or peer is None:
            return row
        return replace(row, of_peer=row.seconds / peer)

    return [(contender, beside(contender, row)) for contender, row in rows]


def _model(given: Given, console: Console) -> tuple["ModelConfig", str]:
    asked = loaded(given, console).config.model
    chosen = _PRESET if asked == "auto" else asked
    return resolve_model(chosen, Path.cwd()), chosen if isinstance(chosen, str) else "the model"


def measured(model: "ModelConfig", device: "torch.device") -> Iterator[tuple[Contender, Row]]:
    """Fused AdamW first, then ours, each followed by its peer; each alone in memory."""
    from lowmem.kernels.measure import copy_bandwidth, median_seconds

    shapes, roles = _shapes(model)
    bandwidth, fused = copy_bandwidth(device), 0.0
    for contender in _contenders(roles, model.head_dim):
        if contender.missing:
            yield contender, Row(contender.name, missing=contender.missing)
            continue
        weights, gradients = (_drawn(shapes, seed, device) for seed in (0, 1))
        step, states = contender.make(weights, gradients)
        seconds = median_seconds(step, device, _REPEATS)
        fused = fused or seconds
        moved = 2 * _bytes(weights.values()) + _bytes(gradients.values()) + 2 * _bytes(states())
        ratio, share = seconds / fused, moved / seconds / bandwidth
        yield contender, Row(contender.name, seconds, ratio, moved, share)


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

    fused = _torch_step(lambda weights: torch.optim.AdamW(weights.values(), fused=True))
    yield Contender("torch AdamW, fused", fused, "adamw")
    peers = {peer.method: peer for peer in PEERS}
    for method in _METHODS:
        yield Contender(f"lowmem {method}", _our_step(method, roles, head_dim), method, ours=True)
        peer = peers.get(method)
        if peer is not None:
            missing = "" if peer.installed else f"not installed: pip install {peer.package}"
            yield Contender(peer.name, _peer_step(peer, roles), method, missing=missing)


def _peer_step(peer: Peer, roles: dict[str, Any]) -> Any:
    def build(weights: Weights) -> Any:
        matrices = [w for name, w in weights.items() if is_matrix(roles[name])]
        others = [w for name, w in weights.items() if not is_matrix(roles[name])]
        return peer.build(matrices, others, _NEVER)

    return _torch_step(build)


def _torch_step(build: Callable[[Weights], Any]) -> Any:
    def make(weights: Weights, gradients: Weights) -> tuple[Step, Callable[[], list["Tensor"]]]:
        for name, weight in weights.items():
            weight.requires_grad_().grad = gradients[name]
        optimizer = build(weights)

        def states() -> list["Tensor"]:
            values = (v for state in optimizer.state.values() for v in state.values())
            return [value for value in values if hasattr(value, "element_size")]

        return optimizer.step, states

    return make


def _our_step(method: str, roles: dict[str, Any], head_dim: int) -> Any:
    def make(weights: Weights, gradients: Weights) -> tuple[Step, Callable[[], list["Tensor"]]]:
        from lowmem.config.schema import OptimizerConfig
        from lowmem.optim.assign import build_optimizer
        from lowmem.optim.methods import method_spec

        options: dict[str, Any] = {"method": method}
        takes = method_spec(method).arguments
        rank = 1 if method == "apollo_mini" else RANK
        wanted = {"rank": rank, "gap": _NEVER, "staggered": False}
        options |= {key: value for key, value in wanted.items() if key in takes}
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
