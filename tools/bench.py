"""Measure what the README states. Speed is always a ratio within one run; nothing here is counted or needed to train.

    python tools/bench.py delta         # gated_delta_rule against fla's naive chunk function, forward + backward
    python tools/bench.py size          # parameters and estimated artifact bytes of every preset, on the meta device
    python tools/bench.py throughput    # training tokens per second of PRESET and how far from the matmul floor
"""

import argparse
import math
import os
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train_gpt as t  # noqa: E402


def seconds(function) -> float:
    """Wall time of one call, with the device idle before and after."""
    sync = torch.cuda.synchronize if t.DEVICE.type == "cuda" else lambda: None
    sync()
    start = time.perf_counter()
    function()
    sync()
    return time.perf_counter() - start


def median_seconds(functions: list, runs: int, warmup: int = 3) -> list[float]:
    """Median wall time of each; the functions take turns, so that a drift of the machine hits all of them."""
    times = [[seconds(f) for f in functions] for _ in range(warmup + runs)][warmup:]
    return [sorted(column)[runs // 2] for column in zip(*times, strict=True)]


def matmul_flops_per_second(dtype: torch.dtype) -> float:
    """What this machine reaches on a 2048 x 2048 x 2048 product: the practical ceiling."""
    a, b = (torch.randn(2048, 2048, device=t.DEVICE, dtype=dtype) for _ in range(2))
    return 2 * 2048**3 / median_seconds([lambda: a @ b], 10)[0]


def delta_flops(B: int, T: int, H: int, K: int, V: int, chunk: int) -> int:
    """Multiply-adds x 2 of the chunked forward: 2 C^2 K scores, the solve and 2 products with it, state in and out."""
    per_chunk = 2 * chunk**2 * K + chunk**3 // 3 + chunk**2 * (K + V) + chunk**2 * V + 3 * chunk * K * V
    return 2 * B * H * math.ceil(T / chunk) * per_chunk


def bench_delta(args) -> None:
    warnings.filterwarnings("ignore")  # fla warns that there is no GPU
    from fla.ops.gated_delta_rule.naive import naive_chunk_gated_delta_rule

    torch.manual_seed(0)
    B, T, H, K = 8, 1024, 4, 64
    q, k = (F.normalize(torch.randn(B, T, H, K, device=t.DEVICE), dim=-1) for _ in range(2))
    v = torch.randn(B, T, H, K, device=t.DEVICE)
    g, beta = -torch.rand(B, T, H, device=t.DEVICE), torch.rand(B, T, H, device=t.DEVICE)
    inputs = [x.requires_grad_() for x in (q, k, v, g, beta)]
    state = torch.zeros(B, H, K, K, device=t.DEVICE)

    def run(function):
        o, final = function()
        return [o, final, *torch.autograd.grad(o.square().sum() + final.square().sum(), inputs)]

    def ours():
        return run(lambda: t.torch_gated_delta_rule(*inputs, state))

    def naive():
        return run(lambda: naive_chunk_gated_delta_rule(q, k, v, g, beta, output_final_state=True))

    errors = [((a - b).norm() / b.norm()).item() for a, b in zip(ours(), naive(), strict=True)]
    mine, theirs = median_seconds([ours, naive], args.runs)
    peak = matmul_flops_per_second(torch.float32)
    floor = 3 * delta_flops(B, T, H, K, K, 32) / peak  # a backward is two forwards
    print(f"gated_delta_rule B {B} T {T} H {H} K = V = {K}, forward + backward, {t.DEVICE.type}, float32")
    print(f"  ours {1000 * mine:.1f} ms  fla naive chunk {1000 * theirs:.1f} ms  ratio {theirs / mine:.2f}x")
    print(f"  relative error of o, state, dq, dk, dv, dg, dbeta: {' '.join(f'{e:.1e}' for e in errors)}")
    print(f"  floor {1000 * floor:.1f} ms ({peak / 1e9:.0f} GFLOP/s matmul), {mine / floor:.1f}x above it")
    assert max(errors) < 1e-4


def gaussian_bits(bits: int, clip_sigmas: float) -> float:
    """Entropy in bits of a normal variable rounded to steps of clip_sigmas / qmax standard deviations."""
    qmax = 2 ** (bits - 1) - 1
    edges = (torch.arange(-qmax, qmax, dtype=torch.float64) + 0.5) * clip_sigmas / qmax
    cdf = F.pad(torch.special.ndtr(edges), (1, 1))
    cdf[-1] = 1.0
    return torch.special.entr(cdf.diff()).sum().item() / math.log(2)


def bench_size(args) -> None:
    code = os.path.getsize(t.__file__)
    print(f"{'preset':<14}{'parameters':>12}{'int6/int8':>12}{'float16':>10}{'code':>8}{'estimate':>12}{'of cap':>8}")
    for preset in t.PRESETS:
        hp = t.Hyperparameters.from_env({"PRESET": preset})
        with torch.device("meta"):
            model = t.GPT(hp)
        rate = {"matrix": gaussian_bits(hp.matrix_bits, hp.matrix_clip_sigmas),
                "embed": gaussian_bits(hp.embed_bits, hp.embed_clip_sigmas)}
        kinds = [(p, model.kinds[name]) for name, p in model.named_parameters()]
        quantized = sum(p.numel() * rate[kind] / 8 for p, kind in kinds if kind in rate)
        half = 2 * sum(len(p) if kind in rate else p.numel() for p, kind in kinds)
        total = quantized + half + code
        count = sum(p.numel() for p, _ in kinds)
        print(f"{preset:<14}{count:>12,}{quantized:>12,.0f}{half:>10,}{code:>8,}{total:>12,.0f}"
              f"{total / t.SIZE_LIMIT:>8.1%}")


def bench_throughput(args) -> None:
    hp = t.Hyperparameters.from_env(os.environ)
    torch.manual_seed(0)
    model = t.GPT(hp).to(t.DEVICE)
    optimizer, nats_of = t.Muon(model, hp), t.scorer(model)
    micro_steps = t.grad_accum_steps(hp)
    shape = (micro_steps, 2, hp.train_batch_tokens // (micro_steps * hp.train_seq_len), hp.train_seq_len)

    def step():
        t.accumulate(nats_of, [(x, y) for x, y in torch.randint(hp.vocab_size, shape, device=t.DEVICE)])
        optimizer.step(1.0, hp.muon_momentum)

    took = median_seconds([step], args.runs)[0]
    rate = hp.train_batch_tokens / took
    peak = matmul_flops_per_second(t.COMPUTE_DTYPE)
    flops = 6 * sum(p.numel() for p in model.parameters() if p.ndim == 2)  # per token: forward 2, backward 4
    print(f"{hp.preset}, {t.DEVICE}: {rate:,.0f} tokens/s, {1000 * took:.1f} ms per {hp.train_batch_tokens:,} tokens")
    print(f"  matmul floor {flops / 1e6:.1f} MFLOP/token at {peak / 1e12:.3f} TFLOP/s: {peak / flops:,.0f} tokens/s, "
          f"{rate * flops / peak:.1%} of it reached")
    if t.DEVICE.type == "cuda":
        print(f"  {torch.cuda.get_device_name()}, peak memory {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["delta", "size", "throughput"])
    parser.add_argument("--runs", type=int, default=10, help="timed runs, after 3 of warm-up")
    args = parser.parse_args()
    {"delta": bench_delta, "size": bench_size, "throughput": bench_throughput}[args.what](args)


if __name__ == "__main__":
    main()
