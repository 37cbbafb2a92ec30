"""Shards: steps on any workers, failures, other executors; chapters 12 to 14 with the same bytes however they are run or killed."""
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from functools import partial
from pathlib import Path

import polars as pl
import pytest
from shard_toys import artifact, contents, cut, document, doubled, stages, work_in

from shisa import stage as runtime
from shisa.config import ShardConfig, ShisaError
from shisa.sample import documents, noise
from shisa.stage import run_stage

ROOT = Path(__file__).resolve().parents[1]
CHAIN = ("12_dedup", "13_dsir", "14_split")
ALL = ("10_sources", "11_filters", *CHAIN)
ITEMS = list(range(7))
FACTS = [{"item": item, "double": 2 * item} for item in ITEMS]


def python(program: str, *arguments: object, **environment: str) -> subprocess.Popen:
    """A Python process of its own that can import the tests' toys."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)], cwd=ROOT, text=True,
                            stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": paths, **environment})


def outcome(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("value-*.parquet"))}


def mapped(folder: Path, **config) -> list[dict]:
    """`doubled` over ITEMS in a work folder of its own."""
    work = work_in(folder)
    return work.map_shards("double", partial(doubled, folder=work.path), ITEMS, ShardConfig(**config))


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> dict[str, bytes]:
    """The files of the steps run in process."""
    folder = tmp_path_factory.mktemp("plain")
    assert mapped(folder) == FACTS
    return outcome(folder / "out")


# ── map_shards ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_two_workers_give_the_same_facts_and_bytes(plain, tmp_path):
    assert mapped(tmp_path, workers=2) == FACTS
    assert outcome(tmp_path / "out") == plain and len(plain) == len(ITEMS)


def test_finished_items_are_not_run_again(tmp_path):
    for _ in range(2):
        assert mapped(tmp_path) == FACTS
    assert (tmp_path / "out" / "log").read_text().split() == [str(item) for item in ITEMS]


def test_no_items_are_no_work(tmp_path):
    work = work_in(tmp_path)
    assert work.map_shards("nothing", partial(doubled, folder=work.path), [], ShardConfig(workers=4)) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_a_step_that_raises_ends_the_run_and_only_the_rest_is_run_after_it_is_mended(plain, workers, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "broken-4").touch()
    with pytest.raises(ValueError, match="item 4 is broken"):
        mapped(tmp_path, workers=workers)
    kept = {int(path.stem) for path in (tmp_path / "scratch" / "double").glob("*.json")}
    assert 4 not in kept and {0, 1, 2} <= kept
    (tmp_path / "out" / "broken-4").unlink()
    assert mapped(tmp_path, workers=workers) == FACTS
    assert sorted((tmp_path / "out" / "log").read_text().split()) == [str(item) for item in ITEMS]  # each once
    assert outcome(tmp_path / "out") == plain


def test_a_worker_that_is_killed_is_one_line(plain, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "deadly-4").touch()
    with pytest.raises(ShisaError, match="double: a worker was killed.*fewer workers") as caught:
        mapped(tmp_path, workers=2)
    assert "\n" not in str(caught.value)
    (tmp_path / "out" / "deadly-4").unlink()
    assert mapped(tmp_path, workers=2) == FACTS and outcome(tmp_path / "out") == plain


def test_torn_files_of_a_killed_run_are_no_part_of_an_artifact(tmp_path, monkeypatch):
    """What `write_shard` and `write_json` leave when the process dies before they rename."""
    artifact(tmp_path / "11_filters", [pl.DataFrame([document("a", "日本語の文書です。" * 9), document("b", "別の文書です。" * 9)])])
    seen: list[Path] = []

    def killed(source: Path, target: Path) -> None:
        seen.append(Path(source))
        raise KeyboardInterrupt

    for name in ("documents-00000.parquet", "manifest.json"):
        rename = os.replace
        monkeypatch.setattr(os, "replace", lambda source, target, name=name, rename=rename: (
            killed(source, target) if Path(target).name == name else rename(source, target)))
        with pytest.raises(KeyboardInterrupt):
            run_stage("12_dedup", "tiny", tmp_path)
        monkeypatch.undo()
        assert seen[-1].is_file()
    made = run_stage("12_dedup", "tiny", tmp_path)
    assert sorted(contents(made.path)) == ["documents-00000.parquet", "rejects-00000.parquet"]


# ── other executors ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_ray_gives_the_same_bytes_and_keeps_what_is_finished(plain, tmp_path):
    pytest.importorskip("ray", reason="ray is not installed: pip install 'shisa[scale]'")
    pytest.importorskip("datatrove", reason="datatrove is not installed: pip install 'shisa[scale]'")
    program = """
        import sys
        from functools import partial
        from pathlib import Path
        import ray
        from shard_toys import doubled, work_in
        from shisa.config import ShardConfig, ShisaError
        ray.init(num_cpus=2, _memory=8 << 30, object_store_memory=100 << 20, include_dashboard=False, logging_level="ERROR")
        work = work_in(Path(sys.argv[1]))
        config, step = ShardConfig(workers=2, executor="ray"), partial(doubled, folder=work.path)
        broken = work.path / "broken-4"
        broken.touch()
        try:
            work.map_shards("double", step, range(7), config)
            raise SystemExit("the broken item was not told")
        except ShisaError as error:
            assert "shards failed" in str(error) and "first is 4" in str(error), error
        broken.unlink()
        assert work.map_shards("double", step, range(7), config) == [{"item": n, "double": 2 * n} for n in range(7)]
        """
    run = python(program, tmp_path, RAY_DEDUP_LOGS="0", RAY_USAGE_STATS_ENABLED="0")
    _, told = run.communicate(timeout=540)
    assert run.returncode == 0, told[-3000:]
    assert outcome(tmp_path / "out") == plain
    assert sorted((tmp_path / "out" / "log").read_text().split()) == [str(item) for item in ITEMS]  # each once


SBATCH = r"""#!/bin/bash
for script; do :; done
[ -n "$TOY_SLURM_DROPS" ] && { echo "Submitted batch job 7"; exit; }
last=$(sed -n 's/^#SBATCH --array=0-\([0-9]*\).*/\1/p' "$script")
grep -q merge_stats "$script" || for rank in $(seq 0 "$last"); do
  SLURM_ARRAY_TASK_ID=$rank SLURM_JOB_ID=7 SLURM_NODELIST=here bash "$script" > "$TOY_SLURM_LOG" 2>&1
done
echo "Submitted batch job 7"
"""
SLURM = {"sbatch": SBATCH, "srun": '#!/bin/bash\nwhile [ "${1#-}" != "$1" ]; do [ "$1" = -n ] && shift; shift; done\nexec "$@"\n',
         "squeue": "#!/bin/bash\necho 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1\n",
         "scontrol": "#!/bin/bash\necho here\n"}


@pytest.fixture
def toy_slurm(tmp_path, monkeypatch):
    """Slurm's commands as scripts that run a job array at once, in this machine."""
    pytest.importorskip("datatrove", reason="datatrove is not installed: pip install 'shisa[scale]'")
    (tmp_path / "bin").mkdir()
    for name, script in SLURM.items():
        (tmp_path / "bin" / name).write_text(script)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", os.pathsep.join([str(tmp_path / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
    monkeypatch.setenv("TOY_SLURM_LOG", str(tmp_path / "log"))
    monkeypatch.setattr(runtime, "POLL", 0.05)


def test_slurm_runs_the_script_as_an_array(toy_slurm, plain, tmp_path):
    found = mapped(tmp_path / "work", workers=2, executor="slurm", slurm={"partition": "cpu", "time": "1:00:00", "qos": "low"})
    assert found == FACTS, (tmp_path / "log").read_text()[-2000:]
    assert outcome(tmp_path / "work" / "out") == plain
    script = (tmp_path / "work" / "scratch" / "double" / "slurm" / "launch_script.slurm").read_text()
    for line in ("--partition=cpu", "--time=1:00:00", "--qos=low", "--array=0-1", "--job-name=shisa-double"):
        assert f"#SBATCH {line}" in script
    assert "export POLARS_MAX_THREADS=1" in script


def test_a_slurm_job_that_ends_without_its_facts_is_told(toy_slurm, tmp_path, monkeypatch):
    monkeypatch.setenv("TOY_SLURM_DROPS", "1")
    with pytest.raises(ShisaError, match="double: 7 of 7 shards failed, the first is 0; see the logs in"):
        mapped(tmp_path / "work", workers=2, executor="slurm")


def test_slurm_without_sbatch_writes_the_script_and_says_so(tmp_path, monkeypatch):
    pytest.importorskip("datatrove", reason="datatrove is not installed: pip install 'shisa[scale]'")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ShisaError, match=r"slurm: the script is written, but there is no sbatch here") as caught:
        mapped(tmp_path / "work", workers=2, executor="slurm")
    assert "\n" not in str(caught.value)
    script = (tmp_path / "work" / "scratch" / "double" / "slurm" / "launch_script.slurm").read_text()
    assert "launch_pickled_pipeline" in script and "#SBATCH --array=0-1" in script
    with pytest.raises(ShisaError, match="spaces"):
        mapped(tmp_path / "a folder", executor="slurm")


@pytest.mark.parametrize("executor", ["ray", "slurm"])
def test_an_executor_that_is_not_installed_is_one_line(executor, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setitem(sys.modules, "datatrove", None)
    monkeypatch.setitem(sys.modules, "datatrove.executor", None)
    with pytest.raises(ShisaError, match=rf"executor {executor}: .* is not installed; pip install 'shisa\[scale\]'"):
        mapped(tmp_path, executor=executor)


# ── the chain ─────────────────────────────────────────────────────────────────────────────────────────────────────────

WHOLE = """
    import sys
    from pathlib import Path
    from shard_toys import artifact, cut, stages
    from shisa.stage import run_stage
    root, pieces, workers = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    for name in ("10_sources", "11_filters"):
        filtered = run_stage(name, "tiny", root / "read")
    frame = filtered.table("documents")
    artifact(root / "11_filters", cut(frame, [frame.height * place // pieces for place in range(1, pieces)]))
    stages(root, workers)
    """


@pytest.mark.slow
def test_workers_and_hash_seeds_do_not_change_a_byte(tmp_path):
    """The sample read, filtered, cut into 13 shards, and taken through 12 to 14."""
    runs = [python(WHOLE, tmp_path / str(workers), 13, workers, PYTHONHASHSEED=str(seed)) for workers, seed in ((1, 3), (2, 7))]
    for run in runs:
        assert run.wait(timeout=300) == 0, run.stderr.read()[-3000:]
    for name in CHAIN:
        files = contents(tmp_path / "1" / name)
        assert files == contents(tmp_path / "2" / name) and sum(file.startswith("rejects-") for file in files) == 13
    for name in ("10_sources", "11_filters"):
        assert contents(tmp_path / "1" / "read" / name) == contents(tmp_path / "2" / "read" / name)


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """The five artifacts at tiny."""
    out = tmp_path_factory.mktemp("chain")
    return {name: run_stage(name, "tiny", out) for name in ALL}


def test_counts_balance_through_the_chain(chain):
    kept = None
    for name in ALL:
        counts = chain[name].counts
        assert counts["in"] == counts["kept"] + sum(counts["dropped"].values())
        assert kept is None or counts["in"] == kept
        kept = counts["kept"]
        rejects = chain[name].table("rejects")
        assert rejects.height == sum(counts["dropped"].values())
        assert rejects.is_empty() or rejects["excerpt"].str.len_chars().max() <= 200


def test_the_pieces_do_not_change_what_is_kept(chain, tmp_path):
    frame = chain["11_filters"].table("documents")
    artifact(tmp_path / "11_filters", cut(frame, list(range(20, frame.height, 20))))
    stages(tmp_path)
    for name in ("12_dedup", "13_dsir"):
        made = runtime.Artifact(tmp_path / name)
        assert made.table("documents").equals(chain[name].table("documents")) and made.counts == chain[name].counts
    for name in ("train", "heldout"):
        assert runtime.Artifact(tmp_path / "14_split").table(name).equals(chain["14_split"].table(name))


def test_artifacts_hold_no_absolute_path(chain):
    for made in chain.values():
        described = json.dumps({key: made.manifest[key] for key in ("identity", "metrics", "licences")})
        assert str(made.path.parent) not in described


# ── killed ────────────────────────────────────────────────────────────────────────────────────────────────────────────

# One process imports everything, then forks a run, kills it at a moment of its duration, and forks another to the end.
KILLER = """
    import json, os, random, shutil, signal, sys, time, traceback
    from pathlib import Path
    import numba, pydantic, scipy.sparse.csgraph
    import shard_toys
    from shisa import dedup, dsir, split

    def start(root):
        if (child := os.fork()) == 0:
            try:
                shard_toys.stages(root)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        return child

    def finish(root):
        assert os.waitstatus_to_exitcode(os.waitpid(start(root), 0)[1]) == 0, root

    base, seeds = Path(sys.argv[1]), int(sys.argv[2])
    for name in ("first", "undisturbed"):  # the first one compiles
        shutil.copytree(base / "11_filters", base / name / "11_filters")
        began = time.monotonic()
        finish(base / name)
        duration = time.monotonic() - began
    killed = []
    for seed in range(seeds):
        root = base / f"killed-{seed}"
        shutil.copytree(base / "11_filters", root / "11_filters")
        moment = random.Random(seed)
        child = start(root)
        time.sleep(duration * (seed + moment.random()) / seeds)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        killed.append([path.name for path in sorted(root.iterdir()) if path.name[0].isdigit()])
        finish(root)
    print(json.dumps({"duration": duration, "killed": killed}), file=sys.stderr)
    """


def small_corpus() -> pl.DataFrame:
    """Paragraphs of the sample with copies and near copies among them."""
    rows = [document(f"{item['id']}-{lang}-{number}", part, f"sample/{item['kind']}", lang, pair=f"{item['id']}-{number}")
            for item in documents()[:45] for lang in ("ja", "en") for number, part in enumerate(item[lang].split("\n")) if len(part) > 30]
    rows += [document(f"{row['id']}-copy", row["text"] + end, row["source"], row["lang"]) for row in rows[::9] for end in ("",)]
    rows += [document(item["id"], item["text"], "sample/noise", item["lang"]) for item in noise() if item["label"] == "near_duplicate"]
    return pl.DataFrame(rows)


@pytest.mark.slow
def test_killed_at_20_moments_and_run_again_the_bytes_are_the_same(tmp_path):
    frame = small_corpus()
    assert frame.height > 200
    artifact(tmp_path / "11_filters", cut(frame, list(range(40, frame.height, 40))))
    run = python(KILLER, tmp_path, 20, POLARS_MAX_THREADS="1")
    _, told = run.communicate(timeout=500)
    assert run.returncode == 0, told[-3000:]
    where = json.loads(told.strip().split("\n")[-1])["killed"]
    assert len({tuple(names) for names in where}) >= 3, where  # it was killed in different chapters
    expected = {name: contents(tmp_path / "undisturbed" / name) for name in CHAIN}
    assert all(sum(files.startswith("rejects-") for files in own) == len(list((tmp_path / "11_filters").glob("*.parquet")))
               for own in expected.values())
    for seed in range(20):
        assert {name: contents(tmp_path / f"killed-{seed}" / name) for name in CHAIN} == expected, seed
        assert not list((tmp_path / f"killed-{seed}" / ".work").glob("1*-*/"))


def test_a_run_with_two_workers_that_is_killed_leaves_no_worker_behind(tmp_path):
    frame = small_corpus()
    for name in ("killed", "undisturbed"):
        artifact(tmp_path / name / "11_filters", cut(frame, list(range(20, frame.height, 20))))
    program = "import sys; from pathlib import Path; from shard_toys import stages\nstages(Path(sys.argv[1]), 2, 1)"
    run = python(program, tmp_path / "killed")
    scratch = tmp_path / "killed" / ".work"
    deadline = time.monotonic() + 120
    while not list(scratch.glob("12_dedup-*/scratch/sign/*.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    children = [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/stat")
                if _parent(path) == run.pid and b"spawn_main" in (path.parent / "cmdline").read_bytes()]
    run.send_signal(signal.SIGKILL)
    run.wait()
    time.sleep(0.5)
    assert children and [pid for pid in children if Path(f"/proc/{pid}/stat").exists() and _state(pid) != "Z"] == []
    again = python(program, tmp_path / "killed")
    assert again.wait(timeout=200) == 0, again.stderr.read()[-3000:]
    stages(tmp_path / "undisturbed", count=1)
    assert contents(tmp_path / "killed" / "12_dedup") == contents(tmp_path / "undisturbed" / "12_dedup")


def _parent(stat: Path) -> int:
    try:
        return int(stat.read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
