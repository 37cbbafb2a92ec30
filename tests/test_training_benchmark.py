"""The benchmark of the training step runs whole on a CPU with a small model, and its numbers follow from one another."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_the_toy_is_measured_extrapolated_and_counted(tmp_path):
    target = tmp_path / "results" / "toy.json"
    done = subprocess.run([sys.executable, str(ROOT / "benchmarks" / "training.py"), "mfu", "--toy", "--layers", "1", "3", "--json", str(target)],
                          capture_output=True, text=True, timeout=240, check=False,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(target.read_text())
    assert found["date"] and found["device"] and found["command"].startswith("python benchmarks/training.py mfu --toy")
    flops = found["flops_per_token"]
    assert flops["counted"] == pytest.approx(flops["formula"], rel=0.03)
    rows = {(row["way"], row["layers"]): row for row in found["measured"]}
    assert set(rows) == {(way, layers) for way in ("shisa", "plain Trainer") for layers in (1, 3)}
    tokens = found["settings"]["batch"] * found["settings"]["length"]
    for row in rows.values():
        assert len(row["seconds"]) == found["settings"]["steps"] and row["peak_bytes"] > 0
        assert row["tokens_per_second"] == pytest.approx(tokens / row["median"])
        assert row["mfu"] == pytest.approx(row["tokens_per_second"] * row["flops_per_token"] / found["peak_flops"])
    for way, whole in found["extrapolated"].items():
        few, many = rows[way, 1]["median"], rows[way, 3]["median"]
        assert whole["step_seconds"] == pytest.approx(few + 31 * (many - few) / 2) and "32 layers" in whole["arithmetic"]
        assert whole["gpu_hours_for_8B_tokens"] == pytest.approx(8e9 / whole["tokens_per_second"] / 3600)


def test_flops_of_the_7b_shape_by_formula_and_by_counter():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import training
    finally:
        sys.path.pop(0)
    formula, counted = (count(training.SHAPE, 2, 512) for count in (training.flops_per_token, training.counted_flops))
    assert formula == pytest.approx(counted, rel=0.03)


def test_a_gpu_is_asked_for_where_there_is_none():
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    done = subprocess.run([sys.executable, str(ROOT / "benchmarks" / "training.py"), "mfu"], capture_output=True, text=True, timeout=240,
                          check=False, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 1 and done.stderr.strip().endswith("--toy runs the script on a small shape")
