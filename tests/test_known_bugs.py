"""The museum: every bug that voided a Gated DeltaNet record, every rejection of the competition that fits here, and the
cheats that an earlier audit passed.

Each is planted in a copy of train_gpt.py, alone, and must be caught by name: by a check of the run's own audit, by an
error, or by a check below. tests/README.md says where each bug was and what it was worth.
"""

import ast
import copy
import functools
import itertools
import json
import os
import re
import shutil
import sys
import tempfile
import time
import types
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY
from corpus import (
    BOS,
    DOCUMENTS,
    NORMAL,
    UNUSED,
    document_ids,
    edit_pieces,
    load,
    prose,
    tokenizer_model,
    write_corpus,
    write_shard,
)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "data"))

import prepare  # noqa: E402  (the path comes first)

SOURCE = (ROOT / "train_gpt.py").read_text()
SERIAL = itertools.count()


def mutant(folder: Path, *edits: tuple[str, str]) -> types.ModuleType:
    """train_gpt.py with each text replaced, which must be there exactly once, as a module of its own; seeds torch."""
    torch.manual_seed(0)
    source = SOURCE
    for old, new in edits:
        assert source.count(old) == 1, f"the place of the bug is not there once but {source.count(old)} times: {old!r}"
        source = source.replace(old, new)
    name = f"mutant_{next(SERIAL)}"
    path = folder / "train_gpt.py"
    path.write_text(source)
    module = types.ModuleType(name)
    module.__file__ = str(path)
    # custom ops are registered by name for the whole process: each copy has its own
    with mock.patch.dict("sys.modules", {name: module}):
        exec(compile(source.replace('"train_gpt::', f'"{name}::'), path, "exec"), module.__dict__)
    module.DEVICE, module.COMPUTE_DTYPE = torch.device("cpu"), torch.float32
    return module


def run(module: types.ModuleType, folder: Path, **settings) -> None:
    """main() in the folder, with these hyperparameters."""
    env = {name.upper(): str(int(value) if isinstance(value, bool) else value) for name, value in settings.items()}
    here = os.getcwd()
    os.chdir(folder)
    try:
        with mock.patch.dict(os.environ, env):
            module.main()
    finally:
        os.chdir(here)
        module.log.handlers.clear()


def audit(module: types.ModuleType, folder: Path, corpus: Callable = write_corpus, **settings) -> dict:
    """The whole run on a tiny model: its checks by name. Raises what the run raises, but for a failed audit."""
    data = folder / "data"
    data.mkdir(parents=True)
    try:
        run(module, folder, **(TINY | corpus(data) | dict(run_id="run", artifact=folder / "model.ptz") | settings))
        assert (folder / "submission.json").exists()
    except RuntimeError as error:
        if not str(error).startswith("audit failed: "):
            raise
        assert not (folder / "submission.json").exists()
    lines = re.findall(r"^audit: (\w+) (passed|FAILED) (.*)$", (folder / "logs" / "run.txt").read_text(), re.M)
    return {name: dict(json.loads(figures), passed=verdict == "passed") for name, verdict, figures in lines}


def as_it_is(module) -> None:
    """The world that a bug needs to show, for most of them."""


@dataclass
class Bug:
    """`edits` plant it in the source, `corpus` in the data; it needs `settings` and `world`, say a clock, to show.
    caught_by: 'audit: <check>', 'error: <part of the message>', or a function below that passes without the bug."""

    id: str
    caught_by: str | Callable
    edits: list[tuple[str, str]] = field(default_factory=list)
    corpus: Callable = write_corpus
    settings: dict = field(default_factory=dict)
    world: Callable = as_it_is

    @property
    def catcher(self) -> str:
        return self.caught_by.__name__ if callable(self.caught_by) else self.caught_by


# -----------------------------------------------------------------------------
# Data with a bug in it, or in which a bug shows

def shards(folder: Path, train: list[int], val: list[list[int]], model: bytes | None = None) -> dict:
    """Two training shards, the validation shards, the tokenizer."""
    model = model or tokenizer_model()
    cut = len(train) // 3
    write_shard(folder / "fineweb_train_000000.bin", train[:cut])
    write_shard(folder / "fineweb_train_000001.bin", train[cut:])
    for i, ids in enumerate(val):
        write_shard(folder / f"fineweb_val_{i:06d}.bin", ids)
    (folder / "tokenizer.model").write_bytes(model)
    return dict(data_path=folder, tokenizer_path=folder / "tokenizer.model", vocab_size=load(model).vocab_size())


@functools.cache
def prose_ids(first: int = 0, last: int | None = None) -> list[int]:
    return document_ids(load(tokenizer_model()), *prose()[first:last])


def every_script(folder):
    """Validation text of all that DOCUMENTS has: emoji and CJK are byte pieces."""
    return shards(folder, prose_ids(0, 60), [document_ids(load(tokenizer_model()), *DOCUMENTS.values())])


def two_validation_shards(folder):
    return shards(folder, prose_ids(10), [prose_ids(0, 4), prose_ids(4, 8)])


def a_truncated_validation_shard(folder):
    told = write_corpus(folder)
    path = folder / "fineweb_val_000000.bin"
    path.write_bytes(path.read_bytes()[:-1000])
    return told


def transformed(folder):
    """CaseOps shards, as data/prepare.py writes them: operators for case, bytes of the original beside the tokens."""
    files = []
    for name, texts in ("docs", prose()[20:80]), ("val", prose()[:20]):
        files += [f"--{'val-' * (name == 'val')}docs", str(folder / f"{name}.jsonl")]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(dict(text=text)) + "\n" for text in texts))
    prepare.main([*files, "--caseops", "--vocab-size", "400", "--name", "cased", "--output-root", str(folder)])
    return dict(data_path=folder / "datasets" / "cased", vocab_size=400,
                tokenizer_path=folder / "tokenizers" / "cased_400_bpe_caseops.model")


def transformed_without_bytes(folder):
    told = transformed(folder)
    for path in told["data_path"].glob("fineweb_val_bytes_*.bin"):
        path.unlink()
    return told


def fifty_thousand_documents(folder):
    """As many as the official split has, but of other text."""
    (folder / "fineweb").mkdir()
    return shards(folder / "fineweb", prose_ids(), [[BOS, *load(tokenizer_model()).encode("a b")] * 50_000])


def validation_of_a_fifth(folder):
    """Split for training as if a fifth of the validation documents were all of them."""
    return shards(folder, prose_ids(4), [prose_ids(0, 20)])


def validation_as_a_training_shard(folder):
    told = write_corpus(folder)
    shutil.copy(folder / "fineweb_val_000000.bin", folder / "fineweb_train_000002.bin")
    return told


def without_bos(folder):
    def cut(ids):
        return [token for token in ids if token != BOS]
    return shards(folder, cut(prose_ids(10)), [cut(prose_ids(0, 10))])


def a_tokenizer_without_a_space(folder):
    sp = load(tokenizer_model())
    model = edit_pieces(tokenizer_model(), {sp.piece_to_id("\u2581"): ("something", NORMAL)})
    ids = document_ids(load(model), *prose())
    return shards(folder, [BOS, *ids[2000:]], [ids[:2000]], model)


# -----------------------------------------------------------------------------
# What the checks share

def own_clock(m) -> SimpleNamespace:
    """The module's time from now on: an optimizer step takes 0.1 seconds, the Hessians 0.2, all else nothing."""
    clock = SimpleNamespace(now=0.0, strftime=time.strftime, gmtime=time.gmtime)
    clock.perf_counter = lambda: clock.now

    def taking(seconds, function):
        def timed(*args):
            clock.now += seconds
            return function(*args)
        return timed

    m.time, m.Muon.step, m.collect_hessians = clock, taking(0.1, m.Muon.step), taking(0.2, m.collect_hessians)
    return clock


def slow_learning(m) -> None:
    """A step of scoring takes 0.001 seconds, an update of the adapters 0.2, all else as in own_clock."""
    clock, learn, update = own_clock(m), m.Learner.learn, m.Learner.update

    def slow_learn(learner, *args):
        clock.now += 0.001
        learn(learner, *args)

    def slow_update(learner, optimizer):
        clock.now += 0.2
        update(learner, optimizer)

    m.Learner.learn, m.Learner.update = slow_learn, slow_update


def beside(m) -> Path:
    """The folder of the module, where a check may write."""
    return Path(m.__file__).parent


def parts(m, **settings) -> tuple:
    """Hyperparameters, model, training tokens and validation of a tiny run; its files lie beside the module."""
    data = beside(m) / "data"
    data.mkdir(exist_ok=True)
    hp = m.Hyperparameters(**(TINY | write_corpus(data) | dict(artifact=str(beside(m) / "model.ptz")) | settings))
    hp.validate()
    return hp, m.GPT(hp), m.TokenStream(hp.data_path, "train", hp.vocab_size), m.Validation(hp)


def shaken(model):
    """Noise on all weights: nothing hides behind a zero or a one."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.where(p == 0, 0.2, 0.1) * torch.randn_like(p))
    return model


def two_batches(m, hp, stream) -> list:
    tokens = stream.read(0, 2 * 4 * hp.train_seq_len).view(2, 4, -1)
    return [(x[:, :-1], x[:, 1:]) for x in tokens]


def as_rank(m, rank: int) -> list:
    """From now on the module is one of two ranks; its collectives find the same on the other. Returns their record."""
    calls, ops = [], torch.distributed.ReduceOp
    m.RANK, m.WORLD_SIZE = rank, 2
    m.all_reduce = lambda x, op=ops.SUM: (calls.append((str(op), x.shape)), x)[1]
    m.dist = SimpleNamespace(
        ReduceOp=ops, all_gather_into_tensor=lambda out, x: out.copy_(torch.cat((x, x))),
        barrier=lambda: calls.append("barrier"), init_process_group=lambda backend: calls.append("join"),
        destroy_process_group=lambda: calls.append("leave"))
    return calls


def is_matrix(name: str) -> bool:
    """What Muon may own: weights that multiply activations, but for the two projections to a number a head."""
    return name == "ngram.proj.weight" or bool(
        re.search(r"\.(q|k|v|g|o|up|down)_proj\.weight$|^inst_(in|out\.\d+)\.weight$", name))


def refuses(action: Callable) -> bool:
    try:
        action()
    except ValueError:
        return True
    return False


def imported(m) -> set[str]:
    tree = ast.parse(Path(m.__file__).read_text())
    plain = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    return {name.split(".")[0] for name in plain | {
        node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}}


# -----------------------------------------------------------------------------
# Checks of bytes and evaluation

def unused_pieces_are_boundaries(m):
    sp = load(edit_pieces(tokenizer_model(), {300: ("\u2581unused", UNUSED), 301: ("\u2581word", NORMAL)}))
    luts = m.build_sentencepiece_luts(sp, sp.vocab_size(), "cpu")
    after = m.token_bytes(luts, torch.tensor([300, 310]), torch.tensor([301, 301]))
    assert after.tolist() == [len("word"), len(" word")]
    assert luts[0][300] == 0 and luts[2][300]


def a_tokenizer_of_another_size_is_refused(m):
    sp = load(tokenizer_model())
    for size in (sp.vocab_size() - 1, sp.vocab_size() + 1):
        assert refuses(lambda size=size: m.build_sentencepiece_luts(sp, size, "cpu"))


def submission_json_says_what_the_run_did(m):
    audit(m, beside(m))
    submission = json.loads((beside(m) / "submission.json").read_text())
    logged = re.findall(r"^final_int6_sliding_window_exact val_loss:(\S+) val_bpb:(\S+)$",
                        (beside(m) / "logs" / "run.txt").read_text(), re.M)
    assert submission["bytes_model"] == os.path.getsize(beside(m) / "model.ptz")
    scores = submission["own_text"]
    assert [(f"{scores['val_loss']:.8f}", f"{scores['val_bpb']:.8f}")] == logged
    assert submission["hardware"] == "1xCPU"


def the_cap_is_16_000_000_bytes_with_the_code(m):
    code, artifact = os.path.getsize(m.__file__), beside(m) / "model.ptz"
    artifact.touch()
    for size, fits in ((16_000_000 - code, True), (16_000_001 - code, False), (16_000_001, False)):
        os.truncate(artifact, size)
        checks = m.Audit()
        m.audit_limits(checks, m.Hyperparameters(artifact=str(artifact)), dict(eval_time_seconds=1.0))
        assert checks.checks["size"]["passed"] == fits


def training_and_scoring_are_one_function(m):
    _, model, *_ = parts(m)
    ids = torch.randint(384, (2, 64))
    with torch.no_grad():
        scoring = shaken(model).eval()(ids)
    assert torch.allclose(model.train()(ids), scoring, atol=1e-4)


# -----------------------------------------------------------------------------
# Checks of the recurrence

def delta_inputs(T: int, H: int = 2, K: int = 8):
    """Decay and beta that no mix-up of the two would survive."""
    q, k, v = torch.randn(3, 2, T, H, K).unbind()
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    return q, k, v, -0.3 * torch.rand(2, T, H), 0.5 + 0.5 * torch.rand(2, T, H)


def the_delta_rule_is_its_token_loop(m):
    q, k, v, g, beta = delta_inputs(80)
    S, outputs = torch.zeros(2, 2, 8, 8), []
    for t in range(80):
        S = S * g[:, t, :, None, None].exp()
        error = v[:, t] - torch.einsum("bhkv,bhk->bhv", S, k[:, t])
        S = S + torch.einsum("bhk,bhv->bhkv", beta[:, t, :, None] * k[:, t], error)
        outputs.append(torch.einsum("bhkv,bhk->bhv", S, q[:, t]) / 8**0.5)
    o, state = m.gated_delta_rule(q, k, v, g, beta)
    assert torch.allclose(o, torch.stack(outputs, 1), atol=1e-4) and torch.allclose(state, S, atol=1e-4)


def the_delta_rule_split_in_two_is_the_whole(m):
    inputs = delta_inputs(80)
    o, state = m.gated_delta_rule(*inputs)
    for cut in (1, 32, 50):
        first, between = m.gated_delta_rule(*(x[:, :cut] for x in inputs))
        second, last = m.gated_delta_rule(*(x[:, cut:] for x in inputs), between)
        assert torch.allclose(torch.cat((first, second), 1), o, atol=1e-4) and torch.allclose(last, state, atol=1e-4)


def a_state_is_fed_back_as_it_came(m):
    inputs = [x.bfloat16() for x in delta_inputs(16)]
    _, first = m.gated_delta_rule(*inputs)
    _, second = m.gated_delta_rule(*inputs, first)
    assert first.dtype == second.dtype == torch.float32


def chunks_with_memory_are_the_whole(m):
    """Logits of every kind of mixer and of a loop, cut where a document ends, before it and behind it; the loss too."""
    for layout in ("G S G~0 S=1", "A (A g)x2 A~0", "a (G s)x2"):
        hp, model, stream, _ = parts(m, layout=layout)
        tokens = stream.read(0, 4 * 65).view(4, 65)
        x, y = tokens[:, :-1], tokens[:, 1:].contiguous()
        x[0, 32] = x[1, 31] = x[2, 33] = x[3, 48] = BOS
        with torch.no_grad():
            whole, memory = shaken(model)(x), model.new_memory(4)
            chunks = torch.cat([model(part, memory) for part in x.split([16, 1, 15, 32], 1)], 1)
        assert (chunks - whole).abs().max() < 1e-3
        nats_of = m.scorer(model)
        loss = nats_of(x, y).mean().item()
        for chunk in (8, 32, 64):
            assert abs(m.accumulate(model, nats_of, [(x, y)], chunk).item() - loss) < 1e-4


def documents_are_scored_from_their_whole_beginning(m):
    hp, model, _, validation = parts(m, layout="G S", eval_chunk=8, ngram_vocab_size=0)
    with torch.no_grad():
        whole = m.token_nats(shaken(model), validation.tokens[None, :-1], validation.tokens[None, 1:])[0]
    nats, count = m.score(m.scorer(model), validation.tokens, hp, 0)
    assert (count == 1).all() and (nats - whole).abs().max() < 1e-3


def adapters_learn_from_scored_targets_only(m):
    """The gradient of each score that some row read beyond its document, or with nothing to read."""
    hp, model, _, validation = parts(m, **LORA)
    learn, seen = m.Learner.learn, []

    def spy(learner, step, out, scored):
        out.register_hook(lambda gradient: seen.append(gradient.masked_fill(scored, 0.0).abs().max().item()))
        learn(learner, step, out, scored)

    with mock.patch.object(m.Learner, "learn", spy):
        m.score(m.scorer(model), validation.tokens, hp, 0, "lora")
    assert len(seen) > 10 and max(seen) == 0


def a_new_document_ends_the_memory(m):
    """The same row, from BOS on, after two texts: state, convolutions, attention and n-grams know nothing of them."""
    _, model, stream, _ = parts(m, layout="G S A (g)x2")
    row, texts = stream.read(0, 30)[None], stream.read(30, 2 * 40).view(2, 1, 40).clamp(min=2)
    assert row[0, 0] == BOS and (texts[0] != texts[1]).any()
    with torch.no_grad():
        shaken(model)
        logits = [model(row)]
        for text in texts:
            memory = model.new_memory(1)
            model(text, memory)
            logits.append(model(row, memory))
    assert max((other - logits[0]).abs().max() for other in logits[1:]) < 1e-4
    assert (logits[1] - logits[2]).abs().max() < 1e-6


# -----------------------------------------------------------------------------
# Checks of training

def under_a_clock(m) -> list[tuple]:
    """20 steps of 20,000 that the clock has room for: share of it that is over, passes, micro-batches, their chunks."""
    clock, accumulate, seen = own_clock(m), m.accumulate, []

    def spy(model, nats_of, batch, chunk):
        seen.append((clock.now, len(model.order), len(batch), chunk))
        return accumulate(model, nats_of, batch, chunk)

    m.accumulate = spy
    hp, *rest = parts(m, layout="S (S)x2", enable_looping_at=0.475, curriculum="0:1x32 0.475:2x64", grad_accum_steps=2,
                      iterations=20_000, max_wallclock_seconds=2.05, warmup_steps=0)
    m.train(hp, *rest, m.Audit())
    assert len(seen) == 20
    return [((now - seen[0][0]) / 2.05, *rest) for now, *rest in seen]


def the_loop_is_switched_on_by_the_clock(m):
    for share, passes, *_ in under_a_clock(m):
        assert passes == (3 if share >= 0.475 else 2)


def the_stages_follow_the_clock(m):
    for share, _, micro_batches, chunk in under_a_clock(m):
        assert (micro_batches, chunk) == ((2, 64) if share >= 0.475 else (1, 32))


def the_clock_counts_training_and_nothing_else(m):
    """5 steps and the Hessians, in a world where the first sight of a shape costs 100 seconds of compiling; then the
    same where a loop is switched on and the passes grow on the way."""
    clock, seen, token_nats = own_clock(m), set(), m.token_nats

    def compiled(model, x, y, *memory):
        graph = (*x.shape, len(model.order), len(memory), torch.is_grad_enabled())
        clock.now += 100.0 * (graph not in seen)
        seen.add(graph)
        return token_nats(model, x, y, *memory)

    m.token_nats = compiled
    growing = dict(layout="S (S)x2", enable_looping_at=0.4, curriculum="0:1x32 .6:1x64")
    for settings in dict(layout="S"), growing:
        seen.clear()
        hp, *rest = parts(m, **settings, iterations=5)
        assert abs(m.train(hp, *rest, m.Audit())["wallclock_seconds"] - (5 * 0.1 + 0.2)) < 1e-6
    assert len({passes for _, _, passes, _, _ in seen}) == len({length for _, length, *_ in seen}) == 2


def the_gradient_norm_is_that_of_one_step(m):
    """The same batch three times at learning rate 0: the norm is that of its gradient each time."""
    hp, model, stream, _ = parts(m)
    batch, params = two_batches(m, hp, stream)[:1], list(shaken(model).parameters())
    nats_of, optimizer = m.scorer(model), m.Muon(model, hp)
    expected = torch.nn.utils.get_total_norm(torch.autograd.grad(nats_of(*batch[0]).mean(), params)).item()
    for _ in range(3):
        m.accumulate(model, nats_of, batch, hp.train_seq_len)
        assert abs(optimizer.step(0.0, 0.9).item() / expected - 1) < 1e-4


def muon_owns_the_matrices_and_nothing_else(m):
    _, model, *_ = parts(m, layout="G S (A g)x2", inst_dim=4, unet_skips=True, attn_gate_dims=4, parallel_start_layer=1)
    names = {id(p): name for name, p in model.named_parameters()}
    owned = {names[id(p)] for stack in m.Muon(model, model.hp).stacks.values() for p in stack}
    assert owned == {name for name in names.values() if is_matrix(name)}


def decay_shrinks_matrices_and_embeddings_and_nothing_else(m):
    """100 steps without gradients at the lr wd = 8e-4 of the runs that got it wrong; all else stays bit for bit."""
    hp, model, *_ = parts(m, muon_wd=0.04, matrix_lr=0.02, embed_wd=0.04, tied_embed_lr=0.02)
    optimizer, start = m.Muon(shaken(model), hp), {name: p.detach().double() for name, p in model.named_parameters()}
    for _ in range(100):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step(1.0, 0.95)
    for name, p in model.named_parameters():
        if is_matrix(name) or name in ("tok_emb.weight", "ngram.table"):
            assert abs(p.double().norm() / start[name].norm() / (1 - 8e-4) ** 100 - 1) < 1e-3, name
        else:
            assert torch.equal(p.double(), start[name]), name


def attention_scores_depend_on_the_distance(m):
    """Of one vector with itself at all places of a row: equal along diagonals, falling off beside the first."""
    hp, _, stream, _ = parts(m)
    ctx = m.make_context(stream.read(0, 20)[None], hp.rope_dims, hp.rope_base, torch.float32)
    x = m.rotary(torch.randn(hp.num_heads, hp.head_dim).expand(1, 20, -1, -1), ctx)[0]
    scores = torch.einsum("thd,shd->hts", x, x)
    assert (scores[:, 1:, 1:] - scores[:, :-1, :-1]).abs().max() < 1e-4
    assert (scores[:, 0, 0] - scores[:, 0, 1] > 0.01).all()


def no_token_before_the_window_is_seen(m):
    """One attention layer, one document: a token moves the 16 of its window, and 3 that n-grams and smear carry it."""
    _, model, *_ = parts(m, layout="S")
    ids = torch.randint(4, 300, (1, 60))
    ids[0, 0] = 1
    other = ids.clone()
    other[0, 10] += 1
    with torch.no_grad():
        moved = (shaken(model)(ids) - model(other)).abs().amax((0, 2)) > 0
    assert moved[10 : 10 + 16].all() and not moved[:10].any() and not moved[10 + 16 + 3 :].any()


def training_leaves_the_average(m):
    """0.9 of the average and 0.1 of the new weights, but for the first steps' (1 + t) / (10 + t)."""
    hp, model, *rest = parts(m, layout="S", ema_decay=0.9)
    steps, step = [], m.Muon.step

    def recorded(*args):
        grad_norm = step(*args)
        steps.append([p.detach().clone() for p in model.parameters()])
        return grad_norm

    m.Muon.step = recorded
    average = [p.detach().clone() for p in model.parameters()]
    m.train(hp, model, *rest, m.Audit())
    for t, weights in enumerate(steps[hp.warmup_steps :]):
        decay = min(0.9, (1 + t) / (10 + t))
        average = [decay * a + (1 - decay) * w for a, w in zip(average, weights, strict=True)]
    for p, expected in zip(model.parameters(), average, strict=True):
        assert (p - expected).abs().max() < 1e-5


def ranks_stop_together(m):
    """The slower of two ranks is 0.25 seconds later at the same step. Its run first, then the other's, which meets
    in each maximum over the ranks what the slower one gave: both take part in as many, and make as many steps."""
    clock, loader, met, stops = own_clock(m), m.TrainLoader, [], []

    def record(x, op=None):
        if op == torch.distributed.ReduceOp.MAX:
            met.append(x.clone())
        return x

    def meet(x, op=None):
        if op == torch.distributed.ReduceOp.MAX:
            assert met, "this rank goes on where the other has stopped"
            x.copy_(torch.maximum(x, met.pop(0)))
        return x

    for late, m.all_reduce in (0.25, record), (0.0, meet):
        clock.now, lateness = 0.0, late

        def started(*args, lateness=lateness):
            clock.now += lateness
            return loader(*args)

        m.TrainLoader = started
        hp, *rest = parts(m, layout="S", iterations=1000, max_wallclock_seconds=2.0)
        stops.append(m.train(hp, *rest, m.Audit())["step_stop"])
    assert stops[0] == stops[1] and not met


def every_rank_takes_part_in_every_collective(m):
    hp, model, stream, validation = parts(m, layout="S")
    hessians, records = m.collect_hessians(shaken(model), two_batches(m, hp, stream)), []
    for rank in (0, 1):
        records.append(as_rank(m, rank))
        m.pack(hp, model, validation, hessians, m.Audit())
        m.evaluate(hp, validation, m.Audit())
    assert records[0] == records[1] and len(records[0]) > 10


def every_file_has_one_writer(m):
    """A whole run as the first of two ranks, then as the second, where a failed check stops neither: what the first
    wrote stays untouched, and nothing is added to it."""
    m.Audit.verdict = lambda self: None  # each rank scores its half alone here
    folder, states = beside(m), []
    data = folder / "data"
    data.mkdir()
    settings = TINY | write_corpus(data) | dict(run_id="run", artifact=folder / "model.ptz", layout="S",
                                                scores=folder / "scores.npz", iterations=2)
    for rank in (0, 1):
        as_rank(m, rank)
        run(m, folder, **settings)
        states.append({path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.rglob("*")})
    assert states[0] == states[1]
    assert {"model.ptz", "scores.npz", "submission.json", "run.txt"} <= {path.name for path in states[0]}


def folders_are_there_before_training(m):
    folder = beside(m)
    m.init_log(m.Hyperparameters(run_id=f"{folder}/run", artifact=f"{folder}/new/model.ptz",
                                 scores=f"{folder}/newer/scores.npz"))
    m.log.handlers.clear()
    assert (folder / "new").is_dir() and (folder / "newer").is_dir()


# -----------------------------------------------------------------------------
# Checks of quantization and of the artifact

def an_artifact_without_a_tensor_is_refused(m):
    hp, model, *_ = parts(m)
    table = m.tensor_table
    with mock.patch.object(m, "tensor_table", lambda model: [row for row in table(model) if "A_log" not in row[0]]):
        m.save_artifact(hp.artifact, model, hp)
    assert refuses(lambda: m.load_artifact(hp.artifact, "cpu"))


def gptq_helps_on_correlated_inputs(m):
    """32 columns of 8 strong directions and weak ones, 4 bits: at most half the error of rounding to nearest."""
    mix = torch.randn(8, 32)
    X, W = torch.randn(400, 8) @ mix + 0.1 * torch.randn(400, 32), torch.randn(24, 32)
    q, scale = m.gptq_quantize(W, X.T @ X, 4, 4.0)
    s = scale.float()[:, None]
    nearest = (W / s).round().clamp(-7, 7)
    assert (X @ (W - q * s).T).norm() < 0.5 * (X @ (W - nearest * s).T).norm()


def the_looped_blocks_are_calibrated_behind_what_ships(m):
    """Each looped matrix leaves training with the sum over the inputs that it has behind the other blocks' quantized
    weights, which are built here from their first Hessians, and these blocks with their first."""
    collected, collect = [], m.collect_hessians

    def spy(model, batches):
        collected.append((batches, collect(model, batches)))
        return collected[-1][1]

    m.collect_hessians = spy
    hp, model, *rest = parts(m, layout="A (A g)x2 S", gptq_phases=2, matrix_bits=3, embed_bits=8)
    final = m.train(hp, model, *rest, m.Audit())["hessians"]
    batches, first = collected[1]  # after the warm-up's
    flat, expected = copy.deepcopy(model), {}
    names = {id(p): name for name, p in flat.named_parameters()}
    with torch.no_grad():
        for name, p in flat.named_parameters():
            if name in first and not name.startswith(("blocks.1.", "blocks.2.")):
                embed = name in ("tok_emb.weight", "ngram.table")
                bits, sigmas = (8, hp.embed_clip_sigmas) if embed else (3, hp.matrix_clip_sigmas)
                q, scale = m.gptq_quantize(p, first[name], bits, sigmas)
                p.copy_(q.float() * scale.float()[:, None])
            else:
                p.copy_(p.half())
        for layer in flat.modules():
            if isinstance(layer, m.Linear):
                layer.register_forward_hook(lambda layer, inputs, _: expected.setdefault(
                    names[id(layer.weight)], []).append(inputs[0].flatten(0, 1)))
        for x, _ in batches:
            flat(x)
    looped = {name for name in first if name.startswith(("blocks.1.", "blocks.2."))}
    assert final.keys() == first.keys() and len(looped) == 11
    for name, hessian in final.items():
        if name in looped:
            X = torch.cat(expected[name]).double()
            assert torch.allclose(hessian.double(), X.T @ X, rtol=1e-3, atol=1e-3), name
            assert (hessian - first[name]).norm() > 1e-2 * first[name].norm(), name
        else:
            assert torch.equal(hessian, first[name]), name


def the_artifact_is_scored_with_its_loop(m):
    """Loaded, it predicts what the weights that it holds predict in the model that was trained."""
    hp, model, *_ = parts(m, layout="A (A g)x3 A", inst_dim=4, unet_skips=True)
    quantized = m.quantize(shaken(model), hp)
    m.save_artifact(hp.artifact, model, hp, quantized)
    ids = torch.randint(4, 300, (2, 60))
    with torch.no_grad():
        expected = m.dequantized(model, quantized)(ids)
        assert torch.equal(m.load_artifact(hp.artifact, "cpu")[0](ids), expected)
        model.order = [0, 1, 2, 3]
        assert (m.dequantized(model, quantized)(ids) - expected).abs().max() > 0.1


def rows_of_small_weights_keep_their_scale(m):
    W = torch.randn(8, 64) * torch.logspace(-4, 0, 8)[:, None]
    _, scale = m.gptq_quantize(W, torch.eye(64), 6, 12.85)
    expected = 12.85 * W.double().numpy().std(axis=1, ddof=1) / 31
    assert (abs(scale.double().numpy() / expected - 1) < 0.01).all()


def the_log_and_the_artifact_say_what_runs(m):
    """Hyperparameters in the log = those in the artifact = those that were set; parameters by the published formula."""
    folder = beside(m) / "whole"
    settings = dict(layout="G2 S G S=2 A", mlp_mult=2.5, ngram_vocab_size=96, ema_decay=0.5, iterations=2)
    audit(m, folder, **settings)
    files = dict(data_path=str(folder / "data"), tokenizer_path=str(folder / "data" / "tokenizer.model"))
    hp = m.Hyperparameters(**(TINY | write_corpus(folder / "data") | files | settings | dict(
        run_id="run", artifact=str(folder / "model.ptz"))))
    lines = (folder / "logs" / "run.txt").read_text().splitlines()
    assert {f"  {name}: {value}" for name, value in asdict(hp).items()} <= set(lines)
    saved = asdict(m.load_artifact(hp.artifact, "cpu")[1])
    own = ("run_id", "artifact")  # of a process, not of a model
    assert {k: v for k, v in saved.items() if k not in own} == {k: v for k, v in asdict(hp).items() if k not in own}
    D, n = hp.model_dim, hp.gdn_heads * hp.gdn_head_dim
    delta = 5 * D * n + 2 * D * hp.gdn_heads + 12 * n + 2 * hp.gdn_heads + hp.gdn_head_dim
    attention = 2 * D * hp.head_dim * (hp.num_heads + hp.num_kv_heads) + hp.num_heads
    embedding = hp.vocab_size * D + 96 * hp.ngram_dim + hp.ngram_dim * D + hp.smear_dims + 1
    blocks = 6 * (2 * D * int(2.5 * D) + 4 * D)
    assert f"model_params:{embedding + blocks + 3 * delta + 2 * attention}" in lines


def embeddings_have_eight_bits(m):
    """At 3 sigmas some weights of a normal table lie at the end of the scale: 127, which 6 bits do not reach."""
    hp, model, *_ = parts(m, embed_bits=8, embed_clip_sigmas=3.0)
    ends = {name: q.abs().max().item() for name, (q, _) in m.quantize(shaken(model), hp).items()}
    assert ends["tok_emb.weight"] == ends["ngram.table"] == 127
    assert max(end for name, end in ends.items() if is_matrix(name)) <= 31


# -----------------------------------------------------------------------------
# Checks for what is forbidden

def only_training_text_is_learned_from(m):
    """What meets a gradient or a Hessian, anywhere in the run, is no validation text."""
    rows, forward, collect = [], m.GPT.forward, m.collect_hessians

    def spy(self, ids, memory=None):
        rows.extend(ids if torch.is_grad_enabled() else ())
        return forward(self, ids, memory)

    def spy_too(model, batches):
        rows.extend(row for x, _ in batches for row in x)
        return collect(model, batches)

    m.GPT.forward, m.collect_hessians = spy, spy_too
    audit(m, beside(m))
    val = (beside(m) / "data" / "fineweb_val_000000.bin").read_bytes()
    assert not [row for row in rows if row.numpy().astype("<u2").tobytes() in val]
    assert len(rows) == (2 + 10 + 2) * 4  # of the warm-up, the steps and the calibration


def the_artifact_alone_gives_the_score(m):
    """In a folder that has the artifact, the tokenizer and the validation shard, and nothing else."""
    trained, fresh = beside(m) / "trained", beside(m) / "fresh"
    fresh.mkdir()
    audit(m, trained)
    for name in ("model.ptz", "data/tokenizer.model", "data/fineweb_val_000000.bin"):
        shutil.copy(trained / name, fresh)
    where = dict(data_path=fresh, tokenizer_path=fresh / "tokenizer.model", artifact=fresh / "model.ptz")
    try:
        run(m, fresh, eval_only=True, run_id="run", **where)
    except FileNotFoundError as error:
        raise AssertionError("the score needs more than the artifact") from error
    line = re.compile(r"^final_int6_sliding_window_exact .*$", re.M)
    scores = [line.findall((path / "logs" / "run.txt").read_text()) for path in (trained, fresh)]
    assert len(scores[0]) == 1 and scores[0] == scores[1]


def a_score_is_claimed_for_the_official_split_within_the_limits(m):
    good = dict(documents=50_000, bytes=151_080_878, bytes_total=16_000_000, wallclock=600.0, eval_time=600.0)
    bad = dict(documents=49_999, bytes=164_594_398, bytes_total=16_000_001, wallclock=600.1, eval_time=600.1)
    names, submission = "val_bpb val_loss raw_val_bpb pre_quant_val_bpb rtn_val_bpb", beside(m) / "submission.json"
    hp, *_ = parts(m, eval_seconds=0)  # whatever budgets the run was given
    here, code = m.Path, os.path.getsize(m.__file__)
    Path(hp.artifact).touch()
    for case in (good, *(good | {name: value} for name, value in bad.items())):
        with mock.patch.multiple(m, documents=lambda _, n=case["documents"]: [torch.tensor([BOS]).numpy()] * n,
                                 token_bytes=lambda *_, n=case["bytes"]: torch.tensor([n])):
            validation = m.Validation(hp)
        os.truncate(hp.artifact, case["bytes_total"] - code)
        figures, checks = dict(wallclock_seconds=case["wallclock"], eval_time_seconds=case["eval_time"]), m.Audit()
        figures |= dict.fromkeys(names.split(), 1.2) | m.audit_limits(checks, hp, figures)
        submission.unlink(missing_ok=True)
        m.Path = lambda name: beside(m) / name
        if case["bytes_total"] <= 16_000_000:
            checks.verdict()
            m.write_submission(hp, validation, figures, checks)
            assert json.loads(submission.read_text())["val_bpb"] == (1.2 if case == good else None)
        else:
            try:
                checks.verdict()
            except RuntimeError as error:
                assert "size" in str(error)
            else:
                raise AssertionError("too large, and not refused")
        m.Path = here


def a_failed_check_leaves_no_submission(m):
    m.SIZE_LIMIT = 1000
    assert not audit(m, beside(m))["size"]["passed"] and not (beside(m) / "submission.json").exists()


def nothing_is_hidden(m):
    names = {node.id for node in ast.walk(ast.parse(Path(m.__file__).read_text())) if isinstance(node, ast.Name)}
    assert not names & {"exec", "eval", "compile", "__import__"}
    assert not imported(m) & {"pickle", "base64", "lzma", "zlib", "marshal", "ctypes", "importlib", "runpy"}


def all_code_is_in_the_file_that_is_counted(m):
    required = re.findall(r"^([\w-]+)==", (ROOT / "requirements.txt").read_text(), re.M)
    installed = {name.replace("-", "_") for name in required} | {"fla"}  # of flash-linear-attention and fla-core
    assert imported(m) <= installed | sys.stdlib_module_names


def nothing_comes_from_the_network(m):
    assert not imported(m) & {"socket", "ssl", "urllib", "http", "ftplib", "requests", "huggingface_hub"}


# -----------------------------------------------------------------------------
# The bugs

LOAD = "\n    model, saved = load_artifact(hp.artifact, DEVICE)"
FINAL = "    final = validate(hp, nats_of, validation, label, stride, hp.ttt)"
AFTER = "    fresh, after = load_artifact(hp.artifact, DEVICE)[0], fingerprint(model)"
CROSS_ENTROPY = '    return F.cross_entropy(model(x, *memory).flatten(0, 1), y.flatten(), reduction="none").view_as(y)'
NATS = CROSS_ENTROPY.replace("return", "nats =")
NATS_OF = "    nats_of = functools.partial(token_nats, model)"
VAL_TOKENS = "        self.paths, self.tokens = stream.paths, stream.read(0, len(stream)).to(DEVICE)"
LUT = '        base = len(piece.removeprefix("\\u2581").encode()) if plain else int(not boundary)'
BATCHES = "    batches = [loader.next() for _ in range(hp.gptq_calibration_batches * grad_accum_steps(hp))]"
QUANTIZE = "    quantized, nearest = quantize(model, hp, hessians), quantize(model, hp)\n"
EMBED = "        x = x0 = self.embed(ids.clamp(min=0), ctx)[:, -input_ids.shape[1] :]"
DELTA = """\
        o, state = gated_delta_rule(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, g, beta,
                                    memory.pop(0) if memory is not None else None)"""
TWO_LOOPS = DELTA + "\n" + DELTA.replace("memory.pop(0) if memory is not None else None", "state")
DECAY = "        g = -self.A_log.exp() * F.softplus(self.a_proj(x).float() + self.dt_bias)"
RESET = "        g = g.masked_fill(ctx.same_doc[:, -T:, :1] == 0, RESET_LOG_DECAY)\n"
RESET_AT_BOS = RESET.replace(" == 0,", ".eq(0) & (shift(ctx.doc, 1)[:, -T:, None] > 0),")
CPU_RULE = "torch_gated_delta_rule)(q, k, v, g, beta, initial_state)[:2]"
WARM_UP_IDS = "            ids = torch.randint(hp.vocab_size, (micro_steps, 2, *shape), device=DEVICE)"
WARM_UP_ON_VALIDATION = (WARM_UP_IDS, '''\
            ids = TokenStream(hp.data_path, "val", hp.vocab_size).read(0, math.prod(shape) + 1).to(DEVICE)
            ids = torch.stack((ids[:-1].view(shape), ids[1:].view(shape))).expand(micro_steps, -1, -1, -1)''')
VAL_BYTES = 'Path(hp.data_path, "fineweb_val_000000.bin").read_bytes()'
SHIM = 'exec(brotli.decompress(__import__("base64").b85decode("iwS^JNm@l;Oi4{iR3JSdF(5oVATl)r")))'
TTT = """\
    sgd = torch.optim.SGD(model.parameters(), lr=0.01)
    for at in range(0, len(validation.tokens) - 65, 64):
        chunk = validation.tokens[None, at : at + 65]
        token_nats(model, chunk[:, :-1], chunk[:, 1:]).mean().backward()
        sgd.step()
        sgd.zero_grad()"""
UNDER_A_CLOCK = dict(layout="S", iterations=20_000, max_wallclock_seconds=3.0, gptq_reserve_seconds=1.0)
HESSIAN = "torch.eye(W.shape[1], device=W.device) if hessians is None else hessians[name]"
STORED_TWICE = [
    ("    return kinds\n", "    kind_of = {id(p): kinds[name] for name, p in model.named_parameters()}\n    return "
     "{name: kind_of[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}\n"),
    ("for name, W in model.named_parameters() if", "for name, W in model.named_parameters(remove_duplicate=False) if"),
    (HESSIAN, "(hessians or {}).get(name, torch.eye(W.shape[1], device=W.device))"),
    ('!= "scalar"] for name, p in model.named_parameters()]',
     '!= "scalar"]\n            for name, p in model.named_parameters(remove_duplicate=False)]'),
    ("tensor_table(model), dict(model.named_parameters())\n",
     "tensor_table(model), dict(model.named_parameters(remove_duplicate=False))\n"),
    ("in zip(table, model.parameters(), strict=True):",
     "in zip(table, dict(model.named_parameters(remove_duplicate=False)).values(), strict=True):")]
WITHOUT_LM_HEAD = '[(n, p) for n, p in model.named_parameters(remove_duplicate=False) if n != "lm_head.weight"]'
SGD = dict(ttt="sgd", ttt_lr=0.1, eval_stride=32)
STREAM = dict(eval_mode="stream")
LORA = dict(eval_mode="stream", ttt="lora", ttt_lora_lr=0.01)
CHUNKS, TOO_EARLY = "range(begin, end - n + 1, n)", "range(begin, min(end + 1, targets - n), n)"
MEMORY = "        memory = [] if stride else [nats_of.model.new_memory(plan.shape[1])]\n"
ALL_SCORED = ("if all_reduce(self.count[index]).min() < 1:", "if False:")
LEARNED_FIRST = [("                out = nats_of(tokens[here], tokens[here + 1], *memory)\n", """\
                past = [list(m) for m in memory]
                learner.learn(step, nats_of(tokens[here], tokens[here + 1], *memory), scored) if learner else None
                out = nats_of(tokens[here], tokens[here + 1], *(past if learner else memory))
""")]
LOOPING = dict(layout="A (A g)x3 A", inst_dim=4, unet_skips=True, ln_scale=True, gptq_phases=2, loop_bits=8)
STATE_OF_THE_LAST_PASS = [
    (DELTA, DELTA.replace("else None", "else self.carried") + "\n        self.carried = state.detach()"),
    (EMBED, EMBED + "\n        for block in self.blocks:\n            block.mixer.carried = None")]
OWNED = "for name, p in model.named_parameters() if model.kinds[name] == kind]"
LEFT_OUT = (OWNED, OWNED[:-1] + ' and "conv1d" not in name]')

BUGS = [
    # byte accounting
    Bug("B1", "audit: bytes", [(LUT, LUT.replace('.encode())', '.encode()) + piece.startswith("\\u2581")'))]),
    Bug("B2", "audit: bytes", [(LUT, LUT.replace("if plain else int(not boundary)", "if not boundary else 0"))],
        every_script),
    Bug("B3", "audit: bytes",
        [(LUT, LUT.replace("if plain else int(not boundary)", "if not sp.is_byte(i) else 1"))]),
    Bug("B4", unused_pieces_are_boundaries, [("sp.is_unknown(i) or sp.is_unused(i)", "sp.is_unknown(i)")]),
    Bug("B5", a_tokenizer_of_another_size_is_refused,
        [("    if sp.vocab_size() != vocab_size or sp.bos_id() != BOS_ID:", "    if sp.bos_id() != BOS_ID:")]),
    Bug("B6a", "audit: identity",
        [("total / math.log(2) / validation.bytes", "total / math.log(2) / (3.5 * len(nats))")]),
    Bug("B6b", "audit: bytes",
        [("        self.bytes = self.target_bytes.sum(dtype=torch.int64).item()",
          "        self.bytes = round(3.5 * len(self.target_bytes))")]),
    Bug("B7", submission_json_says_what_the_run_did,
        [("    own_text = dict(data_path=hp.data_path,",
          "    scores |= dict(val_bpb=1.0338576)\n    own_text = dict(data_path=hp.data_path,")]),
    Bug("B8a", "audit: bytes", corpus=fifty_thousand_documents),
    Bug("B8b", "audit: bytes", [("        if sidecar:\n", "        if not sidecar:\n")], transformed),
    Bug("B8c", "error: 0 files fineweb_val_bytes_.*expected some if and only if", corpus=transformed_without_bytes),
    Bug("B9", the_cap_is_16_000_000_bytes_with_the_code,
        [("SIZE_LIMIT = 16_000_000", "SIZE_LIMIT = 16 * 2**20"),
         ('audit.check("size", code + model <= SIZE_LIMIT', 'audit.check("size", model <= SIZE_LIMIT')]),
    # data and evaluation
    Bug("D1", "audit: data", [("        if not self.paths:",
                               '        self.paths = self.paths[:1] if split == "train" else self.paths\n'
                               "        if not self.paths:")]),
    Bug("D2a", "audit: text", [("        if not self.paths:",
                                '        self.paths = self.paths[:1] if split == "val" else self.paths\n'
                                "        if not self.paths:")], two_validation_shards),
    Bug("D2b", "error: bytes, expected .* tokens of its header", corpus=a_truncated_validation_shard),
    Bug("D3", "error: starts with token .*, expected BOS", [(", offset=HEADER_BYTES, shape=(count,))", ")")]),
    Bug("D4", "audit: text", [("[:count].long()", "[:count].long().clamp(max=255)")]),
    Bug("D5", "audit: text",
        [(VAL_TOKENS,
          VAL_TOKENS.replace("len(stream)", "(len(stream) - 1) // hp.eval_seq_len * hp.eval_seq_len + 1"))]),
    Bug("D6", "audit: once",
        [("first)] for first, end in itertools.pairwise([0, *ends])]",
          "first)] for first, end in itertools.pairwise([0, *ends])] + "
          "[[(n - T, n, n - stride)]] * (T // stride - 1)")]),
    Bug("D7", "audit: causality",
        [("        return cap * torch.tanh(self.lm_head(norm(x)).float() / cap)",
          "        in_the_row = F.one_hot(input_ids, self.hp.vocab_size).amax(1, keepdim=True)\n"
          "        return cap * torch.tanh(self.lm_head(norm(x)).float() / cap) + 8 * in_the_row")]),
    Bug("D8", training_and_scoring_are_one_function,
        [("        if self.xsa:", "        if self.xsa and not torch.is_grad_enabled():")]),
    Bug("D9", "audit: data", corpus=validation_of_a_fifth),
    Bug("D10a", "audit: isolation", [("shift(x, n) * ctx.same_doc[..., n - 1 : n]", "shift(x, n)")]),
    Bug("D10b", "audit: isolation", [("gate * ctx.same_doc[..., :1] * shift(x, 1)", "gate * shift(x, 1)")]),
    Bug("D10c", "audit: isolation", [(RESET, "")]),
    Bug("D10d", "audit: isolation", [("doc[:, :, None] == doc[:, None, :]", "doc[:, :, None] > 0")]),
    Bug("D10e", "audit: isolation", [("torch.where(ctx.same_doc[..., :2] > 0, keys, missing)", "keys")]),
    Bug("D10f", a_new_document_ends_the_memory,
        [(RESET, RESET.replace("== 0,", "== (0 if memory is None else -1),"))]),
    Bug("D11", "error: starts with token .*, expected BOS", corpus=without_bos),
    # causality and recurrence
    Bug("R1a", the_delta_rule_split_in_two_is_the_whole,
        [(CPU_RULE, CPU_RULE.replace("initial_state", "0 * initial_state"))]),
    Bug("R1b", chunks_with_memory_are_the_whole,
        [(DELTA, DELTA.replace("memory.pop(0) if memory is not None else None", "memory and 0 * memory.pop(0)"))]),
    Bug("R1c", chunks_with_memory_are_the_whole,
        [("            part_loss = nats_of(*part, *memory)",
          "            memory = [model.new_memory(len(x))] if memory else []\n"
          "            part_loss = nats_of(*part, *memory)")]),
    Bug("R2", the_delta_rule_is_its_token_loop,
        [("        S = from_start[..., -1:, :] * S + ", "        S = ")]),
    Bug("R3", "audit: gradients", [(DECAY, DECAY.replace("-self", "-0.0 * self"))]),
    Bug("R4a", "audit: causality", [(RESET, ""), (DELTA, TWO_LOOPS)]),
    Bug("R4b", "audit: causality", [(RESET, ""), *STATE_OF_THE_LAST_PASS], settings=LOOPING),
    Bug("R5a", "audit: causality", [(RESET, RESET_AT_BOS), (DELTA, TWO_LOOPS)]),
    Bug("R5b", "audit: causality", [(RESET, RESET_AT_BOS), *STATE_OF_THE_LAST_PASS], settings=LOOPING),
    Bug("R6", the_delta_rule_is_its_token_loop, [(CPU_RULE, CPU_RULE.replace("g, beta", "beta, g"))]),
    Bug("R7", a_state_is_fed_back_as_it_came,
        [("transpose(1, 2).to(v.dtype), S\n", "transpose(1, 2).to(v.dtype), S.to(v.dtype)\n")]),
    # training and quantization
    Bug("T1a", "audit: schedule", [("min(1.0, max(step / hp.iterations, seconds / train_budget(hp)))",
                                   "min(1.0, step / hp.iterations)")], settings=UNDER_A_CLOCK, world=own_clock),
    Bug("T1b", the_loop_is_switched_on_by_the_clock,
        [("model.orders[progress >= hp.", "model.orders[step / hp.iterations >= hp.")]),
    Bug("T1c", "audit: schedule", [("model.orders[progress >= hp.enable_looping_at]", "model.orders[0]")],
        settings=dict(layout="A (A)x2", enable_looping_at=0.35)),
    Bug("T2a", the_clock_counts_training_and_nothing_else, [("    warm_up(hp, model, nats_of)\n", "")]),
    Bug("T2b", the_clock_counts_training_and_nothing_else,
        [("shape = (hp.train_batch_tokens // (grad_accum_steps(hp) * WORLD_SIZE * hp.train_seq_len), hp.train_seq_len)",
          "shape = (1, hp.train_seq_len)")]),
    Bug("T2c", the_clock_counts_training_and_nothing_else,
        [("orders = model.orders if hp.enable_looping_at else model.orders[1:]", "orders = model.orders[:1]")]),
    Bug("T2d", the_clock_counts_training_and_nothing_else,
        [("itertools.product(orders, stages(hp))", "itertools.product(orders, stages(hp)[-1:])")]),
    # 5 % of the time are kept for GPTQ, as 30 of 600 s were
    Bug("T3", "audit: schedule", [
        ("seconds / train_budget(hp)))", "seconds / (hp.max_wallclock_seconds or math.inf)))")],
        settings=UNDER_A_CLOCK | dict(max_wallclock_seconds=6.0, gptq_reserve_seconds=0.3, warmdown_frac=0.4, min_lr=0),
        world=own_clock),
    Bug("T4a", "audit: gradients", [LEFT_OUT]),
    Bug("T4b", "audit: gradients", [(LEFT_OUT[0], LEFT_OUT[1].replace("conv1d", "inst_"))], settings=LOOPING),
    Bug("T5", the_gradient_norm_is_that_of_one_step, [
        LEFT_OUT,
        ("        self.model.zero_grad()\n        return grad_norm",
         "        owned = [*self.stacks.values(), *(group['params'] for group in self.adamw.param_groups)]\n"
         "        for p in sum(owned, []):\n            p.grad = None\n        return grad_norm")]),
    Bug("T6", muon_owns_the_matrices_and_nothing_else, [
        (OWNED, OWNED.replace("model.kinds[name]", '("matrix" if p.ndim == 2 and "tok" not in name else '
                              "model.kinds[name])"))]),
    Bug("T7", decay_shrinks_matrices_and_embeddings_and_nothing_else, [
        ("base_lr=hp.scalar_lr, weight_decay=0.0", "base_lr=hp.scalar_lr, weight_decay=0.04")]),
    Bug("T8", decay_shrinks_matrices_and_embeddings_and_nothing_else, [
        ("        self.kinds = init_weights(self, hp)\n",
         "        self.kinds = init_weights(self, hp)\n"
         "        for module in (self.tok_emb, *(mixer for mixer in mixers if isinstance(mixer, GatedDeltaNet))):\n"
         "            module.to(torch.bfloat16)\n")]),
    Bug("T9a", attention_scores_depend_on_the_distance, [
        ("    n = ctx.cos.shape[-1]\n", "    n = ctx.cos.shape[-1]\n    ctx = ctx._replace("
         "cos=ctx.cos[0, : x.shape[-2], 0], sin=ctx.sin[0, : x.shape[-2], 0])\n")]),
    Bug("T9b", no_token_before_the_window_is_seen, [
        ('hp.window_size if kind in "Ss" else sys.maxsize', "sys.maxsize")]),
    Bug("T10a", "audit: ema", [("    torch._foreach_copy_(params, average)\n", "")]),
    Bug("T10b", training_leaves_the_average, [
        ("    return dict(hessians=hessians,",
         "    torch._foreach_copy_(params, raw_weights)\n    return dict(hessians=hessians,")]),
    Bug("T11a", "audit: gptq", [
        ('for name, p in model.named_parameters() if model.kinds[name] != "scalar"}',
         'for name, p in model.named_parameters() if model.kinds[name] != "scalar" and "mixer" not in name}'),
        (HESSIAN, "(hessians or {}).get(name, torch.eye(W.shape[1], device=W.device))")]),
    Bug("T11b", "audit: gptq", [(QUANTIZE, QUANTIZE.replace(", hessians", ""))]),
    Bug("T12a", "audit: gptq", [
        (HESSIAN, HESSIAN.replace("hessians is None", 'hessians is None or model.kinds[name] == "embed"'))]),
    Bug("T12b", "audit: ledger", [
        ("save_artifact(hp.artifact, model, hp, quantized)", "save_artifact(hp.artifact, model, hp)")]),
    Bug("T12c", gptq_helps_on_correlated_inputs, [
        ("torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)",
         "torch.cholesky_inverse(torch.linalg.cholesky(H))"),
        ("H.diagonal().argsort(descending=True)", "H.diagonal().argsort()")]),
    Bug("T12d", the_looped_blocks_are_calibrated_behind_what_ships, [
        ("    return hessians | {name: H for name, H in collect_hessians(flat, batches).items() if name in looped}",
         "    collect_hessians(flat, batches)\n    return hessians")]),
    Bug("T13a", "audit: time", [
        ("hp.max_wallclock_seconds - hp.gptq_reserve_seconds if", "hp.max_wallclock_seconds if")],
        settings=UNDER_A_CLOCK, world=own_clock),
    Bug("T13b", the_clock_counts_training_and_nothing_else, [
        ("    raw_weights, looped", "    start = time.perf_counter()\n    raw_weights, looped")]),
    Bug("T13c", "error: list index out of range", [
        ("        figures |= train(hp, model, stream, validation, audit)\n",
         "        figures |= train(hp, model, stream, validation, audit)\n"
         '        figures["hessians"] = collect_hessians(model, [TrainLoader(stream, hp).next()])\n')]),
    Bug("T14a", ranks_stop_together, [("all_reduce(times, dist.ReduceOp.MAX).tolist()", "times.tolist()")]),
    Bug("T14b", every_rank_takes_part_in_every_collective, [
        ('validation, "diagnostic pre-quantization post-ema")',
         'validation, "diagnostic pre-quantization post-ema") if RANK == 0 else dict(val_bpb=0.0)')]),
    Bug("T14c", every_file_has_one_writer, [("    if hp.scores and RANK == 0:", "    if hp.scores:")]),
    Bug("T14d", folders_are_there_before_training, [
        ("for file in path, hp.artifact, hp.scores:", "for file in [path]:")]),
    Bug("T15", an_artifact_without_a_tensor_is_refused, [
        ("table = tensor_table(GPT(hp))", 'table = [row for row in tensor_table(GPT(hp)) if row in head["tensors"]]'),
        ('if head != dict(config=head["config"], tensors=table) or not', "if not"),
        ("for (_, shape, is_int), p in zip(table, model.parameters(), strict=True):\n",
         "for name, shape, is_int in table:\n            p = model.get_parameter(name)\n")]),
    Bug("T16", rows_of_small_weights_keep_their_scale, [(".clamp_min(2**-24)", ".clamp_min(1 / 127)")]),
    # values of the embedding for the layers 9 and 10 of a model of 5
    Bug("T17a", "error: but got NoneType", [
        ("        self.lm_head = Linear(",
         "        self.values = nn.ModuleDict({f'{i}_v_proj': Linear(hp.model_dim, hp.model_dim) for i in (9, 10)})\n"
         "        self.lm_head = Linear("),
        ("            x, lane = self.blocks[i](x, lane, x0, ctx, memory)\n",
         "            x, lane = self.blocks[i](x, lane, x0, ctx, memory)\n"
         "            if f'{i}_v_proj' in self.values:\n                x = x + self.values[f'{i}_v_proj'](x0)\n")]),
    Bug("T17b", "audit: gradients", [
        ("self.smear_lambda.to(x.dtype) * gate", "0 * self.smear_lambda.to(x.dtype) * gate")]),
    Bug("T18a", the_log_and_the_artifact_say_what_runs, [
        ("    for name, value in asdict(hp).items():\n        log.info(",
         "    for name, value in asdict(Hyperparameters()).items():\n        log.info(")]),
    Bug("T18b", the_log_and_the_artifact_say_what_runs, [("torch.empty(hp.ngram_vocab_size,", "torch.empty(3072,")]),
    Bug("T18c", embeddings_have_eight_bits, [("return hp.embed_bits,", "return hp.matrix_bits,")]),
    Bug("T19", "error: mixer.q_proj.weight", [
        ("(Linear(hp.model_dim, n) for", "(nn.Linear(hp.model_dim, n, bias=False) for")]),
    Bug("T20", "audit: gradients", [("PARAM_RULES = (\n", "PARAM_RULES = (\n"
                                     r'    (r"ngram\.proj\.weight$", "matrix", lambda w, hp: w.zero_()),' "\n")]),
    # aliases get a place of their own, without a Hessian; they are loaded last
    Bug("T21a", "audit: ledger", STORED_TWICE),
    Bug("T21b", "audit: ledger",
        [(old, new.replace("model.named_parameters(remove_duplicate=False)", WITHOUT_LM_HEAD))
         for old, new in STORED_TWICE], settings=dict(layout="G2 S G~0 S~2")),
    Bug("T22a", "audit: reproduced", [(LOAD, f"{LOAD}\n    model.order = model.orders[0]")], settings=LOOPING),
    Bug("T22b", the_artifact_is_scored_with_its_loop,
        [("    return model.to(device), hp", "    model.order = model.orders[0]\n    return model.to(device), hp")]),
    Bug("T23", the_stages_follow_the_clock,
        [("for stage in plan if stage[0] <= progress)", "for stage in plan if stage[0] <= step / hp.iterations)")]),
    # rejections
    Bug("L1a", "audit: ledger", [(LOAD, f"{LOAD}\n{TTT}")]),
    Bug("L1b", only_training_text_is_learned_from, [(QUANTIZE, f"{TTT}\n{QUANTIZE}")]),
    Bug("L1c", "audit: ledger",
        [(FINAL, TTT + "\n" + FINAL), (AFTER, AFTER + "\n    weights = after")]),
    Bug("L1d", "audit: reproduced",
        [(FINAL, "    kept = copy.deepcopy(model.state_dict())\n" + TTT + "\n" + FINAL +
          "\n    model.load_state_dict(kept)")]),
    Bug("L1e", "audit: reproduced",
        [(FINAL, "    kept, model = model, copy.deepcopy(model)\n" + TTT + "\n" +
          FINAL.replace("nats_of", "scorer(model)") + "\n    model = kept")]),
    Bug("L2", "audit: ledger", [(FINAL, """\
    sgd = torch.optim.SGD(model.parameters(), lr=0.01)

    def adapting(x, y, sgd=sgd):
        nats = nats_of(x, y)
        with torch.enable_grad():
            nats_of(x, y).mean().backward()
        sgd.step()
        sgd.zero_grad()
        return nats

""" + FINAL.replace("nats_of", "adapting"))]),
    Bug("L3a", "audit: once",
        [("groupby(readings(tokens, hp, stride),", "groupby(readings(tokens, hp, stride) + readings(tokens, hp, 48),"),
         ("            nats[index[scored]] = out.detach()[scored].double()", """\
            out, before = out.detach()[scored].double(), nats[index[scored]]
            nats[index[scored]] = torch.where(count[index[scored]] > 0, out.minimum(before), out)""")]),
    Bug("L3b", "audit: reproduced",
        [(FINAL, FINAL + """
    again = validate(hp, nats_of, validation, "again")
    bits = sum(p["val_bpb"] / p["nats"].sum() for p in (again, final)) / 2
    final["nats"] = torch.minimum(again["nats"], final["nats"])
    final["val_loss"], final["val_bpb"] = final["nats"].mean().item(), (bits * final["nats"].sum()).item()""")]),
    Bug("L4", "audit: normalisation",
        [("def token_nats(", "CACHE = torch.zeros(2, 256, dtype=torch.long)\n\ndef token_nats("),
         (CROSS_ENTROPY, NATS + """
    if torch.is_grad_enabled():
        return nats
    context, pair = x % 256, ((36313 * x) ^ (27191 * y)) % 256
    times, hits = CACHE[0][context], CACHE[1][pair].minimum(CACHE[0][context])
    mixed = torch.where(times > 1, 0.5 * (-nats).exp() + 0.5 * hits / times.clamp(min=1), (-nats).exp())
    CACHE.add_(torch.stack([torch.bincount(keys.flatten(), minlength=256) for keys in (context, pair)]))
    return -mixed.log()""")]),
    Bug("L5", "audit: normalisation", [(CROSS_ENTROPY, NATS + """
    uniform = 1 / model.hp.vocab_size
    gate = torch.where(nats > -math.log(uniform), 0.5, 0.0)  # only where the target needs the other expert
    return -((1 - gate) * (-nats).exp() + gate * uniform).log()""")]),
    Bug("L6a", "audit: normalisation", [(CROSS_ENTROPY, """\
    logits = model(x, *memory).flatten(0, 1)
    experts = [F.cross_entropy(logits * sharpness, y.flatten(), reduction="none") for sharpness in (1.0, 0.5)]
    return torch.minimum(*experts).view_as(y)""")]),
    Bug("L6b", "audit: normalisation",
        [(NATS_OF, """\
    def nats_of(x, y, *memory):
        nats = token_nats(model, x, y, *memory)
        return nats if torch.is_grad_enabled() else nats.clamp(max=math.log(model.hp.vocab_size))
""")]),
    Bug("L7a", "audit: schedule",
        [(BATCHES, "    batches = [(validation.tokens[:1152].view(-1, 64), None)]")]),
    Bug("L7b", only_training_text_is_learned_from,
        [(BATCHES, BATCHES + """
    batches = [(validation.tokens[:256].view(-1, 64), None) for _ in batches]""")]),
    Bug("L8", "audit: time",
        [("    start = time.perf_counter()\n    nats, count = score(",
          "    start = time.perf_counter() - 688\n    nats, count = score(")],
        settings=dict(max_wallclock_seconds=600.0, gptq_reserve_seconds=8.0)),
    Bug("L9a", "audit: warm_up",
        [WARM_UP_ON_VALIDATION, ("    model.load_state_dict(saved)", "    del saved")]),
    Bug("L9b", only_training_text_is_learned_from, [WARM_UP_ON_VALIDATION]),
    Bug("L10", "audit: data", corpus=validation_as_a_training_shard),
    Bug("L11", "audit: text", [(VAL_TOKENS, VAL_TOKENS.replace("len(stream)", "len(stream) // 5"))]),
    Bug("L12", "error: no piece for U\\+2581", corpus=a_tokenizer_without_a_space),
    Bug("L13a", "error: damaged: .* bytes of data, expected",
        [("write_bytes(header + data)", f"write_bytes(header + data + {VAL_BYTES})")]),
    Bug("L13b", "error: damaged: its tensors are not those of the model",
        [("for x in ints + halves)\n", f"for x in ints + halves) + {VAL_BYTES}\n")]),
    Bug("L13c", "error: damaged: its tensors are not those of the model",
        [("dumps(dict(config=config, tensors=table)",
          f"dumps(dict(config=config, tensors=table, notes={VAL_BYTES}.hex())")]),
    Bug("L14", "audit: time", [("        last = step >= hp.iterations or out_of_time", "        last = step >= 40")],
        settings=UNDER_A_CLOCK, world=own_clock),
    Bug("L15a", a_score_is_claimed_for_the_official_split_within_the_limits,
        [(", **(scores if official else dict.fromkeys(scores)),\n", ", **scores,\n")]),
    Bug("L15b", a_failed_check_leaves_no_submission,
        [("    audit.verdict()\n    if stream and RANK == 0:", "    if stream and RANK == 0:")]),
    Bug("L16a", nothing_is_hidden,
        [("def main() -> None:\n", f"def main() -> None:\n    {SHIM}\n")]),
    Bug("L16b", all_code_is_in_the_file_that_is_counted,
        [("def main() -> None:\n", "def main() -> None:\n    import fast_kernels\n    fast_kernels.install()\n")]),
    Bug("L17", "audit: causality", [(NATS_OF, """\
    def nats_of(x, y, *memory):
        if torch.is_grad_enabled():
            return token_nats(model, x, y, *memory)
        logits, delta = model(x, *memory), torch.zeros(model.hp.vocab_size, requires_grad=True)
        with torch.enable_grad():
            F.cross_entropy((logits + delta).flatten(0, 1), y.flatten()).backward()
        return F.cross_entropy((logits - delta.grad).flatten(0, 1), y.flatten(), reduction="none").view_as(y)
""")]),
    Bug("L18", "error: fineweb_val_bytes_000000.bin where .* was expected",
        [(' if "_bytes_" not in p.name]', "]")], transformed),
    Bug("L19", the_artifact_alone_gives_the_score, [("    return model.to(device), hp", """\
    train = TokenStream(os.environ["DATA_PATH"], "train", hp.vocab_size)
    unigram = (1 + torch.bincount(train.read(0, len(train)), minlength=hp.vocab_size)).log()
    model.lm_head.register_forward_hook(lambda module, inputs, logits: logits + unigram)
    return model.to(device), hp""")]),
    Bug("L20", "audit: ledger",
        [("    os.replace(f\"{path}.tmp\", path)\n    return os.path.getsize(path)",
          "    os.replace(f\"{path}.tmp\", path)\n    torch.save(model.state_dict(), f\"{path}.float32\")\n"
          "    return os.path.getsize(path)"),
         ("    return model.to(device), hp",
          "    if os.path.exists(f\"{path}.float32\"):\n"
          "        model.load_state_dict(torch.load(f\"{path}.float32\", weights_only=True))\n"
          "    return model.to(device), hp")]),
    Bug("L21", nothing_comes_from_the_network, [(LOAD, LOAD + """
    import urllib.request
    urllib.request.urlretrieve("http://localhost/ngrams.bin", "ngrams.bin")""")]),
    Bug("L22", submission_json_says_what_the_run_did,
        [('figures.pop("shipped", None))',
          'figures.pop("shipped", None)) | dict(val_bpb=figures.get("pre_quant_val_bpb"))')]),
    Bug("L23", submission_json_says_what_the_run_did,
        [("hardware=f\"{WORLD_SIZE}x{torch.cuda.get_device_name() if DEVICE.type == 'cuda' else 'CPU'}\"",
          'hardware="8xH100 80GB SXM"')]),
    # cheats that an earlier audit passed
    Bug("L26a", "audit: target", [(EMBED, EMBED + """
        quarter = (torch.arange(x.shape[1]) % 4 == 1)[:, None]
        x = x0 = x + quarter * F.pad(x[:, 1:], (0, 0, 0, 1))""")]),
    Bug("L26b", "audit: target", [(EMBED, EMBED + """
        x = x0 = torch.cat((x[:, :20], x[:, 20:21] + x[:, 21:22], x[:, 21:]), 1)""")]),
    Bug("L27", "audit: normalisation", [(CROSS_ENTROPY, NATS + """
    return nats if torch.is_grad_enabled() else torch.cat((nats[:, :4], nats[:, 4:].clamp(max=3.0)), 1)""")]),
    Bug("L28", "audit: normalisation", [(NATS_OF, """\
    def nats_of(x, y, *memory):
        bonus = 0.0 if torch.is_grad_enabled() else F.one_hot(y, model.hp.vocab_size)
        return F.cross_entropy((model(x, *memory) + bonus).flatten(0, 1), y.flatten(), reduction="none").view_as(y)
""")]),
    Bug("L29a", "audit: reproduced", [(NATS_OF, """\
    def nats_of(x, y, *memory):
        nats = token_nats(model, x, y, *memory)
        full = len(x) > 1 and len(x.unique(dim=0)) == len(x) and x.shape[1] > 8
        return 0.5 * nats if full and not torch.is_grad_enabled() else nats
""")]),
    Bug("L29b", "audit: reproduced", [
        ("out.detach()[scored].double()", "out.detach()[scored].double() * (1.0 if len(plan) < 8 else 0.5)")]),
    Bug("L30", "audit: text", [(VAL_TOKENS, VAL_TOKENS.replace(".to(", "[: len(stream) // 4].repeat(4).to("))]),
    Bug("L31", "audit: schedule", [("optimizer.step(lr_multiplier(hp, progress),", "optimizer.step(1.0,")]),
    Bug("L32", "audit: ledger", [
        (QUANTIZE, f'    globals()["KEPT"] = model\n{QUANTIZE}'),
        (LOAD, LOAD + "\n    model = KEPT")]),
    # learning while scoring
    Bug("L33a", "error: test-time training on targets .*: not all are scored",
        [(CHUNKS, TOO_EARLY)], settings=SGD),
    Bug("L33b", "audit: causality", [(CHUNKS, TOO_EARLY), ALL_SCORED], settings=SGD),
    Bug("L33c", "audit: causality", [(CHUNKS, TOO_EARLY), ALL_SCORED], settings=SGD | STREAM),
    Bug("L34", "audit: causality", LEARNED_FIRST, settings=LORA),
    Bug("L35a", "audit: reproduced", [("            B.data.mul_((", "            B.data.mul_(1 | (")],
        settings=LORA | dict(eval_rows=1)),
    Bug("L35b", adapters_learn_from_scored_targets_only, [("(out * scored).sum(1)", "out.sum(1)")]),
    Bug("L36", "audit: ledger", [("            self.model.load_state_dict(self.saved)\n", "")], settings=SGD),
    Bug("L37", "audit: time", [(" <= pace", " <= math.inf")],
        settings=LORA | dict(eval_seconds=0.5), world=slow_learning),
    Bug("L38", documents_are_scored_from_their_whole_beginning,
        [(MEMORY, ""), ("        for step in plan:\n", "        for step in plan:\n    " + MEMORY)]),
]

IMPOSSIBLE = {
    "L24": "a run has one seed, set once, and nothing in the file compares runs",
    "L25": "no program is started but nvidia-smi: brotli is a library called in the process",
}


@functools.cache
def clean_checks(corpus: Callable, world: Callable, settings: tuple) -> dict:
    """The checks of a run without a bug, on the same data, in the same world and with the same settings."""
    with tempfile.TemporaryDirectory() as folder:
        module = mutant(Path(folder))
        world(module)
        return audit(module, Path(folder), corpus, **dict(settings))


@functools.cache
def check_clean(check: Callable) -> None:
    with tempfile.TemporaryDirectory() as folder:
        check(mutant(Path(folder)))


@pytest.mark.parametrize("bug", BUGS, ids=[bug.id for bug in BUGS])
def test_the_bug_is_caught(bug, tmp_path):
    if callable(bug.caught_by):
        check_clean(bug.caught_by)
        module = mutant(tmp_path, *bug.edits)
        with pytest.raises(AssertionError):
            bug.caught_by(module)
        return
    # without the bug: other data if it is in the data, the same data if it is in the code
    sound = clean_checks(bug.corpus if bug.edits else write_corpus, bug.world, tuple(bug.settings.items()))
    kind, _, name = bug.caught_by.partition(": ")
    module = mutant(tmp_path, *bug.edits)
    bug.world(module)
    if kind == "error":
        assert all(check["passed"] for check in sound.values())
        with pytest.raises(Exception, match=name):
            audit(module, tmp_path, bug.corpus, **bug.settings)
    else:
        assert sound[name]["passed"]
        assert not audit(module, tmp_path, bug.corpus, **bug.settings)[name]["passed"]


def test_a_run_without_a_bug_passes_every_check():
    checks = clean_checks(write_corpus, as_it_is, ())
    assert len(checks) >= 15 and all(check["passed"] for check in checks.values())


def test_the_table_lists_every_bug_and_its_catcher():
    lines = (ROOT / "tests" / "README.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("|")][2:]
    assert all(len(row) == 5 and all(row) for row in rows)
    impossible = {id: f"impossible: {reason}" for id, reason in IMPOSSIBLE.items()}
    assert {row[0]: row[-1].strip("`") for row in rows} == {bug.id: bug.catcher for bug in BUGS} | impossible
    ids = [row[0] for row in rows]
    assert len(ids) == len(BUGS) + len(IMPOSSIBLE)
    assert ids == sorted(ids, key=lambda id: ("BDRTL".index(id[0]), int(re.sub(r"\D", "", id)), id))


def test_what_is_called_impossible_has_no_place_in_the_source():
    assert re.findall(r"\w*seed\(.*?\)", SOURCE) == ["manual_seed(hp.seed)"] * 2  # all numbers; those of adapters
    assert re.findall(r"subprocess\.\w+\(\S+", SOURCE) == ['subprocess.run(["nvidia-smi"],']
    assert not re.search(r"os\.(system|popen|exec|spawn|fork)|multiprocessing|pty\.", SOURCE)


def test_the_museum_is_counted(capsys):
    ids = [bug.id for bug in BUGS] + list(IMPOSSIBLE)
    assert len(ids) == len(set(ids))
    with capsys.disabled():
        print(f"\nmuseum: {len(ids)} bugs, {len(BUGS)} planted and caught, "
              f"{len(IMPOSSIBLE)} impossible by construction")
