"""Bugs of the recurrence, of attention and its positions, and of what is carried from chunk to
chunk."""

import torch
import torch.nn.functional as F
from corpus import BOS
from museum import Bug, Program, each_is_caught, parts, shaken

# --------------------------------------------------------------------------------------------------
# Catchers


def delta_inputs(T: int, H: int = 2, K: int = 8) -> tuple:
    """Decay and beta that no mix-up of the two would survive."""
    q, k, v = torch.randn(3, 2, T, H, K).unbind()
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    return q, k, v, -0.3 * torch.rand(2, T, H), 0.5 + 0.5 * torch.rand(2, T, H)


def the_delta_rule_is_its_token_loop(p: Program) -> None:
    q, k, v, g, beta = delta_inputs(80)
    S, outputs = torch.zeros(2, 2, 8, 8), []
    for t in range(80):
        S = S * g[:, t, :, None, None].exp()
        error = v[:, t] - torch.einsum("bhkv,bhk->bhv", S, k[:, t])
        S = S + torch.einsum("bhk,bhv->bhkv", beta[:, t, :, None] * k[:, t], error)
        outputs.append(torch.einsum("bhkv,bhk->bhv", S, q[:, t]) / 8**0.5)
    o, state = p.core.gated_delta_rule(q, k, v, g, beta)
    assert torch.allclose(o, torch.stack(outputs, 1), atol=1e-4)
    assert torch.allclose(state, S, atol=1e-4)


def the_delta_rule_split_in_two_is_the_whole(p: Program) -> None:
    inputs = delta_inputs(80)
    o, state = p.core.gated_delta_rule(*inputs)
    for cut in (1, 32, 50):
        first, between = p.core.gated_delta_rule(*(x[:, :cut] for x in inputs))
        second, last = p.core.gated_delta_rule(*(x[:, cut:] for x in inputs), between)
        assert torch.allclose(torch.cat((first, second), 1), o, atol=1e-4)
        assert torch.allclose(last, state, atol=1e-4)


def a_state_is_fed_back_as_it_came(p: Program) -> None:
    inputs = [x.bfloat16() for x in delta_inputs(16)]
    _, first = p.core.gated_delta_rule(*inputs)
    _, second = p.core.gated_delta_rule(*inputs, first)
    assert first.dtype == second.dtype == torch.float32


def texts(stream) -> tuple:
    """Inputs and targets, four rows; documents end on both sides of where they will be cut."""
    tokens = stream.read(0, 4 * 65).view(4, 65)
    x, y = tokens[:, :-1].clone(), tokens[:, 1:].contiguous()
    x[0, 32] = x[1, 31] = x[2, 33] = x[3, 48] = BOS
    return x, y


def chunks_with_a_cache_are_the_whole(p: Program) -> None:
    """Logits of every kind of mixer and of a loop, cut where a document ends, before it and behind
    it."""
    for layout in ("G S G=0 S=1", "A (A G)x2 A=0", "A (G S)x2"):
        _, model, stream, _ = parts(p, layout=layout)
        x, _ = texts(stream)
        with torch.no_grad():
            whole, cache, chunks = shaken(model)(x), model.new_cache(4), []
            for part in x.split([16, 1, 15, 32], 1):
                logits, cache = model(part, cache=cache)
                chunks.append(logits)
        assert (torch.cat(chunks, 1) - whole).abs().max() < 1e-3, layout


def chunks_of_training_are_the_whole(p: Program) -> None:
    """The loss of pure_gdn, whose rows are trained on chunk by chunk."""
    for chunk in (8, 32, 64):
        _, model, stream, _ = parts(p, layout="G S", curriculum=f"0:1x{chunk}")
        batch = texts(stream)
        shaken(model).set_progress(0.0)
        loss = model(*batch).mean().item()
        assert abs(p.core.accumulate(model, [batch]).item() - loss) < 1e-4


def documents_are_scored_from_their_whole_beginning(p: Program) -> None:
    hp, model, _, validation = parts(p, eval_chunk=8)
    x, y = validation.tokens[None, :-1], validation.tokens[None, 1:]
    with torch.no_grad():
        whole = shaken(model)(x, y)[0]
    plan = p.core.stream_plan(validation.tokens, hp)
    nats, count = p.core.score(model, validation.tokens, plan)
    assert (count == 1).all() and (nats - whole).abs().max() < 1e-3


def attention_scores_depend_on_the_distance(p: Program) -> None:
    """Of one vector with itself at all places of a row: equal along diagonals, falling off beside
    the first."""
    hp, _, stream, _ = parts(p)
    ids = stream.read(0, 20)[None]
    ctx = p.core.make_context(ids, hp)
    x = p.core.rotary(torch.randn(hp.num_heads, hp.head_dim).expand(1, 20, -1, -1), ctx)[0]
    scores = torch.einsum("thd,shd->hts", x, x)
    assert (scores[:, 1:, 1:] - scores[:, :-1, :-1]).abs().max() < 1e-4
    assert (scores[:, 0, 0] - scores[:, 0, 1] > 0.01).all()


def no_token_before_the_window_is_seen(p: Program) -> None:
    """One attention layer, one document: a token moves the 16 of its window, and the one behind
    them to which the smear carries it."""
    _, model, *_ = parts(p, layout="S")
    ids = torch.randint(4, 300, (1, 60))
    ids[0, 0] = BOS
    other = ids.clone()
    other[0, 10] += 1
    with torch.no_grad():
        moved = (shaken(model)(ids) - model(other)).abs().amax((0, 2)) > 0
    assert moved[10 : 10 + 16].all() and not moved[:10].any() and not moved[10 + 16 + 1 :].any()


# --------------------------------------------------------------------------------------------------
# Bugs

RULE = "        o, state = gated_delta_rule(q, k, v, g, beta, state)\n"
CPU_RULE = "rule(q, k, v, g, beta, initial_state)[:2]"
TWO_LOOPS = (RULE, RULE.replace("o, ", "_, ") + RULE)
DECAY = "        g = -self.A_log.exp() * F.softplus("
RESET = "        g = g.masked_fill(last(ctx.same_doc, T)[..., :1] == 0, RESET_LOG_DECAY)\n"
AT_BOS = RESET.replace(" == 0,", ".eq(0) & (last(shift(ctx.doc, 1), T)[..., None] > 0),")
EMBEDDED = "        x = x0 = norm(last(self.embed("
STATE_OF_THE_LAST_PASS = [
    (RULE, RULE.replace("state)", "self.carried)") + "        self.carried = state.detach()\n"),
    (
        EMBEDDED,
        "        for block in self.blocks:\n            block.mixer.carried = None\n" + EMBEDDED,
    ),
]
LOOPING = dict(system="crawler", settings=dict(layout="(G)x2"))
ROTATED = "    n = ctx.cos.shape[-1]\n"
UNPACK = "        out, cache = out if plan.cached else (out, None)\n"

BUGS = [
    Bug(
        "R1a",
        the_delta_rule_split_in_two_is_the_whole,
        [(CPU_RULE, CPU_RULE.replace("initial_state", "0 * initial_state"))],
    ),
    Bug(
        "R1b",
        chunks_with_a_cache_are_the_whole,
        [(RULE, RULE.replace("beta, state", "beta, None if state is None else 0 * state"))],
        system="layouts",
    ),
    Bug(
        "R1c",
        chunks_of_training_are_the_whole,
        [
            (
                "            nats, cache = self(x_chunk",
                "            nats, _ = self(x_chunk",
            )
        ],
        system="pure_gdn",
    ),
    Bug(
        "R2",
        the_delta_rule_is_its_token_loop,
        [("baddbmm(kept * S, k_n,", "baddbmm(0 * S, k_n,")],
    ),
    Bug("R3", "audit: gradients", [(DECAY, DECAY.replace("-self", "-0.0 * self"))]),
    Bug("R4a", "verify: future", [(RESET, ""), TWO_LOOPS]),
    Bug("R4b", "verify: future", [(RESET, ""), *STATE_OF_THE_LAST_PASS], **LOOPING),
    Bug("R5a", "verify: future", [(RESET, AT_BOS), TWO_LOOPS]),
    Bug("R5b", "verify: future", [(RESET, AT_BOS), *STATE_OF_THE_LAST_PASS], **LOOPING),
    Bug(
        "R6",
        the_delta_rule_is_its_token_loop,
        [(CPU_RULE, CPU_RULE.replace("g, beta", "beta, g"))],
    ),
    Bug(
        "R7",
        a_state_is_fed_back_as_it_came,
        [("S.unflatten(0, (B, H))\n", "S.unflatten(0, (B, H)).to(v.dtype)\n")],
    ),
    Bug(
        "R8",
        chunks_with_a_cache_are_the_whole,
        [("else cache.layers[step])", "else cache.layers[i])")],
        system="layouts",
    ),
    Bug(
        "T9a",
        attention_scores_depend_on_the_distance,
        [
            (
                ROTATED,
                f"{ROTATED}    cos, sin = (x_[0, : x.shape[-2], 0] for x_ in (ctx.cos, ctx.sin))\n"
                "    ctx = ctx._replace(cos=cos, sin=sin)\n",
            )
        ],
    ),
    Bug(
        "T9b",
        no_token_before_the_window_is_seen,
        [
            (
                "return Attention(self.hp, dict(S=self.hp.window_size, A=sys.maxsize)[kind])",
                "return Attention(self.hp, sys.maxsize)",
            )
        ],
    ),
    Bug(
        "L38",
        documents_are_scored_from_their_whole_beginning,
        [(UNPACK, UNPACK.replace("out, cache = out", "out, _ = out"))],
    ),
]

test_the_bug_is_caught = each_is_caught(BUGS)
