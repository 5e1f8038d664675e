"""tools/dialects.py and tools/compare.py: what anybody's log says, and which scores are lower."""

import math
import sys
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import compare  # noqa: E402  (the path comes first)
import dialects  # noqa: E402

import logs  # noqa: E402

RULE = "=" * 100
# the competition's script: its source, versions, then its lines
FIRST = f"""seed = 99
log0(f"final_int8_zlib_roundtrip_exact val_loss:{{q:.8f}} val_bpb:{{b:.8f}}")
{RULE}
Running Python 3.12.3
Running PyTorch 2.9.1
|   0  NVIDIA H100 80GB HBM3          On  |
{RULE}
train_loader:dataset:fineweb10B_sp1024 train_shards:80
val_loader:shards pattern=./data/fineweb_val_*.bin tokens:62021632
model_params:17059912
world_size:8 grad_accum_steps:1
train_batch_tokens:524288 train_seq_len:1024 iterations:20000 warmup_steps:20
seed:1337
step:1/20000 train_loss:6.9000 train_time:50ms step_avg:50.00ms
step:13000/20000 train_loss:2.0500 train_time:566000ms step_avg:43.54ms
step:13700/20000 val_loss:2.0600 val_bpb:1.2200 train_time:596498ms step_avg:43.54ms
stopping_early: wallclock_cap train_time:596498ms step:13700/20000
Serialized model: 67224983 bytes
Code size: 47642 bytes
Total submission size: 67272625 bytes
Serialized model int8+zlib: 15800000 bytes (payload:17178912 raw_torch:17224025 ratio:3.91x)
Total submission size int8+zlib: 15847642 bytes
final_int8_zlib_roundtrip val_loss:2.0700 val_bpb:1.2260 eval_time:1400ms
final_int8_zlib_roundtrip_exact val_loss:2.07000000 val_bpb:1.22598000
final_sliding_window val_loss:2.0200 val_bpb:1.1964 stride:64 eval_time:70500ms
final_sliding_window_exact val_loss:2.02000000 val_bpb:1.19637000
final_int8_zlib_roundtrip_exact val_loss:2.02000000 val_bpb:1.19637000
"""
# records from April on: hyperparameters a line each, no source, a blank behind the colons
LATER = """Hyperparameters:
  iterations: 20000
  run_id: later
  seed: 42
  ttt_enabled: True
train_shards: 128
val_tokens: 40540160
model_params:35900000
1/20000 train_loss: 9.0000 train_time: 0.0m tok/s: 17000000
4500/20000 train_loss: 2.8000 train_time: 8.9m tok/s: 6500000
4900/20000 val_loss: 2.7800 val_bpb: 1.0762
stopping_early: wallclock_cap train_time: 588100ms step: 4900/20000
diagnostic pre-quantization post-ema val_loss:2.77000000 val_bpb:1.07234000 eval_time:6000ms
Code size (uncompressed): 120000 bytes
Code size (compressed): 27000 bytes
GPTQ:collected 67 Hessians in 11.3s
Serialized model quantized+brotli: 15900000 bytes
Total submission size quantized+brotli: 15927000 bytes
diagnostic quantized val_loss:2.80000000 val_bpb:1.08396000 eval_time:9000ms
quantized_ttt_phased val_loss:2.76000000 val_bpb:1.06847000 eval_time:330000ms
total_eval_time:332.1s
"""
# the Gated DeltaNet submissions
DELTA = """=== Training ===
Seed: 7, Steps: 7000, Warmdown: 2100
World size: 8, Grad accum: 1
Late QAT threshold: 0.15
Validation tokens: 40,540,160
Total params: 33,909,825
Generated coprime shard order: stride across 80 shards
step     1/7000 | loss 9.0000 | lr_mul 0.0500 | mom 0.850 | 0.09 steps/s | 11s
step  2300/7000 | loss 3.2100 | lr_mul 1.0000 | mom 0.950 | 3.94 steps/s | 584s
Stopping early at step 2364 (wallclock limit)
Training complete in 590s
EMA BPB (no XSA): 1.001693
Artifact: 15,600,916 bytes (14.88 MB)
Quantized BPB (no XSA): 1.021422
Quantization degradation: +0.019730
final_int6_roundtrip_exact val_loss:3.10555360 val_bpb:1.02142204
"""


def read(folder: Path, text: str, name: str = "train.log") -> dialects.Report:
    path = folder / name
    path.write_text(text)
    return dialects.read(path)


def facts(report: dialects.Report) -> dict:
    names = "targets shards parameters hessians ranks".split()
    found = {name: report.fact(name) for name in names}
    names = "seed iterations steps train_seconds step_ms eval_seconds hardware raw_bpb "
    names += "bytes_model bytes_code bytes_total lr_multiplier is_training"
    found |= {name: getattr(report, name) for name in names.split()}
    scores = {name: getattr(report, name) for name in ("averaged", "quantized", "final")}
    return found | {name: score and (score.loss, score.bpb) for name, score in scores.items()}


def test_a_log_of_the_competitions_script(tmp_path):
    report = read(tmp_path, FIRST)
    assert facts(report) == dict(
        seed=1337, iterations=20000, steps=13700, targets=62_021_632, shards=80, ranks=8,
        parameters=17_059_912, hessians=None, train_seconds=596.498, step_ms=43.54,
        eval_seconds=70.5, hardware="8xH100", raw_bpb=1.22, bytes_model=15_800_000,
        bytes_code=47_642, bytes_total=15_847_642, lr_multiplier=None, is_training=True,
        averaged=None, quantized=(2.07, 1.22598), final=(2.02, 1.19637),
    )  # fmt: skip
    assert report.losses == {1: 6.9, 13000: 2.05} and len(report.sources) == 1


def test_a_log_of_the_later_records(tmp_path):
    report = read(tmp_path, LATER)
    assert facts(report) == dict(
        seed=42, iterations=20000, steps=4900, targets=40_540_160, shards=128, ranks=None,
        parameters=35_900_000, hessians=67, train_seconds=588.1, step_ms=588_100 / 4900,
        eval_seconds=332.1, hardware=None, raw_bpb=1.0762, bytes_model=15_900_000,
        bytes_code=27_000, bytes_total=15_927_000, lr_multiplier=None, is_training=True,
        averaged=(2.77, 1.07234), quantized=(2.8, 1.08396), final=(2.76, 1.06847),
    )  # fmt: skip
    assert report.settings["ttt_enabled"] == "True" and report.number("hessian_seconds") == 11.3


def test_a_log_of_a_gated_deltanet_submission(tmp_path):
    assert facts(read(tmp_path, DELTA)) == dict(
        seed=7, iterations=7000, steps=2364, targets=40_540_160, shards=80, ranks=8,
        parameters=33_909_825, hessians=None, train_seconds=590.0, step_ms=590_000 / 2364,
        eval_seconds=None, hardware="8x?", raw_bpb=None, bytes_model=15_600_916,
        bytes_code=None, bytes_total=None, lr_multiplier=1.0, is_training=True,
        averaged=(None, 1.001693), quantized=(3.1055536, 1.02142204),
        final=(3.1055536, 1.02142204),
    )  # fmt: skip


def test_a_log_of_this_program_has_its_figures():
    path = ROOT / "logs" / "demo.txt"
    report, figures = dialects.read(path), logs.read_runs(path)[-1].figures
    assert report.seed == figures["seed"] and report.steps == figures["step_stop"]
    assert report.train_seconds == figures["wallclock_seconds"]
    assert report.bytes_total == figures["bytes_total"]
    assert report.lr_multiplier == figures["lr_multiplier_at_stop"]
    assert report.final.bpb == pytest.approx(figures["val_bpb"], abs=1e-8)
    assert report.averaged.bpb == pytest.approx(figures["pre_quant_val_bpb"], abs=1e-4)
    assert report.averaged.bpb < report.quantized.bpb < report.averaged.bpb + 0.01


def test_stamps_before_the_lines_and_settings_before_the_source(tmp_path):
    stamped = "".join(f"1776142361.425 {line}\n" for line in LATER.splitlines())
    assert facts(read(tmp_path, stamped)) == facts(read(tmp_path, LATER))
    head, lines = LATER.split("train_shards", 1)
    parts = ["", head, "  seed: 3\nimport torch\n", "Running Python 3.12\n", f"train_shards{lines}"]
    report = read(tmp_path, f"{RULE}\n".join(parts))
    assert facts(report) == facts(read(tmp_path, LATER))
    assert report.sources == ("  seed: 3\nimport torch\n",)


def test_the_bytes_of_a_token_and_what_rounding_does_to_them(tmp_path):
    final = read(tmp_path, FIRST).final
    assert final.bytes_per_token() == pytest.approx(2.02 / math.log(2) / 1.19637)
    assert final.bytes_error() == pytest.approx(0.5e-8 / 2.02 + 0.5e-8 / 1.19637)
    assert final.digits == (8, 8)


@pytest.mark.parametrize("text", ["", "import torch\n", "nothing: 1\n", "# val_bpb: 1.06\n"])
def test_what_is_no_log_is_said(tmp_path, text):
    with pytest.raises(
        ValueError, match="train.log: no log that is known: neither steps nor scores"
    ):
        read(tmp_path, text)
    assert dialects.read_if(tmp_path / "train.log") is None


# -----------------------------------------------------------------------------
# comparison


def with_score(loss: float, bpb: float, seed: int) -> str:
    line = f"quantized_ttt_phased val_loss:{loss:.8f} val_bpb:{bpb:.8f} eval_time:1ms\n"
    return LATER.replace("seed: 42", f"seed: {seed}") + line


@pytest.fixture
def folders(tmp_path) -> tuple[str, str]:
    """Three seeds each, the second 0.02 bpb worse, all of 3.7267 bytes a token."""
    found = []
    for name, mean in ("ours", 1.06), ("theirs", 1.08):
        (tmp_path / name).mkdir()
        for seed, x in enumerate((-0.001, 0.0, 0.001)):
            bpb = mean + x
            text = with_score(bpb * math.log(2) * 3.7267, bpb, seed)
            (tmp_path / name / f"train_seed{seed}.log").write_text(text)
        found.append(str(tmp_path / name))
    return tuple(found)


def compared(ours: list[str], theirs: list[str]) -> str:
    return "\n".join(compare.lines_of(compare.read_side(ours), compare.read_side(theirs)))


def test_folders_are_compared_in_nats_and_bits(folders):
    text = compared([folders[0]], [folders[1]])
    assert text.count("mean 1.06000 bpb, std 0.00100") == 1
    assert "of a token: yes: nats lower by more than 0.00500: lower by 0.05166" in text
    assert "of a token, in bpb: yes: bpb lower by more than 0.00194: lower by 0.02000" in text
    assert "of a byte: yes: bpb lower by more than 0.00721" in text
    assert "t 24.49, 4.0 degrees" in text  # 0.02 / (0.001 * sqrt(2 / 3))
    worse = compared([folders[1]], [folders[0]])
    assert ": yes: " not in worse and worse.count(": no: ") == 4


def test_nats_of_other_tokens_are_not_compared(folders, tmp_path):
    other = with_score(1.08 * math.log(2) * 2.4359, 1.08, 5)
    (tmp_path / "other.log").write_text(other.replace("40540160", "62021632"))
    text = compared([folders[0]], [str(tmp_path / "other.log")])
    assert "their nats do not compare" in text and "of a token: " not in text
    assert "theirs is one number, taken as exact" in text


def test_a_mean_and_several_means(folders):
    assert "t 34.64, 2.0 degrees" in compared([folders[0]], ["1.08"])
    assert "mean 1.08000 bpb, std 0.01414" in compared([folders[0]], ["1.07", "1.09"])


def test_scores_of_two_texts_are_not_compared(folders, tmp_path):
    """Bytes that were counted twice, or an own text."""
    (tmp_path / "double.log").write_text(with_score(1.08 * 1.177 * math.log(2) * 3.7267, 1.08, 5))
    for theirs in str(tmp_path / "double.log"), str(ROOT / "logs" / "demo.txt"):
        text = compared([folders[0]], [theirs])
        assert "no test: not the same text, in millions of bytes: ours 151.08" in text
        assert ": yes: " not in text and ": no: " not in text
    assert "theirs 177.8" in compared([folders[0]], [str(tmp_path / "double.log")])


def test_one_run_is_no_test(folders):
    text = compared([f"{folders[0]}/train_seed0.log"], [folders[1]])
    assert "no test: ours is one run" in text and ": yes: " not in text


def test_a_folder_without_logs_has_its_seed_results(tmp_path):
    results = '{"seed_results": {"1": {"val_bpb": 1.05, "val_loss": 2.7}, "2": {"val_bpb": 1.07}}}'
    (tmp_path / "submission.json").write_text(results)
    side = compare.read_side([str(tmp_path)])
    assert side.bpbs == [1.05, 1.07] and side.losses == [2.7, None]


def test_nothing_to_compare_is_named(tmp_path):
    with pytest.raises(ValueError, match="no scores: neither logs nor seed_results"):
        compare.read_side([str(tmp_path)])
    (tmp_path / "a.log").write_text(LATER[: LATER.index("diagnostic")])
    with pytest.raises(ValueError, match="a.log: no score"):
        compare.read_side([str(tmp_path / "a.log")])
    with pytest.raises(OSError):
        compare.read_side(["none.log"])
