"""Process groups of one epoch, inside living processes.

A group is built directly over `PrefixStore("epoch/<n>", store)` and is never the default group, so that a process can
leave one world and enter the next. Two planes: *control* (counts and headers; always gloo, always on the CPU) and
*data* (rows; gloo on the CPU or NCCL on a GPU). Rank order: attention members first, then slots.

What gloo does, and what follows from it (torch 2.13):
- A dead peer ends every pending operation with an error within milliseconds. There is no abort: `abort()` and
  `shutdown()` return at once and do nothing. Connections close when the group *and every Work object* are gone, so
  transfers belong to the group and close() drops them. Until then the peers would wait for us.
- The first timeout closes all connections of the group. So the timeout must be longer than any member computes between
  two collectives, and nothing polls.
- Operations start in the order in which they are posted and run side by side on two threads, so a receive may be posted
  before what it depends on, as long as every member posts in the same order.

The NCCL data plane needs `TORCH_NCCL_ASYNC_ERROR_HANDLING=0` in the process, else a dead peer ends the process. It
cannot run on a machine without GPUs; there only the choice of backend is tested.
"""

import ipaddress
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed import ProcessGroup, ProcessGroupGloo

from dispatch.epoch import GroupBroken, World
from dispatch.store import StoreClients

_CPU = torch.device("cpu")


class Transfer:
    """A collective under way."""

    def __init__(self, group: "EpochGroup", work: dist.Work, doing: str) -> None:
        self._group = group
        self._work: dist.Work | None = work
        self._doing = doing

    def wait(self) -> None:
        """Wait until it is done (gloo) or until the current stream waits for it (NCCL).

        Raises:
            GroupBroken: a member died, did not answer in time, or the group has been closed meanwhile.
        """
        self._group._under_way.discard(self)
        work, self._work = self._work, None
        if work is None:
            raise GroupBroken(self._group.epoch, self._doing, "the group has been closed")
        try:
            work.wait()
        except RuntimeError as error:
            raise GroupBroken(self._group.epoch, self._doing, error) from error

    def drop(self) -> None:
        """Forget the work without waiting."""
        self._work = None


class EpochGroup:
    """The control and data groups of one epoch; made by form(), left by close(). For one thread."""

    def __init__(
        self,
        epoch: int,
        world: World,
        rank: int,
        store: StoreClients,
        control: ProcessGroup,
        data: ProcessGroup,
        device: torch.device,
    ) -> None:
        self.epoch = epoch
        self.world = world
        self.rank = rank
        self.store = store
        self.device = device
        self._control: ProcessGroup | None = control
        self._data: ProcessGroup | None = data
        self._under_way: set[Transfer] = set()

    @classmethod
    def form(
        cls,
        epoch: int,
        world: World,
        rank: int,
        store: StoreClients,
        *,
        address: str,
        timeout_s: float,
        device: torch.device = _CPU,
    ) -> "EpochGroup":
        """Meet the other members over `store` and connect to each of them.

        Args:
            epoch: number that no earlier group over this store has had.
            world: who takes part; the same for all.
            rank: this member's rank in `world`.
            store: clients of a store that lies outside all members and outlives them; the same from epoch to epoch.
            address: IP address of this host that the other members reach, e.g. 127.0.0.1 if all are on one.
            timeout_s: seconds for forming, and for each collective from its start to its end; longer than any member
                computes between two collectives.
            device: where rows live: CPU (gloo) or CUDA (NCCL).

        Raises:
            ValueError: `address` is no IP address, or NCCL is asked of a torch without it.
            GroupBroken: a member did not come in time.
        """
        try:
            ipaddress.ip_address(address)
        except ValueError:
            raise ValueError(f"address must be an IP address of this host, got {address!r}") from None
        if device.type == "cuda" and not dist.is_nccl_available():
            raise ValueError("rows on a GPU travel by NCCL, and this torch is built without NCCL")
        try:
            scope = PrefixStore(f"epoch/{epoch}", store.meeting)
            control = make_group(PrefixStore("control", scope), rank, world.size, _CPU, address, timeout_s)
            data = make_group(PrefixStore("data", scope), rank, world.size, device, address, timeout_s)
        except RuntimeError as error:
            raise GroupBroken(epoch, f"forming as {world.name(rank)}", error) from error
        return cls(epoch, world, rank, store, control, data, device)

    def exchange_counts(
        self, received: Tensor, sent: Tensor, received_splits: Sequence[int], sent_splits: Sequence[int], doing: str
    ) -> Transfer:
        """Post an all-to-all of CPU integers on the control plane; splits count entries of dim 0, one per rank.

        Raises:
            GroupBroken: the group is broken or closed.
        """
        return self._post(self._control, received, sent, received_splits, sent_splits, doing)

    def exchange_rows(
        self, received: Tensor, sent: Tensor, received_splits: Sequence[int], sent_splits: Sequence[int], doing: str
    ) -> Transfer:
        """Post an all-to-all of rows on the data plane; splits count rows, one per rank.

        Raises:
            GroupBroken: the group is broken or closed.
        """
        return self._post(self._data, received, sent, received_splits, sent_splits, doing)

    def _post(
        self,
        plane: ProcessGroup | None,
        received: Tensor,
        sent: Tensor,
        received_splits: Sequence[int],
        sent_splits: Sequence[int],
        doing: str,
    ) -> Transfer:
        if plane is None:
            raise GroupBroken(self.epoch, doing, "the group has been closed")
        try:
            work = plane.alltoall_base(received, sent, list(received_splits), list(sent_splits))
        except RuntimeError as error:
            raise GroupBroken(self.epoch, doing, error) from error
        transfer = Transfer(self, work, doing)
        self._under_way.add(transfer)
        return transfer

    def close(self) -> None:
        """Leave: drop what is under way and close the connections; the others' operations then fail at once.

        May be called again. With gloo it returns when operations under way have ended, which, if a live member does
        not take part in them, is at their timeout.
        """
        for transfer in self._under_way:
            transfer.drop()
        self._under_way.clear()
        if self._data is not None and self.device.type == "cuda":
            self._data.abort()  # NCCL's own teardown hangs with a dead peer
        self._control = self._data = None


def make_group(
    store: Store, rank: int, size: int, device: torch.device, address: str, timeout_s: float
) -> ProcessGroup:
    """A group over `store`: of NCCL between GPUs, else of gloo, which listens on `address`. Raises RuntimeError."""
    if device.type == "cuda":
        return _nccl_group(store, rank, size, device, timeout_s)
    return _gloo_group(store, rank, size, address, timeout_s)


def _gloo_group(store: Store, rank: int, size: int, address: str, timeout_s: float) -> ProcessGroup:
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = timedelta(seconds=timeout_s)
    options._devices = [ProcessGroupGloo.create_device(hostname=address)]
    backend = ProcessGroupGloo(store, rank, size, options)
    group = ProcessGroup(store, rank, size)
    group._register_backend(torch.device("cpu"), ProcessGroup.BackendType.GLOO, backend)
    return group


def _nccl_group(store: Store, rank: int, size: int, device: torch.device, timeout_s: float) -> ProcessGroup:
    from torch.distributed import ProcessGroupNCCL  # a torch without CUDA has none

    options = ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=timeout_s)
    backend = ProcessGroupNCCL(store, rank, size, options)
    group = ProcessGroup(store, rank, size)
    group._register_backend(device, ProcessGroup.BackendType.NCCL, backend)
    return group
