"""Starts a run that keeps checkpoints, or goes on from one.

    CHECKPOINT_EVERY=60 python tools/resumable.py train_gpt.py     # or systems/NAME.py
    RESUME=auto torchrun --standalone --nproc_per_node=8 tools/resumable.py train_gpt.py

ARTIFACT.checkpoint.pt holds all that later steps depend on, as data: reading it executes nothing.
It is written whole every CHECKPOINT_EVERY seconds (0 or unset: only then) and when SIGTERM, a
hang-up or ctrl-C ends the training; a run that ends behind its training has kept
ARTIFACT.trained.pt instead. RESUME=auto goes on from the later of the two, and starts anew if there
is none or its run has come to its end; RESUME=path goes on from this one. Settings, program,
tokenizer and data must be those of the run that wrote it; the number of ranks may be another. A run
that went on says `resumed:` in its log, which is that of the first part, and in its figures. The
clock goes on where it stood; to write checkpoints takes time from the training. One that cannot be
written, as on a full disk, does not end the run; nor does a log, whose lines are still shown.
Another file that cannot be read or written ends it with one line.
"""

import argparse
import contextlib
import functools
import hashlib
import logging
import math
import os
import re
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent))
import packed  # noqa: E402  (the path comes first)
import repack  # noqa: E402

import logs  # noqa: E402

SIGNALS = signal.SIGTERM, signal.SIGHUP, signal.SIGINT


def identity(t, hp) -> dict[str, str]:
    """What must be the same in a run that goes on, besides its settings, by its hashes."""
    folder, parts = Path(hp.data_path), {}
    parts["source"] = [path.read_bytes() for path in t.code_files()]
    parts["tokenizer"] = [Path(hp.tokenizer_path).read_bytes()]
    # stats.json has the hashes of all shards; without it their sizes and beginnings must do
    about = [path.read_bytes() for path in [folder / "stats.json"] if path.is_file()]
    parts["data"] = about + [beginning(path) for path in sorted(folder.glob("fineweb_*.bin"))]
    return {name: hashlib.sha256(b"".join(part)).hexdigest()[:16] for name, part in parts.items()}


def beginning(path: Path) -> bytes:
    """Of a file: name, size, and the first 64 kB."""
    with open(path, "rb") as file:
        return f"{path.name} {path.stat().st_size} ".encode() + file.read(1 << 16)


def gathered(t, buffer: torch.Tensor, count: int) -> torch.Tensor:
    """Of all ranks: the momentum of a stack of so many matrices."""
    if t.world.size == 1:
        return buffer[:count]
    parts = buffer.new_empty(len(buffer) * t.world.size, *buffer.shape[1:])
    dist.all_gather_single(parts, buffer)
    return parts[:count]


def own_share(t, buffer: torch.Tensor, whole: torch.Tensor) -> None:
    """The other way: fills this rank's momentum."""
    share = whole[t.world.rank * len(buffer) :][: len(buffer)]
    buffer.zero_()
    buffer[: len(share)] = share


class Keeper:
    """Between the steps of a run: writes checkpoints, and restores the one to go on from."""

    def __init__(self, t, hp, source: Path | None, state: dict, every: float):
        """source, state: what to go on from, if anything; every: seconds, 0 = only on a signal."""
        self.t, self.hp, self.source, self.state, self.every = t, hp, source, state, every
        self.path, self.last = f"{hp.artifact}.checkpoint.pt", 0.0
        self.signal, self.training = 0, False

    def on_signal(self, number: int, _frame) -> None:
        self.signal = number
        if not self.training:
            self.end(number)

    def end(self, number: int) -> None:
        """Says what RESUME=auto would do now, if anybody still listens."""
        for other in SIGNALS:  # one is enough
            signal.signal(other, signal.SIG_IGN)
        if self.t.world.rank == 0:
            name, text = signal.Signals(number).name, self.what_next()
            with contextlib.suppress(OSError):
                print(f"{name}: {text}", file=sys.stderr, flush=True)
        sys.exit(128 + number)

    def what_next(self) -> str:
        try:
            path, _ = find_state(self.t, self.hp, "auto")
        except (OSError, ValueError) as error:
            return f"nothing is kept of this run, RESUME=auto is refused: {error}"
        if path:
            return f"RESUME=auto goes on from {path}"
        source = f", RESUME={self.source} goes on from there" if self.source else ""
        return f"nothing is kept of this run, RESUME=auto starts anew{source}"

    def told(self, due: bool = False) -> tuple[bool, int]:
        """Whether a checkpoint is due, and a signal: what one rank was told, all are."""
        told = torch.tensor([float(due), float(self.signal)])
        due, number = self.t.world.all_reduce(told, dist.ReduceOp.MAX).tolist()
        return bool(due), int(number)

    def between_steps(self, step: int, tokens: int, start: float, *objects) -> tuple:
        """In place of the function of that name."""
        if not self.training:  # the first time: what was compiled before is no time between two
            self.training, self.last = True, time.perf_counter()
        if self.state:
            step, tokens, seconds = self.restore(self.state, *objects)
            self.t.log.info(f"resumed: {self.source} step:{step} train_time:{1000 * seconds:.0f}ms")
            self.state, start = {}, time.perf_counter() - seconds
        due, number = self.told(0 < self.every <= time.perf_counter() - self.last)
        if due or number:
            seconds = time.perf_counter() - start
            self.save(dict(step=step, tokens=tokens, seconds=seconds), *objects)
            self.last = time.perf_counter()
        if number:
            self.told()  # when rank 0 has written: launchers hurry ranks of which one has ended
            self.end(number)
        return step, tokens, start

    def save(self, progress: dict, model, optimizer, average, loader) -> None:
        progress |= dict(position=loader.position, lr_multiplier=optimizer.lr_multiplier)
        momentum = [
            gathered(self.t, buffer, len(optimizer.stacks[shape]))
            for shape, buffer in optimizer.momentum.items()
        ]
        random = [torch.get_rng_state()]
        random += [torch.cuda.get_rng_state()] if self.t.world.on_cuda else []
        more = dict(average=average, adamw=optimizer.adamw.state_dict(), momentum=momentum)
        more |= dict(random=random, progress=progress, hessians={})
        if self.t.save_state(self.path, self.hp, model, **more):
            self.t.log.info(f"checkpoint: {self.path} step:{progress['step']}")

    def keep(self, save_state, path: str, *args, **more) -> bool:
        """Whether it could be written: without it a run goes on all the same."""
        try:
            save_state(path, *args, **more)
        except (OSError, RuntimeError) as error:  # torch.save hides the one behind the other
            Path(f"{path}.tmp").unlink(missing_ok=True)
            reason = error if isinstance(error, OSError) else error.__context__ or error
            self.t.log.info(f"checkpoint: {path} is not written: {reason}")
            return False
        return True

    def restore(self, state: dict, model, optimizer, average, loader) -> tuple[int, int, float]:
        repack.restore(model, state["weights"], self.source)
        for ours, theirs in zip(average, state["average"], strict=True):
            ours.copy_(theirs)
        optimizer.adamw.load_state_dict(state["adamw"])
        for buffer, whole in zip(optimizer.momentum.values(), state["momentum"], strict=True):
            own_share(self.t, buffer, whole.to(buffer.device))
        torch.set_rng_state(state["random"][0])
        if self.t.world.on_cuda and len(state["random"]) > 1:  # written on a GPU as well
            torch.cuda.set_rng_state(state["random"][1])
        progress = state["progress"]
        optimizer.lr_multiplier = progress["lr_multiplier"]
        loader.position = progress["position"]
        return progress["step"], progress["tokens"], progress["seconds"]

    def attach(self) -> None:
        """Puts itself between the steps, around the training, and before the packing."""
        t, train, pack, save_state = self.t, self.t.train, self.t.pack, self.t.save_state

        def trained(*args):
            known = identity(t, self.hp)  # of the source as it was started
            t.save_state = functools.partial(self.keep, save_state, identity=known)
            hessians, figures = train(*args)
            return hessians, figures | (dict(resumed=True) if self.source else {})

        def packed_or_ended(*args):
            self.training = False  # and what was trained is kept
            if number := self.told()[1]:
                self.end(number)
            return pack(*args)

        t.between_steps, t.train, t.pack = self.between_steps, trained, packed_or_ended
        self.catch_signals()

    def catch_signals(self) -> None:
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # as by nohup
                signal.signal(number, self.on_signal)


def kept_state(path: Path) -> dict:
    """Of whatever run. Raises: OSError, ValueError naming the file."""
    state = packed.read_state(path, "system", "config")
    kinds = ["progress", "identity"] if "progress" in state else ["figures", "checks"]
    if other := [name for name in ("config", *kinds) if not isinstance(state.get(name), dict)]:
        raise ValueError(f"{path}: not what a run keeps: no {', '.join(other)}")
    return state


def check_state(path: Path, state: dict, t, hp) -> None:
    """Raises: OSError, ValueError naming the file and each difference to this run."""
    known = {"system": hp.system, **asdict(hp)}
    known |= identity(t, hp) if "identity" in state else {}
    told = {"system": state["system"], **state["config"], **state.get("identity", {})}
    others = [
        f"{name} is {known.get(name)!r}, there {told.get(name)!r}"
        for name in sorted(known.keys() | told.keys())
        if name not in t.OF_A_PROCESS and known.get(name) != told.get(name)
    ]
    if others:
        raise ValueError(f"{path}: of another run: {'; '.join(others)}")


def kept_beside(artifact: str) -> list[Path]:
    """What may be gone on from, the latest last."""
    paths = [Path(f"{artifact}.{kind}.pt") for kind in ("checkpoint", "trained")]
    return sorted(filter(Path.is_file, paths), key=lambda path: path.stat().st_mtime)


def has_ended(state: dict) -> bool:
    """Whether a run has come from here to its end: some log has figures with those of its training.
    A checkpoint has none: no run with this artifact has since come through its training."""
    ours = state.get("figures")
    texts = [path.read_text("utf-8", errors="replace") for path in Path("logs").glob("*.txt")]
    lines = [line for text in texts for line in re.findall(r"^figures: .*", text, re.M)]
    return bool(ours) and any(told | ours == told for told in map(figures_in, lines))


def figures_in(line: str) -> dict:
    try:
        return logs.as_figures(line) or {}
    except ValueError:  # of another program
        return {}


def find_state(t, hp, resume: str) -> tuple[Path | None, dict]:
    """The file that RESUME tells to go on from, and its content. Raises: OSError, ValueError naming
    the file."""
    paths = kept_beside(hp.artifact)[-1:] if resume == "auto" else [Path(resume)] * bool(resume)
    for path in paths if not hp.eval_only else []:
        state = kept_state(path)
        if resume != "auto" or not has_ended(state):
            check_state(path, state, t, hp)
            return path, state
    return None, {}


def run_id_of(env, module) -> str:
    """Of the run that goes on, or "". Raises: OSError, ValueError naming the file."""
    hp = module.Hyperparameters.from_env(env)
    _, state = find_state(repack.t, hp, env.get("RESUME", ""))
    return state["config"]["run_id"] if state else ""


def seconds_between(env) -> float:
    """Raises: ValueError naming CHECKPOINT_EVERY."""
    text = env.get("CHECKPOINT_EVERY") or "0"
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < math.inf:
        raise ValueError(f"CHECKPOINT_EVERY={text!r}: expected seconds, 0 or more")
    return seconds


def keeper_of(module, t, env) -> Keeper:
    """Of the run that the environment describes; names its log there. Every rank finds the same.
    Raises: OSError, ValueError naming what is wrong."""
    every, hp = seconds_between(env), module.Hyperparameters.from_env(env)
    path, state = find_state(t, hp, env.get("RESUME", ""))
    if "RUN_ID" not in env:  # the log goes on
        env["RUN_ID"] = hp.run_id = state["config"]["run_id"] if state else hp.run_id
    return Keeper(t, hp, path, state, every)


def write_by_name(write_whole, path, write) -> None:
    """A write that fails leaves no part of the file; its error names the file, as others do."""
    try:
        write_whole(path, write)
    except OSError as error:
        error.filename = error.filename or str(path)
        Path(f"{path}.tmp").unlink(missing_ok=True)
        raise


def tell_once(handler: logging.Handler, _record) -> None:
    """In place of a traceback for each line that a log does not take."""
    if not hasattr(handler, "told"):
        handler.told, name = True, os.path.relpath(getattr(handler, "baseFilename", "stdout"))
        print(f"{name}: {sys.exc_info()[1]}: lines will be missing there", file=sys.stderr)


def run(module, keeper: Keeper) -> None:
    """module: of the script. Raises: OSError naming the file."""
    t, hp = keeper.t, keeper.hp
    t.write_whole = functools.partial(write_by_name, t.write_whole)
    logging.Handler.handleError = tell_once
    if hp.eval_only or not keeper.state or "progress" in keeper.state:
        keeper.attach()
        t.main(module.Hyperparameters, module.GPT, getattr(module, "Validation", t.Validation))
    else:
        keeper.catch_signals()
        if t.world.on_cuda:
            torch.cuda.set_device(t.world.device)
        if t.world.size > 1:
            dist.init_process_group("cpu:gloo,cuda:nccl" if t.world.on_cuda else "gloo")
        repack.repack(keeper.source, Path(hp.artifact), module, run_id=hp.run_id, resumed=True)
        if t.world.size > 1:
            dist.destroy_process_group()


def main(argv: list[str] | None = None) -> int | str:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("script", type=Path)
    args = parser.parse_args(argv)
    try:
        module = repack.module_of(args.script)
        keeper = keeper_of(module, repack.t, os.environ)
    except (OSError, ValueError) as error:
        return f"{args.script.name}: {error}" if repack.t.world.rank == 0 else 1
    try:
        run(module, keeper)
    except OSError as error:
        return f"{args.script.name}: {error}"
    return 0


if __name__ == "__main__":
    sys.exit(main())
