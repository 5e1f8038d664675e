"""Toy models of the systems, and the ids they read."""

import copy
import functools
import importlib

import torch
from conftest import TINY

from train_gpt import BOS_ID, EMBED, SCALAR, gptq_quantize, quantize, save_artifact, world

SYSTEMS = (  # modules
    "train_gpt baseline gdn_hybrid kv_share pure_gdn crawler transformer hybrid_1895".split()
)
CURRICULUM = "0:1x16 0.15:2x32 0.45:3x64"  # for three micro-batches
STEP = 0.02  # of rounding, times the RMS of the inputs
# of what only one system has, as TINY of the others
OWN = dict(
    ngram_vocab_size=128,
    ngram_dim=16,
    inst_dim=4,
    attn_gate_dims=5,
    smear_dims=8,
    ttt_chunk_tokens=256,
    curriculum="0:1x64",
    frequent_tokens=30,
)


def system(name):
    """The module of a system, or `layouts`: its Hyperparameters and its GPT."""
    return importlib.import_module(name)


def tiny_of(name, **changes):
    """Hyperparameters of a system at the sizes of TINY."""
    cls = system(name).Hyperparameters
    hp = cls(**{key: x for key, x in (TINY | OWN).items() if hasattr(cls, key)} | changes)
    hp.validate()
    return hp


def is_plain(layout) -> bool:
    """Whether the record's class reads it: no block shares a mixer, none loops."""
    return not {*"=("} & {*layout}


def of_layout(layout, **changes):
    """Hyperparameters and model at the sizes of TINY: the record's, or those of systems/layouts.py
    if blocks share a mixer or loop."""
    name = "train_gpt" if is_plain(layout) else "layouts"
    hp = tiny_of(name, layout=layout, **changes)
    return hp, system(name).GPT(hp)


def toy(name, **changes):
    """Hyperparameters of a system at a toy size, its layout and options as they are."""
    own = system(name).Hyperparameters()
    changes = dict(num_heads=4, num_kv_heads=2) | changes
    changes = dict(train_batch_tokens=3 * 128, grad_accum_steps=3) | changes
    if name == "pure_gdn":
        changes = dict(curriculum=CURRICULUM) | changes
    if hasattr(own, "parallel_start_layer"):
        changes = dict(parallel_start_layer=own.parallel_start_layer) | changes
    kept = {key: getattr(own, key) for key in ("layout", "mlp_mult", "eval_mode", "ttt")}
    return tiny_of(name, **kept | changes)


def in_float64(monkeypatch, model):
    """The model with all its arithmetic in float64, where it asks for float32 too."""
    monkeypatch.setattr(world, "dtype", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # decays, logits
    monkeypatch.setattr(torch, "linspace", functools.partial(torch.linspace, dtype=torch.float64))
    return model.double()


def matrices_of(model):
    """(name, weights) of what is quantized."""
    return [(name, p) for name, p in model.named_parameters() if model.kinds[name] != SCALAR]


def rounded(model, step=STEP):
    """(q, scale) of what is quantized, by name: each value the nearest, as GPTQ has it for inputs
    that do not correlate."""
    return quantize(model, {name: torch.eye(W.shape[1]) for name, W in matrices_of(model)}, step)


def clipped(model, sigmas):
    """As `rounded`, but all at so many standard deviations of their rows; a few use up all bits."""
    return {
        name: gptq_quantize(W.detach(), torch.eye(W.shape[1]), model.bits(name), sigmas)
        for name, W in matrices_of(model)
    }


def usual(model):
    """As `clipped`, at the widths by which tools estimate bytes before a training."""
    matrices, table = clipped(model, 12.85), clipped(model, 15.0)
    return {name: (table if model.kinds[name] == EMBED else matrices)[name] for name in matrices}


def save_rounded(path, model, hp) -> int:
    """An artifact of rounded values; returns its bytes."""
    return save_artifact(path, model, hp, rounded(model))


def as_packed(model, quantized):
    """A copy with the weights that an artifact holds: (q, scale) by name, float16 of the rest."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in quantized:
                q, scale = quantized[name]
                p.copy_(q.float() * scale.float()[:, None])
            else:
                p.copy_(p.half().float())
    return model


def random_ids(hp, B=2, T=48, starts=()):
    """Ordinary tokens, BOS at `starts` of each row."""
    ids = torch.randint(2, hp.vocab_size, (B, T))
    ids[:, list(starts)] = BOS_ID
    return ids


def other(hp, tokens):
    """A different ordinary token for each."""
    n = hp.vocab_size - 2
    return 2 + (tokens.clamp_min(2) - 2 + torch.randint(1, n, tokens.shape)) % n


def documents(row):
    """(start, end) of each document of a row of ids."""
    starts = [i for i, t in enumerate(row.tolist()) if i == 0 or t == BOS_ID]
    return list(zip(starts, [*starts[1:], len(row)], strict=True))
