"""tools/bench.py: its comparisons are fair and its estimates are right."""

import argparse
import contextlib
import io
import math
import os
import re
import runpy
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import brotli
import numpy as np
import pytest
import torch
import toys
import zstandard
from conftest import ROOT, TINY
from corpus import BOS, write_corpus

import train_gpt

sys.path.insert(0, str(ROOT / "tools"))
import bench  # noqa: E402  (the path comes first)

# of what only some systems have, as TINY of the others
OWN = dict(
    kv_share=dict(
        layout="G2", ngram_vocab_size=128, ngram_dim=16, ttt_chunk_tokens=256, ttt_freeze_blocks=1
    ),
    gdn_hybrid=dict(layout="G S S=1", ngram_vocab_size=128, ngram_dim=16),
    pure_gdn=dict(grad_accum_steps=4, curriculum="0:1x16 0.5:3x32"),
    crawler=dict(layout="A (A G)x2 A", ngram_vocab_size=128, ngram_dim=16, inst_dim=4),
    transformer=dict(
        layout="A (A)x2 A", attn_gate_dims=4, parallel_start_layer=2, ttt_chunk_tokens=256
    ),
    hybrid_1895=dict(
        layout="G A (A)x2",
        frequent_tokens=100,
        parallel_start_layer=2,
        ttt_chunk_tokens=256,
    ),
)
WINDOWS_AND_STREAM = ["non-overlapping", "sliding-64", "stream"]
MODES = dict(
    record=[*WINDOWS_AND_STREAM, "stream+lora"],
    kv_share=[*WINDOWS_AND_STREAM, "stream+sgd", "sliding-64+sgd"],
    hybrid_1895=[*WINDOWS_AND_STREAM, "stream+sgd", "sliding-64+sgd"],
    transformer=[*WINDOWS_AND_STREAM, "stream+lora", "stream+lora+phases"],
)


def tiny_of(system: str, **changes):
    """Hyperparameters of a system at the sizes of TINY."""
    hp = bench.module_of(system).Hyperparameters(**TINY | OWN.get(system, {}) | changes)
    hp.validate()
    return hp


def variables(settings: dict) -> dict[str, str]:
    """The settings as they stand in an environment."""
    return {
        name.upper(): str(int(value) if isinstance(value, bool) else value)
        for name, value in settings.items()
    }


# --- Systems --------------------------------------------------------------------------------------


def test_all_systems_are_measured():
    """Those of which systems/ has a file; another file there is a part of them."""
    files = (ROOT / "systems").glob("*.py")
    names = [path.stem for path in files if "\n    system = " in path.read_text()]
    assert sorted(bench.SYSTEMS) == sorted(["record", *names])
    for system in bench.SYSTEMS:
        assert bench.module_of(system).Hyperparameters.system == system


def test_the_script_of_a_system_and_the_system_of_a_script(monkeypatch):
    monkeypatch.chdir(ROOT)
    scripts = [bench.script_of(system) for system in bench.SYSTEMS]
    assert all(path.is_file() for path in scripts)
    assert [bench.system_of(str(path)) for path in scripts] == [*bench.SYSTEMS]
    assert bench.system_of("train_gpt.py") == "record"
    assert bench.system_of("systems/kv_share.py") == "kv_share"


def test_what_is_no_system_is_refused(tmp_path):
    with pytest.raises(ValueError, match="SYSTEM='demo': expected one of record, .*crawler"):
        bench.module_of("demo")
    with pytest.raises(argparse.ArgumentTypeError, match="is not train_gpt.py or systems/NAME.py"):
        bench.system_of(str(tmp_path / "train_gpt.py"))


def test_the_code_of_a_system_is_what_it_imports():
    """Against the modules that Python loads for it."""
    shown = """
import sys
sys.path[:0] = sys.argv[1:3]
for name in sys.argv[3:]:
    __import__(name)
    files = [getattr(module, "__file__", None) or "" for module in sys.modules.values()]
    print(*(path for path in files if path.startswith((sys.argv[1] + "/train", sys.argv[2]))))
    loaded = [name for name in sys.modules if f"{sys.argv[2]}/{name}.py" in files]
    for name in loaded:
        del sys.modules[name]
"""
    folders, names = [str(ROOT), str(ROOT / "systems")], ["train_gpt", *bench.SYSTEMS[1:]]
    out = subprocess.check_output([sys.executable, "-c", shown, *folders, *names], text=True)
    for system, files in zip(bench.SYSTEMS, out.splitlines(), strict=True):
        assert bench.code_files(system) == {Path(path) for path in files.split()}


# --- Size -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits, sigmas", [(6, 12.85), (7, 15.0), (8, 20.0), (4, 2.0)])
def test_the_rate_of_a_rounded_normal(bits, sigmas):
    """Against the entropy of the values that a million draws round to."""
    qmax = 2 ** (bits - 1) - 1
    q = (torch.randn(1_000_000, dtype=torch.float64) * qmax / sigmas).round().clamp(-qmax, qmax)
    share = torch.unique(q, return_counts=True)[1] / len(q)
    expected = -(share * share.log2()).sum().item()
    assert bench.gaussian_bits(bits, sigmas) == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize(
    "system, settings",
    [
        ("record", dict(layout="S2")),
        ("crawler", dict(layout="(A)x2", ngram_vocab_size=64)),
        ("hybrid_1895", dict(vocab_size=1024, embed_bits=4, frequent_tokens=512)),
    ],
)
def test_the_estimate_of_an_artifact(tmp_path, system, settings):
    """Of normal weights, but for the description of the tensors. The crawler has matrices of two
    precisions, hybrid_1895 rows of two in one."""
    hp = tiny_of(system, model_dim=128, mlp_mult=4.0, **settings)
    model = bench.module_of(system).GPT(hp)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    size = train_gpt.save_artifact(tmp_path / "model.ptz", model, hp, toys.usual(model))
    assert sum(bench.estimated_bytes(hp)) == pytest.approx(size, rel=0.05)


@pytest.mark.parametrize("preset", ["record", "demo"])
def test_every_system_fits_the_cap(monkeypatch, capsys, preset):
    """At the usual clip widths, or with a tenth of a bit less a value: steps are chosen so."""
    monkeypatch.setenv("PRESET", preset)
    bench.bench_size(None)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    rows = {line[0]: [int(cell.replace(",", "")) for cell in line[1:6]] for line in lines}
    assert rows.keys() == {*bench.SYSTEMS}
    for system, (count, integers, halves, code, total) in rows.items():
        assert code == bench.code_bytes(system)
        assert total == pytest.approx(integers + halves + code, abs=1)
        assert total - 0.1 * count / 8 <= 16_000_000, system


# --- Packing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", ["record", "hybrid_1895"])
def test_packers_of_an_artifact(tmp_path, monkeypatch, capsys, system):
    """The range code takes the entropy and the shares; the others are what their libraries say."""
    hp = tiny_of(system, model_dim=64)
    model = bench.module_of(system).GPT(hp)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    quantized = toys.rounded(model)
    train_gpt.save_artifact(tmp_path / "model.ptz", model, hp, quantized)
    monkeypatch.setenv("ARTIFACT", str(tmp_path / "model.ptz"))
    bench.bench_packing(None)
    head, _, *rows = capsys.readouterr().out.splitlines()
    raw = b"".join(q.numpy().tobytes() for q, _ in quantized.values())
    entropy = float(re.search(r"entropy ([\d,]+) bytes", head)[1].replace(",", ""))
    assert f"{len(quantized)} tensors, {len(raw):,} values" in head
    found = {row[:12].strip(): int(row.split()[-4].replace(",", "")) for row in rows}
    shares = found.pop("range code") - entropy
    assert 0 < shares < 300 * len(quantized)
    assert found == {
        "brotli 11": len(brotli.compress(raw, quality=11, lgwin=24)),
        "zstd 22": len(zstandard.ZstdCompressor(level=22).compress(raw)),
    }


def test_a_system_is_packed_to_its_target(tmp_path):
    """And its artifact is read again; bytes and passes are those of the row."""
    target = bench.code_bytes("record") + 60_000
    small = tiny_of("record", model_dim=64, artifact_target_bytes=target)
    settings = {key: x for key, x in asdict(small).items() if key != "artifact"}

    def hyperparameters(**changes):
        return train_gpt.Hyperparameters(**settings | changes)

    module = SimpleNamespace(Hyperparameters=hyperparameters, GPT=train_gpt.GPT)
    with mock.patch.object(bench, "module_of", lambda system: module):
        row = bench.fitted_row("record", str(tmp_path / "a.ptz")).split()
    size = (tmp_path / "a.ptz").stat().st_size + bench.code_bytes("record")
    assert row[0] == "record" and row[3] == f"{size:,}" and 1 <= int(row[5]) <= 11
    assert 0.999 * target <= size <= target
    loaded = train_gpt.load_artifact(tmp_path / "a.ptz", "cpu")[0]
    assert all(p.any() for p in loaded.parameters())


# --- Throughput -----------------------------------------------------------------------------------


@pytest.mark.parametrize("system, layout", [("record", "A5"), ("crawler", "A (A)x3 A")])
def test_throughput_trains(monkeypatch, capsys, system, layout):
    for name, value in variables(TINY | OWN.get(system, {}) | dict(layout=layout)).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SYSTEM", system)
    bench.bench_throughput(SimpleNamespace(runs=1))
    out = capsys.readouterr().out
    speed = rf"^{system}, preset record, cpu: [\d,]+ tokens/s, .* per 256 tokens$"
    assert re.search(speed, out, re.M)
    # five passes: q and o, k and v of half the heads, up and down; then the head
    weights = 5 * (2 * 32 * 32 + 2 * 32 * 16 + 2 * 32 * 64) + 32 * 64
    if system == "crawler":  # n-grams, and what each of three loops is told
        weights += 16 * 32 + 3 * 2 * 4 * 32
    assert f"matmul floor {6 * weights / 1e6:.1f} MFLOP/token" in out


def test_throughput_of_another_system_is_that_of_its_last_stage(monkeypatch, capsys):
    """Three of four micro-batches, in chunks of 32 tokens."""
    for name, value in variables(TINY | OWN["pure_gdn"]).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SYSTEM", "pure_gdn")
    lengths, forward = [], train_gpt.GPT.forward

    def recorded(model, x, y=None, cache=None):
        if y is not None:
            lengths.append(x.shape[1])
        return forward(model, x, y, cache)

    monkeypatch.setattr(train_gpt.GPT, "forward", recorded)
    bench.bench_throughput(SimpleNamespace(runs=1))
    assert re.search(r"^pure_gdn, .* per 192 tokens$", capsys.readouterr().out, re.M)
    assert lengths == (3 + 1) * 3 * 2 * [32]  # steps, micro-batches, chunks


# --- Toys -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", bench.SYSTEMS)
def test_toys_have_the_same_parameters_and_the_same_tokens(system):
    target = bench.toy("record", 1_300_000, 1)[1]
    settings, count = bench.toy(system, target, 614_400)
    hp = bench.module_of(system).Hyperparameters(**settings)
    hp.validate()
    assert count == bench.parameters(hp) == pytest.approx(target, rel=0.03)  # half a step of width
    tokens = 0
    for step in range(hp.iterations):
        micro_steps = hp.micro_steps_at(hp.progress(step, 0.0))
        tokens += micro_steps * hp.train_batch_tokens // hp.grad_accum_steps
    assert tokens == pytest.approx(614_400, rel=0.005)


@pytest.mark.parametrize("target", [1, 700_000, 1_300_000, 10**9])
def test_a_toy_is_as_wide_as_comes_nearest(target):
    """Against all widths, one by one."""
    settings, count = bench.toy("baseline", target, 1)
    hp_class = bench.module_of("baseline").Hyperparameters
    counts = {
        width: bench.parameters(hp_class(**settings | dict(model_dim=width)))
        for width in range(48, 385, 4)
    }
    assert settings["model_dim"] == min(counts, key=lambda width: abs(counts[width] - target))
    assert count == counts[settings["model_dim"]]


@pytest.mark.parametrize("system", ["record", "pure_gdn"])
def test_a_toy_runs_and_is_read(tmp_path, monkeypatch, system):
    """A whole run of the system; what it says of itself is what the table shows. An artifact that
    the caller has stays as it is."""
    corpus = write_corpus(tmp_path)
    settings = TINY | OWN.get(system, {}) | corpus | dict(iterations=3, gptq_calibration_batches=1)
    for name in ("data_path", "tokenizer_path"):
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("ARTIFACT", str(tmp_path / "mine.ptz"))
    outputs, run_output = [], bench.run_output

    def kept(*args):
        outputs.append(run_output(*args))
        return outputs[-1]

    monkeypatch.setattr(bench, "run_output", kept)
    bpb, rate = bench.toy_run(system, settings, seed=1)
    (output,) = outputs
    (scored,) = re.findall(r"_exact val_loss:\S+ val_bpb:(\S+)$", output, re.M)
    assert bpb == pytest.approx(float(scored), abs=1e-8)
    (trained,) = re.findall(r"^step:3/3 val_loss.* train_time:(\d+)ms", output, re.M)
    tokens = 3 * 256 if system == "record" else (1 + 1 + 3) * 64
    assert rate == pytest.approx(1000 * tokens / int(trained))
    assert bench.figures_of(output)["bytes_code"] == bench.code_bytes(system)
    assert f"  system: {system}\n" in output and "  seed: 1\n" in output
    assert not (tmp_path / "mine.ptz").exists()


def test_a_toy_that_fails_says_which(tmp_path):
    with pytest.raises(RuntimeError, match=r"^crawler, seed 2: (.|\n)*LAYOUT='X'"):
        bench.toy_run("crawler", bench.TOY | dict(layout="X"), seed=2)


def test_the_table_of_toys(monkeypatch, capsys):
    """A row each; the record is compared with others seed by seed."""
    level = dict.fromkeys(bench.SYSTEMS, 2.0) | dict(transformer=2.5, baseline=1.75)
    started = []

    def toy_run(system, settings, seed):
        started.append((system, seed))
        return level[system] + 0.125 * seed, 1000.0 * seed

    monkeypatch.setattr(bench, "toy_run", toy_run)
    monkeypatch.setattr(sys, "argv", "bench.py --systems --tokens 9216 --seeds 3".split())
    bench.main()
    head, _, _, *rows = capsys.readouterr().out.splitlines()
    assert "9,216 tokens of" in head
    several = {"record", "transformer", "baseline"}
    assert started == [(s, i) for s in bench.SYSTEMS for i in ((1, 2, 3) if s in several else (1,))]
    cells = [row.strip("| ").split(" | ") for row in rows[:-2]]
    assert [row[0] for row in cells] == [f"`{system}`" for system in bench.SYSTEMS]
    for system, row in zip(bench.SYSTEMS, cells, strict=True):
        hp = bench.module_of(system).Hyperparameters()
        assert row[1] == f"`{hp.layout}`" and row[3] == f"{bench.parameters(hp):,}"
        bpb, rate = level[system] + 0.125, "1,000"
        expected = [f"{bpb:.4f}", "1", rate]
        if system in several:
            expected = [f"{bpb + 0.125:.4f} ± 0.1250", "3", "2,000"]
        assert row[6:] == expected
    assert rows[-2:] == [
        "record better than transformer by +0.5000, by seed: +0.5000 +0.5000 +0.5000",
        "record better than baseline by -0.2500, by seed: -0.2500 -0.2500 -0.2500",
    ]


# --- Bits per byte by position --------------------------------------------------------------------


def test_the_curve_against_a_loop():
    """Documents of all lengths, also empty ones and one past the last border; targets in no
    order."""
    random = np.random.default_rng(0)
    lengths = [9000, 1, 1, 64, 65, *random.integers(1, 5000, 20).tolist()]
    tokens = np.concatenate([[1, *random.integers(2, 9, n - 1)] for n in lengths])
    position = random.permutation(np.arange(1, len(tokens)))
    nats, sizes = random.random(len(position)), random.integers(0, 5, len(position))
    borders = [64, 128, 256, 512, 1024, 2048, 4096, 8192, math.inf]
    expected, place, offsets = [[0, 0.0, 0] for _ in borders], -1, []
    for token in tokens:
        place = 0 if token == 1 else place + 1
        offsets.append(place)
    for one_nats, size, at in zip(nats, sizes, position, strict=True):
        bucket = next(i for i, border in enumerate(borders) if offsets[at] < border)
        sums = zip(expected[bucket], (1, one_nats, size), strict=True)
        expected[bucket] = [a + b for a, b in sums]
    scores = dict(nats=nats, bytes=sizes, position=position)
    count, bits = bench.by_offset(scores, np.flatnonzero(tokens == 1))
    assert count.tolist() == [n for n, _, _ in expected] and min(count) > 0
    assert bits == pytest.approx([total / math.log(2) / size for _, total, size in expected])


def test_the_curve_of_short_documents():
    """Offsets that no target has have no bits either, and are no error."""
    scores = dict(  # the second is a BOS
        nats=np.ones(3), bytes=np.array([2, 0, 4]), position=np.array([1, 2, 3])
    )
    count, bits = bench.by_offset(scores, np.array([0, 2]))
    assert count.tolist() == [3] + [0] * 8 and np.isnan(bits[1:]).all()
    assert bits[0] == pytest.approx(3 / math.log(2) / 6)


# --- Evaluation -----------------------------------------------------------------------------------


@pytest.fixture
def system(request):
    """The one of the artifact that is evaluated."""
    return getattr(request, "param", "record")


def start_run(system: str) -> None:
    """What a process of its own would do."""
    if system == "record":
        train_gpt.main()
    else:
        runpy.run_path(str(bench.script_of(system)), run_name="__main__")
    train_gpt.log.handlers.clear()


@pytest.fixture
def artifact(system, tmp_path, monkeypatch):
    """A tiny artifact, of which the environment tells as a user would; the working folder is the
    one it lies in."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    layout = {} if system in OWN else dict(layout="G S")
    corpus = write_corpus(tmp_path / "data", val_tokens=2400)
    hp = tiny_of(system, **corpus, **layout, iterations=3, eval_seq_len=128, eval_stride=64)
    with mock.patch.dict(os.environ, variables(asdict(hp))):
        start_run(system)
    monkeypatch.setenv("ARTIFACT", "final_model.int6.ptz")
    monkeypatch.setenv("TTT_LORA_LR", "0.01")
    monkeypatch.setenv("TTT", hp.ttt_kinds[-1])  # a row's own settings come first
    monkeypatch.setenv("TTT_PHASES", "2")


@pytest.fixture
def in_process(monkeypatch):
    """Runs without the seconds that a process takes to start."""

    def run_output(name, system, settings, folder):
        out = io.StringIO()
        changed = mock.patch.dict(os.environ, settings), contextlib.chdir(folder)
        with changed[0], changed[1], contextlib.redirect_stdout(out):
            start_run(system)
        return out.getvalue()

    monkeypatch.setattr(bench, "run_output", run_output)


@pytest.fixture
def evaluate(system, artifact, monkeypatch, capsys):
    """evaluate(*rows) -> what --evaluation prints: its head, and the cells of both tables below
    theirs."""

    def start(*rows):
        command = f"bench.py --evaluation --folder runs --train-script {bench.script_of(system)}"
        command += f" --rows {' '.join(rows)}" if rows else ""
        monkeypatch.setattr(sys, "argv", command.split())
        bench.main()
        head, *tables = capsys.readouterr().out.split("\n\n")
        lines = (text.splitlines()[2:] for text in tables)
        return head, *([line.strip("| ").split(" | ") for line in table] for table in lines)

    return start


def own_figures(system: str, name: str, settings: str) -> tuple[float, int]:
    """Bits per byte and milliseconds that the run says of itself, which had these settings and left
    these scores."""
    log = Path("runs", "logs", f"{name}.txt").read_text().split("=" * 100)[-1]
    expected = dict(EVAL_ONLY="True", EVAL_SECONDS="0.0", TTT_LORA_LR="0.01", TTT="")
    if "ttt_phases" in {f.name for f in fields(bench.module_of(system).Hyperparameters)}:
        expected["TTT_PHASES"] = "0"
    expected |= dict(pair.split("=") for pair in settings.strip("`").split())
    lines = [f"  {variable.lower()}: {value}\n" for variable, value in expected.items()]
    assert [line for line in lines if line not in log] == []
    _, (label, ms) = re.findall(r"^final_int6_(\S+) val_loss.* eval_time:(\d+)ms$", log, re.M)
    exact = r"^final_int6_(\S+)_exact val_loss:\S+ val_bpb:(\S+)$"
    ((same_label, bpb),) = re.findall(exact, log, re.M)
    reads = "stream" if "stream" in name else "sliding_window"
    assert label == same_label == "_ttt_".join([reads, *re.findall("sgd|lora", name)])
    with np.load(Path("runs", f"{name}.npz")) as scores:
        again = scores["nats"].sum() / math.log(2) / scores["bytes"].sum()
    assert again == pytest.approx(float(bpb), abs=1e-6)
    return float(bpb), int(ms)


@pytest.mark.parametrize("system", ["record", "kv_share", "transformer"], indirect=True)
def test_the_evaluations_are_the_runs(system, evaluate, in_process):
    """All modes of a system; what the tables show is what the runs say."""
    head, rows, curve = evaluate()
    assert f"({system}) on data, " in head
    assert "2,399 targets" in head and "TTT_LORA_LR=0.01" in head and "PHASES" not in head
    assert "EVAL_CHUNK=16 EVAL_ROWS=4 EVAL_SEQ_LEN=128 " in head
    assert [row[0] for row in rows] == MODES[system] and "EVAL_STRIDE=128`" in rows[0][1]
    own = [own_figures(system, *row[:2]) for row in rows]
    base_bpb, base_ms = own[1]
    for (bpb, ms), row in zip(own, rows, strict=True):
        compared = [f"{bpb - base_bpb:+.4f}", f"{ms / 1000:.2f}", f"{base_ms / ms:.2f}x"]
        assert row[2:] == [f"{bpb:.4f}", *compared]
    buckets = ["0-63", "64-127", "128-255", "256-511", "512-1023", "1024-2047"]
    assert [row[0] for row in curve] == buckets
    assert sum(int(row[1].replace(",", "")) for row in curve) == 2399
    tokens = train_gpt.TokenStream("data", "val", 384).read(0, 2400).numpy()
    seen = set()
    for column, row in enumerate(rows, 2):
        with np.load(Path("runs", f"{row[0]}.npz")) as scores:
            seen.add(scores["nats"].tobytes())
            _, bits = bench.by_offset(scores, np.flatnonzero(tokens == BOS))
        assert [line[column] for line in curve] == [f"{x:.4f}" for x in bits[:6]]
    assert len(seen) == len(rows), "two rows are the same mode"


@pytest.mark.parametrize("system", bench.SYSTEMS)
def test_a_system_has_the_modes_that_it_can_run(system):
    """Each mode's settings are possible ones of the system; what it ships with is among them."""
    hp_class = bench.module_of(system).Hyperparameters
    modes = bench.modes_of(hp_class())
    assert [*modes] == MODES.get(system, MODES["record"])
    for mode in modes.values():
        settings = bench.settings_of(mode)
        assert settings.keys() <= {f.name.upper() for f in fields(hp_class)}
        hp_class.from_env({"TTT": ""} | settings)
    hp = hp_class()
    shipped = {"EVAL_MODE": hp.eval_mode} | ({"TTT": hp.ttt} if hp.ttt else {})
    assert any(shipped.items() <= bench.settings_of(mode).items() for mode in modes.values())


def test_rows_by_number_or_name(evaluate, in_process):
    """In the order of the table; without sliding-64 there is nothing to compare with."""
    _, rows, curve = evaluate("stream", "1")
    cells = [(row[0], row[3], row[5]) for row in rows]
    assert cells == [("non-overlapping", "-", "-"), ("stream", "-", "-")]
    assert {len(row) for row in curve} == {4}


def test_a_row_of_another_system_is_refused(evaluate):
    with pytest.raises(ValueError, match=r"--rows stream\+sgd: expected of record: non-ov.*\+lora"):
        evaluate("stream", "stream+sgd")


def test_an_artifact_of_another_system_is_refused(artifact, monkeypatch):
    script = ROOT / "systems" / "kv_share.py"
    monkeypatch.setattr(sys, "argv", f"bench.py --evaluation --train-script {script}".split())
    with pytest.raises(ValueError, match="final_model.int6.ptz: .*record.* kv_share"):
        bench.main()


def test_an_evaluation_leaves_the_files_of_the_artifact_as_they_are(evaluate, in_process):
    """The sample beside it is of the run that made it."""
    before = {path: path.read_bytes() for path in Path().glob("final_model*")}
    assert len(before) == 3
    evaluate("stream+lora")
    assert {path: path.read_bytes() for path in Path().glob("final_model*")} == before


@pytest.mark.parametrize("system", ["record", "kv_share"], indirect=True)
def test_an_evaluation_in_a_process_of_its_own(system, evaluate, monkeypatch):
    """As the command does it, and what it says of a run that fails."""
    _, rows, _ = evaluate("3")
    assert [row[2] for row in rows] == [f"{own_figures(system, *row[:2])[0]:.4f}" for row in rows]
    monkeypatch.setenv("TOKENIZER_PATH", "missing.model")
    with pytest.raises(RuntimeError, match=r"^stream: (.|\n)*missing.model"):
        evaluate("stream")


def test_an_evaluation_that_contradicts_the_artifact_is_refused(evaluate, monkeypatch):
    monkeypatch.setenv("LOGIT_SOFTCAP", "7")
    with pytest.raises(ValueError, match="LOGIT_SOFTCAP=.7.*: expected 30.0, as the artifact"):
        evaluate("stream")
