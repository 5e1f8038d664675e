"""The audit where it must stay silent, and what happens around it: budgets, ranks, an earlier run's submission."""

import json
import os
import re
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import TINY
from corpus import write_corpus

import train_gpt


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(**settings) -> the checks that a whole tiny run logged, and the error it ended with or None."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    settings = TINY | write_corpus(tmp_path / "data") | dict(run_id="run")

    def start(**changes):
        env = {name.upper(): str(value) for name, value in (settings | changes).items()}
        error = None
        with mock.patch.dict(os.environ, env):
            try:
                train_gpt.main()
            except RuntimeError as found:
                error = str(found)
            finally:
                train_gpt.log.handlers.clear()
        lines = re.findall(r"^audit: (\w+) (passed|FAILED) ", Path("logs/run.txt").read_text(), re.M)
        return {name: verdict == "passed" for name, verdict in lines}, error

    return start


def test_each_budget_is_its_own(run):
    """No limit for training is none for evaluation; without either any time will do."""
    assert run(max_wallclock_seconds=0, eval_seconds=1e-9)[1] == "audit failed: time; submission.json was not written"
    assert run(max_wallclock_seconds=0, eval_seconds=0) == (dict.fromkeys(run()[0], True), None)


def test_probes_are_laid_out_as_the_final_pass(run, monkeypatch):
    """What differs in its strides would be compiled anew: another graph than the one that made the score."""
    real, seen = train_gpt.scorer, []

    def spied(model):
        nats_of = real(model)

        def spy(x, y):
            seen.append((x.is_contiguous(), y.is_contiguous()))
            return nats_of(x, y)

        return spy

    monkeypatch.setattr(train_gpt, "scorer", spied)
    assert run()[1] is None
    assert set(seen) == {(True, True)}


def test_a_failed_run_leaves_no_submission_of_an_earlier_one(run):
    assert run()[1] is None and json.loads(Path("submission.json").read_text())["run_id"] == "run"
    assert run(eval_seconds=1e-9)[1] and not Path("submission.json").exists()


def test_scoring_alone_leaves_the_submission(run):
    run()
    before = Path("submission.json").read_bytes()
    assert run(eval_only=1)[1] is None
    assert Path("submission.json").read_bytes() == before


@pytest.mark.parametrize("name, value", [("layout", "A"), ("logit_softcap", 7.0), ("rope_base", 500.0)])
def test_the_model_is_the_artifacts(run, name, value):
    """What is logged as a hyperparameter is what was scored."""
    run()
    with pytest.raises(ValueError, match=f"{name.upper()}=.*as the artifact says"):
        run(eval_only=1, **{name: value})


def test_one_step_reaches_what_one_step_can(run):
    """Behind a projection that starts at zero there is no gradient in the first step."""
    checks, error = run(iterations=1)
    assert error is None and all(checks.values())


def test_no_probe_is_larger_than_a_batch_of_the_evaluation(run, monkeypatch):
    """Whatever the size of the vocabulary: its logits are what fills the memory."""
    sizes, token_nats = set(), train_gpt.token_nats

    def spy(model, x, y):
        sizes.add(x.numel())
        return token_nats(model, x, y)

    monkeypatch.setattr(train_gpt, "token_nats", spy)
    assert run()[1] is None and max(sizes) == TINY["val_batch_size"]


@pytest.mark.parametrize("rank", [0, 1])
def test_only_the_rank_that_packs_says_what_was_packed(tmp_path, monkeypatch, tiny, rank):
    """Another rank's quantization may differ from it in a bit."""
    hp = tiny(artifact=str(tmp_path / "model.ptz"))
    model = train_gpt.GPT(hp)
    batch = torch.randint(hp.vocab_size, (1, 2, 2, hp.train_seq_len))
    monkeypatch.setattr(train_gpt, "RANK", rank)
    monkeypatch.setattr(train_gpt, "validate", lambda *_: dict(val_bpb=1.0))
    hessians = train_gpt.collect_hessians(model, list(batch))
    shipped = train_gpt.pack(hp, model, None, hessians, train_gpt.Audit())["shipped"]
    if rank:
        assert shipped is None and not Path(hp.artifact).exists()
    else:
        assert shipped == train_gpt.fingerprint(train_gpt.load_artifact(hp.artifact, "cpu")[0])
