"""What a run of the program on fake tensors left: a list of events, and how to read it."""

import collections
import functools
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

# modules; gdn_hybrid has layers of kv_share and the record, and the n-grams of kv_share
SYSTEMS = "train_gpt baseline kv_share pure_gdn crawler transformer hybrid_1895".split()
FULL = os.environ.get("GPULESS") == "full"  # layouts as they are, not a layer of each kind


class Event(NamedTuple):
    """A graph that is compiled, or something that happens between graphs."""

    kind: str  # forward, backward: a graph; wait: of the CPU for the GPU; collective; mark
    what: str  # name of the operator, or of the mark
    phase: str  # of the run, outermost first: "evaluate > final_int6_stream"
    where: str = ""  # the function of the program
    seconds: float = 0.0  # of CPU, since the start
    operators: int = 0  # of a graph, after decomposition
    devices: list[str] = []  # of all tensors in a graph
    waits: list[str] = []  # operators in a graph whose result the CPU needs
    bytes: int = 0  # saved by a forward for its backward; a collective's result on each rank
    dtype: str = ""  # of a collective, and where its tensors lie


class Mode(NamedTuple):
    """The graphs that one way of calling the model needed."""

    name: str
    graphs: int
    operators: list[int]
    saved_bytes: int
    seconds: float  # of CPU, to trace and partition; Inductor comes after that


@functools.cache
def trace(system: str) -> dict:
    """Runs graphs.py, with GPULESS=full in full. Returns system, layout, parameters (kind and
    shape of each), events."""
    program = Path(__file__).with_name("graphs.py")
    command = [sys.executable, str(program), "--json", system] + ["--full"] * FULL
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    result = json.loads(run.stdout.splitlines()[-1])
    return result | dict(events=[Event(**event) for event in result["events"]])


def graphs(events: list[Event]) -> list[Event]:
    return [event for event in events if event.kind in ("forward", "backward")]


def mode_of(event: Event, progress: str) -> str:
    """Training by the progress from which a stage holds, the rest by phase."""
    phase = event.phase.split(" > ")[-1]
    names = dict(evaluate="final pass", learn="SGD", write_scores="stream")
    names["warm_up"] = f"train, {progress}"
    return "windows" if phase.startswith("step:") else names.get(phase, phase)


def modes(events: list[Event]) -> list[Mode]:
    """In the order of the run."""
    found, begun, progress = {}, 0.0, ""
    for event in events:
        if event.kind == "mark":
            progress = event.what if event.what.startswith("progress") else progress
            begun = event.seconds
        elif event.kind in ("forward", "backward"):
            found.setdefault(mode_of(event, progress), []).append((event, event.seconds - begun))
            begun = event.seconds
    return [
        Mode(
            name,
            len(group),
            [event.operators for event, _ in group],
            sum(event.bytes for event, _ in group),
            sum(seconds for _, seconds in group),
        )
        for name, group in found.items()
    ]


HEAD = [
    "system | mode | graphs | operators | saved GB | seconds",
    "--- | --- | --: | --: | --: | --:",
]


def table(result: dict) -> list[str]:
    """The rows of one system. Saved: by a forward for its backward; seconds: of Dynamo and
    AOTAutograd on one core."""
    rows, name = [], f"{result['system']} `{result['layout']}`"
    for mode in modes([Event(**event) for event in result["events"]]):
        operators, saved = " + ".join(map(str, mode.operators)), mode.saved_bytes / 1e9
        saved = f"{saved:.2f}" if saved else ""
        rows.append(
            f"{name} | {mode.name} | {mode.graphs} | {operators} | {saved} | {mode.seconds:.0f}"
        )
        name = ""
    return rows


def between(events: list[Event], mark: str, phase: str) -> list[list[Event]]:
    """What happens from each mark that begins so, in this very phase, up to the next of them."""
    places = [
        i
        for i, event in enumerate(events)
        if event.kind == "mark" and event.what.startswith(mark) and event.phase == phase
    ]
    return [events[i:end] for i, end in itertools.pairwise(places)]


def waits(events: list[Event]) -> dict[str, int]:
    """How often the CPU waits for the GPU, by function and operator."""
    found = (f"{event.where}: {event.what}" for event in events if event.kind == "wait")
    return dict(collections.Counter(found))


def collectives(events: list[Event]) -> dict[str, int]:
    """Bytes of their results on each rank, by operator and dtype."""
    found = collections.Counter()
    for event in events:
        if event.kind == "collective":
            found[f"{event.what} {event.dtype}"] += event.bytes
    return dict(found)
