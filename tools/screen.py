"""Shows how far a run is: reads what train_gpt.py prints, and prints it for a person.

    python train_gpt.py | python tools/screen.py

On a terminal the lines of single steps and of what is done of a long pass become one line that
rewrites itself, every second, with tokens a second and the time that is left; other lines stay, and
one that is wider than the terminal is broken between words. Elsewhere all lines stay as they are,
and a line of the same form follows every EVERY seconds. The last line, `figures: {...}`, is left to
the log, which has everything. When nobody reads any more, the run goes on; signals to end are left
to it.
"""

import math
import os
import re
import select
import signal
import sys
import textwrap
import time
from collections.abc import Iterator
from typing import NamedTuple

from tqdm import tqdm

EVERY = 30.0  # seconds
# What comes after the training of the record's demo, in steps of it, and at which step it is told:
# in logs/demo.txt 5 s of Hessians, 21 of the final pass, 9 of other scoring and 135 of the verifier
# beside steps of 0.37 s
REST, TELL_AT = 460, 10

SETTING = re.compile(r"^  (\w+): (\S+)$")
STEP = re.compile(r"^step:(\d+)/\d+ train_loss:(\S+) train_time:(\d+)ms")
PASS = re.compile(r"^targets:(\d+)/(\d+) time:(\d+)s$")


class Stage(NamedTuple):
    """What a line says of how far a stage of the run is."""

    name: str
    share: float  # that is done
    seconds: float  # that this took
    text: str  # step and loss
    rate: str  # with its unit

    def at(self, seconds: float) -> "Stage":
        """So many seconds later, if it goes on like this."""
        now = self.seconds + seconds
        share = max(self.share, min(0.999, self.share * now / max(self.seconds, 1e-3)))
        return self._replace(share=share, seconds=now)

    def __str__(self) -> str:
        left = round(self.seconds * (1 / self.share - 1)) if self.share else 0
        parts = [self.text, self.rate, f"{tqdm.format_interval(left)} left"]
        return f"{self.name} {self.share:.0%}: {', '.join(part for part in parts if part)}"


class Reader:
    """Follows the lines of a run."""

    def __init__(self):
        self.settings = {}

    def stage(self, line: str) -> Stage | None:
        """What the line says of a stage, if anything."""
        try:
            if match := SETTING.match(line):
                self.settings[match[1]] = match[2]
            elif match := STEP.match(line):
                return self.training(int(match[1]), match[2], int(match[3]) / 1000)
            elif match := PASS.match(line):
                return self.scoring(*map(int, match.groups()))
        except (ArithmeticError, LookupError):  # nothing is known yet
            pass
        return None

    def forecast(self, line: str) -> str | None:
        """Of that demo, once: how long the whole run takes."""
        match, run = STEP.match(line), [self.settings.get(name) for name in ("system", "preset")]
        if not match or int(match[1]) != TELL_AT or run != ["record", "demo"]:
            return None
        steps = float(self.settings["iterations"]) + REST
        minutes = steps * int(match[3]) / int(match[1]) / 60_000
        return f"screen: the run takes about {minutes:.0f} min here, with all checks"

    def training(self, step: int, loss: str, seconds: float) -> Stage:
        """By steps or by the clock, whichever ends it first."""
        names = "iterations train_batch_tokens max_wallclock_seconds gptq_reserve_seconds".split()
        iterations, batch, limit, reserve = (float(self.settings[name]) for name in names)
        budget = limit - reserve if limit else math.inf
        share = min(1.0, max(step / iterations, seconds / budget))
        rate = f"{batch * step / seconds:,.0f} tokens/s"
        return Stage("training", share, seconds, f"step {step}, loss {loss}", rate)

    def scoring(self, done: int, total: int, seconds: int) -> Stage:
        return Stage("scoring", done / total, seconds, "", f"{done / seconds:,.0f} tokens/s")


def lines(file: int, pause: float) -> Iterator[str | None]:
    """Of a file descriptor, as they come; None after each pause without one."""
    rest = b""
    while True:
        if not select.select([file], [], [], pause)[0]:
            yield None
            continue
        new = os.read(file, 1 << 16)
        *whole, rest = (rest + new).split(b"\n")
        yield from (line.decode("utf-8", "replace") for line in whole)
        if not new:
            if rest:
                yield rest.decode("utf-8", "replace")
            return


def folded(text: str, columns: int) -> str:
    """Broken between words where it is wider; what follows is indented by four more."""
    if len(text) <= columns:
        return text
    indent = " " * (len(text) - len(text.lstrip()) + 4)
    options = dict(break_long_words=False, break_on_hyphens=False)
    return textwrap.fill(text, columns, subsequent_indent=indent, **options)


class Terminal:
    """A line at the bottom that rewrites itself; any other line ends the stage that it shows."""

    def __init__(self, file):
        self.bar = tqdm(file=file, bar_format="{desc}", leave=False, dynamic_ncols=True)
        self.stage, self.since = None, 0.0

    def line(self, text: str, stage: Stage | None) -> None:
        self.stage, self.since = stage, time.monotonic()
        self.tick()
        if not stage:
            tqdm.write(folded(text, self.columns()), file=self.bar.fp)

    def columns(self) -> int:
        """Of the terminal, at this moment; of one that does not say it, as many as there may be."""
        return os.get_terminal_size(self.bar.fp.fileno()).columns or sys.maxsize

    def tick(self) -> None:
        stage = self.stage and self.stage.at(time.monotonic() - self.since)
        self.bar.set_description_str(str(stage or ""))

    def close(self) -> None:
        self.bar.close()


class File:
    """All lines, and every EVERY seconds one more."""

    def __init__(self, file):
        self.file, self.told = file, time.monotonic()

    def line(self, text: str, stage: Stage | None) -> None:
        print(text, file=self.file, flush=True)
        if stage and time.monotonic() - self.told > EVERY:
            print(stage, file=self.file, flush=True)
            self.told = time.monotonic()

    def tick(self) -> None: ...

    def close(self) -> None: ...


def show(screen: Terminal | File) -> None:
    """stdin, to its end. Raises: OSError when the output is gone."""
    reader = Reader()
    for text in lines(sys.stdin.fileno(), 1.0):
        if text is None:
            screen.tick()
        elif not text.startswith("figures: {"):
            screen.line(text, reader.stage(text))
            if told := reader.forecast(text):
                screen.line(told, None)
    screen.close()


def main() -> None:
    for number in signal.SIGINT, signal.SIGTERM, signal.SIGHUP:
        signal.signal(number, signal.SIG_IGN)
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files, on any terminal
    try:
        show((Terminal if sys.stdout.isatty() else File)(sys.stdout))
    except Exception as error:  # no fault of what shows a run may end the run
        if not isinstance(error, OSError):
            print(f"screen: {error!r}: the log has what is not shown from here on", file=sys.stderr)
        for _ in lines(sys.stdin.fileno(), 1.0):  # the run must not wait for a reader
            pass
        os._exit(0)  # nothing is flushed into an output that is gone


if __name__ == "__main__":
    main()
