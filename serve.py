"""Serve a run, a bundle or a model folder over HTTP.

    python serve.py runs/NAME       what it trained
    python serve.py MODEL           a folder or hub id; a link, followed when it changes
    python serve.py MODEL --adapter NAME=DIR   LoRA on it, which requests name as their model
    python serve.py bundle runs/NAME DIR   a finished run as a folder to give away
    python serve.py merge runs/NAME DIR    its model alone, as transformers reads it
    python serve.py push DIR OWNER/NAME    either of them to the hub
    python serve.py MODEL --help    every option and limit

Generators answer /v1/chat/completions, /v1/completions and /v1/embeddings, encoders the last one,
classifiers /v1/classify, reward models /v1/score; ftcore/deploy/fields.toml lists all fields.

Exit codes: 0 stopped by a signal, once running requests had ended; 1 the engine is broken; 2 what
was asked must be mended; 130 a second signal.
"""

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any
import tyro
from ftcore.cli import CONFIG_FILE, checked, parse
from ftcore.config import ServeConfig
from ftcore.errors import ConfigError, FtcoreError

if TYPE_CHECKING:
    from ftcore.deploy.api import Api
    from ftcore.deploy.http import Meters, Server
    from ftcore.model.load import LoadedModel

LOCAL = ("127.0.0.1", "localhost", "::1")
HEADS = {"ForCausalLM": "lm", "LMHeadModel": "lm", "ForSequenceClassification": "classify"}

def check_access(config: ServeConfig) -> None:
    """Refuse what would be open to others unawares. ConfigError; OSError: no such file of keys."""
    if config.api_key_file and not config.api_key_file.read_bytes().split():
        raise ConfigError(f"--api-key-file {config.api_key_file}: holds no key, a line each")
    if not (config.api_key_file or config.host in LOCAL or config.insecure):
        what = f"--host {config.host}: other machines could ask without a key"
        raise ConfigError(f"{what}: give --api-key-file FILE, or --insecure")

def opened(path: str, name: str, config: ServeConfig) -> tuple["LoadedModel", dict[str, Any]]:
    """The model by that name, and what else is known of it, as fields of `Served`."""
    from ftcore.align.preference import TASKS
    from ftcore.deploy.bundle import ABOUT, open_bundle, temperature_of
    from ftcore.env import compute
    from ftcore.env.run import METRICS, read_metrics
    from ftcore.files import sha256_file
    from ftcore.hub import lineage
    from ftcore.model.load import read_object
    from ftcore.tune import adapter

    dtype, products = compute.PRECISIONS[config.precision]
    device = compute.resolve_device(config.device, config.kernels)
    run, temperature = Path(path), None
    if (run / CONFIG_FILE).is_file():
        command = parse(["--resume", path])
        loaded = adapter.load_artifact(run, kind=TASKS[command.task], dtype=dtype)
        problem, temperature = command.config.problem, temperature_of(read_metrics(run / METRICS))
    elif (run / ABOUT).is_file():  # a bundle, whose precision is its own
        loaded, _, about = open_bundle(run)
        products = compute.PRECISIONS[about["precision"]][1]
        temperature, problem = about["temperature"], about["problem"]
    else:
        folder, _ = lineage(path)
        written = read_object(folder / "config.json")
        architecture = "".join(written.get("architectures") or ())
        task = next((task for end, task in HEADS.items() if architecture.endswith(end)), "trunk")
        loaded = adapter.load_base(path, task=task, dtype=dtype)
        problem = written.get("problem_type")
        problem = problem or ("regression" if len(loaded.labels or ()) == 1 else None)
    parts = [adapter.base_sha256(loaded.model)]
    if not (run / "model").is_dir() and (run / "adapter").is_dir():
        parts.append(sha256_file(run / "adapter" / adapter.WEIGHTS))
    loaded.model.to(device).use_kernels(config.kernels)
    loaded.model.compute_in(products)
    print(f"{path}: {loaded.accounting}")
    names = name, run.resolve().name
    return loaded, {"version": names[1], "problem": problem, "temperature": temperature or 1.0,
                    "written": [file.stat().st_mtime for file in run.rglob("*.safetensors")],
                    "labels": loaded.labels or (), "fingerprint": adapter.fingerprint(*parts),
                    "adapters": adapter.share_base(loaded, config.adapter, names, parts)}

def made(path: str, name: str, config: ServeConfig, meters: "Meters") -> "Api":
    """The routes over an engine of its own, asked for by that name."""
    # Imported here, so that --help and a mistyped option answer at once.
    import torch
    from ftcore.data.tokenizer import Tokenizer
    from ftcore.deploy.answers import REFERENCE, Served
    from ftcore.deploy.api import Api
    from ftcore.deploy.engine import Engine
    from ftcore.env.run import read_metrics
    from ftcore.monitor.drift import Watch
    from ftcore.monitor.journal import LIVE, Journal
    from kernels.memory import held_bytes

    # cost: a pool of this thread's beside the engine's would slow each of its operations down
    torch.set_num_threads(1)
    loaded, about = opened(path, name, config)
    model, spec = loaded.model, loaded.model.spec
    engine = Engine(model, max_waiting=config.queue, max_sequences=config.max_sequences,
                    prefill_tokens=config.prefill_tokens, cache_tokens=config.cache_tokens,
                    prefix_tokens=config.prefix_tokens, threads=config.threads)
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    slot = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim
    slot *= (model.trunk.compute or model.trunk.embed_tokens.weight.dtype).itemsize / 2**20
    print(f"memory: {held_bytes() / 2**20:.0f} MiB of this process, weights {weights / 2**20:.1f}"
          f" MiB among it; keys and values will take up to {config.cache_tokens * slot:.1f} MiB,"
          f" those kept of ended sequences {config.prefix_tokens * slot:.1f} MiB", flush=True)
    served = Served(name=name, tokenizer=Tokenizer.load(loaded.folder), **about)
    reference = read_metrics(Path(path) / REFERENCE)
    return Api(engine, served, config, meters, Journal(served.version, LIVE), Watch(reference))

async def follow(link: Path, now: str, server: "Server") -> None:
    """Let what a link names from `now` on answer; requests that have begun end where they did."""
    from ftcore.deploy.http import TICK

    while True:
        await asyncio.sleep(TICK)
        old, was, now = server.api, now, os.path.realpath(link)
        if now == was:
            continue
        try:
            api = await asyncio.to_thread(made, now, old.served.name, old.options, old.meters)
        except Exception as error:  # whatever damaged files raise, or memory that is short
            print(f"{old.served.version} goes on to answer: {now}: {error!r}", flush=True)
            continue
        if os.path.realpath(link) == now:
            api.start()
            begun, server.api = {*server.open}, api
            while begun & server.open:
                await asyncio.sleep(TICK)
            await asyncio.to_thread(old.engine.stop)
            old.routes.clear()  # they name the api that names them, and so its model
            print(f"{api.served.version} answers instead of {old.served.version}", flush=True)

def serve(path: str, config: ServeConfig) -> int:
    """Until a signal comes or the engine is broken; returns the exit code."""
    from ftcore.deploy.http import Meters, Server

    link, now = Path(path).absolute(), os.path.realpath(path)  # which may change while it is read
    server = Server(made(now if link.exists() else path, link.name, config, Meters()))

    def ready(port: int) -> None:
        told = command_to_try(where := f"http://{config.host}:{port}", server.api)
        names = " ".join([link.name, *server.api.served.adapters])
        print(f"serving {names} at {where}; stop it with ctrl-c. Try:\n  {told}", flush=True)

    async def live() -> int:
        server.api.start()
        follower = asyncio.create_task(follow(link, now, server))
        try:
            return await server.run(ready)
        finally:
            follower.cancel()
            await asyncio.to_thread(server.api.engine.stop)

    return asyncio.run(live())

def command_to_try(where: str, api: "Api") -> str:
    served, file = api.served, api.options.api_key_file
    key = f' -H "Authorization: Bearer $(head -n 1 {file})"' if file else ""
    asked = [{"role": "user", "content": "hello"}]
    route = "classify" if api.model.task == "classify" else "embeddings"
    body: dict = {"input": "hello"}
    if api.model.task == "lm" and served.tokenizer.chat_template is None:
        route, body = "completions", {"prompt": "hello"}
    elif api.model.task == "lm":
        route, body = "chat/completions", {"messages": asked}
    elif served.problem == "regression":
        route, body = "score", {"messages": [*asked, {"role": "assistant", "content": "hello"}]}
    return (f"curl {where}/v1/{route}{key} -H 'Content-Type: application/json'"
            f" -d '{json.dumps(body)}'")

def main(argv: list[str]) -> int:
    """Parse, serve, and turn what a user can mend into one message."""
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if argv else 2
    try:
        if argv[0] in ("bundle", "merge", "push"):
            from ftcore.deploy.bundle import give_away

            print(give_away(*argv))
            return 0
        config = checked(tyro.cli(ServeConfig, args=argv[1:], prog="serve.py MODEL"))
        check_access(config)
        return serve(argv[0], config)
    except (FtcoreError, OSError) as error:
        mend = "; choose another --host, --port or file" if isinstance(error, OSError) else ""
        print(f"error: {error}{mend}", file=sys.stderr)
        return 2

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
