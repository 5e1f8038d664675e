"""Runs a script where torch is 2.11 or 2.12 (images with CUDA 12) or Triton is older than 3.7.1.

    python tools/old_torch.py train_gpt.py
    python tools/old_torch.py -m pytest -m cuda
    torchrun --standalone --nproc_per_node=8 tools/old_torch.py systems/NAME.py

Three things are mended before the script starts; with nothing to mend it runs as it is. The script
is `__main__` and its folder the first place to import from, so that its log and the files that it
counts are the same; this file is not among its modules.
"""

import importlib.abc
import importlib.util
import inspect
import re
import runpy
import sys
from pathlib import Path

CHUNK_O = "fla.ops.common.chunk_o"


def repeats_heads(varlen_attn):
    """varlen_attn with `enable_gqa`: keys and values are repeated for each of their queries.

    The inner function has no globals: Dynamo would look for them in the script."""

    def attend(query, key, value, *args, enable_gqa=False, **options):
        if enable_gqa:
            group = query.shape[1] // key.shape[1]  # [tokens, heads, size]
            key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        return varlen_attn(query, key, value, *args, **options)

    return attend


def mend_attention() -> bool:
    """torch before 2.13 has no `enable_gqa`. Returns whether something was mended."""
    from torch.nn.attention import varlen

    if "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters:
        return False
    varlen.varlen_attn = repeats_heads(varlen.varlen_attn)
    return True


def mend_gather() -> bool:
    """torch before 2.13 has all_gather_single under its older name. Returns as above."""
    import torch.distributed as dist

    if hasattr(dist, "all_gather_single"):
        return False
    dist.all_gather_single = dist.all_gather_into_tensor
    return True


class SmallTiles(importlib.abc.MetaPathFinder):
    """Mends a module of fla when it is first imported, which is when the delta rule is first run.

    Triton 3.4.0 to 3.7.0 computes tiles of 64 wrongly on Hopper (fla #640), and fla 0.6.0 refuses
    it. Tiles of 32 are right: those that fla takes where shared memory is small."""

    def find_spec(self, name, path=None, target=None):
        if name != CHUNK_O:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def run_and_mend(module) -> None:
            run(module)
            assert hasattr(module, "TRITON_ABOVE_3_7_1") and hasattr(module, "check_shared_mem")
            module.TRITON_ABOVE_3_7_1 = True
            module.check_shared_mem = lambda *args, **options: False

        spec.loader.exec_module = run_and_mend
        return spec


def mend_triton() -> bool:
    """Returns whether fla's tiles will be small."""
    if importlib.util.find_spec("triton") is None:
        return False
    import triton

    version = tuple(int(part) for part in re.findall(r"\d+", triton.__version__)[:3])
    if not (3, 4, 0) <= version < (3, 7, 1):
        return False
    sys.meta_path.insert(0, SmallTiles())
    return True


def run(argv: list[str]) -> None:
    """argv: SCRIPT or -m MODULE, then its arguments."""
    if argv[0] == "-m":
        sys.argv = argv[1:]
        sys.path[0] = ""
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = argv
        script = Path(argv[0]).resolve()
        sys.path[0] = str(script.parent)
        runpy.run_path(str(script), run_name="__main__")


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1:] == ["-m"]:
        sys.exit(f"usage: {sys.argv[0]} SCRIPT [ARGUMENTS], or -m MODULE [ARGUMENTS]")
    mend_attention()
    mend_gather()
    mend_triton()
    run(sys.argv[1:])


if __name__ == "__main__":
    main()
