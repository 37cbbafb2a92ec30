"""One whole `tiny` run, read from many sides; and runs that are killed, go on, and end with the same bytes."""
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, SECRET, answers_in, shisa

from shisa.pipeline import CHAPTERS, STAGES
from shisa.report import headline
from shisa.stage import Artifact


def test_every_chapter_ran_and_every_artifact_is_verified(finished_run):
    for stage in STAGES:
        Artifact(finished_run / stage).verify()
    for chapter in CHAPTERS:
        notebook = json.loads((finished_run / "notebooks" / f"{chapter}.ipynb").read_text())
        assert not any(o["output_type"] == "error" for c in notebook["cells"] for o in c.get("outputs", []))


def test_counts_balance_in_every_manifest(finished_run):
    for stage in STAGES:
        if counts := Artifact(finished_run / stage).counts:
            assert counts["in"] == counts["kept"] + sum(counts["dropped"].values())


def test_promises_of_the_report_hold(finished_run):
    rows = headline(finished_run)
    assert len(rows) >= 11
    assert [row["measure"] for row in rows if row["holds"] == "NO"] == []
    bits = Artifact(finished_run / "31_pretrain").metrics["bits_per_byte"]
    assert bits["trained"]["ja"] <= 0.7 * bits["untrained"]["ja"] and bits["trained"]["ja"] < bits["counted"]["ja"]
    assert bits["counted"]["ja"] < bits["untrained"]["ja"] and bits["counted"]["en"] < 1.02 * bits["base"]["en"]


def test_every_refusal_retry_and_back_fill_happened(finished_run):
    metrics = Artifact(finished_run / "41_translate").metrics
    assert {"truncated", "untranslated", "chatty", "looping", "answered", "timeout"} <= {*metrics["refused"]}
    assert metrics["retried"] > 0 and metrics["texts"]["stronger"] > 0 and {"shortened", "backfilled"} & {*metrics["conversations"]}


def test_the_key_is_in_no_store_log_manifest_notebook_or_card(finished_run):
    files = [path for path in (*finished_run.rglob("*"), finished_run.parent / "run.log") if path.is_file()]
    names = {path.name for path in files}
    assert {"answers.sqlite", "manifest.json", "41_translate.ipynb", "README.md", "report.html", "run.log"} <= names
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]


def test_second_run_skips_everything(finished_run):
    done = shisa("run", "--out", finished_run)
    assert done.returncode == 0 and "nothing to do" in done.stdout
    assert "report.html" in done.stdout


def test_report_shows_tables_and_plots(finished_run):
    page = (finished_run / "report.html").read_text()
    assert page.count("<img") >= 6 and "bits per byte" in page and "http" not in page.split("<style>")[0]
    assert (finished_run / "report.md").is_file()


def test_no_pickle_and_no_machine_path_in_any_artifact(finished_run):
    for stage in STAGES:
        for path in (finished_run / stage).rglob("*"):
            assert path.suffix not in (".bin", ".pt", ".pth", ".pkl"), path
            if path.suffix in (".json", ".md", ".jinja") and path.is_file():
                assert str(ROOT) not in path.read_text(encoding="utf-8"), path


def test_ask_streams_an_answer_and_refuses_a_prompt_beyond_the_context(finished_run):
    done = shisa("ask", "りんごは何の仲間ですか。", "--out", finished_run)
    assert done.returncode == 0 and done.stdout.strip()
    long = shisa("ask", "とても長い質問です。" * 3000, "--out", finished_run)
    assert long.returncode == 2 and "context" in long.stderr and "Traceback" not in long.stderr


def test_config_changed_under_a_finished_stage_is_refused(finished_run):
    from shisa.config import ShisaError
    from shisa.dedup import config
    from shisa.stage import run_stage

    field = next(iter(config("tiny").part("identity")))
    value = config("tiny").part("identity")[field]
    changed = config("tiny").model_copy(update={field: value + 1 if isinstance(value, (int, float)) else "other"})
    with pytest.raises(ShisaError, match=f"config.{field}.*--rebuild"):
        run_stage("12_dedup", "tiny", finished_run, config=changed)


def _kill_in_the_middle(stage: str, out, share: float) -> None:
    """Start `shisa run --only STAGE`, SIGKILL its process group when the stage's progress passes `share`.

    41 tells of conversations in order, and the first may be among the last to be done: there the answers in its store count."""
    command = [sys.executable, "-c", "from shisa.cli import main; main()", "run", "--only", stage, "--out", str(out)]
    runner = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    begun = time.monotonic()
    while runner.poll() is None and time.monotonic() - begun < 300:
        time.sleep(0.05)
        try:
            status = json.loads((out / ".work" / "status.json").read_text())
        except (OSError, ValueError):
            continue
        if stage == "41_translate":
            passed = answers_in(out / "store" / "answers.sqlite") > share * 300
        else:
            passed = status["total"] and status["done"] / status["total"] > share
        if status["stage"] == stage and passed:
            worker = status["pid"]
            os.kill(runner.pid, signal.SIGKILL)
            runner.wait()
            for _ in range(100):  # the kernel must die with its parent
                if not os.path.exists(f"/proc/{worker}") or "Z" in open(f"/proc/{worker}/stat").read().rsplit(")", 1)[1][:3]:
                    return
                time.sleep(0.1)
            raise AssertionError(f"process {worker} outlived its runner")
    raise AssertionError(f"{stage} ended before it could be killed")


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "share"), [("41_translate", 0.4), ("31_pretrain", 0.4)])
def test_killed_in_the_middle_goes_on_and_ends_with_the_same_bytes(finished_run, tmp_path, stage, share):
    from shisa.stage import lineage

    for ancestor in lineage(stage)[:-1]:
        os.symlink(finished_run / ancestor, tmp_path / ancestor)
    (tmp_path / ".work").mkdir()
    _kill_in_the_middle(stage, tmp_path, share)
    assert not (tmp_path / stage).exists()
    done = shisa("run", "--only", stage, "--out", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    mine, reference = Artifact(tmp_path / stage), Artifact(finished_run / stage)
    assert mine.manifest["files"] == reference.manifest["files"]
