"""train_gpt.py and the systems, as they are or with a bug, run in this process: most of the time of
a new one is the import of torch."""

import ast
import contextlib
import functools
import io
import itertools
import logging
import os
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from corpus import write_corpus

ROOT = Path(__file__).resolve().parent.parent
SERIAL = itertools.count()
SMALL = dict(
    setting.split("=", 1)
    for setting in (
        "MODEL_DIM=32 MLP_MULT=2 GDN_HEADS=2 GDN_KEY_HEADS=1 GDN_HEAD_DIM=16 NUM_HEADS=2 "
        "NUM_KV_HEADS=1 HEAD_DIM=16 WINDOW_SIZE=40 NGRAM_VOCAB_SIZE=256 NGRAM_DIM=16 "
        "PARALLEL_START_LAYER=0 "
        "TRAIN_SEQ_LEN=64 TRAIN_BATCH_TOKENS=512 GRAD_ACCUM_STEPS=1 ITERATIONS=40 WARMUP_STEPS=1 "
        "MAX_WALLCLOCK_SECONDS=0 GPTQ_RESERVE_SECONDS=0 GPTQ_CALIBRATION_BATCHES=8 EMBED_BITS=8 "
        "ARTIFACT_TARGET_BYTES=0 EMA_DECAY=0.95 "
        "TTT_CHUNK_TOKENS=64 TTT_PHASES=1 TTT_LORA_LR=0.003 TTT_LORA_RANK=8 TTT_LORA_ALPHA=16 "
        "EVAL_MODE=sliding EVAL_SEQ_LEN=64 EVAL_STRIDE=32 EVAL_CHUNK=32 EVAL_ROWS=8 TTT= "
        "VAL_BATCH_SIZE=256 RUN_ID=run SCORES=scores.npz ARTIFACT=model.ptz"
    ).split()
)
LAYOUTS = {
    "train_gpt": "G S",
    "kv_share": "G2",
    "transformer": "A (A)x2 A",
    "hybrid_1895": "G A (A)x2",
}
MODULES = "parts", "layers", "layouts"  # that systems share
SHARED = [f"systems/{name}.py" for name in MODULES]


def planted(folder: Path, system: str, *edits: tuple[str, str]) -> Path:
    """A copy of the program in the folder, with each text replaced, which must be there once: in
    train_gpt.py, the system's file, or what systems share. Returns the script."""
    names = ["train_gpt.py", *SHARED, f"systems/{system}.py"]
    names = names[:1] if system == "train_gpt" else names
    sources = {name: (ROOT / name).read_text("utf-8") for name in names}
    for old, new in edits:
        count = sum(source.count(old) for source in sources.values())
        assert count == 1, f"the place of the bug is not there once but {count} times: {old!r}"
        sources = {name: source.replace(old, new) for name, source in sources.items()}
    for name, source in sources.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(source, "utf-8")
    return folder / names[-1]


def load(path: Path, name: str) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__file__, sys.modules[name] = str(path), module
    # custom ops are registered by name, for the whole process
    source = path.read_text("utf-8").replace('"train_gpt::', f'"{name}::')
    exec(compile(source, path, "exec"), vars(module))
    return module


@functools.cache
def modules_of(script: Path) -> tuple[types.ModuleType, types.ModuleType]:
    """train_gpt.py and this script, which may be the same, as modules of their own, on the CPU."""
    name, folder = f"program_{next(SERIAL)}", script.parent
    is_system = folder.name == "systems"
    path = folder.parent / "train_gpt.py" if is_system else script
    known = {key: sys.modules.pop(key, None) for key in ("train_gpt", *MODULES)}
    with mock.patch.object(sys, "path", [str(folder), *sys.path]):
        base = sys.modules["train_gpt"] = load(path, name)
        base.world.device, base.world.dtype = torch.device("cpu"), torch.float32
        top = load(script, f"{name}_system") if is_system else base
    # the program looks among the modules for the files that it is made of
    for part in MODULES:
        sys.modules[f"{name}_{part}"] = sys.modules.pop(part, base)
    sys.modules.update({key: module for key, module in known.items() if module})
    return base, top


@functools.cache
def main_of(script: Path) -> Callable[[], None]:
    """What this script does when it is started."""
    _, top = modules_of(script)
    start = ast.parse(script.read_text("utf-8")).body[-1]
    assert ast.unparse(start.test) == "__name__ == '__main__'"
    return functools.partial(exec, compile(ast.Module(start.body, []), script, "exec"), vars(top))


def run(script: Path, folder: Path, env: dict[str, str]) -> SimpleNamespace:
    """The program in this folder, in this environment and no other: returncode, stdout, stderr."""
    out, error, here = io.StringIO(), "", os.getcwd()
    os.chdir(folder)
    try:
        with mock.patch.dict(os.environ, env, clear=True), contextlib.redirect_stdout(out):
            main_of(script.resolve())()
    except Exception as failure:
        error = f"{type(failure).__name__}: {failure}"
    finally:
        os.chdir(here)
        logging.getLogger("train_gpt").handlers.clear()
    return SimpleNamespace(returncode=int(bool(error)), stdout=out.getvalue(), stderr=error)


def launch(job, folder: Path, env: dict[str, str], nproc: int) -> SimpleNamespace:
    """In place of the one of tools/verify.py."""
    assert nproc == 1
    start = time.perf_counter()
    result = run(job.script, folder, env)
    return SimpleNamespace(seconds=time.perf_counter() - start, **vars(result))


def train(folder: Path, script: Path, **settings) -> None:
    """A finished run in the folder: artifact, sample, score file, log; without DATA_PATH on a
    corpus that it writes into folder/data."""
    if "data_path" not in settings:
        (folder / "data").mkdir()
        settings |= write_corpus(folder / "data", train_tokens=12_000, val_tokens=1_500)
    env = SMALL | {"LAYOUT": LAYOUTS[script.stem]}
    env |= {name.upper(): str(value) for name, value in settings.items()}
    result = run(script, folder, env)
    assert result.returncode == 0, result.stderr
