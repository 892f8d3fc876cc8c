"""CPU time of one optimizer step on the parameters of LLaMA-60M, beside the authors' packages.

    python tests/benchmarks/optimizer_step.py --rounds 4

One thread, process CPU time, a fresh process for every measurement, rounds in turn, median of
medians; memory stays with the process (without that, returning temporaries to the system costs
half as much again). float32 weights, gradients and states; rank 128 (Mini: 1). Every fourth step
refreshes the subspace; the cost of a step is that of a plain one plus 1/200 of what a refresh adds.
Needs galore-torch, apollo-torch, fira and bitsandbytes for the rows that compare with them.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

GAP, STEPS, PUBLISHED_GAP = 4, 9, 200
PAIRS = {  # ours -> (the package's, the ratio that we aim at)
    "galore": ("galore_torch", 0.50),
    "apollo": ("apollo_torch", 0.42),
    "apollo_mini": ("apollo_torch mini", 0.35),
    "fira": ("fira package", 0.37),
}
ALONE = ("torch fused adamw", "adamw")
Tensors = dict[str, Any]
Roles = dict[str, str]


def parameters() -> tuple[Tensors, Tensors, Roles]:
    """(weights, gradients, roles) of LLaMA-60M."""
    import torch

    from lowmem.config.presets import read_preset
    from lowmem.model.llama import Llama

    model = Llama(read_preset("llama-60m"), dtype=torch.float32, device="meta", attention="cpu")
    torch.manual_seed(0)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    weights = {name: 0.02 * torch.randn(shape) for name, shape in shapes.items()}
    return (
        weights,
        {name: 1e-3 * torch.randn(shape) for name, shape in shapes.items()},
        model.roles(),
    )


def ours(name: str, weights: Tensors, grads: Tensors, roles: Roles) -> Callable[[], None]:
    from lowmem.config.schema import OptimizerConfig
    from lowmem.optim.assign import build_optimizer

    options: dict[str, Any] = {"method": name}
    if name != "adamw":
        options |= {"rank": 1 if "mini" in name else 128, "gap": GAP, "staggered": False}
    config = OptimizerConfig.model_validate(options)
    optimizer = build_optimizer(config, weights, roles, mode="unfused", seed=0, head_dim=64)

    def step() -> None:
        optimizer.begin(1e-3, 1)
        for key, grad in grads.items():
            optimizer.receive(key, grad)
        optimizer.step()

    return step


def theirs(name: str, weights: Tensors, grads: Tensors, roles: Roles) -> Callable[[], None]:
    import torch

    from lowmem.cli.bench_peers import PEERS, is_matrix

    for key, weight in weights.items():
        weight.requires_grad_()
        weight.grad = grads[key]
    matrices = [w for k, w in weights.items() if is_matrix(roles[k])]
    others = [w for k, w in weights.items() if not is_matrix(roles[k])]
    optimizer: Any
    if name == "torch fused adamw":
        optimizer = torch.optim.AdamW(weights.values(), lr=1e-3, fused=True)
    else:
        own = next(ours for ours, (package, _) in PAIRS.items() if package == name)
        peer = next(peer for peer in PEERS if peer.method == own)
        optimizer = peer.build(matrices, others, GAP)
    return lambda: optimizer.step()


def measure(name: str) -> dict[str, float]:
    """Milliseconds of CPU: a plain step, a step with a refresh, and the two amortised."""
    import torch

    torch.set_num_threads(1)
    weights, grads, roles = parameters()
    known = ours if name in (*PAIRS, "adamw") else theirs
    work = {key: grad.clone() for key, grad in grads.items()}
    step = known(name, weights, work, roles)
    times = []
    for _ in range(STEPS):
        for key, grad in grads.items():
            work[key].copy_(grad)  # a step may consume them
        began = time.process_time()
        step()
        times.append(1e3 * (time.process_time() - began))
    plain = statistics.median(t for i, t in enumerate(times) if i % GAP)
    refresh = statistics.median(t for i, t in enumerate(times) if i and not i % GAP)
    amortised = plain + max(0.0, refresh - plain) / PUBLISHED_GAP
    return {"plain": plain, "refresh": refresh, "amortised": amortised}


def fresh(name: str) -> dict[str, float]:
    """`measure` in a process of its own."""
    settled = {
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(2**36),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, __file__, "--one", name]
    done = subprocess.run(
        command, env=os.environ | settled, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--only", action="append", help="a method of ours; may be repeated")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one)))
        return
    pairs = {k: v for k, v in PAIRS.items() if not arguments.only or k in arguments.only}
    names = [*ALONE, *(name for own, (peer, _) in pairs.items() for name in (own, peer))]
    rounds = [{name: fresh(name) for name in names} for _ in range(arguments.rounds)]

    def median(name: str, what: str) -> float:
        return statistics.median(one[name][what] for one in rounds)

    print("| method | ours ms | refresh | package ms | refresh | ratio, amortised | aim |")
    print("|---|---|---|---|---|---|---|")
    for own, (peer, aim) in pairs.items():
        ratio = median(own, "amortised") / median(peer, "amortised")
        cells = [f"{median(n, w):.0f}" for n in (own, peer) for w in ("plain", "refresh")]
        print(f"| {own} | {' | '.join(cells)} | {ratio:.2f} | {aim:.2f} |")
    for name in ALONE:
        print(f"| {name} | {median(name, 'plain'):.0f} | | | | | |")


if __name__ == "__main__":
    main()
