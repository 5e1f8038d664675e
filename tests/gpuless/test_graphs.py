"""The program as one of eight GPUs, on fake tensors: the graphs that torch.compile makes of it,
where the CPU waits for the GPU, and what the ranks send each other. Needs g++, and no GPU.

graphs.py runs it, once for each system: training, calibration and evaluation as the program has
them, at the real batch shapes. GPULESS=full takes the layouts as they are, which needs minutes.
"""

import collections
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import traces

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="no g++")

RANKS = 8
# forward and backward of each stage of training; all that scores or learns from scores. Windows of
# a final pass overlap, and are computed by the graph of those that do not
STAGES = ["train, progress 0.00"]
GRAPHS = {
    "train_gpt": dict.fromkeys(STAGES, 2) | {"windows": 1, "final pass": 2, "stream": 1},
    "baseline": dict.fromkeys(STAGES, 2) | {"windows": 1},
    "kv_share": dict.fromkeys(STAGES, 2) | {"windows": 1, "SGD": 2},
    "pure_gdn": {
        **{f"train, progress {start}": 2 for start in ("0.00", "0.15", "0.45")},
        **{"windows": 1, "final pass": 1},
    },
    "crawler": dict.fromkeys(STAGES, 2) | {"windows": 1, "final pass": 1},
    "transformer": {
        **{f"train, progress {start}": 2 for start in ("0.00", "0.35")},
        **{"windows": 1, "final pass": 2, "SGD": 2, "stream": 1},
    },
    "hybrid_1895": {
        **{f"train, progress {start}": 2 for start in ("0.00", "0.40")},
        **{"windows": 1, "final pass": 1, "SGD": 2},
    },
}
# loss and norm of the gradient, together
STEP_WAITS = {"train: tolist": 1}
# of a pass: its plan is copied to the GPU; whether all scores are finite; their sum
PASS_WAITS = {
    "steps_of: copy to cuda": 1,
    "score: _local_scalar_dense": 1,
    "validate: _local_scalar_dense": 1,
}

systems = pytest.mark.parametrize("system", traces.SYSTEMS)


def events(system):
    return traces.trace(system)["events"]


def final_pass(system):
    """Its phase."""
    phases = {event.phase for event in events(system)}
    return min(p for p in phases if p.startswith("evaluate > final_") and "roundtrip" not in p)


@systems
def test_each_way_of_calling_the_model_is_compiled_once(system):
    found = {mode.name: mode.graphs for mode in traces.modes(events(system))}
    found.pop("one row", None)
    assert found == GRAPHS[system]


@systems
def test_a_stream_of_one_row_is_compiled_once(system):
    found = {mode.name: mode.graphs for mode in traces.modes(events(system))}
    assert found["one row"] == 1


@systems
def test_graphs_are_whole_and_of_fixed_shapes(system):
    settings = {e.what for e in events(system) if e.what.startswith("compile")}
    assert settings == {"compile {'fullgraph': True, 'dynamic': False}"}


@systems
def test_graphs_lie_on_the_gpu_and_never_wait(system):
    for graph in traces.graphs(events(system)):
        assert (graph.devices, graph.waits) == (["cuda:0"], []), graph


@systems
def test_nothing_is_compiled_while_a_clock_runs(system):
    timed = ("train", final_pass(system), f"{final_pass(system)} > learn")
    late = [graph for graph in traces.graphs(events(system)) if graph.phase in timed]
    assert not late, late


@systems
def test_where_a_step_of_training_waits(system):
    steps = traces.between(events(system), "progress", "train")
    assert len(steps) > 4
    assert [traces.waits(step) for step in steps[1:4]] == [STEP_WAITS] * 3


@systems
def test_scoring_waits_before_and_behind_all_steps_only(system):
    phase = final_pass(system)
    steps = traces.between(events(system), "forward", phase)
    assert len(steps) > 3
    segments = collections.Counter(e.phase for e in events(system))[f"{phase} > learn"]
    if not segments:  # of SGD, in between
        scoring = [event for event in events(system) if event.phase == phase]
        assert traces.waits(scoring) == PASS_WAITS


@pytest.mark.parametrize("system", ["kv_share", "transformer", "hybrid_1895"])
def test_sgd_waits_once_a_chunk(system):
    """Whether all of the chunk is scored."""
    learning = [e for e in events(system) if e.phase == f"{final_pass(system)} > learn"]
    chunks = sum(event.what == "begin" for event in learning)
    assert chunks > 0
    assert traces.waits(learning) == {"SgdTTT.learn: _local_scalar_dense": chunks}


@systems
def test_a_step_of_training_sends_what_it_must(system):
    """Gradients once in float32; updates of matrices once in bfloat16, as many of each shape as
    the ranks share evenly; the loss in float32; between CPUs the clock and the longest step."""
    result = traces.trace(system)
    gradients = sum(math.prod(shape) for _, *shape in result["parameters"])
    stacks = collections.Counter(
        tuple(shape) for kind, *shape in result["parameters"] if kind == "matrix"
    )
    shares = {shape: math.ceil(count / RANKS) for shape, count in stacks.items()}
    updates = sum(RANKS * share * math.prod(shape) for shape, share in shares.items())
    expected = {
        "allreduce float32 cuda": 4 * gradients + 4,
        "allgather_base bfloat16 cuda": 2 * updates,
        "allreduce float64 cpu": 16,
    }
    for step in traces.between(result["events"], "progress", "train")[1:4]:
        assert traces.collectives(step) == expected
        calls = [event for event in step if event.kind == "collective"]
        assert len(calls) == 3 + len(stacks)


@pytest.fixture(scope="module")
def tiny():
    program = Path(__file__).with_name("tiny.py")
    run = subprocess.run([sys.executable, str(program)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout.splitlines()[-1])


def test_the_instruments_see_each_wait_and_collective(tiny):
    waits = {name: list(found) for name, (found, _) in tiny["between"].items()}
    assert waits == dict(
        nothing=[],
        item=[": _local_scalar_dense"],
        condition=[": _local_scalar_dense"],
        tolist=[": tolist"],
        nonzero=[": nonzero"],
        chosen=[": index by a mask"],
        put=[": index_put_ by a mask"],
        filled=[],
        to_cpu=[": copy to cpu"],
        to_cpu_later=[],
        to_cuda=[": copy to cuda"],
        sent=[],
    )
    sent = tiny["between"].pop("sent")[1]
    assert sent == {"allreduce float64 cuda": 96, "allgather_base float16 cuda": 192}
    assert not any(found for _, found in tiny["between"].values())


def test_the_instruments_see_breaks_recompilations_and_devices(tiny):
    forward, backward = ["forward", ["cuda:0"], 0], ["backward", ["cuda:0"], 0]
    assert tiny["compiled"] == dict(
        once=[forward],
        shapes=[forward] * 2,
        layouts=[forward] * 2,
        cpu=[["forward", ["cpu", "cuda:0"], 0]],
        breaks=["Unsupported"],
        saves=[["forward", ["cuda:0"], 64], backward],  # [4, 4] float32, once
    )
