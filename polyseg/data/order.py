"""Shuffle the training images of each epoch."""

from collections.abc import Sequence

from polyseg.system.seeds import derive_seed, permutation


def epoch_order(ids: Sequence[str], *, batch_size: int, seed: int, epoch: int) -> list[list[str]]:
    """Return the images of each batch of an epoch, which follow from the arguments alone.

    >>> epoch_order(["a", "b", "c"], batch_size=2, seed=0, epoch=1)
    [['b', 'c'], ['a']]
    """
    shuffled = [ids[i] for i in permutation(len(ids), derive_seed(seed, epoch, "order"))]
    return [shuffled[i : i + batch_size] for i in range(0, len(ids), batch_size)]
