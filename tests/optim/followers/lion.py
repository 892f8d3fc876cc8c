"""Follow `lion__*` and `eight_bit_lion__*`."""

from typing import Any

from lowmem.optim.formats import tensor
from lowmem.optim.methods import build_method
from lowmem.optim.optimizer import Optimizer
from tests.optim.followers.oracle import Oracle, Outcome, codes_agree, judge, run


def follow(oracle: Oracle) -> Outcome:
    """Weights, and in 8 bits the codes and scales of every recorded update."""
    about = oracle.about
    options: dict[str, Any] = {"betas": tuple(about["betas"])}
    if about["method"] == "eight_bit_lion":
        options |= {"states": "8bit", "min_8bit": about["min_8bit_size"]}
    differing: list[str] = []

    def after(done: int, optimizer: Optimizer) -> None:
        differing.extend(state_differences(oracle, done, optimizer))

    methods = dict.fromkeys(about["shapes"], build_method("lion", options).matrix)
    _, error = run(oracle, methods, after=after)
    return judge(oracle, error, differing)


def state_differences(oracle: Oracle, done: int, optimizer: Optimizer) -> list[str]:
    """Keys of the recorded codes and scales that ours do not match."""
    found = []
    for name, slot in optimizer.slots.items():
        codes, absmax = (oracle.tensors.get(f"state.{done}.{name}.{k}1") for k in _RECORDED)
        if codes is not None and not codes_agree(tensor(slot.state, "exp_avg.codes"), codes):
            found.append(f"codes.{done}.{name}")
        # A sum in another order may move the last bit.
        if absmax is not None and not tensor(slot.state, "exp_avg.absmax").allclose(absmax, 1e-6):
            found.append(f"absmax.{done}.{name}")
    return found


_RECORDED = ("state", "absmax")
