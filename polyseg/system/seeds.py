"""Seeds derived from their purpose, for random streams that have no state to save."""

import hashlib

import numpy as np


def derive_seed(*key: int | str) -> int:
    """Return a seed in [0, 2**63) for a key such as (seed, epoch, purpose).

    Equal keys give equal seeds on every machine; different keys give unrelated ones.

    >>> derive_seed(0, 3, "order") == derive_seed(0, 3, "order")
    True
    >>> derive_seed(0, 3, "order") == derive_seed(0, 4, "order")
    False
    """
    # repr distinguishes 1 from "1", and escapes line breaks.
    text = "\n".join(repr(part) for part in key)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def permutation(n: int, seed: int) -> list[int]:
    """Return the permutation of 0 to n - 1 that `torch.randperm` draws from a CPU generator.

    So schedules can be recomputed without torch, and do not depend on its version.

    >>> permutation(5, seed=0)
    [4, 0, 1, 3, 2]
    """
    draws = np.random.RandomState(seed % 2**32).randint(0, 2**32, size=n, dtype=np.uint32)
    order = list(range(n))
    for i, draw in enumerate(draws.tolist()):
        j = i + draw % (n - i)
        order[i], order[j] = order[j], order[i]
    return order
