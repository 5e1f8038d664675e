"""Lets a program for `cuda` run on fake tensors, which have shapes and strides, but no values.

`Compiler` stands in for Inductor: it takes each graph that Dynamo and AOTAutograd make, notes what
is in it, and gives back a function that runs nothing. `Watch` sees every operator outside of graphs
and notes those for which the CPU waits until the GPU is done, and the collectives.
"""

import contextlib
import functools
import sys
import time
from unittest import mock

import fake_cuda  # noqa: F401  (before torch)

# isort: split
import numpy as np
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from traces import Event

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal")
INDEXING = ("index", "index_put", "index_put_")


def name_of(target) -> str:
    """aten.nonzero.default -> nonzero."""
    return getattr(target, "_opname", getattr(target, "__name__", str(target)))


def is_mask(x) -> bool:
    return isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8)


def needs_places(name: str, args) -> bool:
    """Whether an operator has to find the places where a mask is true; args: fake tensors. To put
    one value everywhere it need not."""
    masked = name in INDEXING and any(map(is_mask, args[1]))
    return masked and not (name != "index" and args[2].numel() == 1)


class Compiler:
    """backend: of torch.compile. note: told of each graph, with the fields of an Event."""

    def __init__(self, note):
        self.note, self.saved_bytes = note, 0
        self.backend = aot_autograd(
            fw_compiler=functools.partial(self.compile, "forward"),
            bw_compiler=functools.partial(self.compile, "backward"),
            partition_fn=self.partition,
            decompositions=select_decomp_table(),
        )

    def partition(self, joint: fx.GraphModule, inputs, *, num_fwd_outputs: int, **settings):
        """By Inductor's rules: what is saved, and what the backward computes again."""
        forward, backward = min_cut_rematerialization_partition(
            joint, inputs, compiler="inductor", num_fwd_outputs=num_fwd_outputs, **settings
        )
        kept = storages(forward.graph.find_nodes(op="placeholder"))  # weights and inputs anyhow
        saved = storages(outputs(forward)[num_fwd_outputs:])
        self.saved_bytes = sum(size for key, size in saved.items() if key not in kept)
        return forward, backward

    def compile(self, kind: str, graph: fx.GraphModule, inputs):
        calls = [node for node in graph.graph.nodes if node.op == "call_function"]
        devices = {str(x.device) for x in values(graph.graph.nodes) if isinstance(x, Tensor)}
        self.note(
            kind=kind,
            what="graph",
            operators=len(calls),
            devices=sorted(devices),
            waits=[name_of(node.target) for node in calls if waits_inside(node)],
            bytes=self.saved_bytes,
        )
        self.saved_bytes = 0
        return make_boxed_func(functools.partial(pretend, graph))


def values(nodes) -> list:
    """The fake tensors, or numbers, that nodes of a graph stand for."""
    return tree_leaves([x.meta.get("val") if isinstance(x, fx.Node) else x for x in nodes])


def outputs(graph: fx.GraphModule) -> list:
    return list(graph.graph.find_nodes(op="output")[0].args[0])


def storages(nodes) -> dict[int, int]:
    """The bytes of each storage once, whatever views of it there are."""
    found = (x.untyped_storage() for x in values(nodes) if isinstance(x, Tensor))
    return {storage._cdata: storage.nbytes() for storage in found}


def waits_inside(node: fx.Node) -> bool:
    name = name_of(node.target)
    if name not in INDEXING:
        return name in WAITS
    return needs_places(name, fx.map_arg(node.args, lambda x: x.meta["val"]))


def pretend(graph: fx.GraphModule, *inputs) -> list:
    """The outputs of the graph: new fake tensors, or its inputs where it returns these."""
    given = dict(zip(graph.graph.find_nodes(op="placeholder"), inputs, strict=True))
    result = []
    for node, x in zip(outputs(graph), values(outputs(graph)), strict=True):
        if isinstance(x, Tensor) and node not in given:
            x = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
        result.append(given.get(node, x))
    return result


def program_function() -> str:
    """The innermost function of train_gpt.py or systems/ that runs now."""
    frame = sys._getframe(1)
    while frame:
        path = frame.f_code.co_filename
        if path.endswith("train_gpt.py") or "/systems/" in path:
            return frame.f_code.co_qualname
        frame = frame.f_back
    return ""


class Watch(TorchDispatchMode):
    """Notes in `events` what matters of the operators outside of graphs. Where the program wants a
    value, it gets 1; a mask is true everywhere; a condition holds if it is one for all elements."""

    def __init__(self):
        super().__init__()
        self.start, self.phases, self.events = time.process_time(), [], []
        self.compiler = Compiler(self.note)

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def note(self, kind: str, what: str, **fields) -> None:
        fields |= dict(phase=" > ".join(self.phases), where=program_function())
        self.events.append(Event(kind, what, seconds=time.process_time() - self.start, **fields))

    @contextlib.contextmanager
    def phase(self, name: str):
        self.phases.append(name)
        yield
        self.phases.pop()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, name_of(func)
        if func.namespace == "c10d":
            result = tree_leaves(args[0])[0]  # in place
            dtype = f"{str(result.dtype).removeprefix('torch.')} {result.device.type}"
            self.note("collective", name.strip("_"), dtype=dtype, bytes=result.nbytes)
        if name in WAITS and isinstance(args[0], FakeTensor):
            if args[0].is_cuda:
                self.note("wait", name)
            if args[0].is_cuda or args[0].constant is None:  # else it has a value
                return self.answer(name, args[0])
        if name in INDEXING and needs_places(name, args):
            if args[0].is_cuda:
                self.note("wait", f"{name} by a mask")
            indices = [i for x in args[1] for i in (places(x) if is_mask(x) else [x])]
            return func(args[0], indices, *args[2:], **kwargs)
        out = func(*args, **kwargs)
        if name in ("_to_copy", "copy_"):
            source = args[1] if name == "copy_" else args[0]
            blocks = not (kwargs.get("non_blocking") or args[2:] == (True,))
            if out.device != source.device and blocks:
                self.note("wait", f"copy to {out.device.type}")
        if name == "all":
            out.holds = True
        return out

    def tolists(self):
        """A patch: FakeTensor.tolist would ask for each element."""

        def tolist(x: Tensor) -> list:
            if x.is_cuda:
                self.note("wait", "tolist")
            return np.ones(tuple(x.shape), float if x.is_floating_point() else int).tolist()

        return mock.patch.object(FakeTensor, "tolist", tolist)

    @staticmethod
    def answer(name: str, x: Tensor):
        if name == "nonzero":
            return x.new_zeros(x.numel(), x.ndim, dtype=torch.long)
        if name == "masked_select":
            return x.new_empty(x.numel())
        if x.dtype == torch.bool or name == "equal":
            return getattr(x, "holds", False)
        return 1.0 if x.is_floating_point() else 1


def places(mask: Tensor) -> list[Tensor]:
    """Where it is true if it is so everywhere: indices, one for each of its dimensions."""
    return [mask.new_zeros(mask.numel(), dtype=torch.long)] * mask.ndim
