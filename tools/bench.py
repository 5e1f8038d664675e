"""Measure what the README states. Speed is always a ratio within one run; nothing here is counted or needed to train.

    python tools/bench.py --delta         # gated_delta_rule against fla's naive chunk function, forward + backward
    python tools/bench.py --size          # parameters and estimated artifact bytes of every preset, on the meta device
    python tools/bench.py --throughput    # training tokens/s of PRESET, without its curriculum, and the matmul floor
    python tools/bench.py --presets       # each preset at toy size: same parameters, same tokens of DATA_PATH, seeds
    python tools/bench.py --evaluation    # ARTIFACT scored by windows, as a stream and with test-time training
"""

import argparse
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

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
    floor = 3 * delta_flops(B, T, H, K, K, 64) / peak  # a backward is two forwards
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


def parameters(hp: t.Hyperparameters) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in t.GPT(hp).parameters())


def estimated_bytes(hp: t.Hyperparameters) -> tuple[float, int]:
    """Entropy of the quantized values, were all rows normal; float16 of scales and the rest."""
    with torch.device("meta"):
        model = t.GPT(hp)
    quantized, half = 0.0, 0
    for name, p in model.named_parameters():
        is_scalar = model.kinds[name] == "scalar"
        half += 2 * (p.numel() if is_scalar else len(p))
        quantized += 0 if is_scalar else p.numel() * gaussian_bits(*t.precision(model, hp, name)) / 8
    return quantized, half


def bench_size(args) -> None:
    code = os.path.getsize(t.__file__)
    print(f"{'preset':<14}{'parameters':>12}{'integers':>12}{'float16':>10}{'code':>8}{'estimate':>12}{'of cap':>8}")
    for preset in t.PRESETS:
        hp = t.Hyperparameters.from_env({"PRESET": preset})
        quantized, half = estimated_bytes(hp)
        total = quantized + half + code
        print(f"{preset:<14}{parameters(hp):>12,}{quantized:>12,.0f}{half:>10,}{code:>8,}{total:>12,.0f}"
              f"{total / t.SIZE_LIMIT:>8.1%}")


# parameters as published: #1545, #1787 with #1855, the competition's baseline, #1734, #875 (none), #1047
PUBLISHED = dict(record="33,862,953", transformer="35,945,671", baseline="17,059,912", kv_share="33,909,825",
                 pure_gdn="not stated", crawler="14,487,088")
TOY = dict(
    vocab_size=1024, data_path="./data/datasets/demo", tokenizer_path="./data/tokenizers/demo_1024_bpe.model",
    train_batch_tokens=1536, train_seq_len=512, eval_seq_len=512, eval_stride=256, val_batch_size=4096, gdn_heads=2,
    gdn_head_dim=64, num_heads=2, num_kv_heads=1, max_wallclock_seconds=0.0, eval_seconds=0.0, warmup_steps=1,
    eval_mode="sliding", ttt="",
    ema_decay=0.95, gptq_calibration_batches=16, matrix_clip_sigmas=6.0, mlp_clip_sigmas=6.0, embed_clip_sigmas=12.0,
)


def toy(preset: str, target: int, tokens: int) -> tuple[dict, int]:
    """Settings of a toy of the preset: its layout and tricks, the width that comes nearest to `target` parameters, and
    as many steps as `tokens` need; and its parameters."""
    ours = t.PRESETS[preset]
    settings = TOY | dict(grad_accum_steps=3 if ours.get("curriculum") else 1,
                          window_size=min(256, ours.get("window_size", 512)))
    if ours.get("ngram_vocab_size"):
        settings |= dict(ngram_vocab_size=1024, ngram_dim=64)

    def build(width: int) -> t.Hyperparameters:
        return t.Hyperparameters(**({"preset": preset} | ours | settings | dict(model_dim=width)))

    width = min(range(48, 385, 4), key=lambda width: abs(parameters(build(width)) - target))
    plan = t.stages(build(width))
    ends = [start for start, _, _ in plan[1:]] + [1.0]
    share = sum((end - start) * micro for end, (start, micro, _) in zip(ends, plan, strict=True))
    per_step = settings["train_batch_tokens"] * share / settings["grad_accum_steps"]
    return settings | dict(model_dim=width, iterations=round(tokens / per_step)), parameters(build(width))


def run_output(name: str, settings: dict[str, str], folder) -> str:
    """What train_gpt.py prints in a process of its own, in `folder`. settings: beside those of the environment.
    Raises: RuntimeError with `name` and the end of the output of a run that fails."""
    run = subprocess.run([sys.executable, t.__file__], cwd=folder, env=os.environ | settings, capture_output=True,
                         text=True)
    if run.returncode:
        raise RuntimeError(f"{name}: {run.stdout[-1000:]}{run.stderr[-1000:]}")
    return run.stdout


def toy_run(preset: str, settings: dict, seed: int) -> tuple[float, float]:
    """One run. Returns bits per byte of the artifact and training tokens per second."""
    settings = {name.upper(): str(value) for name, value in settings.items()} | dict(PRESET=preset, SEED=str(seed))
    data = {name: str(Path(os.environ.get(name, settings[name])).resolve()) for name in ("DATA_PATH", "TOKENIZER_PATH")}
    with tempfile.TemporaryDirectory() as folder:
        out = run_output(f"{preset}, seed {seed}", settings | data, folder)
    tokens = int(re.search(r'"of_them_needed": (\d+)', out)[1])
    tokens -= int(settings["GPTQ_CALIBRATION_BATCHES"]) * int(settings["TRAIN_BATCH_TOKENS"])
    train_ms = int(re.findall(r"val_bpb:\S+ train_time:(\d+)ms", out)[-1])
    return float(re.findall(r"_exact val_loss:\S+ val_bpb:(\S+)", out)[-1]), 1000 * tokens / train_ms


def bench_presets(args) -> None:
    data = os.environ.get("DATA_PATH", TOY["data_path"])
    target = toy("record", 1_300_000, 1)[1]
    print(f"toys of about {target:,} parameters, {args.tokens:,} tokens of {Path(data).name}, {t.DEVICE.type}")
    print("| preset | layout | parameters, published | ours | artifact + code, estimated | toy: parameters | "
          "val_bpb | seeds | tokens/s |\n|---|---|--:|--:|--:|--:|--:|--:|--:|")
    scores = {}
    for preset, published in PUBLISHED.items():
        hp = t.Hyperparameters.from_env({"PRESET": preset})
        settings, count = toy(preset, target, args.tokens)
        seeds = args.seeds if preset in ("record", "transformer", "baseline") else 1
        runs = [toy_run(preset, settings, seed) for seed in range(1, seeds + 1)]
        bpb, rates = zip(*runs, strict=True)
        scores[preset] = bpb
        noise = f" ± {statistics.stdev(bpb):.4f}" if seeds > 1 else ""
        print(f"| `{preset}` | `{hp.layout}` | {published} | {parameters(hp):,} | "
              f"{(sum(estimated_bytes(hp)) + os.path.getsize(t.__file__)) / 1e6:.2f} MB | {count:,} | "
              f"{statistics.mean(bpb):.4f}{noise} | {seeds} | {statistics.median(rates):,.0f} |", flush=True)
    for other in ("transformer", "baseline"):
        better = [b - a for a, b in zip(scores["record"], scores[other], strict=True)]
        print(f"record better than {other} by {statistics.mean(better):+.4f}, by seed: "
              + " ".join(f"{x:+.4f}" for x in better))


EVALUATIONS = {  # by name, what the mode needs in the environment
    "non-overlapping": "EVAL_MODE=sliding EVAL_STRIDE={eval_seq_len}",
    "sliding-64": "EVAL_MODE=sliding EVAL_STRIDE=64",
    "stream": "EVAL_MODE=stream",
    "stream+sgd": "EVAL_MODE=stream TTT=sgd",
    "stream+lora": "EVAL_MODE=stream TTT=lora",
    "stream+lora+phases": "EVAL_MODE=stream TTT=lora TTT_PHASES=2",
}
UNLESS_NAMED = dict(EVAL_ONLY="1", EVAL_SECONDS="0", TTT="", TTT_PHASES="0")
OFFSETS = np.array([0, *(2**i for i in range(6, 14))])  # where the buckets of the curve begin


def evaluation_run(name: str, settings: dict[str, str], folder: Path) -> tuple[float, float]:
    """Bits per byte and seconds of the final pass. The log is logs/NAME.txt in the folder, the scores are NAME.npz."""
    settings = UNLESS_NAMED | settings
    out = run_output(name, settings | dict(RUN_ID=name, SCORES=str(folder / f"{name}.npz")), folder)
    label = "sliding_window" if settings["EVAL_MODE"] == "sliding" else "stream"
    label += f"_ttt_{settings['TTT']}" if settings["TTT"] else ""
    final = re.search(rf"^(final_int\d_{label}) .* eval_time:(\d+)ms\n\1_exact .* val_bpb:(\S+)$", out, re.M)
    return float(final[3]), int(final[2]) / 1000


def by_offset(scores, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Targets, and their bits per byte, in each bucket of the offset of a target from its document's BOS. A BOS has the
    offset 0 and no bytes: what the end of a document costs stands in the first bucket, of the document that begins.
    scores: nats, bytes, position as of SCORES; starts: the positions of all BOS."""
    position = scores["position"]
    offset = position - starts[np.searchsorted(starts, position, side="right") - 1]
    bucket, n = np.searchsorted(OFFSETS, offset, side="right") - 1, len(OFFSETS)
    nats, total_bytes = (np.bincount(bucket, scores[name], n) for name in ("nats", "bytes"))
    return np.bincount(bucket, minlength=n), nats / math.log(2) / np.where(total_bytes, total_bytes, np.nan)


def print_rows(chosen: dict[str, str], results: dict[str, tuple[float, float]]) -> None:
    """The table of modes; without sliding-64 there is nothing to compare with."""
    print("| mode | settings | val_bpb | to sliding-64 | seconds | speed |\n|---|---|--:|--:|--:|--:|")
    base = results.get("sliding-64")
    for name, (bpb, took) in results.items():
        gain, speed = (f"{bpb - base[0]:+.4f}", f"{base[1] / took:.2f}x") if base else ("-", "-")
        print(f"| {name} | `{chosen[name]}` | {bpb:.4f} | {gain} | {took:.2f} | {speed} |")


def print_curve(results: list[str], folder: Path, starts: np.ndarray) -> None:
    """Bits per byte by position in the document, of the scores in the folder; buckets without targets are left out."""
    curves = []
    for name in results:
        with np.load(folder / f"{name}.npz") as scores:
            curves.append(by_offset(scores, starts))
    print(f"\n| offset | targets | {' | '.join(results)} |\n|--:|--:|{'--:|' * len(results)}")
    ends = [f"-{end - 1}" for end in OFFSETS[1:]] + ["+"]
    for start, end, count, *bits in zip(OFFSETS, ends, curves[0][0], *(bits for _, bits in curves), strict=True):
        if count:
            print(f"| {start}{end} | {count:,} | {' | '.join(f'{x:.4f}' for x in bits)} |")


def bench_evaluation(args) -> None:
    saved = t.load_artifact(os.environ.get("ARTIFACT", t.Hyperparameters.artifact), "cpu")[1]
    hp = t.Hyperparameters.from_env(os.environ | UNLESS_NAMED, base=saved)
    files = "artifact", "data_path", "tokenizer_path"  # runs are in another folder
    paths = {name.upper(): str(Path(getattr(hp, name)).resolve()) for name in files}
    chosen = {name: settings.format(eval_seq_len=hp.eval_seq_len)
              for number, (name, settings) in enumerate(EVALUATIONS.items(), 1)
              if not args.rows or {str(number), name} & {*args.rows}}
    stream = t.TokenStream(hp.data_path, "val", hp.vocab_size)
    starts = np.flatnonzero(stream.read(0, len(stream)).numpy() == t.BOS_ID)
    shared = " ".join(f"{name.upper()}={value}" for name, value in vars(hp).items()
                      if re.match(r"eval_(seq_len|chunk|rows)|ttt_(?!phases)", name))
    print(f"{Path(hp.artifact).name} on {Path(hp.data_path).name}, {len(starts):,} documents, "
          f"{len(stream) - 1:,} targets, {t.DEVICE.type}; all with {shared}\n", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder, results = Path(args.folder or temporary).resolve(), {}
        folder.mkdir(parents=True, exist_ok=True)
        for name, settings in chosen.items():
            results[name] = evaluation_run(name, paths | dict(pair.split("=") for pair in settings.split()), folder)
            print(f"{name}: {results[name][0]:.4f} in {results[name][1]:.1f} s", file=sys.stderr)
        print_rows(chosen, results)
        print_curve([*results], folder, starts)


def bench_throughput(args) -> None:
    hp = t.Hyperparameters.from_env(os.environ)
    torch.manual_seed(0)
    model = t.GPT(hp).to(t.DEVICE)
    optimizer, nats_of = t.Muon(model, hp), t.scorer(model)
    micro_steps = t.grad_accum_steps(hp)
    shape = (micro_steps, 2, hp.train_batch_tokens // (micro_steps * hp.train_seq_len), hp.train_seq_len)

    def step():
        batch = [(x, y) for x, y in torch.randint(hp.vocab_size, shape, device=t.DEVICE)]
        t.accumulate(model, nats_of, batch, hp.train_seq_len)
        optimizer.step(1.0, hp.muon_momentum)

    took = median_seconds([step], args.runs)[0]
    rate = hp.train_batch_tokens / took
    peak = matmul_flops_per_second(t.COMPUTE_DTYPE)
    ids = torch.zeros(1, 64, dtype=torch.long, device=t.DEVICE)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids)
    flops = 3 * counter.get_flop_counts()["Global"][torch.ops.aten.mm] / 64  # per token; the backward is two forwards
    print(f"{hp.preset}, {t.DEVICE}: {rate:,.0f} tokens/s, {1000 * took:.1f} ms per {hp.train_batch_tokens:,} tokens")
    print(f"  matmul floor {flops / 1e6:.1f} MFLOP/token at {peak / 1e12:.3f} TFLOP/s: {peak / flops:,.0f} tokens/s, "
          f"{rate * flops / peak:.1%} of it reached")
    if t.DEVICE.type == "cuda":
        print(f"  {torch.cuda.get_device_name()}, peak memory {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    for bench in (bench_delta, bench_size, bench_throughput, bench_presets, bench_evaluation):
        what.add_argument(f"--{bench.__name__[6:]}", dest="bench", action="store_const", const=bench)
    parser.add_argument("--runs", type=int, default=10, help="timed runs, after 3 of warm-up")
    parser.add_argument("--tokens", type=int, default=614_400, help="that each toy is trained on")
    parser.add_argument("--seeds", type=int, default=3, help="of record, transformer and baseline; the others have one")
    parser.add_argument("--rows", nargs="+", choices=[*map(str, range(1, len(EVALUATIONS) + 1)), *EVALUATIONS],
                        help="of the evaluation, by number or name; default: all")
    parser.add_argument("--folder", help="where the evaluation leaves its logs and scores; default: nowhere")
    args = parser.parse_args()
    args.bench(args)


if __name__ == "__main__":
    main()
