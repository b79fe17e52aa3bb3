"""How many bytes of tensors are alive, and what they are for: the same on every device and under every allocator.

A dispatch mode sees the result of every operator, autograd's, the optimiser's and the sharding engines' included, and
follows each storage from its first sight to its end. Storages are counted once however many tensors share them, by
their size, not by what an allocator rounds it to. What an operator uses inside a kernel is not seen.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

OTHER = "other"


class LiveTensors(TorchDispatchMode):
    """Bytes alive by kind, now and at the moment when they were most in all.

    Kinds are given by `claim` and by the hooks of `saving`; storages that nobody claims are "other".
    """

    def __init__(self) -> None:
        super().__init__()
        self.now: dict[str, int] = {OTHER: 0}
        self.peak: dict[str, int] = {OTHER: 0}
        self.total = self.peak_total = 0
        self._storages: dict[
            int, tuple[Any, int, str]
        ] = {}  # address of the storage's object -> reference, bytes, kind

    def __enter__(self) -> LiveTensors:
        self._resize = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> Any:  # no operator: FSDP2 frees and allocates by it
            result = self._resize(storage, size)
            self._resized(storage)
            return result

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign, assignment]
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._follow(value, OTHER)
        for value in (*args, *(kwargs or {}).values()):  # an operator may have changed a storage's size
            if isinstance(value, Tensor):
                self._follow(value, OTHER)
        return result

    def claim(self, tensors: Iterable[Tensor], kind: str, *, over: tuple[str, ...] = (OTHER,)) -> None:
        """Calls these tensors' storages `kind` where they are not known or of one of the kinds `over`."""
        for tensor in tensors:
            self._follow(tensor, kind, over)

    @contextlib.contextmanager
    def saving(self, kind: str) -> Iterator[None]:
        """Within it, what autograd saves for the backward pass is `kind`, unless it is claimed already."""

        def pack(tensor: Tensor) -> Tensor:
            self._follow(tensor, kind, (OTHER,))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield

    def restart(self) -> None:
        """Forgets the peak so far."""
        self.peak, self.peak_total = dict(self.now), self.total

    def _follow(self, tensor: Tensor, kind: str, over: tuple[str, ...] = ()) -> None:
        tensor = getattr(tensor, "_local_tensor", tensor)  # of a DTensor
        if tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        size, key = storage.nbytes(), storage._cdata
        known = self._storages.get(key)
        if known is None:
            reference = weakref.finalize(storage, self._end, key)
            reference.atexit = False
            self._change(kind, size)
            self._storages[key] = (reference, size, kind)
            return
        reference, counted, present = known
        wanted = kind if present in over else present
        if counted != size or wanted != present:
            self._storages[key] = (reference, size, wanted)
            self._change(present, -counted, peak=False)
            self._change(wanted, size)

    def _resized(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._storages:
            reference, counted, kind = self._storages[storage._cdata]
            self._storages[storage._cdata] = (reference, storage.nbytes(), kind)
            self._change(kind, storage.nbytes() - counted)

    def _end(self, key: int) -> None:
        _, size, kind = self._storages.pop(key)
        self._change(kind, -size)

    def _change(self, kind: str, size: int, *, peak: bool = True) -> None:
        self.now[kind] = self.now.get(kind, 0) + size
        self.total += size
        if peak and self.total > self.peak_total:
            self.peak, self.peak_total = dict(self.now), self.total
