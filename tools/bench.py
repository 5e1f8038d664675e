"""Measure what the README states. Speed is always a ratio within one run; nothing here is counted
or needed to train.

    python tools/bench.py --delta         # gated_delta_rule against fla's naive chunk function
    python tools/bench.py --size          # parameters and estimated bytes of every system
    python tools/bench.py --packing       # the integers of ARTIFACT: range code, brotli and zstd
    python tools/bench.py --fit           # every system at full size packed to its target
    python tools/bench.py --throughput    # training tokens/s of SYSTEM, and the matmul floor
    python tools/bench.py --floor         # a step's lower bound on 8 H100, see tools/floor.py
    python tools/bench.py --systems       # each at toy size: same parameters, tokens and seeds
    python tools/bench.py --evaluation    # ARTIFACT scored by windows, as a stream, while learning
    python tools/bench.py --evaluation --train-script systems/NAME.py    # that of another system

A system is `record`, which is train_gpt.py, or the NAME of a file systems/NAME.py. Other settings
are environment variables, as of a run: PRESET=demo with --size and --throughput, DATA_PATH and
TOKENIZER_PATH with --systems, all of scoring with --evaluation.
"""

import argparse
import bisect
import functools
import importlib
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import fields
from pathlib import Path
from unittest import mock

import brotli
import numpy as np
import torch
import torch.nn.functional as F
import zstandard
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "systems"), str(ROOT / "tools")]
import packed  # noqa: E402  (the paths come first)

import train_gpt as t  # noqa: E402

# parameters as published: #1787 with #1855, the baseline of the competition, #1545, #1734, #875,
# #1047, #1895
PUBLISHED = dict(
    record="new",
    transformer="35,945,671",
    baseline="17,059,912",
    gdn_hybrid="33,862,953",
    kv_share="33,909,825",
    pure_gdn="not stated",
    crawler="14,487,088",
    hybrid_1895="35,896,408",
)
SYSTEMS = tuple(PUBLISHED)


def script_of(system: str) -> Path:
    """What a run of the system starts."""
    return ROOT / "train_gpt.py" if system == "record" else ROOT / "systems" / f"{system}.py"


def module_of(system: str):
    """The module with its Hyperparameters and GPT. Raises: ValueError naming SYSTEM."""
    if system not in (*SYSTEMS, "variants"):  # those are toys of tools/ladder.py
        raise ValueError(f"SYSTEM={system!r}: expected one of {', '.join(SYSTEMS)}")
    return t if system == "record" else importlib.import_module(system)


def system_of(script: str) -> str:
    """The system that this file is. Raises: argparse.ArgumentTypeError if it is none."""
    for system in SYSTEMS:
        if Path(script).resolve() == script_of(system):
            return system
    raise argparse.ArgumentTypeError(f"{script} is not train_gpt.py or systems/NAME.py of {ROOT}")


def code_files(system: str) -> set[Path]:
    """What is counted beside the artifact: train_gpt.py, the system's file, and what that imports
    of its folder."""
    files, unread = {script_of("record")}, [script_of(system)]
    while unread:
        files.add(path := unread.pop())
        imports = re.findall(r"^(?:import|from) (\w+)", path.read_text(), re.M)
        beside = {ROOT / "systems" / f"{name}.py" for name in imports}
        unread += [path for path in beside - files if path.is_file()]
    return files


def code_bytes(system: str) -> int:
    return sum(path.stat().st_size for path in code_files(system))


# --- Time -----------------------------------------------------------------------------------------


def seconds(function) -> float:
    """Wall time of one call, with the device idle before and after."""
    sync = torch.cuda.synchronize if t.world.on_cuda else lambda: None
    sync()
    start = time.perf_counter()
    function()
    sync()
    return time.perf_counter() - start


def median_seconds(functions: list, runs: int, warmup: int = 3) -> list[float]:
    """Median wall time of each; the functions take turns, so that a drift of the machine hits all
    of them."""
    times = [[seconds(f) for f in functions] for _ in range(warmup + runs)][warmup:]
    return [sorted(column)[runs // 2] for column in zip(*times, strict=True)]


def matmul_flops_per_second(dtype: torch.dtype) -> float:
    """What this machine reaches on a 2048 x 2048 x 2048 product: the practical ceiling."""
    a, b = (torch.randn(2048, 2048, device=t.world.device, dtype=dtype) for _ in range(2))
    return 2 * 2048**3 / median_seconds([lambda: a @ b], 10)[0]


# --- The delta rule -------------------------------------------------------------------------------


def delta_flops(B: int, T: int, H: int, K: int, V: int, chunk: int) -> int:
    """Multiply-adds x 2 of the chunked forward: 2 C^2 K scores, the solve and 2 products with it,
    state in and out."""
    scores, solve = 2 * chunk**2 * K, chunk**3 // 3
    products, state = chunk**2 * (K + V) + chunk**2 * V, 3 * chunk * K * V
    return 2 * B * H * math.ceil(T / chunk) * (scores + solve + products + state)


def delta_inputs(B: int, T: int, H: int, K: int) -> list[torch.Tensor]:
    """q, k, v: [B, T, H, K]; g, beta: [B, T, H]; all with gradients."""
    device = t.world.device
    q, k = (F.normalize(torch.randn(B, T, H, K, device=device), dim=-1) for _ in range(2))
    v = torch.randn(B, T, H, K, device=device)
    g, beta = -torch.rand(B, T, H, device=device), torch.rand(B, T, H, device=device)
    return [x.requires_grad_() for x in (q, k, v, g, beta)]


def bench_delta(args) -> None:
    warnings.filterwarnings("ignore")  # fla warns that there is no GPU
    from fla.ops.gated_delta_rule.naive import naive_chunk_gated_delta_rule

    torch.manual_seed(0)
    B, T, H, K = 8, 1024, 4, 64
    inputs, state = delta_inputs(B, T, H, K), torch.zeros(B, H, K, K, device=t.world.device)

    def with_gradients(o, final):
        loss = o.square().sum() + final.square().sum()
        return [o, final, *torch.autograd.grad(loss, inputs)]

    def ours():
        return with_gradients(*t.torch_gated_delta_rule(*inputs, state))

    def naive():
        return with_gradients(*naive_chunk_gated_delta_rule(*inputs, output_final_state=True))

    pairs = zip(ours(), naive(), strict=True)
    errors = [((a - b).norm() / b.norm()).item() for a, b in pairs]
    mine, theirs = median_seconds([ours, naive], args.runs)
    peak = matmul_flops_per_second(torch.float32)
    floor = 3 * delta_flops(B, T, H, K, K, 64) / peak  # a backward is two forwards
    print(
        f"gated_delta_rule B {B} T {T} H {H} K = V = {K}, forward + backward, "
        f"{t.world.device.type}, float32\n"
        f"  ours {1000 * mine:.1f} ms  fla naive chunk {1000 * theirs:.1f} ms  "
        f"ratio {theirs / mine:.2f}x\n"
        f"  relative error of o, state, dq, dk, dv, dg, dbeta: "
        f"{' '.join(f'{e:.1e}' for e in errors)}\n"
        f"  floor {1000 * floor:.1f} ms ({peak / 1e9:.0f} GFLOP/s matmul), "
        f"{mine / floor:.1f}x above it"
    )
    assert max(errors) < 1e-4


# --- Size -----------------------------------------------------------------------------------------


CLIP_SIGMAS = {t.MATRIX: 12.85, t.EMBED: 15.0}  # deviations, of #1394 and #1787


def gaussian_bits(bits: int | torch.Tensor, clip_sigmas: float) -> float:
    """Entropy in bits of a normal variable rounded to steps of clip_sigmas / qmax standard
    deviations; of bits for each row, the mean."""
    if isinstance(bits, torch.Tensor):
        kinds, rows = (x.tolist() for x in bits.unique(return_counts=True))
        return statistics.fmean((gaussian_bits(kind, clip_sigmas) for kind in kinds), rows)
    qmax = 2 ** (bits - 1) - 1
    edges = (torch.arange(-qmax, qmax, dtype=torch.float64) + 0.5) * clip_sigmas / qmax
    cdf = F.pad(torch.special.ndtr(edges), (1, 1))
    cdf[-1] = 1.0
    return torch.special.entr(cdf.diff()).sum().item() / math.log(2)


def shape_of(hp: t.Hyperparameters, module=None) -> t.GPT:
    """The model of these hyperparameters, without memory for its weights. module: where its GPT is,
    if not that of its system."""
    with torch.device("meta"):
        return (module or module_of(hp.system)).GPT(hp)


def parameters(hp: t.Hyperparameters, module=None) -> int:
    return sum(p.numel() for p in shape_of(hp, module).parameters())


def estimated_bytes(hp: t.Hyperparameters, module=None) -> tuple[float, int]:
    """Entropy of the quantized values, were all rows normal and clipped at CLIP_SIGMAS; float16 of
    scales and the rest."""
    model, quantized, half = shape_of(hp, module), 0.0, 0
    for name, p in model.named_parameters():
        width = CLIP_SIGMAS.get(model.kinds[name])
        half += 2 * (len(p) if width else p.numel())
        quantized += p.numel() * gaussian_bits(model.bits(name), width) / 8 if width else 0
    return quantized, half


def bench_size(args) -> None:
    preset = os.environ.get("PRESET", "record")
    names = f"{'parameters':>12}{'integers':>12}{'float16':>10}{'code':>9}{'estimate':>12}"
    print(f"{'system':<14}{names}{'of cap':>8}")
    for system in SYSTEMS:
        hp = module_of(system).Hyperparameters.from_env({"PRESET": preset})
        (quantized, half), code = estimated_bytes(hp), code_bytes(system)
        total = quantized + half + code
        print(
            f"{system:<14}{parameters(hp):>12,}{quantized:>12,.0f}{half:>10,}{code:>9,}"
            f"{total:>12,.0f}{total / t.SIZE_LIMIT:>8.1%}"
        )


# --- Packing --------------------------------------------------------------------------------------


def integers_of(path: Path) -> tuple[list[np.ndarray], np.ndarray]:
    """int8 tensors of an artifact, and how often each value comes, uint32 [tensors, 256]. Raises:
    OSError, ValueError naming the file."""
    text, counts, _, code = packed.unpack(path)
    head = json.loads(text)
    model = shape_of(module_of(head["system"]).Hyperparameters(**head["config"]))
    shapes = [p.shape for name, p in model.named_parameters() if model.kinds[name] != t.SCALAR]
    return packed.decode(path, code, counts, shapes), counts


def packers(ints: list[np.ndarray], counts: np.ndarray) -> dict[str, tuple]:
    """How each packs, without arguments, and how it loads what it packed; to bytes."""
    raw, flat = b"".join(q.tobytes() for q in ints), [q.ravel() for q in ints]
    table = brotli.compress(json.dumps(counts.tolist()).encode(), quality=11)

    def load(data: bytes) -> bytes:
        code, shapes = data[len(table) :], [q.shape for q in ints]
        return b"".join(q.tobytes() for q in packed.decode(Path("code"), code, counts, shapes))

    return {
        "range code": (lambda: table + t.range_code(flat)[1], load),
        "brotli 11": (lambda: brotli.compress(raw, quality=11, lgwin=24), brotli.decompress),
        "zstd 22": (
            lambda: zstandard.ZstdCompressor(level=22).compress(raw),
            zstandard.ZstdDecompressor().decompress,
        ),
    }


def bench_packing(args) -> None:
    """Of ARTIFACT."""
    compare_packers(Path(os.environ.get("ARTIFACT", t.Hyperparameters.artifact)))


def compare_packers(path: Path) -> None:
    """The range code with its counts, as they are in an artifact."""
    try:
        ints, counts = integers_of(path)
    except (OSError, ValueError) as error:
        sys.exit(f"bench: error: {error}")
    entropy = sum(packed.entropy_bytes(q.tobytes()) for q in ints)
    raw = b"".join(q.tobytes() for q in ints)
    print(f"{path.name}: {len(ints)} tensors, {len(raw):,} values, entropy {entropy:,.0f} bytes")
    print(f"{'':<12}{'bytes':>12}{'above':>9}{'pack, s':>10}{'load, s':>10}")
    for name, (pack, load) in packers(ints, counts).items():
        start = time.perf_counter()
        data = pack()
        middle = time.perf_counter()
        assert load(data) == raw, name
        end = time.perf_counter()
        above = f"{len(data) / entropy - 1:+.2%}"
        print(f"{name:<12}{len(data):>12,}{above:>9}{middle - start:>10.2f}{end - middle:>10.2f}")


# --- Every byte used ------------------------------------------------------------------------------


def trained_like(model: t.GPT) -> dict[str, torch.Tensor]:
    """Fills the model with weights whose rows and columns differ in size as after training. Returns
    Hessians of correlated inputs, of another size for each matrix."""
    hessians = {}
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_().mul_(0.04 * torch.exp(0.2 * torch.randn(p.shape[-1:])))
            if model.kinds[name] != t.SCALAR:
                rows, cols = p.shape
                p.mul_(torch.exp(0.2 * torch.randn(rows, 1)))
                X = torch.randn(2 * cols, cols) * torch.exp(0.5 * torch.randn(cols))
                X += 0.3 * torch.randn(2 * cols, 8) @ torch.randn(8, cols)
                hessians[name] = X.mT @ X / len(X) * torch.exp(0.8 * torch.randn(()))
    return hessians


def bench_fit(args) -> None:
    """On weights that were not trained, one core; then the packers, on the first artifact."""
    torch.set_num_threads(1)
    names = f"{'target':>12}{'bytes':>12}{'below':>9}{'passes':>8}{'CPU, s':>8}{'load, s':>9}"
    print(f"{'system':<14}{'parameters':>12}{names}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for system in SYSTEMS:
            print(fitted_row(system, f"{folder}/{system}"), flush=True)
        print()
        compare_packers(Path(folder, SYSTEMS[0]))


def fitted_row(system: str, artifact: str) -> str:
    """Of the table; the artifact is written."""
    module = module_of(system)
    hp = module.Hyperparameters(artifact=artifact)
    torch.manual_seed(0)
    model, start = module.GPT(hp), time.process_time()
    code = mock.patch.object(t, "code_files", functools.partial(code_files, system))
    with code, mock.patch.object(t, "quantize", wraps=t.quantize) as quantize:
        t.fit(hp, model, trained_like(model))
    middle = time.process_time()
    t.load_artifact(artifact, "cpu", type(hp), type(model))
    end, size = time.process_time(), os.path.getsize(artifact) + code_bytes(system)
    return (
        f"{system:<14}{parameters(hp):>12,}{hp.artifact_target_bytes:>12,}{size:>12,}"
        f"{1 - size / hp.artifact_target_bytes:>9.3%}{quantize.call_count:>8}"
        f"{middle - start:>8.0f}{end - middle:>9.1f}"
    )


# --- Throughput -----------------------------------------------------------------------------------


def matmul_flops_per_token(model: t.GPT) -> float:
    """Of training: the backward is two forwards."""
    ids = torch.zeros(1, 64, dtype=torch.long, device=t.world.device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids)
    return 3 * counter.get_flop_counts()["Global"][torch.ops.aten.mm] / 64


def bench_throughput(args) -> None:
    """Steps as at the end of a run, where a schedule has reached its last stage."""
    module, device = module_of(os.environ.get("SYSTEM", "record")), t.world.device
    hp = module.Hyperparameters.from_env(os.environ)
    torch.manual_seed(0)
    model = module.GPT(hp).to(device)
    model.set_progress(1.0)
    optimizer = t.Muon(model, hp)
    rows = hp.train_batch_tokens // (hp.micro_steps() * hp.train_seq_len)
    shape = hp.micro_steps_at(1.0), 2, rows, hp.train_seq_len
    model.most_documents[rows, hp.train_seq_len] = 4 * rows  # about FineWeb's; there are none here

    def step():
        ids = torch.randint(t.BOS_ID + 1, hp.vocab_size, shape, device=device)
        batch = [(x, y) for x, y in ids]
        t.accumulate(model, batch)
        optimizer.step(1.0, hp.muon_momentum)

    took, tokens = median_seconds([step], args.runs)[0], math.prod(shape) // 2
    rate, peak = tokens / took, matmul_flops_per_second(t.world.dtype)
    flops = matmul_flops_per_token(model)
    print(
        f"{hp.system}, preset {hp.preset}, {device}: {rate:,.0f} tokens/s, "
        f"{1000 * took:.1f} ms per {tokens:,} tokens\n"
        f"  matmul floor {flops / 1e6:.1f} MFLOP/token at {peak / 1e12:.3f} TFLOP/s: "
        f"{peak / flops:,.0f} tokens/s, {rate * flops / peak:.1%} of it reached"
    )
    if t.world.on_cuda:
        memory = torch.cuda.max_memory_allocated() / 2**30
        print(f"  {torch.cuda.get_device_name()}, peak memory {memory:.2f} GiB")


# --- Toys -----------------------------------------------------------------------------------------

TOY = dict(
    vocab_size=1024,
    data_path="./data/datasets/demo",
    tokenizer_path="./data/tokenizers/demo_1024_bpe.model",
    train_batch_tokens=1536,
    train_seq_len=512,
    gdn_heads=2,
    gdn_head_dim=64,
    num_heads=2,
    num_kv_heads=1,
    window_size=256,
    max_wallclock_seconds=0.0,
    warmup_steps=1,
    ema_decay=0.95,
    artifact_target_bytes=0,
    rounding_step=1e-6,  # all are clipped at 6 deviations: trainings are compared
    gptq_calibration_batches=16,
    eval_mode="sliding",
    eval_seq_len=512,
    eval_stride=256,
    val_batch_size=4096,
    eval_seconds=0.0,
    ttt="",
)
TOY_NGRAMS = dict(ngram_vocab_size=1024, ngram_dim=64)  # of a system that has them
TOY_WIDTHS = range(48, 385, 4)
SEEDED = ("record", "transformer", "baseline")  # run with all seeds, to be compared


def toy(system: str, target: int, tokens: int) -> tuple[dict, int]:
    """Settings of a toy of the system: its layout and tricks, the width that comes nearest to
    `target` parameters, and as many steps as `tokens` need; and its parameters."""
    hp_class = module_of(system).Hyperparameters
    key_heads = TOY["gdn_heads"] * hp_class.gdn_key_heads // hp_class.gdn_heads
    own = dict(grad_accum_steps=hp_class.grad_accum_steps or 1, gdn_key_heads=key_heads)
    settings = TOY | own
    if hasattr(hp_class, "ngram_dim"):
        settings |= TOY_NGRAMS

    def size(width: int) -> int:
        return parameters(hp_class(**settings, model_dim=width))

    above = max(1, bisect.bisect_left(TOY_WIDTHS, target, key=size))
    width = min(TOY_WIDTHS[above - 1 : above + 1], key=lambda width: abs(size(width) - target))
    hp = hp_class(**settings, model_dim=width)
    starts = hp.stage_starts()
    lengths = np.diff([*starts, 1.0])  # of the stages, in shares of the run
    micro_steps = sum(lengths * [hp.micro_steps_at(start) for start in starts])  # in the mean
    steps = tokens / (hp.train_batch_tokens * micro_steps / hp.micro_steps())
    return settings | dict(model_dim=width, iterations=max(1, round(steps))), size(width)


def run_output(name: str, system: str, settings: dict[str, str], folder) -> str:
    """What a run of the system prints, in a process of its own, in `folder`. settings: beside those
    of the environment.
    Raises: RuntimeError with `name` and the end of the output of a run that fails."""
    command, env = [sys.executable, script_of(system)], os.environ | settings
    run = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{name}: {run.stdout[-1000:]}{run.stderr[-1000:]}")
    return run.stdout


def figures_of(output: str) -> dict:
    """What a run says of itself in its last line."""
    return json.loads(re.search(r"^figures: (.*)$", output, re.M)[1])


def toy_run(system: str, settings: dict, seed: int) -> tuple[float, float]:
    """One run. Returns bits per byte of the artifact and training tokens per second."""
    env = {name.upper(): str(value) for name, value in settings.items()}
    for name in ("DATA_PATH", "TOKENIZER_PATH"):  # the run is in another folder
        env[name] = str(Path(os.environ.get(name, env[name])).resolve())
    env |= dict(PRESET="record", SEED=str(seed), ARTIFACT="toy.ptz", EVAL_ONLY="0")
    with tempfile.TemporaryDirectory() as folder:
        output = run_output(f"{system}, seed {seed}", system, env, folder)
    figures = figures_of(output)
    calibration = settings["gptq_calibration_batches"] * settings["train_batch_tokens"]
    tokens = figures["tokens_needed"] - calibration
    milliseconds = int(re.findall(r"val_bpb:\S+ train_time:(\d+)ms", output)[-1])
    return figures["val_bpb"], 1000 * tokens / milliseconds


def bench_systems(args) -> None:
    data = Path(os.environ.get("DATA_PATH", TOY["data_path"])).name
    target, scores = toy("record", 1_300_000, 1)[1], {}
    print(
        f"toys of about {target:,} parameters, {args.tokens:,} tokens of {data}, "
        f"{t.world.device.type}\n"
        "| system | layout | parameters, published | ours | artifact + code, estimated | "
        "toy: parameters | val_bpb | seeds | tokens/s |\n|---|---|--:|--:|--:|--:|--:|--:|--:|"
    )
    for system in SYSTEMS:
        settings, count = toy(system, target, args.tokens)
        seeds = args.seeds if system in SEEDED else 1
        runs = [toy_run(system, settings, seed) for seed in range(1, seeds + 1)]
        bpb, rates = zip(*runs, strict=True)
        scores[system] = bpb
        noise = f" ± {statistics.stdev(bpb):.4f}" if seeds > 1 else ""
        hp = module_of(system).Hyperparameters()
        estimate = sum(estimated_bytes(hp)) + code_bytes(system)
        print(
            f"| `{system}` | `{hp.layout}` | {PUBLISHED[system]} | {parameters(hp):,} | "
            f"{estimate / 1e6:.2f} MB | {count:,} | {statistics.mean(bpb):.4f}{noise} | {seeds} | "
            f"{statistics.median(rates):,.0f} |",
            flush=True,
        )
    for other in SEEDED[1:]:
        better = [b - a for a, b in zip(scores["record"], scores[other], strict=True)]
        by_seed = " ".join(f"{x:+.4f}" for x in better)
        print(f"record better than {other} by {statistics.mean(better):+.4f}, by seed: {by_seed}")


# --- Evaluation -----------------------------------------------------------------------------------

MODES = {  # by name, what the mode needs in the environment
    "non-overlapping": "EVAL_MODE=sliding EVAL_STRIDE={eval_seq_len}",
    "sliding-64": "EVAL_MODE=sliding EVAL_STRIDE=64",
    "stream": "EVAL_MODE=stream",
    "stream+lora": "EVAL_MODE=stream TTT=lora",
    "stream+lora+phases": "EVAL_MODE=stream TTT=lora TTT_PHASES=3",
    "stream+sgd": "EVAL_MODE=stream TTT=sgd",
    "sliding-64+sgd": "EVAL_MODE=sliding EVAL_STRIDE=64 TTT=sgd",
}
ROWS = [str(number) for number, _ in enumerate(MODES, 1)]  # the modes by number
UNLESS_NAMED = dict(EVAL_ONLY="1", EVAL_SECONDS="0", TTT="", TTT_PHASES="0")
OFFSETS = np.array([0, *(2**i for i in range(6, 14))])  # where the buckets of the curve begin


def settings_of(mode: str) -> dict[str, str]:
    return dict(pair.split("=") for pair in mode.split())


def modes_of(hp: t.Hyperparameters, rows: list[str] | None = None) -> dict[str, str]:
    """The modes of its system, by name; of these the `rows`, by number or name.
    Raises: ValueError if one of the rows is not a mode of the system."""
    variables, own = {f.name.upper() for f in fields(hp)}, {}
    for name, mode in MODES.items():
        settings = settings_of(mode)
        if settings.keys() <= variables and settings.get("TTT", "") in hp.ttt_kinds:
            own[name] = mode.format(eval_seq_len=hp.eval_seq_len)
    numbered = dict(zip(ROWS, MODES, strict=True))
    wanted = [numbered.get(row, row) for row in rows or own]
    if missing := [name for name in wanted if name not in own]:
        raise ValueError(f"--rows {' '.join(missing)}: expected of {hp.system}: {', '.join(own)}")
    return {name: mode for name, mode in own.items() if name in wanted}


def evaluation_run(name: str, system: str, settings: dict[str, str], folder: Path):
    """Bits per byte and seconds of the final pass. The log is logs/NAME.txt in the folder, the
    scores are NAME.npz."""
    own = dict(RUN_ID=name, SCORES=str(folder / f"{name}.npz"))
    figures = figures_of(run_output(name, system, UNLESS_NAMED | settings | own, folder))
    return figures["val_bpb"], figures["eval_time_seconds"]


def by_offset(scores, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Targets, and their bits per byte, in each bucket of the offset of a target from its
    document's BOS. A BOS has the offset 0 and no bytes: what the end of a document costs stands in
    the first bucket, of the document that begins.
    scores: nats, bytes, position as of SCORES; starts: the positions of all BOS."""
    position = scores["position"]
    offset = position - starts[np.searchsorted(starts, position, side="right") - 1]
    bucket, n = np.searchsorted(OFFSETS, offset, side="right") - 1, len(OFFSETS)
    nats, total_bytes = (np.bincount(bucket, scores[name], n) for name in ("nats", "bytes"))
    bits_per_byte = nats / math.log(2) / np.where(total_bytes, total_bytes, np.nan)
    return np.bincount(bucket, minlength=n), bits_per_byte


def print_rows(modes: dict[str, str], results: dict[str, tuple[float, float]]) -> None:
    """The table of modes; without sliding-64 there is nothing to compare with."""
    print("| mode | settings | val_bpb | to sliding-64 | seconds | speed |")
    print("|---|---|--:|--:|--:|--:|")
    base = results.get("sliding-64")
    for name, (bpb, took) in results.items():
        gain, speed = "-", "-"
        if base:
            gain, speed = f"{bpb - base[0]:+.4f}", f"{base[1] / took:.2f}x"
        print(f"| {name} | `{modes[name]}` | {bpb:.4f} | {gain} | {took:.2f} | {speed} |")


def print_curve(names: list[str], folder: Path, starts: np.ndarray) -> None:
    """Bits per byte by position in the document, of the scores in the folder; buckets without
    targets are left out."""
    curves = []
    for name in names:
        with np.load(folder / f"{name}.npz") as scores:
            curves.append(by_offset(scores, starts))
    print(f"\n| offset | targets | {' | '.join(names)} |\n|--:|--:|{'--:|' * len(names)}")
    ends, columns = [f"-{end - 1}" for end in OFFSETS[1:]] + ["+"], [bits for _, bits in curves]
    for start, end, count, *bits in zip(OFFSETS, ends, curves[0][0], *columns, strict=True):
        if count:
            print(f"| {start}{end} | {count:,} | {' | '.join(f'{x:.4f}' for x in bits)} |")


def print_head(hp: t.Hyperparameters, targets: int, documents: int) -> None:
    shared = re.compile(r"eval_(seq_len|chunk|rows)|ttt_(?!phases)")
    values = {name.upper(): value for name, value in vars(hp).items() if shared.match(name)}
    print(
        f"{Path(hp.artifact).name} ({hp.system}) on {Path(hp.data_path).name}, "
        f"{documents:,} documents, {targets:,} targets, {t.world.device.type}; all with "
        f"{' '.join(f'{name}={value}' for name, value in values.items())}\n",
        flush=True,
    )


def bench_evaluation(args) -> None:
    """Runs work on a copy of the artifact: each writes a sample of its scores beside it."""
    system, env = args.system, os.environ | UNLESS_NAMED
    module, path = module_of(system), env.get("ARTIFACT", t.Hyperparameters.artifact)
    saved = t.load_artifact(path, "cpu", module.Hyperparameters, module.GPT)[1]
    hp = module.Hyperparameters.from_env(env, saved)
    modes, results = modes_of(hp, args.rows), {}
    stream = t.TokenStream(hp.data_path, "val", hp.vocab_size)
    starts = np.flatnonzero(stream.read(0, len(stream)).numpy() == t.BOS_ID)
    print_head(hp, len(stream) - 1, len(starts))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.folder or temporary).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        files = dict(
            ARTIFACT=shutil.copy(path, temporary),
            DATA_PATH=str(Path(hp.data_path).resolve()),
            TOKENIZER_PATH=str(Path(hp.tokenizer_path).resolve()),
        )
        for name, mode in modes.items():
            results[name] = evaluation_run(name, system, files | settings_of(mode), folder)
            bpb, took = results[name]
            print(f"{name}: {bpb:.4f} in {took:.1f} s", file=sys.stderr)
        print_rows(modes, results)
        print_curve([*results], folder, starts)


def bench_floor(args) -> None:
    """In a process of its own, which believes that it has a GPU."""
    subprocess.run([sys.executable, Path(__file__).with_name("floor.py"), "--fast"], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what, add = parser.add_mutually_exclusive_group(required=True), parser.add_argument
    benches = bench_delta, bench_size, bench_packing, bench_fit, bench_throughput, bench_floor
    for bench in (*benches, bench_systems, bench_evaluation):
        name = bench.__name__.removeprefix("bench_")
        what.add_argument(f"--{name}", dest="bench", action="store_const", const=bench)
    seeded = ", ".join(SEEDED)
    add("--runs", type=int, default=10, help="timed runs, after 3 of warm-up")
    add("--tokens", type=int, default=614_400, help="that each toy is trained on")
    add("--seeds", type=int, default=3, help=f"of {seeded}; the other toys have one")
    add(
        "--rows",
        nargs="+",
        choices=[*ROWS, *MODES],
        metavar="ROW",
        help="of the evaluation, by number or name; default: all that the system has",
    )
    add("--folder", help="where the evaluation leaves its logs and scores; default: nowhere")
    add(
        "--train-script",
        type=system_of,
        dest="system",
        default=str(script_of("record")),
        metavar="SCRIPT",
        help="of the system whose artifact is evaluated; default: train_gpt.py",
    )
    args = parser.parse_args()
    args.bench(args)


if __name__ == "__main__":
    main()
