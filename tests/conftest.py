"""What all tests share: the program on the path, CPU arithmetic that repeats, tiny models.

Tests marked `cuda` run on the GPU and are skipped without one; all others run on the CPU, in
float32, also on a machine that has a GPU.
"""

import os
import signal
import sys
from pathlib import Path

# before torch: one thread for fixtures of any scope and for the processes that tests start; two
# that share a core wait for each other's threads, which makes them many times slower
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "systems")]

import train_gpt  # noqa: E402  (the paths come first)

# below nohup, or in the background of a script, signals are ignored, also by what tests start
for number, usual in {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGHUP: signal.SIG_DFL,
}.items():
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, usual)

TINY = dict(
    vocab_size=64,
    train_batch_tokens=256,
    train_seq_len=64,
    grad_accum_steps=1,
    layout="G2 S G S",
    model_dim=32,
    mlp_mult=2.0,
    gdn_heads=2,
    gdn_key_heads=1,
    gdn_head_dim=16,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    window_size=16,
    rope_dims=8,
    tied_embed_init_std=0.5,
    iterations=10,
    max_wallclock_seconds=0.0,
    gptq_reserve_seconds=0.0,
    warmup_steps=1,
    artifact_target_bytes=0,
    eval_mode="sliding",
    eval_seq_len=64,
    eval_stride=16,
    val_batch_size=256,
    eval_chunk=16,
    eval_rows=4,
    ttt="",
    ttt_lora_rank=4,
    ttt_lora_alpha=8.0,
    ttt_lora_lr=0.003,
)


def pytest_configure(config):
    config.addinivalue_line("markers", "cuda: needs a GPU, skipped without one")


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="no GPU"))


def pytest_terminal_summary(terminalreporter):
    """The lines that passed tests gave to record_property("summary", ...), in any process."""
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            if name == "summary":
                terminalreporter.write_line(value)


@pytest.fixture(autouse=True)
def reproducible(request, monkeypatch):
    """One thread and one seed for every test; the CPU path unless the test is marked `cuda`."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if not request.node.get_closest_marker("cuda"):
        monkeypatch.setattr(train_gpt.world, "device", torch.device("cpu"))
        monkeypatch.setattr(train_gpt.world, "dtype", torch.float32)


@pytest.fixture
def tiny():
    """tiny(**overrides) -> Hyperparameters of a model of some ten thousand parameters."""

    def make(**overrides):
        hp = train_gpt.Hyperparameters(**(TINY | overrides))
        hp.validate()
        return hp

    return make


@pytest.fixture
def lively():
    """lively(model) -> the model with noise on all weights: no zero or one hides anything."""

    def enliven(model):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.where(p == 0, 0.2, 0.1) * torch.randn_like(p))
        return model

    return enliven
