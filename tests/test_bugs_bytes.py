"""Bugs of byte accounting, of the data, and of which targets are scored."""

import contextlib
import os
from types import SimpleNamespace
from unittest import mock

import torch
from corpus import BOS, NORMAL, UNUSED, edit_pieces, load, tokenizer_model
from museum import (
    Bug,
    Program,
    a_truncated_validation_shard,
    an_overlap_that_is_not_told,
    each_is_caught,
    every_script,
    fifty_thousand_documents,
    parts,
    refuses,
    shaken,
    transformed,
    transformed_without_bytes,
    two_validation_shards,
    validation_of_a_fifth,
    without_bos,
)

# --------------------------------------------------------------------------------------------------
# Catchers


def unused_pieces_are_boundaries(p: Program) -> None:
    pieces = {300: ("\u2581unused", UNUSED), 301: ("\u2581word", NORMAL)}
    sp = load(edit_pieces(tokenizer_model(), pieces))
    luts = p.core.build_sentencepiece_luts(sp, sp.vocab_size(), "cpu")
    after = p.core.token_bytes(luts, torch.tensor([300, 310]), torch.tensor([301, 301]))
    assert after.tolist() == [len("word"), len(" word")]
    assert luts[0][300] == 0 and luts[2][300]


def a_tokenizer_of_another_size_is_refused(p: Program) -> None:
    sp = load(tokenizer_model())
    for size in (sp.vocab_size() - 1, sp.vocab_size() + 1):
        assert refuses(lambda size=size: p.core.build_sentencepiece_luts(sp, size, "cpu"))


def the_cap_is_16_000_000_bytes_with_the_code(p: Program) -> None:
    code, artifact, hp = os.path.getsize(p.script), p.folder / "model.ptz", p.core.Hyperparameters()
    artifact.touch()
    hp.artifact = str(artifact)
    for size, fits in ((16_000_000 - code, True), (16_000_001 - code, False), (16_000_001, False)):
        os.truncate(artifact, size)
        audit, text = p.core.Audit(), SimpleNamespace(starts=[0], bytes=1, is_official=False)
        scored = mock.patch.object(p.core, "evaluate", lambda *_: dict(eval_time_seconds=1.0))
        with scored, contextlib.suppress(p.core.Refused):
            p.core.finish(hp, None, text, audit, {})
        assert audit.checks["size"]["passed"] == fits


def training_and_scoring_are_one_function(p: Program) -> None:
    _, model, *_ = parts(p)
    ids = torch.randint(384, (2, 64))
    with torch.no_grad():
        scoring = shaken(model).eval()(ids)
    assert torch.allclose(model.train()(ids), scoring, atol=1e-4)


def a_new_document_ends_the_cache(p: Program) -> None:
    """The same row, from BOS on, after two texts: state, convolutions, attention and smear know
    nothing of them."""
    _, model, stream, _ = parts(p, layout="G S A (G)x2")
    row, texts = stream.read(0, 30)[None], stream.read(30, 2 * 40).view(2, 1, 40).clamp(min=2)
    assert row[0, 0] == BOS and (texts[0] != texts[1]).any()
    with torch.no_grad():
        shaken(model)
        logits = [model(row)]
        for text in texts:
            _, cache = model(text, cache=model.new_cache(1))
            logits.append(model(row, cache=cache)[0])
    assert max((other - logits[0]).abs().max() for other in logits[1:]) < 1e-4
    assert (logits[1] - logits[2]).abs().max() < 1e-6


# --------------------------------------------------------------------------------------------------
# Bugs

PLAIN = "if plain else int(not is_boundary)"
PATHS = '        wanted = {f"fineweb_{split}_{i:06d}.bin" for i in range('
VAL_IDS = "        ids = stream.read(0, len(stream))\n"
EMBEDDED = "        x = x0 = norm(last(self.embed("
WINDOWS = "    units = [[Reading(max(0, end - T), end, first)] for first, end in ends]\n"
RESET = "        g = g.masked_fill(last(ctx.same_doc, T)[..., :1] == 0, RESET_LOG_DECAY)\n"
ORIGINAL = "        self.target_bytes = sizes[1:].to(world.device)\n"
IN_SYSTEMS = '*sorted(path for path in loaded if path.parent == here.parent / "systems")'

BUGS = [
    # byte accounting
    Bug(
        "B1",
        "audit: bytes",
        [(f".encode()) {PLAIN}", f'.encode()) + piece.startswith("\\u2581") {PLAIN}')],
    ),
    Bug("B2", "audit: bytes", [(PLAIN, "if not is_boundary else 0")], every_script),
    Bug("B3", "audit: bytes", [(PLAIN, "if not sp.is_byte(i) else 1")]),
    Bug(
        "B4",
        unused_pieces_are_boundaries,
        [("sp.is_unknown(i) or sp.is_unused(i)", "sp.is_unknown(i)")],
    ),
    Bug(
        "B5",
        a_tokenizer_of_another_size_is_refused,
        [("    if sp.vocab_size() != vocab_size or sp.bos_id()", "    if sp.bos_id()")],
    ),
    Bug(
        "B6a",
        "verify: claims",
        [("total / math.log(2) / validation.bytes", "total / math.log(2) / (3.5 * len(nats))")],
    ),
    Bug(
        "B6b",
        "audit: bytes",
        [("self.target_bytes.sum(dtype=torch.int64).item()", "round(3.5 * len(ids))")],
    ),
    Bug(
        "B7",
        "verify: claims",
        [("| dict(checks=audit.checks))", "| dict(checks=audit.checks, val_bpb=1.0338576))")],
    ),
    Bug("B8a", "audit: bytes", corpus=fifty_thousand_documents),
    Bug(
        "B8b",
        "audit: bytes",
        [
            (
                ORIGINAL,
                "        luts = train_gpt.build_sentencepiece_luts(sp, hp.vocab_size, 'cpu')\n"
                "        targets = self.tokens[:-1], self.tokens[1:]\n"
                "        self.target_bytes = train_gpt.token_bytes(luts, *targets)\n",
            )
        ],
        transformed,
        system="transformer",
    ),
    Bug(
        "B8c",
        "error: 0 files fineweb_val_bytes_.*expected some if and only if",
        corpus=transformed_without_bytes,
        system="transformer",
    ),
    Bug(
        "B8d",
        "verify: sample_bytes",
        [
            ("GPT, Validation)", "GPT)"),
            ('if sidecar or sp.id_to_piece(4) == "\\ue001":', "if 0:"),
        ],
        transformed,
        system="transformer",
    ),
    Bug(
        "B9",
        the_cap_is_16_000_000_bytes_with_the_code,
        [
            ("SIZE_LIMIT = 16_000_000", "SIZE_LIMIT = 16 * 2**20"),
            ("total <= SIZE_LIMIT", 'sizes["bytes_model"] <= SIZE_LIMIT'),
        ],
    ),
    Bug("B10", "verify: size", [(f"[here, {IN_SYSTEMS}]", "[here]")], system="kv_share"),
    Bug(
        "B11",
        "verify: size",
        [
            (
                "import parts  # noqa: F401  (makes train_gpt importable)\n",
                "import sys\nsys.path.append(__file__.rpartition('/systems/')[0])\n",
            ),
            ("        super().set_progress(progress)\n", "        import parts  # noqa: F401\n"),
        ],
        system="pure_gdn",
    ),
    # data
    Bug(
        "D1",
        "verify: claims",
        [(PATHS, f'        self.paths = self.paths[: 1 if split == "train" else None]\n{PATHS}')],
    ),
    Bug(
        "D2a",
        "verify: claims",
        [(PATHS, f'        self.paths = self.paths[: 1 if split == "val" else None]\n{PATHS}')],
        two_validation_shards,
    ),
    Bug("D2b", "error: bytes, expected .* for its .* tokens", corpus=a_truncated_validation_shard),
    Bug(
        "D3",
        "error: starts with token .*, expected BOS",
        [(", offset=HEADER_BYTES, shape=(count,))", ")")],
    ),
    Bug(
        "D4",
        "audit: bytes",
        [("starts[i] :][:count]", "starts[i] :][:count].clip(max=255)")],
    ),
    Bug(
        "D5",
        "verify: claims",
        [(VAL_IDS, VAL_IDS.replace("len(stream)", "(len(stream) - 1) // 64 * 64 + 1"))],
    ),
    Bug(
        "D6",
        "audit: once",
        [
            (
                WINDOWS,
                f"{WINDOWS}    units += [[Reading(n - T, n, n - stride)]] * (T // stride - 1)\n",
            )
        ],
    ),
    Bug(
        "D7",
        "verify: future",
        [
            (
                EMBEDDED,
                f"        in_row = F.one_hot(ids, self.hp.vocab_size).amax(1, True)\n{EMBEDDED}",
            ),
            ("        out = self.head(x)\n", "        out = self.head(x) + 8 * in_row\n"),
        ],
    ),
    Bug(
        "D8",
        training_and_scoring_are_one_function,
        [("        if self.xsa:", "        if self.xsa and not torch.is_grad_enabled():")],
    ),
    Bug("D9", "verify: overlap", corpus=validation_of_a_fifth),
    Bug(
        "D10a",
        "verify: isolation",
        [("shift(x, n) * ctx.same_doc[..., n - 1 : n]", "shift(x, n)")],
    ),
    Bug(
        "D10b",
        "verify: isolation",
        [("smear * ctx.same_doc[..., :1] * shift(x, 1)", "smear * shift(x, 1)")],
        system="gdn_hybrid",
    ),
    Bug("D10c", "verify: isolation", [(RESET, "")]),
    Bug(
        "D10d",
        "verify: isolation",
        [("doc[:, :, None] == doc[:, None, :]", "doc[:, :, None] > 0")],
    ),
    Bug(
        "D10e",
        "verify: isolation",
        [("        rows = torch.where(ctx.same_doc[..., :2] > 0, rows, missing)\n", "")],
        system="kv_share",
    ),
    Bug(
        "D10f",
        a_new_document_ends_the_cache,
        [(RESET, RESET.replace("== 0,", "== (0 if state is None else -1),"))],
        system="layouts",
    ),
    Bug("D11", "error: starts with token .*, expected BOS", corpus=without_bos),
    Bug("D12", "verify: overlap", corpus=an_overlap_that_is_not_told),
]

test_the_bug_is_caught = each_is_caught(BUGS)
