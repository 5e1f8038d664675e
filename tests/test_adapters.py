"""tools/adapters.py: each way of learning against one row after the other, written out."""

import sys
from types import SimpleNamespace

import learning
import pytest
import torch
from conftest import ROOT
from in_process import train
from learning import MODES, TEXT, SlowRow, learn_row_by_row
from streams import all_in_float64, text_of
from test_ttt_lora import matrices_of, score_and_look

import train_gpt as t

sys.path.append(str(ROOT / "tools"))
import adapters  # noqa: E402  (the path comes first)

import logs  # noqa: E402

MODE = MODES["stream_lora"]
LORA = "ttt_lora_lr", "ttt_lora_rank", "ttt_lora_alpha"


@pytest.fixture
def exact(monkeypatch):
    yield from all_in_float64(monkeypatch)


class SlowTwice(SlowRow):
    def read(self, x, y, cache):
        nats, after = super().read(x, y, cache)
        super().read(x, y, cache)
        return nats, after

    def update(self, grads):
        super().update(grads)
        if not grads:  # a step in which this row has nothing to read: the others make two
            super().update(grads)


class SlowCold(SlowRow):
    def __init__(self, model, hp, A):
        super().__init__(model, hp, A)
        self.first = A

    def forget(self):
        super().forget()
        self.squares = {key: torch.zeros_like(p) for key, p in self.squares.items()}
        self.params |= {(name, "A"): A.clone() for name, A in self.first.items()}


@pytest.mark.parametrize(
    "learner, slow", [(adapters.TwiceTTT, SlowTwice), (adapters.ColdTTT, SlowCold)]
)
@pytest.mark.parametrize("rows", [1, 4])
def test_a_way_is_a_row_of_documents_after_the_other(
    lively, exact, monkeypatch, learner, slow, rows
):
    hp, tokens = MODE.small(eval_rows=rows), text_of(*TEXT)
    model = lively(t.GPT(hp))

    def scored_by(learner):
        def score(model, tokens, hp):
            return learner(model, hp).score(tokens, t.final_plan(tokens, hp))

        return score_and_look(model, tokens, hp, SimpleNamespace(score=score))

    nats, _, found = scored_by(learner)
    monkeypatch.setattr(learning, "SlowRow", slow)
    expected, _ = learn_row_by_row(model, tokens, hp, [matrices_of(found)])
    torch.testing.assert_close(nats, expected, rtol=0, atol=1e-6)
    assert (nats - scored_by(t.LoraTTT)[0]).abs().max() > 1e-3


class SlowOrthogonal(learning.SlowSGD):
    """Matrices by their singular values, which polar_express moves to 1."""

    def direction(self, grad):
        if grad.ndim != 2:
            return grad
        U, S, V = torch.linalg.svd(grad, full_matrices=False)
        return U @ torch.diag(by_polar_express(S)) @ V


def by_polar_express(S: torch.Tensor) -> torch.Tensor:
    x = S / S.square().sum().sqrt().clamp(min=1e-7)
    for a, b, c in t.POLAR_EXPRESS:
        x = a * x + b * x**3 + c * x**5
    return x


PHASES = [
    (adapters.SgdPhases, learning.SlowSGD, False),
    (adapters.OrthogonalPhases, SlowOrthogonal, False),
    (adapters.OrthogonalPhasedTTT, SlowOrthogonal, True),
]


@pytest.mark.parametrize("learner, slow, adapt", PHASES)
def test_phases_are_steps_on_all_that_is_scored(lively, exact, monkeypatch, learner, slow, adapt):
    mode = MODES["stream_lora_phases"]
    hp, tokens = mode.small(ttt_phases=2), text_of(*TEXT)
    model = lively(mode.new_model(hp))
    names = {m: name for name, m in model.named_modules()}
    A = {names[m]: A for m, (A, _, _) in t.LoraTTT(model, hp).new_adapters(hp.eval_rows).items()}

    nats, _ = learner(model, hp).score(tokens, t.final_plan(tokens, hp))
    monkeypatch.setattr(learning, "SlowSGD", slow)
    hp.ttt_lora_lr *= adapt
    expected, steps = learn_row_by_row(model, tokens, hp, [A])
    assert steps > 3
    torch.testing.assert_close(nats, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("learner", [adapters.MlpTTT, adapters.MixerTTT])
def test_only_a_part_learns(lively, learner):
    hp = MODE.small()
    model = lively(t.GPT(hp))
    linears = {m: name for name, m in model.named_modules() if isinstance(m, t.Linear)}
    found = {linears[linear] for linear in learner(model, hp).new_adapters(2)}
    assert found == {name for name in linears.values() if learner.part in name}
    assert 3 < len(found) < len(linears)


def test_steps_of_one_size_move_an_output_as_far_whatever_rank_alpha_and_width():
    """The first step of AdamW, on inputs of unit size, where all gradients agree."""
    moved = []
    for rank, alpha, width in (4, 144.0, 64), (64, 144.0, 64), (16, 16.0, 64), (16, 16.0, 512):
        hp = t.Hyperparameters(run_id="run", ttt_lora_rank=rank, ttt_lora_alpha=alpha)
        hp.ttt_lora_lr = adapters.STEP / alpha
        layer = t.Linear(width, 8)
        torch.nn.init.zeros_(layer.weight)
        learner = t.LoraTTT(torch.nn.Sequential(layer), hp)
        [(linear, (A, B, scale))] = learner.new_adapters(64).items()
        x = torch.randn(64, 1, width)
        linear.lora = A, B, scale
        linear(x).sum().backward()
        torch.optim.AdamW([B], hp.ttt_lora_lr, betas=(0.0, 0.99), eps=1e-10).step()
        moved.append(linear(x).abs().mean().item() / adapters.STEP)
    assert all(0.4 < share < 0.6 for share in moved), moved


@pytest.mark.parametrize("options, ways", [([], "WAYS"), (["--phases"], "PHASES")])
def test_every_way_is_scored(tmp_path, monkeypatch, capsys, options, ways):
    """The record's as the record's own final pass, and no two alike."""
    ways = getattr(adapters, ways)
    own = t.Hyperparameters(run_id="run")
    settings = dict(eval_mode="stream", ttt="lora", eval_seconds=0, eval_chunk=64, eval_rows=2)
    settings |= {name: getattr(own, name) for name in LORA}
    train(tmp_path, ROOT / "train_gpt.py", run_id="run", **settings)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["adapters.py", *options, "model.ptz"])
    for name in t.Hyperparameters.__dataclass_fields__:
        monkeypatch.delenv(name.upper(), raising=False)
    assert adapters.main() == 0
    _, name, plain, *rows = capsys.readouterr().out.splitlines()
    assert name == "model.ptz" and len(rows) == len(ways)
    figures = logs.read_runs(tmp_path / "logs" / "run.txt")[0].figures
    if "as the record" in ways:
        assert float(rows[0].split()[-3]) == pytest.approx(figures["val_bpb"], abs=6e-6)
    before = float(plain.split()[-3])
    for way, row in zip(ways, rows, strict=True):
        label, bpb, gain, times = row.rsplit(maxsplit=3)
        assert label.strip() == way and float(times) > 0
        assert before - float(bpb) == pytest.approx(float(gain), abs=2e-5)
    assert len({row.split()[-3] for row in rows}) == len(rows)


@pytest.mark.parametrize("content", [None, b"nothing"])
def test_what_cannot_be_read_is_one_line(tmp_path, monkeypatch, content):
    path = tmp_path / "some.ptz"
    if content:
        path.write_bytes(content)
    monkeypatch.setattr(sys, "argv", ["adapters.py", str(path)])
    said = adapters.main()
    assert said.startswith("adapters: error: ") and "some.ptz" in said
