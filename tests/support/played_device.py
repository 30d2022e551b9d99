"""A GPU that is played on the CPU, to count where a training waits for it.

``cpu:0`` is the device, ``cpu`` the host. A tensor is on the device if its memory was made there, was copied
there, or holds what was computed of such; a copy between the two is one, though both are the same memory.
Counted are, by line of the trainer's source, the reads of the device (item, bool, tolist, a copy to the host,
an index that is a mask, nonzero) and the copies to it, unless these are told not to wait and come from pinned
memory. On a GPU ``torch.cuda.set_sync_debug_mode`` counts the same; what a kernel waits for inside, and what
an optimizer's kernels for CUDA alone do, is not seen here.
"""

import contextlib
import functools
import linecache
import sys
from collections import Counter
from pathlib import Path

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE, HOST = torch.device("cpu", 0), torch.device("cpu")
_READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal")
_READS += ("aten::_unique2", "aten::unique_dim", "aten::unique_consecutive")
_DEVICE_OF = torch.Tensor.device.__get__


class Marks:
    """Tensors by their memory, while it lives."""

    def __init__(self):
        self._known = {}

    def add(self, tensor):
        mark = StorageWeakRef(tensor.untyped_storage())
        self._known[mark.cdata] = mark
        if len(self._known) % 4096 == 0:
            self._known = {key: mark for key, mark in self._known.items() if not mark.expired()}

    def discard(self, tensor):
        self._known.pop(tensor.untyped_storage()._cdata, None)

    def __contains__(self, tensor):
        mark = self._known.get(tensor.untyped_storage()._cdata)
        return mark is not None and not mark.expired()


class Played:
    """What is on the device, and the counts; a cycle of a training is from one backward pass to the next."""

    def __init__(self, root):
        self.root, self.cycle, self.counts = f"{root}/", 0, Counter()
        self.there, self.pinned = Marks(), Marks()

    def per_cycle(self):
        """[kind, place, mean count of the whole cycles but the first two], largest count first."""
        cycles, total = range(2, self.cycle), Counter()
        for (cycle, kind, place), number in self.counts.items():
            if cycle in cycles:
                total[kind, place] += number
        found = [[kind, place, number / len(cycles)] for (kind, place), number in total.items()]
        return sorted(found, key=lambda row: (-row[2], row[1]))

    def count(self, kind):
        if (place := self._place()) is not None:
            self.counts[self.cycle, kind, place] += 1

    def _place(self):
        """The innermost line of the trainer's, with the file of another that it led to; None for a line of
        launch.py, which looks on."""
        frame, inner = sys._getframe(2), ""
        while frame is not None:
            file = frame.f_code.co_filename
            if file.startswith(self.root):
                where = f"{file.removeprefix(self.root)}:{frame.f_lineno}"
                line = linecache.getline(file, frame.f_lineno).strip()
                return f"{where} {line}{f' ({inner})' if inner else ''}"
            if not inner and "/torch/" not in file and Path(file).name != "played_device.py":
                if Path(file).name == "launch.py":
                    return None
                inner = "/".join(Path(file).parts[-2:])
            frame = frame.f_back
        return inner or None

    def copied(self, tensor, device, waits, convert):
        """``convert()`` of ``tensor``, which comes to ``device`` (None: stays where it is)."""
        there = tensor in self.there
        if device is None or (device == DEVICE) == there:
            return convert()
        if there and waits:
            self.count("read")
        elif not there and (waits or tensor not in self.pinned):
            self.count("copy")
        made = convert()
        same = made.untyped_storage()._cdata == tensor.untyped_storage()._cdata
        made = made.clone() if same else made
        (self.there.discard if there else self.there.add)(made)
        return made


class _Functions(TorchFunctionMode):
    """What Python asks of torch: devices, and copies between them, which are none on one CPU."""

    def __init__(self, played):
        super().__init__()
        self.played = played

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, played = kwargs or {}, self.played
        if func == _DEVICE_OF:
            return DEVICE if args[0] in played.there else func(*args, **kwargs)
        if func is torch.Tensor.cpu:
            return played.copied(args[0], HOST, True, lambda: func(*args, **kwargs))
        if func is torch.Tensor.to:
            device, waits = self._asked(*args[1:], **kwargs)
            return played.copied(args[0], device, waits, lambda: func(*args, **kwargs))
        if func is torch.Tensor.tolist and args[0] in played.there:
            played.count("read")
            made = args[0].detach().clone()
            played.there.discard(made)
            return made.tolist()
        if func is torch.Tensor.pin_memory:
            made = args[0].clone()
            played.pinned.add(made)
            return made
        made = func(*args, **kwargs)
        if isinstance(made, torch.Tensor) and kwargs.get("device") is not None and made not in played.there:
            if torch.device(kwargs["device"]) == DEVICE:
                if func in (torch.tensor, torch.as_tensor):
                    played.count("copy")
                played.there.add(made)
        return made

    def _asked(self, *args, **kwargs):
        """Of a call of Tensor.to: the device, and whether to wait."""
        other = kwargs.get("other", args[0] if args else None)
        if isinstance(other, torch.Tensor):
            return DEVICE if other in self.played.there else HOST, not kwargs.get("non_blocking")
        device, _, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        return device, not non_blocking


class _Operations(TorchDispatchMode):
    """What torch computes, in the backward pass, too."""

    def __init__(self, played):
        super().__init__()
        self.played = played

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        played, name, kwargs = self.played, func._schema.name, kwargs or {}
        there = any(
            part in played.there for part in tree_leaves((args, kwargs)) if isinstance(part, torch.Tensor)
        )
        if name == "aten::copy_":
            to, source, *rest = args
            waits = not (rest[0] if rest else kwargs.get("non_blocking", False))
            if source in played.there and to not in played.there and waits:
                played.count("read")
            elif to in played.there and source not in played.there:
                if waits or source not in played.pinned:
                    played.count("copy")
            return func(*args, **kwargs)
        if there and name in _READS:
            played.count("read")
        if there and name in ("aten::index", "aten::index_put_", "aten::index_put"):
            for index in args[1]:
                if index is not None and index.dtype in (torch.bool, torch.uint8):
                    played.count("read")
                elif index is not None and index not in played.there:
                    played.count("copy")
        made = func(*args, **kwargs)
        for part in tree_leaves(made) if there else ():
            if isinstance(part, torch.Tensor):
                played.there.add(part)
        return made


@contextlib.contextmanager
def playing(root):
    """Meanwhile accelerate's device is played; yields the :class:`Played` of the trainer in ``root``."""
    import accelerate
    from accelerate.state import AcceleratorState, PartialState
    from torch.nn.utils import clip_grad
    from torch.utils.data import DataLoader

    played, make, iterate = Played(root), accelerate.Accelerator.__init__, DataLoader.__iter__
    backward = accelerate.Accelerator.backward
    group = clip_grad._group_tensors_by_device_and_dtype

    def made(self, *args, **kwargs):
        make(self, *args, **kwargs)
        for state in (PartialState, AcceleratorState):
            state._shared_state["device"] = DEVICE

    @functools.wraps(backward)  # patches check the parameters
    def ended(self, *args, **kwargs):
        played.cycle += 1
        return backward(self, *args, **kwargs)

    def batches(self):
        for batch in iterate(self):
            for part in tree_leaves(batch) if self.pin_memory else ():
                if isinstance(part, torch.Tensor):
                    played.pinned.add(part)
            yield batch

    def grouped(tensors, *args, **kwargs):  # in C++, by devices that are one here
        found = group(tensors, *args, **kwargs)
        return {
            (DEVICE if parts[0][0][0] in played.there else device, dtype): parts
            for (device, dtype), parts in found.items()
        }

    accelerate.Accelerator.__init__, DataLoader.__iter__ = made, batches
    accelerate.Accelerator.backward = ended
    clip_grad._group_tensors_by_device_and_dtype = grouped
    try:
        with _Functions(played), _Operations(played):
            yield played
    finally:
        accelerate.Accelerator.__init__, DataLoader.__iter__ = make, iterate
        accelerate.Accelerator.backward = backward
        clip_grad._group_tensors_by_device_and_dtype = group
