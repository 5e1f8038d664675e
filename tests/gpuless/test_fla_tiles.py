"""fla's kernels at our head sizes, in the tiles of an H100, give what plain torch gives.

On a CPU fla finds no shared memory and takes tiles of 32; a GPU gets 64 or 128, and with 64 Triton
3.4.0 to 3.7.0 compiled one of these kernels wrongly for Hopper (fla #640). The interpreter says
nothing of compilers, but all of indices, masks and sums over tiles.
"""

import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
FULL = pytest.mark.skipif(os.environ.get("GPULESS") != "full", reason="GPULESS=full runs it")


@pytest.mark.skipif(platform.system() != "Linux", reason="Triton is for Linux")
@pytest.mark.parametrize(
    "heads, head_dim, tile",  # of keys, of values; tile of the gradients of q and k
    [
        ((2, 4), 64, 64),  # record; pure_gdn and kv_share share no keys
        pytest.param((1, 1), 128, 128, marks=FULL),  # crawler
    ],
)
def test_kernels_in_the_tiles_of_a_gpu_equal_plain_torch(heads, head_dim, tile, tmp_path):
    package = Path(importlib.util.find_spec("fla").submodule_search_locations[0])
    shutil.copytree(package, tmp_path / "fla")
    for folder in ("common", "gated_delta_rule"):  # the interpreter's loop counters are plain ints
        for path in (tmp_path / "fla" / "ops" / folder).glob("*.py"):
            path.write_text(path.read_text().replace("= i_t.to(tl.int64)", "= i_t"))
    path = f"{tmp_path}:{HERE.parent.parent}"
    result = subprocess.run(
        [sys.executable, HERE / "interpret_fla.py", *map(str, (*heads, head_dim))],
        env=os.environ | dict(TRITON_INTERPRET="1", PYTHONPATH=path, HOME=str(tmp_path)),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(result.stdout)
    names = "o state dq dk dv dg dbeta dstate".split()
    names += [f"{name} {most}" for most in (9, 30) for name in ("y", "dx", "dweight")]
    assert set(found["errors"]) == set(names)
    assert max(found["errors"].values()) < 1e-5, found["errors"]
    expected = dict(chunk_bwd_kernel_dqkwg=tile, prepare_wy_repr_bwd_kernel=64)
    for name, size in expected.items():
        tiles = found["tiles"][name]
        assert (tiles["BK"], tiles["BV"]) == (size, size), found["tiles"]
