"""Which layout earns its place? Candidates of equal artifact bytes at several budgets of tokens.

    DATA_PATH=... TOKENIZER_PATH=... python tools/ladder.py run     # what is missing; --workers 2
    python tools/ladder.py run --only CANDIDATE TOKENS SEED         # one run
    python tools/ladder.py show                                     # tables of what is there
    python tools/ladder.py draw                                     # their losses: docs/pictures/

`run` climbs: every layout on the lowest rung; each change of BASE, one at a time; then the
best of all of these with another seed, on the next rung, and so on. It can be stopped at any
time: a run that had begun goes on from its last checkpoint, one that had ended is a line of
logs/ladder.jsonl. The candidates are toys, 128 wide, of tools/variants.py or a system: as wide an
MLP as the bytes of the reference's toy allow.
"""

import argparse
import hashlib
import json
import math
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "systems"), str(ROOT / "tools")]
import bench  # noqa: E402  (the paths come first)
import transformer  # noqa: E402
import variants  # noqa: E402

import logs  # noqa: E402
import train_gpt as t  # noqa: E402

RESULTS = ROOT / "logs" / "ladder.jsonl"
PICTURE = ROOT / "docs" / "pictures" / "ladder.png"
PATHS = "data_path", "tokenizer_path"  # of the environment; there is no default
RUNGS = 614_400, 2_457_600, 9_830_400  # tokens
TOY = dict(  # a quarter of the record's width, half of its heads, half as large; its rates
    vocab_size=1024,
    train_batch_tokens=4096,
    train_seq_len=2048,
    grad_accum_steps=1,
    model_dim=128,
    gdn_head_dim=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    rope_dims=8,
    smear_dims=12,  # which the record had when the ladder began
    max_wallclock_seconds=0.0,
    gptq_reserve_seconds=0.0,
    warmup_steps=1,
    train_log_every=10,
    artifact_target_bytes=0,
    gptq_calibration_batches=8,
    eval_mode="sliding",
    eval_stride=2048,
    val_batch_size=8192,
    eval_seconds=0.0,
    ttt="",
)
RANDOM = dict(even_decays=False)  # the record's decays when the ladder began
# Heads of Gated DeltaNet, half of those at full size
WIDE = dict(gdn_heads=4, gdn_key_heads=4)  # as many as the record had when the ladder began
NARROW = dict(gdn_heads=2, gdn_key_heads=2)
GROUPED = dict(gdn_heads=2, gdn_key_heads=1)  # as the record and #1895
SHARED = dict(layout="G5 S G5 S=5")  # of #1545
REFERENCE = WIDE | SHARED | dict(mlp_mult=2.5)  # which the record was when the ladder began
LAYOUTS = {
    "G5 S G5 S=5": SHARED,
    "G3 S x3": dict(layout="G3 S G3 S G3 S"),
    "G2 S x4": dict(layout="G2 S G2 S G2 S G2 S"),
    "G S x6": dict(layout="G S G S G S G S G S G S"),
    "G11": dict(layout="G11"),
    "S11": dict(layout="S11"),
    "G5 S G5 S=5, narrow": SHARED | NARROW,
    "G3 S x3, narrow": dict(layout="G3 S G3 S G3 S", **NARROW),
    "G2 S x4, narrow": dict(layout="G2 S G2 S G2 S G2 S", **NARROW),
    "G S x6, narrow": dict(layout="G S G S G S G S G S G S", **NARROW),
    "G2 S8 G, grouped": dict(layout="G2 S8 G", **GROUPED),
    "#1895 in windows": dict(layout="G2 S (S3)x3 S4 G", enable_looping_at=0.4, **GROUPED),
    "G2 S x3, narrow": dict(layout="G2 S G2 S G2 S", **NARROW),
}
TRANSFORMER = "transformer"
CHANGES = {
    "grouped heads": GROUPED,
    "no convolution": dict(conv_size=0),
    "convolution of 2": dict(conv_size=2),
    "no output norm": dict(o_norm=False),
    "window 256": dict(window_size=256),
    "window 1024": dict(window_size=1024),
    "gated skips": dict(unet_skips=True),
    "head gate": dict(attn_gate_dims=12),
    "LN scale": dict(ln_scale=True),
    "no SmearGate": dict(smear_dims=0),
    "no XSA": dict(xsa=False),
    "last attention full": dict(layout="G3 S G3 S G3 A"),
    "last attention twice": dict(layout="G3 S G3 S G3 (S)x2", enable_looping_at=0.35),
    "even decays": dict(even_decays=True),
}
BASE = "G3 S x3 + even decays"  # with which all are compared, and whose changes are tried
RECORD = f"{BASE} + grouped heads"  # but for the SmearGate, whose absence is one of the changes
# On every rung: both, the record's heads without sharing, the first record, and attention
COMPARED = BASE, RECORD, "G3 S x3, narrow + even decays", "G5 S G5 S=5", TRANSFORMER


class Run(NamedTuple):
    candidate: str
    tokens: int
    seed: int

    def name(self) -> str:
        return re.sub(r"\W+", "_", f"{self.candidate}_{self.tokens}_{self.seed}")


# --- Candidates -----------------------------------------------------------------------------------


def overrides(candidate: str) -> dict:
    """Beside TOY: a name of LAYOUTS, with " + NAME" for each change. Raises: ValueError."""
    layout, *changes = candidate.split(" + ")
    if layout not in {*LAYOUTS, TRANSFORMER} or not CHANGES.keys() >= {*changes}:
        raise ValueError(f"{candidate}: no name of LAYOUTS, with + and names of CHANGES")
    found = {} if layout == TRANSFORMER else WIDE | LAYOUTS[layout]
    for name in changes:
        found |= CHANGES[name]
    return found


def module_of(candidate: str):
    return transformer if candidate.startswith(TRANSFORMER) else variants


@cache
def target_bytes() -> float:
    return sum(bench.estimated_bytes(variants.Hyperparameters(**TOY | REFERENCE), variants))


def toy_of(candidate: str):
    """Its hyperparameters, of the reference's bytes. Raises: ValueError."""
    decays = {} if module_of(candidate) is transformer else RANDOM
    return fitted(candidate, TOY | decays | overrides(candidate), target_bytes())


def fitted(candidate: str, settings: dict, most: float):
    """Hyperparameters with as wide an MLP as so many bytes allow. Raises: ValueError."""
    module = module_of(candidate)
    width = module.Hyperparameters(**settings).model_dim

    def hyperparameters(hidden: int):
        return module.Hyperparameters(**settings | dict(mlp_mult=hidden / width))

    low, high = 1, 16 * width  # hidden units
    while high - low > 1:
        middle = (low + high) // 2
        fits = sum(bench.estimated_bytes(hyperparameters(middle), module)) <= most
        low, high = (middle, high) if fits else (low, middle)
    if low < width:
        raise ValueError(f"{candidate}: no room for an MLP of {width} units")
    return hyperparameters(low)


def settings_of(run: Run) -> dict[str, str]:
    """Environment of a run, which keeps checkpoints."""
    hp = toy_of(run.candidate)
    hp.run_id, hp.artifact, hp.seed = run.name(), f"{run.name()}.ptz", run.seed
    hp.iterations = run.tokens // hp.train_batch_tokens
    values = {name: int(x) if isinstance(x, bool) else x for name, x in asdict(hp).items()}
    texts = {name.upper(): str(value) for name, value in values.items() if name not in PATHS}
    target = round(target_bytes()) + sum(path.stat().st_size for path in t.code_files())
    return texts | dict(ARTIFACT_TARGET_BYTES=str(target), RESUME="auto", CHECKPOINT_EVERY="60")


# --- Runs -----------------------------------------------------------------------------------------


def train(run: Run) -> None:
    """In this process, to its end; of a run that began earlier, what is missing."""
    import resumable

    os.environ.update(settings_of(run))
    t.masked_window_attention = variants.blocked_window_attention  # twice as fast in long rows
    module = module_of(run.candidate)
    keeper = resumable.keeper_of(module, t, os.environ)
    resumable.run(module, keeper)


def start(run: Run, folder: Path) -> None:
    """In a process of its own, with one thread. Appends the result. Raises: RuntimeError, OSError,
    ValueError."""
    paths = {name.upper(): str(Path(os.environ[name.upper()]).resolve()) for name in PATHS}
    env = os.environ | paths | dict(OMP_NUM_THREADS="1")
    command = [sys.executable, __file__, "one", run.candidate, str(run.tokens), str(run.seed)]
    log = folder / "logs" / f"{run.name()}.txt"
    if not has_ended(log):  # a climb that was killed leaves its runs to their end
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
        if done.returncode:
            why = done.stderr.strip().removeprefix("ladder: error: ")
            raise RuntimeError(f"{run.name()} ended with status {done.returncode}: {why}")
    row = result_of(run, log)
    with RESULTS.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(f"{run}: {row['pre_quant_val_bpb']:.4f}, int6 {row['val_bpb']:.4f}", flush=True)


def has_ended(log: Path) -> bool:
    return log.exists() and any(one.trained for one in logs.read_runs(log))


def result_of(run: Run, log: Path) -> dict:
    """A line of RESULTS: bits per byte of the run's stages, its training loss, what it was.
    Raises: ValueError if the run did not pass its own audit."""
    found, _ = logs.choose(log, logs.read_runs(log))
    figures, settings = found.figures, found.settings
    if failed := [name for name, check in figures["checks"].items() if not check["passed"]]:
        raise ValueError(f"{log}: its audit failed: {', '.join(failed)}")
    text = log.read_text()
    losses = re.findall(r"^step:(\d+)/\d+ train_loss:(\S+) train_time:(\d+)ms", text, re.M)
    names = "raw_val_bpb pre_quant_val_bpb val_bpb bytes_model".split()
    source = found.sources[0].removesuffix("\n")
    return (
        run._asdict()
        | {name: figures[name] for name in names}
        | dict(
            parameters=int(re.findall(r"^model_params:(\d+)", text, re.M)[-1]),
            mlp_mult=float(settings["mlp_mult"]),
            step_milliseconds=float(losses[-1][2]) / int(losses[-1][0]),
            losses=[*{int(step): float(loss) for step, loss, _ in losses}.items()],
            text=shards_of(settings["data_path"]),
            source=hashlib.sha256(source.encode()).hexdigest()[:12],
        )
    )


def shards_of(folder: str) -> dict[str, str]:
    """The shards of a text, by name, and the beginnings of their digests."""
    return {path.name: t.digest(path)[:12] for path in sorted(Path(folder).glob("fineweb_*.bin"))}


def results() -> dict[Run, dict]:
    """Raises: ValueError if a line of RESULTS is damaged."""
    found, lines = {}, RESULTS.read_text().splitlines() if RESULTS.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{RESULTS}: line {number}: {error}") from None
        found[Run(row["candidate"], row["tokens"], row["seed"])] = row
    return found


# --- The climb ------------------------------------------------------------------------------------


def score(candidate: str, tokens: int, found: dict[Run, dict]) -> float:
    """Bits per byte before quantization, the mean over seeds; infinite if there is none."""
    bpb = [r["pre_quant_val_bpb"] for run, r in found.items() if run[:2] == (candidate, tokens)]
    return statistics.mean(bpb) if bpb else math.inf


def pairs_of(candidate: str, tokens: int, found: dict[Run, dict]) -> list[tuple[dict, dict]]:
    """Its row and that of BASE, for each seed that both have."""
    return [
        (row, found[base])
        for run, row in found.items()
        if run[:2] == (candidate, tokens) and (base := Run(BASE, *run[1:])) in found
    ]


def behind(candidate: str, tokens: int, found: dict[Run, dict], figure="pre_quant_val_bpb"):
    """What it has more than BASE, the mean of pairs; infinite if there is none."""
    more = [own[figure] - other[figure] for own, other in pairs_of(candidate, tokens, found)]
    return statistics.mean(more) if more else math.inf


def best(candidates, tokens: int, found: dict[Run, dict], count: int) -> list[str]:
    return sorted(candidates, key=lambda name: score(name, tokens, found))[:count]


def next_runs(found: dict[Run, dict]) -> list[Run]:
    """Of the first stage that is not complete; [] at the top."""
    first, second, third = RUNGS
    changed = [f"{BASE} + {name}" for name in CHANGES if f" + {name}" not in BASE]
    everyone = [*dict.fromkeys([*LAYOUTS, *COMPARED, *changed])]

    def leaders(count: int, tokens: int) -> list[str]:
        return [*dict.fromkeys([*best(everyone, tokens, found, count), *COMPARED])]

    stages = (
        (first, 1, lambda: everyone),
        (first, 2, lambda: leaders(10, first)),
        (second, 1, lambda: leaders(6, first)),
        (second, 2, lambda: leaders(4, second)),
        (third, 1, lambda: leaders(2, second)),
    )
    for tokens, seed, candidates in stages:  # of which each needs the one before
        runs = [Run(name, tokens, seed) for name in candidates()]
        if missing := [run for run in runs if run not in found]:
            return missing
    return []


def prepare(folder: Path) -> None:
    """Makes the folder of runs. Raises: OSError; ValueError if RESULTS are of another text."""
    text = shards_of(os.environ["DATA_PATH"])
    if others := [run.name() for run, row in results().items() if row["text"] != text]:
        told = f"{RESULTS} has runs on another text, as {others[0]}: move that file away"
        raise ValueError(f"DATA_PATH={os.environ['DATA_PATH']}: {told}")
    (folder / "logs").mkdir(parents=True, exist_ok=True)


def climb(folder: Path, workers: int) -> None:
    """Raises: as start."""
    while missing := next_runs(results()):
        print(f"{len(missing)} runs of {missing[0].tokens:,} tokens", flush=True)
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(lambda run: start(run, folder), missing))


# --- Tables ---------------------------------------------------------------------------------------


def table(tokens: int, names: list[str]) -> Iterator[str]:
    """Candidates that have been on a rung, the best first."""
    found = results()
    yield "| candidate | MLP | parameters | bits per byte | int6 | seeds |"
    yield "|---|--:|--:|--:|--:|--:|"
    for name in best(names, tokens, found, len(names)):
        rows = [row for run, row in found.items() if run[:2] == (name, tokens)]
        int6 = statistics.mean(row["val_bpb"] for row in rows)
        yield (
            f"| {name} | {rows[0]['mlp_mult']:.2f} | {rows[0]['parameters']:,} | "
            f"{score(name, tokens, found):.4f} | {int6:.4f} | {len(rows)} |"
        )


def tables() -> Iterator[str]:
    """Of each rung that has been reached; changes on the lowest are in the table below."""
    reached = {run.tokens for run in results()}
    for tokens in filter(reached.__contains__, RUNGS):
        on_it = {run.candidate for run in results() if run.tokens == tokens}
        changes = set(filter(is_change, on_it)) if tokens == RUNGS[0] else set()
        yield f"{tokens:,} tokens, {target_bytes():,.0f} bytes by estimate:"
        yield ""
        yield from table(tokens, [*(on_it - changes)])
        yield ""


def is_change(candidate: str) -> bool:
    return candidate.startswith(f"{BASE} + ")


def table_of_changes() -> Iterator[str]:
    """Of BASE on the lowest rung, by the seeds that it has too: what they have more."""
    found, tokens = results(), RUNGS[0]
    changes = {run.candidate for run in found if is_change(run.candidate)}
    yield "| change | MLP | parameters | bits per byte more | int6 more | seeds |"
    yield "|---|--:|--:|--:|--:|--:|"
    for name in sorted(changes, key=lambda name: behind(name, tokens, found)):
        if pairs := pairs_of(name, tokens, found):
            more = [behind(name, tokens, found, of) for of in ("pre_quant_val_bpb", "val_bpb")]
            yield (
                f"| {name.removeprefix(BASE + ' + ')} | {pairs[0][0]['mlp_mult']:.2f} | "
                f"{pairs[0][0]['parameters']:,} | {more[0]:+.4f} | {more[1]:+.4f} | {len(pairs)} |"
            )


# --- Picture --------------------------------------------------------------------------------------


def smooth(curve: dict[int, float]) -> tuple[list[int], list[float]]:
    """Of values by step: tokens, and means of what was logged at 0.8 to 1.25 of them."""

    def near(step: int) -> float:
        return statistics.mean(y for x, y in curve.items() if 0.8 * step <= x <= 1.25 * step)

    steps = [step for step in curve if step >= 10]
    return [TOY["train_batch_tokens"] * step for step in steps], [near(step) for step in steps]


def draw(path: Path) -> None:
    """Training losses of seed 1 on the highest rung of BASE, and what the others have more on the
    same batches. The picture says of which RESULTS it is. Raises: OSError, ValueError if BASE has
    not been run."""
    import plot

    found = {run: row for run, row in results().items() if run.seed == 1}
    rungs = [run.tokens for run in found if run.candidate == BASE]
    if not rungs:
        raise ValueError(f"{RESULTS}: no run of {BASE} with seed 1, with which all are compared")
    top = max(rungs)
    curves = {run.candidate: dict(found[run]["losses"]) for run in found if run.tokens == top}
    names = best(curves, top, found, len(curves))
    title, subtitle = "Training loss on the ladder", f"seed 1, {top:,} tokens, the same batches"
    figure, (upper, lower) = plot.new_figure(title, subtitle, 6.0, nrows=2, sharex=True)
    ends = []
    for name, colour in zip(names, plot.cycle(), strict=False):
        more = {step: loss - curves[BASE][step] for step, loss in curves[name].items()}
        upper.plot(*smooth(curves[name]), color=colour)
        lower.plot(*smooth(more), color=colour)
        ends.append((smooth(more)[1][-1], name.replace(" + ", "\n+ "), colour))
    upper.set(ylabel="nats per token", xscale="log")
    lower.set(ylabel=f"more than {BASE}", xlabel="tokens")
    figure.align_ylabels()
    plot.name_lines(lower, ends)
    metadata = dict(Software=None, Source=t.digest(RESULTS))
    figure.savefig(path, format="png", dpi=200, metadata=metadata)


def main() -> str | None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("--workers", type=int, default=os.cpu_count())
    run.add_argument("--folder", type=Path, default=ROOT / "ladder", help="of logs and checkpoints")
    run.add_argument("--only", nargs=3, metavar=("CANDIDATE", "TOKENS", "SEED"))
    commands.add_parser("show")
    commands.add_parser("draw")
    one = commands.add_parser("one")
    for name, kind in dict(candidate=str, tokens=int, seed=int).items():
        one.add_argument(name, type=kind)
    args = parser.parse_args()
    try:
        if args.command == "show":
            return print(*tables(), *table_of_changes(), sep="\n")
        if args.command == "draw":
            return draw(PICTURE)
        if missing := [name.upper() for name in PATHS if name.upper() not in os.environ]:
            raise ValueError(f"{' and '.join(missing)}: not set, and there is no default")
        if args.command == "one":
            return train(Run(args.candidate, args.tokens, args.seed))
        prepare(folder := args.folder.resolve())
        if args.only:
            name, tokens, seed = args.only
            return start(Run(name, int(tokens), int(seed)), folder)
        return climb(folder, args.workers)
    except (OSError, ValueError, RuntimeError) as error:
        return f"ladder: error: {error}"


if __name__ == "__main__":
    sys.exit(main())
