"""Bugs of learning while scoring: from targets that are not scored yet, or of which something stays
behind."""

from museum import Bug, Program, each_is_caught, own_clock


def slow_learning(p: Program) -> None:
    """A step of scoring takes 0.001 seconds, an update of the adapters 0.2, all else as in
    own_clock."""
    clock, learner = own_clock(p), p.core.LoraTTT
    after_step, update = learner.after_step, learner.update

    def slow_step(self, *args):
        clock.now += 0.001
        after_step(self, *args)

    def slow_update(self, optimizer):
        clock.now += 0.2
        update(self, optimizer)

    learner.after_step, learner.update = slow_step, slow_update


# --------------------------------------------------------------------------------------------------
# Bugs

SGD = dict(ttt="sgd", ttt_lr=0.1, ttt_chunk_tokens=64, eval_stride=32)
STREAM = dict(eval_mode="stream")
LORA = dict(eval_mode="stream", ttt="lora", ttt_lora_lr=0.01, eval_rows=1)
CHUNKS = "range(self.learned, end - self.chunk + 1, self.chunk)"
TOO_EARLY = (CHUNKS, "range(self.learned, min(end + 1, len(self.count) - self.chunk), self.chunk)")
ALL_SCORED = ("if self.count[index].min() < 1:", "if False:")
READ = "            out = model(tokens[here], tokens[here + 1], cache)\n"
FORGOTTEN = "B.data.mul_(goes_on"
RESTORED = "        self.model.load_state_dict(saved)\n"
PACE = "0.95 * (self.hp.eval_seconds or math.inf) * share"
LEARNED_FIRST = """\
            if learner:
                out, _ = model(tokens[here], tokens[here + 1], cache)
                learner.after_step(step, out, scored, number / len(steps))
"""

BUGS = [
    Bug(
        "L33a",
        "error: test-time training on targets .*: not all are scored",
        [TOO_EARLY],
        settings=SGD,
        system="kv_share",
    ),
    Bug("L33b", "verify: future", [TOO_EARLY, ALL_SCORED], settings=SGD, system="kv_share"),
    Bug(
        "L33c", "verify: future", [TOO_EARLY, ALL_SCORED], settings=SGD | STREAM, system="kv_share"
    ),
    Bug("L34", "verify: future", [(READ, LEARNED_FIRST + READ)], settings=LORA),
    Bug(
        "L35a",
        "verify: reproduced",
        [(FORGOTTEN, "B.data.mul_(1 + 0 * goes_on")],
        settings=LORA,
    ),
    Bug("L35b", "verify: rows", [("(nats * scored).sum(1)", "nats.sum(1)")], settings=LORA),
    Bug("L36", "audit: ledger", [(RESTORED, "")], settings=SGD, system="kv_share"),
    Bug(
        "L37",
        "audit: time",
        [(f"spent <= {PACE}", "spent <= math.inf")],
        settings=LORA | dict(eval_seconds=0.5),
        world=slow_learning,
    ),
    Bug(
        "L39",
        "audit: ledger",
        [
            (
                "return parts.SgdTTT(self, hp)",
                'return type("Own", (parts.SgdTTT,), {"score": train_gpt.LoraTTT.score})(self, hp)',
            )
        ],
        settings=SGD,
        system="kv_share",
    ),
]

test_the_bug_is_caught = each_is_caught(BUGS)
