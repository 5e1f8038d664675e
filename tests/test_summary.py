"""tools/summary.py: its figures are those of the log, its lines fit a terminal."""

import json
import lzma
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import brotli
import pytest
from conftest import ROOT
from corpus import BOS, document_ids, load, prose, tokenizer_model, write_corpus, write_shard

sys.path.append(str(ROOT / "tools"))
import summary  # noqa: E402  (the path comes first)

DEMO = (ROOT / "logs" / "demo.txt").read_text("utf-8")
HEAD, _, LAST = DEMO.rstrip().rpartition("\n")
FIGURES = json.loads(LAST.removeprefix("figures: "))


def write_log(folder: Path, name: str = "run", settings=(), lines=(), **figures) -> Path:
    """The demo's log, with other settings, lines put before the last, and other figures."""
    text = HEAD
    for setting, value in dict(settings).items():
        text, count = re.subn(rf"^  {setting}: .*$", f"  {setting}: {value}", text, flags=re.M)
        assert count == 1
    (folder / "logs").mkdir(exist_ok=True)
    path = Path("logs") / f"{name}.txt"
    last = f"figures: {json.dumps(FIGURES | figures)}"
    (folder / path).write_text("\n".join([text, *lines, last, ""]))
    return path


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the run was: no text, no artifact."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv/bin/python"))
    return tmp_path


def page(log: Path, *took: float) -> list[str]:
    return summary.page(summary.read_job(log, *took))


def rows(lines: list[str]) -> dict[str, str]:
    """What stands behind each label; lines that go on are joined."""
    found, label = {}, ""
    for line in lines[1:]:
        label = line[: summary.LABEL].strip() or label
        text = line[summary.LABEL :]
        found[label] = f"{found[label]}\n{text}" if label in found else text
    return found


def test_the_figures_are_those_of_the_log(folder):
    log = write_log(folder)
    lines = page(log, 260.0, 118.0)
    found = rows(lines)
    assert lines[0] == (
        f"Own text of {FIGURES['bytes']:,} bytes, no official score: record, "
        f"{FIGURES['step_stop']} steps, {FIGURES['hardware']}"
    )
    roundtrip = re.search(r"^final_int6_roundtrip val_loss:\S+ val_bpb:(\S+)", DEMO, re.M)[1]
    scores = [FIGURES["raw_val_bpb"], FIGURES["pre_quant_val_bpb"], float(roundtrip)]
    said = re.findall(r"\d\.\d{4}", found["bits per byte"])
    assert said == [f"{score:.4f}" for score in (*scores, FIGURES["val_bpb"])]
    assert "a stream, learning from what is scored (lora)" in found["bits per byte"]
    numbers = [int(x.replace(",", "")) for x in re.findall(r"[\d,]{5,}", found["bytes"])]
    assert numbers == [FIGURES[f"bytes_{name}"] for name in ("total", "model", "code")]
    trained = int(re.findall(r"train_time:(\d+)ms", DEMO)[-1]) / 1000
    expected = [trained, FIGURES["wallclock_seconds"] - trained, FIGURES["eval_time_seconds"]]
    expected += [260 - sum(expected), 118]
    assert [int(x) for x in re.findall(r"\d+", found["seconds"])] == [round(x) for x in expected]
    assert found["checks"] == f"audit {len(FIGURES['checks'])} of 7 passed; verifier not run"
    assert found["files"] == "logs/run.txt"


def test_seconds_that_only_run_sh_knows_are_left_out(folder):
    names = re.findall(r"([a-zA-Z][a-zA-Z -]*) \d", rows(page(write_log(folder)))["seconds"])
    assert names == ["training", "Hessians", "final pass"]
    resumed = write_log(folder, lines=["resumed: x"])
    assert "rest" not in rows(page(resumed, 100.0, 9.0))["seconds"]


@pytest.mark.parametrize(
    "figures, lines, start",
    [
        (
            dict(official=True),
            [],
            f"Official validation split: record, {FIGURES['step_stop']} steps",
        ),
        (dict(official=True), ["resumed: x"], "Official split, but no score to claim (resumed): "),
        (
            dict(official=True, eval_time_seconds=601.0),
            [],
            "Official split, but no score to claim (over 600 s): ",
        ),
        (dict(official=False), [], "Own text of "),
    ],
)
def test_the_first_line_says_whether_it_is_an_official_score(folder, figures, lines, start):
    assert page(write_log(folder, lines=lines, **figures))[0].startswith(start)


# -----------------------------------------------------------------------------
# other files


def verified(log: Path, sha256: str = FIGURES["artifact_sha256"], future="passed", end=None):
    text = f"verify: size passed 1; sha256 {sha256}\nverify: future {future} x\n"
    log.with_suffix(".verify.txt").write_text(text + (end or "verify: all 2 passed\n"))


def test_checks_of_the_verifier_are_counted(folder):
    log = write_log(folder)
    verified(log)
    assert rows(page(log))["checks"].endswith("; verifier 2 of 2 passed")
    verified(log, future="FAILED", end="verify: 2 checks, FAILED: future\n")
    assert rows(page(log))["checks"].endswith("; verifier 1 of 2 passed, FAILED: future")
    verified(log, end=" ")
    assert "2 of 2 passed, did not" in rows(page(log))["checks"]
    verified(log, sha256="0" * 64)
    assert "verifier not run on this artifact" in rows(page(log))["checks"]
    failed = FIGURES["checks"] | dict(time=dict(passed=False))
    assert "6 of 7 passed, FAILED: time" in rows(page(write_log(folder, checks=failed)))["checks"]


def test_the_committed_log_is_summed_up_with_its_verifier(folder):
    shutil.copytree(ROOT / "logs", folder / "logs")
    shutil.copy(ROOT / "submission.json", folder)
    found = rows(page(Path("logs/demo.txt")))
    checks = len(re.findall(r"^verify: \S+ passed", Path("logs/demo.verify.txt").read_text(), re.M))
    assert f"verifier {checks} of {checks} passed" in found["checks"]
    assert found["files"] == "submission.json logs/demo{,.verify}.txt"


def test_files_are_those_that_a_shell_finds(folder):
    log = write_log(folder, settings=dict(scores="scores.npz"))
    verified(log)
    names = ["final_model.int6.ptz", "final_model.int6.ptz.trained.pt", "scores.npz"]
    for name in names:
        (folder / name).touch()
    (folder / "submission.json").write_text('{"artifact_sha256": "of another run"}')
    words = rows(page(log))["files"].replace("\n", " ")
    said = subprocess.run(["bash", "-c", f"ls {words}"], capture_output=True, text=True, check=True)
    assert sorted(said.stdout.split()) == sorted([*names, "logs/run.txt", "logs/run.verify.txt"])


def bits_per_byte(text: bytes) -> list[float]:
    packed = (
        brotli.compress(text, quality=11, lgwin=24),
        lzma.compress(text, preset=9 | lzma.PRESET_EXTREME),
    )
    return [8 * len(data) / len(text) for data in packed]


def compressed(log: Path) -> tuple[list[float], str]:
    line = rows(page(log))["bits per byte"].split("\n", 2)[2]
    return [float(x) for x in re.findall(r"\d\.\d{4}", line)], line


def test_compressors_read_the_text_of_the_run(folder, monkeypatch):
    texts = [text for text in prose() if text.isascii()][:40]  # these are decoded as they were
    (folder / "tokenizer.model").write_bytes(tokenizer_model())
    sp = load(tokenizer_model())
    write_shard(folder / "fineweb_val_000000.bin", document_ids(sp, *texts[:30]))
    write_shard(folder / "fineweb_val_000001.bin", document_ids(sp, *texts[30:]))
    text = "".join(sp.normalize(text) for text in texts).replace("\u2581", " ").encode()
    settings = dict(data_path=".", tokenizer_path="tokenizer.model")
    log = write_log(folder, settings=settings, documents=len(texts), bytes=len(text))
    found, line = compressed(log)
    assert found == pytest.approx(bits_per_byte(text), abs=1e-4) and "the same text" in line

    monkeypatch.setattr(summary, "COMPRESSED", 2_000)
    log = write_log(folder, settings=settings, documents=len(texts), bytes=1_234_000)
    found, line = compressed(log)
    assert found == pytest.approx(bits_per_byte(text[:2_000]), abs=1e-4)
    assert line.endswith("of its first 0.0 of 1.2 MB")


def test_case_operators_are_no_text(folder):
    """They stand for the case of the letters behind them."""
    model = tokenizer_model(400, user_defined_symbols=",".join("\ue001\ue002\ue003\ue004"))
    (folder / "tokenizer.model").write_bytes(model)
    ids = [BOS, *load(model).encode("\ue001the \ue002usa and\ue003x")]
    write_shard(folder / "fineweb_val_000000.bin", ids)
    write_shard(folder / "fineweb_val_bytes_000000.bin", [1] * len(ids))
    text = summary.dataset.Text(folder, folder / "tokenizer.model")
    assert summary.beginning(text) == b"The USA andX"


def test_text_that_is_not_there_or_another_is_told(folder):
    log = write_log(folder)
    line = "brotli, xz: not tried, its text is not in data/datasets/demo"
    assert rows(page(log))["bits per byte"].endswith(line)
    settings = {name: path for name, path in write_corpus(folder).items() if "path" in name}
    log = write_log(folder, settings=settings, documents=3)
    assert "not tried, its text is not in" in rows(page(log))["bits per byte"]


# -----------------------------------------------------------------------------
# what to do next, and how it stands there


def commands(lines: list[str]) -> dict[str, list[str]]:
    found = rows(lines)
    return {
        label: shlex.split(found[label].replace("\\\n", ""), comments=True)
        for label in ("submit", "verify again", "change")
    }


def test_each_next_step_is_one_command_that_a_shell_reads(folder):
    log = write_log(folder, name="my run", official=True, system="crawler")
    found = commands(page(log))
    assert found["verify again"] == [".venv/bin/python", "tools/verify.py", "--log", str(log)]
    assert found["change"] == ["SYSTEM=crawler", "MATRIX_LR=0.03", "./run.sh"]
    assert found["submit"][2:] == [
        ".venv/bin/python",
        "tools/record.py",
        "folder",
        "logs/my run.txt",
    ]
    assert commands(page(write_log(folder)))["submit"] == ["./run.sh"]


@pytest.mark.parametrize("official", [False, True])
def test_the_longest_names_fit(folder, official):
    """A run without a RUN_ID, with all that a run writes, and the longest of everything else."""
    name = "0" * 8 + "-0000-0000-0000-" + "0" * 12
    figures = dict(system="transformer", step_stop=20_000, hardware="8xNVIDIA H100 80GB HBM3")
    figures |= dict(official=official, bytes_total=15_000_000, bytes_model=14_900_000)
    log = write_log(folder, name, **figures)
    verified(log)
    for suffix in ("", ".sample.npz", ".trained.pt"):
        (folder / f"final_model.int6.ptz{suffix}").touch()
    shutil.copy(ROOT / "submission.json", folder)
    lines = page(log, 1400.0, 250.0)
    assert len(lines) <= 15 and max(map(len, lines)) <= 80
    assert not set("".join(lines)) - set(map(chr, range(32, 127))) - {"{", "}"}


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "logs/run.txt: empty, expected the log of a run"),
        (HEAD, "logs/run.txt: no run that trained and came to its end, so no summary"),
    ],
    ids=["empty", "stopped"],
)
def test_a_run_that_did_not_end_has_no_summary(folder, capsys, text, message):
    (folder / "logs").mkdir()
    (folder / "logs/run.txt").write_text(text)
    assert summary.main(["logs/run.txt"]) == f"summary: {message}"
    assert capsys.readouterr() == ("", "")


def test_it_starts_as_run_sh_starts_it(folder, monkeypatch):
    monkeypatch.undo()
    log = write_log(folder)
    command = [sys.executable, ROOT / "tools" / "summary.py", log, "--program-took", "300"]
    env = os.environ | dict(PYTHONSAFEPATH="1", LC_ALL="C", PYTHONUTF8="0")
    said = subprocess.run(
        [*command, "--verifier-took", "7"], cwd=folder, env=env, capture_output=True, text=True
    )
    assert (said.returncode, said.stderr) == (0, "") and "verifier 7\n" in said.stdout
