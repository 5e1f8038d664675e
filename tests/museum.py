"""What the tests of the museum share: a bug, programs with one planted, data with one in it.

Each bug is planted alone in a copy of the program, which runs in this process, and must be caught
by name: by a check of the run's own audit, by one of tools/verify.py, by an error, or by a function
of the tests that compares with something that the program did not compute. tests/README.md says
where each bug was and what it was worth.
"""

import contextlib
import functools
import io
import json
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple
from unittest import mock

import brotli
import in_process
import pytest
import torch
from conftest import ROOT, TINY
from corpus import (
    BOS,
    DOCUMENTS,
    NORMAL,
    document_ids,
    edit_pieces,
    load,
    prose,
    tokenizer_model,
    write_corpus,
    write_shard,
)
from toys import OWN

sys.path[:0] = [str(ROOT / "data"), str(ROOT / "tools")]

import prepare  # noqa: E402  (the paths come first)
import verify  # noqa: E402

RECORD = "tools/record.py"
SETTINGS = TINY | OWN | dict(run_id="run", artifact="model.ptz", scores="scores.npz")
SETTINGS |= dict(iterations=4, train_batch_tokens=128, muon_backend_steps=1, val_batch_size=1024)
LAYOUTS = {
    "train_gpt": dict(layout="G S"),
    "layouts": dict(layout="G S"),  # the record's blocks, shared or in a loop
    "gdn_hybrid": dict(layout="G S"),
    "kv_share": dict(layout="G2"),
    "pure_gdn": dict(layout="G S"),
    "crawler": dict(layout="A (A G)x2 A"),
    "transformer": dict(layout="A (A)x2 A", parallel_start_layer=2),
}
# as brotli, but fast: no bug is in how well it compresses
FAST = SimpleNamespace(
    compress=lambda data, quality, lgwin: brotli.compress(data, quality=1),
    Decompressor=brotli.Decompressor,
)


# --------------------------------------------------------------------------------------------------
# Programs and their runs


class OwnModules:
    """sys, but with the modules of one folder only: the program looks through all for its files,
    which would take longer with each program that is loaded."""

    def __init__(self, folder: Path):
        own = f"{folder.resolve()}/"
        every = [(name, str(getattr(x, "__file__", ""))) for name, x in sys.modules.items()]
        self.modules = {name: sys.modules[name] for name, file in every if file.startswith(own)}

    def __getattr__(self, name: str):
        return getattr(sys, name)


class Program(NamedTuple):
    """A copy of the program, loaded: train_gpt.py, the system's file, tools/record.py."""

    folder: Path
    script: Path
    core: ModuleType
    system: ModuleType
    record: ModuleType


def plant(folder: Path, system: str = "train_gpt", *edits: tuple[str, str]) -> Program:
    """With each text replaced, which must be there once, in all files together; seeds torch."""
    torch.manual_seed(0)
    tool = (ROOT / RECORD).read_text("utf-8")
    in_tool = [edit for edit in edits if edit[0] in tool]
    for old, new in in_tool:
        assert tool.count(old) == 1, f"not once but {tool.count(old)} times in {RECORD}: {old!r}"
        tool = tool.replace(old, new)
    rest = [edit for edit in edits if edit not in in_tool]
    script = in_process.planted(folder, system, *rest).resolve()
    (folder / "tools").mkdir()
    (folder / RECORD).write_text(tool, "utf-8")
    core, top = in_process.modules_of(script)
    record = in_process.load(folder / RECORD, f"{core.__name__}_record")
    core.brotli, core.sys = FAST, OwnModules(folder)
    for name in core.sys.modules:
        del sys.modules[name]
    return Program(folder, script, core, top, record)


class Stopped(Exception):
    """A run that ended with an error, other than that its audit failed."""


class Verified(NamedTuple):
    passed: bool
    figures: str


def not_run(job) -> None:
    raise ValueError("not run")


# what has to be run for a check of tools/verify.py; the others look at files
WITH = {name: {"check_run"} for name in ("run", *verify.PROBES)}
WITH["reproduced"] = {"check_run", "check_reproduced"}


class Run:
    """A whole run of a tiny model in this folder; checks: what its audit says, by name; stderr: the
    error it ended with. Raises: Stopped."""

    def __init__(self, p: Program, folder: Path, corpus: Callable | None = None, **settings):
        self.program, self.folder = p, folder
        (folder / "data").mkdir(parents=True)
        known = SETTINGS | LAYOUTS[p.script.stem]
        self.settings = known | (corpus or small)(folder / "data") | settings
        self.stderr = start(p, folder, **self.settings)
        if self.stderr and not self.stderr.startswith("Refused: audit failed: "):
            raise Stopped(self.stderr)
        self.log = (folder / "logs" / "run.txt").read_text("utf-8").rpartition("=" * 100)[2]
        found = re.findall(r"^audit: (\w+) (passed|FAILED) (.*)$", self.log, re.M)
        self.checks = {
            name: json.loads(figures) | dict(passed=word == "passed")
            for name, word, figures in found
        }
        self.verified = functools.cache(self.verify)

    def verify(self, check: str) -> Verified:
        """What tools/verify.py says of it, which runs nothing but for this check."""
        folder, told, out = self.folder, self.settings, io.StringIO()
        files = folder / "model.ptz", "--data", told["data_path"], "--tokenizer"
        files += told["tokenizer_path"], "--train-script", self.program.script
        files += "--log", folder / "logs" / "run.txt", "--scores", folder / "scores.npz"
        how = "--normalisation-tokens", 1, "--probes", *{check} & set(verify.PROBES)
        left_out = {"check_run", "check_reproduced"} - WITH.get(check, set())
        stand_ins = dict.fromkeys(left_out, not_run) | dict(launch=in_process.launch)
        stand_ins["FEW_ROWS"] = dict(EVAL_ROWS="4", VAL_BATCH_SIZE="1024")  # windows are short here
        with mock.patch.multiple(verify, **stand_ins), contextlib.redirect_stdout(out):
            verify.main([str(argument) for argument in (*files, *how)])
        line = re.search(rf"^verify: {check} (passed|FAILED) (.*)$", out.getvalue(), re.M)
        assert line, out.getvalue()
        return Verified(line[1] == "passed", line[2])


def start(p: Program, folder: Path, **settings) -> str:
    """main() in the folder, with these hyperparameters; returns the error it ended with, or ""."""
    env = {
        name.upper(): str(int(value) if isinstance(value, bool) else value)
        for name, value in settings.items()
    }
    return in_process.run(p.script, folder, env).stderr


# --------------------------------------------------------------------------------------------------
# Bugs


def as_it_is(p: Program) -> None:
    """The world that a bug needs to show, for most of them."""


@dataclass
class Bug:
    """`edits` plant it in the program, `corpus` in the data; it needs `settings` and `world`, say a
    clock, to show. caught_by: 'audit: <check>', 'verify: <check>', 'error: <part of the message>',
    or a function of a program that passes without the bug. system: the name of the script."""

    id: str
    caught_by: str | Callable
    edits: list[tuple[str, str]] = field(default_factory=list)
    corpus: Callable | None = None
    settings: dict = field(default_factory=dict)
    world: Callable = as_it_is
    system: str = "train_gpt"

    @property
    def catcher(self) -> str:
        return self.caught_by.__name__ if callable(self.caught_by) else self.caught_by


@functools.cache
def sound(system: str, corpus: Callable | None, world: Callable, settings: tuple) -> Run:
    """A run without a bug, on the same data, in the same world and with the same settings."""
    folder = tempfile.TemporaryDirectory()
    p = plant(Path(folder.name), system)
    world(p)
    run = Run(p, Path(folder.name) / "run", corpus, **dict(settings))
    run.kept = folder  # until the last test
    return run


@functools.cache
def check_sound(check: Callable, system: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        check(plant(Path(folder), system))


def each_is_caught(bugs: list[Bug]) -> Callable:
    """The test of a file of the museum."""

    @pytest.mark.parametrize("bug", bugs, ids=[bug.id for bug in bugs])
    def test_the_bug_is_caught(bug, tmp_path):
        (caught_by_function if callable(bug.caught_by) else caught_in_a_run)(bug, tmp_path)

    return test_the_bug_is_caught


def caught_by_function(bug: Bug, folder: Path) -> None:
    check_sound(bug.caught_by, bug.system)
    p = plant(folder, bug.system, *bug.edits)
    with pytest.raises(AssertionError):
        bug.caught_by(p)


def caught_in_a_run(bug: Bug, folder: Path) -> None:
    kind, _, name = bug.caught_by.partition(": ")
    # without the bug: other data if it is in the data, the same data if it is in the code
    corpus = bug.corpus if bug.edits else None
    honest = sound(bug.system, corpus, bug.world, tuple(bug.settings.items()))
    p = plant(folder, bug.system, *bug.edits)
    bug.world(p)
    if kind == "error":
        assert all(check["passed"] for check in honest.checks.values())
        with pytest.raises(Stopped, match=name):
            Run(p, folder / "run", bug.corpus, **bug.settings)
        return
    run = Run(p, folder / "run", bug.corpus, **bug.settings)
    if kind == "audit":
        assert honest.checks[name]["passed"] and not run.checks[name]["passed"]
        return
    assert honest.verified(name).passed, honest.verified(name)
    passed, figures = run.verified(name)
    assert not passed
    # a probe that measures nothing catches nothing; only of `run` an error is the answer
    assert name == "run" or not re.match(r"\w+Error: ", figures), figures


# --------------------------------------------------------------------------------------------------
# Data with a bug in it, or in which a bug shows


def small(folder: Path) -> dict:
    """Two training shards, a validation shard of some documents, their tokenizer."""
    return write_corpus(folder, train_tokens=4000, val_tokens=800)


def shards(folder: Path, train: list, val: list[list], model: bytes | None = None) -> dict:
    """Two training shards, the validation shards, the tokenizer."""
    model = model or tokenizer_model()
    cut = len(train) // 3
    write_shard(folder / "fineweb_train_000000.bin", train[:cut])
    write_shard(folder / "fineweb_train_000001.bin", train[cut:])
    for i, ids in enumerate(val):
        write_shard(folder / f"fineweb_val_{i:06d}.bin", ids)
    (folder / "tokenizer.model").write_bytes(model)
    files = dict(data_path=folder, tokenizer_path=folder / "tokenizer.model")
    return files | dict(vocab_size=load(model).vocab_size())


@functools.cache
def prose_ids(first: int = 0, last: int | None = None) -> list[int]:
    return document_ids(load(tokenizer_model()), *prose()[first:last])


def every_script(folder: Path) -> dict:
    """Validation text of all that DOCUMENTS has: emoji and CJK are byte pieces."""
    ids = document_ids(load(tokenizer_model()), *DOCUMENTS.values())
    return shards(folder, prose_ids(0, 60), [ids])


def two_validation_shards(folder: Path) -> dict:
    return shards(folder, prose_ids(10), [prose_ids(0, 4), prose_ids(4, 8)])


def a_truncated_validation_shard(folder: Path) -> dict:
    told, path = small(folder), folder / "fineweb_val_000000.bin"
    path.write_bytes(path.read_bytes()[:-1000])
    return told


def transformed(folder: Path) -> dict:
    """CaseOps shards, as data/prepare.py writes them: operators for case, and the bytes of the
    original beside the tokens."""
    files = []
    for name, texts in ("docs", prose()[20:80]), ("val", prose()[:8]):
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(dict(text=text)) + "\n" for text in texts))
        files += ["--val-docs" if name == "val" else "--docs", str(path)]
    where = "--name", "cased", "--output-root", str(folder)
    with contextlib.redirect_stdout(None), contextlib.redirect_stderr(io.StringIO()):
        prepare.main([*files, "--caseops", "--vocab-size", "400", *where])
    model = folder / "tokenizers" / "cased_400_bpe_caseops.model"
    return dict(data_path=folder / "datasets" / "cased", tokenizer_path=model, vocab_size=400)


def transformed_without_bytes(folder: Path) -> dict:
    told = transformed(folder)
    for path in told["data_path"].glob("fineweb_val_bytes_*.bin"):
        path.unlink()
    (told["data_path"] / "stats.json").unlink()  # which would miss them
    return told


def fifty_thousand_documents(folder: Path) -> dict:
    """As many as the official split has, but of other text."""
    (folder / "fineweb").mkdir()
    document = [BOS, *load(tokenizer_model()).encode("a b")]
    return shards(folder / "fineweb", prose_ids(), [document * 50_000])


def validation_of_a_fifth(folder: Path) -> dict:
    """Split for training as if a fifth of the validation documents were all of them."""
    return shards(folder, prose_ids(4), [prose_ids(0, 20)])


def validation_as_a_training_shard(folder: Path) -> dict:
    told = small(folder)
    shutil.copy(folder / "fineweb_val_000000.bin", folder / "fineweb_train_000002.bin")
    return told


def an_overlap_that_is_not_told(folder: Path) -> dict:
    """One document of 25, which is not too many; stats.json says there is none."""
    told = shards(folder, prose_ids(24), [prose_ids(0, 25)])
    overlap = dict(validation_documents_in_training=0, validation_documents=25)
    (folder / "stats.json").write_text(json.dumps(dict(overlap=overlap)))
    return told


def without_bos(folder: Path) -> dict:
    train, val = ([i for i in ids if i != BOS] for ids in (prose_ids(10), prose_ids(0, 10)))
    return shards(folder, train, [val])


def a_tokenizer_without_a_space(folder: Path) -> dict:
    sp = load(tokenizer_model())
    model = edit_pieces(tokenizer_model(), {sp.piece_to_id("\u2581"): ("something", NORMAL)})
    ids = document_ids(load(model), *prose())
    return shards(folder, [BOS, *ids[2000:]], [ids[:2000]], model)


# --------------------------------------------------------------------------------------------------
# What the checks share


def own_clock(p: Program) -> SimpleNamespace:
    """The program's time from now on: an optimizer step takes 0.1 seconds, the Hessians 0.2, all
    else nothing."""
    core = p.core
    clock = SimpleNamespace(now=0.0, strftime=time.strftime, gmtime=time.gmtime)
    clock.perf_counter = lambda: clock.now

    def taking(seconds, function):
        def timed(*args):
            clock.now += seconds
            return function(*args)

        return timed

    core.time, core.Muon.step = clock, taking(0.1, core.Muon.step)
    core.collect_hessians = taking(0.2, core.collect_hessians)
    return clock


def hyperparameters(p: Program, known: dict):
    """Those that the system has."""
    cls = p.system.Hyperparameters
    return cls(**{name: known[name] for name in cls.__dataclass_fields__ if name in known})


def parts(p: Program, **settings) -> tuple:
    """Hyperparameters, model, training tokens and validation of a tiny run; its files lie in the
    folder of the program."""
    data = p.folder / "data"
    data.mkdir(exist_ok=True)
    known = SETTINGS | LAYOUTS[p.script.stem] | small(data) | dict(scores="")
    known |= dict(artifact=str(p.folder / "model.ptz"))
    hp = hyperparameters(p, known | settings)
    hp.validate()
    stream = p.core.TokenStream(hp.data_path, "train", hp.vocab_size)
    return hp, p.system.GPT(hp), stream, p.core.Validation(hp)


def trained(p: Program, **settings) -> tuple:
    """As of parts, after training, and what `train` returned: Hessians and figures."""
    hp, model, stream, validation = parts(p, **settings)
    return hp, model, *p.core.train(hp, model, stream, validation, p.core.Audit())


def shaken(model):
    """Noise on all weights: nothing hides behind a zero or a one."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.where(weight == 0, 0.2, 0.1) * torch.randn_like(weight))
    return model


def two_batches(hp, stream) -> list:
    tokens = stream.read(0, 2 * 4 * hp.train_seq_len).view(2, 4, -1)
    return [(x[:, :-1], x[:, 1:]) for x in tokens]


def as_rank(p: Program, rank: int) -> list:
    """From now on the program is one of two ranks; its collectives find the same on the other.
    Returns their record."""
    calls, ops, world = [], torch.distributed.ReduceOp, p.core.world
    world.rank, world.size = rank, 2
    world.all_reduce = lambda x, op=ops.SUM: (calls.append((str(op), x.shape)), x)[1]
    p.core.dist = SimpleNamespace(
        ReduceOp=ops,
        all_gather_single=lambda out, x: out.copy_(torch.cat((x, x))),
        all_gather_object=lambda out, x: out.__setitem__(slice(None), [x] * len(out)),
        barrier=lambda: calls.append("barrier"),
        init_process_group=lambda backend: calls.append("join"),
        destroy_process_group=lambda: calls.append("leave"),
    )
    return calls


def is_matrix(name: str) -> bool:
    """What Muon may own: weights that multiply activations, but for the two projections to a number
    a head."""
    owned = r"\.(q|k|v|g|o|up|down)_proj\.weight$|^inst_(in|out\.\d+)\.weight$"
    return name == "ngram.proj.weight" or bool(re.search(owned, name))


def refuses(action: Callable) -> bool:
    try:
        action()
    except ValueError:
        return True
    return False


def counted(p: Program) -> list[Path]:
    """The files that the program is made of."""
    names = ["train_gpt.py", *in_process.SHARED, "systems/" + p.script.name]
    return [p.folder / name for name in names if (p.folder / name).is_file()]
