"""Variables that look like settings and are none: named before a run, by tools/misnamed.py."""

import os
import re
import sys

import pytest
import torch
from conftest import ROOT

import train_gpt

sys.path.append(str(ROOT / "tools"))
import misnamed  # noqa: E402  (the path comes first)
import settings  # noqa: E402
import variables  # noqa: E402

SCRIPTS = variables.systems()
ENVIRONMENTS = dict(
    login="""
        HOME PATH USER LOGNAME SHELL PWD OLDPWD SHLVL _ LANG LANGUAGE LC_ALL LC_CTYPE LC_TIME TERM
        COLORTERM DISPLAY WAYLAND_DISPLAY XAUTHORITY XDG_RUNTIME_DIR XDG_SESSION_ID XDG_DATA_DIRS
        DBUS_SESSION_BUS_ADDRESS DESKTOP_SESSION GDMSESSION GTK_MODULES QT_IM_MODULE SESSION_MANAGER
        SSH_AUTH_SOCK SSH_CLIENT SSH_CONNECTION SSH_TTY MAIL EDITOR VISUAL PAGER LESS LESSOPEN
        LS_COLORS HISTSIZE HISTFILE HISTCONTROL HOSTNAME HOSTTYPE MACHTYPE OSTYPE PS1 COLUMNS LINES
        WINDOWID WINDOWPATH VTE_VERSION MANPATH INFOPATH INVOCATION_ID JOURNAL_STREAM MANAGERPID
        SYSTEMD_EXEC_PID USERNAME TMPDIR TMP TZ SUDO_USER SUDO_COMMAND WSL_DISTRO_NAME NAME ENV
        NVM_DIR PYENV_ROOT CARGO_HOME GOPATH JAVA_HOME NODE_ENV HOMEBREW_PREFIX ITERM_SESSION_ID
        KITTY_WINDOW_ID ALACRITTY_LOG STARSHIP_SHELL http_proxy https_proxy no_proxy HTTP_PROXY
        SSL_CERT_FILE REQUESTS_CA_BUNDLE KRB5CCNAME VIRTUAL_ENV VIRTUAL_ENV_PROMPT CONDA_PREFIX
        CONDA_DEFAULT_ENV CONDA_SHLVL PYTHONPATH PYTHONUNBUFFERED PYTHONHASHSEED PYTHON_VERSION
        UV_CACHE_DIR PIP_CACHE_DIR PIP_INDEX_URL GPG_KEY DEBIAN_FRONTEND DEBUGINFOD_URLS
        NIX_PATH IN_NIX_SHELL system name out src stdenv CC CXX CFLAGS LDFLAGS MAKEFLAGS""",
    terminals="""
        TMUX TMUX_PANE STY TERM_PROGRAM TERM_PROGRAM_VERSION TERM_SESSION_ID VSCODE_INJECTION
        VSCODE_IPC_HOOK_CLI VSCODE_GIT_ASKPASS_MAIN VSCODE_GIT_ASKPASS_NODE VSCODE_GIT_IPC_HANDLE
        BROWSER GIT_ASKPASS GIT_EDITOR GIT_PAGER CHROME_DESKTOP ORIGINAL_XDG_CURRENT_DESKTOP
        REMOTE_CONTAINERS CODESPACES GIT_AUTHOR_NAME GIT_AUTHOR_EMAIL GIT_COMMITTER_NAME""",
    ci="""
        CI GITHUB_ACTIONS GITHUB_ACTOR GITHUB_ACTOR_ID GITHUB_BASE_REF GITHUB_ENV GITHUB_EVENT_NAME
        GITHUB_EVENT_PATH GITHUB_HEAD_REF GITHUB_JOB GITHUB_OUTPUT GITHUB_PATH GITHUB_REF
        GITHUB_REPOSITORY GITHUB_REPOSITORY_ID GITHUB_RUN_ATTEMPT GITHUB_RUN_ID GITHUB_RUN_NUMBER
        GITHUB_SHA GITHUB_TOKEN GITHUB_WORKFLOW GITHUB_WORKSPACE RUNNER_ARCH RUNNER_NAME RUNNER_OS
        RUNNER_TEMP RUNNER_TRACKING_ID AGENT_TOOLSDIRECTORY ImageOS ImageVersion pythonLocation
        Python_ROOT_DIR BUILD_ID BUILD_NUMBER BUILD_TAG JOB_NAME NODE_NAME WORKSPACE CI_JOB_ID
        CI_PIPELINE_ID CI_PROJECT_DIR ARTIFACTS""",
    clusters="""
        SLURM_JOB_ID SLURM_JOBID SLURM_NPROCS SLURM_NTASKS SLURM_NNODES SLURM_PROCID SLURM_LOCALID
        SLURM_CPUS_ON_NODE SLURM_SUBMIT_DIR SLURM_GPUS SLURM_STEP_ID SRUN_DEBUG ENVIRONMENT
        GPU_DEVICE_ORDINAL LMOD_CMD MODULEPATH MODULESHOME LOADEDMODULES BASH_ENV SCRATCH PROJECT
        PBS_JOBID NCPUS JOB_ID NSLOTS RUNPOD_POD_ID RUNPOD_API_KEY RUNPOD_CPU_COUNT RUNPOD_GPU_COUNT
        RUNPOD_MEM_GB RUNPOD_PUBLIC_IP RUNPOD_TCP_PORT_22 RUNPOD_VOLUME_ID PUBLIC_KEY CONTAINER_ID
        JUPYTER_PASSWORD VAST_CONTAINERLABEL KUBERNETES_PORT KUBERNETES_SERVICE_HOST POD_NAME
        AWS_REGION AWS_ACCESS_KEY_ID GOOGLE_APPLICATION_CREDENTIALS""",
    libraries="""
        CUDA_HOME CUDA_VERSION CUDA_VISIBLE_DEVICES CUDA_DEVICE_ORDER CUDA_LAUNCH_BLOCKING
        CUDNN_VERSION LD_LIBRARY_PATH LIBRARY_PATH NVARCH NV_CUDA_CUDART_VERSION
        NVIDIA_VISIBLE_DEVICES NVIDIA_DRIVER_CAPABILITIES NCCL_DEBUG NCCL_VERSION NCCL_NET
        NCCL_IB_DISABLE NCCL_SOCKET_IFNAME TORCH_HOME TORCH_CUDA_ARCH_LIST TORCH_LOGS
        TORCH_NCCL_ASYNC_ERROR_HANDLING TORCHINDUCTOR_CACHE_DIR TORCHDYNAMO_VERBOSE
        PYTORCH_CUDA_ALLOC_CONF PYTORCH_VERSION TRITON_CACHE_DIR OMP_NUM_THREADS OMP_PLACES
        MKL_NUM_THREADS OPENBLAS_NUM_THREADS NUMEXPR_MAX_THREADS NUM_THREADS KMP_AFFINITY
        MASTER_ADDR MASTER_PORT NODE_RANK NNODES TOKENIZERS_PARALLELISM HF_HOME HF_HUB_CACHE
        HF_HUB_OFFLINE HF_HUB_ENABLE_HF_TRANSFER TRANSFORMERS_CACHE WANDB_API_KEY WANDB_RUN_ID
        WANDB_NAME MODEL_PATH MODEL_NAME MODEL_DIR DATASETS OUTPUT_DIR LOG_DIR LOG_LEVEL DEBUG
        BATCH_SIZE NUM_WORKERS NUM_GPUS NPROC_PER_NODE""",
)
# of the competition's train_gpt.py
BASELINE = """
    DATA_PATH TOKENIZER_PATH RUN_ID SEED VAL_BATCH_SIZE VAL_LOSS_EVERY TRAIN_LOG_EVERY ITERATIONS
    WARMDOWN_ITERS WARMUP_STEPS TRAIN_BATCH_TOKENS TRAIN_SEQ_LEN MAX_WALLCLOCK_SECONDS QK_GAIN_INIT
    VOCAB_SIZE NUM_LAYERS NUM_KV_HEADS MODEL_DIM NUM_HEADS MLP_MULT TIE_EMBEDDINGS ROPE_BASE
    LOGIT_SOFTCAP EMBED_LR HEAD_LR TIED_EMBED_LR TIED_EMBED_INIT_STD MATRIX_LR SCALAR_LR
    MUON_MOMENTUM MUON_BACKEND_STEPS MUON_MOMENTUM_WARMUP_START MUON_MOMENTUM_WARMUP_STEPS BETA1
    BETA2 ADAM_EPS GRAD_CLIP_NORM CONTROL_TENSOR_NAME_PATTERNS INT8_KEEP_FLOAT_FP32_NAME_PATTERNS
""".split()


def warnings(*names: str, system: str = "record") -> list[str]:
    return list(misnamed.warnings(dict.fromkeys(names, "x"), SCRIPTS[system]))


@pytest.mark.parametrize(
    "name, near",
    [
        ("MATRX_LR", "MATRIX_LR"),
        ("MARTIX_LR", "MATRIX_LR"),
        ("TRAIN_SEQLEN", "TRAIN_SEQ_LEN"),
        ("ITERATION", "ITERATIONS"),
        ("MAX_WALL_CLOCK_SECONDS", "MAX_WALLCLOCK_SECONDS"),
        ("EVALONLY", "EVAL_ONLY"),
        ("SEEDS", "SEED"),
        ("NPROCS", "NPROC"),
        ("SYSTM", "SYSTEM"),
        ("CHECKPOINT_EVRY", "CHECKPOINT_EVERY"),
        ("matrix_lr", "MATRIX_LR"),
    ],
)
def test_a_name_that_is_nearly_one_is_told_with_it(name, near):
    assert warnings(name) == [f"{name}: no setting has this name; {near} is one"]


@pytest.mark.parametrize("where", sorted(ENVIRONMENTS))
@pytest.mark.parametrize("system", ["record", "kv_share", "transformer"])
def test_variables_of_others_are_passed_over(where, system):
    names = ENVIRONMENTS[where].split()
    assert len(names) > 20 and warnings(*names, system=system) == []


@pytest.mark.parametrize("system", sorted(SCRIPTS))
def test_no_setting_of_the_system_is_warned_of(system):
    names = variables.names_of(SCRIPTS[system]) | {v.name for v in variables.OTHERS}
    assert warnings(*names, system=system) == []


def test_a_setting_of_another_system_is_told_with_it():
    systems = " and ".join(f"SYSTEM={name}" for name in ("hybrid_1895", "kv_share", "transformer"))
    told = f"a setting of {systems}, not of train_gpt.py"
    assert warnings("TTT_CHUNK_TOKENS") == [f"TTT_CHUNK_TOKENS: {told}"]
    assert warnings("TTT_CHUNK_TOKENS", system="kv_share") == []
    assert warnings("CURRICULUM", system="crawler") == [
        "CURRICULUM: a setting of SYSTEM=pure_gdn, not of crawler.py"
    ]


def test_what_the_baseline_has_is_a_setting_or_is_told():
    ours = {f.upper() for f in train_gpt.Hyperparameters.__dataclass_fields__}
    told = [line.partition(":")[0] for line in warnings(*BASELINE)]
    assert told == sorted({*BASELINE} - ours) and "NUM_LAYERS" in told
    (line,) = warnings("WARMDOWN_ITERS")
    assert line.startswith("WARMDOWN_ITERS: no setting here; in its place: WARMDOWN_FRAC")


def test_what_takes_a_place_is_there():
    names = set().union(*map(variables.names_of, SCRIPTS.values())) | {"SYSTEM", "PARAM_RULES"}
    for old, instead in misnamed.REPLACED.items():
        assert old not in names
        assert {*re.findall(r"\b[A-Z][A-Z_]{2,}\b", instead)} <= names, instead
        assert instead.startswith("nothing") or re.match("[A-Z]", instead)


def test_a_source_that_cannot_be_read_yet_has_no_warnings(tmp_path):
    script = tmp_path / "mine.py"
    script.write_text("class Hyperparameters(nowhere.Hyperparameters):\n    x: int = 1\n")
    assert list(misnamed.warnings(dict(MATRX_LR="1"), script)) == []


def test_a_warning_changes_nothing(monkeypatch, capsys):
    monkeypatch.setattr(train_gpt.world, "size", 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    plain = dict(RUN_ID="run", PRESET="demo")
    monkeypatch.setattr(os, "environ", plain)
    assert settings.main([]) == 0
    expected = capsys.readouterr()
    monkeypatch.setattr(os, "environ", plain | dict(MATRX_LR="0.1", NUM_LAYERS="9"))
    assert settings.main([]) == 0
    said = capsys.readouterr()
    assert said.out == expected.out and not expected.err
    assert said.err.splitlines() == [
        "run.sh: warning: MATRX_LR: no setting has this name; MATRIX_LR is one",
        "run.sh: warning: NUM_LAYERS: no setting here; in its place: LAYOUT has the blocks, "
        "as LAYOUT=A9",
    ]
    monkeypatch.setattr(os, "environ", plain | dict(MATRX_LR="0.1", MATRIX_LR="abc"))
    assert "MATRIX_LR='abc'" in settings.main([])
    assert capsys.readouterr() == ("", "")
