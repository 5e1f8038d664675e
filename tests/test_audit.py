"""What a run says of itself: its checks, its last line, the sample it leaves; and when it fails."""

import hashlib
import itertools
import json
import os
import re
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import kv_share
import numpy as np
import pytest
import torch
from conftest import TINY
from corpus import BOS, load, prose, tokenizer_model, write_corpus, write_shard

import train_gpt

AT_START = ["bytes"]
OF_TRAINING = ["warm_up", "gradients"]
AT_END = ["once", "ledger", "size", "time"]


def run_main(system=train_gpt, **settings) -> SimpleNamespace:
    """A whole run in this folder: the error it ended with or None, its log, its figures or None."""
    settings = dict(run_id="run", artifact="model.ptz") | settings
    env = {name.upper(): str(value) for name, value in settings.items()}
    error = None
    with mock.patch.dict(os.environ, env):
        try:
            train_gpt.main(system.Hyperparameters, system.GPT)
        except train_gpt.Refused as found:
            failed = re.findall(r"^audit failed: (\w+) \{", str(found), re.M)
            if not failed:
                raise
            error = f"audit failed: {', '.join(failed)}"
        finally:
            train_gpt.log.handlers.clear()
    log = Path("logs/run.txt").read_text().rpartition("=" * 100 + "\n")[2]
    last = log.splitlines()[-1]
    figures = json.loads(last.removeprefix("figures: ")) if last.startswith("figures: ") else None
    return SimpleNamespace(error=error, log=log, figures=figures)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(**settings) -> run_main of a tiny run on a small text."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    settings = TINY | write_corpus(tmp_path / "data")
    return lambda **changes: run_main(**settings | changes)


def refuse(text: str):
    raise ValueError(f"{text} is no JSON")


# -----------------------------------------------------------------------------
# checks and figures


def test_every_check_is_logged_with_its_figures(run):
    result = run()
    lines = re.findall(r"^audit: (\w+) (passed|FAILED) (.*)$", result.log, re.M)
    assert result.error is None
    assert [name for name, _, _ in lines] == AT_START + OF_TRAINING + AT_END
    for name, verdict, figures in lines:
        assert verdict == "passed"
        assert json.loads(figures) | {"passed": True} == result.figures["checks"][name]
    assert [*result.figures["checks"]] == [name for name, _, _ in lines]


def test_the_last_line_is_json_with_all_figures(run):
    figures = run(layout="G S", seed=5).figures
    line = Path("logs/run.txt").read_text().splitlines()[-1]
    strict = json.loads(line.removeprefix("figures: "), parse_constant=refuse)
    assert strict == figures
    text = np.fromfile("data/fineweb_val_000000.bin", "<u2", offset=1024)
    sizes = dict(bytes_code=figures["bytes_code"], bytes_model=os.path.getsize("model.ptz"))
    expected = sizes | dict(
        run_id="run",
        system="record",
        preset="record",
        layout="G S",
        seed=5,
        hardware="1xCPU",
        pytorch_version=torch.__version__,
        data_path=str(Path("data").resolve()),
        documents=int((text == BOS).sum()),
        bytes=figures["checks"]["bytes"]["decoded"],
        official=False,
        artifact_sha256=hashlib.sha256(Path("model.ptz").read_bytes()).hexdigest(),
        step_stop=10,
        trained_order=[0, 1],
        scored_order=[0, 1],
        tokens_needed=(10 + 2) * 256,
        tokens_read=(10 + 2) * 256,
        bytes_total=sum(sizes.values()),
    )
    assert {name: figures[name] for name in expected} == expected
    measured = "val_bpb val_loss raw_val_bpb pre_quant_val_bpb wallclock_seconds last_read_seconds "
    measured = (measured + "eval_time_seconds lr_multiplier_at_stop").split()
    assert all(figures[name] > 0 and isinstance(figures[name], float) for name in measured)
    assert figures.keys() == expected.keys() | {*measured, "checks"}
    assert 0 < figures["last_read_seconds"] <= figures["wallclock_seconds"]


def test_figures_are_those_of_the_lines_above(run):
    result = run()
    exact = re.findall(r"_exact val_loss:(\S+) val_bpb:(\S+)$", result.log, re.M)
    assert exact == [(f"{result.figures['val_loss']:.8f}", f"{result.figures['val_bpb']:.8f}")]
    for name, label in (
        ("raw_val_bpb", r"step:10/10"),
        ("pre_quant_val_bpb", r"diagnostic pre-quantization post-ema"),
    ):
        (bpb,) = re.findall(rf"^{label} val_loss:\S+ val_bpb:(\S+) ", result.log, re.M)
        assert bpb == f"{result.figures[name]:.4f}"
    seconds = result.figures["wallclock_seconds"], result.figures["last_read_seconds"]
    milliseconds = re.findall(r"^train\+hessians:(\d+)ms last_read:(-?\d+)ms", result.log, re.M)
    assert np.allclose(1000 * np.array(seconds), np.array(milliseconds, float), atol=1)


def test_scoring_alone_has_no_figures_of_training(run):
    trained = run()
    scored = run(eval_only=1)
    assert scored.error is None and [*scored.figures["checks"]] == AT_START + AT_END
    gone = "raw_val_bpb pre_quant_val_bpb step_stop wallclock_seconds last_read_seconds "
    gone += "tokens_read tokens_needed lr_multiplier_at_stop trained_order"
    assert scored.figures.keys() == trained.figures.keys() - {*gone.split()}
    for name in ("val_bpb", "val_loss", "bytes_total", "layout", "seed", "documents", "bytes"):
        assert scored.figures[name] == trained.figures[name]


# -----------------------------------------------------------------------------
# failures


def test_each_budget_is_its_own(run):
    """No limit for training is none for evaluation; without either any time will do."""
    failed = run(max_wallclock_seconds=0, eval_seconds=1e-9)
    assert failed.error == "audit failed: time"
    passed = run(max_wallclock_seconds=0, eval_seconds=0)
    assert passed.error is None and all(c["passed"] for c in passed.figures["checks"].values())
    late = run(max_wallclock_seconds=1e-9, eval_seconds=0)
    assert "time" in late.error and late.figures["checks"]["time"]["passed"] is False


def test_a_failed_check_leaves_its_figures_and_an_error_that_names_it(run):
    def pack_once(hp, model, hessians) -> None:  # `fit` would not end over the cap
        quantized = train_gpt.quantize(model, hessians, hp.rounding_step)
        train_gpt.save_artifact(hp.artifact, model, hp, quantized)

    with mock.patch.multiple(train_gpt, SIZE_LIMIT=1000, fit=pack_once):
        failed = run(eval_seconds=1e-9)
    assert failed.error == "audit failed: size, time"
    checks = failed.figures["checks"]
    assert [name for name in checks if not checks[name]["passed"]] == ["size", "time"]
    assert re.findall(r"^audit: (\w+) FAILED \{", failed.log, re.M) == ["size", "time"]
    passed = run(eval_seconds=0, max_wallclock_seconds=0)
    assert passed.figures.keys() == failed.figures.keys()
    assert passed.figures["val_bpb"] == failed.figures["val_bpb"]


def test_wrong_inputs_end_the_run_before_training(run, monkeypatch):
    real = train_gpt.token_bytes
    monkeypatch.setattr(train_gpt, "token_bytes", lambda *ids: 2 * real(*ids))
    failed = run()
    assert failed.error == "audit failed: bytes" and failed.figures is None
    assert "warmup_step:" not in failed.log and not Path("model.ptz").exists()


def test_one_failure_is_enough_and_every_failure_is_named():
    audit = train_gpt.Audit()
    audit.verdict()
    audit.check("first", True)
    audit.check("second", False, figure=1)
    audit.check("third", True)
    audit.check("fourth", np.bool_(False))
    with pytest.raises(
        train_gpt.Refused, match=r"^audit failed: second .*1\}\naudit failed: fourth"
    ):
        audit.verdict()
    assert audit.checks["second"]["figure"] == 1
    assert [audit.checks[name]["passed"] for name in audit.checks] == [True, False, True, False]


@pytest.mark.parametrize(
    "name, value", [("layout", "A"), ("logit_softcap", 7.0), ("rope_base", 500.0), ("matrix_lr", 1)]
)
def test_the_model_is_the_artifacts(run, name, value):
    """What is logged as a hyperparameter is what was scored."""
    run()
    with pytest.raises(ValueError, match=f"{name.upper()}=.*artifact"):
        run(eval_only=1, **{name: value})


def test_an_artifact_may_be_scored_in_another_way(run):
    run()
    changed = dict(eval_mode="stream", ttt="lora", eval_rows=2, ttt_lora_rank=2, eval_chunk=8)
    result = run(eval_only=1, **changed)
    assert result.error is None
    for name, value in changed.items():
        assert f"\n  {name}: {value}\n" in result.log
    other = run(eval_only=1, eval_stride=8, eval_seq_len=32)
    assert other.error is None and other.figures["val_bpb"] != result.figures["val_bpb"]


def test_full_attention_sees_as_far_as_scoring_is_told(run):
    """Whatever it was told while it was trained, which is the same in both."""
    settings = dict(layout="A", eval_mode="stream", eval_chunk=8, eval_stride=8)
    far, near = (run(**settings, eval_seq_len=n).figures["val_bpb"] for n in (64, 8))
    assert run(**settings, eval_only=1, eval_seq_len=64).figures["val_bpb"] == far != near


def test_an_artifact_of_another_system_is_refused(run):
    run()
    with pytest.raises(ValueError, match="model.ptz: .*system is record, not kv_share"):
        run(system=kv_share, eval_only=1, layout="G2")


# -----------------------------------------------------------------------------
# budgets, by a clock that moves only where the tests say


class Clock:
    """Seconds that pass in each part of a run: a step, the Hessians, scoring the text."""

    def __init__(self, monkeypatch, steps, hessians: float, scoring: float):
        self.now = 1000.0
        monkeypatch.setattr(train_gpt, "time", SimpleNamespace(perf_counter=lambda: self.now))
        self.slow(monkeypatch, "accumulate", steps)
        self.slow(monkeypatch, "collect_hessians", itertools.repeat(hessians))
        self.slow(monkeypatch, "score", itertools.repeat(scoring))

    def slow(self, monkeypatch, name: str, seconds) -> None:
        real = getattr(train_gpt, name)

        def slowed(*arguments, **more):
            self.now += next(seconds)
            return real(*arguments, **more)

        monkeypatch.setattr(train_gpt, name, slowed)


def stop_of(steps, budget: float) -> tuple[int, float, float]:
    """Steps until the longest of the last ten would no longer fit, the seconds they took, and when
    the last one began."""
    ends = [0.0]
    while ends[-1] + max(steps[max(0, len(ends) - 11) : len(ends) - 1], default=0.0) <= budget:
        ends.append(ends[-1] + steps[len(ends) - 1])
    return len(ends) - 1, ends[-1], ends[-2]


@pytest.mark.parametrize("slow", [0, 12, 28, 29, 41], ids="slow_step_{}".format)
def test_training_stops_where_the_next_step_may_not_fit(run, monkeypatch, slow):
    """Neither warm-up nor validation counts; the learning rate ends where the clock does."""
    steps = [1.0] * 100
    steps[slow] = 4.0
    clock = itertools.chain([50.0], steps)  # the warm-up first
    Clock(monkeypatch, clock, hessians=2.5, scoring=100.0)
    budget = dict(max_wallclock_seconds=48.0, gptq_reserve_seconds=3.0, iterations=1000)
    result = run(val_loss_every=7, **budget)
    count, seconds, begun = stop_of(steps, budget=45.0)
    assert result.error is None and result.figures["step_stop"] == count
    stop = re.findall(r"^stopping_early: .*train_time:(\d+)ms.* step:(\d+)", result.log, re.M)
    assert stop == [(f"{1000 * seconds:.0f}", str(count))]
    assert result.figures["wallclock_seconds"] == pytest.approx(seconds + 2.5)
    assert result.figures["last_read_seconds"] <= seconds
    assert result.figures["eval_time_seconds"] == 100.0
    lr = result.figures["lr_multiplier_at_stop"]
    assert lr == pytest.approx(max(0.1, (1 - begun / 45.0) / 0.75))


@pytest.mark.parametrize("hessians, scoring", [(3.0, 100.0), (3.1, 100.0), (3.0, 100.1)])
def test_both_budgets_hold_to_the_end(run, monkeypatch, hessians, scoring):
    Clock(monkeypatch, itertools.repeat(1.0), hessians, scoring)
    budget = dict(max_wallclock_seconds=23.0, gptq_reserve_seconds=3.0, iterations=1000)
    result = run(**budget, eval_seconds=100.0)
    assert (result.error is None) == (hessians == 3.0 and scoring == 100.0)
    assert result.error in (None, "audit failed: time")
    assert result.figures["step_stop"] == 20


# -----------------------------------------------------------------------------
# forwards


def test_one_step_reaches_what_one_step_can(run):
    """Behind a projection that starts at zero there is no gradient in the first step."""
    result = run(iterations=1)
    assert result.error is None and result.figures["checks"]["gradients"]["never_reached"] > 0
    assert run(iterations=2).figures["checks"]["gradients"]["never_reached"] == 0


@pytest.mark.parametrize("mode", ["sliding", "stream"])
def test_no_forward_is_larger_than_a_batch_of_the_evaluation(run, monkeypatch, mode):
    """Nor laid out otherwise: what differs in shape or strides is compiled anew, into another graph
    than the one that made the score."""
    seen, forward = set(), train_gpt.GPT.forward

    def spy(model, x, y=None, cache=None):
        if y is not None and not torch.is_grad_enabled():
            seen.add((x.numel(), x.is_contiguous(), y.is_contiguous()))
        return forward(model, x, y, cache)

    monkeypatch.setattr(train_gpt.GPT, "forward", spy)
    assert run(eval_mode=mode, train_batch_tokens=128, eval_rows=8, eval_chunk=40).error is None
    windows, stream = (TINY["val_batch_size"], True, True), (8 * 40, True, True)
    assert seen == ({windows, stream} if mode == "stream" else {windows})


# -----------------------------------------------------------------------------
# the sample


@pytest.fixture(scope="module")
def long_text(tmp_path_factory) -> dict:
    """Settings for a text of more than 16,384 tokens, cut inside its last document."""
    folder = tmp_path_factory.mktemp("long")
    settings = write_corpus(folder, train_tokens=3000)
    sp, ids = load(tokenizer_model()), []
    for text in prose()[::-1]:
        ids += [BOS, *sp.encode(text)]
    assert len(ids) > 17_500
    write_shard(folder / "fineweb_val_000000.bin", ids[:17_500])
    return TINY | settings | dict(iterations=2, eval_stride=48, eval_chunk=128, eval_rows=8)


def text_of(settings) -> np.ndarray:
    return np.fromfile(Path(settings["data_path"]) / "fineweb_val_000000.bin", "<u2", offset=1024)


def sample_end(tokens: np.ndarray) -> int:
    """Tokens of the first whole documents that together have at most 16,384."""
    ends = [*np.flatnonzero(tokens == BOS)[1:].tolist(), len(tokens)]
    return max([end for end in ends if end <= 16_384], default=ends[0])


def arrays(path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return dict(file)


def truncated(settings: dict, end: int, folder: Path) -> dict:
    """Settings for the first `end` tokens of the text."""
    folder.mkdir()
    write_shard(folder / "fineweb_val_000000.bin", text_of(settings)[:end])
    return settings | dict(data_path=str(folder))


MODES = {  # system, settings, whether it learns
    "sliding": (train_gpt, dict(eval_mode="sliding"), False),
    "stream": (train_gpt, dict(eval_mode="stream"), False),
    "stream and adapters": (train_gpt, dict(eval_mode="stream", ttt="lora"), True),
    "sliding and SGD": (
        kv_share,
        dict(layout="G2", ngram_vocab_size=64, ngram_dim=8, ttt="sgd", ttt_chunk_tokens=4096),
        True,
    ),
}


@pytest.mark.parametrize("mode", MODES)
def test_the_sample_is_the_first_whole_documents_learned_and_not(
    long_text, tmp_path, monkeypatch, mode
):
    """The second as by a run that reads just these tokens and learns nothing, to the bit."""
    monkeypatch.chdir(tmp_path)
    system, how, learns = MODES[mode]
    settings = long_text | how
    assert run_main(system, **settings, scores="scores.npz", artifact="a/b.int6.ptz").error is None
    scores, sample = arrays("scores.npz"), arrays("a/b.int6.ptz.sample.npz")
    assert set(sample) == {"nats", "unlearned", "bytes", "position", "device", "artifact"}
    assert sample["artifact"] == hashlib.sha256(Path("a/b.int6.ptz").read_bytes()).hexdigest()
    end = sample_end(text_of(settings))
    assert 16_000 < end <= 16_384 < len(text_of(settings))
    for name, kind in ("nats", "f8"), ("unlearned", "f8"), ("bytes", "i"), ("position", "i"):
        assert sample[name].dtype.str[1:].startswith(kind) and sample[name].shape == (end - 1,)
    assert sample["position"].tolist() == [*range(1, end)]
    for name in ("nats", "bytes", "position"):
        assert np.array_equal(sample[name], scores[name][: end - 1])
    assert str(sample["device"]) == "cpu"
    if learns:
        assert np.abs(sample["nats"] - sample["unlearned"]).max() > 1e-4
    else:
        assert np.array_equal(sample["nats"], sample["unlearned"])

    short = truncated(settings, end, tmp_path / "short") | dict(ttt="", scores="short.npz")
    again = run_main(system, **short, eval_only=1, artifact="a/b.int6.ptz")
    assert again.error is None
    own, window, stride = arrays("short.npz")["nats"], settings["eval_seq_len"], 48
    n = end - 1
    if mode == "sliding":  # there the last window of the text that goes on ends elsewhere
        n = window + (n - window) // stride * stride
    assert np.array_equal(own[:n], sample["unlearned"][:n]) and n > 16_000


@pytest.mark.parametrize(
    "sizes, expected",
    [
        ([16_383, 1, 5], 16_384),
        ([16_384, 1], 16_384),
        ([16_000, 385], 16_000),
        ([16_385, 10, 10], 16_385),
        ([3, 4, 5], 12),
        ([7], 7),
        ([1, 16_400], 2),  # the first is empty: its end is a target
    ],
)
def test_the_sample_ends_with_a_document(tmp_path, monkeypatch, tiny, sizes, expected):
    """The first is in it, whole, however long; the BOS behind the last one is no target of it."""
    monkeypatch.chdir(tmp_path)
    tokens = torch.cat([torch.tensor([BOS] + [5] * (size - 1)) for size in sizes])
    hp = tiny(artifact="model.ptz")
    nats = torch.rand(len(tokens) - 1, dtype=torch.float64)
    validation = SimpleNamespace(
        tokens=tokens,
        starts=np.flatnonzero(tokens.numpy() == BOS),
        target_bytes=torch.ones(len(nats), dtype=torch.int32),
    )
    Path("model.ptz").touch()
    train_gpt.write_scores(hp, None, validation, nats)
    sample = arrays("model.ptz.sample.npz")
    assert np.array_equal(sample["nats"], nats.numpy()[: expected - 1])


def test_the_sample_is_written_by_every_run(run):
    """And only the score file has to be asked for."""
    how = dict(eval_mode="stream", ttt="lora")
    run(**how)
    first = arrays("model.ptz.sample.npz")
    Path("model.ptz.sample.npz").unlink()
    run(eval_only=1, **how)
    again = arrays("model.ptz.sample.npz")
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert sorted(path.suffix for path in Path().glob("[!.]*.*")) == [".npz", ".pt", ".ptz"]
    assert {f.name for f in fields(train_gpt.Hyperparameters)} >= {"scores", "artifact"}
