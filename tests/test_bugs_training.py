"""Bugs of training: the clock and what it counts, schedules, the optimizer, several ranks."""

import contextlib

import torch
from museum import (
    SETTINGS,
    Bug,
    Program,
    as_rank,
    each_is_caught,
    is_matrix,
    own_clock,
    parts,
    shaken,
    small,
    start,
    trained,
    two_batches,
)

# --------------------------------------------------------------------------------------------------
# Catchers: the clock


def under_a_clock(p: Program, **settings) -> list[tuple]:
    """20 steps of 20,000 that the clock has room for: share of it that is over, passes,
    micro-batches, tokens of a backward pass."""
    clock, accumulate, seen = own_clock(p), p.core.accumulate, []

    def spy(model, batch):
        seen.append((clock.now, len(model.order), len(batch), getattr(model, "chunk", None)))
        return accumulate(model, batch)

    p.core.accumulate = spy
    limits = dict(iterations=20_000, max_wallclock_seconds=2.05, warmup_steps=0)
    trained(p, grad_accum_steps=2, **limits, **settings)
    assert len(seen) == 20
    return [((now - seen[0][0]) / 2.05, *rest) for now, *rest in seen]


def the_loop_is_switched_on_by_the_clock(p: Program) -> None:
    looping = dict(layout="S (S)x2", enable_looping_at=0.475, parallel_start_layer=0)
    for share, passes, *_ in under_a_clock(p, **looping):
        assert passes == (3 if share >= 0.475 else 2)


def the_stages_follow_the_clock(p: Program) -> None:
    for share, _, *stage in under_a_clock(p, layout="S", curriculum="0:1x32 0.475:2x64"):
        assert stage == ([2, 64] if share >= 0.475 else [1, 32])


def the_clock_counts_training_and_nothing_else(p: Program) -> None:
    """5 steps and the Hessians, in a world where the first sight of a shape costs 100 seconds of
    compiling; on the way the transformer's loop begins, pure_gdn's passes grow."""
    clock, seen, forward = own_clock(p), set(), p.core.GPT.forward

    def compiled(model, x, y=None, cache=None):
        graph = (*x.shape, len(model.order), cache is None, torch.is_grad_enabled())
        clock.now += 100.0 * (graph not in seen)
        seen.add(graph)
        return forward(model, x, y, cache)

    p.core.GPT.forward = compiled
    growing = dict(
        train_gpt=dict(layout="S"),
        transformer=dict(layout="S (S)x2", enable_looping_at=0.4, parallel_start_layer=0),
        pure_gdn=dict(layout="S", curriculum="0:1x32 0.6:1x64"),
    )
    *_, figures = trained(p, **growing[p.script.stem], iterations=5)
    assert abs(figures["wallclock_seconds"] - (5 * 0.1 + 0.2)) < 1e-6
    shapes = {(length, passes) for _, length, passes, _, learns in seen if learns}
    assert len(shapes) == (1 if p.script.stem == "train_gpt" else 2)


def ranks_stop_together(p: Program) -> None:
    """The slower of two ranks is 0.25 seconds later at the same step. Its run first, then the
    other's, which meets in each maximum over the ranks what the slower one gave: both take part in
    as many, and make as many steps."""
    clock, loader, met, stops = own_clock(p), p.core.TrainLoader, [], []

    def record(x, op=None):
        if op == torch.distributed.ReduceOp.MAX:
            met.append(x.clone())
        return x

    def meet(x, op=None):
        if op == torch.distributed.ReduceOp.MAX:
            assert met, "this rank goes on where the other has stopped"
            x.copy_(torch.maximum(x, met.pop(0)))
        return x

    for late, p.core.world.all_reduce in (0.25, record), (0.0, meet):
        clock.now, lateness = 0.0, late

        def started(*args, lateness=lateness):
            clock.now += lateness
            return loader(*args)

        p.core.TrainLoader = started
        *_, figures = trained(p, layout="S", iterations=1000, max_wallclock_seconds=2.0)
        stops.append(figures["step_stop"])
    assert stops[0] == stops[1] and not met


# --------------------------------------------------------------------------------------------------
# Catchers: the optimizer


def the_gradient_norm_is_that_of_one_step(p: Program) -> None:
    """The same batch three times at learning rate 0: the norm is that of its gradient each time."""
    hp, model, stream, _ = parts(p)
    batch, params = two_batches(hp, stream)[:1], list(shaken(model).parameters())
    optimizer = p.core.Muon(model, hp)
    gradient = torch.autograd.grad(model(*batch[0]).mean(), params)
    expected = torch.nn.utils.get_total_norm(gradient).item()
    for _ in range(3):
        p.core.accumulate(model, batch)
        assert abs(optimizer.step(0.0, 0.9).item() / expected - 1) < 1e-4


def muon_owns_the_matrices_and_nothing_else(p: Program) -> None:
    _, model, *_ = parts(p, layout="G S (A G)x2")
    names = {id(weight): name for name, weight in model.named_parameters()}
    stacks = p.core.Muon(model, model.hp).stacks.values()
    owned = {names[id(weight)] for stack in stacks for weight in stack}
    assert owned == {name for name in names.values() if is_matrix(name)} and len(owned) > 20


def decay_shrinks_matrices_and_embeddings_and_nothing_else(p: Program) -> None:
    """100 steps without gradients at the lr wd = 8e-4 of the runs that got it wrong; all else stays
    bit for bit."""
    hp, model, *_ = parts(p, muon_wd=0.04, matrix_lr=0.02, embed_wd=0.04, tied_embed_lr=0.02)
    optimizer = p.core.Muon(shaken(model), hp)
    before = {name: weight.detach().double() for name, weight in model.named_parameters()}
    for _ in range(100):
        for weight in model.parameters():
            weight.grad = torch.zeros_like(weight)
        optimizer.step(1.0, 0.95)
    for name, weight in model.named_parameters():
        if is_matrix(name) or name in ("tok_emb.weight", "ngram.table"):
            shrunk = weight.double().norm() / before[name].norm()
            assert abs(shrunk / (1 - 8e-4) ** 100 - 1) < 1e-3, name
        else:
            assert torch.equal(weight.double(), before[name]), name


def training_leaves_the_average(p: Program) -> None:
    """0.9 of the average and 0.1 of the new weights; in the first steps (1 + t) / (10 + t)."""
    hp, model, stream, validation = parts(p, layout="S", ema_decay=0.9, iterations=10)
    steps, step = [], p.core.Muon.step

    def recorded(*args):
        grad_norm = step(*args)
        steps.append([weight.detach().clone() for weight in model.parameters()])
        return grad_norm

    p.core.Muon.step = recorded
    average = [weight.detach().clone() for weight in model.parameters()]
    p.core.train(hp, model, stream, validation, p.core.Audit())
    for t, weights in enumerate(steps[hp.warmup_steps :]):
        decay = min(0.9, (1 + t) / (10 + t))
        average = [decay * a + (1 - decay) * w for a, w in zip(average, weights, strict=True)]
    for weight, expected in zip(model.parameters(), average, strict=True):
        assert (weight - expected).abs().max() < 1e-5


# --------------------------------------------------------------------------------------------------
# Catchers: several ranks, files


def every_rank_takes_part_in_every_collective(p: Program) -> None:
    hp, model, stream, validation = parts(p, layout="S")
    hessians = p.core.collect_hessians(shaken(model), two_batches(hp, stream))
    records = []
    for rank in (0, 1):
        records.append(as_rank(p, rank))
        p.core.pack(hp, model, validation, hessians)
        p.core.evaluate(hp, p.core.GPT, validation, p.core.Audit())
    assert records[0] == records[1] and len(records[0]) > 8


def every_file_has_one_writer(p: Program) -> None:
    """A whole run as the first of two ranks, then as the second, where a failed check stops
    neither: what the first wrote stays untouched, and nothing is added to it."""
    p.core.Audit.verdict = lambda self: None  # each rank scores its half alone here
    folder, states = p.folder / "run", []
    (folder / "data").mkdir(parents=True)
    settings = SETTINGS | small(folder / "data") | dict(layout="S", iterations=2)
    for rank in (0, 1):
        as_rank(p, rank)
        assert not start(p, folder, **settings)
        paths = folder.rglob("*")
        states.append({path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in paths})
    assert states[0] == states[1]
    written = {path.name for path in states[0]}
    assert {"model.ptz", "model.ptz.sample.npz", "scores.npz", "run.txt"} <= written


def folders_are_there_before_training(p: Program) -> None:
    files = dict(artifact=f"{p.folder}/new/model.ptz", scores=f"{p.folder}/newer/scores.npz")
    with contextlib.suppress(OSError):
        p.core.claim_outputs(p.core.Hyperparameters(**files), torch.nn.Linear(1, 1))
    assert (p.folder / "new").is_dir() and (p.folder / "newer").is_dir()


# --------------------------------------------------------------------------------------------------
# Bugs

UNDER_A_CLOCK = dict(
    layout="S", iterations=20_000, max_wallclock_seconds=3.0, gptq_reserve_seconds=1.0
)
PROGRESS = "seconds / self.train_seconds()))"
OF_STEPS = "step / hp.iterations"
SET_PROGRESS = "        model.set_progress(progress)\n        out_of_time"
MICRO_STEPS = "for _ in range(hp.micro_steps_at(progress))]"
OWNED = "            owned[model.kinds[name]].append(p)\n"
LEFT_OUT = (OWNED, f'            if "conv1d" not in name:\n    {OWNED}')
ZERO_ALL = "        self.model.zero_grad()\n"
ZERO_OWNED = """\
        self.adamw.zero_grad()
        for p in sum(self.stacks.values(), []):
            p.grad = None
"""
RETURN_KINDS = "        return kinds\n"
WITHOUT_MASTERS = """\
        for module in (self.tok_emb, *(block.mixer for block in self.blocks)):
            module.bfloat16()
"""
AVERAGED = "    torch._foreach_copy_(params, average)\n"
CALIBRATION = "[loader.next() for _ in range(hp.gptq_calibration_batches * hp.micro_steps())]"
READ_AGAIN = "        hessians = collect_hessians(model, [TrainLoader(stream, hp).next()])\n"
TRAINED = "        hessians, figures = train(hp, model, stream, validation, audit)\n"
DIAGNOSTIC = '"diagnostic pre-quantization post-ema")'

BUGS = [
    Bug(
        "T1a",
        "verify: claims",
        [(f"max(step / self.iterations, {PROGRESS}", "step / self.iterations)")],
        settings=UNDER_A_CLOCK,
        world=own_clock,
    ),
    Bug(
        "T1b",
        the_loop_is_switched_on_by_the_clock,
        [(SET_PROGRESS, SET_PROGRESS.replace("progress)", f"{OF_STEPS})"))],
        system="transformer",
    ),
    Bug(
        "T1c",
        "verify: claims",
        [("self.set_looping(progress >= self.hp.enable_looping_at)", "self.set_looping(False)")],
        system="transformer",
    ),
    Bug(
        "T2a",
        the_clock_counts_training_and_nothing_else,
        [("    warm_up(hp, model)\n", "")],
    ),
    Bug(
        "T2b",
        the_clock_counts_training_and_nothing_else,
        [("    shape = 2, hp.micro_rows(), hp", "    shape = 2, 1, hp")],
    ),
    Bug(
        "T2c",
        the_clock_counts_training_and_nothing_else,
        [("return sorted({0.0, self.enable_looping_at})", "return [0.0]")],
        system="transformer",
    ),
    Bug(
        "T2d",
        the_clock_counts_training_and_nothing_else,
        [("[stage.start for stage in self.stages()]", "[self.stages()[-1].start]")],
        system="pure_gdn",
    ),
    # 5 % of the time are kept for GPTQ, as 30 of 600 s were
    Bug(
        "T3",
        "verify: claims",
        [(PROGRESS, PROGRESS.replace("train_seconds()", "max_wallclock_seconds"))],
        settings=dict(
            layout="S",
            iterations=20_000,
            max_wallclock_seconds=6.0,
            gptq_reserve_seconds=0.3,
            warmdown_frac=0.4,
            min_lr=0,
        ),
        world=own_clock,
    ),
    Bug("T4a", "audit: gradients", [LEFT_OUT]),
    Bug(
        "T4b",
        "audit: gradients",
        [(OWNED, LEFT_OUT[1].replace("conv1d", "inst_"))],
        system="crawler",
    ),
    Bug(
        "T5",
        the_gradient_norm_is_that_of_one_step,
        [LEFT_OUT, (ZERO_ALL, ZERO_OWNED)],
    ),
    Bug(
        "T6",
        muon_owns_the_matrices_and_nothing_else,
        [
            (
                OWNED,
                OWNED.replace("model.", 'MATRIX if p.ndim == 2 and "tok" not in name else model.'),
            )
        ],
        system="crawler",
    ),
    Bug(
        "T7",
        decay_shrinks_matrices_and_embeddings_and_nothing_else,
        [("base_lr=hp.scalar_lr, weight_decay=0.0", "base_lr=hp.scalar_lr, weight_decay=0.04")],
        system="kv_share",
    ),
    Bug(
        "T8",
        decay_shrinks_matrices_and_embeddings_and_nothing_else,
        [(RETURN_KINDS, WITHOUT_MASTERS + RETURN_KINDS)],
        system="kv_share",
    ),
    Bug("T10a", "verify: claims", [(AVERAGED, "")]),
    Bug(
        "T10b",
        training_leaves_the_average,
        [
            (
                "    return hessians, dict(step_stop=step",
                "    torch._foreach_copy_(params, fresh)\n    return hessians, dict(step_stop=step",
            ),
            (AVERAGED, "    fresh = [p.clone() for p in params]\n" + AVERAGED),
        ],
    ),
    Bug(
        "T13a",
        "audit: time",
        [
            (
                "(self.max_wallclock_seconds or math.inf) - self.gptq_reserve_seconds",
                "self.max_wallclock_seconds or math.inf",
            )
        ],
        settings=UNDER_A_CLOCK,
        world=own_clock,
    ),
    Bug(
        "T13b",
        the_clock_counts_training_and_nothing_else,
        [(AVERAGED, "    start = time.perf_counter()\n" + AVERAGED)],
    ),
    Bug("T13c", "error: list index out of range", [(TRAINED, TRAINED + READ_AGAIN)]),
    Bug(
        "T14a",
        ranks_stop_together,
        [("world.largest(time.perf_counter() - start,", "(time.perf_counter() - start,")],
    ),
    Bug(
        "T14b",
        every_rank_takes_part_in_every_collective,
        [(DIAGNOSTIC, f"{DIAGNOSTIC} if world.rank == 0 else dict(val_bpb=0.0)")],
    ),
    Bug(
        "T14c",
        every_file_has_one_writer,
        [
            (
                '    if not world.rank:\n        with open(f"{path}.tmp"',
                '    if True:\n        with open(f"{path}.tmp"',
            )
        ],
    ),
    Bug(
        "T14d",
        folders_are_there_before_training,
        [
            (
                "        path.parent.mkdir(parents=True, exist_ok=True)\n        magic",
                "        magic",
            )
        ],
    ),
    Bug(
        "T23",
        the_stages_follow_the_clock,
        [
            (SET_PROGRESS, SET_PROGRESS.replace("progress)", f"{OF_STEPS})")),
            (MICRO_STEPS, MICRO_STEPS.replace("progress)", f"{OF_STEPS})")),
        ],
        system="pure_gdn",
    ),
    Bug("L7a", "verify: claims", [(CALIBRATION, "[(validation.tokens[:640].view(-1, 64), None)]")]),
    Bug(
        "L31",
        "verify: claims",
        [("optimizer.step(hp.lr_multiplier(progress),", "optimizer.step(1.0,")],
    ),
]

test_the_bug_is_caught = each_is_caught(BUGS)
