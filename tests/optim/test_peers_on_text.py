"""The authors' packages on the gradients of a small LLaMA that learns real text.

Both sides start from the same weights and get the same recorded gradients for 60 updates with three
refreshes; training apart would amplify rounding instead of showing errors. Random projections are
the package's own, and signs of singular vectors, which are arbitrary, follow it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lowmem.config.schema import ModelConfig, OptimizerConfig
from lowmem.data.batches import Batches
from lowmem.data.shards import Corpus
from lowmem.model.llama import Llama
from lowmem.optim.assign import build_optimizer
from lowmem.optim.formats import State
from lowmem.optim.method import ByRole, Method, Projected
from lowmem.optim.methods import build_method
from lowmem.optim.optimizer import Optimizer
from lowmem.optim.place import Place
from lowmem.optim.projectors import SVD, QuantizedSVD, lift_back, project, projects_right
from lowmem.optim.step import gather
from lowmem.optim.weights import Step
from tests.model.sinks import Whole

UPDATES, GAP, RANK, LR, DECAY = 60, 20, 8, 1e-3, 0.1
TOLERANCE = 1e-5  # of the movement: 60 updates in float32 whose products are summed otherwise


@dataclass(frozen=True)
class Recording:
    """weights: at the start. gradients: of every update."""

    weights: dict[str, Tensor]
    gradients: list[dict[str, Tensor]]
    roles: dict[str, str]

    def is_matrix(self, name: str) -> bool:
        return self.roles[name].startswith(("attention", "mlp"))


@pytest.fixture(scope="module")
def recording(tiny_corpus: Corpus) -> Recording:
    """AdamW learns; what it was fed is kept."""
    shape = {
        "hidden_size": 32,
        "intermediate_size": 88,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": tiny_corpus.vocab_size,
    }
    model = Llama(ModelConfig.model_validate(shape), dtype=torch.float32, device="cpu")
    model.initialise(0)
    weights = dict(model.named_parameters())
    start = {name: weight.detach().clone() for name, weight in weights.items()}
    config = OptimizerConfig(method="adamw")
    optimizer = build_optimizer(
        config, weights, model.roles(), mode="unfused", seed=0, head_dim=model.config.head_dim
    )
    seen: list[dict[str, Tensor]] = []

    def record(name: str, gradient: Tensor) -> None:
        seen[-1][name] = gradient.detach().clone()
        optimizer.receive(name, gradient)

    model.sink = Whole(model, record)
    assert tiny_corpus.train is not None
    batches = Batches(tiny_corpus.train, seq_len=32, rows_per_update=4, seed=0)
    for update in range(UPDATES):
        batch = batches.of(update)
        seen.append({})
        gather(
            model,
            optimizer,
            list(batch.micro_batches(4)),
            count=1,
            tokens=batch.tokens,
            lr=3e-3,
            clip=None,
        )
        optimizer.step()
    return Recording(start, seen, model.roles())


@dataclass(frozen=True)
class SameSigns:
    """Our SVD, whose vectors must be the package's up to sign and get its signs."""

    matrix: Callable[[], Tensor]
    inner: SVD = SVD(RANK, solver="svd")  # noqa: RUF009 - frozen

    def init(self, state: State, weight: Tensor, place: Place) -> None:
        self.inner.init(state, weight, place)

    def refresh(self, grad: Tensor, state: State) -> None:
        self.inner.refresh(grad, state)
        wanted = self.matrix().T if state["right"] else self.matrix()
        basis = self.inner.basis(state)
        basis.mul_((basis * wanted).sum(dim=0).sign())
        torch.testing.assert_close(basis, wanted, atol=1e-6, rtol=0)  # the same float32 SVD

    def basis(self, state: State) -> Tensor:
        return self.inner.basis(state)

    def down(self, full: Tensor, state: State) -> Tensor:
        return self.inner.down(full, state)

    def up(self, low: Tensor, state: State) -> Step:
        return self.inner.up(low, state)


@dataclass(frozen=True)
class Theirs:
    """A projector whose random matrix is looked up in the package's own state at every use.

    matrix: () -> (r, n) on the right, (m, r) on the left.
    """

    matrix: Callable[[], Tensor]

    def init(self, state: State, weight: Tensor, place: Place) -> None:
        state["right"] = int(projects_right("std", weight.shape))

    def refresh(self, grad: Tensor, state: State) -> None:
        """The package has done it."""

    def basis(self, state: State) -> Tensor:
        return self.matrix().T if state["right"] else self.matrix()

    def down(self, full: Tensor, state: State) -> Tensor:
        if state["step"] == 0 and not state.get("used"):
            rows, columns = full.shape  # `init` asks for the shape before there is a matrix
            state["used"] = 1
            return full.new_zeros((rows, RANK) if state["right"] else (RANK, columns))
        return project(full, self.basis(state), bool(state["right"]))

    def up(self, low: Tensor, state: State) -> Step:
        return lift_back(low, self.basis(state), bool(state["right"]))


def package(name: str, groups: list[dict[str, Any]]) -> Any:
    """The reference optimizer; skips where it is not installed."""
    if name == "galore":
        peer = pytest.importorskip("galore_torch", reason="galore-torch is a development extra")
        return peer.GaLoreAdamW(groups, lr=LR, weight_decay=DECAY, no_deprecation_warning=True)
    if name == "fira":
        peer = pytest.importorskip("fira", reason="fira is a development extra")
        groups[1]["alpha"] = groups[1].pop("scale")
        return peer.FiraAdamW(groups, lr=LR, weight_decay=DECAY, no_deprecation_warning=True)
    peer = pytest.importorskip("apollo_torch", reason="apollo-torch is a development extra")
    mini = name == "apollo_mini"
    groups[1] |= {"proj": "random", "scale_type": "tensor" if mini else "channel"}
    return peer.APOLLOAdamW(groups, lr=LR, weight_decay=DECAY)


OPTIONS: dict[str, dict[str, Any]] = {
    "galore": {"rank": RANK, "gap": GAP, "scale": 0.25, "staggered": False},
    "fira": {"rank": RANK, "gap": GAP, "alpha": 0.25, "staggered": False},
    "apollo": {"rank": RANK, "gap": GAP, "scale": 1.0, "staggered": False},
    "apollo_mini": {"rank": RANK, "gap": GAP, "scale": 128.0, "staggered": False},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_the_movement_of_every_weight_is_the_packages(recording: Recording, name: str) -> None:
    theirs = {key: w.clone().requires_grad_() for key, w in recording.weights.items()}
    ours = {key: w.clone() for key, w in recording.weights.items()}
    matrices = [key for key in ours if recording.is_matrix(key)]
    groups: list[dict[str, Any]] = [
        {"params": [theirs[key] for key in ours if key not in matrices]},
        {
            "params": [theirs[key] for key in matrices],
            "rank": RANK,
            "update_proj_gap": GAP,
            "scale": float(OPTIONS[name].get("scale", 0.25)),
            "proj_type": "std",
        },
    ]
    reference = package(name, groups)
    optimizer = Optimizer("unfused", seed=0)
    built = build_method(name, OPTIONS[name])
    for key, weight in ours.items():
        method = steered(built, reference, theirs[key]) if key in matrices else built.other
        optimizer.add(key, weight, method, DECAY)
    for gradients in recording.gradients:
        for key, gradient in gradients.items():
            theirs[key].grad = gradient.clone()
        reference.step()
        optimizer.begin(LR, 1)
        for key, gradient in gradients.items():
            optimizer.receive(key, gradient.clone())
        optimizer.step()
    for key, distance in distances(recording, ours, theirs):
        assert distance <= TOLERANCE, key


def steered(built: ByRole, reference: Any, weight: Tensor) -> Method:
    """Our method with the package's projection of that weight."""
    assert isinstance(built.matrix, Projected)
    follow = SameSigns if isinstance(built.matrix.projector, SVD) else Theirs
    return replace(
        built.matrix, projector=follow(lambda: reference.state[weight]["projector"].ortho_matrix)
    )


def distances(
    recording: Recording, ours: dict[str, Tensor], theirs: dict[str, Tensor]
) -> Iterator[tuple[str, float]]:
    """Per weight |our movement - theirs| / |their movement|."""
    for key, start in recording.weights.items():
        movement = theirs[key].detach() - start
        yield key, ((ours[key] - theirs[key].detach()).norm() / movement.norm()).item()


@dataclass(frozen=True)
class SameSignsInCodes(QuantizedSVD):
    """Our 4-bit basis with the signs that the package has chosen."""

    matrix: Callable[[], Tensor] = torch.Tensor

    def store(self, state: State, new: Tensor, usable: Tensor) -> None:
        wanted = self.matrix().T if state["right"] else self.matrix()
        super().store(state, new * (new * wanted).sum(dim=0).sign(), usable)


def test_q_galore_follows_the_packages_projector(recording: Recording) -> None:
    """The package's step needs bitsandbytes below 0.44, its projector does not.

    Around it stands torch's own Adam, so that bases, codes, gaps and the way back are compared.
    """
    peer = pytest.importorskip("q_galore_torch.q_galore_projector", reason="a development extra")
    options = {
        **{"rank": RANK, "gap": 5, "scale": 0.25, "solver": "svd", "staggered": False},
        **{"basis_group": 64, "similarity": "first", "clear_queue": False, "gap_limit": 1e9},
        **{"theta": 0.4, "gamma": 2.0, "queue": 2, "states": "fp32"},
    }
    method = build_method("q_galore", options).matrix
    assert isinstance(method, Projected)
    doubled = 0
    for name in filter(recording.is_matrix, recording.weights):
        theirs, ours = recording.weights[name].clone(), recording.weights[name].clone()
        projector = peer.GaLoreProjector(
            **{"rank": RANK, "update_proj_gap": 5, "scale": 0.25, "queue_size": 2},
            **{"quant": True, "group_size": 64, "n_bit": 4, "cos_threshold": 0.4, "gamma_proj": 2},
        )

        def dequantised(projector: Any = projector) -> Tensor:
            values = projector.ortho_matrix - projector.ortho_matrix_zeros
            basis: Tensor = (projector.ortho_matrix_scales * values).view(
                projector.ortho_matrix_shape
            )
            return basis

        own = vars(method.projector) | {"span_zero": False}
        follow = SameSignsInCodes(**own, matrix=dequantised)
        optimizer = Optimizer("unfused", seed=0)
        optimizer.add(name, ours, replace(method, projector=follow), 0.0)
        low: torch.nn.Parameter | None = None
        for update, gradients in enumerate(recording.gradients):
            image = projector.project(gradients[name], update)
            if low is None:
                low = torch.nn.Parameter(torch.zeros_like(image))
                adam = torch.optim.Adam([low], lr=1.0, betas=method.rule.betas, eps=1e-8)  # type: ignore[attr-defined]
            low.data.zero_()
            low.grad = image
            adam.step()
            theirs += LR * projector.project_back(low.data)
            optimizer.begin(LR, 1)
            optimizer.receive(name, gradients[name].clone())
            optimizer.step()
        assert optimizer.slots[name].state["gap"] == projector.update_proj_gap
        doubled += projector.update_proj_gap > 5
        movement = theirs - recording.weights[name]
        assert (ours - theirs).norm() <= TOLERANCE * movement.norm(), name
    assert doubled  # the lazy gap has been at work
