"""Every Triton kernel of a run compiles for the card, and fits it: no GPU is needed to see that.

Two kinds: fla's, in each configuration that its autotuner may choose, and those that Inductor
writes for the model. The short form takes a few of each; GPULESS=full takes all and prints tables:

    GPULESS=full pytest tests/gpuless/test_compiled_kernels.py
"""

import importlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import cards
import pytest
import torch

HERE = Path(__file__).resolve().parent
IS_FULL = os.environ.get("GPULESS") == "full"
TABLE = "summary" if IS_FULL else "table"  # a summary is printed at the end
LIMIT = cards.H100.shared
# bytes of a thread, at most, in the best configuration of a kernel on an H100; of record, and
# elsewhere: 624 of crawler's chunk_bwd_kernel_dqkwg, up to 1,048 of some of transformer's
SPILLED, SPILLED_ELSEWHERE = 128, 1280
pytestmark = pytest.mark.skipif(platform.system() != "Linux", reason="Triton is for Linux")
fakes = pytest.mark.skipif(not shutil.which("g++"), reason="no g++")  # which fake_cuda.py needs
full = pytest.mark.skipif(not IS_FULL, reason="GPULESS=full runs it")

TRAINING = 48, 2048, 4, 64  # [B, T, H, K] of a micro-batch of record; kv_share and pure_gdn differ
STREAM = 64, 64, 4, 64  # in B, T and H, which no configuration depends on
CRAWLER = 48, 2048, 4, 128
KEY_HEADS = {TRAINING: 2, STREAM: 2, CRAWLER: 4}  # of queries and keys
KERNELS = {  # of fla: in a forward and a backward of the ops
    "causal_conv1d_fwd_kernel",
    "causal_conv1d_bwd_kernel",
    "chunk_local_cumsum_scalar_kernel",
    "chunk_gated_delta_rule_fwd_kkt_solve_kernel",
    "recompute_w_u_fwd_kernel",
    "chunk_gated_delta_rule_fwd_kernel_h_blockdim64",
    "chunk_fwd_kernel_o",
    "chunk_bwd_kernel_dv_local",
    "chunk_gated_delta_rule_bwd_kernel_dhu_blockdim64",
    "chunk_bwd_kernel_dqkwg",
    "prepare_wy_repr_bwd_kernel",
}


def run(script: str, *args):
    command = [sys.executable, HERE / script, *map(str, args)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


def fla_cases():
    for arch, card in cards.CARDS.items():
        for shape in (TRAINING, STREAM, CRAWLER):
            short = arch == 90 and shape == TRAINING
            wanted = arch == 90 or shape != STREAM
            if wanted:
                label = f"sm_{arch}-{shape[0]}x{shape[1]}x{shape[2]}x{shape[3]}"
                yield pytest.param(card, shape, id=label, marks=() if short else full)


@pytest.mark.parametrize("card, shape", list(fla_cases()))
def test_fla_compiles_and_fits(card, shape, record_property):
    most = IS_FULL and card.arch == 90  # else two configurations of each kernel
    found = run("kernels.py", "compile" if most else "few", card.arch, *shape, KEY_HEADS[shape])
    by_kernel = defaultdict(list)
    for name, *row in found["rows"]:  # configuration, registers, spilled, shared
        by_kernel[name].append(row)
    assert by_kernel.keys() == KERNELS
    assert not found["failures"]
    for name, rows in by_kernel.items():
        fits = [row for row in rows if row[3] <= card.shared]
        assert fits, (name, rows)
        assert card.arch != 90 or len(rows) - len(fits) <= 1, rows
        if card.arch == 90:
            limit = SPILLED_ELSEWHERE if shape == CRAWLER else SPILLED
            assert min(row[2] for row in fits) <= limit, (name, fits)
        record_property(TABLE, fla_line(card, shape, name, rows))
    # what compiles around the op relies on its fakes
    assert found["real"] == found["fake"]


def fla_line(card, shape, name, rows) -> str:
    _, registers, spilled, shared = zip(*rows, strict=True)
    return (
        f"sm_{card.arch} {shape} {name}: {len(rows)} configurations, registers "
        f"{min(registers)} to {max(registers)}, spilled {min(spilled)} to {max(spilled)} bytes in "
        f"{sum(s > 0 for s in spilled)}, shared {min(shared)} to {max(shared)}, over the limit "
        f"{sum(s > card.shared for s in shared)}"
    )


@pytest.mark.parametrize("refused", [False, True])
def test_the_pinned_triton_is_one_that_fla_accepts_on_hopper(refused):
    """From Triton 3.4.0 to 3.7.0 a gradient was wrong there at a head size of 64 (fla #640)."""
    script = f"""
import sys; sys.path[:0] = [{str(HERE)!r}, {str(HERE.parent.parent)!r}]
import cards, kernels
cards.pretend(cards.H100, "cpu")
import fla.ops.common.chunk_o as chunk_o
assert chunk_o.IS_NVIDIA_HOPPER and chunk_o.TRITON_ABOVE_3_4_0
chunk_o.TRITON_ABOVE_3_7_1 = chunk_o.TRITON_ABOVE_3_7_1 and not {refused}
kernels.op_bytes((1, 64, 1, 64))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (result.returncode != 0) == refused, result.stderr[-2000:]
    assert not refused or "#640" in result.stderr


def inductor_cases():
    # stream kernels differ from training's in shapes, not in kind
    yield pytest.param("record", "train", 0.0, "all" if IS_FULL else "G S", id="record-train")
    for system, mode, progress in (
        ("record", "stream", 1.0),
        ("transformer", "train", 0.0),
        ("transformer", "train", 1.0),
    ):
        label = f"{system}-{mode}-{progress:g}"
        yield pytest.param(system, mode, progress, "all", id=label, marks=full)


@fakes
def test_bytes_of_a_kernel_that_reads_a_slice_at_two_shifts():
    """The slice is read once, the rest of its rows never: tools/floor.py rests on that."""
    script = f"""
import sys; sys.path.insert(0, {str(HERE)!r})
import inductor, torch
def f(z):
    x = z[..., :256]
    return x + torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]
with inductor.FakeTensorMode():
    z = torch.zeros(4, 64, 1024, device="cuda", dtype=torch.bfloat16)
    torch.compile(f, backend=inductor.backend)(z)
graph, = inductor.graphs
print(sum(graph.launches.values()), graph.triton_bytes())
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.split() == [
        "1",
        str(4 * 64 * 256 * 2 * 2),
    ]  # read and written, 2 bytes each


def linear_weights(system: str, layout: str, progress: float) -> int:
    """Of all passes: their elements."""
    module = importlib.import_module("train_gpt" if system == "record" else system)
    hp = module.Hyperparameters(**({} if layout == "all" else dict(layout=layout)))
    with torch.device("meta"):
        model = module.GPT(hp)
    model.set_progress(progress)
    linears = [m for i in model.order for m in model.blocks[i].modules()]
    return sum(
        m.weight.numel() for m in [model.lm_head, *linears] if isinstance(m, torch.nn.Linear)
    )


@fakes
@pytest.mark.parametrize("system, mode, progress, layout", list(inductor_cases()))
def test_inductors_kernels_compile_and_fit(system, mode, progress, layout, record_property):
    graphs = run("inductor.py", system, mode, progress, layout)
    assert [graph["backward"] for graph in graphs] == (
        [False, True] if mode == "train" else [False]
    )
    if system == "record" and mode == "train":
        forward = 2 * 48 * 2048 * linear_weights(system, layout, progress)
        assert [graph["flops"] for graph in graphs] == [forward, 2 * forward]
    for graph in graphs:
        side = "backward" if graph["backward"] else "forward"
        binaries = [config for *_, configs in graph["kernels"] for config in configs]
        record_property(
            TABLE,
            f"{system} {mode} {progress:g} {layout}, {side}: {len(graph['kernels'])} kernels in "
            f"{len(binaries)} binaries, {graph['launches']} launches, "
            f"{graph['bytes'] / 1e9:.2f} GB; {graph['products']} products, "
            f"{graph['flops'] / 1e12:.3f} TFLOP; saved {graph['saved'] / 1e9:.2f} GB, "
            f"at most {graph['peak'] / 1e9:.2f} GB alive; registers up "
            f"to {max(c[1] for c in binaries)}, shared up to {max(c[3] for c in binaries)}",
        )
        for name, launches, moved, configs in graph["kernels"]:
            assert configs, name
            assert max(shared for *_, shared in configs) <= LIMIT, (name, configs)
            limit = SPILLED if system == "record" else SPILLED_ELSEWHERE
            assert min(spilled for _, _, spilled, _ in configs) <= limit, (name, configs)
            record_property(
                TABLE,
                f"    {launches} x {moved / 1e9:.3f} GB, registers "
                f"{'/'.join(str(c[1]) for c in configs)}, spilled "
                f"{'/'.join(str(c[2]) for c in configs)}: {name}",
            )
