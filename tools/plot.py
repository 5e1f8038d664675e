"""Pictures of runs, from their logs and what lies beside them, without train_gpt.py.

    python tools/plot.py logs/RUN.txt                       # all that its files allow
    python tools/plot.py logs/A.txt logs/B.txt --output plots    # runs compared
    python tools/plot.py logs/RUN.txt --artifact A --scores S.npz --data FOLDER --tokenizer MODEL

Writes OUTPUT/NAME.PICTURE.png and .svg, NAME the log's (A+B for two, A+2 for three):

    training   loss as logged, and the learning rate by the settings, over the time of the training
    stages     bits per byte of the weights, their average, GPTQ, and the final pass; brotli and xz
    place      bits per byte by place in the document: score file, or else the artifact's sample
    artifact   its bytes by groups of tensors, and the code's (one run)
    learning   as place, with and without learning while scoring: of the sample (one run)

and of one run NAME.html, its text with each token coloured by its bits. Files that are not named
are those that the log's settings name, from here. What cannot be drawn is left out, in a line that
says why; the exit status is 1 if nothing can be drawn. The same files give the same pictures, byte
by byte, from the same matplotlib.
"""

import argparse
import logging
import math
import os
import re
import sys
import warnings
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import brotli
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))  # not there with PYTHONSAFEPATH
from dataset import Text, one_line, read_file, read_stats, sha256  # noqa: E402  (the path is first)
from packed import entropy_bytes, group_of, read_packed, read_state, unpack  # noqa: E402
from page import Page  # noqa: E402
from rules import SIZE_LIMIT  # noqa: E402
from scored import Scored  # noqa: E402
from verify import positive  # noqa: E402

import logs  # noqa: E402

logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it tells of caches that it makes
try:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator
except ImportError as error:
    sys.exit(f"plot: error: {error}: pip install -r tests/requirements.txt")

# told apart by the colour-blind, too (Okabe and Ito)
COLOURS = "#0072b2 #d55e00 #009e73 #cc79a7 #e69f00 #56b4e9".split()
GREY, FAINT = "#55585c", "#d5d7da"
STYLE = {
    "font.size": 11,
    "font.family": ["DejaVu Sans", "Verdana", "sans-serif"],
    "text.parse_math": False,  # names of runs and texts
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "lines.linewidth": 1.8,
    "svg.fonttype": "none",  # text is text: small files
    "svg.hashsalt": "plot",
}
# groups of what brotli packs; all others are range coded
SETTINGS, SCALES, HALVES = "settings, counts", "scales of rows", "unquantized, float16"


# --------------------------------------------------------------------------------------------------
# Runs


class Shown:
    """A run of a log. Raises: OSError, ValueError naming the file."""

    def __init__(self, path: Path):
        runs = logs.read_runs(path)
        run, self.note = logs.choose(path, runs)
        end = next(i for i, other in enumerate(runs, 1) if other is run)
        start = end - 1
        while start and runs[start].resumed:  # it went on from the run before
            start -= 1
        self.path, self.name, self.settings = path, path.stem, run.settings
        self.text = "".join(part.text for part in runs[start:end])
        self.figures = run.figures or {}

    @property
    def corpus(self) -> str:
        if self.figures.get("official"):
            return "official FineWeb split"
        name = Path(self.settings.get("data_path", "")).name
        return f"own text: {name}" if name else "text not named"

    def curve(self, name: str) -> np.ndarray:
        """float [n, 3]: step, seconds, loss in nats per token; name: train_loss or val_loss."""
        line = rf"^step:(\d+)/\d+ {name}:([\d.]+)(?: val_bpb:\S+)? train_time:(\d+)ms"
        found = re.findall(line, self.text, re.M)
        last = {int(step): (int(ms) / 1000, float(loss)) for step, loss, ms in found}  # if resumed
        return np.array([(step, *last[step]) for step in sorted(last)]).reshape(-1, 3)

    def multiplier(self, steps: np.ndarray, seconds: np.ndarray) -> np.ndarray:
        """Of the learning rate, by the settings: the log has only the last. Raises: ValueError if
        that is another, LookupError if the log has no such settings."""
        own = {name: float(self.settings[name]) for name in SCHEDULE}
        limit = (own["max_wallclock_seconds"] or math.inf) - own["gptq_reserve_seconds"]
        progress = np.minimum(np.maximum(steps / own["iterations"], seconds / limit), 1)
        falling = (1 - progress) / max(own["warmdown_frac"], 1e-9)
        multiplier = np.clip(falling, own["min_lr"], 1)
        last = self.figures.get("lr_multiplier_at_stop", multiplier[-1])
        if abs(last - multiplier[-1]) > 0.05:
            raise ValueError(f"it ended at {last}, its settings say {multiplier[-1]:.3f}")
        return multiplier

    @cached_property
    def stages(self) -> dict[str, tuple[str, float]]:
        """How each was scored, and bits per byte; by name, in the order of the run."""
        found = {name: re.findall(line, self.text, re.M) for name, line in STAGES.items()}
        return {name: (lines[-1][0], float(lines[-1][1])) for name, lines in found.items() if lines}


SCHEDULE = "iterations max_wallclock_seconds gptq_reserve_seconds warmdown_frac min_lr".split()
NUMBER = r"val_loss:\S+ val_bpb:(\d+\.\d+)"
STAGES = {
    "raw\nweights": rf"^(step):\d+/\d+ {NUMBER}",
    "averaged\nweights": rf"^(diagnostic) pre-quantization post-ema {NUMBER}",
    "after\nGPTQ": rf"^final_(int\d+)_roundtrip {NUMBER}",
    "final pass": rf"^final_int\d+_(\w+)_exact {NUMBER}",
}


def how_scored(how: str) -> str:
    """stream_ttt_lora -> what the final pass is."""
    kind = "stream" if how.startswith("stream") else "windows"
    return kind + ", learning" * ("_ttt_" in how)


def stage_name(stage: str, runs: list[Shown]) -> str:
    """With what the runs have in common there."""
    how = one_of(run.stages[stage][0] for run in runs if stage in run.stages)
    if stage == "final pass" and how:
        return f"final pass:\n{how_scored(how)}"
    return f"{stage}, {how}" if how.startswith("int") else stage


def one_of(values) -> str:
    """What they have in common, or ""."""
    values = set(values)
    return values.pop() if len(values) == 1 else ""


def label(run: Shown, runs: list[Shown], value: str = "") -> str:
    """Its name and value; in a second line its text and tokens, where runs differ in them."""
    words = []
    if not one_of(other.corpus for other in runs):
        words.append(run.corpus)
    if not one_of(other.settings.get("vocab_size", "") for other in runs):
        words.append(f"{run.settings.get('vocab_size', '?')} pieces")
    return "\n".join(filter(None, (f"{run.name} {value}".strip(), ", ".join(words))))


def about(runs: list[Shown], *more: str) -> str:
    """Which text and which run."""
    corpus = one_of(run.corpus for run in runs) or "several texts"
    name = f"run {runs[0].name}" if len(runs) == 1 else f"{len(runs)} runs"
    return " \u00b7 ".join([corpus, name, *more])


# --------------------------------------------------------------------------------------------------
# Drawing


def new_figure(title: str, subtitle: str, height: float = 4.5, **options):
    """800 pixels wide at 100 a inch. Returns figure and axes."""
    figure = Figure(figsize=(8, height), layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0, 1, 1 - 0.68 / height), w_pad=0.1, h_pad=0.08)
    axes = figure.subplots(**options)
    place = dict(transform=figure.dpi_scale_trans, ha="left", va="top")
    figure.text(0.12, height - 0.10, title, size=14, weight="bold", **place)
    figure.text(0.12, height - 0.40, subtitle, size=10.5, color=GREY, **place)
    return figure, axes


def apart(values: list[float], least: float) -> list[float]:
    """Heights for labels of these, at least so far from each other, in their order."""
    order, placed = np.argsort(values, kind="stable"), np.array(values, float)
    for _ in range(100):
        for low, high in zip(order, order[1:], strict=False):
            missing = least - (placed[high] - placed[low])
            if missing > 1e-12:
                placed[low], placed[high] = placed[low] - missing / 2, placed[high] + missing / 2
    return placed.tolist()


def name_lines(axis, ends: list[tuple[float, str, str]]) -> None:
    """Labels right of the axis; ends: of each line its last value, its text and colour."""
    axis.figure.draw_without_rendering()  # now the axis has its size
    low, high = axis.get_ylim()
    inches = axis.get_position().height * axis.figure.get_figheight()
    rows = max((text.count("\n") + 1 for _, text, _ in ends), default=1)
    heights = apart([end[0] for end in ends], 0.2 * rows * (high - low) / inches)
    for y, (_, text, colour) in zip(heights, ends, strict=True):
        axis.annotate(
            text,
            (1, y),
            xycoords=("axes fraction", "data"),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            size=10,
            annotation_clip=False,
        )


def in_bytes(value: float) -> str:
    """Decimal, as the limit is."""
    if value < 1000:
        return f"{value:.0f} B"
    if value < 999_500:
        return f"{value / 1000:.{value < 9950:d}f} kB"
    return f"{value / 1e6:.2f} MB"


def save(figure, path: Path) -> None:
    """path: without its ending. Raises: OSError."""
    for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
        whole, part = Path(f"{path}.{kind}"), Path(f"{path}.{kind}.tmp")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph")  # names of texts in any script
            figure.savefig(part, format=kind, dpi=200, metadata=metadata)
        os.replace(part, whole)


# --------------------------------------------------------------------------------------------------
# Pictures: each returns a figure. Raises: OSError, ValueError with the reason why there is none.


def draw_training(runs: list[Shown], notes: list[str]):
    """Loss as logged; the multiplier below it."""
    runs = with_figures(runs, notes, lambda run: len(run.curve("train_loss")) > 1, "train_loss")
    more = training_words(runs[0]) if len(runs) == 1 else ["\u25c7 validation"]
    figure, (upper, lower) = new_figure(
        "Training loss and learning rate", about(runs, *more), 5.2, nrows=2, sharex=True,
        height_ratios=(3, 1),
    )  # fmt: skip
    minutes = max(run.curve("train_loss")[-1, 1] for run in runs) > 300
    unit, ends = 60 if minutes else 1, []
    for run, colour in zip(runs, cycle(), strict=False):
        _, seconds, loss = run.curve("train_loss").T
        upper.plot(seconds / unit, loss, color=colour, marker="o", markersize=3.5)
        _, later, validated = run.curve("val_loss").T
        upper.plot(later / unit, validated, "D", color=colour, mfc="white")
        ends.append((loss[-1], label(run, runs), colour))
        if len(runs) == 1:
            kinds = dict(training=loss[-1:], validation=validated[-1:])
            ends = [(x, f"{kind}\n{x:.3f}", colour) for kind, last in kinds.items() for x in last]
        draw_multiplier(lower, run, unit, colour, notes)
    upper.set_ylabel("nats per token")
    lower.set(
        ylabel="learning rate,\nof its peak", ylim=(0, 1.08), xlim=(0, None), yticks=(0, 0.5, 1)
    )
    lower.set_xlabel(f"training time, {'minutes' if minutes else 'seconds'}")
    figure.align_ylabels()
    name_lines(upper, ends)
    return figure


def training_words(run: Shown) -> Iterator[str]:
    lines = np.concatenate([run.curve(name) for name in ("train_loss", "val_loss")])
    steps, seconds, _ = lines.max(0)
    yield f"{steps:,.0f} steps in {seconds:,.0f} s"
    if hardware := run.figures.get("hardware"):
        yield hardware


def cycle() -> Iterator[str]:
    while True:
        yield from COLOURS


def draw_multiplier(axis, run: Shown, unit: int, colour: str, notes: list[str]) -> None:
    lines = np.concatenate([run.curve(name) for name in ("train_loss", "val_loss")])
    steps, seconds, _ = lines[np.argsort(lines[:, 0], kind="stable")].T
    times = np.linspace(0, seconds[-1], 400)
    try:
        values = run.multiplier(np.interp(times, [0, *seconds], [0, *steps]), times)
    except (LookupError, ValueError) as error:
        reason = error if isinstance(error, ValueError) else f"no setting {error}"
        notes.append(f"training: the learning rate of {run.name}: {reason}")
    else:
        axis.plot(times / unit, values, color=colour)


def with_figures(runs: list[Shown], notes: list[str], has, what: str) -> list[Shown]:
    """Those that have some. Raises: ValueError if none has."""
    found = [run for run in runs if has(run)]
    without = [str(run.path) for run in runs if run not in found]
    if not found:
        raise ValueError(f"no {what} in {', '.join(without)}")
    notes += [f"no {what} in {path}" for path in without]
    return found


def draw_stages(runs: list[Shown], compressors: dict[str, float], notes: list[str]):
    """compressors: bits per byte of others for the same text, by name."""
    runs = with_figures(runs, notes, lambda run: run.stages, "val_bpb")
    names = [name for name in STAGES if any(name in run.stages for run in runs)]
    figure, axis = new_figure("Bits per byte, from training to the artifact", about(runs))
    ends = [(bpb, f"{name} {bpb:.3f}", GREY) for name, bpb in compressors.items()]
    for bpb in compressors.values():
        axis.axhline(bpb, color=GREY, linewidth=1, linestyle=(0, (4, 3)))
    for run, colour in zip(runs, cycle(), strict=False):
        places = [names.index(name) for name in run.stages]
        values = [bpb for _, bpb in run.stages.values()]
        axis.plot(places, values, color=colour, marker="o", markersize=6)
        if len(runs) == 1:
            name_points(axis, places, values)
        else:
            ends.append((values[-1], label(run, runs, f"{values[-1]:.4f}"), colour))
    axis.margins(x=0.12, y=0.16)
    ticks = [stage_name(name, runs) for name in names]
    axis.set_xticks(range(len(names)), ticks, color="black")
    axis.tick_params(axis="x", length=0)
    axis.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axis.set_ylabel("bits per byte of the validation text")
    if length := one_of(run.settings.get("eval_seq_len", "") for run in runs):
        axis.set_xlabel(f"before the final pass: in separate windows of {length} tokens", size=10)
    name_lines(axis, ends)
    return figure


def name_points(axis, places, values) -> None:
    """Above each, or below one that the line falls to."""
    for x, y, before in zip(places, values, [values[0], *values], strict=False):
        shift, side = ((0, -9), "top") if y < before else ((0, 9), "bottom")
        offset = dict(xytext=shift, textcoords="offset points", ha="center", va=side)
        axis.annotate(f"{y:.4f}", (x, y), **offset)


def compressors_of(runs: list[Shown], folder: Path | None) -> dict[str, float]:
    """What brotli and xz need for the validation text, as data/prepare.py measured it, by name."""
    data = folder or Path(one_of(run.settings.get("data_path", "") for run in runs) or "?")
    if not (data / "stats.json").is_file():
        return {}
    found = read_stats(data / "stats.json").get("val_compressor_bpb")
    names = {"brotli-11": "brotli", "xz-9e": "xz"}
    found = found if isinstance(found, dict) else {}
    return {names.get(name, name): float(bpb) for name, bpb in found.items()}


def groups_of(artifact: Path, state_path: Path) -> dict[str, bytes]:
    """All that is packed, by group, in the order of the artifact but for the values of quantized
    tensors, which come first. Raises: OSError, ValueError naming the file."""
    state, parts = read_state(state_path), unpack(artifact)
    packed, names = read_packed(artifact, state), set(state["weights"])
    groups = {}
    for name, (q, _) in packed.items():
        groups.setdefault(group_of(name, names), []).append(q.tobytes())
    groups[SETTINGS] = [parts.text + b"\n"]
    for name, w in state["weights"].items():
        is_scale = name in packed
        half = packed[name].scale.astype(np.float16) if is_scale else w.detach().half().numpy()
        groups.setdefault(SCALES if is_scale else HALVES, []).append(half.tobytes())
    return {name: b"".join(parts) for name, parts in groups.items()}


def packed_sizes(groups: dict[str, bytes], size: int) -> dict[str, float]:
    """Of each group its part of the artifact's bytes: what it takes alone, scaled."""
    alone = {name: entropy_bytes(raw) for name, raw in groups.items()}
    for name in alone.keys() & {SETTINGS, SCALES, HALVES}:
        alone[name] = len(brotli.compress(groups[name], quality=11, lgwin=24))
    return {name: n * size / sum(alone.values()) for name, n in alone.items()}


def draw_artifact(run: Shown, artifact: Path):
    check_artifact(run, artifact, sha256(read_file(artifact, "an artifact")))
    size, groups = artifact.stat().st_size, groups_of(artifact, Path(f"{artifact}.trained.pt"))
    packed = packed_sizes(groups, size)
    rows = [(name, packed[name], len(groups[name])) for name in sorted(packed, key=packed.get)]
    code = run.figures.get("bytes_code", 0)
    rows = [("code, as it is", code, code)] * bool(code) + rows
    whole = f"{in_bytes(size + code)} of {in_bytes(SIZE_LIMIT)}" if code else in_bytes(size)
    figure, axis = new_figure(
        "Bytes of the artifact by group of tensors", about([run], whole), 0.42 * len(rows) + 1.7
    )
    largest, total = max(row[2] for row in rows), size + code
    for y, (name, n, before) in enumerate(rows):
        axis.barh(y, before, 0.62, color=FAINT)
        axis.barh(y, n, 0.62, color=GREY if name.startswith("code") else COLOURS[0])
        text = f"{in_bytes(n)}, {n / total:.1%}"
        axis.text(max(before, n) + largest / 90, y, text, va="center")
    axis.set_yticks(range(len(rows)), [row[0] for row in rows], color="black")
    axis.tick_params(axis="y", length=0)
    axis.set(xlim=(0, largest * 1.24), xlabel="dark: packed, its share; light: before")
    axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: in_bytes(value)))
    return figure


def check_artifact(run: Shown, path: Path, found: str) -> None:
    """found: sha256 of an artifact, which is at this path or named there. Raises: ValueError if it
    is not that of the run."""
    due = run.figures.get("artifact_sha256")
    if not due:
        raise ValueError(
            f"{run.path}: it has no artifact_sha256, as a run that came to its end has"
        )
    if found != due:
        raise ValueError(f"{path}: artifact {found[:12]}, that of {run.path} is {due[:12]}")


def draw_places(title: str, lines: list[tuple[str, np.ndarray, Scored]], subtitle: str):
    """lines: of each its name, bits [n] and what they are of."""
    figure, axis = new_figure(title, subtitle)
    ends, most = [], 0
    for (name, bits, scored), colour in zip(lines, cycle(), strict=False):
        edges, bpb, error = scored.by_place(bits)
        x = np.arange(len(bpb)) + 0.5
        if len(lines) == 1:
            axis.fill_between(x, bpb - error, bpb + error, color=colour, alpha=0.18, linewidth=0)
        axis.plot(x, bpb, color=colour, marker="o", markersize=5)
        ends.append((bpb[-1], name, colour))
        if len(bpb) > most:
            most, ticks = len(bpb), edges
    names = [f"{edge}" if edge < 1024 else f"{edge // 1024}k" for edge in ticks]
    axis.set_xticks(range(most + 1), names)
    axis.set(xlim=(0, most), xlabel="place in the document, tokens from its start (k: 1,024)")
    axis.set_ylabel("bits per byte")
    axis.grid(axis="x", color=FAINT, linewidth=0.6)
    if len(lines) > 1:
        name_lines(axis, ends)
    return figure


# --------------------------------------------------------------------------------------------------
# Files of a run


class Files:
    """Where the files of a run are: as named, or as its log names them."""

    def __init__(self, run: Shown, args):
        def path_of(name: str, setting: str) -> Path | None:
            named = getattr(args, name) or run.settings.get(setting)
            return Path(named) if named else None

        self.run = run
        self.artifact = path_of("artifact", "artifact")
        self.scores = path_of("scores", "scores")
        self.data = path_of("data", "data_path")
        self.tokenizer = path_of("tokenizer", "tokenizer_path")

    def needed(self, name: str) -> Path:
        """Raises: ValueError if neither the log nor the caller names it."""
        if path := getattr(self, name):
            return path
        raise ValueError(f"{self.run.path} names no {name}: give --{name}")

    @cached_property
    def text(self) -> Text:
        return Text(self.needed("data"), self.needed("tokenizer"))

    @cached_property
    def sample(self) -> Scored:
        path = Path(f"{self.needed('artifact')}.sample.npz")
        found = Scored(self.text, path, "unlearned")
        check_artifact(self.run, path, found.artifact)
        return found

    @cached_property
    def scored(self) -> Scored:
        """The score file, if it has one, or else the sample."""
        if not self.scores:
            return self.sample
        found, due = Scored(self.text, self.scores), self.run.figures.get("val_bpb")
        if due is None or abs(found.bpb - due) > 1e-4:
            raise ValueError(
                f"{self.scores}: {found.bpb:.4f} bits per byte, {self.run.path}: {due}"
            )
        return found


def draw_place(every: list[Files], notes: list[str]):
    runs, lines, missing = [files.run for files in every], [], []
    for files in every:
        try:
            scored = files.scored
        except (OSError, ValueError) as error:
            missing.append(one_line(error))
        else:
            lines.append((label(files.run, runs), scored.bits, scored))
    if not lines:
        raise ValueError("; ".join(missing))
    notes += [f"left out in place: {reason}" for reason in missing]
    many = one_of(len(scored.starts) for _, _, scored in lines)
    words = [f"{many:,} documents"] * bool(many) + ["band: one standard error"] * (len(lines) == 1)
    return draw_places("Bits per byte by place in the document", lines, about(runs, *words))


def draw_learning(files: Files):
    sample = files.sample
    if np.array_equal(sample.bits, sample.unlearned):
        raise ValueError(f"{sample.path}: nothing was learned while it was scored")
    size = sample.bytes.sum()
    both = {"artifact alone": sample.unlearned, "learning": sample.bits}
    lines = [(f"{name}\n{bits.sum() / size:.3f}", bits, sample) for name, bits in both.items()]
    subtitle = about([files.run], f"first {len(sample.starts):,} documents, right: of all places")
    return draw_places("What learning while scoring is worth", lines, subtitle)


def write_page(files: Files, path: Path, tokens: int) -> None:
    title = f"Bits of each token: run {files.run.name}"
    page = Page(files.scored, title, about([files.run]), tokens).html()
    Path(f"{path}.tmp").write_text(page, "utf-8")
    os.replace(f"{path}.tmp", path)


# --------------------------------------------------------------------------------------------------
# All


def pictures(runs: list[Shown], args, notes: list[str]) -> dict:
    """What makes each picture, by name."""
    every = [Files(run, args) for run in runs]
    one = every[0]
    found = {
        "training": lambda: draw_training(runs, notes),
        "stages": lambda: draw_stages(runs, compressors_of(runs, args.data), notes),
        "place": lambda: draw_place(every, notes),
    }
    if len(runs) == 1:
        found["artifact"] = lambda: draw_artifact(one.run, one.needed("artifact"))
        found["learning"] = lambda: draw_learning(one)
    return found


def attempt(name: str, outputs: list[str], make, notes: list[str]) -> bool:
    """Whether it was made. If not, what an earlier run left there is removed: it is of another."""
    try:
        make()
    except Exception as error:  # the other pictures are drawn all the same
        is_known = isinstance(error, OSError | ValueError)
        reason = one_line(error) if is_known else f"{type(error).__name__}: {one_line(error)}"
        notes.append(f"left out: {name}: {reason}")
        for output in outputs:
            Path(output).unlink(missing_ok=True)
        return False
    return True


def draw_all(args) -> str:
    """Returns what was written, "" if nothing; says what was not. Raises: OSError, ValueError."""
    runs, notes, written = [Shown(path) for path in args.logs], [], []
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        raise ValueError(f"two logs have one name: {', '.join(map(str, args.logs))}")
    notes += [run.note for run in runs if run.note]
    args.output.mkdir(parents=True, exist_ok=True)
    start = args.output / joined(names)
    for name, draw in pictures(runs, args, notes).items():
        path = Path(f"{start}.{name}")
        outputs = [f"{path}.png", f"{path}.svg"]
        if attempt(name, outputs, lambda draw=draw, path=path: save(draw(), path), notes):
            written.append(f"{name}.png, .svg")
    if len(runs) == 1:
        path, files = Path(f"{start}.html"), Files(runs[0], args)
        if attempt("page", [str(path)], lambda: write_page(files, path, args.tokens), notes):
            written.append("html")
    for line in dict.fromkeys(notes):
        print(f"plot: {line}", file=sys.stderr)
    return f"{start}.*: {'; '.join(written)}" if written else ""


def joined(names: list[str]) -> str:
    return "+".join(names) if len(names) < 3 else f"{names[0]}+{len(names) - 1}"


def parse(argv: list[str] | None) -> argparse.Namespace:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    add = parser.add_argument
    add("logs", type=Path, nargs="+", metavar="LOG", help="logs/RUN.txt")
    add("--output", type=Path, default=Path("plots"), help="folder, made if need be; plots")
    add("--artifact", type=Path, help="with its .sample.npz and .trained.pt beside it")
    add("--scores", type=Path, help="the score file that the run wrote (SCORES=...)")
    add("--data", type=Path, help="folder with fineweb_val_*.bin")
    add("--tokenizer", type=Path)
    add("--tokens", type=positive, default=16_000, help="of the page, at most; 16000, 0.6 MB")
    args = parser.parse_args(argv)
    named = args.artifact or args.scores
    if named and len(args.logs) > 1:
        parser.error(f"{named}: of one run, {len(args.logs)} logs are given")
    return args


def main(argv: list[str] | None = None) -> int | str:
    args = parse(argv)
    try:
        with matplotlib.rc_context(STYLE):
            written = draw_all(args)
    except (OSError, ValueError) as error:
        return f"plot: error: {one_line(error)}"
    if not written:
        return "plot: error: nothing could be drawn"
    print(f"plot: {written}")
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files, on any terminal
    sys.exit(main())
