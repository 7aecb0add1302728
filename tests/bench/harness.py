"""lm-evaluation-harness over HTTP beside its own transformers back-end, on the same model and rows.

    python -m tests.bench.harness --model DIR --data FILE.tsv [--rows 200]

`local-completions` asks serve.py for log-probabilities of given continuations, the second half of
each sentence after the first; `hf` computes them in this machine's transformers, fp32. Both score
by the harness's own code. A JSON line comes last; exit code 1 where the two differ.
"""

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

TASK = """task: halves
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{first}}}}"
doc_to_target: " {{{{second}}}}"
target_delimiter: ""
metric_list:
  - {{metric: perplexity, aggregation: perplexity, higher_is_better: false}}
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""

def rows(file: Path, count: int) -> list[dict[str, str]]:
    found = []
    for line in csv.DictReader(file.open(encoding="utf-8"), delimiter="\t", quoting=csv.QUOTE_NONE):
        words = line["sentence"].split()
        if len(words) > 5:
            half = len(words) // 2
            found.append({"first": " ".join(words[:half]), "second": " ".join(words[half:])})
    return found[:count]

def scored(kind: str, arguments: str, folder: Path) -> dict[str, Any]:
    words = [sys.executable, "-m", "lm_eval", "--model", kind, "--model_args", arguments,
             "--tasks", "halves", "--include_path", folder, "--output_path", folder / kind,
             "--device", "cpu"]
    subprocess.run([*map(str, words)], check=True, stdout=sys.stderr)
    (file,) = (folder / kind).rglob("results*.json")
    found = json.loads(file.read_text("utf-8"))["results"]["halves"]
    return {name.partition(",")[0]: value for name, value in found.items() if ",none" in name}

def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.harness", description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=200)
    said = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, some = Path(name), rows(said.data, said.rows)
        file = folder / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in some), "utf-8")
        (folder / "halves.yaml").write_text(TASK.format(file=file), "utf-8")
        words = ["serve.py", said.model, "--port", "0", "--precision", "fp32"]
        server = subprocess.Popen([sys.executable, *map(str, words)], text=True,
                                  stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        try:
            line = next(line for line in server.stdout if line.startswith("serving"))
            url = line.split(" at ")[1].partition(";")[0]
            ours = scored("local-completions", f"base_url={url}/v1/completions,"
                          f"model={said.model.name},tokenizer_backend=huggingface,"
                          f"tokenizer={said.model},num_concurrent=4", folder)
        finally:
            server.terminate()
            server.wait(30)
        theirs = scored("hf", f"pretrained={said.model},dtype=float32", folder)
    print(json.dumps({"rows": len(some), "local-completions": ours, "hf": theirs}))
    close = abs(ours["perplexity"] / theirs["perplexity"] - 1) < 1e-4
    return int(not close or ours["acc"] != theirs["acc"])

if __name__ == "__main__":
    sys.exit(main())
