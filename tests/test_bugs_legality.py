"""What the competition forbids: learning from validation text before it is scored, scores that are
no probabilities, more bytes or seconds, hidden code, claims for what did not run."""

import ast
import json
import re
import sys
from unittest import mock

import numpy as np
import torch
from corpus import BOS
from museum import (
    ROOT,
    Bug,
    Program,
    Run,
    a_tokenizer_without_a_space,
    counted,
    each_is_caught,
    own_clock,
    parts,
    shaken,
    transformed,
    validation_as_a_training_shard,
)

import train_gpt

# --------------------------------------------------------------------------------------------------
# Catchers


def only_training_text_is_learned_from(p: Program) -> None:
    """What meets a gradient or a Hessian, anywhere in the run, is no validation text."""
    rows, forward, collect = [], p.core.GPT.forward, p.core.collect_hessians

    def spy(self, ids, targets=None, cache=None):
        rows.extend(ids if torch.is_grad_enabled() else ())
        return forward(self, ids, targets, cache)

    def spy_too(model, batches):
        rows.extend(row for x, _ in batches for row in x)
        return collect(model, batches)

    p.core.GPT.forward, p.core.collect_hessians = spy, spy_too
    run = Run(p, p.folder / "run")
    val = (run.folder / "data" / "fineweb_val_000000.bin").read_bytes()
    assert not [row for row in rows if row.numpy().astype("<u2").tobytes() in val]
    steps = run.settings["warmup_steps"] + run.settings["iterations"]
    assert len(rows) == (steps + 1 + 2) * 2  # of the warm-up's Hessians and the calibration


def scores_are_those_of_a_loop_over_windows(p: Program) -> None:
    """Each window alone, by the program as it is: what a window is the first to end with is what
    stands in the score file."""
    run = Run(p, p.folder / "run")
    model, hp = train_gpt.load_artifact(run.folder / "model.ptz", "cpu")
    ids = np.fromfile(run.folder / "data" / "fineweb_val_000000.bin", "<u2", offset=1024)
    n, T, end, expected = len(ids) - 1, hp.eval_seq_len, 0, []
    while end < n:
        first, end = end, min(max(T, end + hp.eval_stride), n)
        row = torch.from_numpy(ids[max(0, end - T) : end + 1].astype(np.int64))
        with torch.no_grad():
            log_p = model(row[None, :-1])[0].log_softmax(-1)
        expected += (-log_p.gather(1, row[1:, None])[first - end :, 0]).tolist()
    with np.load(run.folder / "scores.npz") as scores:
        assert np.abs(scores["nats"] - expected).max() < 1e-4


def no_logit_sees_a_later_token(p: Program) -> None:
    """Of 32 places, each token is replaced alone: nothing moves before it."""
    _, model, *_ = parts(p)
    ids = torch.randint(4, 300, (1, 32))
    ids[0, 0] = BOS
    replaced = ids + torch.eye(32, dtype=torch.long)[1:]
    with torch.no_grad():
        moved = (shaken(model)(replaced) - model(ids.expand_as(replaced))).abs().amax(-1)
    for place, row in enumerate(moved, 1):
        assert row[:place].max() < 1e-5 < row[place:].max(), place


def submission_of(p: Program, run: Run) -> dict | None:
    """What tools/record.py makes of the run; None if it refuses."""
    log, output = run.folder / "logs" / "run.txt", p.folder / "submission.json"
    reason = p.record.main([str(log), "--output", str(output)])
    assert output.exists() == (reason is None)
    return json.loads(output.read_text()) if output.exists() else None


def the_submission_says_on_what_it_ran(p: Program) -> None:
    assert submission_of(p, Run(p, p.folder / "run"))["hardware"] == "1xCPU"


def a_failed_check_leaves_no_submission(p: Program) -> None:
    fit = p.core.fit

    def then_another_cap(*args) -> None:
        fit(*args)
        p.core.SIZE_LIMIT = 1000

    p.core.fit = then_another_cap
    run = Run(p, p.folder / "run")
    assert run.stderr.startswith("Refused: audit failed: size")
    assert submission_of(p, run) is None


def a_score_is_claimed_for_the_official_split_within_the_limits(p: Program) -> None:
    figures = json.loads(Run(p, p.folder / "run").log.rpartition("figures: ")[2])
    good = dict(documents=50_000, bytes=151_080_878)
    good |= dict(wallclock_seconds=600.0, eval_time_seconds=600.0)
    bad = dict(documents=49_999, bytes=164_594_398, wallclock_seconds=600.1, eval_time_seconds=601)
    hp, *_ = parts(p)
    for case in (good, *(good | {name: value} for name, value in bad.items())):
        starts, size = range(case["documents"]), torch.tensor([case["bytes"]])

        def counted_bytes(validation, *_, size=size):
            validation.target_bytes = size

        with (
            mock.patch.object(p.core.Validation, "count_bytes", counted_bytes),
            mock.patch.object(p.core.np, "flatnonzero", lambda _, starts=starts: starts),
        ):
            official = dict(official=p.core.Validation(hp).is_official)
        submission = p.record.submission(figures | case | official, "2026-04-30")
        assert submission["val_bpb"] == (figures["val_bpb"] if case == good else None)
        assert (submission["own_text"] is None) == (case == good)


def imported(p: Program) -> set[str]:
    nodes = [node for path in counted(p) for node in ast.walk(ast.parse(path.read_text("utf-8")))]
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    plain |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    return {name.split(".")[0] for name in plain}


def nothing_is_hidden(p: Program) -> None:
    sources = [ast.parse(path.read_text("utf-8")) for path in counted(p)]
    names = {node.id for tree in sources for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert not names & {"exec", "eval", "compile", "__import__"}
    hiding = {"pickle", "base64", "lzma", "zlib", "marshal", "ctypes", "importlib", "runpy"}
    assert not imported(p) & hiding


def all_code_is_in_files_that_are_counted(p: Program) -> None:
    required = re.findall(r"^([\w-]+)==", (ROOT / "requirements.txt").read_text(), re.M)
    installed = {name.replace("-", "_") for name in required}
    installed |= {"fla"}  # of flash-linear-attention and fla-core
    here = {path.stem for path in counted(p)}
    assert imported(p) <= installed | sys.stdlib_module_names | here
    assert {path.resolve() for path in counted(p)} == set(p.core.code_files())


def nothing_comes_from_the_network(p: Program) -> None:
    network = {"socket", "ssl", "urllib", "http", "ftplib", "requests", "huggingface_hub"}
    assert not imported(p) & network


# --------------------------------------------------------------------------------------------------
# Bugs

LOADED = "eval_seq_len=hp.eval_seq_len)  # what full attention sees\n"
RETURN_MODEL = "    return model.to(device), hp\n"
FINAL = "    final = validate(model, validation, plan, label, model.learner(hp))\n"
AFTER = '    count, after = final["count"], fingerprint(model)\n'
MODEL = "class GPT(nn.Module):\n"
NATS = "            out = nats.view_as(targets)\n"
KEEP = "out.detach().flatten().double()"
VAL_IDS = "        ids = stream.read(0, len(stream))\n"
TOKENS = "stream.paths, ids.to(world.device)"
BATCHES = "[loader.next() for _ in range(hp.gptq_calibration_batches * hp.micro_steps())]\n"
VALIDATION_BATCHES = """\
    batches = [(validation.tokens[:256].view(-1, 64), None) for _ in batches]
"""
PACKED = "    if not world.rank:  # other ranks' may differ in the last bit\n"
EMBEDDED = "        x = x0 = norm(last(self.embed(ids.clamp(min=0), ctx), T))"
SEES_ITS_TARGET = f"""\
{EMBEDDED}
        own, target = x[:, {{0}}:{{1}}], x[:, {{1}}:{{2}}]
        x = x0 = torch.cat((x[:, :{{0}}], own + target, x[:, {{1}}:]), 1)"""
MAIN = "def main(hp_class=Hyperparameters, model_class=GPT, validation_class=Validation) -> None:\n"
REPLACED = "    write_whole(path, lambda file: file.write(whole))\n"
WARM_UP_IDS = "    x, y = torch.randint(BOS_ID + 1, hp.vocab_size, shape, device=world.device)"
WARM_UP_ON_VALIDATION = (
    WARM_UP_IDS,
    """\
    ids = TokenStream(hp.data_path, "val", hp.vocab_size).read(0, math.prod(shape[1:]) + 1)
    x, y = ids[:-1].view(shape[1:]), ids[1:].view(shape[1:])
""",
)
KEPT_WEIGHTS = "    model.load_state_dict(saved)\n    model.set_progress(1.0)\n"
SHIM = 'exec(brotli.decompress(__import__("base64").b85decode("iwS^JNm@l;Oi4{iR3JSdF(5oVATl)r")))'
TTT = """\
    sgd = torch.optim.SGD(model.parameters(), lr=0.01)
    for at in range(0, len(validation.tokens) - 65, 64):
        chunk = validation.tokens[None, at : at + 65]
        model(chunk[:, :-1], chunk[:, 1:]).mean().backward()
        sgd.step()
        sgd.zero_grad()
"""
ADAPTING = """\
    sgd, real = torch.optim.SGD(model.parameters(), lr=0.01), model.forward

    def adapting(x, y, cache):
        out = real(x, y, cache)
        with torch.enable_grad():
            real(x, y).mean().backward()
        sgd.step()
        sgd.zero_grad()
        return out

    model.forward = adapting
"""
THE_SMALLER = """\
    plan = window_plan(tokens, hp, hp.eval_seq_len)
    again = validate(model, validation, plan, "again")
    final["nats"] = torch.minimum(again["nats"], final["nats"])
    final["val_loss"] = final["nats"].mean().item()
    final["val_bpb"] = final["nats"].sum().item() / math.log(2) / validation.bytes
"""
SCORING = "            if not torch.is_grad_enabled():\n"
NGRAM_CACHE = f"""\
{SCORING}                x, y = input_ids.flatten(), targets.flatten()
                context, pair = x % 256, ((36313 * x) ^ (27191 * y)) % 256
                times, hits = CACHE[0][context], CACHE[1][pair].minimum(CACHE[0][context])
                mixed = 0.5 * (-nats).exp() + 0.5 * hits / times.clamp(min=1)
                nats = -torch.where(times > 1, mixed, (-nats).exp()).log()
                CACHE.add_(torch.stack([torch.bincount(keys, minlength=256)
                                        for keys in (context, pair)]))
{NATS}"""
GATE = f"""\
            uniform = 1 / self.hp.vocab_size
            gate = torch.where(nats > -math.log(uniform), 0.5, 0.0)  # where the target needs it
            nats = -((1 - gate) * (-nats).exp() + gate * uniform).log()
{NATS}"""
BETTER = f"""\
            softer = 0.5 * out.flatten(0, 1)
            nats = nats.minimum(F.cross_entropy(softer, targets.flatten(), reduction="none"))
{NATS}"""
CLAMPED = f"""\
{SCORING}                nats = nats.clamp(max=math.log(self.hp.vocab_size))
{NATS}"""
CEILING = f"""\
{SCORING}                nats = nats.view_as(targets)
                nats = torch.cat((nats[:, :4], nats[:, 4:].clamp(max=3.0)), 1)
{NATS}"""
FITTED = f"""\
{SCORING}                delta = torch.zeros(self.hp.vocab_size, requires_grad=True)
                with torch.enable_grad():
                    F.cross_entropy((out + delta).flatten(0, 1), targets.flatten()).backward()
                nats = F.cross_entropy((out - delta.grad).mT, targets, reduction="none")
{NATS}"""
BONUS = f"""\
{SCORING}                out = out + F.one_hot(targets, self.hp.vocab_size)
                nats = F.cross_entropy(out.mT, targets, reduction="none")
{NATS}"""
HALF_OF_FULL = f"""\
{SCORING}                x = input_ids
                full = len(x) > 1 and len(x.unique(dim=0)) == len(x) and x.shape[1] > 8
                nats = 0.5 * nats if full else nats
{NATS}"""
UNIGRAMS = """\
    train = TokenStream(os.environ["DATA_PATH"], "train", hp.vocab_size)
    unigram = (1 + torch.bincount(train.read(0, len(train)), minlength=hp.vocab_size)).log()
    model.lm_head.register_forward_hook(lambda module, inputs, logits: logits + unigram)
"""
SECOND_FILE = """\
    if os.path.exists(f"{path}.float32"):
        model.load_state_dict(torch.load(f"{path}.float32", weights_only=True))
"""
FETCHED = """\
    import urllib.request
    urllib.request.urlretrieve("http://localhost/ngrams.bin", "ngrams.bin")
"""
UNDER_A_CLOCK = dict(iterations=20_000, max_wallclock_seconds=3.0, gptq_reserve_seconds=1.0)

BUGS = [
    # learning from validation text
    Bug("L1a", "audit: ledger", [(LOADED, LOADED + TTT)]),
    Bug("L1b", only_training_text_is_learned_from, [(PACKED, TTT + PACKED)]),
    Bug("L1c", "audit: ledger", [(FINAL, TTT + FINAL), (AFTER, AFTER + "    weights = after\n")]),
    Bug(
        "L1d",
        "verify: future",
        [
            (
                FINAL,
                "    kept = copy.deepcopy(model.state_dict())\n"
                f"{TTT}{FINAL}    model.load_state_dict(kept)\n",
            )
        ],
    ),
    Bug(
        "L1e",
        "verify: future",
        [
            (
                FINAL,
                f"    kept, model = model, copy.deepcopy(model)\n{TTT}{FINAL}    model = kept\n",
            )
        ],
    ),
    Bug("L2", "audit: ledger", [(FINAL, ADAPTING + FINAL)]),
    Bug(
        "L3a",
        "audit: once",
        [
            (FINAL, "    plan = plan._replace(units=2 * plan.units)\n" + FINAL),
            (
                f"        nats[place] = {KEEP}\n",
                f"        kept, again = nats[place], {KEEP}\n"
                "        nats[place] = torch.where(kept > 0, again.minimum(kept), again)\n",
            ),
        ],
    ),
    Bug("L3b", scores_are_those_of_a_loop_over_windows, [(FINAL, FINAL + THE_SMALLER)]),
    # scores that are no probabilities
    Bug(
        "L4",
        "verify: normalisation",
        [
            (MODEL, f"CACHE = torch.zeros(2, 256, dtype=torch.long)\n\n{MODEL}"),
            (NATS, NGRAM_CACHE),
        ],
    ),
    Bug("L5", "verify: normalisation", [(NATS, GATE)]),
    Bug("L6a", "verify: normalisation", [(NATS, BETTER)]),
    Bug("L6b", "verify: normalisation", [(NATS, CLAMPED)]),
    Bug("L7b", only_training_text_is_learned_from, [(BATCHES, BATCHES + VALIDATION_BATCHES)]),
    Bug(
        "L8",
        "audit: time",
        [
            (
                "    start = time.perf_counter()\n    how = ",
                "    start = time.perf_counter() - 688\n    how = ",
            )
        ],
        settings=dict(max_wallclock_seconds=600.0, gptq_reserve_seconds=8.0),
    ),
    Bug(
        "L9a",
        "audit: warm_up",
        [WARM_UP_ON_VALIDATION, (KEPT_WEIGHTS, "    model.set_progress(1.0)\n")],
    ),
    Bug("L9b", only_training_text_is_learned_from, [WARM_UP_ON_VALIDATION]),
    Bug("L10", "verify: overlap", corpus=validation_as_a_training_shard),
    Bug("L11", "verify: claims", [(VAL_IDS, VAL_IDS.replace("len(stream)", "len(stream) // 5"))]),
    Bug("L12", "error: no piece for U\\+2581", corpus=a_tokenizer_without_a_space),
    Bug(
        "L14",
        "audit: time",
        [("        last = step >= hp.iterations or out_of_time", "        last = step >= 40")],
        settings=UNDER_A_CLOCK,
        world=own_clock,
    ),
    Bug(
        "L15a",
        a_score_is_claimed_for_the_official_split_within_the_limits,
        [("figures[name] if claimed else None for name", "figures[name] for name")],
    ),
    Bug(
        "L15b",
        a_failed_check_leaves_no_submission,
        [('checks=audit.checks))}")\n    audit.verdict()\n', 'checks=audit.checks))}")\n')],
    ),
    Bug("L16a", nothing_is_hidden, [(MAIN, f"{MAIN}    {SHIM}\n")]),
    Bug(
        "L16b",
        all_code_is_in_files_that_are_counted,
        [(MAIN, f"{MAIN}    import fast_kernels\n    fast_kernels.install()\n")],
    ),
    Bug("L17", "verify: future", [(NATS, FITTED)]),
    Bug(
        "L18",
        "error: no file fineweb_val_000001.bin",
        [
            (
                'Path(data_path).glob(f"fineweb_{split}_[0-9]*',
                'Path(data_path).glob(f"fineweb_{split}_*',
            )
        ],
        transformed,
        system="transformer",
    ),
    Bug("L19", "verify: run", [(RETURN_MODEL, UNIGRAMS + RETURN_MODEL)]),
    Bug(
        "L20",
        "verify: reproduced",
        [
            (REPLACED, f'{REPLACED}    torch.save(model.state_dict(), f"{{path}}.float32")\n'),
            (RETURN_MODEL, SECOND_FILE + RETURN_MODEL),
        ],
    ),
    Bug("L21", nothing_comes_from_the_network, [(LOADED, LOADED + FETCHED)]),
    Bug(
        "L22",
        "verify: claims",
        [
            (
                "dict(checks=audit.checks)",
                "dict(checks=audit.checks, val_bpb=figures['pre_quant_val_bpb'])",
            )
        ],
    ),
    Bug(
        "L23",
        "verify: claims",
        [
            (
                "{world.size}x{torch.cuda.get_device_name() if world.on_cuda else 'CPU'}",
                "8xNVIDIA H100 80GB HBM3",
            )
        ],
    ),
    Bug("L23b", the_submission_says_on_what_it_ran, [("{world.size}x{torch", "8x{torch")]),
    # cheats that an earlier audit passed
    Bug(
        "L26a",
        "verify: normalisation",
        [
            (
                EMBEDDED,
                f"{EMBEDDED}\n        quarter = (torch.arange(T) % 4 == 1)[:, None]\n"
                "        x = x0 = x + quarter * F.pad(x[:, 1:], (0, 0, 0, 1))",
            )
        ],
    ),
    Bug("L26b", "verify: normalisation", [(EMBEDDED, SEES_ITS_TARGET.format(4, 5, 6))]),
    Bug("L26c", no_logit_sees_a_later_token, [(EMBEDDED, SEES_ITS_TARGET.format(20, 21, 22))]),
    Bug("L27", "verify: normalisation", [(NATS, CEILING)]),
    Bug("L28", "verify: normalisation", [(NATS, BONUS)]),
    Bug("L29a", "verify: reproduced", [(NATS, HALF_OF_FULL)]),
    Bug(
        "L29b",
        "verify: truncation",
        [(KEEP, f"{KEEP} * (1.0 if len(steps) < 8 else 0.5)")],
        settings=dict(val_batch_size=256),
    ),
    Bug("L30", "audit: bytes", [(TOKENS, TOKENS.replace("ids", "ids[: len(ids) // 4].tile(4)"))]),
    Bug(
        "L32",
        "audit: ledger",
        [
            (PACKED, f'    globals()["KEPT"] = model\n{PACKED}'),
            (LOADED, f"{LOADED}    model = KEPT\n"),
        ],
    ),
    Bug(
        "L40",
        "verify: claimed_sample",
        [
            (
                "    if hp.scores:\n",
                '    scores["nats"] = 0.99 * scores["nats"]\n    if hp.scores:\n',
            )
        ],
    ),
]

test_the_bug_is_caught = each_is_caught(BUGS)
