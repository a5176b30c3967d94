"""The processes of one command: their ranks, their shares of the work and their communication.

`torchrun` starts them; they communicate by NCCL where each has a GPU, otherwise by Gloo. Only the
leader, rank 0, writes files and messages. Without `torchrun` there is one process.
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
"""Parts of the messages of a collective operation when another process has ended."""
_VARIABLES = ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")
_OTHER_ENDED = (
    "another process of this command has ended, so this one ends too; see its message; --resume "
    "continues a training from its last epoch"
)
PATIENCE = timedelta(days=2)
"""Longest time to wait for a slower process; torchrun itself ends all when one ends."""


@dataclass(frozen=True)
class Processes:
    """The rank of this process and the number of processes.

    >>> Processes(rank=1, count=3).rows(8), Processes(rank=1, count=3).share("abcde")
    (slice(3, 6, None), ['b', 'e'])
    """

    rank: int = 0
    count: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes files and messages."""
        return self.rank == 0

    def rows(self, total: int) -> slice:
        """Return this process's rows of a batch; the first ranks get the larger parts."""
        start, stop = (-(-total * end // self.count) for end in (self.rank, self.rank + 1))
        return slice(start, stop)

    def share(self, items: Sequence[T]) -> list[T]:
        """Return this process's share of items that can be worked on in any order."""
        return list(items[self.rank :: self.count])

    def gathered(self, mine: T) -> list[T]:
        """Return the values of all processes, by rank."""
        if self.count == 1:
            return [mine]
        from torch import distributed

        found: list[Any] = [None] * self.count
        distributed.all_gather_object(found, mine)
        return found

    def joined(self, mine: Sequence[T]) -> list[T]:
        """Return the results of all processes in the order of the items given to `share`."""
        parts = self.gathered(list(mine))
        return [parts[i % self.count][i // self.count] for i in range(sum(map(len, parts)))]

    def from_leader(self, mine: T | None) -> T:
        """Return the leader's value."""
        if self.count == 1:
            return cast(T, mine)
        from torch import distributed

        found = [mine]
        distributed.broadcast_object_list(found, src=0)
        return cast(T, found[0])

    def take_from_leader(self, values: "Iterable[Tensor]") -> None:
        """Overwrite tensors with the leader's."""
        if self.count == 1:
            return
        from torch import distributed

        for one in values:
            distributed.broadcast(one, src=0)

    def all(self, mine: bool) -> bool:
        """Return whether a condition holds in all processes."""
        return all(self.gathered(mine))

    def entered_by_leader(
        self, stack: contextlib.ExitStack, block: contextlib.AbstractContextManager[T]
    ) -> T:
        """Enter a context in the leader until the stack closes; return its value in all."""
        return self.from_leader(stack.enter_context(block) if self.leads else None)

    @contextlib.contextmanager
    def failing_together(self) -> Iterator[None]:
        """Wait for all processes at the end of the block, then raise if any of them failed.

        Then no process is still working when another one cleans up.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as found:
            error = found
        all_succeeded = self.all(error is None)
        if error is not None:
            raise error
        if not all_succeeded:
            raise PolysegError(_OTHER_ENDED)


ALONE = Processes()


def rank_here() -> int:
    """Return this process's rank, also before the processes are connected; 0 without `torchrun`."""
    return int(os.environ["RANK"]) if _count_here() > 1 else 0


@contextlib.contextmanager
def together(device: "Device", patience: timedelta | None = None) -> Iterator[Processes]:
    """Connect the processes, if there are several, for the length of the block.

    `patience` is the longest time to wait for another process; None for torch's default. A process
    that cannot connect, or ends before the block does, raises PolysegError in the others.
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
                    f"torchrun: process {place} has no GPU for itself; this machine has {there}; "
                    "lower --nproc-per-node"
                )
            cuda.set_device(place)
        backend = "nccl" if device.type == "cuda" else "gloo"
        distributed.init_process_group(backend, timeout=patience)
        try:
            yield Processes(distributed.get_rank(), distributed.get_world_size())
        finally:
            distributed.destroy_process_group()


def _count_here() -> int:
    """Return the number of processes; 1 unless all variables of `torchrun` are set."""
    found = {name: os.environ.get(name, "") for name in _VARIABLES}
    numbers = (found["WORLD_SIZE"], found["RANK"])
    if not all(found.values()) or not all(number.isdecimal() for number in numbers):
        return 1
    return int(found["WORLD_SIZE"])


@contextlib.contextmanager
def _explaining_the_end_of_others() -> Iterator[None]:
    from torch import distributed

    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, distributed.DistError) or any(s in str(error) for s in _ENDED)):
            raise
        raise PolysegError(_OTHER_ENDED) from None
