"""A GPU without a GPU: runs a task on fake tensors that say they are on ``cuda:0``.

Fake tensors have shapes, types and devices, but no values. What a CPU forgives and a GPU does not is found so on any
machine: tensors of two devices in one operation, losses below float32 under autocast, and operations for which the
host must wait for the device, such as ``float(tensor)``, a selection by a mask, or a copy of a constant.
"""

import copy
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parents[1]
CUDA = torch.device("cuda:0")


def run(module: nn.Module, batch: Any, backward: bool = True) -> Any:
    """The result of ``module(batch)`` under bfloat16 autocast, all of it fake; neither argument is changed.

    Args:
        module: on the CPU; maps the batch to something with ``terms``, scalars by name.
        batch: tensors in nested dicts, lists or dataclasses, beside anything that is not a tensor.
        backward: whether the sum of the terms is differentiated too.

    Raises:
        AssertionError: an operation waits for the device or mixes devices, or a term is not a float32 or float64
            scalar on the device. It names the operation and the line of the project that called it.
    """
    with _nothing_remembered(), _as_if_there_were_a_gpu(), FakeTensorMode(allow_non_fake_inputs=True):
        module, batch = _on_cuda((module, batch))
        # Constants may be copied to the device once and kept, in a functools.cache by device: not in every step.
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16), _Watch(constants_may_come=True):
            module(batch)
        with _Watch(constants_may_come=False):
            with torch.autocast("cuda", torch.bfloat16):
                losses = module(batch)
            for name, term in losses.terms.items():
                found = f"{term.dtype} of shape {tuple(term.shape)} on {term.device}"
                assert term.dtype in (torch.float32, torch.float64), f"term {name} is {found}, not float32"
                assert term.device == CUDA and not term.ndim, f"term {name} is {found}, not a scalar on {CUDA}"
            if backward:
                _backward([term for term in losses.terms.values() if term.requires_grad])
        return losses


class _Watch(TorchDispatchMode):
    """Sees every operation that reaches a device, those of autocast and of the backward pass included."""

    def __init__(self, constants_may_come: bool):
        super().__init__()
        self.constants_may_come = constants_may_come

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            wrong = _copies(args, kwargs)
        else:
            wrong = _mixes(func, tensors) or _waits(func, args, tensors)
        if self.constants_may_come and wrong == _FROM_HOST:
            wrong = ""
        assert not wrong, f"{func} {wrong}, called {_place()}"
        return func(*args, **kwargs)


_FROM_HOST = "copies from the host in every step"
_INDEXING = (
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
    torch.ops.aten._index_put_impl_.default,
)


def _copies(args: tuple, kwargs: dict) -> str:
    """What is wrong with a copy, from one tensor to another or to a device; empty = nothing."""
    if len(args) > 1:
        target, source = args[0].device, args[1].device
    else:
        source, target = args[0].device, kwargs.get("device") or args[0].device
    if (source.type, target.type) == ("cuda", "cpu"):
        return "copies to the host, which waits for the device"
    return _FROM_HOST if (source.type, target.type) == ("cpu", "cuda") else ""


def _mixes(func, tensors: list[Tensor]) -> str:
    """Whether an operation has tensors of two devices; empty = it has not."""
    host = [x for x in tensors if x.device.type == "cpu"]
    if not host or len(host) == len(tensors):
        return ""
    # Operations of single elements read a scalar of the host without a copy; all others need it on the device.
    scalars = torch.Tag.pointwise in func.tags and all(x.ndim == 0 for x in host)
    return "" if scalars else "mixes tensors of the host and of the device"


def _waits(func, args: tuple, tensors: list[Tensor]) -> str:
    """Why the host must wait for an operation: its result, or the shape of it, is a value. Empty = it need not."""
    if all(x.device.type == "cpu" for x in tensors):
        return ""
    if func in _INDEXING:
        masks = [x for x in args[1] if x is not None and x.dtype in (torch.bool, torch.uint8)]
        return "selects by a mask, which waits for the device" if masks else ""
    by_value = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}.intersection(func.tags)
    return "waits for the device" if by_value else ""


def _place() -> str:
    """The innermost line of the project that is being run."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path != Path(__file__) and path.is_relative_to(ROOT) and "site-packages" not in path.parts:
            return f"at {path.relative_to(ROOT)}:{frame.lineno}: {frame.line}"
    return "outside the project"


class _FakeCopies(TorchFunctionMode):
    """Inside, ``copy.deepcopy`` makes fake tensors on the device of whatever tensors it meets."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.__deepcopy__:
            tensor, memo = args
            if id(tensor) not in memo:
                memo[id(tensor)] = self._fake(tensor).requires_grad_(tensor.requires_grad)
            return memo[id(tensor)]
        if func is torch._C.TensorBase.clone:  # of the data of a parameter
            return self._fake(args[0])
        return func(*args, **(kwargs or {}))

    def _fake(self, tensor: Tensor) -> Tensor:
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=CUDA)


def _on_cuda(value: Any) -> Any:
    with _FakeCopies():
        return copy.deepcopy(value)


@contextmanager
def _as_if_there_were_a_gpu() -> Iterator[None]:
    """Autocast turns itself off where there is no GPU; and where there is one, nothing here should touch it."""
    with (
        patch("torch.cuda.is_available", return_value=False),
        patch("torch.cuda.amp.common.amp_definitely_not_available", return_value=False),
        patch("torch.cuda.is_bf16_supported", return_value=True),
    ):
        yield


@contextmanager
def _nothing_remembered() -> Iterator[None]:
    """Empties the project's functools caches before and after: a fake constant must not meet a real tensor later."""
    _forget()
    try:
        yield
    finally:
        _forget()


def _forget() -> None:
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if file and Path(file).is_relative_to(ROOT) and "site-packages" not in Path(file).parts:
            for value in list(vars(module).values()):
                if callable(getattr(value, "cache_clear", None)):
                    value.cache_clear()


@torch.no_grad()
def _backward(roots: list[Tensor]) -> None:
    """Calls every node of the graph as autograd's engine would, which cannot run without the device's driver."""
    gradients: dict[Any, list[Tensor | None]] = {}
    for root in roots:
        slots = gradients.setdefault(root.grad_fn, [None] * len(root.grad_fn._input_metadata))
        slots[root.output_nr] = torch.ones_like(root)
    for node in _in_order([root.grad_fn for root in roots]):
        given = gradients.pop(node, None)
        if given is None:
            continue
        call = node.apply if isinstance(node, torch.autograd.function.BackwardCFunction) else node
        found = call(*given)
        found = found if isinstance(found, tuple) else (found,)
        for gradient, (following, slot) in zip(found, node.next_functions, strict=False):
            if following is None or gradient is None:
                continue
            expected = following._input_metadata
            slots = gradients.setdefault(following, [None] * len(expected))
            # As the engine does: broadcast dimensions summed, the type that of the forward pass.
            gradient = gradient.sum_to_size(expected[slot].shape).to(expected[slot].dtype)
            slots[slot] = gradient if slots[slot] is None else slots[slot] + gradient


def _in_order(roots: list[Any]) -> list[Any]:
    """All nodes of a graph, each before those it hands gradients to."""
    done, order, stack = set(), [], [(root, False) for root in roots]
    while stack:
        node, left = stack.pop()
        if left:
            order.append(node)
        elif node not in done:
            done.add(node)
            stack.append((node, True))
            stack += [(following, False) for following, _ in node.next_functions if following is not None]
    return order[::-1]
