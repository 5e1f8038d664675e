"""Would a run on this machine end well, and when? Measures its parts and forecasts the whole.

    ./run.sh check                                    # with the settings of ./run.sh
    torchrun --standalone --nproc_per_node=8 tools/check.py
    PRESET=demo SYSTEM=crawler python tools/check.py

A row for each requirement: what, found, needed, ok or NOT and then what to set or do; `-` where it
rests on a part that failed. Exit status 1 if the run would fail; under torchrun always 0, the
status is `check_failed` in logs/check.env. That file also holds the settings that would help, for
run.sh. Needs up to three minutes on a GPU; trains and scores random tokens only.
"""

import collections
import functools
import gc
import importlib
import importlib.metadata
import inspect
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "systems"), str(ROOT / "tools")]
import bench  # noqa: E402  (the paths come first)
import dataset  # noqa: E402

import train_gpt as t  # noqa: E402

ENV_FILE = Path("logs/check.env")
MIB, GIB = 1 << 20, 1 << 30
DRIVER_OF_CUDA = {12: 525, 13: 580}  # oldest driver by major version of CUDA
USABLE_MEMORY = 0.92  # of a GPU: the allocator leaves gaps
INSTALL = "pip install -r requirements.txt"
OLDER_TORCH = (
    "pip install 'torch>=2.11,<2.13' --index-url https://download.pytorch.org/whl/cu128, "
    "and start the run by tools/old_torch.py"
)


@dataclass
class Row:
    found: str
    needed: str = ""
    ok: bool | None = True  # None: not checked
    remedy: str = ""
    settings: dict = field(default_factory=dict)  # that would help
    fatal: bool = False  # nothing below can be checked


class NotChecked(Exception):
    """Rests on a part that failed."""


class Job(SimpleNamespace):
    """What the parts know: hp and module, and what earlier ones have set."""

    def __getattr__(self, name):  # only called for what is not there
        raise NotChecked(name)


# --- Time, memory, ranks --------------------------------------------------------------------------


def agree(x: float) -> float:
    """The largest of all ranks."""
    if not dist.is_initialized():
        return x
    return t.world.all_reduce(torch.tensor(x, dtype=torch.double), dist.ReduceOp.MAX).item()


def seconds_of(function: Callable) -> float:
    """Of one call, on the slowest rank."""
    sync = torch.cuda.synchronize if t.world.on_cuda else lambda: None
    sync()
    start = time.perf_counter()
    function()
    sync()
    return agree(time.perf_counter() - start)


def mean_seconds(function: Callable, limit: float) -> float:
    """Mean of 2 to 20 calls, which take about `limit` seconds together."""
    n = max(2, min(20, int(limit / seconds_of(function))))
    return seconds_of(lambda: [function() for _ in range(n)]) / n


def allocated() -> int:  # bytes, as in the two below
    return torch.cuda.memory_allocated() if t.world.on_cuda else 0


def peak() -> int:  # since `free_memory`
    return torch.cuda.max_memory_allocated() if t.world.on_cuda else 0


def memory_limit() -> float:
    """Bytes that this process may allocate: all that others leave."""
    if not t.world.on_cuda:
        return math.inf
    return USABLE_MEMORY * (torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved())


def free_memory(model: t.GPT) -> None:
    """Of gradients, and of what a pass that failed has left attached."""
    model.requires_grad_(True)
    model.zero_grad()
    for module in model.modules():
        if isinstance(module, t.Linear):
            module.lora = None
    gc.collect()
    if t.world.on_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower()


def try_size(model: t.GPT, measure: Callable, size: int) -> tuple[int, int] | None:
    """Bytes allocated before and at the peak of measure(size); None if memory does not suffice."""
    free_memory(model)
    try:
        return measure(size), peak()
    except Exception as error:
        if not out_of_memory(error):
            raise
    return None


def largest_that_fits(model: t.GPT, measure: Callable, sizes: list[int]) -> int:
    """The first of `sizes`, which fall, that by the memory of a small one would fit, and that then
    does. measure(size) returns the bytes that were allocated without its rows.
    Raises: MemoryError if none fits."""
    if try_size(model, measure, sizes[0]):
        return sizes[0]
    small = next((n for n in sizes if n <= sizes[0] / 8), sizes[-1])
    base, top = try_size(model, measure, small) or (0, math.inf)
    free_memory(model)
    limit = memory_limit()
    for n in sizes[1:]:
        too_large = base + (top - base) / small * n > limit
        if not agree(float(too_large)) and try_size(model, measure, n):
            return n
    raise MemoryError(f"out of memory: not even {sizes[-1]} of {sizes[0]} rows fit")


# --- The machine ----------------------------------------------------------------------------------


def pinned(package: str) -> str:
    text = (ROOT / "requirements.txt").read_text()
    return re.search(rf"^{package}==([\d.]+)", text, re.M)[1]


def installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def python_version(job) -> Row:
    return Row(platform.python_version(), "3.11 or newer", sys.version_info >= (3, 11))


def torch_version(job) -> Row:
    """Another version will do if attention takes the arguments that it is called with."""
    kinds = inspect.signature(t.varlen_attn).parameters
    any_name = any(p.kind == p.VAR_KEYWORD for p in kinds.values())
    ok = any_name or {"window_size", "enable_gqa"} <= kinds.keys()
    text = "" if ok else ": its varlen_attn has not window_size and enable_gqa"
    return Row(torch.__version__ + text, pinned("torch"), ok, INSTALL)


def triton_version(job) -> Row:
    """Another version will do if the delta rule is right, see there."""
    found = installed("triton")
    ok = found is not None or not t.world.on_cuda
    return Row(str(found), pinned("triton"), ok, INSTALL)


def fla_version(job) -> Row:
    """Its inner functions are called, which change from version to version."""
    found = {installed(name) for name in ("fla-core", "flash-linear-attention")}
    ok = found == {pinned("fla-core")} or not t.world.on_cuda
    return Row(" and ".join(map(str, found)), pinned("fla-core"), ok, INSTALL)


def driver_version() -> str | None:
    """Of the NVIDIA driver; None without one."""
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        run = subprocess.run(query, capture_output=True, text=True, timeout=30)
        if found := re.match(r"[\d.]+", run.stdout):
            return found[0]
    file = Path("/proc/driver/nvidia/version")
    found = re.search(r"Kernel Module\D*([\d.]+)", file.read_text()) if file.exists() else None
    return found and found[1]


def cuda_version() -> str | None:
    """What torch was built for; None: for CPUs."""
    return torch.version.cuda


def driver(job) -> Row:
    version, cuda = driver_version(), cuda_version()
    if version is None:
        return Row("unknown" if t.world.on_cuda else "none", "none, on CPUs")
    if cuda is None:
        remedy = "delete .venv, then ./run.sh check without PIP_EXTRA_INDEX_URL"
        return Row(f"{version}, torch for CPUs", "torch for CUDA", False, remedy, fatal=True)
    oldest = DRIVER_OF_CUDA.get(int(cuda.split(".")[0]), 0)
    ok = int(version.split(".")[0]) >= oldest
    remedy = "a newer driver, or " + OLDER_TORCH
    return Row(version, f"{oldest} or newer for CUDA {cuda}", ok, remedy, fatal=not ok)


def gpus(job) -> Row:
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", t.world.size))
    if not torch.cuda.is_available():
        ok = driver_version() is None
        remedy = "see the driver; or CUDA_VISIBLE_DEVICES hides them"
        return Row(f"none, {os.cpu_count()} cores", "none, on CPUs", ok, remedy, fatal=not ok)
    count = torch.cuda.device_count()
    if t.world.on_cuda and t.world.device.index < count:
        torch.cuda.set_device(t.world.device)  # what follows must not use the memory of another
    all_properties = map(torch.cuda.get_device_properties, range(count))
    kinds = [(p.name, f"{p.major}.{p.minor}", p.total_memory // GIB) for p in all_properties]
    found = ", ".join(
        f"{count} x {name}, capability {capability}, {memory} GiB"
        for (name, capability, memory), count in collections.Counter(kinds).items()
    )
    ok = len(kinds) >= ranks and all(float(capability) >= 8 for _, capability, _ in kinds)
    remedy = f"set NPROC={max(n for n in (1, 2, 4, 8) if n <= max(1, len(kinds)))}"
    remedy += "; cards older than capability 8.0 will not do"
    return Row(found, f"{ranks}, capability 8.0 or newer", ok, remedy, fatal=not ok)


def state_bytes(model: t.GPT) -> int:
    """Of ARTIFACT.trained.pt: weights and Hessians, float32."""
    weights = sum(p.numel() for p in model.parameters())
    named = model.named_parameters()
    return 4 * (weights + sum(p.shape[1] ** 2 for n, p in named if model.kinds[n] != t.SCALAR))


def disk(job) -> Row:
    """Of the artifact's folder, which holds the trained state too, and of the logs'."""
    folder, logs = Path(job.hp.artifact).resolve().parent, Path("logs").resolve()
    needed = {folder: state_bytes(job.model) + 2 * t.SIZE_LIMIT}
    needed[logs] = needed.get(logs, 0) + 16 * MIB
    found, ok = [], True
    for path in needed:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
        free = shutil.disk_usage(path).free
        found.append(f"{free / GIB:.1f} GiB free")
        ok = ok and free >= sum(needed.values())
    text = f"{sum(needed.values()) / MIB:,.0f} MiB"
    return Row(", ".join(dict.fromkeys(found)), text, ok, f"free {text}, or set ARTIFACT elsewhere")


def shared_memory(job) -> Row:
    """NCCL's buffers lie there; a container has 64 MiB unless told otherwise."""
    needed = 512 * MIB if t.world.size > 1 and t.world.on_cuda else 0
    path = Path("/dev/shm")
    free = shutil.disk_usage(path).free if path.exists() else 0
    remedy = "start the container with --shm-size=8g, or --ipc=host"
    return Row(f"{free / MIB:,.0f} MiB free", f"{needed / MIB:g} MiB", free >= needed, remedy)


# --- The data -------------------------------------------------------------------------------------


def training_shards(job) -> Row:
    """Headers and lengths of all; ids at the start of each, below VOCAB_SIZE."""
    remedy = "delete that file, then run data/prepare.py, which goes on where it stopped"
    try:
        stream = t.TokenStream(job.hp.data_path, "train", job.hp.vocab_size)
        for start, end in zip(stream.starts, stream.starts[1:], strict=False):
            stream.read(start, min(65_536, end - start))
    except (OSError, ValueError) as error:
        return Row(str(error), "shards as of data/prepare.py", False, remedy)
    job.stream = stream
    return Row(f"{len(stream.paths)} of {len(stream):,} tokens", f"ids below {stream.vocab_size}")


def validation_text(job) -> Row:
    """As the run reads it, and by the run's own check of its bytes."""
    job.seconds["validation"] = seconds_of(functools.partial(read_validation, job))
    audit = t.Audit()
    t.check_bytes(audit, job.hp, job.validation)
    failed = [name for name, check in audit.checks.items() if not check["passed"]]
    v = job.validation
    official = "official" if v.is_official else "not the official split"
    found = f"{len(v.tokens):,} tokens, {len(v.starts):,} documents, {v.bytes:,} bytes, {official}"
    text = f"; audit of {', '.join(failed)} failed" if failed else ""
    remedy = "delete DATA_PATH and run data/prepare.py again"
    return Row(found + text, "bytes of the decoded text", not failed, remedy)


def read_validation(job) -> None:
    job.validation = getattr(job.module, "Validation", t.Validation)(job.hp)


def files(job) -> Row:
    """Against stats.json; where there is none, by encoding the text again."""
    t.check_files(job.hp)
    count = len(t.described(job.hp))
    if wrong := dataset.another_tokenizer(Path(job.hp.data_path), Path(job.hp.tokenizer_path)):
        raise ValueError(wrong)
    found = f"{count} with the sums of stats.json" if count else "not described by a stats.json"
    return Row(found, "shards and tokenizer as they were made")


# --- Ranks ----------------------------------------------------------------------------------------


def ranks(job) -> Row:
    if t.world.size > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if t.world.on_cuda else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=180))
    up = t.world.all_reduce(torch.ones((), device=t.world.device)).item()
    ok = up == t.world.size
    return Row(f"{up:g} up, {t.world.device.type}", f"{t.world.size}", ok, fatal=not ok)


def model_row(job) -> Row:
    """Built as by the run; and whether the batch splits evenly."""
    hp = job.hp
    torch.manual_seed(hp.seed)
    job.model = job.module.GPT(hp)
    count = sum(p.numel() for p in job.model.parameters())
    found = f"{hp.system}, preset {hp.preset}: {count:,} parameters"
    steps, rows = hp.micro_steps(), hp.micro_rows()
    return Row(found, f"micro-batches a step and rank: {steps} of {rows} x {hp.train_seq_len}")


def collectives(job) -> Row:
    """Of a step: all gradients, and the updates of the largest stack."""
    job.model.to(t.world.device)
    if t.world.size == 1:
        return Row("one rank", "")
    flat = torch.ones(sum(p.numel() for p in job.model.parameters()), device=t.world.device)
    part = torch.ones(MIB, device=t.world.device, dtype=t.world.dtype)
    gathered = part.new_empty(t.world.size * MIB)
    calls = (
        lambda: t.world.all_reduce(flat),
        lambda: dist.all_gather_single(gathered, part),
    )
    reduce, gather = (1000 * (f(), mean_seconds(f, 2.0))[1] for f in calls)
    ok = bool(gathered.eq(1).all())
    found = (
        f"all_reduce of {4 * len(flat) / MIB:,.0f} MiB {reduce:.1f} ms, all_gather {gather:.1f} ms"
    )
    return Row(found, "sums and parts of all ranks", ok, "NCCL_DEBUG=INFO says more")


# --- Kernels --------------------------------------------------------------------------------------


def relative_errors(names: str, found: Iterable[Tensor], exact: Iterable[Tensor]) -> dict:
    errors = {}
    for name, x, y in zip(names.split(), found, exact, strict=True):
        errors[name] = ((x.double() - y).norm() / y.norm().clamp_min(1e-30)).item()
    return errors


def with_gradients(function: Callable, inputs: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    """Outputs, and gradients of their weighted sum."""
    outputs = function(*inputs)
    total = sum((x * w).sum() for x, w in zip(outputs, weights, strict=True))
    return [x.detach() for x in outputs] + [*torch.autograd.grad(total, inputs)]


def token_loop(q, k, v, g, beta, S) -> tuple[Tensor, Tensor]:
    """The definition: decay, write what the key does not recall, read."""
    q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], 2) for x in (q, k))
    out = []
    for i in range(q.shape[1]):
        S = S * g[:, i].exp()[:, :, None, None]
        recalled = torch.einsum("bhkv,bhk->bhv", S, k[:, i])
        write = beta[:, i, :, None] * (v[:, i] - recalled)
        S = S + torch.einsum("bhk,bhv->bhkv", k[:, i], write)
        out.append(torch.einsum("bhkv,bhk->bhv", S, q[:, i]) / q.shape[-1] ** 0.5)
    return torch.stack(out, 1), S


def delta_errors(B: int, T: int, key_heads: int, H: int, K: int, V: int) -> dict[str, float]:
    """Of the op as it is called, against float64; the first row stands for all."""
    device, dtype = t.world.device, t.world.dtype
    q, k = (F.normalize(torch.randn(B, T, key_heads, K, device=device), dim=-1) for _ in range(2))
    v, state = torch.randn(B, T, H, V, device=device), torch.randn(B, H, K, V, device=device)
    g = -F.softplus(2 * torch.randn(B, T, H, device=device) - 2)
    g[:, T // 3] = t.RESET_LOG_DECAY  # a document begins
    beta = torch.rand(B, T, H, device=device)
    inputs = [q.to(dtype), k.to(dtype), v.to(dtype), g, beta, state]
    weights = [torch.randn_like(v).to(dtype), torch.randn_like(state)]
    mine = with_gradients(t.gated_delta_rule, [x.requires_grad_() for x in inputs], weights)
    one = [x.detach()[:1].double().requires_grad_() for x in inputs]
    rule = t.torch_gated_delta_rule if t.world.on_cuda else token_loop
    exact = with_gradients(rule, one, [w[:1].double() for w in weights])
    names = "o state dq dk dv dg dbeta dstate"
    return relative_errors(names, [x[:1] for x in mine], exact)


def conv_errors(B: int, T: int, n: int, width: int) -> dict[str, float]:
    """Of the short convolution as it is called, in documents, against float64."""
    ids = torch.full((B, T), t.BOS_ID + 1, device=t.world.device)
    ids[:, [0, T // 3, T // 3 + 2]] = t.BOS_ID
    ctx = t.make_context(ids, t.Hyperparameters(), 4 * B)
    x = torch.randn(B, T, n, device=t.world.device).to(t.world.dtype)
    weight, weights = torch.randn(n, width, device=x.device), [torch.randn_like(x)]

    def convolve(x, weight):
        return (t.short_conv(x, weight, ctx),)

    def exact_convolution(x, weight):
        def tap(n: int) -> Tensor:
            same = (t.shift(ctx.doc, n) == ctx.doc)[..., None]
            return t.shift(x, n) * (same * weight[:, width - 1 - n])

        return (sum(map(tap, range(width))),)

    inputs = [x.requires_grad_(), weight.requires_grad_()]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    mine = with_gradients(convolve, inputs, weights)
    found = with_gradients(exact_convolution, exact, [w.double() for w in weights])
    return relative_errors("y dx dweight", mine, found)


def attention_errors(B: int, T: int, window: int, hp) -> dict[str, float]:
    def exact_attention(q, k, v):
        k, v = (x.repeat_interleave(hp.num_heads // hp.num_kv_heads, 2) for x in (k, v))
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / hp.head_dim**0.5
        at = torch.arange(T, device=q.device)
        seen = (at[:, None] >= at) & (at[:, None] - at < window)
        seen = seen & (doc[0, :, None] == doc[0])
        return (
            torch.einsum("bhij,bjhd->bihd", scores.masked_fill(~seen, -math.inf).softmax(-1), v),
        )

    device, heads = t.world.device, (hp.num_heads, hp.num_kv_heads, hp.num_kv_heads)
    doc = (torch.arange(T, device=device) >= T // 16).long().expand(B, T)  # one beyond the window
    inputs = [torch.randn(B, T, n, hp.head_dim, device=device).to(t.world.dtype) for n in heads]
    weights = [torch.randn_like(inputs[0])]

    def attend(q, k, v):
        return (t.window_attention(q, k, v, window, doc, 2 * B),)

    mine = with_gradients(attend, [x.requires_grad_() for x in inputs], weights)
    one = [x.detach()[:1].double().requires_grad_() for x in inputs]
    exact = with_gradients(exact_attention, one, [weights[0][:1].double()])
    return relative_errors("o dq dk dv", [x[:1] for x in mine], exact)


def kernel_row(errors: dict[str, dict], tolerance: float) -> Row:
    worst = {case: max(found.values()) for case, found in errors.items()}
    wrong = {name for found in errors.values() for name, e in found.items() if not e <= tolerance}
    remedy = f"{INSTALL}; if these are its versions: wrong on this card"
    found = ", ".join(f"{case}: error {error:.1e}" for case, error in worst.items()) or "no layer"
    text = f"; wrong: {', '.join(sorted(wrong))}" if wrong else ""
    return Row(found + text, f"{tolerance:g} of float64, gradients too", not wrong, remedy)


def reads(job, reach: int) -> list[tuple[int, int]]:
    """Rows and tokens of what a mixer reads: training, and the final pass as a stream."""
    hp = job.hp
    streams = [(hp.eval_rows, reach + hp.eval_chunk)] * (hp.eval_mode == "stream")
    return [(hp.micro_rows(), hp.train_seq_len), *streams]


def delta_rule(job) -> Row:
    layers = [m for m in job.model.modules() if isinstance(m, t.GatedDeltaNet)]
    errors = {}
    for shape in sorted({(m.qkv_heads[0], *m.state_shape) for m in layers}):
        for B, T in reads(job, 0):
            errors[f"{B} x {T}"] = delta_errors(B, T, *shape)
    return kernel_row(errors, 0.03 if t.world.on_cuda else 1e-4)


def convolution(job) -> Row:
    layers = [m for m in job.model.modules() if getattr(m, "q_conv1d", None) is not None]
    shapes = {torch.cat((m.q_conv1d, m.k_conv1d, m.v_conv1d)).shape for m in layers}
    errors = {}
    for n, width in sorted(shapes):
        for B, T in reads(job, width - 1):
            errors[f"{B} x {T}"] = conv_errors(B, T, n, width)
    return kernel_row(errors, 0.02 if t.world.on_cuda else 1e-4)


def attention(job) -> Row:
    layers = [m for m in job.model.modules() if isinstance(m, t.Attention)]
    errors = {}
    for window, reach in sorted({(m.window, m.reach) for m in layers}):
        for B, T in reads(job, reach):
            errors[f"{B} x {T}"] = attention_errors(B, T, window, job.hp)
    return kernel_row(errors, 0.02 if t.world.on_cuda else 1e-4)


# --- Training -------------------------------------------------------------------------------------


def most_documents(job) -> int:
    """In a micro-batch, by the first shard; the run reads all of them, for seconds["documents"]."""
    first = object.__new__(t.TokenStream)
    vars(first).update(vars(job.stream) | dict(shards=job.stream.shards[:1]))
    first.starts, span = job.stream.starts[:2], job.hp.micro_rows() * job.hp.train_seq_len
    start = time.perf_counter()
    most = first.most_documents(span)
    job.seconds["documents"] = (time.perf_counter() - start) * len(job.stream) / len(first)
    return most


def random_batch(job, hp) -> tuple[Tensor, Tensor]:
    """A micro-batch, with documents as long as those of the validation text are."""
    shape, device = (2, hp.micro_rows(), hp.train_seq_len), t.world.device
    tokens = torch.randint(t.BOS_ID + 1, hp.vocab_size, shape, device=device)
    v = job.validation
    tokens[0][torch.rand(shape[1:], device=device) < len(v.starts) / len(v.tokens)] = t.BOS_ID
    most = max(job.most, int((tokens[0] == t.BOS_ID).sum()))
    job.model.most_documents[shape[1:]] = shape[1] + most
    return tokens[0], tokens[1]


def measure_training(job, rows: int) -> int:
    """Compiles and times every stage with so many rows in a micro-batch. Returns the bytes that
    stay allocated between steps."""
    more = job.hp.micro_rows() // rows
    hp = replace(job.hp, grad_accum_steps=more * job.hp.micro_steps()) if more > 1 else job.hp
    model, optimizer = job.model, t.Muon(job.model, hp)
    params = [p.detach() for p in model.parameters()]
    average, starts = [p.clone() for p in params], hp.stage_starts()
    x, y = random_batch(job, hp)
    job.first, job.steps, job.tokens_of = [], [], []

    def step(start: float) -> None:
        failed = None
        try:
            loss = t.accumulate(model, [(x, y)] * hp.micro_steps_at(start))
        except Exception as error:
            failed = error
        if agree(float(failed is not None)):  # of any rank: none must wait for the others
            raise failed or torch.OutOfMemoryError("another rank: out of memory")
        optimizer.step(1.0, hp.momentum_at(0.5))
        torch._foreach_lerp_(average, params, 0.1)
        t.world.all_reduce(loss).item()

    for start in starts:
        model.set_progress(start)
        once = functools.partial(step, start)
        first = seconds_of(once)
        job.steps.append(mean_seconds(once, 15.0 / len(starts)))
        job.first.append(first)
        job.tokens_of.append(hp.micro_steps_at(start) * t.world.size * x.numel())
    model.set_progress(1.0)
    job.peak, job.batch, job.run_hp = peak(), (x, y), hp
    return allocated()


def fitted(found: str, fit: int, rows: int, settings: dict, remedy: str = "") -> Row:
    """ok if as many rows fit as are set, else the settings with which they do."""
    if fit == rows:
        return Row(found, f"{rows} rows in memory")
    found = f"out of memory; with {fit} of {rows} rows {found}"
    return Row(found, f"{rows} rows in memory", False, remedy, settings)


def training_step(job) -> Row:
    """Where a micro-batch does not fit, smaller ones of the same batch."""
    hp, saved = job.hp, {n: p.detach().clone() for n, p in job.model.named_parameters()}
    job.most = most_documents(job)
    rows, stages = hp.micro_rows(), {hp.micro_steps_at(start) for start in hp.stage_starts()}
    sizes = [n for n in range(rows, 0, -1) if rows % n == 0]
    sizes = sizes if len(stages) == 1 else sizes[:1]  # stages count micro-batches of one size
    fit = largest_that_fits(job.model, functools.partial(measure_training, job), sizes)
    with torch.no_grad():
        for name, p in job.model.named_parameters():
            p.copy_(saved[name])
    free_memory(job.model)
    times = ", ".join(f"{1000 * s:,.0f}" for s in job.steps)
    found = f"{times} ms, compiled in {sum(job.first) - sum(job.steps):.0f} s"
    found += f", peak {job.peak / GIB:.1f} GiB" if t.world.on_cuda else ""
    settings = dict(GRAD_ACCUM_STEPS=hp.micro_steps() * rows // fit)
    return fitted(found, fit, rows, settings, "the batch stays the same")


def hessians(job) -> Row:
    """Of one micro-batch and of eight; the run has many."""
    model, count = job.model, job.run_hp.gptq_calibration_batches * job.run_hp.micro_steps()
    model.calibrate([job.batch])
    one, eight = (seconds_of(lambda n=n: model.calibrate([job.batch] * n)) for n in (1, 8))
    each = min(eight / 8, max(0.0, (eight - one) / 7))
    job.hessians = took = one + each * (count - 1)
    job.seconds["one_hessian"] = one
    if not job.hp.max_wallclock_seconds:
        return Row(f"{took:.1f} s", "no limit")
    reserve = job.hp.gptq_reserve_seconds
    settings = {} if took <= reserve else dict(GPTQ_RESERVE_SECONDS=math.ceil(1.3 * took))
    needed = f"{reserve:g} s, GPTQ_RESERVE_SECONDS"
    return Row(f"{took:.1f} s", needed, not settings, "", settings)


# --- Scoring --------------------------------------------------------------------------------------


def made_up(job, length: int, document: int) -> Tensor:
    """Tokens of a text, the same on all ranks, with a document every so many."""
    generator = torch.Generator().manual_seed(job.hp.seed)
    tokens = torch.randint(t.BOS_ID + 1, job.hp.vocab_size, (length + 1,), generator=generator)
    tokens[:length:document] = t.BOS_ID
    return tokens.to(t.world.device)


def steps_in(tokens: Tensor, plan: t.Plan) -> int:
    return len(t.steps_of(plan, "cpu"))


def slope(score: Callable, texts: list[tuple[Tensor, t.Plan]]) -> tuple[float, float, float]:
    """Seconds of compilation, of a pass besides its steps, and of a step: of two texts, or of one
    that is long."""
    seconds, steps = [], [steps_in(*text) for text in texts]
    again = len(texts) == 2 or t.world.on_cuda  # what a first pass takes says nothing
    for text in [*texts[:1] * again, *texts]:
        seconds.append(seconds_of(lambda text=text: score(*text)))
    if len(texts) == 1:
        return max(0.0, seconds[0] - seconds[-1]), 0.0, seconds[-1] / steps[0]
    (first, short, long), (few, many) = seconds, steps
    step = (long - short) / (many - few) if long > short else long / many
    fixed = max(0.0, short - few * step)
    return max(0.0, first - short), fixed, step


def windows(job) -> Row:
    """Windows that do not overlap, nothing learned: three times in a run."""
    hp, model = job.hp, job.model
    length = min(hp.eval_seq_len, len(job.validation.tokens) - 1)
    counts, texts = (2, 6), []

    def measure(rows: int) -> int:
        base, sized = allocated(), replace(hp, val_batch_size=rows * length)
        real = t.window_plan(job.validation.tokens, sized, hp.eval_seq_len)
        t.reserve(model, job.validation.tokens, real)
        texts[:] = [made_up(job, n * rows * t.world.size * length, 1 + length // 2) for n in counts]
        plans = [t.window_plan(text, sized, hp.eval_seq_len) for text in texts]
        score = functools.partial(t.score, model)
        compiled, fixed, step = slope(score, [*zip(texts, plans, strict=True)])
        job.block_steps = steps_in(job.validation.tokens, real)
        job.seconds["blocks"], job.compile["blocks"] = fixed + job.block_steps * step, compiled
        job.block_step, job.scoring_hp = step, sized
        return base

    rows = max(1, hp.val_batch_size // length)
    fit = largest_that_fits(model, measure, [*range(rows, 0, -1)])
    free_memory(model)
    found = f"{job.block_steps:,} steps of {1000 * job.block_step:,.0f} ms"
    return fitted(found, fit, rows, dict(VAL_BATCH_SIZE=fit * length))


def final_texts(job, hp) -> list[Tensor]:
    """Two made-up texts that fill some steps of the final pass, in all rows of all ranks. Where SGD
    learns: one with as many segments as the text, and a chunk in each."""
    stream, chunk = hp.eval_mode == "stream", getattr(hp, "ttt_chunk_tokens", 0) if hp.ttt else 0
    rows = hp.eval_rows if stream else max(1, hp.val_batch_size // hp.eval_seq_len)
    unit, rows = hp.eval_chunk if stream else hp.eval_stride, rows * t.world.size
    segments = getattr(hp, "ttt_phases", 1) + 1 if chunk else 1
    each = max(3, math.ceil(chunk / (rows * unit)))  # steps of a segment
    counts = (each * segments,) if chunk else (each, 4 * each)
    if stream:
        return [made_up(job, rows * n * unit, n // segments * unit) for n in counts]
    return [made_up(job, hp.eval_seq_len + unit * (n * rows - 1), hp.eval_seq_len) for n in counts]


def final_pass(job) -> Row:
    """The pass that makes the score, with learning."""
    hp, model, tokens = job.scoring_hp, job.model, job.validation.tokens
    name = "eval_rows" if hp.eval_mode == "stream" else "val_batch_size"
    unit = 1 if hp.eval_mode == "stream" else hp.eval_seq_len

    def measure(rows: int) -> int:
        base = allocated()
        sized = replace(hp, **{name: rows * unit}, eval_seconds=0.0)
        real = t.final_plan(tokens, sized)
        t.reserve(model, tokens, real)

        def score(text: Tensor, plan: t.Plan) -> None:
            learner = model.learner(sized)  # one for one pass
            learner.score(text, plan) if learner else t.score(model, text, plan)
            job.learns = learner is not None

        texts = final_texts(job, sized)
        compiled, fixed, step = slope(score, [(text, t.final_plan(text, sized)) for text in texts])
        job.final_steps, job.final_step = steps_in(tokens, real), step
        job.seconds["final"], job.compile["final"] = fixed + job.final_steps * step, compiled
        job.final_peak = peak()
        return base

    rows = max(1, getattr(hp, name) // unit)
    fit = largest_that_fits(model, measure, [*range(rows, 0, -1)])
    free_memory(model)
    found = f"{job.final_steps:,} steps of {1000 * job.final_step:,.0f} ms"
    found += f", compiled in {job.compile['final']:.0f} s" if t.world.on_cuda else ""
    found += f", peak {job.final_peak / GIB:.1f} GiB" if t.world.on_cuda else ""
    return fitted(found, fit, rows, {name.upper(): fit * unit})


# --- Packing --------------------------------------------------------------------------------------


def gptq(job) -> Row:
    """One tensor of each shape and number of bits, times their number."""
    kinds, device = job.model.kinds, t.world.device
    named = [(n, p) for n, p in job.model.named_parameters() if kinds[n] != t.SCALAR]
    counts = collections.Counter((tuple(p.shape), job.model.bits(n)) for n, p in named)
    took = 0.0
    for (shape, bits), count in counts.items():
        W, X = torch.randn(shape, device=device), torch.randn(2 * shape[1], shape[1], device=device)
        took += count * seconds_of(lambda W=W, X=X, b=bits: t.gptq_quantize(W, X.mT @ X, b, 12.0))
    job.seconds["gptq"] = took
    return Row(f"{took:.1f} s for {len(named)} tensors of {len(counts)} kinds", "")


def packing(job) -> Row:
    """Normal values quantized and range coded, a part of each kind: of no other values with the
    same deviation is the entropy larger."""
    model, values, half = job.model, collections.Counter(), 0
    for name, p in model.named_parameters():
        is_scalar = model.kinds[name] == t.SCALAR
        half += p.numel() if is_scalar else len(p)
        if not is_scalar:
            values[model.bits(name), bench.CLIP_SIGMAS[model.kinds[name]]] += p.numel()
    job.rest_bytes = size = 2 * half + 2048  # what is not range coded; 2048: the JSON text
    took = 0.0
    for (bits, clip_sigmas), count in values.items():
        part = min(MIB, count)
        rows = torch.randn(max(1, part // 1024), 1024)
        if isinstance(bits, Tensor):  # of each row: as many of each kind
            bits = bits.cpu()[torch.linspace(0, len(bits) - 1, len(rows)).long()]
        data = t.gptq_quantize(rows, torch.eye(1024), bits, clip_sigmas)[0].numpy().ravel()
        start = time.perf_counter()
        packed = len(t.range_code([data])[1])
        took += (time.perf_counter() - start) * count / len(data)
        size += packed * count / len(data)
    job.seconds["packing"], job.artifact_bytes = agree(took), int(size)
    return Row(f"{took:.1f} s", "")


# --- Forecast -------------------------------------------------------------------------------------


def training_forecast(job) -> Row:
    """Steps in the budget, if each stage takes its share of the time."""
    hp, budget = job.hp, job.hp.train_seconds()
    shares = np.diff([*hp.stage_starts(), 1.0])
    by_time = budget * sum(shares / job.steps) if budget < math.inf else math.inf
    steps = int(min(hp.iterations, by_time))
    tokens = int(steps * (shares @ job.tokens_of))
    spent = min(budget, steps * float(shares @ job.steps))
    job.seconds["training"] = spent + job.hessians
    rate = (shares @ job.tokens_of) / (shares @ job.steps)
    found = f"{steps:,} steps in {spent:.0f} s, {tokens:,} tokens, {rate:,.0f} a second"
    found += f", {tokens / len(job.stream):.2f} times the shards"
    remedy = "MAX_WALLCLOCK_SECONDS larger, or TRAIN_BATCH_TOKENS smaller"
    return Row(found, "20 steps or more", steps >= min(20, hp.iterations), remedy)


def evaluation_forecast(job) -> Row:
    took, limit = job.seconds["final"], job.hp.eval_seconds
    found = f"{took:,.0f} s"
    if not limit:
        return Row(found, "no limit")
    ok = took <= (0.95 if job.learns else 1.0) * limit
    remedy = f"EVAL_SECONDS={math.ceil(took / 0.9)}, or 0, for what is no record"
    if job.learns and not ok:
        found += f": learning would stop {1 - 0.95 * limit / took:.0%} before the end, or more"
        remedy = f"TTT= (nothing is learned), another EVAL_ROWS, {remedy}"
    return Row(found, f"{limit:g} s, EVAL_SECONDS", ok, remedy)


def size_forecast(job) -> Row:
    code = sum(path.stat().st_size for path in t.code_files())
    total, limit = job.artifact_bytes + code, job.hp.artifact_target_bytes or t.SIZE_LIMIT
    found = f"{job.artifact_bytes:,} + {code:,} of code = {total:,} bytes, of usual steps"
    if job.hp.artifact_target_bytes or total > limit:
        found = f"at most {limit:,} bytes, {code:,} of them code: steps are chosen for {limit:,}"
    least = job.rest_bytes + code  # of the coarsest steps
    remedy = f"{least:,} are not quantized: MODEL_DIM smaller, or ARTIFACT_TARGET_BYTES larger"
    return Row(found, f"{limit:,}", least <= limit, remedy)


def total_forecast(job) -> Row:
    """Of the program, as its parts follow each other; tools/verify.py comes on top."""
    s, hp, tokens = job.seconds, job.scoring_hp, job.validation.tokens[: t.SAMPLE_TOKENS]
    sample = steps_in(tokens, t.final_plan(tokens, hp)) * job.final_step / 3  # scored, no more
    warm_up = sum(job.first) + (hp.warmup_steps - 1) * sum(job.steps) + s["one_hessian"]
    compiled = sum(job.compile.values())
    before = s["start"] + s["validation"] + s["documents"] + warm_up
    packed = (5 if hp.artifact_target_bytes else 1) * (s["gptq"] + s["packing"])  # passes of `fit`
    scored = compiled + 3 * s["blocks"] + s["final"] + sample
    total = before + s["training"] + packed + scored
    found = f"{total:,.0f} s: before the clock {before:.0f} (warm-up {warm_up:.0f}), training "
    found += f"{s['training']:.0f}, GPTQ and packing {packed:.0f}, scoring {scored:,.0f}"
    return Row(found, "besides verifying")


# what, function; in this order, each on what those above have set
PARTS = {
    "python": python_version,
    "torch": torch_version,
    "triton": triton_version,
    "fla": fla_version,
    "driver": driver,
    "GPUs": gpus,
    "ranks": ranks,
    "model": model_row,
    "disk": disk,
    "/dev/shm": shared_memory,
    "training shards": training_shards,
    "validation": validation_text,
    "files": files,
    "collectives": collectives,
    "convolution": convolution,
    "delta rule": delta_rule,
    "attention": attention,
    "training step": training_step,
    "Hessians": hessians,
    "windows": windows,
    "final pass": final_pass,
    "GPTQ": gptq,
    "packing": packing,
    "forecast: training": training_forecast,
    "forecast: final pass": evaluation_forecast,
    "forecast: bytes": size_forecast,
    "forecast: total": total_forecast,
}


# --- The table ------------------------------------------------------------------------------------


def attempt(part: Callable, job: Job) -> Row:
    """The part's row, whatever happens in it."""
    try:
        return part(job)
    except NotChecked as missing:
        return Row(f"not checked: rests on what failed above ({missing})", ok=None)
    except Exception as error:  # of whatever library
        first = " ".join(str(error).split("\n")[:2]).strip()
        remedy = "see the message"
        if out_of_memory(error):
            remedy = "free the GPU of others, or a smaller MODEL_DIM or TRAIN_SEQ_LEN"
        return Row(f"{type(error).__name__}: {first}", ok=False, remedy=remedy)


def agreed(what: str, row: Row) -> Row:
    """What fails on one rank fails on all; that rank says why."""
    fails = float(row.ok is False)
    anywhere, everywhere = agree(fails), -agree(-fails)
    if fails and not everywhere:
        print(f"rank {t.world.rank}: {what}: {row.found}", flush=True)
    return replace(row, ok=False, remedy="on another rank") if anywhere and not fails else row


def advice(row: Row) -> str:
    """What to set or do."""
    settings = [f"set {name}={value}" for name, value in row.settings.items()]
    return ", ".join([*settings, *[row.remedy] * bool(row.remedy)]) if row.ok is False else ""


MARKS = {True: "ok", False: "NOT", None: "-"}


def show_plain(what: str, row: Row) -> None:
    needed = f"  (needed: {row.needed})" if row.needed else ""
    print(f"{MARKS[row.ok]:<4}{what:<21}{row.found}{needed}", flush=True)
    if text := advice(row):
        print(f"    {'':<21}-> {text}", flush=True)


def rich_table():
    """A table that grows on the terminal, and how to add to it."""
    from rich.live import Live
    from rich.markup import escape
    from rich.table import Table

    table = Table("what", "found", "needed", "ok")
    live = Live(table, vertical_overflow="visible")

    def show(what: str, row: Row) -> None:
        found = f"{row.found}\n-> {text}" if (text := advice(row)) else row.found
        style = {True: "", False: "bold red", None: "dim"}[row.ok]
        table.add_row(what, escape(found), escape(row.needed), MARKS[row.ok], style=style)

    return live, show


def write_env(failed: bool, settings: dict) -> None:
    """For run.sh: the verdict, and the settings for a run of the same system and ranks."""
    system = os.environ.get("SYSTEM", "")
    lines = ["# written by ./run.sh check", f"check_failed={int(failed)}"]
    if settings:
        lines.append(f'if [ "${{SYSTEM:-}}:$nproc" = "{system}:{t.world.size}" ]; then')
        lines += [f"    export {name}=${{{name}:-{x}}}" for name, x in settings.items()]
        lines.append("fi")
    ENV_FILE.parent.mkdir(exist_ok=True)
    ENV_FILE.write_text("\n".join(lines) + "\n")


def check(job: Job, show: Callable) -> tuple[list[str], dict]:
    """All parts. Returns what is not ok, and the settings that would help."""
    failed, settings = [], {}
    for what, part in PARTS.items():
        row = agreed(what, attempt(part, job))
        show(what, row)
        failed += [what] * (row.ok is False)
        settings |= row.settings
        if row.fatal and not row.ok:
            break
    return failed, settings


def main() -> int | str:
    start, system = time.perf_counter(), os.environ.get("SYSTEM") or "train_gpt"
    try:
        module = importlib.import_module(system)
        hp = module.Hyperparameters.from_env(os.environ)
    except (ImportError, ValueError) as error:
        return f"check: error: {error}"
    seconds = dict(start=2 * time.process_time())  # of the imports, by torchrun too
    job = Job(hp=hp, module=module, seconds=seconds, compile={})
    if t.world.rank > 0:
        check(job, lambda what, row: None)
    elif sys.stdout.isatty() and importlib.util.find_spec("rich"):
        live, show = rich_table()
        with live:
            failed, settings = check(job, show)
    else:
        failed, settings = check(job, show_plain)
    if t.world.rank == 0:
        write_env(bool(failed), settings)
        verdict = f"NOT: {', '.join(failed)}" if failed else "all ok"
        print(f"check: {verdict}, {time.perf_counter() - start:.0f} s")
        if settings:
            print(f"check: {ENV_FILE} has these settings, ./run.sh takes them if you set no others")
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0 if "TORCHELASTIC_RUN_ID" in os.environ or t.world.rank else int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
