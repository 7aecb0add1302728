"""How long serve.py takes until it is ready, beside the import of torch alone.

    python -m tests.bench.ready [--rounds 5]

A GPT-2 of 124 million random weights, 498 MB in fp32 on the disk and in the page cache, with the
built-in tokenizer. From the start of a process to the line that names its port, in fp32 and bf16.
The last line is JSON, in s.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
import transformers
from ftcore.hub import BUILTIN

ROOT, BAR = Path(__file__).parents[2], 1.5

def seconds(words: list[str]) -> float:
    """Until it says that it serves, or ends."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, text=True,
                               cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    for line in process.stdout:
        if line.startswith("serving"):
            break
    taken = time.perf_counter() - start
    process.send_signal(signal.SIGTERM)
    process.wait(30)
    return taken

def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    said = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        transformers.GPT2LMHeadModel(transformers.GPT2Config()).save_pretrained(folder)
        for file in BUILTIN["builtin:base"].glob("tokenizer*"):
            Path(folder, file.name).write_bytes(file.read_bytes())
        serve = ["serve.py", folder, "--port", "0", "--log", os.devnull, "--precision"]
        asked = {"torch": ["-c", "import torch"]}
        asked |= {name: [*serve, name] for name in ("fp32", "bf16")}
        rounds = [{name: seconds(words) for name, words in asked.items()}
                  for _ in range(said.rounds + 1)]
    told = {name: round(statistics.median(each[name] for each in rounds[1:]), 2) for name in asked}
    for name in ("fp32", "bf16"):
        told[f"{name} over torch"] = round(
            statistics.median(each[name] - each["torch"] for each in rounds[1:]), 2)
    print(json.dumps({"bar": BAR, **told}))

if __name__ == "__main__":
    main()
