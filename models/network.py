"""What every network of every family can be asked for, so that storing, cost and export know no network.

A file of this package that holds a network has ``NETWORK``, its class; the file's name is the network's ``kind``,
under which it is stored and found again. The class has its configuration as ``Config``, a frozen dataclass of plain
values. A network outside this package is found by its full module name, such as "my_package.my_network".
"""

# Shape legend: B = batch, H and W = pixels.

import copy
import difflib
import importlib
import pkgutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from types import ModuleType
from typing import Any, ClassVar, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Config = TypeVar("Config")  # a network's configuration
Pixels = tuple[tuple[float, float, float], tuple[float, float, float]]  # mean and deviation of the input

# Mean and deviation of the input by name.
PIXELS: dict[str, Pixels] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}

# Metadata of configuration fields: of what only training needs, and of what an earlier version did not have.
TRAINING_ONLY = {"training_only": True}
SINCE_0_4 = {"since": "0.4"}

_OLD_KINDS = {"pruned_vit": "token_pruning"}  # stored by 0.3.0


@dataclass(frozen=True)
class Graph:
    """What an ONNX file is made of and compared on. Inputs are on the CPU."""

    module: nn.Module  # in eval mode; gives out a tensor or a tuple of them
    inputs: tuple[Tensor, ...]  # the module is traced with these, and compared
    input_names: tuple[str, ...]
    outputs: tuple[str, ...]
    dynamic_shapes: tuple[Mapping[int, Any], ...] | None = None  # of each input the free ones, by name; None: none
    checks: tuple[tuple[Tensor, ...], ...] = ()  # more inputs to compare on, such as images of another size
    reference: nn.Module | None = None  # what the file is compared with, where it is not the module


class Network(Protocol):
    """A network as the rest of the project sees it. It is a torch module; its class is built from a ``Config``."""

    kind: ClassVar[str]  # file name in models/, or full module name, that rebuilds it
    Config: ClassVar[type]
    config: Any  # what rebuilds it, of type Config; fields marked TRAINING_ONLY are not stored
    input_names: tuple[str, ...]  # one for each input of example()
    outputs: tuple[str, ...]  # names of what the deployed network returns
    output: str  # how its output is used, in a few words
    architecture: tuple[str, ...]  # how it is built, for whoever rebuilds it from its stored weights
    feeding: Mapping[str, Any]  # how it is fed, in JSON values: size, resize, range, mean, std

    def deployed(self) -> nn.Module:
        """The network without what only training needs, in eval mode; the weights are shared, not copied."""
        ...

    def example(self, count: int) -> tuple[Any, ...]:
        """Inputs of ``count`` images, the same in every call, on the CPU: for cost, export and its check.

        Tensors, or lists of tensors where images differ in size.
        """
        ...

    def parts(self) -> Mapping[str, nn.Module]:
        """Modules whose cost is told apart, each called with the inputs of :meth:`example`.

        "total" is always there: the deployed network.
        """
        ...

    def extras(self) -> Mapping[str, Tensor]:
        """What is stored beside the weights, as "group.tensor"; each group becomes a file of its own."""
        ...

    def same(self, ours: Sequence[Tensor], exported: Sequence[Tensor]) -> float:
        """Largest difference between the outputs of the network and of its exported graph."""
        ...

    def exportable(self) -> str:
        """Empty, or one sentence why the network has no ONNX graph."""
        ...

    def graphs(self) -> Mapping[str, Graph]:
        """Of the deployed network: "" is the main graph, of file NAME.onnx; each other key one of NAME.key.onnx.

        Asked only of a network that is exportable.
        """
        ...


class EmbeddingNetwork(nn.Module):
    """What networks share that map images of one size to one raw embedding each.

    A subclass has ``kind``, ``Config``, ``architecture`` and ``pixels`` (mean and deviation of the input), sets
    ``config``, which has an ``image_size``, and ``classifier``, a linear layer or None.
    """

    kind: ClassVar[str]
    Config: ClassVar[type]
    config: Any
    classifier: nn.Module | None
    pixels: Pixels
    resize = "bilinear"  # to image_size, with anti-aliasing
    input_names: tuple[str, ...] = ("images",)
    outputs = ("embedding",)
    output = "raw embedding; L2-normalise before comparing"

    @property
    def feeding(self) -> dict[str, Any]:
        mean, std = self.pixels
        return {
            "size": list(self.config.image_size),
            "resize": f"exactly, {self.resize} with anti-aliasing",
            "range": "RGB in [0, 1], then (x - mean) / std",
            "mean": list(mean),
            "std": list(std),
        }

    def deployed(self) -> "EmbeddingNetwork":
        bare = shared_copy(self)
        bare.config, bare.classifier = deployed_config(self.config), None
        return bare.eval()

    def example(self, count: int) -> tuple[Tensor, ...]:
        return (torch.randn(count, 3, *self.config.image_size, generator=torch.Generator().manual_seed(0)),)

    def parts(self) -> dict[str, nn.Module]:
        return {"total": self.deployed()}

    def extras(self) -> dict[str, Tensor]:
        """The classifier: losses on class predictions need it of a teacher."""
        return {} if self.classifier is None else {"classifier.weight": self.classifier.weight}

    def same(self, ours: Sequence[Tensor], exported: Sequence[Tensor]) -> float:
        """Largest difference of a number of the L2-normalised embeddings."""
        pairs = zip(ours, exported, strict=True)
        return max((F.normalize(a) - F.normalize(b)).abs().max().item() for a, b in pairs)

    def exportable(self) -> str:
        return ""

    def graphs(self) -> dict[str, Graph]:
        return {"": free_batch(self)}


def free_batch(network: Network) -> Graph:
    """The deployed network for any number of images."""
    inputs, batch = network.example(8), torch.export.Dim("batch", min=1)
    shapes = tuple({0: batch} for _ in inputs)
    return Graph(network.deployed(), inputs, network.input_names, network.outputs, shapes)


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision becomes float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def shared_copy(net: nn.Module) -> nn.Module:
    """The same modules again around the same weights: its mode and its parts change without the original's."""
    return copy.deepcopy(net, {id(tensor): tensor for tensor in (*net.parameters(), *net.buffers())})


def deployed_config(config: Config) -> Config:
    """The same network without what only training needs."""
    return replace(config, **{f.name: f.default for f in fields(config) if f.metadata.get("training_only")})


def identity(config: Any) -> dict[str, Any]:
    """What names a network in fingerprints of caches: its configuration as plain values.

    A setting that came after 0.3.0 is left out where it has its default, so that caches of 0.3.0 are still found.
    """
    kept = [f for f in fields(config) if "since" not in f.metadata or getattr(config, f.name) != f.default]
    return {f.name: getattr(config, f.name) for f in kept}


def kind_of(config: Any) -> str:
    """The kind of network that a configuration is of: the module that defines it."""
    return type(config).__module__.removeprefix("models.")


def network_class(kind: str) -> type[Network]:
    """``NETWORK`` of ``models/<kind>.py``, or of the module that ``kind`` names in full.

    Raises:
        ValueError: there is none, with the near names.
    """
    kind = _OLD_KINDS.get(kind, kind)
    if "." in kind:
        found = getattr(imported(kind), "NETWORK", None)
        if found is None:
            raise ValueError(f"{kind} has no NETWORK, the class of a network")
        return found
    found = _networks(kind)
    if not found:
        raise ValueError(f"there is no network {kind!r} in models" + near(kind, _networks()))
    return found[kind]


def rebuild(kind: str, values: Mapping[str, Any]) -> Network:
    """A network with initial weights from its stored kind and configuration.

    Raises:
        ValueError: no such network, a setting that it does not have, or a value outside its range.
    """
    cls = network_class(kind)
    return cls(configured(cls, values))


def configured(cls: type[Network], values: Mapping[str, Any]) -> Any:
    """A network's configuration from stored values, in which tuples have become lists."""
    names = [f.name for f in fields(cls.Config)]
    unknown = [name for name in values if name not in names]
    if unknown:
        raise ValueError(f"a network of kind {cls.kind} has no setting {unknown[0]!r}" + near(unknown[0], names))
    return cls.Config(**{name: _tuples(value) for name, value in values.items()})


def imported(name: str) -> ModuleType:
    """A module of the user's own, by its full name.

    Stored files name such modules too, and loading a file must not run what its author chose of the standard
    library; so that is refused.

    Raises:
        ValueError: it cannot be imported, in one line.
    """
    if name.partition(".")[0] in sys.stdlib_module_names:
        raise ValueError(f"{name} is of Python's standard library, which holds no network")
    try:
        return importlib.import_module(name)
    except Exception as error:  # no such module, no name of one, or whatever happens while it runs
        what = error if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{name} cannot be imported: {what}; is its folder on PYTHONPATH?") from error


def near(name: str, known: Iterable[str]) -> str:
    """ "; did you mean …?" with the known names most like a wrong one, or nothing."""
    found = difflib.get_close_matches(name, list(known), n=3)
    return f"; did you mean {', '.join(found)}?" if found else ""


def _networks(name: str = "") -> dict[str, type[Network]]:
    """Networks of this package by kind; with a name that one alone, if it is one."""
    package = importlib.import_module("models")
    names = [m.name for m in pkgutil.iter_modules(package.__path__) if name in ("", m.name)]
    modules = {n: importlib.import_module(f"models.{n}") for n in names}
    return {n: module.NETWORK for n, module in modules.items() if hasattr(module, "NETWORK")}


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
