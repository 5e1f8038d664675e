"""`record.py check`: an honest folder leaves nothing to ask, and each fault is asked by name. All
folders are invented."""

import json
import math
import statistics
import sys
from pathlib import Path

import pytest
import test_folder
from test_dialects import DELTA, FIRST, LATER
from test_folder import NATS
from test_record import record

review = sys.modules["review"]
NAME = "records/track_10min_16mb/2026-04-20_Deep_stack"
BPB = {42: 1.0680, 0: 1.0690, 1234: 1.0700}
CODE = "import torch\n\nprint(torch.__version__)\n"


def later(seed: int, **replaced: str) -> str:
    """A log whose loss, score and targets belong together; its code is counted as it lies there."""
    bpb, blocks = BPB[seed], BPB[seed] + 0.015
    lines = {
        "seed: 42": f"seed: {seed}",
        "Code size (uncompressed): 120000 bytes\n": "",
        "(compressed): 27000": f": {len(CODE)}",
        "15927000": str(15_900_000 + len(CODE)),
        "val_loss:2.80000000 val_bpb:1.08396000": score(blocks),
        "val_loss:2.76000000 val_bpb:1.06847000": score(bpb),
    }
    text = LATER
    for old, new in (lines | replaced).items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def score(bpb: float, ratio: float = 1.0) -> str:
    """Loss and bits a byte; ratio: of the bytes that are counted to those that are there."""
    return f"val_loss:{bpb * NATS:.8f} val_bpb:{bpb / ratio:.8f}"


def submission(**changes) -> dict:
    results = {str(seed): {"val_bpb": bpb} for seed, bpb in BPB.items()}
    record = dict(author="Ada", github_id="ada", name="Deep", date="2026-04-20", track="10min_16mb")
    record |= dict(val_bpb=statistics.mean(BPB.values()), val_bpb_std=0.001, seeds=list(BPB))
    record |= dict(seed_results=results, bytes_total=15_900_000 + len(CODE))
    return {name: x for name, x in (record | changes).items() if x is not None}


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = Path(NAME)
    path.mkdir(parents=True)
    (path / "README.md").write_text("# Record: Deep\n")
    (path / "train_gpt.py").write_text(CODE)
    (path / "submission.json").write_text(json.dumps(submission()))
    for seed in BPB:
        (path / f"train_seed{seed}.log").write_text(later(seed))
    return path


def asked(path=NAME, *options: str) -> list[str]:
    """Its questions."""
    lines, found = review.lines_of(Path(path), list(options))
    questions = [line for line in lines[1:] if not line.startswith("cannot see: ")]
    assert found == bool(questions)
    assert lines[0].startswith(f"{path}: {len(questions) or 'nothing'} to ask")
    return questions


def only(path=NAME, *options: str) -> str:
    (question,) = asked(path, *options)
    return question


# -----------------------------------------------------------------------------
# what is in order


def test_an_honest_folder_leaves_nothing_to_ask(capsys):
    assert asked() == []
    assert record.main(["check", NAME]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{NAME}: nothing to ask"
    assert "cannot see: how many runs were made and not shown" in lines
    assert any("significance: no record to compare with" in line for line in lines)
    assert any("learning rate came down" in line for line in lines)


def test_a_question_is_exit_status_1_and_no_folder_a_line(place, capsys):
    (place / "README.md").unlink()
    assert record.main(["check", NAME]) == 1
    assert f"{NAME}: 1 to ask\nfiles: README.md: missing\n" in capsys.readouterr().out
    assert "none: No such file or directory: give the folder" in record.main(["check", "none"])
    assert "Not a directory" in record.main(["check", f"{NAME}/train_gpt.py"])
    assert "none.log: No such file" in record.main(["check", NAME, "--against", "none.log"])


def test_the_first_dialect_is_read_as_well(place):
    nats = math.log(2) * 151_080_878 / 62_021_632
    for seed in BPB:
        text = FIRST.replace("seed:1337", f"seed:{seed}")
        text = text.replace("15847642", str(15_800_000 + len(CODE)))
        text = text.replace("size: 47642", f"size: {len(CODE)}")
        text = text.replace("val_bpb:1.22598000", f"val_bpb:{2.07 / nats:.8f}")
        text = text.replace("val_bpb:1.19637000", f"val_bpb:{2.02 / nats:.8f}")
        (place / f"train_seed{seed}.log").write_text(text)
    record = submission(val_bpb=2.02 / nats, val_bpb_std=0.0, seed_results=None)
    record["bytes_total"] = 15_800_000 + len(CODE)
    (place / "submission.json").write_text(json.dumps(record))
    assert asked() == []


def test_our_own_folder_leaves_nothing_to_ask_once_it_is_filled_in(monkeypatch):
    monkeypatch.setattr(record, "ROOT", Path.cwd())
    Path("logs").mkdir()
    Path("train_gpt.py").write_text(test_folder.SOURCE)
    Path("requirements.txt").write_text("torch==2.9.1\n")
    logs = test_folder.three()
    options = ("--author", "Ada", "--github-id", "ada")
    path = test_folder.made(*logs, options=options)
    expected = f"files: README.md: still says '{review.FILL_IN}'"
    assert only(path) == expected
    text = (path / "README.md").read_text()
    (path / "README.md").write_text(text.replace(review.FILL_IN, "Done"))
    assert asked(path) == []


# -----------------------------------------------------------------------------
# what is asked of submission.json, README and code


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"author": ""}, "files: submission.json: without author"),
        ({"val_bpb": None}, "files: submission.json: without val_bpb"),
        ({"own_text": {"bytes": 3}}, "scores of an own text, in the record track"),
        (
            {"bytes_total": 15_000_000},
            "size: submission.json: bytes_total 15,000,000, the logs say",
        ),
        ({"seeds": [42, 0, 7]}, "seeds: submission.json: no log of seed 7"),
        ({"val_bpb": 1.068}, "val_bpb 1.068 is that of train_seed42.log alone: the logs' last"),
        ({"val_bpb": 1.05, "val_bpb_std": None}, "val_bpb 1.05 is in no log"),
        (
            {"val_bpb": 1.084},
            "val_bpb 1.084 is the mean of 'diagnostic quantized', the last scores",
        ),
        ({"val_bpb_std": 0.000816}, "that of a population, the sample's is 0.00100"),
        ({"val_bpb_std": 0.01}, "val_bpb_std 0.01 is not the logs', which is 0.00100"),
        ({"seed_results": {"0": {"val_bpb": 1.05}}}, "seed 0 has 1.05, train_seed0.log 1.069"),
    ],
)
def test_a_submission_that_disagrees_is_asked(place, changes, expected):
    (place / "submission.json").write_text(json.dumps(submission(**changes)))
    assert expected in only()


@pytest.mark.parametrize(
    "changes",
    [
        {"seeds": 3},
        {"seeds": ["x", None, "9" * 99]},
        {"seed_results": [1]},
        {"seed_results": {"0": 3, "42": {"val_bpb": None}}},
        {"val_bpb_std": "0.001"},
        {"val_loss": 0, "bytes_total": True},
        {"val_loss": float("nan")},
    ],
)
def test_values_of_other_kinds_are_no_crash(place, changes):
    (place / "submission.json").write_text(json.dumps(submission(**changes)))
    assert asked() == []


def test_files_of_other_kinds_are_no_crash(place):
    (place / "x.log").write_bytes(bytes(range(256)) * 99)
    (place / "y.txt").write_text("[" * 10_000)
    (place / "z.log").mkdir()
    assert asked() == []
    (place / "deep.py").write_text("x = " + "(" * 5_000)
    assert "files: deep.py: does not parse with Python 3." in only()


@pytest.mark.parametrize("text", ["", "[]", "{", "3"])
def test_a_submission_that_is_none_is_asked(place, text):
    (place / "submission.json").write_text(text)
    assert only() == "files: submission.json: not a JSON object"


def test_a_score_as_text_and_one_that_is_too_low(place):
    (place / "submission.json").write_text(json.dumps(submission(val_bpb="1.069")))
    assert "val_bpb is the text '1.069', no number" in only()
    (place / "submission.json").write_text(json.dumps(submission(val_bpb=0.99)))
    assert any("val_bpb 0.99: no accepted record was below" in line for line in asked())


PACKED = (
    "import lzma\nexec(lzma.decompress(__import__('base64').b85decode('" + 3000 * "x" + "')))\n"
)
TABLE = """def build(sp):
    sizes[i] = len(piece[1:].encode("utf-8")) + 1
def score():
    bytes = sizes[y] + (has_space[y] & ~is_boundary[x])
"""
HONEST = TABLE.replace(" + 1", "")
FIRST_SHARD = """files = sorted([f for f in os.listdir(folder) if f.endswith(".bin")])
data = read(files[0])
"""


@pytest.mark.parametrize(
    "code, expected",
    [
        (PACKED, "code: more.py: unpacks and executes itself, 3,0"),
        (
            TABLE,
            "code: more.py: its byte table counts the leading space, and scoring adds it again",
        ),
        ("def f(:\n", "files: more.py: does not parse with Python 3."),
        ("import mambalib\n", "files: more.py: imports mambalib, which neither README nor"),
        (FIRST_SHARD, "data: more.py: takes the first of the sorted shards only"),
        ('add("--val-docs", type=int, default=10_000)\n', "more.py: --val-docs is 10,000 unless"),
    ],
)
def test_code_is_asked(place, code, expected):
    (place / "more.py").write_text(code)
    assert expected in only()


@pytest.mark.parametrize(
    "code",
    [
        HONEST,
        "try:\n    import mambalib\nexcept ImportError:\n    pass\n",
        "import triton, json, train_gpt\n",
        "import flash_attn_interface\n",
        'add("--val-docs", type=int, default=50_000)\n',
        "import lzma\nweights = lzma.decompress(data)\nmodel = torch.compile(model)\n",
        "from .near import x\n",
    ],
)
def test_code_in_order_is_not_asked(place, code):
    (place / "more.py").write_text(code)
    (place / "README.md").write_text("# Record\n\nNeeds Flash-Attention 3.\n")
    assert asked() == []


def test_a_placeholder_and_a_name_with_spaces(place):
    (place / "README.md").write_text("Results: TBD\n")
    assert only() == "files: README.md: still says 'TBD'"
    other = place.rename(place.with_name("2026-04-20_with a space"))
    assert any("expected <YYYY-MM-DD>_<slug>" in line for line in asked(str(other)))


# -----------------------------------------------------------------------------
# what is asked of logs


def change(place: Path, old: str, new: str, seeds=tuple(BPB)) -> None:
    for seed in seeds:
        path = place / f"train_seed{seed}.log"
        text = path.read_text()
        assert text.count(old) == 1, old
        path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    "old, new, expected",
    [
        ("train_time: 588100ms", "train_time: 600100ms", "trained 600.100 s of 600: over, by less"),
        ("train_time: 588100ms", "train_time: 601000ms", "trained 601.000 s of 600: over"),
        ("Hessians in 11.3s", "Hessians in 12.3s", "stopped at 588.1 s, Hessians took 12.3 s more"),
        ("eval_time:332.1s", "eval_time:610.5s", "evaluated 610.5 s of 600"),
        ("train_shards: 128", "train_shards: 1", "data: train_seed"),
        ("ttt_enabled: True", "slot_enabled: True", "slot_enabled: is what it predicts with fixed"),
        ("GPTQ:coll", "prequant_ttt:epoch 1/9 x\nGPTQ:coll", "learning: train_seed0.log, train_se"),
        ("post-ema val_loss:2.77000000 val_bpb:1.07234000", f"post-ema {score(1.079)}",
         "averaged weights score worse than the last ones: 1.0790, before 1.0762"),
    ],
)  # fmt: skip
def test_a_log_is_asked(place, old, new, expected):
    change(place, old, new)
    assert expected in only()


def test_a_score_far_below_the_loss_of_training_is_asked(place):
    change(place, "train_loss: 2.8000", "train_loss: 3.3000", [0])
    expected = "score 1.0690, but training ended with 3.300 nats, 1.2775 bpb at 3.727 bytes a token"
    assert only() == f"score: train_seed0.log: {expected}"


def test_hessians_of_generated_text_may_come_late(place):
    change(place, "Hessians in 11.3s", "Hessians in 99s\nGPTQ: generated 64 sequences")
    assert asked() == []


@pytest.mark.parametrize(
    "ratio, expected",
    [
        (1.177, "1.1770 times the 151.08 million of the split, as when leading spaces are counted"),
        (1.0895, "1.0895 times the 151.08 million of the split, as when CaseOps is scored without"),
        (1.03, "1.0300 times the 151.08 million of the split; with those it is 1.0680"),
        (0.9, "0.9000 times the 151.08 million of the split"),
    ],
)
def test_bytes_that_are_not_those_of_the_split_are_asked(place, ratio, expected):
    for seed, bpb in BPB.items():
        change(place, score(bpb), score(bpb, ratio), [seed])
    questions = asked()
    found = [line for line in questions if line.startswith("score: train_seed")]
    assert len(found) == 3 and expected in "".join(found)
    assert all(line.startswith(("score: ", "seeds: ")) for line in questions)


def test_a_score_of_four_digits_is_not_asked_for_its_rounding(place):
    for seed, bpb in BPB.items():
        text = f"val_loss:{bpb * NATS:.4f} val_bpb:{bpb:.4f}"
        change(place, score(bpb), text, [seed])
    assert asked() == []


def test_another_validation_text_is_asked(place):
    change(place, "val_tokens: 40540160", "val_tokens: 9662464")
    assert "9,662,464 validation tokens, by loss and score 36.01 million bytes: not" in only()


def test_without_logs_submission_tells_the_bytes_of_a_token(place):
    for path in place.glob("*.log"):
        path.unlink()
    doubled = dict(val_bpb=1.02, val_loss=1.02 * 1.177 * NATS, val_bpb_std=None)
    (place / "submission.json").write_text(json.dumps(submission(**doubled)))
    questions = asked()
    assert questions[0] == "files: no log of a training that is known: expected train_seed<N>.log"
    assert "imply 4.3863 bytes a token" in questions[1]
    assert "1.177 times sp8192's, as when leading spaces" in questions[1] and len(questions) == 2
    honest = dict(val_bpb=1.2, val_loss=1.2 * NATS, val_bpb_std=None)
    (place / "submission.json").write_text(json.dumps(submission(**honest)))
    assert asked() == questions[:1]


def test_a_vocabulary_that_code_names_tells_what_the_training_loss_is_worth(place):
    """Where a log states neither nats of its score nor targets."""
    for seed in BPB:
        log = (
            f"Seed: {seed}, Steps: 100\nstep  90 | batch 64 | loss 2.5200 | x\nFinal BPB: 1.0690\n"
        )
        (place / f"train_seed{seed}.log").write_text(log)
    (place / "train_gpt.py").write_text('data = "fineweb10B_sp1024"\n')
    assert [line for line in asked() if "training ended with 2.520 nats, 1.4925 bpb" in line]
    (place / "train_gpt.py").write_text('data = "fineweb10B_sp1024", "fineweb10B_sp8192"\n')
    assert not [line for line in asked() if "training ended" in line]


def test_sliding_windows_that_score_worse_are_asked(place):
    for seed, bpb in BPB.items():
        line = f"quantized_sliding_window {score(bpb + 0.03)} eval_time:9ms\nquantized_ttt_phased"
        change(place, "quantized_ttt_phased", line, [seed])
    assert all("with more context, score worse" in line for line in asked())
    assert len(asked()) == 3


def test_a_gated_deltanet_log_is_asked_for_schedule_and_bytes(place):
    for seed in BPB:
        log = DELTA.replace("Seed: 7", f"Seed: {seed}")
        (place / f"train_seed{seed}.log").write_text(log)
    fitting = submission(val_bpb=1.02142204, val_bpb_std=None, seed_results=None)
    fitting["bytes_total"] = 15_600_916
    (place / "submission.json").write_text(json.dumps(fitting))
    files = "train_seed0.log, train_seed1234.log, train_seed42.log"
    assert asked() == [
        "size: submission.json: bytes_total 15,600,916 is an artifact's size without code",
        f"score: {files}: 1.02142 bpb implies 177.83 million bytes, 1.1770 times the 151.08 "
        "million of the split, as when leading spaces are counted twice; with those it is 1.2022",
        f"schedule: {files}: 1 of the learning rate at the end, step 2364 of 7000: "
        "it never came down",
        f"schedule: {files}: late QAT begins below 0.15 of the learning rate, which ended at 1: "
        "it never ran",
    ]


def test_gptq_that_no_log_shows_and_hessians_of_some_layers_only(place):
    (place / "README.md").write_text("int6 with GPTQ\n")
    assert asked() == []
    change(place, "GPTQ:collected 67 Hessians in 11.3s\n", "")
    assert only() == "quantization: GPTQ is claimed, no log shows that Hessians were collected"
    for seed in BPB:
        (place / f"train_seed{seed}.log").write_text(later(seed))
    code = (
        "def collect_hessians(model):\n    if isinstance(module, CastedLinear):\n        pass\n\n"
    )
    (place / "more.py").write_text(f"{code}x = 1  # flash-linear-attention, FLA\n")
    assert "Hessians of CastedLinear only (67 in logs), not of fla's layers" in only()


def test_sizes_that_disagree_are_asked(place):
    change(place, f"brotli: {15_900_000 + len(CODE)}", "brotli: 15900001", [42])
    assert f"train_seed42.log: 15,900,000 + {len(CODE)} bytes are not the 15,900,001" in asked()[0]


def test_the_cap_is_asked_in_logs_submission_and_files(place):
    change(place, f"brotli: {15_900_000 + len(CODE)}", "brotli: 16000001")
    assert "16,000,001 bytes, the cap is 16,000,000" in asked()[0]
    for seed in BPB:
        (place / f"train_seed{seed}.log").write_text(later(seed))
    (place / "train_gpt.py").write_text(CODE + 120_000 * "#")
    size = f"{len(CODE) + 120_000:,}"
    assert only() == (
        f"size: logs count {len(CODE)} bytes of code, train_gpt.py here has {size}; with that it "
        f"would be {15_900_000 + len(CODE) + 120_000:,}, over the cap"
    )


def test_seeds_that_are_few_repeated_or_misnamed_are_asked(place):
    (place / "train_seed0.log").write_text(later(42))
    questions = asked()
    assert "seeds: scored seeds in the logs: 2, a leaderboard row has 3" in questions
    assert "seeds: seed 42 in train_seed0.log, train_seed42.log: which one counts?" in questions
    assert "seeds: train_seed0.log: seed 42 in the log" in questions


def test_another_setting_in_one_seed_is_asked(place):
    change(place, "ttt_enabled: True", "ttt_enabled: False", [42])
    assert "train_seed42.log: ttt_enabled is 'False', in train_seed0.log 'True'" in only()


def test_a_score_in_a_log_of_its_own_is_found(place):
    """Of a run that only scored; and a log in another folder."""
    for seed, bpb in BPB.items():
        change(place, score(bpb), score(bpb + 0.003), [seed])
        (place / "rescored").mkdir(exist_ok=True)
        text = f"  seed: {seed}\nval_tokens: 40540160\nquantized_ttt_phased {score(bpb)}\n"
        (place / "rescored" / f"{seed}.log").write_text(text)
    assert asked() == []


def test_another_track_is_not_asked_for_time_and_seeds(place):
    track = Path("records/track_non_record_16mb")
    track.mkdir()
    other = place.rename(track / place.name)
    (other / "train_seed0.log").unlink()
    changes = dict(track="non_record_16mb", seeds=[42, 1234], val_bpb=1.069, val_bpb_std=None)
    (other / "submission.json").write_text(json.dumps(submission(**changes)))
    change(other, "train_time: 588100ms", "train_time: 9000000ms", [42, 1234])
    assert asked(str(other)) == []
    assert "not in the record track" in review.lines_of(other, [])[0][0]


def test_significance_is_asked_against_a_record():
    assert asked(NAME, "1.09") == []
    questions = asked(NAME, "1.0705")
    assert len(questions) == 2 and all(": no: bpb lower by more than" in x for x in questions)
    lines, _ = review.lines_of(Path(NAME), ["1.09"])
    assert not [line for line in lines if "significance: no record" in line]
