"""The memory that the plan predicts, against a process that trains."""

import json
import subprocess
import sys
import pytest

@pytest.mark.slow
def test_the_predicted_peak_is_the_measured_one() -> None:
    words = ["--tokens", "2048", "--peft", "full", "--precision", "bf16", "--recompute", "none"]
    command = [sys.executable, "-m", "tests.bench.memory", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (case,) = json.loads(done.stdout.splitlines()[-1])["memory"]
    assert case["ratio"] == pytest.approx(1, abs=0.1)
