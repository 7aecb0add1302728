"""lm-evaluation-harness over HTTP, beside its transformers back-end and our own eval.py.

    python -m tests.bench.harness [--steps 500]

The embedded model is trained for a while in fp32, with a chat template that has no white space
before an answer, since the harness would count that as part of it. The run is bundled and served;
`local-completions` asks the server for the log-probabilities of the expected answers of
`test_values`, their end included, after their prompts; `hf` computes them in transformers from the
same bundle. An answer is right there where each of its tokens is the likeliest, which is when
greedy generation, as eval.py judges it, gives that answer. A JSON line comes last; exit code 1
where the three differ.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from ftcore import builtin
from tests.bench.chat.export import main as export

TASK = """task: answers
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list:
  - {{metric: perplexity, aggregation: perplexity, higher_is_better: false}}
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""

def rows(file: Path, bundle: Path) -> list[dict[str, str]]:
    """Prompts and answers as text, as the chat template writes them."""
    from transformers import AutoTokenizer

    tokenizer, found = AutoTokenizer.from_pretrained(bundle), []
    for chat in map(json.loads, file.read_text("utf-8").splitlines()):
        told = chat["messages"]
        prompt = tokenizer.apply_chat_template(told[:-1], tokenize=False,
                                               add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(told, tokenize=False).removesuffix("\n")
        found.append({"prompt": prompt, "answer": whole.removeprefix(prompt)})
    return found

def scored(kind: str, arguments: str, folder: Path) -> dict[str, Any]:
    words = [sys.executable, "-m", "lm_eval", "--model", kind, "--model_args", arguments,
             "--tasks", "answers", "--include_path", folder, "--output_path", folder / kind,
             "--device", "cpu"]
    subprocess.run([*map(str, words)], check=True, stdout=sys.stderr)
    (file,) = (folder / kind).rglob("results*.json")
    found = json.loads(file.read_text("utf-8"))["results"]["answers"]
    return {name: found[f"{name},none"] for name in ("perplexity", "acc")}

def trained(folder: Path, steps: int) -> Path:
    """A run of sft from the embedded model with another template."""
    shutil.copytree(builtin.__path__[0] + "/base", folder / "start")
    file = folder / "start" / "tokenizer_config.json"
    told = json.loads(file.read_text("utf-8"))
    template = told["chat_template"].replace("'\\n' + message['content']", "message['content']")
    told["chat_template"] = template.replace("assistant\\n", "assistant")
    file.write_text(json.dumps(told), "utf-8")
    words = ["train.py", "sft", "--preset", "assistant", "--model.path", folder / "start",
             "--env.precision", "fp32", "--loop.max-steps", steps, "--log.dir", folder,
             "--log.name", "run"]
    subprocess.run([sys.executable, *map(str, words)], check=True, stdout=sys.stderr)
    return folder / "run"

def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.harness")
    parser.add_argument("--steps", type=int, default=500)
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as name, redirect_stdout(sys.stderr):
        folder, bundle = Path(name), Path(name, "bundle")
        run = trained(folder, steps)
        export(folder)
        words = [sys.executable, "serve.py"]
        subprocess.run([*words, "bundle", str(run), str(bundle)], check=True, stdout=sys.stderr)
        some, file = rows(folder / "chat" / "test_values.jsonl", bundle), folder / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in some), "utf-8")
        (folder / "answers.yaml").write_text(TASK.format(file=file), "utf-8")
        server = subprocess.Popen([*words, str(bundle), "--port", "0"], text=True,
                                  stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        try:
            line = next(line for line in server.stdout if line.startswith("serving"))
            url = line.split(" at ")[1].partition(";")[0]
            served = scored("local-completions", f"base_url={url}/v1/completions,"
                            f"model={bundle.name},tokenizer_backend=huggingface,"
                            f"tokenizer={bundle},num_concurrent=4", folder)
        finally:
            server.terminate()
            server.wait(30)
        theirs = scored("hf", f"pretrained={bundle},dtype=float32", folder)
        ours = json.loads((run / "eval.json").read_text("utf-8"))["tuned"]["test_values"]
    print(json.dumps({"rows": len(some), "local-completions": served, "hf": theirs,
                      "eval.py": {key: ours[key] for key in ("exact_match", "loss")}}))
    is_close = abs(served["perplexity"] / theirs["perplexity"] - 1) < 1e-4
    return int(not (is_close and served["acc"] == theirs["acc"] == ours["exact_match"]))

if __name__ == "__main__":
    sys.exit(main())
