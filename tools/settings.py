"""What run.sh must know before it starts anything, as assignments for its `eval`.

    python tools/settings.py           # of a run
    python tools/settings.py check     # of ./run.sh check, which says what is wrong with a GPU

Reads SYSTEM, NPROC, RUN_ID, PRESET and all hyperparameters from the environment. One that is wrong
gives one line, which names it, and exit status 1. A variable that looks like a setting and is none
gives a warning on stderr.
"""

import hashlib
import importlib
import os
import re
import shlex
import signal
import sys
import uuid
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "systems"), str(ROOT / "tools")]
import misnamed  # noqa: E402  (the paths come first)
import variables  # noqa: E402


def find_script(env) -> Path:
    """Of the record, or of SYSTEM. Raises: ValueError."""
    system = env.get("SYSTEM")
    if not system:
        return Path("train_gpt.py")
    names = [name for name in variables.systems() if name != "record"]
    if system not in names:
        expected = f"expected one of {', '.join(names)}, or nothing for the record"
        raise ValueError(f"SYSTEM={system!r}: {expected}")
    return Path("systems") / f"{system}.py"


def find_run_id(env) -> str:
    """The name of the run's log. Raises: ValueError."""
    run_id = env.get("RUN_ID") or str(uuid.uuid4())
    if not re.fullmatch(r"\w[\w.=+-]{0,99}", run_id):
        expected = "expected a file name of at most 100 letters, digits, and . _ - + ="
        raise ValueError(f"RUN_ID={run_id!r}: {expected}")
    return run_id


def count_gpus(for_check: bool) -> int:
    """GPUs that torch can use. Raises: ValueError if there are others."""
    import torch

    usable = torch.cuda.is_available()
    if torch.cuda.device_count() and not usable and not for_check:
        raise ValueError("torch cannot use the GPUs that are here: ./run.sh check says why")
    return torch.cuda.device_count() if usable else 0


def choose_ranks(env, gpus: int, hp) -> int:
    """NPROC; or 8, 4, 2 or 1 GPUs, or two processes on a CPU. Raises: ValueError."""
    text = env.get("NPROC")
    if not text:
        return most_ranks(gpus, hp)
    if not re.fullmatch("[1-9][0-9]{0,3}", text):
        raise ValueError(f"NPROC={text!r}: expected a number of processes, 1 or more")
    if gpus and int(text) > gpus:
        raise ValueError(f"NPROC={text!r}: expected at most {gpus}, a process for each GPU")
    return int(text)


def most_ranks(gpus: int, hp) -> int:
    """Without NPROC. Raises: ValueError if not even one takes the batch."""
    if gpus:  # the demo's batch is too small for several
        return max(n for n in (1, 2, 4, 8) if n <= gpus and (n == 1 or hp.preset != "demo"))
    # faster than one process with as many threads as both: most operators of the demo are small
    return 2 if hp.eval_only or shares_batch(hp, 2) else 1


def shares_batch(hp, ranks: int) -> bool:
    try:
        check_batch(hp, ranks)
    except ValueError:
        return False
    return True


def count_threads(gpus: int, ranks: int) -> int:
    """Of each rank."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return 1 if gpus else max(1, cores // ranks)


def read_settings(env, for_check: bool = False) -> dict[str, str]:
    """Of variables of the shell; those in capitals are for the environment. Raises: ValueError."""
    script, run_id, gpus = find_script(env), find_run_id(env), count_gpus(for_check)
    preset = env.get("PRESET") or ("record" if gpus else "demo")
    module = importlib.import_module(script.stem)
    env = dict(env) | dict(PRESET=preset)
    if env.get("RESUME") and not env.get("RUN_ID"):  # the log of the run goes on
        import resumable

        run_id = resumable.run_id_of(env, module) or run_id
    hp = module.Hyperparameters.from_env(env | dict(RUN_ID=run_id))
    nproc = choose_ranks(env, gpus, hp)
    if not hp.eval_only:
        check_batch(hp, nproc)
    variant = hp.data_path.rpartition("_")[2]
    return dict(
        PRESET=preset,
        RUN_ID=run_id,
        script=str(script),
        gpus=str(gpus),
        nproc=str(nproc),
        threads=str(count_threads(gpus, nproc)),
        dataset=hp.data_path,
        tokenizer=hp.tokenizer_path,
        artifact=hp.artifact,
        source="--demo" if preset == "demo" else f"--variant={variant}",
        text=hash_demo_text() if preset == "demo" else "",
    )


def hash_demo_text() -> str:
    """What stats.json has as the `text_sha256` of a dataset of this text. Raises: OSError."""
    return hashlib.sha256((ROOT / "data" / "demo.jsonl.zst").read_bytes()).hexdigest()


def check_batch(hp, nproc: int) -> None:
    """Raises: ValueError if the ranks cannot share it evenly."""
    from train_gpt import world

    before, world.size = world.size, nproc
    try:
        hp.micro_steps()
    except ValueError as error:
        raise ValueError(f"NPROC={nproc}: {error}" if nproc > 1 else str(error)) from None
    finally:
        world.size = before


def main(argv: list[str] | None = None) -> int | str:
    try:
        settings = read_settings(os.environ, (argv or sys.argv[1:]) == ["check"])
        warnings = list(misnamed.warnings(os.environ, ROOT / settings["script"]))
    except (OSError, ValueError) as error:
        return f"run.sh: {error}"
    for line in warnings:
        print(f"run.sh: warning: {line}", file=sys.stderr)
    for name, value in settings.items():
        print(f"{'export ' * name.isupper()}{name}={shlex.quote(value)}")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ctrl-C: run.sh says so
    sys.exit(main())
