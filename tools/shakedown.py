"""Measures on one GPU what was never measured, most valuable first, in the minutes that there are.

    python tools/shakedown.py                        # 25 minutes; again: goes on where it stopped
    python tools/shakedown.py --minutes 40 --again   # from the start
    python tools/shakedown.py --only op64 train      # these parts
    python tools/shakedown.py --toy                  # on a CPU, at toy size: the way, no figures

Each part is a process of its own with a limit of its own, started by tools/old_torch.py so that
older images do, too. Its output is logs/shakedown/NAME.txt; a part whose log ends in `shakedown:
done` is not repeated. One that fails or hangs is killed with all that it started, and the next one
begins. At the end stand the rows for the README's table. Text is what is there: FineWeb in 8,192 or
1,024 pieces, else the demo; or DATA_PATH, TOKENIZER_PATH and VOCAB_SIZE. Exit status 1 if a part
failed.
"""

import argparse
import contextlib
import importlib
import importlib.metadata
import math
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "logs" / "shakedown"
SHAKEDOWN, OLD_TORCH = "tools/shakedown.py", "tools/old_torch.py"


# --- Parts ----------------------------------------------------------------------------------------


class Part(NamedTuple):
    """What is run, and what its log says. Commands and settings may name {limit}, seconds that the
    part may take, {training}, those of them for training, {data} and {tokenizer}."""

    name: str  # its log is NAME.txt
    limit: float  # seconds
    command: tuple[str, ...]  # arguments of Python, in the root of the repository
    settings: dict[str, str] = {}  # environment, beside that of the caller
    rows: dict[str, str] = {}  # what: pattern of its figure, last match; beside lines `row: `
    on_cpu: bool = False  # at toy size
    of_text: bool = False  # reads the text that is there, with its vocabulary
    least: float = 30.0  # with fewer seconds it is left out
    leaves: float = 0.0  # seconds that it leaves to those behind it


def measure(name: str, limit: float, *arguments: str, **fields) -> Part:
    """A part that is a function of this file."""
    command = (OLD_TORCH, SHAKEDOWN, "--measure", *arguments)
    return Part(name, limit, command, **fields)


ARTIFACT = "final_model.shakedown.ptz"
PACKING = 240  # seconds of a training part: compiling, GPTQ, brotli, scoring
TRAINING = dict(
    RUN_ID="shakedown.train",
    ARTIFACT=ARTIFACT,
    MAX_WALLCLOCK_SECONDS="{training}",
    GPTQ_RESERVE_SECONDS="20",  # one GPU has the batches of eight
    WARMUP_STEPS="5",
    TRAIN_LOG_EVERY="20",
    EVAL_SECONDS="0",
)
TRAINED = {
    "trained: steps": r'"step_stop": (\d+)',
    "trained: time of a step": r"step_avg:([\d.]+ms)",
    "trained: peak memory": r"peak memory allocated: (.*)",
    "trained: artifact + code, bytes": r"Total submission size \S+ (\d+)",
    "trained: seconds of the final pass": r'"eval_time_seconds": ([\d.]+)',
    "trained: bits per byte of the artifact": r"_exact val_loss:\S+ val_bpb:(\S+)",
    "trained: failed checks": r"audit failed: (.*)",
}
VERIFY = (  # of the contexts of its check of probabilities only a few
    f"tools/verify.py {ARTIFACT} --data {{data}} --tokenizer {{tokenizer}} "
    "--log logs/shakedown.train.txt --normalisation-tokens 1"
)
VERIFIED = {
    "verified": r"^verify: (all \d+ passed|\d+ checks, FAILED: .*)",
    "verified: CPU against GPU": r"^verify: reproduced \w+ .*?(the run's without learning: [^;]*)",
}
CHECKED = {"check": r"^check: (.*), \d+ s$"} | {
    f"forecast: {what}": rf"^(?:ok|NOT|-) +forecast: {what} +(.*)$"
    for what in ("training", "final pass", "bytes", "total")
}
PASSED = {"tests marked cuda": r"^=*\s*((?:\d+ \w+,? )*\d+ (?:passed|failed|errors?)\b.*?) in "}

PARTS = (
    measure("versions", 60, "versions", on_cpu=True, least=5),
    measure("text", 180, "text", on_cpu=True, least=5),
    measure("op64", 300, "op", "64", settings=dict(FLA_CACHE_RESULTS="0")),
    measure("conv", 120, "conv", settings=dict(FLA_CACHE_RESULTS="0")),
    measure("op128", 240, "op", "128", settings=dict(FLA_CACHE_RESULTS="0")),
    Part("tests", 240, (OLD_TORCH, "-m", "pytest", "-m", "cuda", "tests"), rows=PASSED),
    Part("check", 240, (OLD_TORCH, "tools/check.py"), {}, CHECKED, on_cpu=True, of_text=True),
    measure("record", 300, "throughput", "record", on_cpu=True),
    measure("transformer", 240, "throughput", "transformer", on_cpu=True),
    measure("evaluation", 300, "evaluation", on_cpu=True),
    measure("repeat", 300, "repeat", on_cpu=True, of_text=True),
    *(
        measure(system, 150, "throughput", system, on_cpu=True, leaves=600)
        for system in ("pure_gdn", "crawler", "kv_share", "baseline")
    ),
    Part(
        "train",
        PACKING + 600,
        (OLD_TORCH, "train_gpt.py"),
        TRAINING,
        TRAINED,
        on_cpu=True,
        of_text=True,
        least=PACKING + 60,
        leaves=150,
    ),
    Part(
        "verify",
        600,
        tuple(VERIFY.split()),
        rows=VERIFIED,
        on_cpu=True,
        of_text=True,
    ),
)

TOY = dict(
    setting.split("=", 1)
    for setting in (
        "MODEL_DIM=32 MLP_MULT=2 GDN_HEADS=2 GDN_KEY_HEADS=1 GDN_HEAD_DIM=16 NUM_HEADS=2 "
        "NUM_KV_HEADS=1 HEAD_DIM=16 ROPE_DIMS=8 WINDOW_SIZE=40 NGRAM_VOCAB_SIZE=256 NGRAM_DIM=16 "
        "TRAIN_SEQ_LEN=64 TRAIN_BATCH_TOKENS=1536 GRAD_ACCUM_STEPS=3 ITERATIONS=5 WARMUP_STEPS=1 "
        "CURRICULUM=0:1x64 MAX_WALLCLOCK_SECONDS=0 GPTQ_RESERVE_SECONDS=0 EVAL_SECONDS=0 "
        "ARTIFACT_TARGET_BYTES=0 "
        "EVAL_SEQ_LEN=64 EVAL_STRIDE=32 EVAL_CHUNK=16 EVAL_ROWS=4 VAL_BATCH_SIZE=256 "
        "TTT_LORA_RANK=4 TTT_CHUNK_TOKENS=64 OMP_NUM_THREADS=1 SHAKEDOWN_STEPS=3"
    ).split()
)


# --- Running them ---------------------------------------------------------------------------------


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


TEXTS = {  # folder of shards: tokenizer, pieces
    "fineweb10B_sp8192": ("fineweb_8192_bpe.model", "8192"),
    "fineweb10B_sp1024": ("fineweb_1024_bpe.model", "1024"),
    "demo": ("demo_1024_bpe.model", "1024"),
}


def text_settings(env) -> dict[str, str]:
    """The first text that is complete; the demo's if none is; that of the caller, who names one."""
    if "DATA_PATH" in env:
        hp = ("DATA_PATH", "TOKENIZER_PATH", "VOCAB_SIZE")
        return {name: env[name] for name in hp if name in env}
    name = next(filter(is_complete, TEXTS), "demo")
    tokenizer, pieces = TEXTS[name]
    return dict(
        DATA_PATH=str(text_folder(name)),
        TOKENIZER_PATH=str(ROOT / "data" / "tokenizers" / tokenizer),
        VOCAB_SIZE=pieces,
    )


def text_folder(name: str) -> Path:
    return ROOT / "data" / "datasets" / name


def is_complete(name: str) -> bool:
    """Whether the folder is there; the demo's only if it is made of the text of this version."""
    stats = text_folder(name) / "stats.json"
    if name != "demo" or not stats.is_file():
        return stats.is_file()
    from settings import hash_demo_text

    return hash_demo_text() in stats.read_text("utf-8", "replace")


def last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    return lines[-1] if lines else ""


def kill_group(process: subprocess.Popen) -> None:
    """The process, and what it started and left; one that a driver holds is not waited for."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(20)


def execute(command: list[str], log: Path, limit: float, env: dict[str, str]) -> str:
    """Runs it into its log, `limit` seconds at most. Returns the state: done, failed or killed."""
    with log.open("w") as out:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(limit)
            return "done" if status == 0 else f"failed: exit status {status}"
        except subprocess.TimeoutExpired:
            return f"killed: more than {limit:.0f} s"
        finally:
            kill_group(process)


def proposed(check_log: Path) -> dict[str, str]:
    """What tools/check.py found to fit this GPU, if it had to look for it."""
    file = ROOT / "logs" / "check.env"
    if not check_log.is_file() or "check.env has these settings" not in check_log.read_text():
        return {}
    return dict(re.findall(r"export (\w+)=\$\{\w+:-(.*?)\}", file.read_text()))


def environment(part: Part, toy: bool, check_log: Path) -> dict[str, str]:
    """Settings as they are written, {limit} and so on still in them."""
    env = {"PRESET": "record"} | (proposed(check_log) if part.of_text else {}) | os.environ
    text = text_settings(env) if part.of_text or toy else {}
    own = part.settings | (TOY if toy else {}) | dict(PYTHONUNBUFFERED="1")
    return env | text | own


def start(part: Part, log: Path, limit: float, toy: bool) -> str:
    """One part. Returns its state, which is also the last line of its log."""
    env = environment(part, toy, log.with_name("check.txt"))
    training = max(30, int(limit) - PACKING)
    names = dict(limit=int(limit), training=training)
    names |= dict(data=env.get("DATA_PATH", ""), tokenizer=env.get("TOKENIZER_PATH", ""))
    env |= {name: env[name].format(**names) for name in part.settings}
    command = [sys.executable, *(word.format(**names) for word in part.command)]
    begin = time.monotonic()
    state = execute(command, log, limit, env)
    ends_line = log.read_bytes()[-1:] in (b"", b"\n")
    with log.open("a") as out:
        took = time.monotonic() - begin
        print("" if ends_line else "\n", f"shakedown: took {took:.1f} s", sep="", file=out)
        print(f"shakedown: {state}", file=out)
    return state


def reason_to_skip(part: Part, log: Path, limit: float, options) -> str | None:
    if not options.again and last_line(log) == "shakedown: done":
        return "done before"
    if not options.gpu and not (options.toy and part.on_cpu):
        return "skipped: no GPU"
    if limit < (1 if options.toy else part.least):
        return "skipped: no time left"
    return None


def run_parts(parts, options) -> dict[str, str]:
    """One after another until the minutes are over. options: minutes, again, toy, gpu, folder.
    Returns the state of each, by name."""
    deadline, states = time.monotonic() + 60 * options.minutes, {}
    options.folder.mkdir(parents=True, exist_ok=True)
    for part in parts:
        log = options.folder / f"{part.name}.txt"
        left = deadline - time.monotonic() - (0 if options.toy else part.leaves)
        limit = min(part.limit, left)
        state = reason_to_skip(part, log, limit, options)
        if state is None:
            print(f"{part.name}: at most {limit:.0f} s", flush=True)
            state = start(part, log, limit, options.toy)
        elif not log.is_file():
            log.write_text(f"shakedown: {state}\n")
        states[part.name] = state
        print(f"{part.name}: {state}", flush=True)
    return states


def rows_of(part: Part, log: Path) -> list[tuple[str, str]]:
    """What was measured, and the figure."""
    text = log.read_text(errors="replace") if log.is_file() else ""
    rows = re.findall(r"^row: (.*?) \| (.*)$", text, re.M)
    for what, pattern in part.rows.items():
        if found := re.findall(pattern, text, re.M):
            rows.append((what, found[-1].strip()))
    return rows


def table(parts, states: dict[str, str], folder: Path) -> str:
    """Markdown: all rows of all logs, of earlier runs too; a part without any has its state."""
    lines = ["| what | figure | log |", "|---|---|---|"]
    for part in parts:
        log = folder / f"{part.name}.txt"
        state = states[part.name]
        ended = [] if state.startswith("done") else [(part.name, state)]
        name = log.relative_to(ROOT) if log.is_relative_to(ROOT) else log
        for what, figure in [*rows_of(part, log), *ended]:
            lines.append(f"| {what} | {figure.replace('|', '/')} | [`{name}`]({name}) |")
    return "\n".join(lines)


# --- What measures, each in a process of its own --------------------------------------------------


def row(what: str, figure: str) -> None:
    print(f"row: {what} | {figure}", flush=True)


def program(system: str = "record"):
    """tools/bench.py, train_gpt.py, and the module of the system."""
    sys.path.insert(0, str(ROOT / "tools"))
    import bench

    return bench, bench.t, bench.module_of(system)


def settings(module):
    """Hyperparameters of the environment, of fields that the system has."""
    return module.Hyperparameters.from_env(os.environ)


def steps_to_take(usual: int) -> int:
    return int(os.environ.get("SHAKEDOWN_STEPS", usual))


def first_line(*command: str) -> str:
    with contextlib.suppress(OSError):
        out = subprocess.run(command, capture_output=True, text=True).stdout
        return out.strip().partition("\n")[0]
    return ""


def versions() -> None:
    import torch

    packages = {}
    for name in ("torch", "triton", "fla-core", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            packages[name] = importlib.metadata.version(name)
    listed = ", ".join(f"{name} {version}" for name, version in packages.items())
    row("versions", f"Python {platform.python_version()}, {listed}, CUDA {torch.version.cuda}")
    fields = "name,memory.total,driver_version,clocks.max.sm,power.limit,count"
    gpu = first_line("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader")
    row("machine", f"{gpu or 'no GPU'}; {os.cpu_count()} CPUs")
    with contextlib.suppress(OSError):
        subprocess.run(["nvidia-smi"])


def text() -> None:
    """Makes the demo's text if there is none."""
    found = text_settings(os.environ)
    if "DATA_PATH" not in os.environ and not is_complete(Path(found["DATA_PATH"]).name):
        subprocess.run([sys.executable, "data/prepare.py", "--demo"], cwd=ROOT, check=True)
    shards = sorted(Path(found["DATA_PATH"]).glob("fineweb_*_[0-9]*.bin"))
    tokens = {split: 0 for split in ("train", "val")}
    for shard in shards:
        for split in tokens:
            if f"_{split}_0" in shard.name:
                tokens[split] += shard.stat().st_size // 2 - 512
    counts = ", ".join(f"{count:,} {split}" for split, count in tokens.items())
    row("text", f"{Path(found['DATA_PATH']).name}, {len(shards)} shards, tokens: {counts}")


# The delta rule: each autotune configuration of each kernel, against float64. All kernels but one
# are pinned to their plainest configuration, so that autotuning cannot crash before it is known
# which one does; a process that crashes or hangs costs that configuration. One process a kernel,
# several at a time, which share the compiler's work. A remedy for wrong ones: TRITON_PTXAS_PATH,
# the assembler of CUDA 13.3 or newer instead of Triton's own.

KERNELS = dict(
    chunk_local_cumsum_scalar_kernel="fla.ops.utils.cumsum",
    chunk_gated_delta_rule_fwd_kkt_solve_kernel="fla.ops.gated_delta_rule.chunk_fwd",
    recompute_w_u_fwd_kernel="fla.ops.gated_delta_rule.wy_fast",
    prepare_wy_repr_bwd_kernel="fla.ops.gated_delta_rule.wy_fast",
    chunk_gated_delta_rule_fwd_kernel_h_blockdim64="fla.ops.common.chunk_delta_h",
    chunk_gated_delta_rule_bwd_kernel_dhu_blockdim64="fla.ops.common.chunk_delta_h",
    chunk_fwd_kernel_o="fla.ops.common.chunk_o",
    chunk_bwd_kernel_dqkwg="fla.ops.common.chunk_o",
    chunk_bwd_kernel_dv_local="fla.ops.common.chunk_o",
)
CONVOLUTION = dict(
    causal_conv1d_fwd_kernel="fla.modules.causal_conv1d.ops",
    causal_conv1d_bwd_kernel="fla.modules.causal_conv1d.ops",
)
NAMES = "o state dq dk dv dg dbeta dstate".split()
TOLERANCE = 0.03  # of bf16, norm of the error over that of the value
AT_ONCE = 4  # processes
HANGS = 150  # seconds of one configuration; the first compiles all kernels


def tuners(kernels: dict[str, str] = KERNELS) -> dict:
    """The autotuner of each kernel, by name."""
    found = {}
    for name, module in kernels.items():
        tuner = getattr(importlib.import_module(module), name)
        while not hasattr(tuner, "configs"):
            tuner = tuner.fn
        found[name] = tuner
    return found


def plainest(configs: list):
    return min(configs, key=lambda c: (c.num_warps, c.num_stages, sum(c.kwargs.values())))


def op_shape(size: int) -> tuple[int, int, int, int, int]:
    """B, T, heads of keys and of values, K of a micro-batch of the system with heads of this size;
    fewer rows on a GPU with less memory than 78 GiB."""
    import torch

    _, t, module = program({64: "record", 128: "crawler"}[size])
    hp = settings(module)
    rows = hp.micro_rows()
    if t.world.on_cuda:
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        rows = max(1, min(rows, int(rows * memory / 78)))
    return rows, hp.train_seq_len, hp.gdn_key_heads, hp.gdn_heads, hp.gdn_head_dim


def op_inputs(t, shape) -> tuple[list, list]:
    """q, k, v, g, beta and the state, of documents that begin anywhere; and weights of o and of the
    final state, whose weighted sum is differentiated."""
    import torch
    import torch.nn.functional as F

    (B, T, key_heads, H, K), device = shape, t.world.device
    torch.manual_seed(0)
    q, k = (F.normalize(torch.randn(B, T, key_heads, K, device=device), dim=-1) for _ in range(2))
    v, beta = torch.randn(B, T, H, K, device=device), torch.rand(B, T, H, device=device)
    g, state = -torch.rand(B, T, H, device=device), torch.randn(B, H, K, K, device=device)
    g[torch.rand(B, T, device=device) < 1 / 300] = t.RESET_LOG_DECAY
    q, k, v = (x.to(t.world.dtype) for x in (q, k, v))
    return [q, k, v, g, beta, state], [torch.randn_like(v), torch.randn_like(state)]


def differentiate(function: Callable, inputs: list, weights: list) -> list:
    """o, the final state, and the gradient of each input."""
    import torch

    inputs = [x.detach().requires_grad_() for x in inputs]
    o, final = function(*inputs)[:2]
    loss = (o.float() * weights[0].float()).sum() + (final * weights[1]).sum()
    return [o.detach(), final.detach(), *torch.autograd.grad(loss, inputs)]


def exact_results(t, inputs: list, weights: list) -> list:
    """In float64, some rows at a time, kept as float32."""
    import torch

    parts = []
    for rows in torch.arange(len(inputs[0]), device=t.world.device).split(4):
        some = [x[rows].double() for x in inputs]
        found = differentiate(t.torch_gated_delta_rule, some, [w[rows] for w in weights])
        parts.append([x.float() for x in found])
    return [torch.cat(column) for column in zip(*parts, strict=True)]


def wrong(results: list, exact: list) -> tuple[list[str], float]:
    """What is further off than TOLERANCE, NaN included; the largest relative error."""
    pairs = zip(results, exact, strict=True)
    errors = [((a.float() - b).norm() / b.norm()).item() for a, b in pairs]
    named = zip(NAMES, errors, strict=True)
    return [f"{name} {error:.3g}" for name, error in named if not error < TOLERANCE], max(errors)


def op_kernel(size: str, name: str, first: str, exact_path: str) -> None:
    """Tries the configurations of one kernel from the first-th on."""
    import torch
    from triton.runtime.errors import OutOfResources

    t = program()[1]
    inputs, weights = op_inputs(t, op_shape(int(size)))
    exact = torch.load(exact_path, map_location=t.world.device)
    found = tuners()
    every = found[name].configs
    for tuner in found.values():
        tuner.configs = [plainest(tuner.configs)]
    for i in range(int(first), len(every)):
        print(f"try {name} {i} {every[i]}", flush=True)
        found[name].configs = [every[i]]
        try:
            bad, error = wrong(differentiate(t.fla_gated_delta_rule, inputs, weights), exact)
            print(f"WRONG {', '.join(bad)}" if bad else f"right {error:.3g}", flush=True)
        except OutOfResources as refused:
            print(f"does not fit: {refused}", flush=True)
    print("end", flush=True)


def try_kernel(size: str, name: str, folder: Path, exact_path: Path) -> str:
    """All its configurations, in as many processes as crash. Returns what they print."""
    said = ""
    while not said.endswith("end\n"):
        tried = re.findall(r"^try \S+ (\d+)", said, re.M)
        first = str(int(tried[-1]) + 1) if tried else "0"
        log = folder / f"op{size}.{name}.out"
        status = op_process(log, ["op_kernel", size, name, first, str(exact_path)])
        new = log.read_text(errors="replace")
        log.unlink()
        if not re.search(r"^(try|end)", new, re.M):  # the crash is not that of a configuration
            return f"{said}try {name} {first}\nCRASHED {status}, nothing was tried: {new[-2000:]}\n"
        said += new if new.endswith("end\n") else f"{new.rstrip()}\nCRASHED {status}\n"
    return said


def op_process(log: Path, arguments: list[str]) -> str:
    """A measuring process that is killed when its log has not grown for HANGS seconds. Returns its
    exit status."""
    command = [sys.executable, OLD_TORCH, SHAKEDOWN, "--measure", *arguments]
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
        size, since = 0, time.monotonic()
        while process.poll() is None and time.monotonic() - since < HANGS:
            time.sleep(0.2)
            if log.stat().st_size > size:
                size, since = log.stat().st_size, time.monotonic()
        if process.poll() is None:
            process.kill()
            return "hangs"
    return str(process.returncode)


def op_times(size: str) -> None:
    """Milliseconds of forward and backward: as autotuned, then with each kernel's configurations
    one after another, the others as chosen."""
    import torch

    bench, t, _ = program()
    inputs, weights = op_inputs(t, shape := op_shape(int(size)))

    def run():
        differentiate(t.fla_gated_delta_rule, inputs, weights)

    chosen = 1000 * bench.median_seconds([run], 10)[0]
    tokens = math.prod(shape[:2])
    row(f"delta rule, heads of {size}: forward + backward of {tokens:,} tokens", f"{chosen:.2f} ms")
    found = tuners()
    every = {name: tuner.configs for name, tuner in found.items()}
    for tuner in found.values():
        tuner.configs = [tuner.best_config]
    for name, tuner in found.items():
        best = tuner.configs
        print(f"chosen {name}: {best[0]}", flush=True)
        for config in every[name]:
            tuner.configs = [config]
            with contextlib.suppress(Exception):  # what does not fit, or crashes alone
                took = 1000 * bench.median_seconds([run], 3, warmup=1)[0]
                print(f"time {name} {config}: {took - chosen:+.2f} ms", flush=True)
        tuner.configs = best
    torch.cuda.synchronize()


def op(size: str) -> None:
    """Exit status 1 if a configuration is wrong or crashes."""
    import torch

    t, folder = program()[1], FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    shape, exact_path = op_shape(int(size)), folder / f"op{size}.exact.pt"
    print(f"B, T, heads of keys, of values, K: {shape}", flush=True)
    torch.save(exact_results(t, *op_inputs(t, shape)), exact_path)
    torch.cuda.empty_cache()
    with ThreadPoolExecutor(min(AT_ONCE, os.cpu_count() // 2 or 1)) as pool:
        said = []
        for tried in pool.map(lambda name: try_kernel(size, name, folder, exact_path), KERNELS):
            said.append(tried)
            print(tried, flush=True)
    exact_path.unlink()
    failed = summarize(size, "".join(said))
    log = folder / f"op{size}.times.out"
    op_process(log, ["op_times", size])
    print(log.read_text(errors="replace"), flush=True)
    log.unlink()
    sys.exit(bool(failed))


def summarize(size: str, said: str) -> list[str]:
    """Prints the row of all configurations. Returns those that are wrong or crash."""
    outcome = r"(?:(?!try ).*\n)*?(right|WRONG|does|CRASHED)"
    results = re.findall(rf"^try (\S+ \d+.*)\n{outcome}", said, re.M)
    right = [float(error) for error in re.findall(r"^right (\S+)", said, re.M)]
    failed = [config for config, result in results if result in ("WRONG", "CRASHED")]
    figure = f"{len(right)} of {len(results)} right, error at most {max(right, default=0):.2g}"
    unfit = sum(result == "does" for _, result in results)
    figure += f", {unfit} do not fit" * bool(unfit)
    figure += f"; not right: {'; '.join(failed)}" * bool(failed)
    row(f"delta rule, heads of {size}: configurations against float64", figure)
    return failed


def conv() -> None:
    """Each configuration of the convolution's kernels, the other as it is chosen, against float64;
    then the time of a micro-batch. Exit status 1 if one is wrong."""
    import check

    bench, t, module = program()
    hp, errors = settings(module), {}
    n = (2 * hp.gdn_key_heads + hp.gdn_heads) * hp.gdn_head_dim  # of q, k and v
    for name, tuner in tuners(CONVOLUTION).items():
        every = tuner.configs
        for config in every:
            tuner.configs = [config]
            found = check.conv_errors(4, hp.train_seq_len, n, t.CONV_SIZE)
            errors[f"{name} {config}"] = max(found.values())
            print(f"{name} {config}: error {max(found.values()):.2g}", flush=True)
        tuner.configs = every
    failed = [config for config, error in errors.items() if not error < TOLERANCE]
    figure = (
        f"{len(errors) - len(failed)} of {len(errors)} right, at most {max(errors.values()):.2g}"
    )
    figure += f"; not right: {'; '.join(failed)}" * bool(failed)
    row("convolution: configurations against float64", figure)
    took = 1000 * bench.median_seconds([conv_step(t, hp, n)], 10)[0]
    tokens = f"{hp.micro_rows() * hp.train_seq_len:,} tokens"
    row(f"convolution, {n} channels: forward + backward of {tokens}", f"{took:.2f} ms")
    sys.exit(bool(failed))


def conv_step(t, hp, n: int) -> Callable:
    """Forward and backward of the convolution of n channels in a micro-batch."""
    import torch

    rows, device = hp.micro_rows(), t.world.device
    tokens = made_up_text(t, hp, rows * hp.train_seq_len).view(rows, -1)
    ctx = t.make_context(tokens, hp, rows + int((tokens == t.BOS_ID).sum()))
    x, dy = (torch.randn(*tokens.shape, n, device=device).to(t.world.dtype) for _ in range(2))
    inputs = [x.requires_grad_(), torch.randn(n, t.CONV_SIZE, device=device, requires_grad=True)]
    return lambda: torch.autograd.grad(t.short_conv(*inputs, ctx), inputs, dy)


# Throughput.

TOKENS_OF_A_DOCUMENT = 600  # about FineWeb's in 8,192 pieces


def made_up_text(t, hp, count: int):
    """Random tokens of documents that begin anywhere, the first at the start. int64 [count]."""
    import torch

    device = t.world.device
    tokens = torch.randint(t.BOS_ID + 1, hp.vocab_size, (count,), device=device)
    tokens[torch.rand(count, device=device) < 1 / TOKENS_OF_A_DOCUMENT] = t.BOS_ID
    tokens[0] = t.BOS_ID
    return tokens


def peak_memory(t) -> str:
    import torch

    if not t.world.on_cuda:
        return "no GPU"
    return f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"


def micro_batch(t, hp, model, rows: int) -> Callable:
    """Forward and backward of so many rows of a made-up text."""
    T = hp.train_seq_len
    tokens = made_up_text(t, hp, rows * T + 1)
    batch = [(tokens[:-1].view(rows, T), tokens[1:].view(rows, T))]
    model.most_documents[rows, T] = rows + int((tokens == t.BOS_ID).sum())
    return lambda: t.accumulate(model, batch)


def micro_batch_times(bench, t, hp, model, rows: int) -> tuple[float, float, str]:
    """Seconds of its first run, of a later one; peak memory."""
    import torch

    step = micro_batch(t, hp, model, rows)
    if t.world.on_cuda:
        torch.cuda.reset_peak_memory_stats()
    first = bench.seconds(step)
    later = bench.median_seconds([step], steps_to_take(10), warmup=2)[0]
    return first, later, peak_memory(t)


KINDS = (  # of kernels, by their names; the first that matches
    ("attention", r"flash"),  # before cutlass, which is in the names of its types
    ("matrix products", r"nvjet|cublas|gemm|cutlass"),
    ("convolution", r"causal_conv1d"),
    ("delta rule", r"^(chunk|prepare|recompute)_"),
    ("compiled", r"^triton_"),
    ("other", r""),
)


def kernel_times(step: Callable, runs: int = 3) -> dict[str, tuple[float, float]]:
    """Milliseconds and launches in a step, by kernel; {} on a CPU."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    if not torch.cuda.is_available():
        return {}
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(runs):
            step()
        torch.cuda.synchronize()
    times: dict = {}
    for event in found.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            total, count = times.get(event.name, (0.0, 0.0))
            times[event.name] = total + event.self_device_time_total / 1000 / runs, count + 1 / runs
    return times


def print_kernels(what: str, times: dict[str, tuple[float, float]], most: int = 40) -> None:
    """A row by kind, then the kernels that take longest."""
    kinds = dict.fromkeys((kind for kind, _ in KINDS), 0.0)
    for name, (took, _) in times.items():
        kinds[next(kind for kind, pattern in KINDS if re.search(pattern, name))] += took
    parts = [f"{kind} {took:.1f}" for kind, took in kinds.items() if took]
    launches = sum(count for _, count in times.values())
    if times:
        row(what, f"{sum(kinds.values()):.1f} ms: {', '.join(parts)}; {launches:.0f} launches")
    for name, (took, count) in sorted(times.items(), key=lambda item: -item[1][0])[:most]:
        print(f"kernel: {took:8.3f} ms {count:6.1f} x  {name[:140]}", flush=True)


def that_fit(function: Callable, rows: int):
    """function(rows), with half as many as long as memory is too small. Returns rows, result."""
    import torch

    while True:
        try:
            return rows, function(rows)
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
        torch.cuda.empty_cache()
        rows //= 2
        print(f"out of memory: now {rows} rows", flush=True)


def lower_bound(system: str) -> float | None:
    """Milliseconds of a step of one of 8 GPUs, from a log of tools/floor.py; its last stage."""
    for log in sorted((ROOT / "logs").glob("floor*.txt")):
        parts = re.split(r"^(\w+): (?=\S*[A-Z])", log.read_text(), flags=re.M)
        for name, part in zip(parts[1::2], parts[2::2], strict=True):
            found = re.findall(r"lower bound of a step .*?: ([\d.]+) ms", part)
            if name == system and found:
                return float(found[-1])
    print(f"no lower bound of {system} in logs/floor*.txt: python tools/floor.py", flush=True)
    return None


def throughput(system: str) -> None:
    """Of training, as at the end of a run; for the record eager, too."""
    import torch

    bench, t, module = program(system)
    hp = settings(module)
    torch.manual_seed(hp.seed)
    model = module.GPT(hp).to(t.world.device)
    model.set_progress(1.0)

    def times(rows: int):
        return micro_batch_times(bench, t, hp, model, rows)

    rows, (first, later, memory) = that_fit(times, hp.micro_rows())
    step = micro_batch(t, hp, model, rows)
    print_kernels(f"{system}: kernels of {rows} x {hp.train_seq_len} tokens", kernel_times(step))
    optimizer = t.Muon(model, hp)

    def update():
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step(1.0, hp.muon_momentum)

    updating = bench.median_seconds([update], steps_to_take(10))[0]
    row(f"{system}: seconds to compile training", f"{first - later:.1f}")
    row(f"{system}: peak memory of {rows} x {hp.train_seq_len} tokens", memory)
    batches = hp.micro_steps_at(1.0) * hp.micro_rows() / rows
    took, tokens = batches * later + updating, batches * rows * hp.train_seq_len
    row(
        f"{system}: training, one GPU",
        f"{tokens / took:,.0f} tokens/s: {batches:g} x {1000 * later:.1f} ms, "
        f"optimizer {1000 * updating:.1f} ms",
    )
    if hp.grad_accum_steps == 0:  # then a rank of 8 has one such batch a step
        against_lower_bound(system, 1000 * (batches / 8 * later + updating))
    if system == "record":
        model._compiled_call_impl = None
        some, (_, eager, memory) = that_fit(times, rows)
        ratio = eager / some / (later / rows)
        row("record: eager over compiled, time of a token", f"{ratio:.2f}, {some} rows, {memory}")


def against_lower_bound(system: str, step: float) -> None:
    """step: milliseconds of one of 8 ranks."""
    bound, figure = lower_bound(system), f"{step:.1f} ms"
    if bound:
        figure += f", {step / bound:.2f} times the lower bound of {bound:.1f} ms"
    row(f"{system}: step of one of 8 GPUs, without collectives", figure)


# Evaluation.

MODES = {
    "stream": dict(eval_mode="stream", ttt=""),
    "stream with adapters": dict(eval_mode="stream", ttt="lora"),
    "sliding 64": dict(eval_mode="sliding", ttt="", eval_stride=64),
}
OFFICIAL_TARGETS = 40_500_000  # about, of 3.73 bytes each, in 8,192 pieces


def scorer(t, model, hp) -> Callable:
    """A whole pass of a text and its plan; learns if it shall, and is for one pass."""
    learner = model.learner(hp)
    return learner.score if learner else lambda tokens, plan: t.score(model, tokens, plan)


def scored_text(t, hp, steps: int):
    """A text that takes about so many steps."""
    streams = hp.eval_mode == "stream"
    rows = hp.eval_rows if streams else max(1, hp.val_batch_size // hp.eval_seq_len)
    return made_up_text(t, hp, steps * rows * (hp.eval_chunk if streams else hp.eval_stride))


def score_mode(hp, rows: int) -> tuple:
    """Of untrained weights: plan, tokens, seconds of a short pass, which compiles, and of a long
    one, peak memory of this. rows: documents of a stream; windows are fewer in the same measure."""
    import torch

    bench, t, module = program()
    windows = max(1, hp.val_batch_size * rows // hp.eval_rows)
    hp = replace(hp, eval_rows=rows, val_batch_size=windows)
    torch.manual_seed(hp.seed)
    model = module.GPT(hp).to(t.world.device)
    tokens = scored_text(t, hp, steps_to_take(200))
    plan, short = t.final_plan(tokens, hp), tokens[: 2 * hp.eval_seq_len]
    t.reserve(model, tokens, plan)
    first = bench.seconds(lambda: scorer(t, model, hp)(short, t.final_plan(short, hp)))
    if t.world.on_cuda:
        torch.cuda.reset_peak_memory_stats()
    took = bench.seconds(lambda: scorer(t, model, hp)(tokens, plan))
    return plan, len(tokens), first, took, peak_memory(t)


def evaluation() -> None:
    """Each mode over a made-up text."""
    _, t, module = program()
    for name, mode in MODES.items():
        hp = replace(settings(module), eval_seconds=0.0, **mode)
        found = that_fit(lambda rows, hp=hp: score_mode(hp, rows), hp.eval_rows)
        plan, tokens, first, took, memory = found[1]
        steps = len(t.steps_of(plan, "cpu"))
        official = took / tokens * OFFICIAL_TARGETS / 8
        row(
            f"scoring, {name}",
            f"{1000 * took / steps:.1f} ms a step of {plan.rows} rows, {memory}, first pass "
            f"{first:.0f} s; the official split on 8 GPUs: about {official:.0f} s",
        )


# What is not the same twice.


def losses_of(t, module, hp, steps: int) -> tuple:
    """The model after some steps on the text that is there, and the loss of each."""
    import torch

    torch.manual_seed(hp.seed)
    model = module.GPT(hp).to(t.world.device)
    stream = t.TokenStream(hp.data_path, "train", hp.vocab_size)
    rows, T = hp.micro_rows(), hp.train_seq_len
    model.most_documents[rows, T] = rows + stream.most_documents(rows * T)
    model.set_progress(1.0)
    optimizer, loader, losses = t.Muon(model, hp), t.TrainLoader(stream, hp), []
    for _ in range(steps):
        batch = [loader.next() for _ in range(hp.micro_steps_at(1.0))]
        losses.append(t.accumulate(model, batch).item())
        optimizer.step(1.0, hp.muon_momentum)
    loader.close()
    return model, losses


def repeat() -> None:
    """Training twice, a pass that learns twice, and one artifact on the CPU and on the GPU."""
    import torch

    t, module = program()[1:]
    hp = replace(settings(module), eval_mode="stream", ttt="lora", eval_seconds=0.0)
    steps = steps_to_take(20)
    (model, first), (_, second) = (losses_of(t, module, hp, steps) for _ in range(2))
    print(f"losses: {first}\n        {second}", flush=True)
    apart = [abs(a - b) for a, b in zip(first, second, strict=True)]
    begins = next((i for i, x in enumerate(apart, 1) if x), None)
    row(
        f"two runs of {steps} steps: losses apart, nats",
        f"at most {max(apart):.2g}, in the last step {apart[-1]:.2g}, first in step {begins}",
    )
    path = FOLDER / f"repeat.{os.getpid()}.ptz"
    path.parent.mkdir(parents=True, exist_ok=True)
    names = [name for name, kind in model.kinds.items() if kind != t.SCALAR]
    sizes = {name: p.shape[1] for name, p in model.named_parameters() if name in names}
    eyes = {name: torch.eye(size, device=t.world.device) for name, size in sizes.items()}
    t.save_artifact(path, model, hp, t.quantize(model, eyes, hp.rounding_step))  # to nearest
    try:
        compare_passes(t, module, hp, path)
    finally:
        path.unlink()


def compare_passes(t, module, hp, path: Path) -> None:
    """Of the artifact at `path`: two passes that learn; without learning, two devices."""
    import torch

    def load():
        return t.load_artifact(path, t.world.device, type(hp), module.GPT)[0]

    text = t.TokenStream(hp.data_path, "val", hp.vocab_size)
    tokens = text.read(0, min(len(text), 4096 * steps_to_take(16)))
    model, passes, plan = load(), [], t.final_plan(tokens, hp)
    for _ in range(2):
        passes.append(scorer(t, model, hp)(tokens.to(t.world.device), plan)[0].cpu())
    row("two passes that learn, nats of a target", difference(*passes))

    plain, some = replace(hp, ttt="", eval_rows=min(hp.eval_rows, 8)), tokens[: 8192 + 1]
    plan, scores = t.final_plan(some, plain), []
    scores.append(t.score(load(), some.to(t.world.device), plan)[0].cpu())
    world = dict(device=torch.device("cpu"), dtype=torch.float32)
    with mock.patch.multiple(t.world, **world):
        scores.append(t.score(load(), some, plan)[0])
    row("one artifact on GPU and CPU, nats of a target", difference(*scores))


def difference(a, b) -> str:
    """Of scores, [n] each."""
    moved = (a - b).abs()
    return (
        f"{len(a):,} scores apart by at most {moved.max():.3g}, in the mean by {moved.mean():.2g}, "
        f"their means by {abs((a - b).mean()):.2g}"
    )


MEASURES = (versions, text, conv, op, op_kernel, op_times, throughput, evaluation, repeat)


# --- Command line ---------------------------------------------------------------------------------


def parse(argv: list[str] | None, parts) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--minutes", type=float, default=25.0, help="of this call")
    add("--again", action="store_true", help="repeat what is done, too")
    add("--only", nargs="+", metavar="PART", choices=[part.name for part in parts])
    add("--toy", action="store_true", help="at toy size, which a CPU can do")
    add("--folder", type=Path, help="of the logs; default: logs/shakedown, of toys shakedown_toy")
    add("--measure", nargs="+", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None, parts=PARTS) -> int | str:
    """0 if no part failed. parts: the table to run."""
    options = parse(argv, parts)
    if options.measure:
        name, *arguments = options.measure
        {function.__name__: function for function in MEASURES}[name](*arguments)
        return 0
    options.folder = options.folder or (
        FOLDER.with_name("shakedown_toy") if options.toy else FOLDER
    )
    options.gpu = has_gpu()
    if not options.gpu and not options.toy:
        return "shakedown: no GPU; --toy runs at toy size what a CPU can do"
    parts = [part for part in parts if part.name in (options.only or [part.name])]
    states = run_parts(parts, options)
    rows = table(parts, states, options.folder)
    (options.folder / "table.md").write_text(rows + "\n")
    print(rows)
    failed = [name for name, state in states.items() if state.startswith(("failed", "killed"))]
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
