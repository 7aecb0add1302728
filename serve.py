"""Serve a run, or a model folder, over HTTP.

    python serve.py runs/NAME                           what the run trained; with its adapter, the base too
    python serve.py MODEL --adapter NAME=FOLDER ...     a folder or hub id, and adapters by their names
    python serve.py MODEL --help                        every option and limit

Generators answer /v1/chat/completions, /v1/completions and /v1/embeddings, classifiers /v1/classify,
reward models /v1/score; /openapi.json lists all routes and fields. Exit codes: 0 stopped by a
signal, after running requests; 1 the engine is broken; 2 what was asked must be mended; 130 a
second signal.
"""

import asyncio
import hashlib
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ftcore.cli import CONFIG_FILE, options, parse
from ftcore.config import ServeConfig
from ftcore.errors import ConfigError, FtcoreError

if TYPE_CHECKING:
    from ftcore.deploy.api import Api
    from ftcore.model.load import LoadedModel

NAME = re.compile("[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
HEADS = {"ForCausalLM": "lm", "LMHeadModel": "lm", "ForSequenceClassification": "classify"}
LOCAL = ("127.0.0.1", "localhost", "::1")
ADAPTER = "served_{}"  # how the model calls an adapter

def named(config: ServeConfig) -> dict[str, Path]:
    """Adapter folders by name. Raises ConfigError."""
    pairs = [pair.partition("=") for pair in config.adapter]
    for name, equals, folder in pairs:
        if not NAME.fullmatch(name) or not equals or not Path(folder).is_dir():
            must = "NAME=FOLDER: letters, digits and ._- of a name, and a folder that is there"
            raise ConfigError(f"--adapter {name}{equals}{folder}: must be {must}")
    if len(found := {name: Path(folder) for name, _, folder in pairs}) < len(pairs):
        raise ConfigError("--adapter: a name stands twice")
    return found

def check(config: ServeConfig) -> None:
    """Refuse what would be open to others unawares."""
    if config.api_key_file:
        try:
            keys = config.api_key_file.read_bytes().split()
        except OSError as error:
            raise ConfigError(f"--api-key-file {config.api_key_file}: {error.strerror}") from error
        if not keys:
            raise ConfigError(f"--api-key-file {config.api_key_file}: holds no key")
    elif config.host not in LOCAL and not config.insecure:
        what = f"--host {config.host}: other machines could ask without a key"
        raise ConfigError(f"{what}: give --api-key-file FILE, or --insecure")

def opened(path: str, config: ServeConfig) -> tuple["LoadedModel", dict[str, str | None], dict]:
    """The model with all its adapters; every name that requests may ask for, the first one where
    they ask for none, with its adapter; what else is known of it, as fields of `Served`."""
    from ftcore.align.tasks import TASKS
    from ftcore.env import compute
    from ftcore.hub import lineage
    from ftcore.model.load import read_object
    from ftcore.tune.adapter import load_adapter, load_artifact, load_base, read_labels

    dtype, products = compute.PRECISIONS[config.precision]
    device, own = compute.resolve_device(config.device, config.kernels), Path(path).name
    names: dict[str, str | None] = {own: None}
    if (Path(path) / CONFIG_FILE).is_file():
        command = parse(["--resume", path])
        base, problem = command.config.model.path, command.config.problem
        loaded = load_artifact(Path(path), base=base, kind=TASKS[command.task], dtype=dtype)
        folders = {} if (Path(path) / "model").is_dir() else {own: Path(path) / "adapter"}
        if folders:
            names = {own: "default", Path(base).name: None}
        labels = read_labels(Path(path)) or loaded.labels
    else:
        folder, folders = lineage(path)[0], {}
        written = read_object(folder / "config.json")
        architecture = "".join(written.get("architectures") or ())
        task = next((task for end, task in HEADS.items() if architecture.endswith(end)), "trunk")
        loaded = load_base(path, task=task, dtype=dtype)
        labels = loaded.labels
        problem = written.get("problem_type") or ("regression" if len(labels or ()) == 1 else None)
    for name, folder in named(config).items():
        if name in names:
            raise ConfigError(f"--adapter {name}: is the name of what is served already")
        names[name] = f"served_{name.replace('.', '-dot-')}"
        load_adapter(loaded.model, folder, family=loaded.family, name=names[name])
        folders[name] = folder
    whole = [name for name, folder in folders.items()
             if read_object(folder / "adapter_config.json").get("modules_to_save")]
    if whole and len(folders) > 1:
        what = f"the adapter {whole[0]} holds whole modules, which others would answer with"
        raise ConfigError(f"{what}: serve it alone")
    if whole:
        names = {whole[0]: names[whole[0]]}
    loaded.model.to(device).use_kernels(config.kernels)
    loaded.model.compute_in(products)
    print(f"{path}: {loaded.accounting}")
    return loaded, names, {"labels": tuple(labels or ()), "problem": problem}

def serve(path: str, config: ServeConfig) -> int:
    """Until a signal; returns the exit code."""
    # Imported here, so that --help and a mistyped option answer at once.
    import torch

    from ftcore.data.tokenizer import Tokenizer
    from ftcore.deploy.api import Api, Served
    from ftcore.deploy.engine import Engine
    from ftcore.deploy.http import Server
    from ftcore.deploy.meters import Lines
    from ftcore.tune.adapter import base_sha256

    torch.set_num_threads(config.threads)
    loaded, names, more = opened(path, config)
    model, spec = loaded.model, loaded.model.spec
    adapters = [name for name in names.values() if name]
    engine = Engine(
        model, adapters, max_sequences=config.max_sequences, prefill_tokens=config.prefill_tokens,
        cache_tokens=config.cache_tokens, max_waiting=config.queue, threads=config.threads)
    served = Served(names, Tokenizer.load(loaded.folder), temperature=calibration(Path(path)),
                    fingerprint=fingerprint(base_sha256(model), config), **more)
    api = Api(engine, served, config)
    log = Lines(config.log, api.meters.lost)
    server = Server(api.routes, lambda: engine.is_broken, config, api.meters, log)
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    slot = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim
    slot *= (model.trunk.compute or model.trunk.embed_tokens.weight.dtype).itemsize
    print(f"memory: weights {weights / 2**20:.1f} MiB; keys and values up to"
          f" {config.cache_tokens * slot / 2**20:.1f} MiB, and as many again of finished sequences")

    def ready(port: int) -> None:
        where = f"http://{config.host}:{port}"
        print(f"serving {', '.join(names)} at {where}; stop with ctrl-c. Try:\n  {curl(where, api, config)}",
              flush=True)

    async def live() -> int:
        api.start()
        return await server.run(ready)

    code = asyncio.run(live())
    engine.stop()
    return code

def calibration(run: Path) -> float:
    """The temperature that a run's evaluation found for its classes; 1 where there is none."""
    file = run / "eval.json"
    tuned = json.loads(file.read_text("utf-8"))["tuned"] if file.is_file() else {}
    return next((m["temperature"] for m in tuned.values() if m.get("temperature")), 1.0)

def fingerprint(base: str, config: ServeConfig) -> str:
    """Hash of the base's weights and of the adapters' files."""
    from ftcore.files import sha256_file

    parts = [base, *(sha256_file(folder / "adapter_model.safetensors")
                     for folder in named(config).values())]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]

def curl(where: str, api: "Api", config: ServeConfig) -> str:
    """A line to try."""
    key = f" -H \"Authorization: Bearer $(head -1 {config.api_key_file})\"" if config.api_key_file else ""
    said = [{"role": "user", "content": "hello"}]
    served = api.served
    if api.engine.model.task == "lm" and served.tokenizer.chat_template:
        route, body = "chat/completions", {"messages": said}
    elif api.engine.model.task == "lm":
        route, body = "completions", {"prompt": "hello"}
    elif served.problem == "regression":
        route, body = "score", {"messages": [*said, {"role": "assistant", "content": "hello"}]}
    else:
        route, body = "classify" if served.labels else "embeddings", {"input": "hello"}
    return f"curl {where}/v1/{route}{key} -H 'Content-Type: application/json' -d '{json.dumps(body)}'"

def main(argv: list[str]) -> int:
    """Parse, serve, and turn what a user can mend into one message."""
    words = [*argv]
    try:
        if not words or words[0] in ("-h", "--help"):
            print(__doc__)
            return 0 if words else 2
        path = words.pop(0)
        config = options(ServeConfig, words, script="serve.py")
        check(config)
        named(config)
        return serve(path, config)
    except FtcoreError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # of the address
        print(f"error: --host {config.host} --port {config.port}: {error.strerror}", file=sys.stderr)
        return 2

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
