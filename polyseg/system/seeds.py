"""Random streams without state: each is derived from what it is for, so nothing has to be kept."""

import hashlib

import numpy as np


def derive_seed(*key: int | str) -> int:
    """Return the seed in [0, 2**63) that belongs to a key such as (seed, epoch, purpose).

    Equal keys give equal seeds on every machine; keys that differ give unrelated ones.

    >>> derive_seed(0, 3, "order") == derive_seed(0, 3, "order")
    True
    >>> derive_seed(0, 3, "order") == derive_seed(0, 4, "order")
    False
    """
    # repr tells 1 from "1", and the separator cannot occur unescaped inside it.
    text = "\n".join(repr(part) for part in key)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def permutation(n: int, seed: int) -> list[int]:
    """Return 0 to n - 1 in the order that `torch.randperm` gives from a CPU generator of this seed.

    Without torch, so that a recorded schedule can be recomputed without it, and the same whatever
    its version.

    >>> permutation(5, seed=0)
    [4, 0, 1, 3, 2]
    """
    draws = np.random.RandomState(seed % 2**32).randint(0, 2**32, size=n, dtype=np.uint32)
    order = list(range(n))
    for i, draw in enumerate(draws.tolist()):
        j = i + draw % (n - i)
        order[i], order[j] = order[j], order[i]
    return order
