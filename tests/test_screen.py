"""tools/screen.py: what a run prints, for a person."""

import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from fcntl import ioctl

import pytest
from in_process import ROOT

sys.path.insert(0, str(ROOT / "tools"))

import screen  # noqa: E402  (the path comes first)

SETTINGS = """logs/run.txt world_size:1 device:cpu dtype:torch.float32
  layout: G2 S
  train_batch_tokens: 2048
  iterations: 300
  max_wallclock_seconds: {clock}
  gptq_reserve_seconds: 10.0
"""
PROGRAM = [sys.executable, str(ROOT / "tools" / "screen.py")]
TRAINING = "step:30/300 train_loss:4.5678 train_time:20000ms step_avg:666.67ms"
SCORING = "targets:1500/6000 time:3s"


def stage_of(line: str, clock: float = 0.0) -> str:
    reader = screen.Reader()
    for setting in SETTINGS.format(clock=clock).splitlines():
        assert reader.stage(setting) is None
    return str(reader.stage(line))


@pytest.mark.parametrize(
    "line, clock, text",
    [
        (TRAINING, 0.0, "training 10%: step 30, loss 4.5678, 3,072 tokens/s, 03:00 left"),
        (TRAINING, 50.0, "training 50%: step 30, loss 4.5678, 3,072 tokens/s, 00:20 left"),
        (TRAINING, 610.0, "training 10%: step 30, loss 4.5678, 3,072 tokens/s, 03:00 left"),
        (SCORING, 0.0, "scoring 25%: 500 tokens/s, 00:09 left"),
        ("pack: rounding_step:0.02 bytes_total:15969000 target:15970000", 0.0, "None"),
        ("targets:0/6000 time:15s", 0.0, "scoring 0%: 0 tokens/s, 00:00 left"),
        ("step:0/300 val_loss:6.9 val_bpb:4.1 train_time:0ms step_avg:0.00ms", 0.0, "None"),
        ("targets:3/0 time:0s", 0.0, "None"),
        ("audit: once passed {}", 0.0, "None"),
    ],
)
def test_a_line_says_how_far_it_is(line, clock, text):
    assert stage_of(line, clock) == text


def test_nothing_is_said_of_training_before_its_settings():
    assert screen.Reader().stage(TRAINING) is None


def test_of_the_demo_it_says_how_long_the_run_takes():
    reader = screen.Reader()
    for line in ["  system: record", "  preset: demo", *SETTINGS.format(clock=0.0).splitlines()]:
        assert reader.stage(line) is None and reader.forecast(line) is None
    step = "step:{}/300 train_loss:4.5678 train_time:6000ms step_avg:600.00ms"
    assert reader.forecast(step.format(9)) is None
    told = f"{(300 + screen.REST) * 0.6 / 60:.0f} min"
    assert (
        reader.forecast(step.format(10))
        == f"screen: the run takes about {told} here, with all checks"
    )
    reader.stage("  system: crawler")
    assert reader.forecast(step.format(10)) is None


def test_between_lines_it_goes_on_but_does_not_arrive():
    stage = screen.Stage("scoring", 0.25, 3.0, "", "")
    assert str(stage.at(3.0)) == "scoring 50%: 00:06 left"
    assert str(stage.at(600.0)) == "scoring 100%: 00:01 left"


def test_in_a_file_all_lines_stay_and_some_are_added(monkeypatch, capsys):
    clock = iter([0.0, 5.0, 31.0, 31.0, 40.0])  # of the start, of each stage, of what was added
    monkeypatch.setattr(screen.time, "monotonic", lambda: next(clock))
    file, stage = screen.File(sys.stdout), screen.Stage("scoring", 0.5, 3.0, "", "")
    for text, found in ("a", stage), ("b", None), ("c", stage), ("d", stage):
        file.line(text, found)
    assert capsys.readouterr().out == f"a\nb\nc\n{stage}\nd\n"


def test_a_file_gets_what_was_printed():
    text = SETTINGS.format(clock=0.0) + f"{TRAINING}\nmore ä\n\n{SCORING}\nno end"
    figures = 'figures: {"val_bpb": 1.5}\n'  # these are in the log
    run = subprocess.run(PROGRAM, input=(figures + text).encode(), capture_output=True)
    assert run.stdout.decode() == text + "\n" and not run.stderr and run.returncode == 0


def on_a_terminal(text: str, columns: int) -> list[str]:
    """The lines that are seen at the end."""
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen(PROGRAM, stdin=subprocess.PIPE, stdout=theirs, stderr=theirs)
    os.close(theirs)
    process.stdin.write(text.encode())
    process.stdin.close()
    seen = b""
    try:
        while new := os.read(ours, 1 << 16):
            seen += new
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    assert process.wait() == 0
    return re.split(r"\r\n", seen.decode())


def after_returns(line: str) -> str:
    """What a terminal shows of a line with carriage returns."""
    shown = ""
    for part in line.split("\r"):
        shown = part + shown[len(part) :]
    return shown.rstrip()


def test_on_a_terminal_steps_are_one_line_that_is_gone_in_the_end():
    steps = [TRAINING.replace(":30/", f":{n}/") for n in (30, 60, 90)]
    text = SETTINGS.format(clock=0.0) + "\n".join([*steps, "an end", SCORING, "the end"]) + "\n"
    lines = on_a_terminal(text, 80)
    shown = [after_returns(line) for line in lines]
    settings = SETTINGS.format(clock=0.0).splitlines()
    assert [line for line in shown if line] == [*settings, "an end", "the end"]
    written = [part for line in lines for part in line.split("\r") if "training" in part]
    assert written[0].startswith("training 10%: step 30") and "step 90" in written[-1]
    assert all(len(part) <= 80 for part in written)


def test_a_line_that_is_too_wide_is_broken_between_words():
    text = "verify: data passed 2 shards, as described\n"
    text += "  indented: a path/that-is/too-wide_for/it b\n"
    assert [after_returns(line) for line in on_a_terminal(text, 24)][:-1] == [
        "verify: data passed 2",
        "    shards, as described",
        "  indented: a",
        "      path/that-is/too-wide_for/it",
        "      b",
    ]


def test_a_line_that_fits_stays_and_so_does_one_of_unknown_width():
    fits = "a  line of 24 columns , "
    assert screen.folded(fits, 24) == fits and len(fits) == 24
    (line, _) = on_a_terminal("word " * 60 + "\n", 0)
    assert after_returns(line) == ("word " * 60).strip()


def test_a_narrow_terminal_cuts_the_line():
    lines = on_a_terminal(SETTINGS.format(clock=0.0) + TRAINING + "\nthe end\n", 30)
    written = [part for line in lines for part in line.split("\r") if "training" in part]
    assert written and all(len(part) <= 30 for part in written)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_it_ends_with_the_run_not_by_a_signal(number):
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen(PROGRAM, **pipes) as process:
        print("first", file=process.stdin, flush=True)
        assert process.stdout.readline() == "first\n"
        process.send_signal(number)
        print("last", file=process.stdin, flush=True)
        assert process.stdout.readline() == "last\n"
        process.stdin.close()
    assert process.returncode == 0


def test_a_terminal_that_knows_no_umlaut_gets_the_line():
    env = dict(os.environ, PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    run = subprocess.run(PROGRAM, input="größe\n".encode(), capture_output=True, env=env)
    assert (run.returncode, run.stdout, run.stderr) == (0, b"gr\\xf6\\xdfe\n", b"")


def test_a_fault_of_its_own_ends_no_run():
    """It reads on, so that whoever writes does not meet a closed pipe."""
    source = "import screen; screen.Reader.stage = lambda *_: 1 / 0; screen.main()"
    command = [sys.executable, "-c", source]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with subprocess.Popen(command, cwd=ROOT / "tools", **pipes) as process:
        for _ in range(40):
            process.stdin.write(b"line\n" * 10_000)
            process.stdin.flush()
        process.stdin.close()
        error = process.stderr.read()
    assert process.returncode == 0
    assert error.startswith(b"screen: ZeroDivisionError") and error.count(b"\n") == 1


def test_the_run_goes_on_when_nobody_reads():
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with subprocess.Popen(PROGRAM, **pipes) as process:
        process.stdout.close()
        for _ in range(40):
            process.stdin.write(b"line\n" * 10_000)
            process.stdin.flush()
            time.sleep(0.001)
        process.stdin.close()
        assert not process.stderr.read()
    assert process.returncode == 0
