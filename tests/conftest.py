"""Fixtures shared by the tests: the local data folder, and one finished `tiny` run for all who read it."""
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parents[1]
settings.register_profile("shisa", deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no fault
settings.load_profile("shisa")
RUN = Path(os.environ.get("SHISA_TEST_RUN") or ROOT / "runs" / "tests" / "tiny")


def pytest_collection_modifyitems(items):
    """Tests that read the whole run come last, so that the quick ones speak first."""
    items.sort(key=lambda item: "finished_run" in getattr(item, "fixturenames", ()))


def shisa(*arguments: str, cwd: Path = ROOT, env: dict | None = None, timeout: float = 900) -> subprocess.CompletedProcess:
    """Run the command line as a user does, and return what it printed."""
    environment = {**os.environ, **(env or {})}
    command = [sys.executable, "-c", "from shisa.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout, check=False)


def answers_in(store: Path) -> int:
    """How many answers a store holds, read beside its owner; 0 where it is not there yet."""
    try:
        with sqlite3.connect(f"file:{store}?mode=ro", uri=True, timeout=5) as connection:
            return connection.execute("select count(*) from answers").fetchone()[0]
    except sqlite3.OperationalError:
        return 0


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The local data folder (`SHISA_DATA`, default ../shared/data); skips where it is absent."""
    folder = Path(os.environ.get("SHISA_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no data folder at {folder}: set SHISA_DATA")
    return folder


RUNNING: dict[str, subprocess.Popen] = {}
SECRET = "sk-test-0123456789abcdefOFTHERUN"  # the run's key: found nowhere in what it leaves (test_run)


def pytest_collection_finish(session):
    """Start the whole `tiny` run beside the quick tests: both cores have something to do."""
    wanted = any("finished_run" in getattr(item, "fixturenames", ()) for item in session.items)
    if wanted and not session.config.option.collectonly:
        RUN.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-c", "from shisa.cli import main; main()", "run", "--out", str(RUN), "--rebuild"]
        log = open(RUN.parent / "run.log", "w", encoding="utf-8")  # noqa: SIM115 (read when the run has ended)
        environment = {**os.environ, "OPENAI_API_KEY": SECRET}
        RUNNING["run"] = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)


def pytest_sessionfinish(session):
    """A run that nobody waited for must not outlive the tests."""
    if "run" in RUNNING and RUNNING["run"].poll() is None:
        RUNNING["run"].kill()


@pytest.fixture(scope="session")
def finished_run() -> Path:
    """The folder of a whole `tiny` run made by the command line; it resumes if an earlier session left it half-done."""
    code = RUNNING["run"].wait(timeout=1500)
    assert code == 0, (RUN.parent / "run.log").read_text(encoding="utf-8")[-3000:]
    return RUN
