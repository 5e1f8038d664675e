"""The custom ops by Triton's interpreter against plain torch, with the tiles that an H100 gets.

TRITON_INTERPRET=1 python tests/gpuless/interpret_fla.py HK H K  # prints JSON: relative errors
"""

import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent))
import cards
import kernels
import torch
import torch.nn.functional as F
import triton

cards.pretend(cards.H100, "cpu")
import train_gpt as t  # noqa: E402

kernels.on_gpu(cards.H100)
HK, H, K = map(int, sys.argv[1:])  # heads of queries and keys, of values, their size
B, T = 1, 150  # two chunks and a part
torch.manual_seed(0)
q, k = (F.normalize(torch.randn(B, T, HK, K), dim=-1) for _ in range(2))
v, state = torch.randn(B, T, H, K), torch.randn(B, H, K, K)
g, beta = -torch.rand(B, T, H), torch.rand(B, T, H)
g[:, 90] = t.RESET_LOG_DECAY  # a document starts
inputs = [x.requires_grad_() for x in (q, k, v, g, beta, state)]
weights = torch.randn(B, T, H, K), torch.randn(B, H, K, K)
tiles, run = {}, triton.runtime.interpreter.InterpretedFunction.run


def record(self, *args, **kwargs):
    tiles[self.fn.__name__] = {n: x for n, x in kwargs.items() if n in ("BT", "BK", "BV")}
    return run(self, *args, **kwargs)


def results(function):
    o, final_state = function(*inputs)[:2]
    loss = (o * weights[0]).sum() + (final_state * weights[1]).sum()
    return [o, final_state, *torch.autograd.grad(loss, inputs)]


triton.runtime.interpreter.InterpretedFunction.run = record
names = "o state dq dk dv dg dbeta dstate".split()
pairs = zip(names, results(t.torch_gated_delta_rule), results(t.fla_gated_delta_rule), strict=True)
errors = {name: ((ours - fla).norm() / ours.norm()).item() for name, ours, fla in pairs}

n = 48  # channels
x, weight = torch.randn(2, T, n), torch.randn(n, 4)
ids = torch.full((2, T), t.BOS_ID + 1)  # documents of one token, of a chunk, of more
ids[0, [0, 1, 64, 66]], ids[1, [3, 128, T - 1]] = t.BOS_ID, t.BOS_ID
inputs, dy = [x.requires_grad_(), weight.requires_grad_()], torch.randn(2, T, n)
for most in (9, 30):  # documents: as many as there are, and room for more
    ctx = t.make_context(ids, t.Hyperparameters(), most)
    bounds = t.document_bounds(ctx.doc, most)
    plain = t.short_conv(*inputs, ctx)
    fla = t.fla_short_conv(*inputs, bounds, t.conv_chunks(bounds, ids.numel()))
    pairs = [(y, *torch.autograd.grad((y * dy).sum(), inputs)) for y in (plain, fla)]
    for name, ours, theirs in zip(("y", "dx", "dweight"), *pairs, strict=True):
        errors[f"{name} {most}"] = ((ours - theirs).norm() / ours.norm()).item()
print(json.dumps(dict(errors=errors, tiles=tiles)))
