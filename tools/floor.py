"""A lower bound of a training step on 8 H100, from the code that would run there.

    python tools/floor.py [--system NAME]... [--fast]      needs no GPU; a system takes minutes

The training graphs are traced, and lowered by Inductor, at the shapes of a real run. From them: the
operations of matrix products, the bytes that Inductor's kernels read and write, those of fla's
kernels for the delta rule, and attention. Each part takes at least its operations, or its bytes,
over the rates below; nothing overlaps, nothing is waited for, launches cost nothing. The optimizer,
run operator by operator, is counted in the same way. A block's row is the difference between two
stacks, divided by the passes that one has more. --fast leaves out these rows.
"""

import argparse
import collections
import importlib
import sys
import time
import warnings
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests" / "gpuless"), str(ROOT), str(ROOT / "systems")]
warnings.filterwarnings("ignore")
import inductor  # noqa: E402  (before torch)
import kernels  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import train_gpt as t  # noqa: E402

# What an H100 SXM reaches in practice; by its data sheet 989 TFLOP/s and 3.35 TB/s.
MATMUL = 700e12  # FLOP/s, large bf16 products
ATTENTION = 500e12  # FLOP/s, flash attention at a head size of 64
MEMORY = 3.0e12  # bytes/s
NVLINK = 400e9  # bytes/s that leave a GPU in an all-reduce or all-gather over 8

# what differs between two stacks, by system
STACKS = dict(
    record=dict(G=("G S", "G2 S"), S=("G S", "G S2")),
    transformer=dict(A=("A2", "A3")),
    baseline=dict(A=("A2", "A3")),
    gdn_hybrid=dict(G=("G S", "G2 S"), S=("G S", "G S2")),
    kv_share=dict(G=("G2", "G4")),
    pure_gdn=dict(G=("G S", "G2 S"), S=("G S", "G S2")),
    crawler=dict(A=("A (A G)x2 A", "A2 (A G)x2 A"), G=("A (A G)x2 A", "A (A G2)x2 A")),
    hybrid_1895=dict(G=("G A", "G2 A"), A=("G A", "G A2")),
)


class Part(NamedTuple):
    """Of one or more graphs: operations and bytes."""

    products: int = 0  # calls
    product_flops: int = 0
    product_seconds: float = 0.0  # by operations or by bytes, whichever is more, each call
    launches: int = 0  # of Inductor's kernels
    kernel_bytes: int = 0
    delta_bytes: int = 0
    attention_flops: int = 0
    attention_seconds: float = 0.0
    saved: int = 0  # bytes kept for the backward
    peak: int = 0  # bytes alive at once, weights and what is saved included

    def __add__(self, other):
        return Part(*(a + b for a, b in zip(self, other, strict=True)))

    def __sub__(self, other):
        return self + other * -1

    def __mul__(self, n):
        return Part(*(a * n for a in self))

    def seconds(self) -> float:
        moved = (self.kernel_bytes + self.delta_bytes) / MEMORY
        return self.product_seconds + moved + self.attention_seconds


def attention_flops(node: torch.fx.Node) -> int:
    """Of torch_attn::_varlen_attn or its backward: the pairs of a query and a key that it may see,
    as if each row were one document."""
    backward = "backward" in str(node.target)
    tensors = [arg.meta["val"] for arg in node.args if isinstance(arg, torch.fx.Node)]
    q = next(x for x in tensors[backward:] if x.ndim == 3)  # [tokens, heads, size]
    values = {a.name: v for a, v in zip(node.target._schema.arguments, node.args, strict=False)}
    values |= node.kwargs
    T, (left, _) = values["max_q"], values.get("window_size") or (-1, 0)
    seen = T if left < 0 else min(T, left + 1)
    pairs = q.shape[0] // T * (seen * (seen + 1) // 2 + (T - seen) * seen)
    products = 5 if backward else 2  # the backward computes the scores once more
    return 2 * products * pairs * q.shape[1] * q.shape[2]


def part_of(graph: inductor.Graph, delta: dict) -> Part:
    nodes = [n for n in graph.module.graph.nodes if n.op == "call_function"]
    attention = [attention_flops(n) for n in nodes if "_varlen_attn" in str(n.target)]
    products = [e for e in graph.externs if e.flops]
    ops = collections.Counter(e.op.split(".")[-2] for e in graph.externs if "train_gpt" in e.op)
    return Part(
        len(products),
        sum(e.flops for e in products),
        sum(max(e.flops / MATMUL, e.bytes / MEMORY) for e in products),
        sum(graph.launches.values()),
        graph.triton_bytes(),
        sum(n * delta[op] for op, n in ops.items()),
        sum(attention),
        sum(attention) / ATTENTION,
        sum(graph.saved.values()),
        graph.peak,
    )


def train_parts(module, hp, progress: float) -> tuple[Part, Part, int]:
    """Forward, backward, and how often both run in a step."""
    graphs, times = inductor.train_graphs(module.GPT, hp, progress)
    assert [graph.backward for graph in graphs] == [False, True]
    delta, nodes = collections.Counter(), graphs[0].module.graph.nodes
    rule = "train_gpt.gated_delta_rule.default"
    if call := next((node for node in nodes if str(node.target) == rule), None):
        _, k, v = (x.meta["val"].shape for x in call.args[:3])
        found = kernels.op_bytes(tuple(v), key_heads=k[2])
        delta.update({name: sum(moved.values()) for name, moved in found.items()})
    forward, backward = (part_of(graph, delta) for graph in graphs)
    return forward, backward, times


class CountEager(TorchDispatchMode):
    """Bytes that operators read and write one by one, on fake tensors; products count apart."""

    def __init__(self):
        super().__init__()
        self.bytes = self.calls = 0
        self.product_seconds = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        with FlopCounterMode(display=False) as counter:
            out = func(*args, **(kwargs or {}))
        name = func._schema.name
        moves = name.startswith("aten::") and not func.is_view
        if moves and "empty" not in name and name != "aten::_unsafe_view":
            leaves = torch.utils._pytree.tree_leaves((args, kwargs, out))
            moved = sum(x.nbytes for x in leaves if isinstance(x, torch.Tensor))
            flops = counter.get_total_flops()
            self.calls += 1
            if flops:
                self.product_seconds += max(flops / MATMUL, moved / MEMORY)
            else:
                self.bytes += moved
        return out


def optimizer(module, hp) -> dict:
    """Of a step: milliseconds and bytes of Muon with the average of the weights, and of
    collectives."""
    sent = []
    ranks = t.world.size

    def all_reduce(x, op=None):
        sent.append(2 * (ranks - 1) / ranks * x.nbytes)
        return x

    def all_gather(out, x):
        sent.append((ranks - 1) / ranks * out.nbytes)

    saved, dist.all_gather_single = dist.all_gather_single, all_gather
    t.world.all_reduce = all_reduce
    try:
        with inductor.new_model(module.GPT, hp) as model:
            params = [p.detach() for p in model.parameters()]
            average = [p.clone() for p in params]
            muon = t.Muon(model, hp)
            for _ in range(2):  # the first step also makes the state
                for p in model.parameters():
                    p.grad = torch.empty_like(p)
                sent.clear()
                with CountEager() as eager:
                    muon.step(1.0, hp.muon_momentum)
                    torch._foreach_lerp_(average, params, 0.5)
    finally:
        dist.all_gather_single = saved
        del t.world.all_reduce
    return dict(
        calls=eager.calls,
        bytes=eager.bytes,
        seconds=eager.product_seconds + eager.bytes / MEMORY,
        sent=sum(sent),
        link_seconds=sum(sent) / NVLINK,
    )


ROW = "{:22s} {:>6} {:>8} {:>8} {:>8} {:>8} {:>8} {:>8} {:>8} {:>8} {:>9} {:>8}"
HEADS = "part|GEMMs|TFLOP|ms|kernels|GB|ms|delta GB|ms|attn ms|sum ms|saved GB".split("|")


def show(label: str, part: Part) -> None:
    print(
        ROW.format(
            label,
            round(part.products),
            f"{part.product_flops / 1e12:.3f}",
            f"{1e3 * part.product_seconds:.2f}",
            round(part.launches),
            f"{part.kernel_bytes / 1e9:.2f}",
            f"{1e3 * part.kernel_bytes / MEMORY:.2f}",
            f"{part.delta_bytes / 1e9:.2f}",
            f"{1e3 * part.delta_bytes / MEMORY:.2f}",
            f"{1e3 * part.attention_seconds:.2f}",
            f"{1e3 * part.seconds():.2f}",
            f"{part.saved / 1e9:.2f}" if part.saved else "",
        ),
        flush=True,
    )


def floor(system: str, fast: bool) -> None:
    module = t if system == "record" else importlib.import_module(system)
    hp = module.Hyperparameters()
    start = time.perf_counter()
    step = optimizer(module, hp)
    print(f"\n{system}: {hp.layout}")
    after = step["seconds"] + step["link_seconds"]
    print(
        f"optimizer: {step['calls']} operators, {step['bytes'] / 1e9:.2f} GB, "
        f"{1e3 * step['seconds']:.2f} ms; collectives: {step['sent'] / 1e6:.0f} MB sent, "
        f"{1e3 * step['link_seconds']:.2f} ms"
    )
    print(ROW.format(*HEADS))
    for progress in hp.stage_starts():
        forward, backward, times = train_parts(module, hp, progress)
        show("forward", forward)
        show("backward", backward)
        seconds = times * (forward + backward).seconds() + after
        print(
            f"lower bound of a step from progress {progress:g}: {1e3 * seconds:.1f} ms "
            f"({times} x forward and backward, optimizer, collectives); at most "
            f"{max(forward.peak, backward.peak) / 1e9:.1f} GB alive in a pass, besides gradients, "
            "momentum and averages"
        )
    for kind, layouts in ({} if fast else STACKS[system]).items():
        (less, passes), (more, more_passes) = (stack(module, layout) for layout in layouts)
        for label, a, b in zip(("forward", "backward"), less, more, strict=True):
            show(f"a block {kind}, {label}", (b - a) * (1 / (more_passes - passes)))
    print(f"traced in {time.perf_counter() - start:.0f} s", flush=True)


def stack(module, layout: str) -> tuple[tuple[Part, Part], int]:
    """Forward and backward of other blocks at the same width, and their passes."""
    hp = module.Hyperparameters(layout=layout)
    if hasattr(hp, "parallel_start_layer"):
        hp.parallel_start_layer = 0
    forward, backward, _ = train_parts(module, hp, 1.0)
    passes = getattr(hp, "order_of_passes", hp.block_kinds)
    return (forward, backward), len(passes())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--system", action="append", choices=list(STACKS))
    parser.add_argument("--fast", action="store_true")
    args = parser.parse_args()
    print(
        f"lower bound of a step on 8 H100, each at {MATMUL / 1e12:g} TFLOP/s in products, "
        f"{ATTENTION / 1e12:g} in attention, {MEMORY / 1e12:g} TB/s, {NVLINK / 1e9:g} GB/s "
        "between GPUs; attention as if each row were one document"
    )
    for system in args.system or STACKS:
        floor(system, args.fast)
