"""fla's Triton kernels as our custom ops launch them, for a GPU that is not there.

    python tests/gpuless/kernels.py compile|few|bytes ARCH B T H K     # prints JSON

The ops run on CPU tensors that hold nothing: each launch is compiled down to a cubin by Triton's
ptxas, in every configuration that fla's autotuner has for that card, or only counted.
"""

import collections
import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent)]
import cards  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from triton.runtime.autotuner import Autotuner  # noqa: E402

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
OUTPUTS = dict(  # of each op
    short_conv=("y",),
    short_conv_backward=("dx", "dweight"),
    gated_delta_rule=("o", "final_state", "g_sum", "A"),
    gated_delta_rule_backward=("dq", "dk", "dv", "dg", "dbeta", "d_initial"),
)


class Usage(NamedTuple):
    registers: int  # of a thread
    spilled: int  # bytes of a thread that do not fit into them
    shared: int  # bytes of a block


def usage(cubin: bytes, shared: int) -> Usage:
    """shared: what Triton asks for at the launch; the cubin knows only what is static."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [CUOBJDUMP, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, static = map(
        int, re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", text).groups()
    )
    return Usage(registers, stack, max(shared, static))


def delta_inputs(B: int, T: int, H: int, K: int, key_heads: int):
    """Of the forward op, and what the backward op takes besides: do and d_state."""
    q, k, v, do = (
        torch.empty(B, T, n, K, dtype=torch.bfloat16) for n in (key_heads, key_heads, H, H)
    )
    g, beta = torch.empty(B, T, H), torch.empty(B, T, H)
    state, d_state = torch.empty(B, H, K, K), torch.empty(B, H, K, K)
    return (q, k, v, g, beta, state), (do, d_state)


def conv_inputs(B: int, T: int, n: int):
    """Of the convolution of n channels, and dy; of 100 documents."""
    x, dy = (torch.empty(B, T, n, dtype=torch.bfloat16) for _ in range(2))
    bounds = torch.empty(101, dtype=torch.int32)
    chunks = torch.empty(B * T // 64 + 100, 2, dtype=torch.int64)
    return (x, torch.empty(n, 4), bounds, chunks), dy


def run_ops(shape, op, into=lambda x: x, key_heads: int | None = None) -> dict[str, tuple]:
    """Outputs of each op, called as op(name)(...). shape: B, T, H, K; into: what is done with each
    input first; key_heads: of queries and keys, None = H."""
    (B, T, H, K), found = shape, {}
    key_heads = key_heads or H
    conv, dy = conv_inputs(B, T, (2 * key_heads + H) * K)
    delta, gradients = delta_inputs(*shape, key_heads)
    conv, delta, gradients = ([into(x) for x in tensors] for tensors in (conv, delta, gradients))
    found["short_conv"] = (op("short_conv")(*conv),)
    found["short_conv_backward"] = op("short_conv_backward")(*conv, into(dy))
    q, k, v, _, beta, state = delta
    found["gated_delta_rule"] = forward = op("gated_delta_rule")(*delta)
    _, _, g_sum, A = forward
    backward = op("gated_delta_rule_backward")
    found["gated_delta_rule_backward"] = backward(q, k, v, g_sum, beta, A, state, *gradients)
    return found


def real(name: str):
    """The implementation of an op."""
    import train_gpt

    return getattr(train_gpt, f"fla_{name}")._init_fn


def fake_ops(shape: tuple[int, int, int, int], key_heads: int) -> dict[str, tuple]:
    """Outputs of the ops' fakes."""
    import train_gpt  # noqa: F401  (registers the ops)

    with FakeTensorMode() as mode:
        ops = torch.ops.train_gpt
        return run_ops(shape, lambda name: getattr(ops, name), mode.from_tensor, key_heads)


def on_gpu(card: cards.Card) -> None:
    """fla asks for the shared memory of the tensors' device, which a CPU does not have."""
    limits = dict(ada=101_376, ampere=166_912, hopper=232_448)
    for name in ("fla.ops.common.chunk_o", "fla.ops.gated_delta_rule.wy_fast"):
        module = importlib.import_module(name)
        module.check_shared_mem = lambda arch="", index=0: card.shared >= limits.get(arch, 102_400)


def described(outputs: dict[str, tuple]) -> list[tuple]:
    """Name, dtype, shape and strides of each output."""
    return [
        (name, str(x.dtype), list(x.shape), list(x.stride()))
        for op, tensors in outputs.items()
        for name, x in zip(OUTPUTS[op], tensors, strict=True)
    ]


def compile_ops(card: cards.Card, shape: tuple[int, ...], key_heads: int, few: bool) -> dict:
    """Compiles every configuration of every kernel, or a few; shape, key_heads: as of `run_ops`.

    Returns rows of kernel, configuration, registers, spilled, shared; what failed to compile; the
    ops' outputs, real and fake: name, dtype, shape, strides."""
    rows, failures, done, run = [], [], set(), triton.runtime.JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        name = self.fn.__name__
        config = {k: v for k, v in kwargs.items() if re.fullmatch(r"B[A-Z]+|num_\w+", k)}
        try:
            kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        except Exception as error:
            failures.append((name, config, repr(error)[:300]))
            raise
        used = usage(kernel.asm["cubin"], kernel.metadata.shared)
        if kernel.hash not in done:
            done.add(kernel.hash)
            rows.append((name, config, *used))
        if used.shared > card.shared:  # the autotuner goes on with the next
            error = triton.runtime.errors.OutOfResources
            raise error(used.shared, card.shared, "shared memory")
        return kernel

    def chosen(self, *args, **kwargs):
        self.cache_results = False  # or the winner of an earlier process is the only one
        usual = [c for c in self.configs if c.num_warps <= 4]
        if few and len(usual) > 2:  # the smallest and the largest tiles; a winner is near one
            self.configs = [usual[0], usual[-1]]
        return tune(self, *args, **kwargs)

    tune = Autotuner.run
    triton.runtime.JITFunction.run, Autotuner.run = compile_only, chosen
    try:
        on_gpu(card)
        outputs = run_ops(shape, real, key_heads=key_heads), fake_ops(shape, key_heads)
        found = [described(one) for one in outputs]
    finally:
        triton.runtime.JITFunction.run, Autotuner.run = run, tune
    return dict(rows=rows, failures=failures, real=found[0], fake=found[1])


class CountBytes(TorchDispatchMode):
    """Bytes that operators of torch read and write; views and empty tensors move none."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        schema = func._schema
        if schema.name.startswith("aten::") and not func.is_view and "empty" not in schema.name:
            tensors = [*torch.utils._pytree.tree_leaves((args, kwargs, out))]
            self.total += sum(x.nbytes for x in tensors if isinstance(x, torch.Tensor))
        return out


def op_bytes(
    shape: tuple[int, int, int, int], key_heads: int | None = None
) -> dict[str, dict[str, int]]:
    """Bytes that the kernels of each op, as of `run_ops`, read and write, by kernel: each argument
    once. Nothing is compiled."""
    moved = collections.defaultdict(collections.Counter)

    def count(self, *args, grid, warmup, **kwargs):
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        moved[current][self.fn.__name__] += sum(x.nbytes for x in tensors)

    def first(self, *args, **kwargs):
        return self.fn.run(*args, **kwargs, **self.configs[0].all_kwargs())

    def counted(name: str):
        def call(*args):
            nonlocal current
            current = name
            with CountBytes() as torch_ops:
                outputs = real(name)(*args)
            moved[name]["torch"] = torch_ops.total
            return outputs

        return call

    current, saved = "", (triton.runtime.JITFunction.run, Autotuner.run)
    triton.runtime.JITFunction.run, Autotuner.run = count, first
    try:
        run_ops(shape, counted, key_heads=key_heads)
    finally:
        triton.runtime.JITFunction.run, Autotuner.run = saved
    return {name: dict(kernels) for name, kernels in moved.items()}


if __name__ == "__main__":
    what, arch, *sizes = sys.argv[1:]
    cards.pretend(cards.CARDS[int(arch)], "cpu")
    *shape, key_heads = map(int, sizes)
    if what == "bytes":
        result = op_bytes(tuple(shape), key_heads)
    else:
        result = compile_ops(cards.CARDS[int(arch)], tuple(shape), key_heads, what == "few")
    print(json.dumps(result))
