"""What Inductor makes of a compiled model for an H100, on a machine without a GPU.

    python tests/gpuless/inductor.py SYSTEM train|stream PROGRESS LAYOUT|all     # prints JSON

Import before torch, in a process of its own: it makes torch believe that an H100 is there. Graphs
are traced on fake tensors, lowered, scheduled and written as Triton source; nothing runs.
"""

import collections
import contextlib
import importlib
import importlib.util
import json
import math
import re
import sys
import tempfile
import types
from collections import Counter
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent), str(HERE.parent.parent / "systems")]
import fake_cuda  # noqa: E402  (before torch)

# isort: split
import cards  # noqa: E402
import kernels  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.utils._triton  # noqa: E402

cards.pretend(cards.H100, "cuda")
torch.utils._triton.has_triton = lambda *_, **__: True
in_inductor = False  # only Inductor has to believe that the device is there
torch.cuda.is_available = lambda: in_inductor
torch._C._cuda_getDeviceCount = lambda: 1
torch.version.cuda = torch.version.cuda or "13.0"
torch._C._cuda_getCurrentRawStream = lambda *_: 0
for name, answer in dict(
    is_bf16_supported=True,
    _is_compiled=True,
    synchronize=None,
    set_device=None,
    set_rng_state=None,
    get_rng_state=torch.zeros(1),
    _lazy_init=None,
    _exchange_device=0,
    _maybe_exchange_device=0,
).items():
    setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)

import torch._inductor.config as inductor_config  # noqa: E402
import torch._inductor.memory as memory  # noqa: E402
from torch._functorch.aot_autograd import make_boxed_func  # noqa: E402
from torch._inductor.async_compile import AsyncCompile  # noqa: E402
from torch._inductor.codecache import PyCodeCache  # noqa: E402
from torch._inductor.codegen.common import RemovedArg  # noqa: E402
from torch._inductor.codegen.simd import SIMDKernel  # noqa: E402
from torch._inductor.compile_fx import compile_fx, compile_fx_inner  # noqa: E402
from torch._inductor.dependencies import MemoryDep  # noqa: E402
from torch._inductor.fx_passes.joint_graph import UniformValueConstantFolder  # noqa: E402
from torch._inductor.runtime import triton_helpers  # noqa: E402
from torch._inductor.scheduler import (  # noqa: E402
    ExternKernelSchedulerNode,
    Scheduler,
)
from torch._inductor.utils import unique  # noqa: E402
from torch._inductor.virtualized import V  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

FakeTensorMode.avoid_device_init = property(lambda self: True)
inductor_config.force_disable_caches = True
inductor_config.compile_threads = 1
inductor_config.shape_padding = False  # decided by timing on the device
inductor_config.use_static_triton_launcher = False
inductor_config.profile_bandwidth = True  # writes the bytes of each kernel into its source

import train_gpt  # noqa: E402

fake_cuda.pretend(train_gpt.world, ranks=8)


class Extern(NamedTuple):  # a call that is not a kernel of Inductor's own
    op: str
    shape: tuple[int, ...]  # of what it writes
    bytes: int  # of inputs and outputs
    flops: int


class Graph(NamedTuple):
    backward: bool
    kernels: dict[str, str]  # Triton source by name
    launches: Counter  # of each of them
    externs: list[Extern]
    saved: dict[str, int]  # bytes of the activations that the backward takes, by their node
    module: torch.fx.GraphModule
    peak: int  # bytes alive at once, inputs included, by Inductor's estimate

    def kernel_bytes(self) -> dict[str, int]:
        """Bytes that one launch of each kernel reads and writes: its buffers, once each."""
        found = {n: re.search(r"'kernel_num_gb': ([\d.e+-]+)", s) for n, s in self.kernels.items()}
        return {name: round(float(m[1]) * 1e9) for name, m in found.items() if m}

    def triton_bytes(self) -> int:
        sizes = self.kernel_bytes()
        return sum(n * sizes[name] for name, n in self.launches.items())


graphs: list[Graph] = []  # in the order of compilation
peaks: list[int] = []  # of the orders that Inductor considers for a graph; it takes the lowest
current = types.SimpleNamespace(kernels={}, externs=[], code="")  # of the graph being compiled


def record_source(self, kernel_name, source_code, device_str="cuda", **_):
    current.kernels[kernel_name] = source_code
    return types.SimpleNamespace(run=None)


def record_externs(self):
    codegen(self)
    for node in self.nodes:
        if isinstance(node, ExternKernelSchedulerNode):
            op = getattr(node.node, "python_kernel_name", None) or type(node.node).__name__
            size = node.node.get_size() if node.node.maybe_get_size() else ()
            size = tuple(int(n) for n in size)
            bytes_ = int(node.get_read_write_buffers_sizes())
            if not op.endswith("MultiOutput"):
                current.externs.append(Extern(op, size, bytes_, int(node.estimate_flops() or 0)))


def record_code(cls, source_code, extra=""):
    current.code = source_code
    return write(cls, source_code, extra)


def touched(deps, size: list[int], stride: list[int]) -> int:
    """Elements of a buffer that are read, or written, at least once; the same at a shift of some
    tokens count once, another slice of each token's row counts."""
    numel = math.prod(size)
    row = min((st for n, st in zip(size, stride, strict=True) if n > 1 and st > 1), default=numel)
    columns, rows, whole = np.zeros(row, dtype=bool), 0, 0
    for dep in deps:
        if not isinstance(dep, MemoryDep):
            return numel  # indirect
        factors = {var: dep.index.coeff(var) for var in dep.index.free_symbols}
        offset = dep.index - sum(var * factor for var, factor in factors.items())
        if not offset.expand().is_Integer or not all(f.is_Integer for f in factors.values()):
            return numel
        ranges = {var: int(n) for var, n in dep.ranges.items() if var in factors}
        inner = {var: n for var, n in ranges.items() if factors[var] % row}
        outer = math.prod(n for var, n in ranges.items() if var not in inner)
        if math.prod(inner.values()) > row:
            whole = max(whole, math.prod(ranges.values()))
            continue
        at = np.array([int(offset.expand()) % row])
        for var, n in inner.items():
            at = np.add.outer(at, np.arange(n) * int(factors[var])).ravel() % row
        columns[at] = True
        rows = max(rows, outer)
    return min(numel, max(whole, int(columns.sum()) * rows))


def moved(self) -> int:
    """Bytes that a Triton kernel reads and writes: SIMDKernel.estimate_kernel_num_bytes counts a
    slice once for each shift."""
    read, written = collections.defaultdict(list), collections.defaultdict(list)
    for node in self.features.scheduler_nodes():
        for dep in node.read_writes.reads:
            read[dep.name].append(dep)
        for dep in node.read_writes.writes:
            written[dep.name].append(dep)
    names = [(name, read) for name in self.args.input_buffers]
    outputs = self.args.output_buffers.items()
    names += [(name, written) for name, arg in outputs if not isinstance(arg, RemovedArg)]
    for inplace in unique(self.args.inplace_buffers.values()):
        if not isinstance(inplace, RemovedArg):
            first, *_, last = inplace.other_names
            names += [(first, read), (last, written)]
    total = 0
    for name, accesses in names:
        if name in accesses and V.graph.try_get_buffer(name) is not None:
            buffer = V.graph.try_get_buffer(name)
            size = [int(n) for n in buffer.get_size()]
            stride = [int(n) for n in buffer.get_stride()]
            elements = touched(accesses[name], size, stride)
            total += elements * buffer.get_dtype().itemsize
    return total


def deduce_on_cpu(self, node):  # constants are computed, which nothing can on this device
    kwargs = node.kwargs
    if "device" in kwargs:
        node.kwargs = {**kwargs, "device": torch.device("cpu")}
    try:
        return deduce(self, node)
    finally:
        node.kwargs = kwargs


triton_helpers.set_driver_to_gpu = lambda: None


def record_peak(*args):
    peak, timeline = estimate_peak(*args)
    peaks.append(peak)
    return peak, timeline


codegen, write = Scheduler.codegen, PyCodeCache.write.__func__
estimate_peak, memory.estimate_peak_memory = memory.estimate_peak_memory, record_peak
deduce = UniformValueConstantFolder._deduce_value
AsyncCompile.triton, Scheduler.codegen = record_source, record_externs
SIMDKernel.estimate_kernel_num_bytes = moved
PyCodeCache.write = classmethod(record_code)
UniformValueConstantFolder._deduce_value = deduce_on_cpu


def saved_for_backward(gm: torch.fx.GraphModule) -> dict[str, int]:
    """Bytes of the forward graph's outputs but its inputs, each storage once."""
    saved, seen = {}, set()
    for node in gm.graph.output_node().args[0]:
        value = node.meta.get("val") if isinstance(node, torch.fx.Node) else None
        if isinstance(value, torch.Tensor) and node.op != "placeholder":
            storage = value.untyped_storage()
            if storage._cdata not in seen:
                seen.add(storage._cdata)
                saved[node.name] = storage.nbytes()
    return saved


def lower(gm, example_inputs, **kwargs):
    """compile_fx's inner compiler: records a graph. The graph itself then runs on fake tensors."""
    global in_inductor
    current.kernels, current.externs, current.code = {}, [], ""
    peaks.clear()
    saved = {} if kwargs.get("is_backward") else saved_for_backward(gm)
    in_inductor = True
    try:
        compile_fx_inner(gm, example_inputs, **kwargs)
    finally:
        in_inductor = False
    launches = Counter(re.findall(r"^ +(triton_\w+)\.run\(", current.code, re.M))
    backward = bool(kwargs.get("is_backward"))
    graphs.append(
        Graph(backward, current.kernels, launches, current.externs, saved, gm, min(peaks))
    )
    return make_boxed_func(gm.forward)


def compile_kernels(sources: dict[str, str]) -> list[tuple[str, str, kernels.Usage]]:
    """Each of Inductor's kernels, by Triton down to a cubin, in every configuration that it would
    try on the device: name, configuration, what it uses."""
    global in_inductor
    rows, in_inductor = [], True
    try:
        with tempfile.TemporaryDirectory() as folder:
            for name, source in sources.items():
                path = Path(folder) / f"{name[:100]}_{len(rows)}.py"
                path.write_text(source)
                spec = importlib.util.spec_from_file_location(path.stem, path)
                module = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(module)
                kernel = getattr(module, name)
                kernel.precompile(warm_cache_only=True)
                for result in kernel.compile_results:
                    binary = result.kernel
                    used = kernels.usage(binary.asm["cubin"], binary.metadata.shared)
                    rows.append((name, str(result.config), used))
    finally:
        in_inductor = False
    return rows


def backend(gm, inputs):
    return compile_fx(gm, inputs, inner_compile=lower)


@contextlib.contextmanager
def new_model(model_class, hp):
    """A model of fake tensors, compiled as the product compiles it, but by `backend`."""
    torch._dynamo.reset()
    graphs.clear()
    with FakeTensorMode():
        with torch.device("cuda", 0):
            model = model_class(hp)
        model.compile(fullgraph=True, dynamic=False, backend=backend)
        yield model


def train_graphs(model_class, hp, progress: float = 0.0) -> tuple[list[Graph], int]:
    """The graphs of one forward and backward pass as each of 8 ranks trains, and how often both
    run in a step."""
    with new_model(model_class, hp) as model:
        model.set_progress(progress)
        shape = hp.micro_rows(), hp.train_seq_len
        x, y = (torch.zeros(shape, dtype=torch.long, device="cuda") for _ in range(2))
        passes = 0
        for nats in model.passes(x, y):
            nats.sum().backward()
            passes += 1
    return list(graphs), passes * hp.micro_steps_at(progress)


def stream_graphs(model_class, hp) -> list[Graph]:
    """The graph of a step of the stream, without adapters."""
    with new_model(model_class, hp) as model, torch.no_grad():
        model.set_progress(1.0)
        shape = hp.eval_rows, hp.eval_chunk
        x, y = (torch.zeros(shape, dtype=torch.long, device="cuda") for _ in range(2))
        model(x, y, model.new_cache(hp.eval_rows))
    return list(graphs)


def table_of(graph: Graph) -> dict:
    """Counts of a graph, and for each kernel: launches, bytes of one, and configuration, registers,
    bytes spilled and bytes of shared memory of each binary."""
    sizes, usages = graph.kernel_bytes(), collections.defaultdict(list)
    for name, config, used in compile_kernels(graph.kernels):
        usages[name].append((config, *used))
    names = sorted(graph.launches, key=lambda name: -graph.launches[name] * sizes[name])
    products = [extern for extern in graph.externs if extern.flops]
    return dict(
        backward=graph.backward,
        launches=sum(graph.launches.values()),
        bytes=graph.triton_bytes(),
        products=len(products),
        flops=sum(extern.flops for extern in products),
        saved=sum(graph.saved.values()),
        peak=graph.peak,
        kernels=[(name, graph.launches[name], sizes[name], usages[name]) for name in names],
    )


if __name__ == "__main__":
    system, mode, progress, layout = sys.argv[1:]
    module = train_gpt if system == "record" else importlib.import_module(system)
    hp = module.Hyperparameters(**({} if layout == "all" else dict(layout=layout)))
    if mode == "train":
        found, _ = train_graphs(module.GPT, hp, float(progress))
    else:
        found = stream_graphs(module.GPT, hp)
    print(json.dumps([table_of(graph) for graph in found]))
