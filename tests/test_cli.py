"""The command line as a user meets it: every kind of bad input is one clear line, exit code 2, nothing half-written."""
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, shisa

from shisa.stage import lineage


def refused(done, *words: str) -> None:
    """Exit code 2, one line on stderr that holds these words, no traceback."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("shisa:")]
    assert done.returncode == 2, (done.returncode, done.stdout[-500:], done.stderr[-2000:])
    assert len(lines) == 1 and "Traceback" not in done.stderr
    for word in words:
        assert word in lines[0], lines[0]


def corpus(folder, lines: dict[str, bytes]):
    """A data folder with corpus/*.jsonl of these bytes."""
    (folder / "corpus").mkdir(parents=True)
    for name, content in lines.items():
        (folder / "corpus" / f"{name}.jsonl").write_bytes(content)
    return {"SHISA_DATA": str(folder)}


def record(number: int, text: str = "これは試験のために書いた短い文書です。天気のよい日に川べりを歩きました。") -> bytes:
    row = {"id": f"d{number}", "text": f"{text}{number}", "source": "t", "lang": "ja", "license": "CC0-1.0"}
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def test_unknown_profile():
    refused(shisa("run", "--profile", "huge"), "unknown profile 'huge'", "tiny")


def test_unknown_chapter():
    refused(shisa("run", "--only", "12_dedupe"), "12_dedupe", "12_dedup")


def test_missing_source_folder(tmp_path):
    env = {"SHISA_DATA": str(tmp_path / "nowhere")}
    refused(shisa("run", "--profile", "small", "--only", "10_sources", "--out", tmp_path / "out", env=env), "nowhere")
    assert not (tmp_path / "out" / "10_sources").exists()


def test_empty_corpus(tmp_path):
    env = corpus(tmp_path / "data", {"ja_empty": b""})
    refused(shisa("run", "--profile", "small", "--only", "10_sources", "--out", tmp_path / "out", env=env))
    assert not (tmp_path / "out" / "10_sources").exists()


def test_torn_jsonl_names_file_and_line(tmp_path):
    torn = record(1) + b'{"id": "d2", "text": "\xe3\x81' + b"\n" + record(3)
    env = corpus(tmp_path / "data", {"ja_torn": torn, "en_fine": record(4, "A plain English sentence about a river. ")})
    refused(shisa("run", "--profile", "small", "--only", "10_sources", "--out", tmp_path / "out", env=env), "ja_torn.jsonl", "2")
    assert not (tmp_path / "out" / "10_sources").exists()


def test_sources_changed_under_a_finished_stage(tmp_path):
    lines = b"".join(record(n) for n in range(30))
    english = b"".join(record(100 + n, "A plain English sentence about a river and a bridge. ") for n in range(30))
    env = corpus(tmp_path / "data", {"ja_one": lines, "en_one": english})
    arguments = ("run", "--profile", "small", "--only", "10_sources", "--out", tmp_path / "out")
    assert shisa(*arguments, env=env).returncode == 0
    manifest = (tmp_path / "out" / "10_sources" / "manifest.json").read_bytes()
    (tmp_path / "data" / "corpus" / "ja_one.jsonl").write_bytes(lines + record(99))
    refused(shisa(*arguments, env=env), "10_sources", "ja_one", "--rebuild")
    assert (tmp_path / "out" / "10_sources" / "manifest.json").read_bytes() == manifest


def test_no_translation_endpoint(tmp_path):
    env = {"SHISA_FIRST_BASE_URL": "", "SHISA_STRONGER_BASE_URL": "", "OPENAI_API_KEY": ""}
    refused(shisa("run", "--profile", "a100x16", "--only", "41_translate", "--out", tmp_path, env=env), "SHISA_FIRST_BASE_URL")
    assert not (tmp_path / "41_translate").exists()


def test_score_of_a_bad_file(tmp_path):
    (tmp_path / "bad.json").write_text('{"jamp": [{"pred": ')
    refused(shisa("score", tmp_path / "bad.json"), "bad.json")
    refused(shisa("score", tmp_path / "none.json"), "none.json")


def test_help_and_status_start_without_torch():
    code = ("import sys; sys.argv = ['shisa', 'status']\nfrom shisa.cli import main\n"
            "try:\n    main()\nexcept SystemExit: pass\nprint('torch' in sys.modules, 'transformers' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip().endswith("False False"), done.stdout[-300:] + done.stderr[-2000:]


def test_help_imports_neither_polars_nor_the_chapters():
    code = ("import sys; sys.argv = ['shisa', '--help']\nfrom shisa.cli import main\n"
            "try:\n    main()\nexcept SystemExit: pass\nprint(sorted(m for m in sys.modules if m in ('polars', 'numpy') or m.startswith('shisa.')))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip().endswith("['shisa.cli', 'shisa.config']"), done.stdout[-300:] + done.stderr[-2000:]
    for command in ("run", "status", "plan", "study", "score", "ask", "refresh", "prepare", "docs"):
        assert f" {command} " in done.stdout


def test_dry_run_writes_no_stage(tmp_path):
    done = shisa("run", "--dry-run", "--out", tmp_path)
    assert done.returncode == 0 and "10_sources" in done.stdout and "80_release" in done.stdout
    assert not [p for p in tmp_path.iterdir() if not p.name.startswith(".")]


@pytest.mark.slow
def test_wheel_from_the_sdist_runs_the_tokenizer_outside_the_checkout(finished_run, tmp_path):
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
    wheel = next((tmp_path / "dist").glob("*.whl"))
    site, work = tmp_path / "site", tmp_path / "work"
    (work / "runs" / "tiny").mkdir(parents=True)
    for ancestor in lineage("21_tokenizer")[:-1]:  # made by the checkout's run: the wheel must find nothing to redo
        os.symlink(finished_run / ancestor, work / "runs" / "tiny" / ancestor)
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site), str(wheel)]
    assert subprocess.run(install, timeout=300, check=False).returncode == 0
    environment = {**os.environ, "PYTHONPATH": str(site)}
    code = f"import shisa, sys; assert shisa.__file__.startswith({str(site)!r}), shisa.__file__; sys.argv = ['shisa', 'run', '--only', '21_tokenizer']; from shisa.cli import main; main()"
    ran = subprocess.run([sys.executable, "-c", code], cwd=work, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert ran.returncode == 0, ran.stdout[-1500:] + ran.stderr[-3000:]
    assert (work / "runs" / "tiny" / "21_tokenizer" / "tokenizer" / "tokenizer.json").is_file()
