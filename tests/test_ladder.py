"""tools/ladder.py and the candidates of tools/variants.py."""

import json
import os
import sys
from dataclasses import asdict
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import toys
from conftest import ROOT
from corpus import write_corpus
from test_resumable import as_before

import train_gpt as t

sys.path.insert(0, str(ROOT / "tools"))
import forecast  # noqa: E402  (the path comes first)
import ladder  # noqa: E402
import variants  # noqa: E402

SHAPE = dict(vocab_size=64, model_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, rope_dims=4)
SHAPE |= dict(gdn_heads=4, gdn_head_dim=8, window_size=6, train_seq_len=64, mlp_mult=1.0)
EVERYONE = [*ladder.LAYOUTS, *(f"G5 S G5 S=5 + {name}" for name in ladder.CHANGES)]


def model_of(candidate: str, lively):
    own = {k: v for k, v in ladder.overrides(candidate).items() if k != "window_size"}
    return lively(variants.GPT(variants.Hyperparameters(**SHAPE | own)))


def test_without_switches_it_is_the_record(lively):
    ours, record = (m.Hyperparameters(**SHAPE, run_id="run") for m in (variants, t))
    known = asdict(record)
    assert {name: value for name, value in asdict(ours).items() if name in known} == known
    a, b = variants.GPT(ours), t.GPT(record)
    assert a.kinds == b.kinds
    lively(b)
    a.load_state_dict(b.state_dict())
    ids = torch.randint(2, 64, (2, 40))
    assert torch.equal(a(ids), b(ids))


@pytest.mark.parametrize("even", [True, False])
def test_decays_start_evenly_or_at_random(even):
    """At random as fla's: A uniform from 1 to 16, dt log-uniform from 1e-3 to 1e-1."""
    torch.manual_seed(1)
    own = dict(layout="G6", gdn_heads=16, gdn_head_dim=2, even_decays=even)
    mixers = [b.mixer for b in variants.GPT(variants.Hyperparameters(**SHAPE | own)).blocks]
    A = torch.stack([m.A_log for m in mixers]).exp()
    dt = torch.nn.functional.softplus(torch.stack([m.dt_bias for m in mixers]))
    assert 0.99 < A.min() < 2 and 15 < A.max() < 16.01 and abs(A.mean() - 8.5) < 1
    assert 0.99e-3 < dt.min() < 2e-3 and 5e-2 < dt.max() < 0.101
    assert abs(dt.log10().mean() + 2) < 0.2
    assert (A.diff() > 0).all() == (dt.diff() > 0).all() == even


@pytest.mark.parametrize("candidate", EVERYONE)
def test_no_candidate_sees_what_comes_later_or_another_document(candidate, lively):
    model = model_of(candidate, lively)
    ids = torch.randint(2, 64, (1, 30))
    ids[:, 12] = t.BOS_ID
    before = model(ids)
    later, earlier = ids.clone(), ids.clone()
    later[:, 20:] = (ids[:, 20:] - 2 + 7) % 62 + 2
    earlier[:, :12] = (ids[:, :12] - 2 + 7) % 62 + 2
    assert torch.allclose(model(later)[:, :20], before[:, :20], atol=1e-5)
    assert torch.allclose(model(earlier)[:, 12:], before[:, 12:], atol=1e-4)
    assert not torch.allclose(model(later)[:, 20:], before[:, 20:], atol=1e-3)


@pytest.mark.parametrize("candidate", EVERYONE)
def test_every_parameter_of_a_candidate_learns(candidate, lively):
    model = model_of(candidate, lively)
    ids = torch.randint(2, 64, (2, 30))
    model(ids[:, :-1], ids[:, 1:]).mean().backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not dead


def test_shared_keys_are_keys_repeated(lively):
    grouped = model_of("G5 S G5 S=5 + grouped heads", lively)
    hp = variants.Hyperparameters(**SHAPE | ladder.SHARED | ladder.NARROW)
    plain, state = variants.GPT(hp), grouped.state_dict()
    for name, value in state.items():
        if ".mixer.q_" in name or ".mixer.k_" in name:
            if value.shape != plain.state_dict()[name].shape:  # of Gated DeltaNet: one head of 8
                state[name] = torch.cat((value, value))
    plain.load_state_dict(state)
    ids = torch.randint(2, 64, (2, 40))
    assert torch.allclose(grouped(ids), plain(ids), atol=1e-5)


@pytest.mark.parametrize("T, window", [(64, 16), (50, 16), (7, 16), (33, 1)])
def test_attention_in_blocks_is_attention(T, window):
    q = torch.randn(2, T, 4, 8, dtype=torch.double, requires_grad=True)
    k, v = (torch.randn(2, T, 2, 8, dtype=torch.double, requires_grad=True) for _ in range(2))
    doc = (torch.rand(2, T) < 0.1).cumsum(1)
    results = []
    for attend in (t.masked_window_attention, variants.blocked_window_attention):
        y = attend(q, k, v, window, doc, T)
        results.append((y, *torch.autograd.grad(y.square().sum(), (q, k, v))))
    for expected, found in zip(*results, strict=True):
        assert torch.allclose(expected, found, atol=1e-10)


# --------------------------------------------------------------------------------------------------
# Bytes


@pytest.mark.parametrize("candidate", [*ladder.LAYOUTS, ladder.TRANSFORMER])
def test_candidates_have_equal_bytes(candidate):
    hp, module = ladder.toy_of(candidate), ladder.module_of(candidate)
    used = sum(ladder.bench.estimated_bytes(hp, module)) / ladder.target_bytes()
    assert 0.998 < used <= 1.0
    parameters = sum(p.numel() for p in module.GPT(hp).parameters())
    assert 1.9e6 < parameters < 2.3e6  # 3.3 bits each, embeddings 4.1


def test_bytes_are_those_of_the_artifact(tmp_path):
    """Of weights that are normal: shares and settings are a little more than the entropy."""
    hp = ladder.toy_of("G2 S8 G, grouped")
    model = variants.GPT(hp)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    size = t.save_artifact(tmp_path / "toy.ptz", model, hp, toys.usual(model))
    assert 0.99 < size / ladder.target_bytes() < 1.03


def test_what_has_no_room_is_refused(monkeypatch):
    monkeypatch.setitem(ladder.LAYOUTS, "too many", dict(layout="G40"))
    with pytest.raises(ValueError, match="too many: no room for an MLP"):
        ladder.toy_of("too many")


@pytest.mark.parametrize("candidate", [*EVERYONE, ladder.TRANSFORMER])
def test_a_run_gets_the_settings_of_its_candidate(candidate):
    run, module = ladder.Run(candidate, 614_400, 7), ladder.module_of(candidate)
    found = asdict(module.Hyperparameters.from_env(ladder.settings_of(run)))
    code = found.pop("artifact_target_bytes") - round(ladder.target_bytes())  # all have as much
    assert code == sum(path.stat().st_size for path in t.code_files())
    of_the_run = dict(run_id=run.name(), artifact=f"{run.name()}.ptz", seed=7, iterations=150)
    wanted = asdict(ladder.toy_of(candidate)) | of_the_run
    assert found == {key: wanted[key] for key in found} and len(wanted) == len(found) + 1


@pytest.mark.parametrize("name", ["G40", "G11 + nothing", "transformer + G11", ""])
def test_what_is_no_candidate_is_one_line(name, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ladder.py", "one", name, "4096", "1"])
    for path in ladder.PATHS:
        monkeypatch.setenv(path.upper(), "any")
    assert (
        ladder.main() == f"ladder: error: {name}: no name of LAYOUTS, with + and names of CHANGES"
    )


def test_no_two_candidates_share_files():
    everyone = [*EVERYONE, ladder.TRANSFORMER]
    assert len({ladder.Run(name, 1, 1).name() for name in everyone}) == len(everyone)


# --------------------------------------------------------------------------------------------------
# The climb


def climbed(scores) -> list[ladder.Run]:
    """All runs in their order, where a candidate gets scores(run)."""
    found, order = {}, []
    while missing := ladder.next_runs(found):
        order += missing
        found |= {run: dict(pre_quant_val_bpb=scores(run)) for run in missing}
    return order


def test_the_climb_takes_the_best_and_their_changes():
    quality = {name: 2 + i for i, name in enumerate(reversed(ladder.LAYOUTS))}
    better = f"{ladder.BASE} + LN scale"

    def scores(run):
        layout, *changes = run.candidate.split(" + ")
        return quality.get(layout, 99) - 20 * ("LN scale" in changes) + (" + " in run.candidate)

    order = climbed(scores)
    assert len(order) == len({*order})
    low, middle, top = ([run for run in order if run.tokens == tokens] for tokens in ladder.RUNGS)
    best = min(quality, key=quality.get)
    climbers = {best, better, *ladder.COMPARED}
    changed = {f"{ladder.BASE} + {name}" for name in {*ladder.CHANGES} - {"even decays"}}
    everyone = {*ladder.LAYOUTS, *ladder.COMPARED, *changed}
    assert {run.candidate for run in low} == everyone
    assert {run.candidate for run in middle} >= climbers
    assert {run.candidate for run in top} == climbers
    assert [run.tokens for run in order] == sorted(run.tokens for run in order)
    for rung, firsts, seconds in (low, len(everyone), 10), (middle, 6, 4), (top, 2, 0):
        for seed, count in (1, firsts), (2, seconds):
            ran = {run.candidate for run in rung if run.seed == seed}
            wanted = sorted(everyone, key=lambda name: scores(ladder.Run(name, 1, 1)))[:count]
            assert ran == {*wanted, *(ladder.COMPARED if count else ())}


def test_a_climb_that_was_stopped_goes_on():
    order = climbed(lambda run: len(run.candidate))
    done = {run: dict(pre_quant_val_bpb=len(run.candidate)) for run in order[:5]}
    first_seed = [run for run in order if run[1:] == (ladder.RUNGS[0], 1)]
    assert ladder.next_runs(done) == first_seed[5:]


def test_a_run_trains_and_its_result_can_be_read(tmp_path, monkeypatch):
    small = SHAPE | dict(
        train_batch_tokens=256, eval_seq_len=64, eval_stride=64, val_batch_size=256
    )
    (tmp_path / "data").mkdir()
    made = write_corpus(tmp_path / "data")
    small["vocab_size"] = made.pop("vocab_size")
    data = {name.upper(): value for name, value in made.items()}
    monkeypatch.setattr(ladder, "TOY", ladder.TOY | small | dict(gptq_calibration_batches=2))
    monkeypatch.setattr(ladder, "RESULTS", tmp_path / "ladder.jsonl")
    ladder.target_bytes.cache_clear()
    run = ladder.Run("G5 S G5 S=5 + convolution of 2", 1024, 3)
    hp = ladder.toy_of(run.candidate)
    monkeypatch.chdir(tmp_path)
    with mock.patch.dict(os.environ, data, clear=True), as_before():
        monkeypatch.setattr(t, "masked_window_attention", t.masked_window_attention)
        ladder.train(run)
    log = tmp_path / "logs" / f"{run.name()}.txt"
    row = ladder.result_of(run, log)
    ladder.target_bytes.cache_clear()
    assert (row["candidate"], row["tokens"], row["seed"]) == run
    assert row["losses"] and 1 < row["pre_quant_val_bpb"] < 20 and row["bytes_model"] > 1000
    monkeypatch.setattr(ladder.subprocess, "run", None)  # it has ended, and is not run again
    with mock.patch.dict(os.environ, data):
        ladder.start(run, tmp_path)
    assert ladder.results() == {run: json.loads(json.dumps(row))}
    assert row["text"].keys() == {path.name for path in (tmp_path / "data").glob("*.bin")}
    assert row["source"] == t.digest(ROOT / "train_gpt.py")[:12]
    assert row["parameters"] == sum(p.numel() for p in variants.GPT(hp).parameters())
    assert row["mlp_mult"] == hp.mlp_mult

    text = log.read_text()
    log.write_text(text.replace('"once": {"passed": true', '"once": {"passed": false'))
    with pytest.raises(ValueError, match="its audit failed: once"):
        ladder.result_of(run, log)
    log.write_text("# " + text)  # of another program
    assert ladder.result_of(run, log)["source"] != row["source"]


def climb(monkeypatch, tmp_path, *lines: str, only=()):
    results = tmp_path / "ladder.jsonl"
    results.write_text("".join(lines))
    monkeypatch.setattr(ladder, "RESULTS", results)
    monkeypatch.setenv("DATA_PATH", str(tmp_path))
    monkeypatch.setenv("TOKENIZER_PATH", "any")
    arguments = ["run", "--workers", "1", "--folder", str(tmp_path / "runs"), *only]
    monkeypatch.setattr(sys, "argv", ["ladder.py", *arguments])
    return ladder.main()


def test_a_climb_stays_on_its_text(monkeypatch, tmp_path):
    row = json.dumps(dict(candidate="G11", tokens=1, seed=1, text={"fineweb_val_000000.bin": "0"}))
    said = climb(monkeypatch, tmp_path, row)
    assert said.startswith(f"ladder: error: DATA_PATH={tmp_path}: ") and "as G11_1_1" in said


def test_a_line_that_was_cut_off_is_one_line(monkeypatch, tmp_path):
    row = json.dumps(dict(candidate="G11", tokens=1, seed=1, text={}))
    said = climb(monkeypatch, tmp_path, row + "\n", row[:20])
    assert said.startswith(f"ladder: error: {tmp_path / 'ladder.jsonl'}: line 2: ")


def test_one_run_alone(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(ladder, "start", lambda *given: asked.append(given))
    assert not climb(monkeypatch, tmp_path, only=["--only", "G11 + no XSA", "4096", "3"])
    assert asked == [(ladder.Run("G11 + no XSA", 4096, 3), tmp_path / "runs")]


def test_a_run_that_fails_says_why(monkeypatch, tmp_path):
    """There is no text."""
    said = climb(monkeypatch, tmp_path)
    missing = [
        f"no file fineweb_{split}_000000.bin: run data/prepare.py" for split in ("val", "train")
    ]
    ended = "ladder: error: G5_S_G5_S_5_614400_1 ended with status 1: "
    assert said.splitlines() == [
        f"{ended}DATA_PATH={tmp_path}: {missing[0]}",
        f"DATA_PATH={tmp_path}: {missing[1]}",
    ]


# --------------------------------------------------------------------------------------------------
# At full size


def test_at_full_size_the_candidate_of_its_layout_is_the_record():
    hp, record = forecast.full_of(ladder.RECORD), t.Hyperparameters(run_id="run")
    known = asdict(record) | dict(mlp_mult=hp.mlp_mult, run_id=hp.run_id)
    assert {name: asdict(hp)[name] for name in known} == known
    assert record.mlp_mult <= hp.mlp_mult < record.mlp_mult + 0.25  # in whole tiles of 128


@pytest.mark.parametrize("candidate", ["G S x6, narrow", "G2 S8 G, grouped", "transformer"])
def test_at_full_size_all_bytes_are_used(candidate):
    hp, module = forecast.full_of(candidate), ladder.module_of(candidate)
    system = module.Hyperparameters.system if candidate == "transformer" else "record"
    used = sum(ladder.bench.estimated_bytes(hp, module)) + ladder.bench.code_bytes(system)
    assert 0.999 * forecast.ARTIFACT_BYTES < used <= forecast.ARTIFACT_BYTES
    toy = ladder.toy_of(candidate)
    assert hp.model_dim == 4 * toy.model_dim
    assert candidate == "transformer" or hp.gdn_heads == 2 * toy.gdn_heads


def test_stages_are_shares_of_the_time():
    row = dict(seconds=[(0.0, 0.1), (0.4, 0.2)], tokens=1000)
    assert forecast.tokens_per_second(row) == pytest.approx(0.4 * 10_000 + 0.6 * 5_000)


def test_tokens_are_worth_what_published_runs_gained():
    """Of #1950 and #1979 the difference, of #549 and the two of #1005 the ratio of differences."""
    assert forecast.worth_of(3.90e9, 12.58e9) == pytest.approx(1.06445 - 1.03969, abs=1e-4)
    ratio = forecast.worth_of(5.65e9, 15.7e9) / forecast.worth_of(15.7e9, 39.3e9)
    assert ratio == pytest.approx((1.1369 - 1.1098) / (1.1098 - 1.0939), rel=0.02)


def test_a_score_by_speed_is_the_published_one_corrected_for_tokens():
    def row(layout: str, tokens: float) -> dict:
        return dict(layout=layout, seconds=[(0.0, 1.0)], tokens=tokens / forecast.SECONDS)

    (fewest, _), (worst, _) = forecast.by_speed(row("A11", 3.90e9 / 0.77))
    assert fewest == pytest.approx(3.90e9) and worst == pytest.approx(1.0667)
    (fewest, most), (worst, best) = forecast.by_speed(row("G3 S", 3.90e9))
    assert (fewest, most) == pytest.approx((0.65 * 3.90e9, 0.76 * 3.90e9))
    assert worst > best > 1.0667


# --------------------------------------------------------------------------------------------------
# Several rungs


def test_all_results_are_of_candidates_as_they_are_now():
    found = ladder.results()
    assert len(found) > 30
    toys = {name: ladder.toy_of(name) for name in {run.candidate for run in found}}
    for run, row in found.items():
        hp, module = toys[run.candidate], ladder.module_of(run.candidate)
        own = row["mlp_mult"], row["parameters"]
        assert own == (hp.mlp_mult, ladder.bench.parameters(hp, module)), run


def rows_of(scores: dict[tuple[str, int, int], float]) -> dict:
    return {
        ladder.Run(*run): dict(
            pre_quant_val_bpb=bpb, losses=[(step, 10 * bpb) for step in (1, 9, 10, 20, 30, 600)]
        )
        for run, bpb in scores.items()
    }


def test_in_equal_time_a_faster_layout_has_more_tokens(monkeypatch):
    """By the slope of its own two rungs: 0.4 for four times the tokens is 0.1 for their root of
    four, here 1.414."""
    first, second, third = ladder.RUNGS
    fast = "G2 S x4"
    scores = {(ladder.BASE, first, 1): 2.5, (ladder.BASE, second, 1): 2.1}
    scores |= {(fast, first, 1): 2.6, (fast, second, 1): 2.1, (fast, second, 2): 2.3}
    scores |= {("G11", first, 1): 2.5, ("G11", second, 1): 2.0}  # its step was not measured
    scores |= {("S11", second, 1): 2.0, ("G S x6", third, 1): 1.0}  # on one rung
    speeds = {"G3 S x3": 1.0, fast: 2**0.5}
    costs = {
        name: dict(layout="G S", seconds=[(0.0, 1 / speed)], tokens=1e6)
        for name, speed in speeds.items()
    }
    monkeypatch.setattr(ladder, "results", lambda: rows_of(scores))
    monkeypatch.setattr(forecast, "measured", lambda: costs)
    _, _, *lines = forecast.at_equal_time()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells == [
        ["2,457,600", "G11", "1", "2.0000", "-", "-0.1000", "+0.0000", "-", "-"],
        ["2,457,600", ladder.BASE, "1", "2.1000", "-", *["+0.0000"] * 2, "1.00", "+0.0000"],
        ["2,457,600", fast, "2", "2.2000", "0.1414", "+0.0000", "+0.1000", "1.41", "-0.1000"],
    ]


@pytest.mark.parametrize("runs", [{}, {("G3 S x3 + even decays", 614_400, 1): 2.5}])
def test_without_two_rungs_there_is_nothing_to_compare(monkeypatch, runs):
    monkeypatch.setattr(ladder, "results", lambda: rows_of(runs))
    assert len([*forecast.at_equal_time()]) == 2


def test_steps_of_another_source_are_measured_again(monkeypatch, tmp_path):
    present = dict(source=t.digest(ROOT / "train_gpt.py")[:12], seconds=[(0.0, 1.0)], tokens=1e6)
    old = present | dict(candidate="S11", source="another")
    steps, rows = tmp_path / "steps.jsonl", [present | dict(candidate="G11"), old]
    steps.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(forecast, "STEPS", steps)
    asked = []

    def measure(command, **_):
        asked.append(command[-1])
        return SimpleNamespace(stdout=json.dumps(present | dict(candidate=command[-1])))

    monkeypatch.setattr(forecast.subprocess, "run", measure)
    forecast.measure_missing(["G11", "S11", "G2 S x4"])
    assert asked == ["S11", "G2 S x4"]
    found = [json.loads(line) for line in steps.read_text().splitlines()]
    assert [row["candidate"] for row in found] == ["G11", "S11", "G2 S x4"]
    assert len({row["source"] for row in found}) == 1


def test_without_names_the_step_of_all_that_stands_on_every_rung_is_measured(monkeypatch):
    asked = []
    monkeypatch.setattr(forecast, "measure_missing", asked.extend)
    monkeypatch.setattr(sys, "argv", ["forecast.py", "steps"])
    assert not forecast.main()
    assert {"G3 S x3", "G3 S x3 + grouped heads", "G11", ladder.TRANSFORMER} <= {*asked}
    assert not any("even decays" in name for name in asked)  # which cost nothing


def test_what_has_no_step_is_one_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["forecast.py", "steps", "G40"])
    assert forecast.main().startswith("forecast: error: G40: no name of LAYOUTS")


def test_a_change_is_compared_with_the_base_of_its_seed(monkeypatch):
    first, norm = ladder.RUNGS[0], f"{ladder.BASE} + no output norm"
    scores = {
        (ladder.BASE, first, 1): 2.5,
        (ladder.BASE, first, 2): 2.4,
        ("G11", first, 1): 2.0,
    }
    scores |= {(norm, first, 1): 2.6, (norm, first, 2): 2.6, (norm, first, 3): 9.0}
    scores |= {(f"{ladder.BASE} + no XSA", first, 3): 2.0}  # with no base to compare
    rows = rows_of(scores)
    for row in rows.values():
        row |= dict(mlp_mult=2.0, parameters=1000, val_bpb=2 * row["pre_quant_val_bpb"])
    monkeypatch.setattr(ladder, "results", lambda: rows)
    _, _, *lines = ladder.table_of_changes()
    assert lines == ["| no output norm | 2.00 | 1,000 | +0.1500 | +0.3000 | 2 |"]


def test_a_smooth_curve_is_the_mean_of_what_is_near():
    tokens, losses = ladder.smooth({1: 9.0, 10: 5.0, 12: 3.0, 20: 1.0, 26: 2.0})
    assert tokens == [10 * 4096, 12 * 4096, 20 * 4096, 26 * 4096]
    assert losses == [4.0, 4.0, 1.0, 2.0]


def test_the_picture_says_of_which_results_it_is(tmp_path, monkeypatch):
    results = tmp_path / "ladder.jsonl"
    results.write_text("of these")
    found = rows_of({(name, ladder.RUNGS[1], 1): 2.0 for name in (ladder.BASE, "G11")})
    monkeypatch.setattr(ladder, "results", lambda: found)
    monkeypatch.setattr(ladder, "RESULTS", results)
    ladder.draw(tmp_path / "ladder.png")
    assert source_of(tmp_path / "ladder.png") == t.digest(results)


def test_without_a_run_of_the_record_nothing_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(ladder, "RESULTS", tmp_path / "none.jsonl")
    monkeypatch.setattr(sys, "argv", ["ladder.py", "draw"])
    assert "none.jsonl: no run of G3 S x3 + even decays with seed 1" in ladder.main()


def test_the_picture_of_the_docs_is_of_the_present_results():
    assert source_of(ladder.PICTURE) == t.digest(ladder.RESULTS), "python tools/ladder.py draw"


def source_of(picture) -> str:
    """What its tEXt chunk `Source` says."""
    return picture.read_bytes().split(b"tEXtSource\0")[1][:64].decode()
