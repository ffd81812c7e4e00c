"""Models on GPUs that are not there: torch's fake tensors have shapes and devices, and raise where devices mix."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers
from accelerate import dispatch_model
from conftest import ARCHITECTURES, SMALL
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

ATEN = torch.ops.aten
NUMBERS = {Tensor.__bool__: bool, Tensor.__int__: int, Tensor.__float__: float}


class Traffic(TorchDispatchMode):
    """What goes to GPUs and comes back; a number that a GPU is asked for is 0."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()  # up, down, across two GPUs; other waits; masks made

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (ATEN._local_scalar_dense.default, ATEN.item.default):
            self.count["down"] += args[0].device.type == "cuda"
            return 0
        name = func.overloadpacket.__name__
        if name == "to":  # else the fake tensor of a known number would be made on a GPU
            with self:
                return func.decompose(*args, **(kwargs or {}))
        made = func(*args, **(kwargs or {}))
        if name in ("_to_copy", "copy_"):
            self._count(args[name == "copy_"].device, made.device)
        elif name in ("nonzero", "masked_select"):
            self.count["wait"] += args[0].device.type == "cuda"
        elif name == "masked_fill_":
            self.count["masks"] += 1
        return made

    def list(self, tensor: Tensor) -> Any:
        """`tolist` is one download, of zeros."""
        self.count["down"] += tensor.device.type == "cuda"
        return np.zeros(tensor.shape, np.int64).tolist()

    def _count(self, source: torch.device, target: torch.device) -> None:
        if source != target:
            kinds = {("cpu", "cuda"): "up", ("cuda", "cpu"): "down"}
            self.count[kinds.get((source.type, target.type), "across")] += 1


class Indexing(TorchFunctionMode):
    """Tensor's methods that reach for CUDA's driver before they reach the fake tensor."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        own = isinstance(args[0], Tensor) and args[0].device.type == "cuda" if args else False
        if own and func in NUMBERS:
            return NUMBERS[func](args[0].item())
        if own and func is Tensor.__getitem__:
            view, index = _view(*args)
            return ATEN.index.Tensor(view, index) if any(i is not None for i in index) else view
        if own and func is Tensor.__setitem__:
            return _set(*_view(*args[:2]), args[2])
        return func(*args, **(kwargs or {}))


def _view(tensor: Tensor, index: Any) -> tuple[Tensor, list[Tensor | None]]:
    """What slices and numbers leave, and the tensors that index it further; a list is brought to the GPU."""
    items = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in [i for i in items if not isinstance(i, Tensor)]:
        place = items.index(Ellipsis)
        named = sum(i is not None for i in items) - 1
        items[place : place + 1] = [slice(None)] * (tensor.dim() - named)
    rest: list[Tensor | None] = []
    for item in items:
        if isinstance(item, int):
            tensor = tensor.select(len(rest), item)
            continue
        if item is None:
            tensor = tensor.unsqueeze(len(rest))
        elif isinstance(item, slice):
            tensor = ATEN.slice.Tensor(tensor, len(rest), item.start, item.stop, item.step or 1)
        is_index = isinstance(item, Tensor | list)
        rest.append(torch.as_tensor(item).to(tensor.device) if is_index else None)
    return tensor, rest


def _set(view: Tensor, index: list[Tensor | None], value: Any) -> None:
    if any(i is not None for i in index):
        new = value if isinstance(value, Tensor) else view.new_full((), value)
        ATEN.index_put_.default(view, index, new)
    elif isinstance(value, Tensor):
        ATEN.copy_.default(view, value)
    else:
        view.fill_(value)


@contextmanager
def fake_gpus() -> Iterator[Traffic]:
    """Tensors are fake inside: those on a GPU are on none, and those on the CPU have no content either."""
    # Below autograd, which would ask for the devices of what it differentiates.
    below = torch._C._AutoDispatchBelowAutograd()
    with (
        below,
        torch.no_grad(),
        FakeTensorMode(),
        Traffic() as traffic,
        Indexing(),
        mock.patch.object(FakeTensor, "tolist", lambda tensor: traffic.list(tensor)),
    ):
        yield traffic


def fake_model(name: str, places: dict[str, int], dtype: torch.dtype = torch.bfloat16) -> Any:
    """A tiny model of this architecture, its modules on these GPUs, with the hooks that accelerate gives it."""
    config_class, changes = ARCHITECTURES[name]
    config = getattr(transformers, config_class)(**{**SMALL, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    on = {module: f"cuda:{gpu}" for module, gpu in places.items()}
    with mock.patch("accelerate.hooks.set_module_tensor_to_device", _move):
        return dispatch_model(model, on, force_hooks=True)


def _move(module: Any, name: str, device: str, **_: Any) -> None:
    """As accelerate does, which cannot make a parameter of a fake tensor."""
    path, _, last = name.rpartition(".")
    owner = module.get_submodule(path)
    for store in (owner._parameters, owner._buffers):
        if store.get(last) is not None:
            store[last] = store[last].detach().to(device)
