"""The stage runtime: nothing half-written is visible, what stands is verified, what differs is refused."""
import json
import multiprocessing
import sys
import time
import types
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shisa import config as settings
from shisa import stage as runtime
from shisa.config import ShisaError, StageConfig, differences, fingerprint, identity, numeric, placement


class Demo(StageConfig):
    factor: int = identity(2, "multiplier", ge=1)
    batch: int = numeric(4, "micro-batch")
    folder: str = placement("", "where from")


def run_demo(config, inputs, work):
    done = work.scratch / "half.txt"
    if config.factor == 13 and not done.exists():
        done.write_text("half")
        raise RuntimeError("killed in the middle")
    (work.path / "value.txt").write_text(str(config.factor))
    work.reject("b", "odd", "x" * 500)
    work.reject("a", "odd", "短い")
    work.balance(total=3, kept=1, dropped={"odd": 2})
    return {"resumed": done.exists()}


@pytest.fixture
def demo(monkeypatch):
    """A stage called 00_demo that `run_stage` finds by name."""
    module = types.ModuleType("shisa.demo")
    module.STAGE = runtime.Stage("00_demo", 1, (), lambda profile: Demo(), run_demo)
    monkeypatch.setitem(sys.modules, "shisa.demo", module)
    return module


def test_finished_is_skipped_and_the_same_bytes_elsewhere(demo, tmp_path):
    first = runtime.run_stage("00_demo", out=tmp_path / "a")
    assert runtime.run_stage("00_demo", out=tmp_path / "a").manifest == first.manifest
    second = runtime.run_stage("00_demo", out=tmp_path / "b")
    assert second.manifest["files"] == first.manifest["files"]
    assert second.manifest["fingerprint"] == first.manifest["fingerprint"]
    rejects = pl.read_parquet(first.path / "rejects.parquet")
    assert rejects["id"].to_list() == ["a", "b"] and rejects["excerpt"].str.len_chars().max() == 200
    assert not list((tmp_path / "a" / ".work").glob("00_demo-*"))


def test_changed_config_is_refused_with_the_difference_until_rebuild(demo, tmp_path):
    runtime.run_stage("00_demo", out=tmp_path)
    with pytest.raises(ShisaError, match=r"config\.factor: 2 -> 3.*--rebuild"):
        runtime.run_stage("00_demo", out=tmp_path, config=Demo(factor=3))
    assert (tmp_path / "00_demo" / "value.txt").read_text() == "2"
    assert runtime.run_stage("00_demo", out=tmp_path, config=Demo(factor=3), rebuild=True).path.joinpath("value.txt").read_text() == "3"


def test_placement_and_numeric_fields_do_not_change_the_fingerprint(demo, tmp_path):
    first = runtime.run_stage("00_demo", out=tmp_path)
    again = runtime.run_stage("00_demo", out=tmp_path, config=Demo(batch=8, folder="/elsewhere"))
    assert again.manifest == first.manifest


def test_resume_after_a_failure_and_refusal_under_other_numbers(demo, tmp_path):
    with pytest.raises(RuntimeError):
        runtime.run_stage("00_demo", out=tmp_path, config=Demo(factor=13))
    assert not (tmp_path / "00_demo").exists()
    with pytest.raises(ShisaError, match="batch: 4 -> 8"):
        runtime.run_stage("00_demo", out=tmp_path, config=Demo(factor=13, batch=8))
    assert runtime.run_stage("00_demo", out=tmp_path, config=Demo(factor=13)).metrics["resumed"]


def test_a_changed_file_is_found_when_read_and_when_skipped(demo, tmp_path):
    artifact = runtime.run_stage("00_demo", out=tmp_path)
    (artifact.path / "value.txt").write_text("9")
    with pytest.raises(ShisaError, match=r"value\.txt"):
        runtime.Artifact(artifact.path).file("value.txt")
    with pytest.raises(ShisaError, match=r"value\.txt"):
        runtime.run_stage("00_demo", out=tmp_path)


def test_counts_must_balance(tmp_path):
    work = runtime.Work(tmp_path, tmp_path, tmp_path / "s.json", "x")
    with pytest.raises(ValueError, match="lost"):
        work.balance(3, 1, {"odd": 1})


def _hold(lock: str, ready) -> None:
    from filelock import FileLock

    with FileLock(lock):
        Path(lock).with_suffix(".holder").write_text("process 123 on host")
        ready.set()
        time.sleep(20)


def test_a_second_runner_names_the_holder(demo, tmp_path):
    (tmp_path / ".work").mkdir()
    ready = multiprocessing.get_context("spawn").Event()
    holder = multiprocessing.get_context("spawn").Process(target=_hold, args=(str(tmp_path / ".work" / "00_demo.lock"), ready))
    holder.start()
    try:
        assert ready.wait(30)
        with pytest.raises(ShisaError, match="process 123 on host"):
            runtime.run_stage("00_demo", out=tmp_path)
    finally:
        holder.kill()
        holder.join()


def test_missing_input_and_unknown_names_are_one_line(tmp_path):
    with pytest.raises(ShisaError, match="unknown profile 'huge'"):
        settings.check_profile("huge")
    with pytest.raises(ShisaError, match="has not finished"):
        runtime.Artifact(tmp_path)
    with pytest.raises(ShisaError, match="unknown stage"):
        runtime.get_stage("12_nothing")


def test_a_field_without_a_role_is_refused():
    with pytest.raises(TypeError, match="identity"):
        class Wrong(StageConfig):
            plain: int = 3


def test_runs_may_not_live_under_the_notebooks(monkeypatch):
    root = settings.project_root()
    if not (root / "nbs").is_dir():
        pytest.skip("not in a checkout")
    with pytest.raises(ShisaError, match="nbs"):
        settings.run_root("tiny", root / "nbs" / "runs")


json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner, max_size=3)
                           | st.dictionaries(st.text(max_size=4), inner, max_size=3), max_leaves=8)


@given(st.dictionaries(st.text(max_size=5), json_values, max_size=4))
def test_fingerprints_do_not_depend_on_order_and_survive_json(value):
    turned = dict(reversed(list(value.items())))
    assert fingerprint(value) == fingerprint(turned) == fingerprint(json.loads(json.dumps(value)))
    assert differences(value, turned) == []
