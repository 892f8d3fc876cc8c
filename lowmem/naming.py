"""The only source of randomness: seeds are a pure function of (run seed, name, counter).

Nothing depends on the order in which parameters are created or hooks fire, so a resumed run, a
fused update and another micro-batch see the same numbers, and a checkpoint holds no generator.
"""

import hashlib


def seed_of(run_seed: int, name: str, counter: int = 0) -> int:
    """A 63-bit seed for the thing called `name`, at its `counter`-th use."""
    text = f"{run_seed}/{name}/{counter}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1
