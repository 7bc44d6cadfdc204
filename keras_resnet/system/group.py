"""The processes of a run, one a device, of which this is one: who it is, how they talk.

torchrun starts them, DistributedDataParallel joins their gradients. What the loop asks of a group,
`Alone` answers for a run of one process, and `_Joined` for several. Only CPU tensors carry Python's
messages (over gloo, beside NCCL): nobody waits for a device to read one.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import gc
import itertools
import math
import os
import signal
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import keras
import numpy as np

from keras_resnet.system import process
from keras_resnet.system.errors import InputError, KerasResNetError, OtherProcessError

_BACKEND = keras.backend.backend()
if _BACKEND == "torch":
    import torch
    import torch.distributed as dist

T = TypeVar("T")

# Of a message that does not come though its sender lives; the end of a process is seen at once.
# The first process may look for images, or decode those to validate on, for long.
_PATIENCE = datetime.timedelta(hours=2)


class Alone:
    """The one process of a run.

    Attributes:
        rank: Which process this is, from 0.
        size: How many there are.
        devices: How many devices share a batch.
        first: Whether it is the one that scans, writes and prints.
        norms_together: Whether batch norms take their statistics from the images of all.
    """

    rank, size, devices, first, norms_together = 0, 1, 1, True, False

    def check(self, recipe: Any, compile: bool, sync_bn: bool | None) -> bool | None:
        """Gives `sync_bn`, where it settles it; refuses, by an InputError, what it cannot do."""
        return sync_bn

    def scope(self) -> contextlib.AbstractContextManager:
        """In which a model is made and trained."""
        return contextlib.nullcontext()

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` gives in the first process, which alone calls it; or raises, in all."""
        return make()

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in order; for the first one alone, others get none."""
        return [value]

    def own(self, rows: list[list]) -> list:
        """This process' part of sums that were gathered, from however many processes."""
        if len(rows) == self.size:
            return rows[self.rank]
        return [np.sum(one, 0) * self.first for one in zip(*rows, strict=True)]

    def share(self, items: Iterable[T], size: int) -> Iterator[T]:
        """This process' items: those of every so many-th batch, of `size`."""
        return (one for i, one in enumerate(items) if i // size % self.size == self.rank)

    def in_order(self, made: Iterator[T]) -> Iterator[T]:
        """What all processes make of their batches, in order; for the first one alone."""
        return made

    def any(self, flag: bool) -> bool:
        """Whether it holds in any process."""
        return flag

    def ask(self, *flags: bool) -> Sequence[bool]:
        """What holds in any process, the same for all of them: of several, as it was a step ago."""
        return flags

    def add_up(self, variables: Sequence[Any]) -> None:
        """Puts the sums over all processes into variables."""

    def copy_first(self, variables: Sequence[Any]) -> None:
        """Puts the first process' values into variables."""

    def join_model(self, model: keras.Model, at: Any, seed: int) -> None:
        """Has `fit` step with the gradients of all processes; anew after each `compile`."""

    def notes(self, batch_size: int, threads: int) -> list[str]:
        """Lines about the devices, for people."""
        if self.devices == 1:
            return []
        norms = "all of them" if self.norms_together else "those of its own device"
        several = self.size > 1
        reading = f"; {threads} thread{'' if threads == 1 else 's'} in each read images"
        return [
            f"Devices: {self.devices}, {'a process each, ' * several}with "
            f"{math.ceil(batch_size / self.devices)} of the {batch_size} images of a batch; "
            f"a batch norm takes {norms}{reading * several}"
        ]

    def is_lost(self, error: Exception) -> bool:
        """Whether an error only says that another process has ended."""
        return False


class _Joined(Alone):
    """One of several processes, on torch; every method is called in all of them, in one order."""

    def __init__(self, rank: int, size: int, words: Any):
        self.rank, self.size, self.devices, self.first = rank, size, size, rank == 0
        self.stopping = False  # a signal came, while processes share images
        self._words = words  # the group for CPU tensors
        self._wishes: list[bool] = []
        self._answers: list[bool] = []
        self.ddp: Any = None

    def from_first(self, make):
        box, failure = [None, None, ""], None
        if self.first:
            try:
                box[0] = make()
            except Exception as error:
                failure, ours = error, isinstance(error, KerasResNetError)
                # Another library's may not survive being sent, and the first process says it.
                box[1:] = type(error) if ours else OtherProcessError, str(error)
        dist.broadcast_object_list(box, 0, self._words, device=torch.device("cpu"))
        value, kind, text = box
        if kind is not None:
            raise failure or kind(text)
        return value

    def gather(self, value):
        box = [None] * self.size if self.first else None
        dist.gather_object(value, box, 0, self._words)
        return box or []

    def in_order(self, made):
        while True:
            mine = list(itertools.islice(made, 1))
            stops = self.stopping or process.orphaned()
            found = self._most(2 if stops else len(mine))
            if found == 2:
                raise KeyboardInterrupt
            if not found:  # by none: the others have no more batches than the first one
                return
            yield from itertools.chain.from_iterable(self.gather(mine))

    def any(self, flag):
        return self._most(flag) > 0

    def _most(self, number: int) -> int:
        answer = torch.tensor([int(number)])
        dist.all_reduce(answer, dist.ReduceOp.MAX, self._words)
        return int(answer[0])

    def ask(self, *flags):
        self._wishes = list(flags)
        return self._answers or [False] * len(flags)

    def tell_size(self, size: int) -> Callable[[], int]:
        """Sends how many images a step has here, with what was asked; the result gives the total.

        The one message of a step beside its gradients, on its way while the step computes.
        """
        mine = torch.tensor([size, *self._wishes], dtype=torch.float64)
        rows = [torch.empty_like(mine) for _ in range(self.size)]
        sent = dist.all_gather(rows, mine, self._words, async_op=True)

        def total() -> int:
            sent.wait()
            table = torch.stack(rows).sum(0).tolist()
            self._answers = [count > 0 for count in table[1:]]
            return int(table[0])

        return total

    def add_up(self, variables):
        with torch.no_grad():
            values = [v.value for v in variables]
            flat = torch.cat([v.reshape(-1).double() for v in values])
            dist.all_reduce(flat)
            for value, part in zip(values, flat.split([v.numel() for v in values]), strict=True):
                value.copy_(part.view(value.shape))

    def copy_first(self, variables):
        with torch.no_grad():
            values = [v.value for v in variables]
            # As bytes: one message for all dtypes, and some are none of a backend's.
            flat = [v.detach().reshape(-1).contiguous().view(torch.uint8) for v in values]
            message = torch.cat(flat)
            dist.broadcast(message, 0)
            for value, part in zip(values, message.split([f.numel() for f in flat]), strict=True):
                value.copy_(part.clone().view(value.dtype).view(value.shape))

    def join_model(self, model, at, seed):
        if self.ddp is not None:  # its hooks are on the weights until it is gone
            self.ddp = None
            gc.collect()
        self.ddp = torch.nn.parallel.DistributedDataParallel(
            _View(model), gradient_as_bucket_view=True
        )
        model.train_function = _Step(self, model, at, seed)
        model.test_function = tested_by(model)

    def check(self, recipe, compile, sync_bn):
        if compile:
            raise InputError("The step of several processes is not compiled: leave out compile.")
        return sync_bn

    def is_lost(self, error):
        return isinstance(error, dist.DistError) or "gloo" in str(error)


_group: Alone | None = None
_shares = False
leaving = contextlib.ExitStack()  # what is put back after a training


def current() -> Alone:
    """The group that this process is in; alone before `join`."""
    return _group or Alone()


def sharers() -> Alone:
    """The processes that predict or evaluate together; alone but in `sharing`."""
    return current() if _shares else Alone()


@contextlib.contextmanager
def sharing() -> Iterator[None]:
    """In which the processes of torchrun predict and evaluate together, each a part of the images.

    All call the same, and the first one alone prints. Ctrl-C or SIGTERM to any of them ends all
    behind the same batch.
    """
    global _shares
    group, began = join(), 0.0
    if not isinstance(group, _Joined):
        yield
        return

    def handle(*_):
        nonlocal began
        if group.stopping and time.monotonic() - began > 2:  # the launcher passes it on once more
            raise KeyboardInterrupt
        began = time.monotonic() if not group.stopping else began
        group.stopping = True

    before = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    silent = contextlib.nullcontext() if group.first else contextlib.redirect_stdout(None)
    _shares = True
    try:
        with explained(), silent:
            yield
    finally:
        _shares = group.stopping = False
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """In which an error that only says that another process has ended says so plainly."""
    try:
        yield
    except RuntimeError as error:
        if not current().is_lost(error):
            raise
        raise OtherProcessError(
            "Another process of the run has ended, and says why where it could. The same call "
            "goes on from the last checkpoint."
        ) from error
    finally:
        leaving.close()


def join(devices: Alone | None = None) -> Alone:
    """Joins the processes that torchrun has started, by its variables; alone where it has not.

    Then `devices`, if given, stands for this one process, until the training is left.

    Raises:
        InputError: There are several, and the backend is not torch.
    """
    global _group
    environment = os.environ
    started = environment.keys() >= {"RANK", "WORLD_SIZE", "LOCAL_RANK"}
    if _BACKEND != "torch":
        if started and environment["WORLD_SIZE"] != "1":
            raise InputError(
                "Several processes work together on torch alone: set KERAS_BACKEND=torch, or "
                "train on the devices of one machine without torchrun, by --devices. Received: "
                f"WORLD_SIZE={environment['WORLD_SIZE']} and the backend {_BACKEND}."
            )
        if devices is not None:
            _group = devices
            leaving.callback(_forget)
    elif _group is None and started:
        if torch.cuda.is_available():  # first of all: whatever is made takes memory of a device
            torch.cuda.set_device(process.told("LOCAL_RANK") % torch.cuda.device_count())
        cuda = keras.ops.zeros(()).device.type == "cuda"  # KERAS_TORCH_DEVICE may say another
        if dist.is_initialized():  # by the caller, who may have no group for CPU tensors
            words = dist.new_group(backend="gloo")
        else:
            rank, size = process.told("RANK"), process.told("WORLD_SIZE")
            backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
            with _store(rank, size) as process.store:
                dist.init_process_group(
                    backend, store=process.store, rank=rank, world_size=size, timeout=_PATIENCE
                )
            atexit.register(_leave)
            words = None
        _group = _Joined(dist.get_rank(), dist.get_world_size(), words)
        if hasattr(keras.Model, "_initialize_ddp"):
            # From 3.16 on Keras wraps whatever it runs, and waits for the other processes then:
            # here the first one may run a model alone, and what trains is wrapped by `join_model`.
            keras.Model._initialize_ddp = lambda model: None
    return current()


@contextlib.contextmanager
def _store(rank: int, size: int) -> Iterator[Any]:
    """Where the processes find each other: torchrun's, or a file where no port need be open."""
    folder = process.meeting_place()
    if folder is not None:
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        yield dist.FileStore(str(Path(folder, f"store-{attempt}")), size)
        return
    try:
        store = next(iter(dist.rendezvous("env://")))[0]
    except ValueError as error:  # a variable is missing, or no number
        raise InputError(f"The processes cannot meet by torchrun's variables: {error}") from error
    # It outlives a restart, with the addresses of the dead: each start has a name of its own.
    if rank == 0:
        store.set("keras_resnet", uuid.uuid4().hex)
    yield dist.PrefixStore(store.get("keras_resnet").decode(), store)
    if rank == 0:
        store.delete_key("keras_resnet")


def _forget() -> None:
    global _group
    _group = None


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


# --- a training step -----------------------------------------------------------------------------

if _BACKEND == "torch":

    class _View(torch.nn.Module):
        """A Keras model as DDP wants one: what trains are parameters, the rest is not its own."""

        def __init__(self, model: keras.Model):
            super().__init__()
            object.__setattr__(self, "model", model)  # no submodule: its tensors are named below
            for i, variable in enumerate(model.trainable_variables):
                self.register_parameter(f"weight{i}", variable.value)

        def forward(self, x):
            return self.model(x, training=True)


def tested_by(model: keras.Model) -> Callable[[list], dict[str, Any]]:
    """`keras.Model.test_step` for parts of a batch, which may hold no image at all.

    Keras would count the mean loss of none, which is no number, no times: and have none at the end.
    """

    def test(data):
        x, y, _ = keras.utils.unpack_x_y_sample_weight(data[0])
        with torch.no_grad():
            if len(x):
                return model.test_step(data[0])
            return model.compute_metrics(x, y, model(x, training=False), sample_weight=None)

    return test


class _Step:
    """`keras.Model.train_step` on this process' part of a batch, with the gradient of the whole.

    Where gradients are accumulated, those of a window stay here until its last step: each message
    carries their sum. They also travel at the end of an epoch, so that what is saved is of all.
    Where the loss is scaled (float16) each step's travel, and the optimizer keeps their sum: it
    skips a step that overflows, and only of all gradients can be told whether one does.
    """

    def __init__(self, group: _Joined, model: keras.Model, at: Any, seed: int):
        self.group, self.model, self.at, self.seed = group, model, at, seed
        self.every = model.optimizer.gradient_accumulation_steps or 1  # 1 of one that scales

    def __call__(self, data):
        group, model, at = self.group, self.model, self.at
        x, y, weights = keras.utils.unpack_x_y_sample_weight(data[0])
        total = group.tell_size(len(x))
        number = at.epoch * at.steps + at.step
        # Dropout's: of the step, so that none of it need be saved, and another in each process.
        seeds = np.random.SeedSequence([self.seed, number, group.rank])
        torch.manual_seed(int(seeds.generate_state(1, np.uint64)[0]))
        if at.settled:
            model.zero_grad()
        at.settled = (number + 1) % self.every == 0 or at.step + 1 == at.steps
        with contextlib.nullcontext() if at.settled else group.ddp.no_sync():
            y_pred = group.ddp(x)
            # Of no image at all it is empty: such a part adds nothing.
            loss = model.compute_loss(x, y, y_pred, weights, training=True).sum()
            model._loss_tracker.update_state(loss.detach(), sample_weight=len(x))
            # DDP takes the mean over processes, whose parts may differ in size.
            share = len(x) * group.size / max(1, total())
            model.optimizer.scale_loss(loss * share).backward()
        if at.settled:
            trained = model.trainable_weights[:]
            with torch.no_grad():
                model.optimizer.apply([v.value.grad for v in trained], trained)
        else:
            model.optimizer._iterations.assign_add(1)
        return model.compute_metrics(x, y, y_pred, sample_weight=weights)
