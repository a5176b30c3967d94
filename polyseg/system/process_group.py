"""The processes that share the work of a command: which one this is, its part, and how they meet.

`torchrun` starts them and tells each its number; they meet over gloo, or nccl where each has a GPU.
The first of them leads: it alone writes and speaks. Without `torchrun` there is one process.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast

from polyseg.errors import PolysegError

if TYPE_CHECKING:
    from torch import Tensor
    from torch import device as Device  # noqa: N812

T = TypeVar("T")

_ENDED = ("Connection closed", "Connection reset", "Connection refused", "Broken pipe", "Timed out")
"""In what a collective says when one of the processes is no longer there."""
_TOLD = ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")
_OTHER_ENDED = (
    "another process of this command has ended, and so does this one; what it said tells why, and "
    "a training goes on from its last epoch by --resume"
)
PATIENCE = timedelta(days=2)
"""To wait for a process that has more to do than the others; where one ends `torchrun` ends all."""


@dataclass(frozen=True)
class Processes:
    """This process among those that share the work.

    >>> Processes(rank=1, count=3).rows(8), Processes(rank=1, count=3).share("abcde")
    (slice(3, 6, None), ['b', 'e'])
    """

    rank: int = 0
    count: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def rows(self, total: int) -> slice:
        """Return the rows that are this process's of a batch of so many images.

        Of what cannot be divided evenly the leading process has most.
        """
        start, stop = (-(-total * end // self.count) for end in (self.rank, self.rank + 1))
        return slice(start, stop)

    def share(self, items: Sequence[T]) -> list[T]:
        """Return this process's share of what can be done in any order."""
        return list(items[self.rank :: self.count])

    def gathered(self, mine: T) -> list[T]:
        """Return what each process has, by its number."""
        if self.count == 1:
            return [mine]
        from torch import distributed

        found: list[Any] = [None] * self.count
        distributed.all_gather_object(found, mine)
        return found

    def joined(self, mine: Sequence[T]) -> list[T]:
        """Return what came of each item, in the items' order, of which each process did its share.

        >>> items = "abc"
        >>> ALONE.joined([item.upper() for item in ALONE.share(items)])
        ['A', 'B', 'C']
        """
        parts = self.gathered(list(mine))
        return [parts[i % self.count][i // self.count] for i in range(sum(map(len, parts)))]

    def from_leader(self, mine: T | None) -> T:
        """Return what the leading process has."""
        if self.count == 1:
            return cast(T, mine)
        from torch import distributed

        found = [mine]
        distributed.broadcast_object_list(found, src=0)
        return cast(T, found[0])

    def take_from_leader(self, values: "Iterable[Tensor]") -> None:
        """Put into tensors what the leading process has in them."""
        if self.count == 1:
            return
        from torch import distributed

        for one in values:
            distributed.broadcast(one, src=0)

    def all(self, mine: bool) -> bool:
        """Return whether it holds in all of the processes."""
        return all(self.gathered(mine))

    def entered_by_leader(
        self, stack: contextlib.ExitStack, block: contextlib.AbstractContextManager[T]
    ) -> T:
        """Enter a block in the leading process alone, until the stack ends; return what it yields.

        The others go on once it is entered.
        """
        return self.from_leader(stack.enter_context(block) if self.leads else None)

    @contextlib.contextmanager
    def failing_together(self) -> Iterator[None]:
        """Let an error leave the block when all processes have come to its end, and then end all.

        So nothing in it is still at work when the one that failed, or leads, tidies up.

        Raises:
            PolysegError: another process failed.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as found:
            error = found
        well = self.all(error is None)
        if error is not None:
            raise error
        if not well:
            raise PolysegError(_OTHER_ENDED)


ALONE = Processes()


def rank_here() -> int:
    """Return which of the processes that `torchrun` has started this is; 0 without it.

    It is known before they meet, so that only one of them speaks from the beginning.
    """
    return int(os.environ["RANK"]) if _count_here() > 1 else 0


@contextlib.contextmanager
def together(device: "Device", patience: timedelta | None = None) -> Iterator[Processes]:
    """Meet the other processes, if there are any, for the length of the block.

    Args:
        device: where this process computes.
        patience: how long to wait for another one; torch knows where nothing is said.

    Raises:
        PolysegError: they do not meet, or one of them ends before the block does.
    """
    if _count_here() == 1:
        yield ALONE
        return
    from torch import cuda, distributed

    with _explaining_the_end_of_others():
        if device.type == "cuda":
            place, there = int(os.environ.get("LOCAL_RANK", "0")), cuda.device_count()
            if place >= there:
                raise PolysegError(
                    f"torchrun: process {place} of this machine has no GPU of its own, of which "
                    f"there are {there}; lower --nproc-per-node"
                )
            cuda.set_device(place)
        backend = "nccl" if device.type == "cuda" else "gloo"
        distributed.init_process_group(backend, timeout=patience)
        try:
            yield Processes(distributed.get_rank(), distributed.get_world_size())
        finally:
            distributed.destroy_process_group()


def _count_here() -> int:
    """Return how many processes there are, if all is there that `torchrun` tells them."""
    told = {name: os.environ.get(name, "") for name in _TOLD}
    numbers = (told["WORLD_SIZE"], told["RANK"])
    if not all(told.values()) or not all(number.isdecimal() for number in numbers):
        return 1
    return int(told["WORLD_SIZE"])


@contextlib.contextmanager
def _explaining_the_end_of_others() -> Iterator[None]:
    from torch import distributed

    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, distributed.DistError) or any(s in str(error) for s in _ENDED)):
            raise
        raise PolysegError(_OTHER_ENDED) from None
