"""Several processes that train together."""

from __future__ import annotations

import inspect
import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from widekernel.collectives import dist
from widekernel.engine.equality import copy_from_main, require_equal_tensors
from widekernel.engine.heartbeat import GRACE_S, Heartbeat, is_connection_error
from widekernel.engine.joining_limit import joining_within
from widekernel.engine.process_environment import RUN_ID, ProcessEnvironment
from widekernel.engine.processes import Processes
from widekernel.engine.signs import LostProcessError, ProcessError
from widekernel.errors import ConfigError, WidekernelError, in_short

Result = TypeVar("Result")

JOIN_S = 600.0
"""Seconds until all processes must have joined: nodes of a cluster start at different times."""

# `equalize` copies the initial tensors. PyTorch 2.14 renames the option that copies buffers before every forward pass.
_PARAMETERS = inspect.signature(DistributedDataParallel).parameters
_NO_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in _PARAMETERS else "broadcast_buffers"
_DDP_OPTIONS: dict[str, Any] = {_NO_BUFFERS: False, "init_sync": False, "gradient_as_bucket_view": True}


@dataclass(eq=False)
class _Vote:
    """A vote, and the answer once it is known."""

    flag: bool
    answer: bool | None = None


@dataclass(frozen=True, eq=False)
class DistributedProcesses(Processes):
    """Several processes; the tensors of networks travel by NCCL on GPUs and by gloo on CPUs, everything else by gloo.

    Args:
        control: process group for values of the host
        heartbeat: watches the other processes
    """

    control: Any = field(default=None, repr=False)
    heartbeat: Heartbeat = field(default=None, repr=False)  # type: ignore[assignment]
    _waiting: list[_Vote] = field(default_factory=list, init=False, repr=False)

    def __deepcopy__(self, memory: dict[int, Any]) -> DistributedProcesses:
        return self  # copies of a network with synchronized norms belong to the same processes

    @override
    def sum(self, values: Tensor) -> Tensor:
        return self._reduce(values, dist.ReduceOp.SUM, "summing values")

    @override
    def mean(self, values: Tensor) -> Tensor:
        return self._reduce(values, dist.ReduceOp.SUM, "averaging values") / self.world_size

    @override
    def largest(self, values: Tensor) -> Tensor:
        return self._reduce(values, dist.ReduceOp.MAX, "comparing values")

    @override
    def all_finite(self, flags: Tensor) -> Tensor:
        # On CPUs, each exchange costs as much as a small layer: this one carries the votes that wait for their answers.
        votes = list(self._waiting) if flags.device.type == "cpu" else []
        del self._waiting[: len(votes)]
        own = flags.to(torch.int32)  # NCCL has no logical operations
        if votes:
            own = torch.cat([own.flatten(), torch.tensor([int(not vote.flag) for vote in votes], dtype=torch.int32)])
        found = self._reduce(own, dist.ReduceOp.MIN, "comparing flags")
        for vote, value in zip(votes, found[flags.numel() :].tolist() if votes else ()):
            vote.answer = not value
        return found[: flags.numel()].view(flags.shape).bool() if votes else found.bool()

    @override
    def any(self, flag: bool) -> bool:
        return self.vote(flag)()

    @override
    def vote(self, flag: bool) -> Callable[[], bool]:
        if self.device is not None and self.device.type != "cpu":
            return self._ask(flag)
        vote = _Vote(flag)
        self._waiting.append(vote)

        def answer() -> bool:
            if vote.answer is None:
                self._waiting.remove(vote)
                vote.answer = self._ask(flag)()
            return vote.answer

        return answer

    def _ask(self, flag: bool) -> Callable[[], bool]:
        """Start an exchange of the hosts about `flag`."""
        votes = torch.tensor([int(flag)], dtype=torch.int32)
        with self._exchange("voting"):
            work = dist.all_reduce(votes, dist.ReduceOp.MAX, group=self.control, async_op=True)

        def answer() -> bool:
            with self._exchange("voting"):
                work.wait()
            return bool(votes.item())

        return answer

    @override
    def union(self, names: set[str]) -> set[str]:
        return set().union(*self.gather(names))

    @override
    def broadcast(self, value: Result) -> Result:
        values = [value]
        with self._exchange("waiting for a value of process 0"):
            dist.broadcast_object_list(values, src=0, group=self.control)
        return values[0]

    @override
    def gather(self, value: Result) -> list[Result]:
        values: list[Any] = [None] * self.world_size
        with self._exchange("gathering values"):
            dist.all_gather_object(values, value, group=self.control)
        return values

    @override
    def from_main(self, function: Callable[[], Result]) -> Result:
        if not self.is_main:
            kind, value = self.broadcast(("", cast("Any", None)))
            if kind == "error":
                raise value
            return value
        try:
            result = function()
            # Checked here: an error while it is sent would leave the others waiting.
            pickle.dumps(result)
        except BaseException as error:
            self.broadcast(("error", _sendable(error)))
            raise
        self.broadcast(("result", result))
        return result

    @override
    def barrier(self, what: str) -> None:
        with self._exchange(what):
            dist.barrier(group=self.control)

    @override
    def note(self, step: int, phase: str) -> None:
        self.heartbeat.note(step, phase)

    @override
    def wrap(self, model: nn.Module, **options: Any) -> nn.Module:
        self.require_equal(model)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            return model  # nothing to average, which DistributedDataParallel refuses
        devices = [self.device] if self.device is not None and self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=devices, **{**_DDP_OPTIONS, **options})

    @override
    def without_sync(self, wrapped: nn.Module) -> AbstractContextManager[None]:
        return wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) else nullcontext()

    @override
    def synchronize_buffers(self, model: nn.Module) -> None:
        with torch.no_grad():
            copy_from_main(dict(model.named_buffers()), self._copy_bytes)

    @override
    def equalize(self, model: nn.Module) -> None:
        layout = [(name, tuple(value.shape), str(value.dtype)) for name, value in _tensors(model).items()]
        layouts = self.gather(layout)
        for rank, other in enumerate(layouts):
            if other != layouts[0]:
                pairs = zip([*layouts[0], None], [*other, None])
                expected, found = next((a, b) for a, b in pairs if a != b)
                raise ProcessError(
                    f"Process {rank} has another network than process 0: {found} instead of {expected}. "
                    "Start all processes with the same settings and the same version."
                )
        with torch.no_grad():
            copy_from_main(_tensors(model), self._copy_bytes)
        self.require_equal(model)

    @override
    def require_equal(self, model: nn.Module) -> None:
        require_equal_tensors(_tensors(model), self.gather)

    def _reduce(self, values: Tensor, operation: Any, what: str) -> Tensor:
        total = values.detach().clone(memory_format=torch.contiguous_format)
        with self._exchange(what):
            dist.all_reduce(total, operation, group=self._group_of(total))
        return total

    def _copy_bytes(self, values: Tensor) -> None:
        with self._exchange("copying tensors from process 0"):
            dist.broadcast(values, src=0, group=self._group_of(values))

    def _group_of(self, values: Tensor) -> Any:
        """Return the group that can send `values`; `None` is the one of the networks' tensors."""
        return None if self.device is not None and values.device.type == self.device.type else self.control

    @contextmanager
    def _exchange(self, what: str) -> Iterator[None]:
        self.heartbeat.check(what)
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, WidekernelError) or not is_connection_error(error):
                raise
            raise self.heartbeat.explain(error, what) from error


@contextmanager
def join(
    environment: ProcessEnvironment,
    device: torch.device,
    timeout_s: float,
    patience_s: float,
    report: Callable[[str], None] | None,
) -> Iterator[Processes]:
    """Join the processes of `environment`; see `joining.joined_processes`."""
    if dist.is_initialized():
        raise ConfigError("This process has joined others already (torch.distributed is initialized): leave them first.")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    rank, world_size = environment.rank, environment.world_size
    with _limit(environment, report):
        store = _meet(environment)
        heartbeat = Heartbeat(store.clone(), rank, world_size, timeout_s, report, store_rank=None if agent else 0)
        heartbeat.start()
    try:
        with _limit(environment, report):
            heartbeat.await_all(JOIN_S)
        patience = timedelta(seconds=patience_s)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore("groups", store),
            rank=rank,
            world_size=world_size,
            timeout=patience,
            device_id=device if device.type == "cuda" else None,
        )
        control = dist.new_group(backend="gloo", timeout=patience)
        processes = DistributedProcesses(rank, world_size, device, control, heartbeat)
        yield processes
        heartbeat.finish()
        processes.barrier("waiting for all processes to finish")
    except BaseException as error:
        lost = not isinstance(error, ProcessError) and is_connection_error(error)
        # Explained first: the others must learn the cause, and not that this process has left.
        cause = heartbeat.explain(error, "an exchange between processes") if lost else error
        heartbeat.leave(cause)
        if lost:
            raise cause from error
        raise
    finally:
        heartbeat.stop()
    dist.destroy_process_group()


def _limit(environment: ProcessEnvironment, report: Callable[[str], None] | None) -> AbstractContextManager[None]:
    return joining_within(JOIN_S + GRACE_S, f"process 0 at {environment.address}:{environment.port}", report)


def _meet(environment: ProcessEnvironment) -> dist.Store:
    """Connect to the store at MASTER_ADDR:MASTER_PORT, which process 0 or the agent of torchrun serves."""
    serves = environment.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    where = f"{environment.address}:{environment.port} (MASTER_ADDR, MASTER_PORT)"
    try:
        store = dist.TCPStore(
            environment.address,
            environment.port,
            environment.world_size,
            is_master=serves,
            timeout=timedelta(seconds=JOIN_S),
            wait_for_workers=False,
        )
    except RuntimeError as error:
        what = f"Process 0 cannot listen at {where}" if serves else f"Process {environment.rank} cannot reach {where}"
        raise ProcessError(
            f"{what}: {in_short(error)}. Choose another port, or check the address and the network."
        ) from error
    # A restarted run finds no keys of the former one, and none of another run that was given the same port.
    names = [os.environ.get(name, "0") for name in ("TORCHELASTIC_RUN_ID", RUN_ID, "TORCHELASTIC_RESTART_COUNT")]
    return dist.PrefixStore("/".join(["widekernel", *names]), store)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _sendable(error: BaseException) -> BaseException:
    """Return `error` if it arrives whole in another process, or an error with its text."""
    try:
        copy = pickle.loads(pickle.dumps(error))
        if isinstance(error, Exception) and type(copy) is type(error) and str(copy) == str(error):
            return error
    except Exception:  # any error of the constructor means that it does not arrive
        pass
    if isinstance(error, WidekernelError):
        return WidekernelError(str(error))
    kind = ProcessError if isinstance(error, Exception) else LostProcessError  # an interrupt does not come again
    return kind(f"Process 0 ended with an error ({in_short(error)}).")
