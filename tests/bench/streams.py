"""Many streams at once, some of which are left in the middle, against serve.py on this machine.

    python -m tests.bench.streams [--streams 256] [--seconds 180] [--model builtin:base] [--mixed]

Each client asks for a stream, reads it to its end or, one in ten, leaves after some events, and
asks again. Told at the end: requests by their end, as the clients saw them and as the server
counted them; memory of the server by half minutes; the gap between two events; the time of an
engine's step, as its mean over the last half, beside that of an engine with the same sequences and
neither clients nor HTTP, before and after. The last line is JSON.

--mixed: by turns they ask the base and two adapters of rank 16 on all its layers, which the engine
without clients has too; and one client in eight reads a line, pauses, and reads on. Of what these
have read every token is counted, and an answer that lacks one ends as "slow short".

    python -m tests.bench.streams --monitoring --model RUN

What monitoring costs: a step of a server of a chat run which in every other second notes nothing of
any text: not where its vector points, nor log-probabilities that are formed for it alone, nor a
line of the journal. Those of tokens that were drawn by the model's own p are read off in each.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen
import numpy as np
import torch
from ftcore.config import PeftConfig
from ftcore.data.chat import encode_prompt
from ftcore.data.tokenizer import Tokenizer
from ftcore.deploy.engine import Engine, Finish, Job, Said
from ftcore.hub import lineage
from ftcore.model.load import load_model
from ftcore.tune.adapter import load_base, save_adapter, share_base
from ftcore.tune.lora import apply_lora, lora_layers
from kernels.sampling import Sampling

ROOT = Path(__file__).parents[2]
ADAPTERS, PAUSE = ("one", "two"), 0.05  # the latter in seconds
# A server that notes nothing in every other second, and tells what its steps took in either.
TURNING = """
import json, sys, threading, time
from pathlib import Path
import serve
from ftcore.deploy import answers, api, engine
from ftcore.monitor import journal
from kernels import sampling

is_noting, apis, found, since = [False], [], [], (0.0, 0.0, 0)

def unless(function, quiet):
    return lambda *args: function(*args) if is_noting[0] else quiet(*args)

def figures(tokens, reason, told=answers.answer_figures):
    # those of the other seconds have no log-probability
    return told([token._replace(logprob=token.logprob or 0.0) for token in tokens], reason)

sampling.with_logprobs = unless(sampling.with_logprobs, lambda logits_BV, ids_B, counts: {})
api.Api._note = unless(api.Api._note, lambda self, x, jobs, given:
                       x.told.update(rows=[{} for _ in jobs]))
answers.answer_figures = unless(figures, lambda tokens, reason: {})
engine.heads.sketched = unless(engine.heads.sketched, lambda x_BC: [""] * len(x_BC))
journal.Journal.take = unless(journal.Journal.take, lambda self, line: None)
start, turn = api.Api.start, engine.Engine.turn
api.Api.start = lambda self: (apis.append(self), start(self))[1]

def counted(self):
    global since
    now = time.monotonic(), time.process_time(), self.num_steps
    if (int(now[0]) % 2 == 1) != is_noting[0]:
        if len(self.running) > STREAMS * 0.9:
            found.append((is_noting[0], *(b - a for a, b in zip(since, now))))
        is_noting[0], since = not is_noting[0], now
    return turn(self)

engine.Engine.turn = counted

def tell(file, seconds):
    time.sleep(seconds)
    start, records = time.thread_time(), apis[0].journal.records
    apis[0].watch.look(records)
    look = len(records), time.thread_time() - start
    Path(file).write_text(json.dumps({"found": found[5:], "look": look}))

threading.Thread(target=tell, args=(sys.argv[1], float(sys.argv[2])), daemon=True).start()
sys.exit(serve.main(sys.argv[3:]))
"""

async def client(port: int, number: int, until: float, ends: Counter, gaps: list[float],
                 names: Sequence[str]) -> None:
    """One stream after the other, of one of the models that `names` are, if there are any."""
    chance, is_slow = random.Random(number), bool(names) and number % 8 == 7
    more = {"model": names[number % len(names)], "logprobs": is_slow} if names else {}
    while time.monotonic() < until:
        asked = {"messages": [{"role": "user", "content": f"wake me up at {number % 12}:30"}],
                 "max_tokens": chance.randint(20, 120), "ignore_eos": True, "stream": True,
                 "seed": number} | more
        body, leave = json.dumps(asked).encode(), chance.random() < 0.1
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**14)
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost:{port}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        status = (await reader.readline()).split()[1:2]
        end, last, read, tokens = "broken", time.monotonic(), 0, 0
        while line := await reader.readline():
            if not line.startswith(b"data: "):
                end = f"status {status[0].decode()}" if status != [b"200"] else end
                continue
            now, read = time.monotonic(), read + 1
            if is_slow:
                await asyncio.sleep(PAUSE)
                tokens += line.count(b'"token"') if b'"top_logprobs"' in line else 0
            elif read > 1:
                gaps.append(now - last)
            last = now
            if line == b"data: [DONE]\n":
                end = "short" if is_slow and tokens < asked["max_tokens"] else "stop"
            elif b'"error"' in line:
                end = "error"
            if leave and read == 10:
                end = "left"
                break
        ends["slow " * is_slow + end] += 1
        writer.transport.abort()

def told(port: int, name: str) -> dict[str, float]:
    """Values of a metric by their labels."""
    text = urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
    lines = (line.rpartition(" ") for line in text.splitlines() if line.startswith(f"ft_{name}"))
    return {key.removeprefix(f"ft_{name}"): float(value) for key, _, value in lines}

async def measured(port: int, streams: int, seconds: float, names: Sequence[str]) -> dict:
    ends, gaps, held, until = Counter(), [], [], time.monotonic() + seconds
    steps: list[tuple[float, float]] = []
    tasks = [asyncio.create_task(client(port, i, until, ends, gaps, names))
             for i in range(streams)]
    while time.monotonic() < until:
        await asyncio.sleep(min(seconds / 6, max(0.1, until - time.monotonic())))
        memory = await asyncio.to_thread(told, port, "process_resident_bytes")
        held.append(round(memory[""] / 2**20, 1))
        count = await asyncio.to_thread(told, port, "engine_steps_total")
        steps.append((time.monotonic(), count[""]))
    (t0, n0), (t1, n1) = steps[2], steps[5]
    await asyncio.gather(*tasks)
    await asyncio.sleep(1)  # for what was left to be counted
    ordered = sorted(gaps)
    return {"ends": dict(ends), "counted": told(port, "request_finished_total"),
            "rejected": told(port, "request_rejected_total"), "held_mib": held,
            "events": len(gaps), "step_ms": round(1e3 * (t1 - t0) / (n1 - n0), 1),
            "gap_ms": round(1e3 * statistics.median(gaps), 1),
            "gap_p99_ms": round(1e3 * ordered[int(0.99 * len(gaps))], 1)}

async def asked(port: int, streams: int, file: Path) -> None:
    """Ask until the server has written a file."""
    endless = [asyncio.create_task(client(port, i, float("inf"), Counter(), [], ()))
               for i in range(streams)]
    while not file.exists():
        await asyncio.sleep(1)
    for task in endless:
        task.cancel()
    await asyncio.gather(*endless, return_exceptions=True)

def cost(said: argparse.Namespace) -> dict:
    """Milliseconds of a step while nothing is noted and while all is, on the clock and of all
    cores, with an interval of the latter's ratio over the seconds; and, of a look at what was
    noted, its records and the seconds of a core, in which its bounds are drawn."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "found.json")
        source = TURNING.replace("STREAMS", str(said.streams))
        with served(said, ["-c", source, str(file), str(said.seconds)]) as (_, port):
            asyncio.run(asked(port, said.streams, file))
        told = json.loads(file.read_text())
    each = [np.array([row[1:] for row in told["found"] if row[0] == way]) for way in (False, True)]

    def per_step(rows: np.ndarray) -> np.ndarray:
        return 1e3 * rows[:, :2].sum(0) / rows[:, 2].sum()

    random = np.random.default_rng(0)
    draws = [[per_step(random.choice(rows, len(rows))) for rows in each] for _ in range(2000)]
    quiet, noting = map(per_step, each)
    return {"seconds": [len(rows) for rows in each], "step_ms": [quiet.tolist(), noting.tolist()],
            "ratio": (noting / quiet).tolist(), "look": told["look"],
            "interval": np.quantile([(b / a)[1] for a, b in draws], [0.025, 0.975]).tolist()}

@contextmanager
def served(said: argparse.Namespace, script: Sequence[str],
           more: Sequence[str] = ()) -> Iterator[tuple[subprocess.Popen, int]]:
    """A server and its port."""
    words = [said.model, "--port", "0", "--queue", str(said.streams), "--log", os.devnull]
    words += ["--max-sequences", str(said.streams), "--threads", "1", *more]
    server = subprocess.Popen([sys.executable, *script, *words], text=True, stdout=subprocess.PIPE,
                              env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        line = next(line for line in iter(server.stdout.readline, "") if "serving" in line)
        yield server, int(line.partition("127.0.0.1:")[2].partition(";")[0])
    finally:
        server.kill()
        server.wait()

def adapters_of(model: str, folder: Path) -> list[str]:
    """Words for serve.py: two adapters of random values."""
    words = []
    for number, name in enumerate(ADAPTERS):
        loaded, generator = load_base(model, task="lm", dtype=torch.bfloat16), torch.Generator()
        apply_lora(loaded.model, PeftConfig(rank=16), generator=generator.manual_seed(number))
        for layer in lora_layers(loaded.model).values():
            torch.nn.init.normal_(layer.lora_b, std=0.01, generator=generator)
        save_adapter(loaded.model, folder / name, family=loaded.family, base_path=model)
        words += ["--adapter", f"{name}={folder / name}"]
    return words

def bare(model: str, streams: int, seconds: float, words: Sequence[str]) -> float:
    """Milliseconds of a step of an engine with as many sequences all the time, in a process of its
    own; one in ten is cancelled after ten tokens."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(steps_of, model, streams, seconds, words).result()

def steps_of(model: str, streams: int, seconds: float, words: Sequence[str]) -> float:
    torch.set_num_threads(1)
    chance, loaded = random.Random(0), load_model(
        lineage(model)[0], task="lm", dtype=torch.bfloat16)
    tokenizer = Tokenizer.load(loaded.folder)
    names = None, *share_base(loaded, words[1::2], (), ())
    engine = Engine(loaded.model, max_sequences=streams, max_waiting=streams, threads=1)
    marks: list[tuple[float, int]] = []

    def ask(number: int) -> None:
        turns = [{"role": "user", "content": f"wake me up at {number % 12}:30"}]
        sampling = Sampling(chance.randint(20, 120), seed=number, num_top=0)
        ids, name = encode_prompt(turns, tokenizer).tolist(), names[number % len(names)]
        engine.submit(Job(ids, sampling, adapter=name))

    def deliver(said: Said) -> None:
        marks.append((time.monotonic(), engine.num_steps))
        for job, word in () if engine.is_stopping else said:
            if isinstance(word, Finish):
                ask(chance.randrange(streams))
            elif len(job.answer) == 10 and chance.random() < 0.1:
                engine.cancel(job)

    for number in range(streams):
        ask(number)
    engine.start(deliver)
    time.sleep(seconds)
    (t0, n0), (t1, n1) = marks[len(marks) // 3], marks[-1]
    engine.stop()
    return 1e3 * (t1 - t0) / (n1 - n0)

def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.streams")
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--model", default="builtin:base")
    parser.add_argument("--mixed", action="store_true", help="adapters, and slow readers")
    parser.add_argument("--monitoring", action="store_true", help="what it costs")
    said = parser.parse_args()
    if said.monitoring:
        print(json.dumps(cost(said)))
        return
    with tempfile.TemporaryDirectory() as folder:
        adapters = adapters_of(said.model, Path(folder)) if said.mixed else []
        found = tried(said, adapters)
    print(json.dumps({"streams": said.streams, "seconds": said.seconds, **found}))

def tried(said: argparse.Namespace, adapters: Sequence[str]) -> dict:
    """What the head of this file says."""
    alone = [bare(said.model, said.streams, said.seconds / 9, adapters)]
    with served(said, [str(ROOT / "serve.py")], adapters) as (server, port):
        names = [Path(said.model).name, *ADAPTERS] if adapters else []
        found = asyncio.run(measured(port, said.streams, said.seconds, names))
        server.send_signal(signal.SIGTERM)
        found["exit"] = server.wait(60)
    alone.append(bare(said.model, said.streams, said.seconds / 9, adapters))
    return found | {"step_ms_without_http": [round(each, 1) for each in alone]}

if __name__ == "__main__":
    main()
