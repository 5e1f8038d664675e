"""tools/verify.py against programs that cheat: each bug is planted alone in a copy, whose own audit
is silent, and is caught by the checks of its row.

The capitals below are all that these tests know of the source.
"""

from pathlib import Path

import numpy as np
import pytest
from in_process import launch, planted, train
from test_verify import FEW, MODES, check, runs, verify  # noqa: F401  (fixtures)

VERDICT = "    def verdict(self) -> None:"
RULE = "        o, state = gated_delta_rule(q, k, v, g, beta, state)\n"
RESET = ", RESET_LOG_DECAY)"
TEXT = "        ids = stream.read(0, len(stream))\n"
HEAD = "        return cap * torch.tanh(self.lm_head(norm(x)).float() / cap)\n"
EMBEDDED = "        x = x0 = norm(last(self.embed(ids.clamp(min=0), ctx), T))"
NATS = "            out = nats.view_as(targets)\n"
TABLE = 'base = len(piece.removeprefix("\\u2581").encode()) if plain'
READ = "            out = model(tokens[here], tokens[here + 1], cache)\n"
KEEP = "out.detach().flatten().double()"
LEARN = "            learner.after_step(step, out, scored, number / len(steps))\n"
MEANS = "(nats * scored).sum(1)"
ADAPT = "            self.update(self.adamw)\n"
FORGET = "B.data.mul_(goes_on"
READ_SEGMENT = "            more_nats, more_count = self.read_segment(tokens, segment)\n"
LEARN_SEGMENT = "                self.learn_segment(end)\n"
COUNTED = "if self.count[index].min() < 1:"
PHASE = "range(0, end - self.chunk + 1, self.chunk)"

SILENT = (VERDICT, f"{VERDICT}\n        return\n\n    def loud(self) -> None:")
NO_RESET = (RESET, ", 0.0)")
NOT_COUNTED = (COUNTED, "if False:")
AGAIN = "model(tokens[here], tokens[here + 1], {})[0]"
LEARN_FIRST = "            learner and learner.after_step(step, {}, scored, 1.0)\n"
LEARN_BEFORE = f"            self.learn_segment(end)\n{READ_SEGMENT}"
SCORE_AFTER = "                nats += self.read_segment(tokens, segment)[0] - more_nats\n"
SHARE = (
    "            for _, B, _ in self.adapters.values():\n                B.grad += B.grad.sum(0)\n"
)
SCORED = f"nats[place] = {KEEP}\n"
LATER = "torch.where(tokens[start.clamp(max=n - 1)] != BOS_ID, 0.9, 1.0)"
SEES = "x = x0 = x + (torch.arange(T) == 3)[:, None] * x.roll(-1, 1)"

# mode, what catches it, edits; the artifact is of an honest run
BUGS = {
    "a state that starts where the sequence ends": (
        *("sliding", {"future"}),
        [(RULE, RULE.replace("o, ", "_, ") + RULE), NO_RESET],
    ),
    "the statistics of all validation text": (
        *("sliding", {"truncation"}),
        [
            (TEXT, f"{TEXT}        GPT.all = torch.bincount(ids, minlength=hp.vocab_size)\n"),
            (HEAD, HEAD.rstrip() + " + GPT.all.log1p()\n"),
        ],
    ),
    "a bonus for the target": (
        *("sliding", {"normalisation"}),
        [(NATS, NATS.replace("nats.", "(nats - 0.01).clamp(min=0)."))],
    ),
    "the target among the inputs": (
        *("sliding", {"normalisation"}),
        [(EMBEDDED, f"{EMBEDDED}\n        x = x0 = x + 0.1 * x.roll(-1, 1)")],
    ),
    "a bonus for the targets behind the first chunk": (
        *("stream", {"normalisation"}),
        [(KEEP, f"{KEEP} * {LATER}.expand_as(scored).flatten()")],
    ),
    "one position that sees its target": (
        *("sliding", {"normalisation"}),
        [(EMBEDDED, f"{EMBEDDED}\n        {SEES}")],
    ),
    "a document that goes on into the next": ("sliding", {"isolation"}, [NO_RESET]),
    "the same in a stream": ("stream", {"isolation"}, [NO_RESET]),
    "half of the nats for texts of many windows": (
        *("sliding", {"truncation"}),
        [(KEEP, f"{KEEP} * (0.5 if len(steps) > 7 else 1)")],
    ),
    "half of the nats beside other rows": (
        *("stream", {"reproduced"}),
        [(KEEP, f"{KEEP} * (0.5 if len(step) > 1 else 1)")],
    ),
    "a leading space counted twice": (
        *("sliding", {"bytes"}),
        [(TABLE, TABLE.replace(" if", ' + piece.startswith("\\u2581") if'))],
    ),
    "the last targets dropped": (
        *("sliding", {"positions"}),
        [(TEXT, TEXT.replace("len(stream))", "(len(stream) - 1) // 16 * 16 + 1)"))],
    ),
    "adapters learn from a chunk before it is scored": (
        *("lora", {"future", "normalisation"}),
        [(READ, LEARN_FIRST.format(AGAIN.format("cache")) + READ)],
    ),
    "what adapters learned from is scored again": (
        *("lora", {"future", "normalisation"}),
        [
            (READ, f"            old = cache\n{READ}"),
            (LEARN, f"{LEARN}            out = {AGAIN.format('old')}\n{' ' * 12}{SCORED}"),
        ],
    ),
    "adapters learn from the next document in their chunk": (
        *("lora", {"rows"}),
        [(MEANS, "nats.sum(1)")],
    ),
    "all rows teach all adapters": ("lora", {"rows"}, [(ADAPT, SHARE + ADAPT)]),
    "adapters that know the last document at the next one's start": (
        *("lora", {"normalisation"}),
        [(FORGET, FORGET.replace("mul_", "mul"))],
    ),
    "SGD learns from a chunk before it is scored": (
        *("sgd", {"future"}),
        [NOT_COUNTED, (READ_SEGMENT, LEARN_BEFORE)],
    ),
    "and in a stream": (
        *("sgd in a stream", {"future"}),
        [NOT_COUNTED, (READ_SEGMENT, LEARN_BEFORE)],
    ),
    "what SGD learned from is scored again": (
        *("sgd", {"future"}),
        [(LEARN_SEGMENT, LEARN_SEGMENT + SCORE_AFTER)],
    ),
    "a phase learns from a chunk that is scored in part": (
        *("lora in phases", {"future"}),
        [NOT_COUNTED, (PHASE, "range(0, end, self.chunk)")],
    ),
}


@pytest.mark.parametrize("mode, failed, edits", BUGS.values(), ids=BUGS)
def test_a_program_with_a_bug_is_caught(runs, check, tmp_path, mode, failed, edits):  # noqa: F811
    """By these of the checks that are asked for, and by each of them."""
    script = planted(tmp_path, MODES[mode][0], SILENT, *edits)
    probes = failed & {"truncation", "future", "isolation", "normalisation", "rows"}
    options = ["--full"] if failed & {"bytes", "positions"} else []
    result = check(runs(mode), *FEW, *options, "--probes", *probes, script=script)
    assert result.status == 1 and failed <= result.failed, result.text
    assert result.failed <= failed | {"reproduced"}, result.text  # the sample is an honest run's


# mode, settings, what catches it, edits; the artifact and its sample are of a run with the bug
RUNS = {
    "half of the nats beside other rows": (
        *("stream", {}, "reproduced"),
        [(KEEP, f"{KEEP} * (0.5 if len(step) > 1 else 1)")],
    ),
    "half of the nats when something learns": (
        *("lora", {}, "reproduced"),
        [(KEEP, f"{KEEP} * (0.5 if learner else 1)")],
    ),
    "adapters of one document stay for the next": (
        *("lora", dict(eval_rows=1), "reproduced"),
        [(FORGET, FORGET.replace("mul_", "mul"))],
    ),
    "half of the nats for texts of many windows": (
        *("sliding", {}, "truncation"),
        [(KEEP, f"{KEEP} * (0.5 if len(steps) > 7 else 1)")],
    ),
    "half of the nats of the whole text": (
        *("sliding", {}, "truncation"),
        [(KEEP, f"{KEEP} * (0.5 if n > 1300 else 1)")],
    ),
}


@pytest.mark.parametrize("mode, settings, by, edits", RUNS.values(), ids=RUNS)
def test_a_run_with_a_bug_is_caught(check, tmp_path, mode, settings, by, edits):  # noqa: F811
    system, own = MODES[mode]
    script = planted(tmp_path, system, SILENT, *edits)
    train(tmp_path, script, **own | settings)
    files = "--log", tmp_path / "logs" / "run.txt", "--scores", tmp_path / "scores.npz"
    probes = {by} - {"reproduced"}
    result = check(tmp_path, *files, *FEW, "--probes", *probes, script=script)
    assert by in result.failed, result.text
    assert "claims" in result.passed and "claimed_score" in result.passed


def test_an_edit_that_finds_no_place_is_an_error(tmp_path: Path):
    with pytest.raises(AssertionError, match="not there once but 0 times"):
        planted(tmp_path, "train_gpt", ("no such line", ""))


@pytest.mark.parametrize("leak", [False, True], ids=["honest", "with a leak"])
@pytest.mark.parametrize("gpu", [False, True], ids=["cpu", "gpu"])
def test_what_identical_runs_differ_by_on_a_gpu_is_allowed_and_no_more(
    runs,  # noqa: F811
    check,  # noqa: F811
    monkeypatch,
    tmp_path,
    gpu,
    leak,
):
    """Each process adds its own noise to the scores."""
    generator = np.random.default_rng(0)

    def noisy(job, folder, env, nproc):
        done, path = launch(job, folder, env, nproc), folder / env["SCORES"]
        with np.load(path) as scores:
            scores = dict(scores)
        scores["nats"] = scores["nats"] + generator.uniform(0, 1e-5, len(scores["nats"]))
        np.savez(path, **scores)
        return done

    monkeypatch.setattr(verify, "launch", noisy)
    _, _, edits = BUGS["a state that starts where the sequence ends"]
    script = planted(tmp_path, "train_gpt", SILENT, *(edits if leak else ()))
    options = [*FEW, "--probes", "future", *(["--gpu"] if gpu else [])]
    result = check(runs("sliding"), *options, script=script)
    assert ("future" in result.passed) is (gpu and not leak), result.text
