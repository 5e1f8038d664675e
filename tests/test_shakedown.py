"""tools/shakedown.py: whatever a part does, the others run and are reported. tools/old_torch.py:
what an older torch lacks is mended, and nothing else is another."""

import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from corpus import write_corpus

import train_gpt

sys.path.insert(0, str(ROOT / "tools"))
import old_torch  # noqa: E402  (the path comes first)
import shakedown  # noqa: E402

# starts a process that outlives it, and hangs
HANG = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print("row: child |", child.pid, flush=True)
time.sleep(60)
"""


def part(name: str, code: str, limit: float = 30, **fields) -> shakedown.Part:
    """Made up: it runs this code."""
    return shakedown.Part(name, limit, ("-c", code), on_cpu=True, **fields)


FINE = part("fine", "print('row: width | 7'); print('speed 1'); print('speed 2')")
CRASH = part("crash", "print('row: before | 3'); raise SystemExit(3)")


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run(parts, *arguments) -> exit status, the state of each part, what it printed, seconds."""
    monkeypatch.setattr(shakedown, "has_gpu", lambda: False)

    def call(parts, *arguments):
        begin = time.monotonic()
        status = shakedown.main(["--toy", "--folder", str(tmp_path), *arguments], parts)
        seconds, out = time.monotonic() - begin, capsys.readouterr().out
        lines = [line.partition(": ") for line in out.splitlines() if not line.startswith("|")]
        states = {name: state for name, _, state in lines if not state.startswith("at most")}
        return SimpleNamespace(status=status, states=states, out=out, seconds=seconds)

    return call


def alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.is_file() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


# ---- parts


def test_after_a_crash_and_a_hang_the_others_run(run, tmp_path):
    hang = part("hang", HANG, limit=5)
    result = run([CRASH, hang, FINE])
    assert result.status == 1 and result.seconds < 40
    states = dict(crash="failed: exit status 3", hang="killed: more than 5 s", fine="done")
    assert result.states == states
    for name, state in states.items():
        lines = (tmp_path / f"{name}.txt").read_text().splitlines()
        assert lines[-1] == f"shakedown: {state}" and lines[-2].startswith("shakedown: took ")
    for cells in ("before | 3", "crash | failed: exit status 3", "width | 7", "hang | killed: m"):
        assert f"| {cells}" in result.out
    child = shakedown.rows_of(hang, tmp_path / "hang.txt")[0][1]
    assert not alive(int(child))


def test_what_is_done_is_skipped_and_the_rest_repeated(run, tmp_path):
    assert run([FINE]).status == 0
    log = tmp_path / "fine.txt"
    before = log.read_text()
    result = run([FINE, CRASH])
    assert result.states == dict(fine="done before", crash="failed: exit status 3")
    assert log.read_text() == before and "| width | 7 |" in result.out
    assert run([CRASH]).states == dict(crash="failed: exit status 3")
    assert run([FINE], "--again").states == dict(fine="done")
    assert run([FINE, CRASH], "--only", "fine").states == dict(fine="done before")


def test_the_minutes_are_kept(run):
    parts = [part(name, "import time; time.sleep(30)") for name in ("first", "second")]
    result = run(parts, "--minutes", "0.04")
    assert result.seconds < 20 and result.states["first"].startswith("killed: more than 2 s")
    assert result.states["second"] == "skipped: no time left"
    assert "| second | skipped: no time left |" in result.out and result.status == 1


def test_a_part_leaves_time_to_those_behind_it(tmp_path, monkeypatch):
    began = []
    monkeypatch.setattr(shakedown, "start", lambda part, log, *_: began.append(part.name) or "done")
    options = SimpleNamespace(minutes=10, again=False, toy=False, gpu=True, folder=tmp_path)
    rich = part("rich", "", limit=900, leaves=590)
    parts = [rich, part("last", "", limit=900, least=590)]
    assert shakedown.run_parts(parts, options)["rich"] == "skipped: no time left"
    assert began == ["last"]


def test_a_demo_of_another_text_is_not_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(shakedown, "text_folder", lambda name: tmp_path / name)
    (tmp_path / "demo").mkdir()
    stats = tmp_path / "demo" / "stats.json"
    assert not shakedown.is_complete("demo")
    shipped = hashlib.sha256((ROOT / "data/demo.jsonl.zst").read_bytes()).hexdigest()
    for text, taken in {"ab12": False, shipped: True}.items():
        stats.write_text(json.dumps({"text_sha256": {"train": text, "val": text}}))
        assert shakedown.is_complete("demo") is taken
    (tmp_path / "fineweb10B_sp1024").mkdir()
    (tmp_path / "fineweb10B_sp1024" / "stats.json").write_text("{}")
    assert shakedown.text_settings({})["DATA_PATH"] == str(tmp_path / "fineweb10B_sp1024")


def test_a_log_is_not_overwritten_by_a_part_that_is_left_out(run, tmp_path):
    run([CRASH])
    result = run([CRASH], "--minutes", "0")
    assert result.states == dict(crash="skipped: no time left") and "| before | 3 |" in result.out


def test_what_needs_a_gpu_says_so(run, tmp_path):
    result = run([FINE._replace(on_cpu=False)])
    assert result.states == dict(fine="skipped: no GPU") and result.status == 0
    assert shakedown.last_line(tmp_path / "fine.txt") == "shakedown: skipped: no GPU"
    assert "no GPU" in shakedown.main([], [FINE])


def test_figures_are_found_in_the_log_of_any_program(run, tmp_path):
    run([FINE])
    rows = shakedown.rows_of(FINE._replace(rows=dict(speed=r"^speed (\d)")), tmp_path / "fine.txt")
    assert rows == [("width", "7"), ("speed", "2")]


def test_commands_and_settings_know_their_limit_and_text(run, tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_PATH", "somewhere")
    monkeypatch.setenv("TOKENIZER_PATH", "there")
    code = "import os; print('{limit} {training} {data} {tokenizer}', os.environ['LATE'])"
    fields = dict(settings=dict(LATE="{training}"), of_text=True)
    run([part("named", code, limit=400, **fields)])
    assert (tmp_path / "named.txt").read_text().startswith("400 160 somewhere there 160\n")


def test_what_the_check_proposes_is_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(shakedown, "ROOT", tmp_path)
    monkeypatch.delenv("GRAD_ACCUM_STEPS", raising=False)
    log, of_text = tmp_path / "check.txt", FINE._replace(of_text=True)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "check.env").write_text(
        'check_failed=0\nif [ "${SYSTEM:-}:$nproc" = ":1" ]; then\n'
        "    export GRAD_ACCUM_STEPS=${GRAD_ACCUM_STEPS:-32}\nfi\n"
    )
    for said, expected in (("all ok", None), ("logs/check.env has these settings", "32")):
        log.write_text(said)
        found = shakedown.environment(of_text, False, log).get("GRAD_ACCUM_STEPS")
        assert found == expected
    monkeypatch.setenv("GRAD_ACCUM_STEPS", "16")
    assert shakedown.environment(of_text, False, log)["GRAD_ACCUM_STEPS"] == "16"


def test_the_table_is_in_order():
    names = [part.name for part in shakedown.PARTS]
    assert len(names) == len({*names}) and names[:3] == ["versions", "text", "op64"]
    assert names[-2:] == ["train", "verify"] and names.index("check") < names.index("record")
    measures = {function.__name__ for function in shakedown.MEASURES}
    for part in shakedown.PARTS:
        command = part.command
        assert "--measure" not in command or command[3] in measures
    for text in ("3 passed, 400 deselected in 5.1s", "=== 1 failed, 2 passed in 9.00s ==="):
        found = shakedown.re.findall(*shakedown.PASSED.values(), text, shakedown.re.M)
        assert len(found) == 1 and "passed" in found[0]


# ---- what measures


def test_kernels_are_summed_by_kind(capsys):
    times = {
        "nvjet_sm90_tst_256x128_NNT": (3.0, 10.0),
        "void pytorch_flash::flash_fwd_kernel<cutlass::bfloat16_t>": (1.5, 2.0),
        "chunk_fwd_kernel_o": (2.0, 10.0),
        "causal_conv1d_bwd_kernel": (0.5, 10.0),
        "triton_poi_fused_add_0": (4.0, 3.5),
        "Memset (Device)": (0.25, 1.0),
    }
    shakedown.print_kernels("kernels", times, most=2)
    summed, *longest = capsys.readouterr().out.splitlines()
    assert summed == (
        "row: kernels | 11.2 ms: attention 1.5, matrix products 3.0, convolution 0.5, "
        "delta rule 2.0, compiled 4.0, other 0.2; 36 launches"
    )
    assert [line.split()[-1] for line in longest] == list(times)[4::-4]


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The environment of a part at toy size, on a small text."""
    settings = write_corpus(tmp_path, train_tokens=4000, val_tokens=600)
    for name, value in shakedown.TOY.items():
        monkeypatch.setenv(name, value)
    for name, value in settings.items():
        monkeypatch.setenv(name.upper(), str(value))
    monkeypatch.setenv("LAYOUT", "G S")
    monkeypatch.setattr(shakedown, "FOLDER", tmp_path)


def figures(capsys) -> dict[str, str]:
    lines = capsys.readouterr().out.splitlines()
    rows = [line.removeprefix("row: ").split(" | ") for line in lines if line.startswith("row: ")]
    return dict(rows)


def test_throughput(toy, capsys, monkeypatch, tmp_path):
    (tmp_path / "logs").mkdir()
    monkeypatch.setattr(shakedown, "ROOT", tmp_path)
    floor = "lower bound of a step on 8\n\n{}: G5 S\nlower bound of a step from progress {}: {} ms"
    text = floor.format("record", 0, "10.0") + "\n" + floor.format("crawler", 0.5, "7.0")
    (tmp_path / "logs" / "floor.txt").write_text(text)
    assert shakedown.lower_bound("record") == 10 and shakedown.lower_bound("crawler") == 7
    assert shakedown.lower_bound("baseline") is None
    monkeypatch.setenv("GRAD_ACCUM_STEPS", "0")
    shakedown.throughput("record")
    rows = figures(capsys)
    assert "tokens/s: 8 x " in rows["record: training, one GPU"]
    step = rows["record: step of one of 8 GPUs, without collectives"]
    assert "times the lower bound of 10.0 ms" in step
    assert float(rows["record: eager over compiled, time of a token"].split(",")[0]) > 0


def test_a_batch_too_large_is_halved(capsys):
    def needs(rows):
        if rows > 5:
            raise torch.OutOfMemoryError("so large")
        return rows

    assert shakedown.that_fit(needs, 48) == (3, 3)
    with pytest.raises(torch.OutOfMemoryError):
        shakedown.that_fit(lambda rows: needs(9), 2)


def test_evaluation(toy, capsys):
    shakedown.evaluation()
    rows = figures(capsys)
    assert list(rows) == [f"scoring, {name}" for name in shakedown.MODES]
    assert all("ms a step of 4 rows" in figure for figure in rows.values())


def test_repeat_is_exact_on_a_cpu(toy, capsys, tmp_path):
    shakedown.repeat()
    training, learning, devices = figures(capsys).values()
    assert training == "at most 0, in the last step 0, first in step None"
    assert learning == devices.replace("599", learning.split()[0])
    assert learning.endswith("at most 0, in the mean by 0, their means by 0")
    assert not [*tmp_path.glob("repeat*")]


def test_versions_and_text(toy, capsys):
    shakedown.versions()
    shakedown.text()
    rows = figures(capsys)
    assert f"torch {torch.__version__}" in rows["versions"]
    assert rows["text"].endswith("3 shards, tokens: 4,000 train, 600 val")


def test_a_part_of_the_table_as_a_process(run, toy, monkeypatch):
    parts = [part for part in shakedown.PARTS if part.name in ("baseline", "op64")]
    result = run(parts)
    assert result.states == dict(op64="skipped: no GPU", baseline="done")
    assert "| baseline: training, one GPU | " in result.out


# ---- the delta rule


def test_exact_results_are_those_of_all_rows_at_once():
    inputs, weights = shakedown.op_inputs(train_gpt, (6, 20, 1, 2, 8))
    exact = shakedown.exact_results(train_gpt, inputs, weights)
    once = shakedown.differentiate(train_gpt.torch_gated_delta_rule, inputs, weights)
    bad, error = shakedown.wrong(once, exact)
    assert not bad and error < 1e-4
    once[2][0, 0] = float("nan")
    once[5] = 1.1 * once[5]
    bad, error = shakedown.wrong(once, exact)
    assert [text.split()[0] for text in bad] == ["dq", "dg"]


def test_a_configuration_that_crashes_costs_only_itself(tmp_path, monkeypatch, capsys):
    """Of five: right, crashes, wrong, does not fit, right."""

    def process(log, arguments):
        outcomes = ["right 0.01", None, "WRONG dk 14.6", "does not fit: shared", "right 0.02"]
        with log.open("w") as out:
            for i in range(int(arguments[3]), 5):
                print(f"try k {i} num_warps: {i}", file=out)
                if outcomes[i] is None:
                    print("CUDA error: an illegal memory access", file=out)
                    return "1"
                print(outcomes[i], file=out)
            print("end", file=out)
        return "0"

    monkeypatch.setattr(shakedown, "op_process", process)
    said = shakedown.try_kernel("64", "k", tmp_path, tmp_path / "exact.pt")
    assert shakedown.summarize("64", said) == ["k 1 num_warps: 1", "k 2 num_warps: 2"]
    figure = figures(capsys)["delta rule, heads of 64: configurations against float64"]
    assert figure.startswith("2 of 5 right, error at most 0.02, 1 do not fit; not right: k 1 num")


def test_a_process_that_cannot_begin_ends_the_kernel(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        shakedown, "op_process", lambda log, _: log.write_text("ImportError\n") and "1"
    )
    said = shakedown.try_kernel("64", "k", tmp_path, tmp_path / "exact.pt")
    assert "ImportError" in said and shakedown.summarize("64", said) == ["k 0"]


def test_a_silent_process_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(shakedown, "HANGS", 1)
    script = tmp_path / "hang.py"
    script.write_text("import time\nprint('try', flush=True)\ntime.sleep(60)\n")
    monkeypatch.setattr(shakedown, "OLD_TORCH", str(script))
    assert shakedown.op_process(tmp_path / "log", []) == "hangs"


# ---- tools/old_torch.py


def test_keys_and_values_are_repeated_where_torch_cannot_group():
    def varlen_attn(query, key, value, *, window_size=(-1, -1)):
        return query, key, value, window_size

    q, k, v = torch.randn(5, 6, 4), torch.randn(5, 2, 4), torch.randn(5, 2, 4)
    attend = old_torch.repeats_heads(varlen_attn)
    query, key, value, window = attend(q, k, v, window_size=(3, 0), enable_gqa=True)
    assert query is q and window == (3, 0)
    for head in range(6):  # as scaled_dot_product_attention groups them
        assert torch.equal(key[:, head], k[:, head // 3])
        assert torch.equal(value[:, head], v[:, head // 3])
    assert attend(q, k, v)[1] is k


def test_attention_is_mended_only_where_it_must_be(monkeypatch):
    from torch.nn.attention import varlen

    has_it, found = lambda q, *, enable_gqa=False: q, []  # noqa: E731
    for function in (has_it, lambda q, *, window_size: q):
        monkeypatch.setattr(varlen, "varlen_attn", function)
        found.append((old_torch.mend_attention(), varlen.varlen_attn is function))
        assert not old_torch.mend_attention()
    assert found == [(False, True), (True, False)]


def test_gathering_is_mended_only_where_it_must_be(monkeypatch):
    import torch.distributed as dist

    assert not old_torch.mend_gather()
    monkeypatch.delattr(dist, "all_gather_single")
    assert old_torch.mend_gather() and not old_torch.mend_gather()
    assert dist.all_gather_single is dist.all_gather_into_tensor


@pytest.mark.parametrize(
    "version, mends",
    {"3.3.1": 0, "3.4.0": 1, "3.6.0": 1, "3.7.0": 1, "3.7.1": 0, "3.8.0+git1": 0}.items(),
)
def test_tiles_are_small_with_these_versions_of_triton(version, mends, monkeypatch):
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__=version))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    before = len(sys.meta_path)
    assert old_torch.mend_triton() == bool(mends) and len(sys.meta_path) == before + mends


def test_the_names_that_are_mended_are_those_of_fla():
    package = Path(importlib.util.find_spec("fla").submodule_search_locations[0])
    source = (package / "ops" / "common" / "chunk_o.py").read_text()
    assert "not TRITON_ABOVE_3_7_1:\n        raise RuntimeError(" in source
    assert "if check_shared_mem('hopper', k.device.index):" in source


def test_the_module_is_mended_when_it_is_imported(tmp_path, monkeypatch):
    folder = tmp_path / "fla" / "ops" / "common"
    folder.mkdir(parents=True)
    for package in (folder, *folder.parents[:2]):
        (package / "__init__.py").touch()
    (folder / "chunk_o.py").write_text(
        "TRITON_ABOVE_3_7_1 = False\ndef check_shared_mem(arch): return True\n"
        "LISTED = check_shared_mem('ada')\n"
        "def tiles(): return TRITON_ABOVE_3_7_1, check_shared_mem('hopper', 0)\n"
    )
    for name in [name for name in sys.modules if name.partition(".")[0] == "fla"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", [old_torch.SmallTiles(), *sys.meta_path])
    before = set(sys.modules)
    try:
        from fla.ops.common import chunk_o

        assert chunk_o.LISTED and chunk_o.tiles() == (True, False)
    finally:
        for name in set(sys.modules) - before:
            del sys.modules[name]


PROBE = """
import sys
import parts, train_gpt
if __name__ == "__main__":
    print(sys.argv[1:], __file__, sys.path[0], [str(path) for path in train_gpt.code_files()])
"""


def test_a_script_and_the_files_it_counts_are_the_same(tmp_path):
    (tmp_path / "systems").mkdir()
    for name in ("train_gpt.py", "systems/parts.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    script = tmp_path / "systems" / "probe.py"
    script.write_text(PROBE)
    said = []
    for wrapper in ([], [str(ROOT / "tools" / "old_torch.py")]):
        command = [sys.executable, *wrapper, "systems/probe.py", "--flag"]
        ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        said.append(ran.stdout)
    assert said[0] == said[1] and said[0].startswith("['--flag'] ")
    assert said[1].rpartition("[")[2].count(".py") == 3 and "old_torch" not in said[1]


def test_modules_can_be_run_too(tmp_path):
    (tmp_path / "module.py").write_text("import sys\nprint(sys.argv[1:], __name__)\n")
    command = [sys.executable, str(ROOT / "tools" / "old_torch.py"), "-m", "module", "-k", "x"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ran.stdout == "['-k', 'x'] __main__\n", ran.stderr
    nothing = subprocess.run(command[:2], capture_output=True, text=True)
    assert nothing.returncode == 1 and nothing.stderr.startswith("usage: ")


def test_toy_settings_are_known():
    """Of some system, or of the shakedown itself."""
    assert not {"DATA_PATH", "TOKENIZER_PATH"} & set(shakedown.TOY)
    sources = [*(ROOT / "systems").glob("*.py"), ROOT / "train_gpt.py"]
    text = "".join(path.read_text() for path in sources)
    known = {name for name in shakedown.TOY if f" {name.lower()}: " in text}
    assert set(shakedown.TOY) - known == {"OMP_NUM_THREADS", "SHAKEDOWN_STEPS"}
