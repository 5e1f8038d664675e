"""Writes the figures of the logs into README.md, docs/ and logs/README.md, where they are quoted.

    python tools/evidence.py            # as tools/evidence.sh does when it has made logs
    python tools/evidence.py --check    # writes nothing; a line for each figure that is stale

What stands between `<!-- evidence: NAME -->` and `<!-- /evidence -->` is made of the logs, by the
function that BLOCKS has under that name. How each log was made stands in logs/made.tsv, which
tools/evidence.sh writes.
"""

import argparse
import csv
import hashlib
import importlib
import os
import re
import sys
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tools")]  # not there with PYTHONSAFEPATH
import logs  # noqa: E402  (the path comes first)

BLOCK = re.compile(r"^<!-- evidence: (\w+) -->\n(.*?)^<!-- /evidence -->$", re.M | re.S)
NAMES = dict(train_gpt="record")  # of a system whose file has another name


def texts() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "logs" / "README.md"]


@cache
def read(name: str) -> str:
    """A file of logs/. Raises: OSError."""
    return (ROOT / "logs" / name).read_text("utf-8")


def find(pattern: str, name: str, text: str | None = None) -> re.Match:
    """The last match in a log, or in a part of it. Raises: ValueError naming the log."""
    found = [*re.finditer(pattern, read(name) if text is None else text, re.M)]
    if not found:
        raise ValueError(f"logs/{name}: no line like `{pattern}`: make it with tools/evidence.sh")
    return found[-1]


def number(text: str) -> int:
    return int(text.replace(",", ""))


def row(*cells) -> str:
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def head(*titles: str) -> str:
    """The first is text, the others are figures."""
    return f"{row(*titles)}\n|---|{'--:|' * (len(titles) - 1)}"


def system(name: str) -> str:
    name = NAMES.get(name, name)
    return name if name == "record" else f"`{name}`"


# --------------------------------------------------------------------------------------------------
# How the logs were made


class Made(NamedTuple):
    """A row of logs/made.tsv. source: sha256 of the train_gpt.py that made it, 12 digits."""

    log: str
    target: str  # of tools/evidence.sh, or "-"
    command: str
    seconds: str
    day: str
    source: str


@cache
def made() -> list[Made]:
    lines = read("made.tsv").splitlines()[1:]
    return [Made(*cells) for cells in csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)]


def took(log: str) -> str:
    """Minutes or seconds of the command that made it."""
    seconds = next((one.seconds for one in made() if one.log == log), "-")
    if seconds == "-":
        return "not measured"
    return f"{seconds} s" if int(seconds) < 120 else f"{int(seconds) / 60:.0f} minutes"


def table_of_logs() -> Iterator[str]:
    yield "| log | made by | command | took | day | `train_gpt.py` |"
    yield "|---|---|---|--:|---|---|"
    for one in sorted(made()):
        target = "not by it" if one.target == "-" else f"`evidence.sh {one.target}`"
        seconds = "-" if one.seconds == "-" else f"{number(one.seconds):,} s"
        log = f"[`{one.log}`]({one.log})"
        yield row(log, target, one.command, seconds, one.day, f"`{one.source}`")


def older() -> list[str]:
    """Logs of tools/evidence.sh that another train_gpt.py than the present one made."""
    present = hashlib.sha256((ROOT / "train_gpt.py").read_bytes()).hexdigest()[:12]
    return [one.log for one in made() if one.target != "-" and one.source != present]


# --------------------------------------------------------------------------------------------------
# The demo, and README's experiment


@cache
def finished(name: str) -> logs.Run:
    path = ROOT / "logs" / name
    run, _ = logs.choose(path, logs.read_runs(path))
    if not run.trained:
        raise ValueError(f"{path}: no run that trained and came to its end")
    return run


def demo() -> logs.Run:
    return finished("demo.txt")


def commands() -> Iterator[str]:
    """How long the two commands take, and by which lines their end is known."""
    final = find(r"^final_\w+_exact .*$", "demo.txt", demo().text)[0]
    checks = find(r"^verify: all \d+ passed$", "demo.verify.txt")[0]
    suite = "all tests `passed`"
    if (ROOT / "logs" / "tests.txt").exists():
        suite = f"`{find(r'[0-9]+ passed[^=]*(?= in )', 'tests.txt')[0]}`"
    cores = find(r"GPUs +none, (\d+) cores", "demo.check.txt")[1]
    yield f"| once set up, on {cores} CPU cores | takes | ends with |"
    yield "|---|--:|---|"
    yield row(
        "`./run.sh`",
        took("demo.txt"),
        f"`{final}`; `{checks}`; pictures in `plots/`; a summary",
    )
    yield row("`./run.sh test`", took("tests.txt"), suite)


SCORES = "last weights", "their average", "int6", "artifact, final pass"


def scores_of(run: logs.Run, name: str) -> tuple[str, ...]:
    """Bits per byte of SCORES."""
    quantized = find(r"^final_int\d_roundtrip .*val_bpb:(\S+)", name, run.text)[1]
    raw, average, final = (run.figures[f"{at}val_bpb"] for at in ("raw_", "pre_quant_", ""))
    return f"{raw:.4f}", f"{average:.4f}", quantized, f"**{final:.4f}**"


def table_of_the_demo() -> Iterator[str]:
    f, text = demo().figures, demo().text
    last = find(r"^step:.* train_time:(\d+)ms", "demo.txt", text)[1]
    steps, seconds = find(r"forecast: training +(\d+) steps in (\d+) s", "demo.check.txt").groups()
    scoring = find(r"forecast: final pass +(\d+) s", "demo.check.txt")[1]
    size = find(r"forecast: bytes .*?([\d,]+) bytes", "demo.check.txt")[1]
    parameters = int(find(r"^model_params:(\d+)$", "demo.txt", text)[1])
    checks = find(r"^verify: all (\d+) passed$", "demo.verify.txt")[1]
    yield head("", "steps", "training, final pass", *SCORES, "artifact + code, bytes", "verifier")
    yield row(
        f"{parameters:,} parameters, seed {f['seed']}, {f['bytes']:,} bytes of text",
        f"{f['step_stop']:,}",
        f"{int(last) / 1000:.0f} s, {f['eval_time_seconds']:.0f} s",
        *scores_of(demo(), "demo.txt"),
        f"{f['bytes_total']:,}",
        f"{checks} checks passed",
    )
    forecast = f"{number(steps):,}", f"{seconds} s, {scoring} s"
    yield row("`./run.sh check` forecast", *forecast, "", "", "", "", size, "")


def attention_alone() -> Iterator[str]:
    bpb = finished("attention.txt").figures["val_bpb"]
    worse = bpb - demo().figures["val_bpb"]
    comparison = "more" if worse > 0 else "less"
    log = "[`logs/attention.txt`](logs/attention.txt)"
    yield f"Attention alone has {bpb:.4f} bits per byte, {abs(worse):.3f} {comparison} ({log})."


# --------------------------------------------------------------------------------------------------
# Sizes and speed


def table_of_sizes() -> Iterator[str]:
    """Layout and published parameters are bench.py's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bench = importlib.import_module("bench")
    found = re.findall(r"^(\w+) +([\d,]+) .* ([\d,]+) +\S+%$", read("bench_cpu.txt"), re.M)
    yield "| system | layout | parameters, published | ours | artifact + code, estimated |"
    yield "|---|---|--:|--:|--:|"
    for name, parameters, estimate in found:
        layout = f"`{bench.module_of(name).Hyperparameters().layout}`"
        megabytes = f"{number(estimate) / 1e6:.2f} MB"
        yield row(system(name), layout, bench.PUBLISHED[name], parameters, megabytes)


def table_of_speed() -> Iterator[str]:
    """The delta rule on a CPU, against fla's plain chunk function."""
    shape = find(r"^gated_delta_rule (.*), forward \+ backward, cpu", "bench_delta.txt")[1]
    times = find(r"ours ([\d.]+) ms .* ([\d.]+) ms  ratio ([\d.]+)x", "bench_delta.txt").groups()
    yield head("forward and backward on a CPU", "ours", "fla's", "times as fast")
    yield row(f"`{shape}`", f"{times[0]} ms", f"{times[1]} ms", times[2])


def table_of_targets() -> Iterator[str]:
    """Bytes of every system at full size, against what it may have."""
    line = r"^(\w+) +[\d,]+ +([\d,]+) +([\d,]+) +(\S+%) +(\d+) +(\d+) +([\d.]+)$"
    yield head("system", "target", "artifact + code", "below", "passes", "CPU time", "loading")
    for name, target, size, below, passes, seconds, load in re.findall(line, read("fit.txt"), re.M):
        yield row(system(name), target, size, below, passes, f"{seconds} s", f"{load} s")


def table_of_packers() -> Iterator[str]:
    """The same integers, of the record's artifact in the table before."""
    line = r"^(\w[\w ,-]*?) +([\d,]+) +(\+\S+%) +([\d.]+) +([\d.]+)$"
    yield head("code", "bytes", "above the entropy", "packing", "loading")
    for name, size, above, pack, load in re.findall(line, read("fit.txt"), re.M):
        yield row(name, size, above, f"{pack} s", f"{load} s")


def table_of_rounding() -> Iterator[str]:
    """A column for each artifact."""
    text = read("rounding.txt")
    artifacts = re.findall(r"^(\S+)\.ptz$", text, re.M)
    lines = re.findall(r"^  (\S.*?) +[\d,]+ +\S+ +\S+ +(\S+)$", text, re.M)
    yield head("bits per byte lost", *(f"`{name}`" for name in artifacts))
    for way in dict.fromkeys(name for name, _ in lines):
        yield row(way, *(loss for name, loss in lines if name == way))


def table_of_adapters(log: str, *time: str) -> Iterator[str]:
    """A column for each artifact: what learning gains; and, under `time`, the time of the first."""
    text = read(log)
    artifacts = re.findall(r"^(\S+)\.ptz$", text, re.M)
    lines = re.findall(r"^  (\S.*?)  +\S+ +(\S+) +(\S+)$", text, re.M)
    yield head("bits per byte gained", *(f"`{name}`" for name in artifacts), *time)
    for way in dict.fromkeys(name for name, _, _ in lines if name != "without learning"):
        gains, times = zip(*(own for name, *own in lines if name == way), strict=True)
        yield row(way, *gains, *times[: len(time)])


# --------------------------------------------------------------------------------------------------
# The CUDA path, on a CPU


def graph_rows() -> dict[str, dict[str, tuple[str, str]]]:
    """Of each system, by mode: graphs, and GB saved for the backward."""
    found: dict = {}
    for line in read("gpuless_graphs.txt").splitlines()[2:]:
        name, mode, graphs, _, saved, _ = (cell.strip() for cell in line.split("|"))
        if name:
            modes = found.setdefault(name.split()[0], {})
        modes[mode] = graphs, saved
    return found


def table_of_graphs() -> Iterator[str]:
    yield head("system", "training: graphs, saved for the backward", "windows", "final pass", "SGD")
    for name, modes in graph_rows().items():
        stages = {mode: found for mode, found in modes.items() if mode.startswith("train")}
        said = []
        for mode, (graphs, saved) in stages.items():
            start = float(mode.split()[-1])
            said.append(f"{graphs}, {saved} GB" + (f" from {start:.0%} on" if start else ""))
        windows, final, learning = (
            modes.get(m, ("",))[0] for m in ("windows", "final pass", "SGD")
        )
        yield row(system(name), "; ".join(said), windows, final or "that of windows", learning)


class Stage(NamedTuple):
    """Of a training step from `start` on: figures of logs/floor*.txt, GB and ms of one pass."""

    name: str
    start: str
    times: int  # passes a step
    forward: list[float]
    backward: list[float]
    rest: float  # ms of optimizer and collectives
    bound: str
    alive: str

    def sum(self, column: int) -> float:
        return self.forward[column] + self.backward[column]


# columns of a part
GEMMS, TFLOP, GEMM_MS, KERNELS, GB, GB_MS, DELTA, DELTA_MS, ATTENTION_MS, _, SAVED = range(11)
BOUND = re.compile(
    r"^lower bound of a step from progress (\S+): (\S+) ms \((\d+) x [^)]*\)"
    r"(?:; at most (\S+) GB alive)?"
)


def stages(log: str) -> Iterator[Stage]:
    name, rest, forward, backward = "", 0.0, [], []
    for line in read(log).splitlines():
        if title := re.match(r"(\w+): .*[A-Z]\d*", line):
            name = title[1] if title[1] != "optimizer" else name
        if after := re.findall(r"([\d.]+) ms\b", line) if line.startswith("optimizer:") else ():
            rest = sum(map(float, after))
        elif line.startswith("forward "):
            forward = [float(cell) for cell in line.split()[1:]]
        elif line.startswith("backward "):
            backward = [float(cell) for cell in line.split()[1:]]
        elif bound := BOUND.match(line):
            start, total, times, alive = bound.groups()
            yield Stage(name, start, int(times), forward, backward, rest, total, alive or "")


def table_of_floors() -> Iterator[str]:
    found = [*stages("floor.txt")]
    several = {one.name for one in found if one.start != "0"}
    titles = "products", "kernels", "fla's", "attention", "optimizer and collectives"
    yield head("system, from this share of the run on", *titles, "saved; alive", "lower bound")
    for one in found:
        share = f", {float(one.start):.0%}" if one.name in several else ""
        parts = [one.times * one.sum(column) for column in range(SAVED - 1)]
        yield row(
            system(one.name) + share,
            f"{parts[TFLOP]:.1f} TFLOP, {parts[GEMM_MS]:.1f} ms",
            f"{parts[GB]:.0f} GB, {parts[GB_MS]:.1f} ms",
            f"{parts[DELTA]:.0f} GB, {parts[DELTA_MS]:.1f} ms",
            f"{parts[ATTENTION_MS]:.1f} ms",
            f"{one.rest:.1f} ms",
            f"{one.forward[SAVED]:.1f}; {one.alive} GB",
            f"{one.bound} ms",
        )


def table_of_savings() -> Iterator[str]:
    """The record's step, before and after what was changed."""
    whats = {
        "floor_before.txt": "before",
        "floor_after.txt": "projections as one or two products of a mixer, the short convolution "
        "as one kernel of fla's",
        "floor.txt": "4 heads with 2 of queries and keys instead of 8, MLP of 4 instead of 2.75",
    }
    yield head("", "kernels, GB", "GEMMs", "launches", "saved GB", "lower bound")
    for log, what in whats.items():
        one = next(one for one in stages(log) if one.name == "record")
        kernels = f"{one.forward[GB]:.1f} + {one.backward[GB]:.1f}"
        counts = f"{one.sum(GEMMS):.0f}", f"{one.sum(KERNELS):.0f}"
        yield row(what, kernels, *counts, f"{one.forward[SAVED]:.1f}", f"{one.bound} ms")


FLA = re.compile(
    r"^sm_(\d+) \((\d+), (\d+), (\d+), (\d+)\) (\w+): (\d+) configurations, .*"
    r"spilled (\d+) to (\d+) bytes .*shared \d+ to (\d+), over the limit (\d+)$",
    re.M,
)


def table_of_fla() -> Iterator[str]:
    """fla's kernels by card and shape."""
    cards: dict = {}
    for capability, *shape, name, count, least, _, shared, over in FLA.findall(
        read("gpuless_kernels.txt")
    ):
        found = cards.setdefault((int(capability), *map(int, shape)), [])
        found.append((name.removesuffix("_kernel"), *map(int, (count, least, shared, over))))
    titles = "configurations", "shared memory, at most", "do not fit"
    yield head("card; rows, tokens, heads, head size", *titles)
    for (capability, *shape), kernels in sorted(cards.items()):
        label = f"sm_{capability}; {', '.join(f'{size:,}' for size in shape)}"
        most = max(shared for *_, shared, _ in kernels)
        count, over = (sum(kernel[i] for kernel in kernels) for i in (1, 4))
        yield row(label, count, f"{most:,}", over)


def table_of_tool(name: str, function: str) -> Iterator[str]:
    """What a module of tools/ makes of its own log."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield from getattr(importlib.import_module(name), function)()


# --------------------------------------------------------------------------------------------------
# What GPUs have shown


def table_of_gpus() -> Iterator[str]:
    """Rows that tools/shakedown.py's measures left on GPUs, but those of optimizers and losses."""
    yield "| card | what | figure |"
    yield "|---|---|---|"
    for card, log in dict(H100="gpu_h100.txt", H200="gpu_h200.txt").items():
        for what, figure in re.findall(r"^row: (.*?) \| (.*)$", read(log), re.M):
            if not re.search(r"optimizer|loss", what):
                yield row(card, what, figure)


def table_of_the_gpu_run() -> Iterator[str]:
    """Of a short run on an H200."""
    run = finished("h200.txt")
    f, parameters = run.figures, int(find(r"^model_params:(\d+)$", "h200.txt", run.text)[1])
    memory = find(r"^peak memory allocated: (.*)$", "h200.txt", run.text)[1]
    checks = find(r"^verify: all (\d+) passed$", "h200.verify.txt")[1]
    yield head("", "steps", "training, final pass", *SCORES, "peak memory", "verifier, on a CPU")
    yield row(
        f"`{f['layout']}`, {parameters:,} parameters, {f['bytes']:,} bytes of text",
        f"{f['step_stop']:,}",
        f"{f['wallclock_seconds']:.0f} s, {f['eval_time_seconds']:.1f} s",
        *scores_of(run, "h200.txt"),
        memory,
        f"{checks} checks passed",
    )


BLOCKS = dict(
    gpus=table_of_gpus,
    gpu_run=table_of_the_gpu_run,
    commands=commands,
    demo=table_of_the_demo,
    attention=attention_alone,
    sizes=table_of_sizes,
    speed=table_of_speed,
    targets=table_of_targets,
    packers=table_of_packers,
    rounding=table_of_rounding,
    adapters=lambda: table_of_adapters("adapters.txt", "time, in plain streams"),
    phases=lambda: table_of_adapters("phases.txt"),
    graphs=table_of_graphs,
    floors=table_of_floors,
    savings=table_of_savings,
    fla=table_of_fla,
    logs=table_of_logs,
    ladder=lambda: table_of_tool("ladder", "tables"),
    changes=lambda: table_of_tool("ladder", "table_of_changes"),
    standing=lambda: table_of_tool("forecast", "at_equal_time"),
    costs=lambda: table_of_tool("forecast", "table"),
    pairs=lambda: table_of_tool("forecast", "table_of_pairs"),
)


# --------------------------------------------------------------------------------------------------
# Files


@cache
def block(name: str) -> str:
    """Raises: OSError, ValueError naming a log that lacks something."""
    if name not in BLOCKS:
        raise ValueError(f"evidence: {name}: expected one of {', '.join(BLOCKS)}")
    text = "".join(line.rstrip() + "\n" for line in BLOCKS[name]())
    if text.endswith(("-|\n", ":|\n")):
        raise ValueError(f"evidence: {name}: a table without rows: its log has none that are known")
    return text


def rewritten(text: str) -> str:
    def fill(found: re.Match) -> str:
        return f"<!-- evidence: {found[1]} -->\n{block(found[1])}<!-- /evidence -->"

    return BLOCK.sub(fill, text)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"\s*\|\s*", line)]


def stale(text: str) -> Iterator[str]:
    """A line for each figure, or other cell of a table or line, that is not what the logs say."""
    for name, quoted in BLOCK.findall(text):
        stands, true = quoted.splitlines(), block(name).splitlines()
        if len(stands) != len(true):
            yield f"{name}: {len(stands)} lines, by the logs {len(true)}"
            continue
        for ours, theirs in zip(stands, true, strict=True):
            pairs = zip(cells(ours), cells(theirs), strict=False)
            label = next(filter(None, cells(theirs)), "")
            yield from (f"{name}: {label}: {a!r}, by the logs {b!r}" for a, b in pairs if a != b)
            if len(cells(ours)) != len(cells(theirs)):
                yield f"{name}: {label}: {len(cells(ours))} cells, by the logs {len(cells(theirs))}"


def write(path: Path, text: str) -> None:
    part = path.with_name(f"{path.name}.tmp")
    part.write_text(text, "utf-8")
    os.replace(part, path)


def main() -> int | str:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if it would")
    args, found = parser.parse_args(), 0
    try:
        for path in texts():
            text = path.read_text("utf-8")
            for line in stale(text):
                found += 1
                print(f"{path.relative_to(ROOT)}: {line}")
            if not args.check and rewritten(text) != text:
                write(path, rewritten(text))
    except OSError as error:
        return f"evidence: {error.filename}: {error.strerror}"
    except ValueError as error:
        return f"evidence: {error}"
    for log in older():
        print(f"logs/{log}: of another train_gpt.py than the present one: tools/evidence.sh")
    return int(args.check and found > 0)


if __name__ == "__main__":
    sys.exit(main())
