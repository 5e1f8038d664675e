"""Bugs of quantization, of the artifact, and of what is said of it."""

import copy
from dataclasses import asdict, fields
from unittest import mock

import torch
from museum import (
    Bug,
    Program,
    Run,
    each_is_caught,
    hyperparameters,
    is_matrix,
    parts,
    refuses,
    shaken,
)
from toys import as_packed, clipped, rounded

# --------------------------------------------------------------------------------------------------
# Catchers: GPTQ


def gptq_helps_on_correlated_inputs(p: Program) -> None:
    """32 columns of 8 strong directions and weak ones, 4 bits: at most half the error of rounding
    to nearest."""
    mix = torch.randn(8, 32)
    X, W = torch.randn(400, 8) @ mix + 0.1 * torch.randn(400, 32), torch.randn(24, 32)
    q, scale = p.core.gptq_quantize(W, X.T @ X, 4, 4.0)
    s = scale.float()[:, None]
    nearest = (W / s).round().clamp(-7, 7)
    assert (X @ (W - q * s).T).norm() < 0.5 * (X @ (W - nearest * s).T).norm()


def rows_of_small_weights_keep_their_scale(p: Program) -> None:
    W = torch.randn(8, 64) * torch.logspace(-4, 0, 8)[:, None]
    _, scale = p.core.gptq_quantize(W, torch.eye(64), 6, 12.85)
    expected = 12.85 * W.double().numpy().std(axis=1, ddof=1) / 31
    assert (abs(scale.double().numpy() / expected - 1) < 0.01).all()


def embeddings_have_eight_bits(p: Program) -> None:
    """At 3 sigmas some weights of a normal table lie at the end of the scale: 127, which 6 bits do
    not reach."""
    _, model, *_ = parts(p, embed_bits=8)
    quantized = clipped(shaken(model), 3.0)
    ends = {name: q.abs().max().item() for name, (q, _) in quantized.items()}
    assert ends["tok_emb.weight"] == ends["ngram.table"] == 127
    assert max(end for name, end in ends.items() if is_matrix(name)) <= 31


def by_hand(p: Program, model, hessians: dict, looped: tuple[str, ...]):
    """A copy in which all that does not loop has the weights that it ships with; the rest is in
    float16."""
    flat, hp = copy.deepcopy(model), model.hp
    with torch.no_grad():
        for name, weight in flat.named_parameters():
            if name in hessians and not name.startswith(looped):
                bits = 8 if name in ("tok_emb.weight", "ngram.table") else 3
                uses = 2 if name == "tok_emb.weight" else 1
                inputs = (uses * hessians[name].diagonal().mean()).sqrt()  # their RMS
                step = hp.rounding_step / inputs / weight.std(1)  # in deviations of each row
                width = ((2 ** (bits - 1) - 1) * step).clamp(min=6.0)
                q, scale = p.core.gptq_quantize(weight, hessians[name], bits, width)
                weight.copy_(q.float() * scale.float()[:, None])
            elif name not in hessians:
                weight.copy_(weight.half())
    return flat


def the_looped_blocks_are_calibrated_behind_what_ships(p: Program) -> None:
    """Each looped matrix gets the mean, over tokens, of the inputs that it has behind the other
    blocks' quantized weights, which are built here from their first Hessians, and these their
    first."""
    _, model, stream, _ = parts(p, layout="A (A G)x2 A", matrix_bits=3, embed_bits=8)
    tokens, looped = stream.read(0, 8 * 65).view(2, 4, 65), ("blocks.1.", "blocks.2.", "inst_")
    batches = [(x[:, :-1], x[:, 1:]) for x in tokens]
    P = shaken(model).ngram.proj.weight.detach()
    first = p.core.collect_hessians(model, batches)
    first["ngram.table"] = P.mT @ P
    final, expected = model.calibrate(batches), {}
    flat = by_hand(p, model, first, looped)
    names = {id(weight): name for name, weight in flat.named_parameters()}

    def keep(layer, inputs, _):
        expected.setdefault(names[id(layer.weight)], []).append(inputs[0].flatten(0, 1))

    for layer in flat.modules():
        if isinstance(layer, p.core.Linear):
            layer.register_forward_hook(keep)
    with torch.no_grad():
        for x, _ in batches:
            flat(x)
    assert final.keys() == first.keys()
    assert sum(name.startswith(looped) for name in first) == 6 + 5 + 3
    for name, hessian in final.items():
        if name.startswith(looped):
            X = torch.cat(expected[name]).double() / (2 * 4 * 64) ** 0.5
            error = (hessian - X.T @ X).norm() / (X.T @ X).norm()
            assert error < 512 * 2**-24, name  # sums of 512 products in float32
            assert (hessian - first[name]).norm() > 1e-2 * first[name].norm(), name
        else:
            assert torch.equal(hessian, first[name]), name


# --------------------------------------------------------------------------------------------------
# Catchers: the artifact


def an_artifact_without_a_tensor_is_refused(p: Program) -> None:
    hp, model, *_ = parts(p)
    quantized, named = rounded(model), model.named_parameters

    def without():
        return [row for row in named() if "A_log" not in row[0]]

    with mock.patch.object(model, "named_parameters", without):
        p.core.save_artifact(hp.artifact, model, hp, quantized)
    assert refuses(lambda: p.core.load_artifact(hp.artifact, "cpu"))


def an_artifact_of_another_system_is_refused(p: Program) -> None:
    """pure_gdn has the record's parameters, and for what it has beyond its fields there are
    defaults."""
    batch = dict(train_seq_len=256, train_batch_tokens=768, grad_accum_steps=3)
    hp, model, *_ = parts(p, **batch)
    record = p.core.Hyperparameters(
        **{f.name: getattr(hp, f.name) for f in fields(p.core.Hyperparameters)}
    )
    classes = p.system.Hyperparameters, p.system.GPT
    p.core.save_artifact(hp.artifact, model, hp, rounded(model))
    assert p.core.load_artifact(hp.artifact, "cpu", *classes)[1].system == "pure_gdn"
    as_record = p.core.GPT(record)
    p.core.save_artifact(hp.artifact, as_record, record, rounded(as_record))
    assert refuses(lambda: p.core.load_artifact(hp.artifact, "cpu", *classes))


def the_artifact_is_scored_with_its_loop(p: Program) -> None:
    """Loaded, it predicts what the weights that it holds predict in the model that was trained."""
    hp, model, *_ = parts(p, layout="A (A G)x3 A")
    quantized = rounded(shaken(model))
    p.core.save_artifact(hp.artifact, model, hp, quantized)
    ids, classes = torch.randint(4, 300, (2, 60)), (p.system.Hyperparameters, p.system.GPT)
    shipped = as_packed(model, quantized)
    with torch.no_grad():
        expected = shipped(ids)
        assert torch.equal(p.core.load_artifact(hp.artifact, "cpu", *classes)[0](ids), expected)
        shipped.order = [0, 1, 2, 3]
        assert (shipped(ids) - expected).abs().max() > 0.1


def a_fingerprint_is_of_all_that_predicts(p: Program) -> None:
    """Each weight, by one bit, and the order of the passes."""
    _, model, *_ = parts(p, layout="A (G)x2")
    seen = [p.core.fingerprint(model)]
    for weight in model.parameters():
        bits = weight.data.view(torch.int32)
        bits.flatten()[-1] ^= 1
        seen.append(p.core.fingerprint(model))
    model.order = [0, 1]
    seen.append(p.core.fingerprint(model))
    assert len(set(seen)) == len(seen) > 20


# --------------------------------------------------------------------------------------------------
# Catchers: the log


def the_log_and_the_artifact_say_what_runs(p: Program) -> None:
    """Hyperparameters in the log = those in the artifact = those that were set; parameters by the
    published formula."""
    settings = dict(layout="G4", mlp_mult=2.5, ngram_vocab_size=96, ema_decay=0.5, iterations=2)
    run, cls = Run(p, p.folder / "run", ttt="", **settings), p.system.Hyperparameters
    hp, lines = hyperparameters(p, run.settings), run.log.splitlines()
    assert {f"  {name}: {value}" for name, value in asdict(hp).items()} <= set(lines)
    saved = p.core.load_artifact(run.folder / "model.ptz", "cpu", cls, p.system.GPT)[1]
    of_a_model = asdict(hp).keys() - {"run_id", "artifact", "scores"}
    assert all(getattr(saved, name) == getattr(hp, name) for name in of_a_model)
    D, heads, key_heads, K = hp.model_dim, hp.gdn_heads, hp.gdn_key_heads, hp.gdn_head_dim
    n, n_keys = heads * K, key_heads * K
    delta = (3 * D + 4) * n + (2 * D + 8) * n_keys + (2 * D + 2) * heads + K
    lent = (D + 4) * (n + n_keys)  # keys and values of every second block
    embedding = hp.vocab_size * D + 96 * hp.ngram_dim + hp.ngram_dim * D
    blocks = 4 * (2 * D * int(2.5 * D) + 4 * D)
    assert f"model_params:{embedding + blocks + 4 * delta - 2 * lent}" in lines


# --------------------------------------------------------------------------------------------------
# Bugs

HESSIAN = "H, bits = hessians[name],"
OR_NONE = "H, bits = hessians.get(name, torch.eye(W.shape[1])),"
OF_MATRICES = "for name, p in model.named_parameters() if model.kinds[name] != SCALAR}"
QUANTIZE = "for name, W in model.named_parameters():"
QUANTIZED = "quantize(model, hessians, step))\n"
ROUNDED = "quantize(model, {name: torch.eye(len(H)) for name, H in hessians.items()}, step))\n"
LOADED = "eval_seq_len=hp.eval_seq_len)  # what full attention sees\n"
RETURN_MODEL = "    return model.to(device), hp\n"
ITS_VALUES = "fits = len(values) == 2 * sum(halves) and "
CODER = "        coder = coding.queue.RangeDecoder("
OF_NOTHING = """\
        values += bytes(max(0, 2 * sum(halves) - len(values)))
"""
ALL = "model.named_parameters(remove_duplicate=False)"
VAL = 'Path(hp.data_path, "fineweb_val_000000.bin").read_bytes()'
STORED_TWICE = [
    (
        "        return kinds\n",
        "        of = {id(p): kinds[name] for name, p in self.named_parameters()}\n        every = "
        "self.named_parameters(remove_duplicate=False)\n        return {name: of[id(p)] for name, "
        "p in every}\n",
    ),
    (QUANTIZE, QUANTIZE.replace("model.named_parameters()", ALL)),
    (HESSIAN, OR_NONE),
    (
        "              for name, p in model.named_parameters()]\n    values",
        f"              for name, p in {ALL}]\n    values",
    ),
    (
        "        params = dict(model.named_parameters())",
        f"        params = dict({ALL})",
    ),
]

BUGS = [
    Bug(
        "T11a",
        "verify: gptq",
        [
            (OF_MATRICES, OF_MATRICES.replace("!= SCALAR", '!= SCALAR and "mixer" not in name')),
            (HESSIAN, OR_NONE),
        ],
    ),
    Bug("T11b", "verify: gptq", [(QUANTIZED, ROUNDED)]),
    Bug(
        "T12a",
        "verify: gptq",
        [
            (
                HESSIAN,
                HESSIAN.replace(
                    "hessians[name]",
                    "hessians[name] if model.kinds[name] != EMBED else torch.eye(W.shape[1])",
                ),
            )
        ],
    ),
    Bug(
        "T12b",
        "verify: gptq",
        [
            (
                "gptq_quantize(W, H, bits, clip_sigmas.clamp",
                "gptq_quantize(W, H.diagonal().diag(), bits, clip_sigmas.clamp",
            )
        ],
    ),
    Bug(
        "T12c",
        gptq_helps_on_correlated_inputs,
        [
            (
                "torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), "
                "upper=True)",
                "torch.cholesky_inverse(torch.linalg.cholesky(H))",
            ),
            ("H.diagonal().argsort(descending=True)", "H.diagonal().argsort()"),
        ],
    ),
    Bug(
        "T12d",
        the_looped_blocks_are_calibrated_behind_what_ships,
        [("again[name] for name in hessians.keys()", "hessians[name] for name in hessians.keys()")],
        system="crawler",
    ),
    Bug(
        "T15",
        an_artifact_without_a_tensor_is_refused,
        [(ITS_VALUES, "fits = "), (CODER, OF_NOTHING + CODER)],
    ),
    Bug(
        "T16",
        rows_of_small_weights_keep_their_scale,
        [(".clamp(2**-24, ", ".clamp(1 / 127, ")],
    ),
    # values of the embedding for the layers 9 and 10 of a model of two
    Bug(
        "T17a",
        "error: but got NoneType",
        [
            (
                "        self.lm_head = Linear(",
                "        self.values = nn.ModuleDict({f'{i}_v_proj': Linear(hp.model_dim, "
                "hp.model_dim)\n                                     for i in (9, 10)})\n"
                "        self.lm_head = Linear(",
            ),
            (
                "            streams.append(x)\n",
                "            if f'{i}_v_proj' in self.values:\n"
                "                x = x + self.values[f'{i}_v_proj'](x0)\n"
                "            streams.append(x)\n",
            ),
        ],
    ),
    Bug(
        "T17b",
        "audit: gradients",
        [("smear = self.smear_lambda", "smear = 0 * self.smear_lambda")],
        system="gdn_hybrid",
    ),
    Bug(
        "T18a",
        the_log_and_the_artifact_say_what_runs,
        [("dict(system=hp.system, **asdict(hp)).items()", "asdict(type(hp)()).items()")],
        system="kv_share",
    ),
    Bug(
        "T18b",
        the_log_and_the_artifact_say_what_runs,
        [("torch.empty(hp.ngram_vocab_size,", "torch.empty(3072,")],
        system="kv_share",
    ),
    Bug(
        "T18c",
        embeddings_have_eight_bits,
        [("return self.hp.embed_bits if", "return self.hp.matrix_bits if")],
        system="kv_share",
    ),
    Bug(
        "T19",
        "error: mixer.q_proj.weight",
        [("(Linear(D, n * K) for n", "(nn.Linear(D, n * K, bias=False) for n")],
    ),
    Bug(
        "T20",
        "audit: gradients",
        [
            (
                '(r"ngram\\.proj\\.weight$", MATRIX, lambda w, hp: nn.init.orthogonal_(w))',
                '(r"ngram\\.proj\\.weight$", MATRIX, ZEROS)',
            )
        ],
        system="kv_share",
    ),
    # aliases get a place of their own, without a Hessian; they are loaded last
    Bug(
        "T21a",
        "verify: gptq",
        STORED_TWICE,
        settings=dict(layout="G S G=0"),
        system="gdn_hybrid",
    ),
    Bug("T21b", "verify: gptq", STORED_TWICE, system="kv_share"),
    Bug(
        "T22a",
        "audit: ledger",
        [(LOADED, f"{LOADED}    model.order = sorted(set(model.order))\n")],
        settings=dict(layout="A (A G)x2"),
        system="crawler",
    ),
    Bug(
        "T22b",
        the_artifact_is_scored_with_its_loop,
        [(RETURN_MODEL, f"    model.order = sorted(set(model.order))\n{RETURN_MODEL}")],
        system="crawler",
    ),
    Bug(
        "T24",
        an_artifact_of_another_system_is_refused,
        [('if head["system"] != hp_class.system:', "if False:")],
        system="pure_gdn",
    ),
    Bug(
        "T25",
        a_fingerprint_is_of_all_that_predicts,
        [("sha256(weights + str(model.order).encode())", "sha256(weights)")],
        system="layouts",
    ),
    Bug(
        "L13a",
        "error: damaged, or no artifact: .* bytes",
        [(".digest() + data\n", f".digest() + data + {VAL}\n")],
    ),
    Bug(
        "L13b",
        "error: damaged, .*: its values are not those of the model",
        [("+ values, quality", f"+ values + {VAL}, quality")],
    ),
    Bug(
        "L13c",
        "error: damaged, .*: its values are not those of the model",
        [("counts=counts)).encode", f"counts=counts, notes={VAL}.hex())).encode")],
    ),
]

test_the_bug_is_caught = each_is_caught(BUGS)
