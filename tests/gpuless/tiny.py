"""What the instruments say of tiny functions whose answer is known; prints it as JSON."""

import json
import os

import fake_cuda  # noqa: F401  (before torch)

# isort: split
import torch
import torch.distributed as dist
import traces
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from tracing import Watch

x = torch.ones(4, 3)
BETWEEN = dict(
    nothing=lambda x: (x.sum() / 2, x * x.ne(0)),
    item=lambda x: x.sum().item(),
    condition=lambda x: bool(x.sum() > 2),
    tolist=lambda x: x[0].tolist(),
    nonzero=lambda x: x.nonzero(),
    chosen=lambda x: x[x > 0],
    put=lambda x: x.index_put_((x > 0,), x[:, 0].repeat(4)),
    filled=lambda x: x.masked_fill_(x > 0, 1.0),
    to_cpu=lambda x: x.cpu(),
    to_cpu_later=lambda x: x.to("cpu", non_blocking=True),
    to_cuda=lambda x: torch.tensor([1.0, 2.0], device=x.device),
    sent=lambda x: (
        dist.all_reduce(x.double()),
        dist.all_gather_single(x.new_empty(8 * 4, 3).half(), x.half()),
    ),
)
COMPILED = dict(
    once=(lambda x: x.sin(), [x, x]),
    shapes=(lambda x: x.sin(), [x, x[:2]]),
    layouts=(lambda x: x.sin(), [x, torch.ones(3, 4).T]),
    cpu=(lambda x: x + torch.ones(3, device="cpu").to(x.device), [x]),
    breaks=(lambda x: x.sin() if x.sum() > 2 else x, [x]),
    saves=(lambda x: x.mm(x.mT).exp().view(2, 8), [x]),
)


def between() -> dict[str, tuple[dict, dict]]:
    """Waits and collectives."""
    found = {}
    for name, function in BETWEEN.items():
        with FakeTensorMode(allow_non_fake_inputs=True), Watch() as watch:
            here = x.to("cuda", non_blocking=True)
            watch.events.clear()
            with watch.tolists():
                function(here)
        found[name] = traces.waits(watch.events), traces.collectives(watch.events)
    return found


def compiled() -> dict[str, list]:
    """Of each graph: kind, devices, bytes saved; or the name of an error."""
    found = {}
    for name, (function, inputs) in COMPILED.items():
        torch._dynamo.reset()
        with FakeTensorMode(allow_non_fake_inputs=True), Watch() as watch:
            call = torch.compile(
                function, backend=watch.compiler.backend, fullgraph=True, dynamic=False
            )
            try:
                for each in inputs:
                    out = call(each.to("cuda").requires_grad_(name == "saves"))
                    if out.requires_grad:
                        out.sum().backward()
            except torch._dynamo.exc.Unsupported as error:
                found[name] = [type(error).__name__]
                continue
        graphs = traces.graphs(watch.events)
        found[name] = [(graph.kind, graph.devices, graph.bytes) for graph in graphs]
    return found


if __name__ == "__main__":
    dist.init_process_group("fake", rank=1, world_size=8, store=FakeStore())
    print(json.dumps(dict(between=between(), compiled=compiled())), flush=True)
    # autograd's thread may still let go of Python objects of the backward pass just done, and
    # aborts the process when it does so while the interpreter ends
    os._exit(0)
