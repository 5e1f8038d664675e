"""The candidates of tools/ladder.py at full size: parameters, bytes, a lower bound of the time of a
step on 8 H100 (tools/floor.py), and what its speed alone makes of a published score.

    python tools/forecast.py steps [NAME]...     # what is missing, a minute each; needs no GPU
    python tools/forecast.py show

At full size a candidate has the record's width and settings, twice the heads of its toy with twice
their size, and as wide an MLP as ARTIFACT_BYTES allow by the entropy of normal weights.

Tokens are worth `worth_of` bits per byte, a law through published runs that differ in nothing but
their time. What a layout learns from equal tokens is not in it: docs/record.md has what is known.
"""

import argparse
import itertools
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tools")]
if sys.argv[1:2] == ["one"]:
    import floor  # before torch, which then believes that it has a GPU
import ladder  # noqa: E402  (the path comes first)

STEPS = ROOT / "logs" / "ladder_steps.jsonl"
ARTIFACT_BYTES = 15_970_000  # with code
SCALED = "gdn_heads", "gdn_key_heads"  # what a toy has half of
SECONDS = 592  # of training
# Bits per byte above what a stack can reach, BILLION (tokens / 1e9) ** -EXPONENT, by scores of
# averaged weights before quantization
EXPONENT = 0.45  # #549, #1005: 1.1369, 1.1098, 1.0939 at 5.65, 15.7, 39.3 billion tokens
BILLION = 0.1115  # #1950, #1979: 1.06445, 1.03969 at 3.90, 12.58 billion tokens
ANCHOR = 3.90e9, 1.0667  # tokens and score of #1787, whose layout `transformer` has
# Share of its bound that a stack reaches
TRANSFORMERS = 0.77, 0.83  # #1493, #1787
HYBRIDS = 0.65, 0.76  # the first record on an H100, without fla's convolution; #1895

# Not used for the law: a recurrent layout, its attention, billions of tokens, difference published
PAIRS = (
    ("#1895: 3 of 11 blocks", "#1493", 3.136, 3.580, 0.001),  # see docs/record.md
    ("#1013: S4D, 2 of 11 blocks", "#549", 4.047, 5.646, 1.1499 - 1.1369),
    ("#1371, rows of 8,192: 7 of 9 blocks", "its own", 0.310, 0.398, 1.3802 - 1.3500),
    ("#1371, rows of 16,384", "its own", 0.281, 0.247, 1.4021 - 1.4344),
    ("#1479: 8 of 10 blocks", "#1450", 2.889, 3.636, 1.14502 - 1.08359),
)


def full_of(candidate: str):
    """Its hyperparameters at full size. Raises: ValueError."""
    own = ladder.overrides(candidate)
    settings = {name: value * (2 if name in SCALED else 1) for name, value in own.items()}
    module = ladder.module_of(candidate)
    system = "record" if module is ladder.variants else module.Hyperparameters.system
    return ladder.fitted(candidate, settings, ARTIFACT_BYTES - ladder.bench.code_bytes(system))


def measure(candidate: str) -> dict:
    """A line of STEPS; in a process that has imported floor."""
    module, hp = ladder.module_of(candidate), full_of(candidate)
    step, stages = floor.optimizer(module, hp), []
    for progress in hp.stage_starts():
        forward, backward, times = floor.train_parts(module, hp, progress)
        seconds = times * (forward + backward).seconds()
        stages.append((progress, seconds + step["seconds"] + step["link_seconds"]))
    return dict(
        candidate=candidate,
        layout=hp.layout,
        mlp_mult=hp.mlp_mult,
        parameters=ladder.bench.parameters(hp, module),
        seconds=stages,  # of a step, from which progress on
        tokens=hp.train_batch_tokens,
        source=ladder.t.digest(ROOT / "train_gpt.py")[:12],
    )


def costing(candidate: str) -> str:  # without what costs no time
    return candidate.replace(" + even decays", "")


def measured() -> dict[str, dict]:
    lines = STEPS.read_text().splitlines() if STEPS.exists() else []
    return {row["candidate"]: row for row in map(json.loads, lines)}


def measure_missing(names: list[str]) -> None:
    """Those of another source are missing, too. Raises: CalledProcessError, OSError, ValueError."""
    source = ladder.t.digest(ROOT / "train_gpt.py")[:12]
    for name in names:
        ladder.overrides(name)
        if measured().get(name, {}).get("source") != source:
            command = [sys.executable, __file__, "one", name]
            line = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            row = json.loads(line.splitlines()[-1])
            rows = measured() | {name: row}
            STEPS.write_text("".join(json.dumps(own) + "\n" for own in rows.values()))
            print(f"{name}: {tokens_per_second(row) / 1e6:.2f} M tokens/s at most", flush=True)


def tokens_per_second(row: dict) -> float:
    """At most, over the whole run: its stages are shares of its seconds."""
    starts = [start for start, _ in row["seconds"]]
    lengths = [end - start for start, end in zip(starts, [*starts[1:], 1.0], strict=True)]
    steps = sum(n / seconds for n, (_, seconds) in zip(lengths, row["seconds"], strict=True))
    return steps * row["tokens"]


def worth_of(tokens: float, more: float) -> float:
    """Bits per byte by which a stack that has seen `more` tokens is better."""
    return BILLION * ((tokens / 1e9) ** -EXPONENT - (more / 1e9) ** -EXPONENT)


def by_speed(row: dict) -> tuple[list[float], list[float]]:
    """Tokens seen in SECONDS, fewest and most, and the score if they were worth what they are to
    the ANCHOR, worst and best."""
    shares = HYBRIDS if "G" in row["layout"] else TRANSFORMERS
    seen = [share * tokens_per_second(row) * SECONDS for share in shares]
    tokens, score = ANCHOR
    return seen, [score - worth_of(tokens, own) for own in seen]


def table() -> Iterator[str]:
    """The candidates that have been measured, the fastest first."""
    yield (
        "| candidate | layout | MLP | parameters | ms a step | M tokens/s | B tokens | "
        "bits per byte by speed alone |"
    )
    yield "|---|---|--:|--:|--:|--:|--:|--:|"
    for name, row in sorted(measured().items(), key=lambda item: -tokens_per_second(item[1])):
        steps = ", ".join(f"{1e3 * seconds:.1f}" for _, seconds in row["seconds"])
        (fewest, most), (worst, best) = by_speed(row)
        yield (
            f"| {name} | `{row['layout']}` | {row['mlp_mult']:.2f} | {row['parameters']:,} | "
            f"{steps} | {tokens_per_second(row) / 1e6:.2f} | {fewest / 1e9:.1f} to "
            f"{most / 1e9:.1f} | {best:.4f} to {worst:.4f} |"
        )


def table_of_pairs() -> Iterator[str]:
    """What the law says of them, what was published, and what the law leaves over."""
    yield "| recurrent layout | against | billion tokens | by tokens | published | left over |"
    yield "|---|---|--:|--:|--:|--:|"
    for one, other, own, more, published in PAIRS:
        law = worth_of(own * 1e9, more * 1e9)
        yield (
            f"| {one} | {other} | {own:.2f}, {more:.2f} | {law:+.3f} | {published:+.3f} | "
            f"{published - law:+.3f} |"
        )


def at_equal_time() -> Iterator[str]:
    """Of toys on a rung and the one below, against the ladder's BASE by the same seeds. *In equal
    time* each has, of its tokens, the share that its layout has of that of BASE at full size; what
    they cost is by its own slope between the two rungs."""
    found, rows = ladder.results(), measured()

    def tokens(candidate: str) -> float:  # at full size, in the middle; nan: not measured
        row = rows.get(costing(candidate))
        return statistics.mean(by_speed(row)[0]) if row else math.nan

    yield (
        "| tokens | candidate | seeds | bits per byte | deviation | behind | a rung before | "
        "tokens in equal time | behind in equal time |"
    )
    yield "|--:|---|--:|--:|--:|--:|--:|--:|--:|"
    names = {run.candidate for run in found}
    for below, top in itertools.pairwise(ladder.RUNGS):
        for name in ladder.best(names, top, found, len(names)):
            then, now = (ladder.behind(name, n, found) for n in (below, top))
            if math.inf in (then, now):
                continue
            own = [row["pre_quant_val_bpb"] for run, row in found.items() if run[:2] == (name, top)]
            deviation = f"{statistics.stdev(own):.4f}" if len(own) > 1 else "-"
            share = tokens(name) / tokens(ladder.BASE)
            gain = ladder.score(name, top, found) - ladder.score(name, below, found)
            in_time = now + gain * math.log(share) / math.log(top / below)
            equal = f"{share:.2f} | {in_time:+.4f}" if share > 0 else "- | -"
            yield (
                f"| {top:,} | {name} | {len(own)} | {statistics.mean(own):.4f} | {deviation} | "
                f"{now:+.4f} | {then:+.4f} | {equal} |"
            )


def main() -> str | None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("command", choices=["steps", "show", "one"])
    parser.add_argument("names", nargs="*", metavar="NAME")
    args = parser.parse_args()
    try:
        if args.command == "one":
            print(*(json.dumps(measure(name)) for name in args.names), sep="\n")
        elif args.command == "steps":
            measure_missing(args.names or [*ladder.LAYOUTS, *map(costing, ladder.COMPARED)])
        else:
            print(*table(), sep="\n")
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        return f"forecast: error: {error}"


if __name__ == "__main__":
    sys.exit(main())
