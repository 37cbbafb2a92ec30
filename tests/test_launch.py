"""Starting training processes, and ending them: real processes, on the CPU; Slurm by stand-ins for its commands."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from launch_toys import placed, training_spec
from shisa import launch as rooms
from shisa.config import ShisaError
from shisa.launch import all_settings, choose_setting, hint, launch, launch_command, launch_file, marked, stream

ROOT = Path(__file__).parent.parent
TESTS = Path(__file__).parent
NAMES = [setting.name for setting in all_settings()]


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    """One thread a process; the toys can be imported; nothing left over from a cluster."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(TESTS), os.environ.get("PYTHONPATH", "")]))
    for name in ("SHISA_MACHINES", "SHISA_MACHINE_RANK", "SHISA_MAIN_ADDRESS", "SHISA_LAUNCHER", "SHISA_ACCELERATE", rooms.MARK):
        monkeypatch.delenv(name, raising=False)


def toy(folder: Path, do: str) -> Path:
    """The config of a toy training that does `do`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"do": do, "at": str(folder)}))
    return folder / "config.json"


def wait_for(condition, seconds: float, why: str) -> float:
    """Seconds until `condition()` holds; fails after `seconds`."""
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() - begun < seconds, why
        time.sleep(0.05)
    return time.monotonic() - begun


# ---- the files and the command

@pytest.mark.parametrize("name", NAMES)
def test_each_file_is_one_that_accelerate_and_deepspeed_take(name, monkeypatch):
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.constants import DEEPSPEED_MULTINODE_LAUNCHERS

    setting = next(one for one in all_settings() if one.name == name)
    loaded = load_config_from_file(str(setting.path))  # refuses unknown keys
    assert (loaded.num_processes, loaded.num_machines) == (setting.processes, setting.machines) and setting.about
    monkeypatch.setenv("SHISA_ACCELERATE", name)
    if setting.machines > 1:
        monkeypatch.setenv("SHISA_MACHINES", str(setting.machines))
        monkeypatch.setenv("SHISA_MACHINE_RANK", "1")
        monkeypatch.setenv("SHISA_MAIN_ADDRESS", "node0:29500")
    command = launch_command("shisa.pretrain", Path("config.json"), setting.processes, bool(setting.deepspeed))
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(command[3:]))
    assert args.module and args.training_script == "shisa.pretrain" and args.training_script_args == ["config.json"]
    assert (args.num_processes, args.num_machines) == (setting.processes, setting.machines)
    assert args.use_deepspeed == bool(setting.deepspeed) and args.multi_gpu == (setting.processes > 1 and not setting.deepspeed)
    assert args.use_cpu == (name == "cpu") and args.gpu_ids == ("-1,-1" if name.startswith("cpu2") else "all")
    if setting.machines > 1:
        assert (int(args.machine_rank), args.main_process_ip, args.main_process_port) == (1, "node0", 29500)
    elif setting.processes > 1:
        assert args.main_process_port == 0  # accelerate finds a free one
    if setting.deepspeed:
        assert args.deepspeed_multinode_launcher == DEEPSPEED_MULTINODE_LAUNCHERS[1] == "standard"
        assert str(args.zero3_init_flag).lower() == "true" and launch_file(args.deepspeed_config_file).is_file()


@pytest.mark.parametrize("name", ["zero3.json", "zero3_offload.json"])
def test_deepspeed_takes_its_files_once_accelerate_has_filled_them(name):
    pytest.importorskip("deepspeed", reason="DeepSpeed is in the extra [train]")
    from accelerate.utils import DeepSpeedPlugin
    from deepspeed.runtime.config import DeepSpeedConfig

    plugin = DeepSpeedPlugin(hf_ds_config=str(launch_file(name)), gradient_accumulation_steps=4)
    plugin.set_mixed_precision("bf16")
    filled = {"gradient_clipping": 0.5, "train_micro_batch_size_per_gpu": 2, "train_batch_size": 8}
    plugin.deepspeed_config_process(must_match=False, **filled)
    assert "auto" not in json.dumps(plugin.deepspeed_config)
    read = DeepSpeedConfig(plugin.deepspeed_config)
    assert (read.zero_optimization_stage, read.gradient_clipping, read.gradient_accumulation_steps) == (3, 0.5, 4)
    assert read.bfloat16_config.enabled and read.zero_config.gather_16bit_weights_on_model_save
    offload = read.zero_config.offload_optimizer
    assert (offload is not None and offload.device == "cpu") == ("offload" in name)


def test_the_setting_follows_from_processes_machines_and_gpus(monkeypatch):
    def chosen(*wanted, **more):
        return choose_setting(*wanted, **more).name

    assert [chosen(n, gpus=0) for n in (1, 2)] == ["cpu", "cpu2"] and chosen(2, True, gpus=0) == "cpu2_zero3"
    assert [chosen(n, gpus=16) for n in (1, 8, 16)] == ["gpu", "gpu8", "gpu16"]
    assert [chosen(n, True, gpus=16) for n in (1, 8, 16)] == ["gpu8_zero3", "gpu8_zero3", "gpu16_zero3"]
    assert chosen(16, True, machines=2, gpus=8) == "gpu2x8_zero3" and chosen(16, machines=2, gpus=8) == "gpu2x8"
    command = launch_command("shisa.sft", Path("job.json"), 4, gpus=4)
    assert command[command.index("--num_processes") + 1] == "4" and "gpu8.yaml" in command[4]
    assert launch_command("shisa.sft", Path("job.json"), 8, gpus=8)[5:] == ["-m", "shisa.sft", "job.json"]
    with pytest.raises(ShisaError, match="16 processes on this machine want as many GPUs, it has 8"):
        choose_setting(16, True, gpus=8)
    with pytest.raises(ShisaError, match="3 processes do not spread evenly over 2 machines"):
        choose_setting(3, machines=2, gpus=8)
    monkeypatch.setenv("SHISA_MACHINES", "2")
    with pytest.raises(ShisaError, match="wants SHISA_MAIN_ADDRESS=host:port and SHISA_MACHINE_RANK"):
        launch_command("shisa.sft", Path("job.json"), 16, gpus=8)


def test_an_own_accelerate_file_goes_before(tmp_path, monkeypatch):
    own = tmp_path / "ours.yaml"
    own.write_text("# Our cluster\ndistributed_type: MULTI_GPU\nnum_processes: 4\nnum_machines: 1\n")
    monkeypatch.setenv("SHISA_ACCELERATE", str(own))
    assert launch_command("shisa.sft", Path("job.json"), 4)[3:5] == ["--config_file", str(own)]
    own.write_text("num_processes: many\n")
    with pytest.raises(ShisaError, match="ours.yaml: no accelerate configuration"):
        choose_setting(4)
    monkeypatch.setenv("SHISA_ACCELERATE", "gpu9")
    with pytest.raises(ShisaError, match="gpu9: neither a file nor one of cpu, cpu2"):
        choose_setting(4)


def test_the_printed_command_can_be_pasted(tmp_path, monkeypatch):
    said = []
    config = toy(tmp_path / "a b", "nothing")
    with monkeypatch.context() as only_said:
        only_said.setattr(rooms, "stream", lambda command, log, *_: said.append(log))
        launch("launch_toys", config, 2, say=said.append)
    pasted = subprocess.run(said[0], shell=True, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert sorted(pasted.stdout.split("\n")[:2]) == ["progress\trank 0 of 2", "progress\trank 1 of 2"]
    assert said[1] == config.with_suffix(".log")


# ---- failures

def test_a_rank_that_raises_is_named_with_the_tail(tmp_path):
    config = toy(tmp_path, "fail")
    with pytest.raises(ShisaError, match="status 1: ValueError: row 17 of the table is empty; the whole log: .*config.log\n") as error:
        launch("launch_toys", config, 2, say=str)
    assert "Root Cause" in str(error.value) and "rank      : 1" in str(error.value)


def test_a_refusal_reaches_the_user_as_one_line(tmp_path):
    with pytest.raises(ShisaError) as error:
        launch("launch_toys", toy(tmp_path, "refuse"), 2, say=str)
    assert str(error.value) == "the checkpoint was written by 4 processes, there are 2; set processes to 4"


def test_a_killed_rank_ends_one_that_hangs_and_is_named(tmp_path):
    begun = []

    def line(text: str) -> None:
        if text.startswith("killing"):
            begun.append(time.monotonic())

    with pytest.raises(ShisaError, match="rank 1 was killed by SIGKILL .*dmesg"):
        launch("launch_toys", toy(tmp_path, "hang"), 2, say=str, line=line)
    assert time.monotonic() - begun[0] < 10
    assert not [number for number in pids(tmp_path) if alive(number)]


def test_failures_with_a_name_have_advice():
    assert "ss -ltnp" in hint(["E0101 The server socket has failed to listen on any local network address. port: 29500, "
                               "useIpv6: false, code: -98, name: EADDRINUSE, message: address already in use"])
    assert "stopped first" in hint(["[rank1]:[E] [PG ID 0 PG GUID 0 Rank 1] Watchdog caught collective operation timeout: "
                                    "WorkNCCL(SeqNum=5, OpType=ALLREDUCE) ran for 600000 milliseconds before timing out."])
    assert "micro_batch" in hint(["[rank0]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."])
    assert hint(["step 3"]) == ""


# ---- nothing is left

def pids(folder: Path) -> list[int]:
    return [int(path.read_text()) for path in folder.glob("pid-*") if path.read_text()]


def alive(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(("processes", "name"), [(1, "SIGINT"), (2, "SIGTERM"), (2, "SIGKILL")])
def test_no_process_outlives_the_one_that_launched(tmp_path, monkeypatch, processes, name):
    """By the mark that they inherit, whatever their parents, groups and sessions."""
    config, mark = toy(tmp_path, "sleep"), f"test-{tmp_path.name}/"
    code = f"import pathlib, shisa.launch as l; l.launch('launch_toys', pathlib.Path({str(config)!r}), {processes})"
    monkeypatch.setenv(rooms.MARK, mark)
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: len(pids(tmp_path)) == processes, 90, "the ranks did not start")
    assert len(marked(mark)) >= processes + 2  # the ranks, their launcher, its parent
    parent.send_signal(getattr(signal, name))
    wait_for(lambda: not marked(mark), 10, "a process was left")
    complaint = parent.communicate()[1]
    assert parent.returncode == -getattr(signal, name) and ("KeyboardInterrupt" in complaint) == (name == "SIGINT")


def test_what_left_the_session_and_holds_the_pipe_is_ended(tmp_path):
    """A child that was sent to the background keeps the output open after its parent is gone: neither is waited for."""
    code = "import subprocess; subprocess.Popen(['sleep', '60'], start_new_session=True); print('started')"
    lines, begun = [], time.monotonic()
    stream([sys.executable, "-c", code], tmp_path / "log", {rooms.MARK: ""}, lines.append)
    assert lines == ["started"] and time.monotonic() - begun < 8
    assert (tmp_path / "log").read_text() == "started\n"


def test_signal_handlers_are_put_back(tmp_path):
    before = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    seen = []
    try:
        signal.signal(signal.SIGTERM, lambda *_: seen.append("ours"))
        ours = signal.getsignal(signal.SIGTERM)
        stream([sys.executable, "-c", ""], tmp_path / "log", {}, str)
        with pytest.raises(ShisaError, match="status 1"):
            stream([sys.executable, "-c", "raise ValueError"], tmp_path / "log", {}, str)
        assert not seen
        with pytest.raises(ZeroDivisionError):  # what reads the lines may fail, too
            stream([sys.executable, "-c", "print(1, flush=True); import time; time.sleep(60)"], tmp_path / "log", {}, lambda _: 1 / 0)
        assert signal.getsignal(signal.SIGTERM) is ours
        with pytest.raises(ShisaError, match="status -15"):  # told in the midst of it: ended first, then handed on
            stream([sys.executable, "-c", "print(1, flush=True); import time; time.sleep(60)"], tmp_path / "log", {},
                   lambda _: os.kill(os.getpid(), signal.SIGTERM))
        assert seen == ["ours"] and signal.getsignal(signal.SIGTERM) is ours
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def test_a_kernel_keeps_its_signal_handlers(tmp_path):
    import nbformat
    from nbclient import NotebookClient

    code = """import signal, sys, pathlib, shisa.launch as l
before = [signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)]
l.stream([sys.executable, '-c', 'print(7)'], pathlib.Path('log'), {}, print)
print(before == [signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)])"""
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    NotebookClient(book, timeout=60, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert "".join(out["text"] for out in book.cells[0].outputs) == "7\nTrue\n"


# ---- several machines

STANDINS = {
    # reads #SBATCH, lets its own options win, runs the script; warns it once that its time is up; runs it again when asked
    "sbatch": """
import os, re, signal, subprocess, sys, time
options = [a for a in sys.argv[1:] if a.startswith("--")]
script, *rest = [a for a in sys.argv[1:] if not a.startswith("--")]
for option in re.findall(r"^#SBATCH (--.*)$", open(script).read(), re.M) + options:
    name, _, value = option[2:].partition("=")
    os.environ["ASKED_" + name.replace("-", "_")] = value
nodes = os.environ["ASKED_nodes"]
os.environ.update(SLURM_JOB_ID=os.environ["STANDIN_JOB"], SLURM_JOB_NUM_NODES=nodes, SLURM_JOB_NODELIST=f"node[0-{int(nodes) - 1}]",
                  SLURM_NODEID="0", SLURM_CPUS_PER_TASK=os.environ["ASKED_cpus_per_task"])
folder, restarts = os.environ["STANDIN_FOLDER"], 0
while True:
    job = subprocess.Popen(["bash", script, *rest], env={**os.environ, "SLURM_RESTART_COUNT": str(restarts)})
    while job.poll() is None:
        time.sleep(0.05)
        log = os.path.join(folder, "log.json")
        if restarts == 0 and "STANDIN_WARN" in os.environ and os.path.exists(log) and open(log).read().count("step") >= 4:
            job.send_signal(signal.SIGUSR1)
            job.wait()
    if not os.path.exists(os.path.join(folder, "requeued")):
        sys.exit(job.returncode)
    os.rename(os.path.join(folder, "requeued"), os.path.join(folder, "requeued-once"))
    restarts += 1
""",
    # one process a node, each told its number; one that fails ends the others (--kill-on-bad-exit)
    "srun": """
import os, signal, subprocess, sys, time
options = {a[2:].partition("=")[0]: a.partition("=")[2] for a in sys.argv[1:] if a.startswith("--") and "=" in a}
at = next(i for i, a in enumerate(sys.argv) if i and not a.startswith("--"))
assert options["kill-on-bad-exit"] == "1" and options["nodes"] == options["ntasks"] == os.environ["SLURM_JOB_NUM_NODES"]
assert os.environ["SRUN_CPUS_PER_TASK"] == os.environ["SLURM_CPUS_PER_TASK"]
tasks = [subprocess.Popen(sys.argv[at:], env={**os.environ, "SLURM_NODEID": str(i), "SLURM_PROCID": str(i)})
         for i in range(int(options["ntasks"]))]
def end(*_):
    [task.terminate() for task in tasks]
signal.signal(signal.SIGTERM, end)
while any(task.poll() is None for task in tasks):
    if any(task.poll() for task in tasks):
        end()
    time.sleep(0.05)
sys.exit(max(abs(task.returncode) for task in tasks))
""",
    "scontrol": """
import os, sys
if sys.argv[1:3] == ["show", "hostnames"]:
    print("127.0.0.1\\n127.0.0.1")
elif sys.argv[1:] == ["requeue", os.environ["SLURM_JOB_ID"]]:
    open(os.path.join(os.environ["STANDIN_FOLDER"], "requeued"), "w").close()
""",
}


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """Two nodes on this machine; returns a function that submits a toy and gives the finished process."""
    import socket

    (tmp_path / "bin").mkdir()
    for name, code in STANDINS.items():
        (tmp_path / "bin" / name).write_text(f"#!{sys.executable}\n{code}")
        (tmp_path / "bin" / name).chmod(0o755)
    with socket.socket() as probe:
        while True:  # a job whose port is free
            job = int.from_bytes(os.urandom(2), "big") % 10_000
            if probe.connect_ex(("127.0.0.1", 20_000 + job)):
                break
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("STANDIN_FOLDER", str(tmp_path / "job"))
    monkeypatch.setenv("STANDIN_JOB", str(job))

    def submit(do: str, **more: str) -> subprocess.CompletedProcess:
        command = ["sbatch", "--cpus-per-task=1", str(launch_file("slurm.sh")), sys.executable, "-m", "shisa.launch",
                   "launch_toys", str(toy(tmp_path / "job", do)), "2"]
        return subprocess.run(command, cwd=tmp_path, env={**os.environ, **more}, capture_output=True, text=True, timeout=120)

    return submit


def test_a_job_on_two_nodes_is_one_world_and_goes_on_when_it_is_queued_again(cluster, tmp_path):
    done = cluster("count", STANDIN_WARN="1")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "job" / "log.json").read_text())
    assert [row["step"] for row in rows] == list(range(12)) and {row["sum"] for row in rows} == {3.0}  # rank 0's 1, rank 1's 2
    assert rows[-1]["begun"] >= 4 and (tmp_path / "job" / "requeued-once").exists()
    assert "start 1, on 127.0.0.1" in done.stdout and "start 2, on 127.0.0.1" in done.stdout
    assert all(f"--num_machines 2 --machine_rank {rank} --main_process_ip 127.0.0.1" in done.stdout for rank in (0, 1))
    assert (tmp_path / "job" / "config.0.log").is_file() and (tmp_path / "job" / "config.1.log").is_file()


def test_a_job_that_fails_on_one_node_ends_on_all_and_is_not_queued_again(cluster, tmp_path):
    done = cluster("fail")
    assert done.returncode == 1 and "ValueError: row 17 of the table is empty" in done.stderr.strip().split("\n")[-1]
    assert not (tmp_path / "job" / "requeued").exists()
    assert not [number for number in pids(tmp_path / "job") if alive(number)]


def test_slurm_says_how_it_is_used():
    done = subprocess.run(["bash", str(launch_file("slurm.sh"))], capture_output=True, text=True)
    assert done.returncode == 2 and "usage: sbatch slurm.sh COMMAND" in done.stderr


# ---- 31_pretrain's own training, launched

@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    return training_spec(tmp_path_factory.mktemp("spec"), 1)


@pytest.fixture(scope="module")
def alone(spec, tmp_path_factory):
    """The step log of the same training in one process, this one."""
    from shisa.pretrain import train

    own, _ = placed(spec, tmp_path_factory.mktemp("alone") / "one")
    train(own)
    return pl.read_parquet(Path(own["output"]) / "steps.parquet")


def test_two_processes_train_as_one_does(spec, alone, tmp_path):
    own, config = placed(spec, tmp_path / "two")
    lines = []
    launch("shisa.pretrain", config, processes=2, say=str, line=lines.append)
    assert sum(line.startswith("progress") for line in lines) == 12  # the main process alone tells
    two = pl.read_parquet(Path(own["output"]) / "steps.parquet")
    assert np.allclose(alone["loss"], two["loss"], atol=1e-4) and alone["tokens"].equals(two["tokens"])
    assert two["loss"][-1] < two["loss"][0]


def test_zero3_trains_as_one_process_does_and_goes_on_after_a_rank_was_killed(spec, alone, tmp_path, monkeypatch):
    pytest.importorskip("deepspeed", reason="DeepSpeed is in the extra [train]")
    from shisa.models import load_model

    own, config = placed(spec, tmp_path / "killed")
    mark, when = f"test-{tmp_path.name}/", []
    monkeypatch.setenv(rooms.MARK, mark)

    def kill_one(text: str) -> None:
        if text.startswith("progress\tstep 8"):
            ranks = [n for n in marked(mark) if f"RANK={len(when)}".encode() in Path(f"/proc/{n}/environ").read_bytes().split(b"\0")]
            when.append(time.monotonic())
            os.kill(ranks[0], signal.SIGKILL)

    with pytest.raises(ShisaError, match="rank 0 was killed by SIGKILL"):
        launch("shisa.pretrain", config, processes=2, zero3=True, say=str, line=kill_one)
    assert not marked(mark) and time.monotonic() - when[0] < 10 and not Path(own["output"]).exists()
    lines: list[str] = []
    launch("shisa.pretrain", config, processes=2, zero3=True, say=str, line=lines.append)
    assert [line.split("\t")[2] for line in lines if line.startswith("progress")] == [str(step) for step in range(7, 13)]
    whole, config = placed(spec, tmp_path / "whole")
    launch("shisa.pretrain", config, processes=2, zero3=True, say=str)
    again, never = (pl.read_parquet(Path(each["output"]) / "steps.parquet") for each in (own, whole))
    assert again["loss"].equals(never["loss"]) and again["grad_norm"].equals(never["grad_norm"])
    assert np.allclose(alone["loss"], never["loss"], atol=1e-4) and np.allclose(alone["grad_norm"], never["grad_norm"], rtol=1e-3)
    one, other = (load_model(Path(each["output"]) / "model").state_dict() for each in (own, whole))
    assert all(one[name].equal(other[name]) for name in one) and not any(t.isnan().any() for t in one.values())
