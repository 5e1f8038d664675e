"""A run that is stopped and goes on is the run that nobody stopped, bit for bit; and whatever it
cannot go on from is refused by one line.

Runs are those of tools/resumable.py, in this process; a signal arrives at a line of the log, or at
a call of the program. Where a process must die, or there are two ranks, they are forks.
"""

import contextlib
import functools
import gc
import io
import logging
import os
import pickle
import re
import resource
import shutil
import signal
import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from corpus import tokenizer_model, write_corpus

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import faults  # noqa: E402  (the path comes first)
import packed  # noqa: E402
import pure_gdn  # noqa: E402, F401  (a checkpoint knows all source that is loaded)
import record  # noqa: E402
import resumable  # noqa: E402
import settings  # noqa: E402
import transformer  # noqa: E402, F401
from verify import describe  # noqa: E402

import logs  # noqa: E402
import train_gpt as t  # noqa: E402

SMALL = dict(
    setting.split("=", 1)
    for setting in (
        "MODEL_DIM=32 MLP_MULT=2 GDN_HEADS=2 GDN_KEY_HEADS=1 GDN_HEAD_DIM=16 NUM_HEADS=2 "
        "NUM_KV_HEADS=1 HEAD_DIM=16 WINDOW_SIZE=40 PARALLEL_START_LAYER=0 ENABLE_LOOPING_AT=0.5 "
        "TRAIN_SEQ_LEN=32 TRAIN_BATCH_TOKENS=256 GRAD_ACCUM_STEPS=2 ITERATIONS=6 WARMUP_STEPS=1 "
        "MAX_WALLCLOCK_SECONDS=0 GPTQ_RESERVE_SECONDS=0 GPTQ_CALIBRATION_BATCHES=2 EMA_DECAY=0.9 "
        "TTT_CHUNK_TOKENS=64 TTT_PHASES=1 TTT_LORA_LR=0.003 TTT_LORA_RANK=2 MATRIX_LR=0.05 "
        "EVAL_SEQ_LEN=64 EVAL_STRIDE=32 EVAL_CHUNK=64 EVAL_ROWS=8 VAL_BATCH_SIZE=1024 "
        "ARTIFACT_TARGET_BYTES=0 RUN_ID=run SCORES=scores.npz ARTIFACT=model.ptz"
    ).split()
)
RECORD = {"LAYOUT": "G S2"}
SHARED = {"LAYOUT": "G S S=1", "ROPE_DIMS": "8", "NGRAM_VOCAB_SIZE": "64", "NGRAM_DIM": "8"}
SYSTEMS = {
    "record": ("train_gpt.py", RECORD),
    "no_average": ("train_gpt.py", RECORD | {"EMA_DECAY": "0"}),
    "pure_gdn": ("systems/pure_gdn.py", {"LAYOUT": "G S", "CURRICULUM": "0:1x16 0.5:2x32"}),
    "transformer": ("systems/transformer.py", {"LAYOUT": "A (A)x2 A"}),
    "gdn_hybrid": ("systems/gdn_hybrid.py", SHARED),
}
CHECKPOINT, TRAINED = "model.ptz.checkpoint.pt", "model.ptz.trained.pt"
ANEW = "nothing is kept of this run, RESUME=auto starts anew"
KEPT = "RESUME=auto goes on from "
EVENTS = "accumulate quantize save_artifact write_scores write_whole".split()


# --------------------------------------------------------------------------------------------------
# A run


@contextlib.contextmanager
def events(happens):
    """happens(text) is called behind each line of the log, and before calls of the program."""
    counts = {}

    def watched(owner, name):
        call = getattr(owner, name)

        def before(*args, **kwargs):
            counts[name] = counts.get(name, 0) + 1
            happens(f"call {name} {counts[name]}")
            return call(*args, **kwargs)

        return mock.patch.object(owner, name, before)

    def logged(line, info=t.log.info):
        info(line)
        happens(line)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(t.log, "info", logged))
        for name in EVENTS:
            stack.enter_context(watched(t, name))
        stack.enter_context(watched(t.TrainLoader, "next"))
        yield


def signals_at(at: str, *numbers: int):
    """Each time that something happens which begins with `at`, a regular expression."""

    def happens(text):
        if at and re.match(at, text):
            for number in numbers:
                os.kill(os.getpid(), number)

    return events(happens)


@contextlib.contextmanager
def as_before():
    """Afterwards the program and the signals are as they were."""
    handlers = {number: signal.getsignal(number) for number in resumable.SIGNALS}
    names = "between_steps train pack save_state write_whole".split()
    owners = [(t, name) for name in names] + [(logging.Handler, "handleError")]
    with contextlib.ExitStack() as stack:
        for owner, name in owners:
            stack.enter_context(mock.patch.object(owner, name, getattr(owner, name)))
        yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    t.log.handlers.clear()


class Place:
    """A folder in which runs are made."""

    def __init__(self, folder: Path, env: dict[str, str], system: str = "record"):
        script, own = SYSTEMS[system]
        self.folder, self.script, self.env = folder, script, SMALL | env | own
        self.folder.mkdir(exist_ok=True)
        self.log = folder / "logs" / "run.txt"

    def start(self, at: str = "", numbers=(signal.SIGTERM,), script="", without=(), **env):
        """Returns exit status, and the lines on stderr."""
        env = {key: x for key, x in (self.env | env).items() if key not in without}
        error = io.StringIO()
        with (
            contextlib.chdir(self.folder),
            mock.patch.dict(os.environ, env, clear=True),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(error),
            as_before(),
            signals_at(at, *numbers),
        ):
            status = faults.status_of(lambda: resumable.main([script or self.script]))
        if status:
            gc.collect()  # frames of what was stopped hold its lock
        return status, error.getvalue().splitlines()

    def stop(self, at: str, **env) -> str:
        """The line of a run that SIGTERM ends there."""
        status, lines = self.start(at, **env)
        assert (status, len(lines)) == (143, 1), lines
        return lines[0].removeprefix("SIGTERM: ")

    def finish(self, **env) -> "Place":
        assert self.start(**env) == (0, [])
        return self

    def copy(self, folder: Path) -> "Place":
        shutil.copytree(self.folder, folder)
        other = Place(folder, {})
        other.script, other.env = self.script, self.env
        return other

    def lines(self, pattern: str) -> list[str]:
        text = self.log.read_text()
        return re.findall(rf"^{pattern}.*$", text, re.M)

    def outputs(self) -> dict[str, bytes]:
        return {name: (self.folder / name).read_bytes() for name in faults.FILES}

    def made(self) -> dict:
        """All that a run makes which a clock does not measure."""
        state = packed.read_state(self.folder / TRAINED)
        tensors = state["weights"] | {f"H {name}": H for name, H in state["hessians"].items()}
        values = {name: x.detach().numpy().tobytes() for name, x in tensors.items()}
        return self.outputs() | values | {"figures": faults.figures_of(self.log)}


@pytest.fixture(scope="module", autouse=True)
def code_once():
    """It looks at the path of every module of this process, of which there are thousands."""
    with mock.patch.object(t, "code_files", functools.cache(t.code_files)):
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("data")
    made = write_corpus(folder, train_tokens=6000, val_tokens=600)
    describe(folder, folder / "tokenizer.model")
    return {name.upper(): str(value) for name, value in made.items()}


@pytest.fixture(scope="module")
def wholes():
    return {}


@pytest.fixture
def whole(data, wholes, tmp_path_factory):
    """whole(system) -> a run that nobody stopped; nothing may be written there."""

    def of(system: str = "record") -> Place:
        if system not in wholes:
            place = Place(tmp_path_factory.mktemp(system), data, system)
            wholes[system] = place.finish()
        return wholes[system]

    return of


@pytest.fixture
def place(tmp_path, data) -> Place:
    return Place(tmp_path / "run", data)


@pytest.fixture(scope="module")
def kept_once():
    return {}


@pytest.fixture
def stopped(kept_once, data, tmp_path_factory, tmp_path):
    """stopped(kind) -> a copy of a run that has kept a checkpoint, or what it had trained."""

    def of(kind: str = CHECKPOINT) -> Place:
        if kind not in kept_once:
            place = Place(tmp_path_factory.mktemp("stopped"), data)
            at = "step:3/6" if kind == CHECKPOINT else "call quantize"
            assert place.stop(at) == KEPT + kind
            kept_once[kind] = place
        return kept_once[kind].copy(tmp_path / "copy")

    return of


# --------------------------------------------------------------------------------------------------
# The same run


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("at, step", [("call next 1$", 1), ("step:3/6 t", 3), ("step:6/6 t", 6)])
def test_stopped_in_training_and_resumed_it_is_the_same_run(
    tmp_path, data, whole, system, at, step
):
    """In the first step, in the middle, behind the last one; where the curriculum and the loop are
    still to come, and where they are there."""
    place = Place(tmp_path / "run", data, system)
    assert place.stop(at) == KEPT + CHECKPOINT
    assert place.lines("checkpoint: ") == [f"checkpoint: {CHECKPOINT} step:{step}"]
    assert not (place.folder / TRAINED).exists()
    place.finish(RESUME="auto")
    assert re.match(rf"resumed: {CHECKPOINT} step:{step} ", *place.lines("resumed: "))
    assert place.made() == whole(system).made()


def test_the_systems_change_in_the_middle(whole):
    """What the test above relies on: a curriculum and a loop begin between two stops."""
    text = whole("transformer").log.read_text()
    assert text.index("step:3/6 train") < text.rindex("layer_loop:enabled") < text.index("step:4/6")
    hp = pure_gdn.Hyperparameters(curriculum=SYSTEMS["pure_gdn"][1]["CURRICULUM"])
    assert [hp.micro_steps_at(step / 6) for step in (2, 3)] == [1, 2]
    assert whole("record").made() != whole("no_average").made()


def test_stopped_again_and_again(place, whole):
    assert place.stop("step:1/6 t") == KEPT + CHECKPOINT
    assert place.stop("warmup_step", RESUME="auto") == KEPT + CHECKPOINT
    assert place.stop("step:2/6 t", RESUME="auto") == KEPT + CHECKPOINT
    assert place.stop("step:5/6 t", RESUME="auto") == KEPT + CHECKPOINT
    assert place.stop("train.hessians", RESUME="auto") == KEPT + TRAINED
    assert place.stop("final_int6_round", RESUME="auto") == KEPT + TRAINED
    place.finish(RESUME="auto")
    assert [line.split(" train_time")[0] for line in place.lines("resumed: ")] == [
        *(f"resumed: {CHECKPOINT} step:{step}" for step in (1, 2, 5)),
        *[f"resumed: {TRAINED}"] * 2,
    ]
    assert place.made() == whole().made()


def parts_of(state, name: str = "") -> dict:
    """All that it holds, flat, but seconds."""
    if isinstance(state, torch.Tensor):
        return {name: state.detach().numpy().tobytes()}
    if isinstance(state, (dict, list)):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        return {
            place: x for key, part in items for place, x in parts_of(part, f"{name} {key}").items()
        }
    return {} if name == " progress seconds" else {name: state}


def test_a_resumed_run_keeps_what_the_other_would_have(place, tmp_path, data):
    """Every part of a checkpoint, though the rest of this run may not depend on it."""
    other = Place(tmp_path / "other", data)
    assert other.stop("step:5/6 t") == KEPT + CHECKPOINT
    place.stop("step:2/6 t")
    assert place.stop("step:5/6 t", RESUME="auto") == KEPT + CHECKPOINT
    ours, theirs = (parts_of(packed.read_state(x.folder / CHECKPOINT)) for x in (place, other))
    assert ours == theirs and len(ours) > 100


def test_a_run_that_keeps_checkpoints_is_the_same_run(place, whole):
    place.finish(CHECKPOINT_EVERY="1e-9")
    steps = [line.split("step:")[1] for line in place.lines("checkpoint: ")]
    assert steps == list("0123456")
    assert place.made() == whole().made()


@pytest.mark.parametrize(
    "at, said",
    [
        ("model_params", ANEW),
        ("warmup_step", ANEW),
        ("step:2/6 t", KEPT + CHECKPOINT),
        ("call write_whole 1$", KEPT + TRAINED),  # while trained.pt is written
        ("step:6/6 val_loss", KEPT + TRAINED),
        ("train.hessians", KEPT + TRAINED),
        ("call quantize 1$", KEPT + TRAINED),
        ("call save_artifact 1$", KEPT + TRAINED),
        ("call write_whole 2$", KEPT + TRAINED),  # while the artifact is
        ("diagnostic", KEPT + TRAINED),
        ("final_int6_round", KEPT + TRAINED),
        ("call write_whole 4$", KEPT + TRAINED),  # while the scores are
        ("audit: time", KEPT + TRAINED),
        ("figures", ANEW),  # it has come to its end
    ],
)
def test_resume_does_what_was_said(place, whole, at, said):
    assert place.stop(at) == said
    place.finish(RESUME="auto")
    found = re.findall(r"^resumed: (\S+)", place.log.read_text(), re.M)
    assert found == ([said.removeprefix(KEPT)] if said != ANEW else [])
    assert place.made() == whole().made()


@pytest.mark.parametrize("at", ["warmup_step:1", "step:3/6 t", "call write_whole 2$", "final_"])
def test_two_signals_at_once_are_one(place, at):
    """Status and message are those of one of them."""
    status, lines = place.start(at, (signal.SIGTERM, signal.SIGINT, signal.SIGTERM))
    assert len(lines) == 1 and re.match("SIG(TERM|INT): ", lines[0])
    assert status == (143 if "TERM" in lines[0] else 130)


def test_a_signal_while_the_message_is_made_changes_nothing(place, monkeypatch):
    def what_next(keeper, call=resumable.Keeper.what_next):
        os.kill(os.getpid(), signal.SIGINT)
        return call(keeper)

    monkeypatch.setattr(resumable.Keeper, "what_next", what_next)
    assert place.stop("step:3/6 t") == KEPT + CHECKPOINT
    assert place.stop("warmup_step") == KEPT + CHECKPOINT


def test_a_second_signal_while_it_writes_the_checkpoint_changes_nothing(place, whole):
    assert place.stop("step:3/6 t|call write_whole 1$") == KEPT + CHECKPOINT
    assert place.finish(RESUME="auto").made() == whole().made()


def test_a_signal_between_two_checkpoints_is_not_lost(place):
    """It arrives while a periodic checkpoint is written: the next one is the last."""
    assert place.stop("call write_whole 3$", CHECKPOINT_EVERY="1e-9") == KEPT + CHECKPOINT
    steps = [line.split("step:")[1] for line in place.lines("checkpoint: ")]
    assert steps == list("0123")


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_ctrl_c_and_a_hang_up_are_signals_as_well(place, number, status):
    said = f"{signal.Signals(number).name}: {KEPT}{CHECKPOINT}"
    assert place.start("step:2/6 t", (number,)) == (status, [said])


def test_under_nohup_a_hang_up_is_nothing(place, whole):
    with mock.patch.object(signal, "signal", signal.signal):
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            assert place.start("step:2/6 t|final_", (signal.SIGHUP,)) == (0, [])
        finally:
            signal.signal(signal.SIGHUP, before)
    assert place.made() == whole().made()


def test_validation_in_between_changes_nothing(place, tmp_path, data):
    other = Place(tmp_path / "other", data).finish(VAL_LOSS_EVERY="2")
    assert place.stop("step:2/6 val_loss", VAL_LOSS_EVERY="2") == KEPT + CHECKPOINT
    assert place.finish(RESUME="auto", VAL_LOSS_EVERY="2").made() == other.made()


# --------------------------------------------------------------------------------------------------
# Which run goes on


def test_without_anything_to_go_on_from_it_starts_anew(place, whole):
    assert place.finish(RESUME="auto").made() == whole().made()
    assert not place.lines("resumed")


@pytest.mark.parametrize("env", [{}, {"SEED": "8", "RUN_ID": "second"}, {"SEED": "8"}])
def test_behind_an_ended_run_it_starts_anew(tmp_path, whole, env):
    """Under another name or the same one, which does not make the older run look as if it went on;
    until the training is over nothing of it is touched."""
    place = whole().copy(tmp_path / "again")
    before, log = place.outputs(), place.log.read_text()
    assert place.stop("warmup_step", RESUME="auto", **env) == ANEW
    assert place.stop("step:6/6 t", RESUME="auto", **env) == KEPT + CHECKPOINT
    assert place.outputs() == before and place.log.read_text().startswith(log)
    # this one has not ended, though the log of the older one is there, or even the same
    assert place.stop("final_int6_round", RESUME="auto", **env) == KEPT + TRAINED
    place.finish(RESUME="auto", **env)
    new = place.log.with_stem(env.get("RUN_ID", "run")).read_text().removeprefix(log)
    assert re.findall(r"^resumed: (\S+)", new, re.M) == [CHECKPOINT, TRAINED]
    assert (place.outputs() == before) is not bool(env)


@pytest.mark.parametrize("run_id", ["run", "another"])
def test_a_run_that_went_on_and_ended_has_ended(stopped, run_id):
    place = stopped(TRAINED).finish(RESUME="auto", RUN_ID=run_id)
    assert place.stop("warmup_step", RESUME="auto") == ANEW


def test_behind_a_run_that_was_repacked_it_starts_anew(stopped):
    place = stopped(TRAINED)
    with (
        contextlib.chdir(place.folder),
        mock.patch.dict(os.environ, {}),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        assert resumable.repack.main(["model.ptz"]) == 0
    t.log.handlers.clear()
    assert place.stop("warmup_step", RESUME="auto") == ANEW


def test_a_path_is_gone_on_from(stopped, whole):
    place = stopped()
    (place.folder / CHECKPOINT).rename(place.folder / "elsewhere.pt")
    said = place.stop("warmup_step", RESUME="elsewhere.pt")
    assert said == f"{ANEW}, RESUME=elsewhere.pt goes on from there"
    place.finish(RESUME="elsewhere.pt")
    assert place.made() == whole().made()


def test_the_log_goes_on_though_nobody_says_its_name(tmp_path, data, monkeypatch):
    """RUN_ID is made at random; run.sh must know it before the run."""
    place = Place(tmp_path / "run", data)
    env = dict(without=("RUN_ID",))
    assert place.start("step:3/6 t", **env)[0] == 143
    (log,) = (place.folder / "logs").iterdir()
    monkeypatch.chdir(place.folder)
    asked = {name: x for name, x in place.env.items() if name != "RUN_ID"} | {"RESUME": "auto"}
    assert settings.read_settings(asked | {"PRESET": "record"})["RUN_ID"] == log.stem
    assert place.start(RESUME="auto", **env) == (0, [])
    assert [*(place.folder / "logs").iterdir()] == [log]
    first, second = logs.read_runs(log)
    assert "step:3/6 train" in first.text and first.figures is None
    assert "step:4/6 train" in second.text and second.figures["run_id"] == log.stem


def test_only_scored_it_goes_on_from_nothing(stopped, whole, tmp_path):
    place = whole().copy(tmp_path / "run")
    shutil.copy(stopped(TRAINED).folder / TRAINED, place.folder)  # of a run that has not ended
    place.log.unlink()
    before = place.outputs()
    scored = {"EVAL_ONLY": "1", "ARTIFACT": "model.ptz", "RUN_ID": "scored", "RESUME": "auto"}
    assert place.start(**scored, VAL_BATCH_SIZE="512") == (0, [])  # which RESUME would refuse
    assert not (place.folder / CHECKPOINT).exists()
    assert "resumed" not in place.log.with_stem("scored").read_text().rpartition("=" * 100)[2]
    after = [np.load(io.BytesIO(files["scores.npz"])) for files in (before, place.outputs())]
    assert all(np.array_equal(after[0][name], after[1][name]) for name in after[0])
    assert place.outputs()["model.ptz"] == before["model.ptz"]


@pytest.mark.parametrize("kind", [CHECKPOINT, TRAINED])
def test_a_resumed_run_says_so_and_claims_nothing(stopped, whole, kind):
    place = stopped(kind).finish(RESUME="auto")
    run, _ = logs.choose(place.log, logs.read_runs(place.log))
    assert run.figures["resumed"] is True and run.resumed
    assert re.search(rf"^resumed: {kind}", run.text, re.M)
    made = record.submission(run.figures | {"official": True}, "2026-01-01")
    assert made["val_bpb"] is None and made["compliance"]["not_resumed"] is False
    assert "resumed" not in logs.read_runs(whole().log)[-1].figures


# --------------------------------------------------------------------------------------------------
# The clock


def clock(begin: float):
    """A step takes ten seconds, everything else nearly nothing."""
    now = [begin]

    def perf_counter():
        now[0] += 1e-6
        return now[0]

    def accumulate(*args, call=t.accumulate):
        now[0] += 10
        return call(*args)

    stack = contextlib.ExitStack()
    fake = SimpleNamespace(perf_counter=perf_counter)
    for module in (t, resumable):
        stack.enter_context(mock.patch.object(module, "time", fake))
    stack.enter_context(mock.patch.object(t, "accumulate", accumulate))
    return stack


@pytest.mark.parametrize("every", ["0", "25"])
def test_the_clock_goes_on_where_it_stood(place, tmp_path, data, every):
    env = dict(ITERATIONS="50", MAX_WALLCLOCK_SECONDS="100", GPTQ_RESERVE_SECONDS="5")
    other = Place(tmp_path / "other", data)
    with clock(0.0):
        other.finish(CHECKPOINT_EVERY=every, **env)
    steps = [line.split("step:")[1] for line in other.lines("checkpoint: ")]
    assert steps == (["3", "6", "9"] if every == "25" else [])
    with clock(1e6):
        assert place.stop("step:4/50 t", **env) == KEPT + CHECKPOINT
    with clock(7.0):
        place.finish(RESUME="auto", **env)
    assert re.search(r"step:4 train_time:4000\dms", *place.lines("resumed: "))
    ours, theirs = (logs.read_runs(one.log)[-1].figures for one in (place, other))
    assert ours["step_stop"] == theirs["step_stop"] == 9
    for name in ("wallclock_seconds", "last_read_seconds"):
        assert ours[name] == pytest.approx(theirs[name], abs=0.01)
        assert 90 <= ours[name] < 90.1


# --------------------------------------------------------------------------------------------------
# What is written is whole, or not there


def fork(place: Place, patch, **env) -> int:
    """Exit status of the run as a process, in which patch() was called before; a negative one of
    a signal."""

    def job():
        patch()
        return resumable.main([place.script])

    return faults.wait(faults.fork(place.folder, place.env | env, job))


def test_killed_in_the_middle_of_a_write_the_older_checkpoint_stays(place, whole):
    """Each write of the run, one after another."""
    writes = []

    def kill_in(number: int) -> None:
        real, seen = t.write_whole, []

        def half(write, file):
            buffer = io.BytesIO()
            write(buffer)
            file.write(buffer.getvalue()[: len(buffer.getvalue()) // 2])
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

        def write_whole(path, write):
            seen.append(path)
            dies = len(seen) == number
            real(path, functools.partial(half, write) if dies else write)

        t.write_whole = write_whole

    for number in range(1, 20):
        shutil.rmtree(place.folder)
        place.folder.mkdir()
        patch = functools.partial(kill_in, number)
        status = fork(place, patch, CHECKPOINT_EVERY="1e-9", ITERATIONS="2")
        kept = {path.name for path in place.folder.glob("*.pt")}
        assert kept == {CHECKPOINT, TRAINED} & {*writes}
        for name in kept:
            packed.read_state(place.folder / name)
        done = {name for name in faults.FILES if (place.folder / name).exists()}
        assert done == {*faults.FILES} & {*writes}
        if status == 0:
            break
        assert status == -signal.SIGKILL
        (cut,) = place.folder.glob("*.tmp")
        writes.append(cut.name.removesuffix(".tmp"))
        if number in (1, 3, 5):
            place.finish(RESUME="auto", ITERATIONS="2")
            assert len(place.lines("resumed: ")) == (number > 1)
    assert writes == [*[CHECKPOINT] * 3, TRAINED, *faults.FILES]


@contextlib.contextmanager
def full_disk(*kinds: str, room: int = 50_000):
    """No such file can have more bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def write_whole(path, *args, call=t.write_whole):
        if path in kinds:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
        try:
            call(path, *args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    with mock.patch.object(t, "write_whole", write_whole):
        yield


def not_written(kind: str) -> str:
    return f"checkpoint: {kind} is not written: [Errno 27] File too large"


def test_a_full_disk_does_not_end_the_run(place, whole):
    with full_disk(CHECKPOINT, TRAINED):
        assert place.start(CHECKPOINT_EVERY="1e-9") == (0, [])
    assert place.lines("checkpoint: ") == [*[not_written(CHECKPOINT)] * 7, not_written(TRAINED)]
    assert not [*place.folder.glob("*.pt"), *place.folder.glob("*.tmp")]
    assert place.outputs() == whole().outputs()


def test_a_full_disk_is_said_by_what_is_left(place, stopped, whole):
    with full_disk(CHECKPOINT):
        assert place.stop("step:3/6 t") == ANEW
    older = stopped()
    with full_disk(CHECKPOINT):
        assert older.stop("step:5/6 t", RESUME="auto") == KEPT + CHECKPOINT
    with full_disk(TRAINED):
        assert older.stop("call quantize", RESUME="auto") == KEPT + CHECKPOINT
    assert older.finish(RESUME="auto").made() == whole().made()
    assert re.match(rf"resumed: {CHECKPOINT} step:3 ", older.lines("resumed: ")[-1])


def test_a_full_disk_that_ends_the_run_names_the_file(place, whole):
    with full_disk("model.ptz.sample.npz", room=100):
        line = "train_gpt.py: [Errno 27] File too large: 'model.ptz.sample.npz'"
        assert place.start() == (1, [line])
    assert {path.name for path in place.folder.glob("model.*")} == {"model.ptz", TRAINED}
    assert place.finish(RESUME="auto").outputs() == whole().outputs()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk without room")
def test_a_log_that_takes_no_more_is_told_once(place, whole):
    def happens(text):
        if text.startswith("step:3/6 train"):
            t.log.handlers[-1].setStream(open("/dev/full", "w")).close()

    with events(happens):
        status, lines = place.start()
    line = "logs/run.txt: [Errno 28] No space left on device: lines will be missing there"
    assert (status, lines) == (0, [line])
    assert place.lines("step:3/6") and not place.lines("step:4/6")
    assert place.outputs()["model.ptz"] == whole().outputs()["model.ptz"]


# --------------------------------------------------------------------------------------------------
# What is refused


def refused(place: Place, **env) -> str:
    """The only line of a run that has not begun: it has touched nothing."""
    before = {path: path.stat().st_mtime_ns for path in place.folder.rglob("*")}
    status, lines = place.start(**env)
    assert (status, len(lines)) == (1, 1), lines
    assert before == {path: path.stat().st_mtime_ns for path in place.folder.rglob("*")}
    return lines[0]


@pytest.mark.parametrize("kind", [CHECKPOINT, TRAINED])
@pytest.mark.parametrize("resume", ["auto", "path"])
def test_other_settings_are_refused_by_name(stopped, kind, resume):
    place = stopped(kind)
    other = dict(
        MATRIX_LR="0.02", SEED="7", LAYOUT="G S", RESUME=kind if resume == "path" else resume
    )
    assert refused(place, **other) == (
        f"train_gpt.py: {kind}: of another run: layout is 'G S', there 'G S2'; "
        "matrix_lr is 0.02, there 0.05; seed is 7, there 1337"
    )


def test_another_system_is_refused(stopped):
    place = stopped()
    line = refused(place, script="systems/pure_gdn.py", RESUME="auto", CURRICULUM="0:1x32")
    assert line.startswith(f"pure_gdn.py: {CHECKPOINT}: of another run: curriculum is '0:1x32', ")
    assert "system is 'pure_gdn', there 'record'" in line


@pytest.mark.parametrize("kind", [CHECKPOINT, TRAINED])
def test_another_program_is_refused(stopped, tmp_path, monkeypatch, kind):
    (tmp_path / "more.py").write_text("# another line\n")
    files = [*t.code_files(), tmp_path / "more.py"]
    monkeypatch.setattr(t, "code_files", lambda: files)
    hashes = "'[0-9a-f]{16}', there '[0-9a-f]{16}'"
    line = refused(stopped(kind), RESUME="auto")
    assert re.fullmatch(f"train_gpt.py: {kind}: of another run: source is {hashes}", line)


def elsewhere(data: dict[str, str], folder: Path) -> tuple[Path, Path]:
    shutil.copytree(data["DATA_PATH"], folder)
    return folder, folder / "tokenizer.model"


@pytest.mark.parametrize("described", [True, False])
@pytest.mark.parametrize("what", ["data", "tokenizer"])
def test_another_content_at_the_same_place_is_refused(tmp_path, data, described, what):
    """Of a described dataset, and of one of the competition's, which has no description."""
    folder, tokenizer = elsewhere(data, tmp_path / "data")
    if not described:
        (folder / "stats.json").unlink()
    paths = {"DATA_PATH": str(folder), "TOKENIZER_PATH": str(tokenizer)}
    place = Place(tmp_path / "run", data | paths)
    with mock.patch.object(t, "described", lambda _: {"a": "b"}):  # its text is cut anywhere
        with mock.patch.object(t, "check_files", lambda _: None):
            assert place.stop("step:2/6 t") == KEPT + CHECKPOINT
    if what == "data":
        shard = folder / "fineweb_train_000001.bin"
        raw = bytearray(shard.read_bytes())
        raw[1024:1026], raw[1026:1028] = raw[1026:1028], raw[1024:1026]
        shard.write_bytes(raw)
    else:
        tokenizer.write_bytes(tokenizer_model(384, character_coverage=0.98))
    if described:
        describe(folder, tokenizer)
    line = refused(place, RESUME="auto")
    others = ["data", "tokenizer"] if described and what == "tokenizer" else [what]
    assert re.findall(r"(\w+) is '", line) == others


class Explosive:
    """Unpickling one creates a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def flipped(raw: bytes) -> bytes:
    """One bit of what is stored uncompressed, in the middle."""
    return raw[: len(raw) // 2] + bytes([raw[len(raw) // 2] ^ 1]) + raw[len(raw) // 2 + 1 :]


@pytest.mark.parametrize("kind", [CHECKPOINT, TRAINED])
@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda raw: b"", id="empty"),
        pytest.param(lambda raw: raw[:-1], id="cut"),
        pytest.param(lambda raw: raw[: len(raw) // 2], id="half"),
        pytest.param(flipped, id="a bit"),
        pytest.param(lambda raw: bytes(len(raw)), id="zeros"),
        pytest.param(lambda raw: b"\x89PNG" + raw[4:], id="image"),
        pytest.param(lambda raw: pickle.dumps({"weights": {}}), id="pickle"),
    ],
)
def test_damage_is_refused(stopped, kind, damage):
    place = stopped(kind)
    path = place.folder / kind
    path.write_bytes(damage(path.read_bytes()))
    for resume in ("auto", kind):
        line = refused(place, RESUME=resume)
        assert line.startswith(f"train_gpt.py: {kind}: damaged, or not what a run keeps: ")


def change_state(path: Path, change) -> None:
    torch.save(change(torch.load(path, weights_only=True)), path)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda state: [state], "a list"),
        (lambda state: state | {"config": 5}, "no config"),
        (lambda state: state | {"progress": None}, "no progress"),
        (lambda state: {"weights": {}, "hessians": {}}, "it has no system, config"),
        (lambda state: {x: state[x] for x in state if x != "identity"}, "no identity"),
        (lambda state: {x: state[x] for x in state if x != "progress"}, "no figures, checks"),
    ],
    ids="list config progress foreign identity neither".split(),
)
def test_a_foreign_file_is_refused(stopped, change, said):
    place = stopped()
    change_state(place.folder / CHECKPOINT, change)
    line = refused(place, RESUME="auto")
    assert line.startswith(f"train_gpt.py: {CHECKPOINT}: ") and line.endswith(said)


@pytest.mark.parametrize("kind", [CHECKPOINT, TRAINED])
def test_no_file_is_executed(stopped, tmp_path, kind):
    place, exploded = stopped(kind), tmp_path / "exploded"
    for write in (
        lambda path: change_state(path, lambda state: state | {"more": Explosive(exploded)}),
        lambda path: path.write_bytes(pickle.dumps(Explosive(exploded))),
    ):
        write(place.folder / kind)
        assert "not what a run keeps" in refused(place, RESUME="auto")
        assert not exploded.exists()


@pytest.mark.parametrize("name", ["nothing.pt", "logs"])
def test_a_path_without_a_file_is_refused(stopped, name):
    line = refused(stopped(), RESUME=name)
    assert re.fullmatch(rf"train_gpt.py: \[Errno \d+\] .*: '{name}'", line)


@pytest.mark.parametrize("text", ["-1", "abc", "nan", "inf", "1e999", "5s"])
def test_an_interval_that_is_none_is_refused(place, text):
    line = refused(place, CHECKPOINT_EVERY=text)
    assert line == f"train_gpt.py: CHECKPOINT_EVERY='{text}': expected seconds, 0 or more"


def test_a_message_says_that_resume_will_refuse(place):
    """An older file beside the artifact, that is no checkpoint."""
    (place.folder / CHECKPOINT).write_bytes(b"?")
    said = place.stop("warmup_step")
    assert said.startswith("nothing is kept of this run, RESUME=auto is refused: ")
    assert said.split("refused: ")[1] == refused(place, RESUME="auto").split(": ", 1)[1]


# --------------------------------------------------------------------------------------------------
# Ranks


def free_port() -> str:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return str(server.getsockname()[1])


def ranks(place: Place, size: int, at: dict[int, str] | None = None, **env) -> list[int]:
    """Exit statuses of the ranks of a run; at: where SIGTERM arrives, by rank."""
    addresses = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(size)}
    children = []
    for rank in range(size):
        own = place.env | addresses | env | {"RANK": str(rank)}

        def job(rank=rank):
            torch.set_num_threads(1)
            t.world.rank, t.world.size = rank, size
            with signals_at((at or {}).get(rank, ""), signal.SIGTERM):
                return resumable.main([place.script])

        children.append(faults.fork(place.folder, own, job, f"out{rank}.txt"))
    return [faults.wait(child) for child in children]


def test_ranks_save_together_and_go_on(tmp_path, data, whole):
    """Only one of them hears the signal; rank 0 alone writes and speaks."""
    together = Place(tmp_path / "together", data)
    assert ranks(together, 2) == [0, 0]
    place = Place(tmp_path / "run", data)
    # steps are counted where nothing is logged: a micro-batch for each
    assert ranks(place, 2, {1: "call next 4$"}, GRAD_ACCUM_STEPS="2") == [143, 143]
    assert place.lines("checkpoint: ") == [f"checkpoint: {CHECKPOINT} step:2"]
    assert (place.folder / "out0.txt").read_text().endswith(f"SIGTERM: {KEPT}{CHECKPOINT}\n")
    assert (place.folder / "out1.txt").read_text() == ""
    alone = place.copy(tmp_path / "alone")
    assert ranks(place, 2, {0: "call next 4$"}, RESUME="auto") == [143, 143]
    assert place.lines("checkpoint: ")[-1] == f"checkpoint: {CHECKPOINT} step:4"
    assert ranks(place, 2, {1: "train.hessians"}, RESUME="auto") == [143, 143]
    assert (place.folder / "out0.txt").read_text().endswith(f"SIGTERM: {KEPT}{TRAINED}\n")
    assert ranks(place, 2, RESUME="auto") == [0, 0]
    assert place.made() == together.made()
    # on one rank, from the momentum of two: as far from one that was always alone
    alone.finish(RESUME="auto")
    assert alone.lines("resumed: ")
    ours, theirs = (packed.read_state(x.folder / TRAINED)["weights"] for x in (alone, whole()))
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=2e-3, atol=2e-4)
