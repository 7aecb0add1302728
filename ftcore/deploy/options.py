"""What the user says to serve.py, as `ftcore/config.py` has it for the other scripts."""

from pathlib import Path
from typing import Annotated, Literal

from ftcore.config import Count, Limit, NotNegative, Positive, Section

class ServeConfig(Section):
    """What is served, to whom, within which limits."""
    host: str = "127.0.0.1"  # address; others than this machine's own need keys
    port: Annotated[int, Limit("in [0, 65535]", lambda n: 0 <= n < 2**16)] = 8000  # 0: any free one
    api_key_file: Path | None = None  # a key a line; None: whoever reaches the port may ask
    insecure: bool = False  # no keys, and every Host, at any address
    public_metrics: bool = False  # /metrics needs no key
    device: str = "cpu"  # cpu, cuda or cuda:N
    precision: Literal["bf16", "bf16-autocast", "fp16", "fp32"] = "bf16"  # autocast: fp32 weights
    kernels: Literal["auto", "eager", "triton"] = "auto"  # auto: Triton on a GPU
    threads: Count = 2  # CPU cores of the engine
    max_sequences: Count = 64  # that are answered at once
    prefill_tokens: Count = 512  # of prompts in one step
    cache_tokens: Count = 65536  # slots of keys and values
    queue: Count = 128  # sequences that may wait
    connections: Count = 1024  # at once
    head_seconds: Positive = 5.0  # from the connection to the end of the head
    body_seconds: Positive = 10.0  # from there to the end of the body
    queue_seconds: Positive = 30.0  # until the first token
    request_seconds: Positive = 300.0  # of a request in all
    stall_seconds: Positive = 30.0  # in which a client reads nothing, or not the rest
    drain_seconds: NotNegative = 30.0  # for running requests, after the first signal to stop
    body_kib: Count = 1024  # KiB of a body
    send_buffer_kib: Count = 256  # KiB that a client has not read
    choices: Count = 8  # of one prompt (n)
    prompts: Count = 16  # of one request, times its choices
    messages: Count = 512  # of one conversation
    inputs: Count = 256  # texts of one request for embeddings or classes
    stop_strings: Count = 4  # strings that end an answer, of one request
    bias_entries: Count = 300  # of logit_bias
    log: Path | None = None  # file of a JSON line a request; None: standard error
    log_mib: Count = 64  # MiB of it, after which it is put aside as FILE.TIME and begun anew
    log_texts: bool = False  # texts too, without e-mail addresses and numbers of phones and cards
    window: Count = 500  # requests that are compared with those of the reference
