"""Many streams at once, some of which are left in the middle, against serve.py on this machine.

    python -m tests.bench.streams [--streams 256] [--seconds 180] [--model builtin:base]

Each client asks for a stream, reads it to its end or, one in ten, leaves after some events, and
asks again. Told at the end: requests by their end, as the clients saw them and as the server
counted them; memory of the server by minute; the gap between two events. The last line is JSON.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from urllib.request import urlopen

ROOT = Path(__file__).parents[2]

async def client(port: int, number: int, until: float, ends: Counter, gaps: list[float]) -> None:
    """One stream after the other."""
    chance = random.Random(number)
    while time.monotonic() < until:
        asked = {"messages": [{"role": "user", "content": f"wake me up at {number % 12}:30"}],
                 "max_tokens": chance.randint(20, 120), "ignore_eos": True, "stream": True,
                 "seed": number}
        body, leave = json.dumps(asked).encode(), chance.random() < 0.1
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost:{port}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        status = (await reader.readline()).split()[1:2]
        end, last, read = "broken", time.monotonic(), 0
        while line := await reader.readline():
            if not line.startswith(b"data: "):
                end = f"status {status[0].decode()}" if status != [b"200"] else end
                continue
            now, read = time.monotonic(), read + 1
            if read > 1:
                gaps.append(now - last)
            last = now
            if line == b"data: [DONE]\n":
                end = "stop"
            elif b'"error"' in line:
                end = "error"
            if leave and read == 10:
                end = "left"
                break
        ends[end] += 1
        writer.transport.abort()

def told(port: int, name: str) -> dict[str, float]:
    """Values of a metric by their labels."""
    text = urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
    lines = (line.rpartition(" ") for line in text.splitlines() if line.startswith(f"ft_{name}"))
    return {key.removeprefix(f"ft_{name}"): float(value) for key, _, value in lines}

async def measured(port: int, streams: int, seconds: float) -> dict:
    ends, gaps, held, until = Counter(), [], [], time.monotonic() + seconds
    tasks = [asyncio.create_task(client(port, i, until, ends, gaps)) for i in range(streams)]
    while time.monotonic() < until:
        await asyncio.sleep(min(30, max(0.1, until - time.monotonic())))
        memory = await asyncio.to_thread(told, port, "process_resident_bytes")
        held.append(round(memory[""] / 2**20, 1))
    await asyncio.gather(*tasks)
    await asyncio.sleep(1)  # for what was left to be counted
    ordered = sorted(gaps)
    return {"ends": dict(ends), "counted": told(port, "request_finished_total"),
            "rejected": told(port, "request_rejected_total"), "held_mib": held,
            "events": len(gaps), "gap_ms": round(1e3 * statistics.median(gaps), 1),
            "gap_p99_ms": round(1e3 * ordered[int(0.99 * len(gaps))], 1)}

def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.streams")
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--model", default="builtin:base")
    said = parser.parse_args()
    words = [said.model, "--port", "0", "--queue", str(said.streams), "--log", os.devnull]
    words += ["--max-sequences", str(said.streams), "--threads", "1"]
    server = subprocess.Popen([sys.executable, str(ROOT / "serve.py"), *words], text=True,
                              stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        line = next(line for line in iter(server.stdout.readline, "") if "serving" in line)
        port = int(line.partition("127.0.0.1:")[2].partition(";")[0])
        found = asyncio.run(measured(port, said.streams, said.seconds))
        server.send_signal(signal.SIGTERM)
        found["exit"] = server.wait(60)
    finally:
        server.kill()
    print(json.dumps({"streams": said.streams, "seconds": said.seconds, **found}))

if __name__ == "__main__":
    main()
