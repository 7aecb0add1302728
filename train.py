"""Fine-tune a language model: seven stages, top to bottom.

    python train.py                                     LoRA chat fine-tuning of the built-in model
    python train.py {pretrain,sft,classify} --help      every option with its unit and default
    python train.py --resume runs/NAME                  continue a run that was stopped

Exit codes: 0 done; 2 something to mend in what was asked; 3 a file of the run cannot be written or
trusted; 4 no checkpoint could be saved; 130, 143 stopped by a signal, to be resumed.
"""

import json
import sys
import time

from ftcore.cli import CONFIG_FILE, Command, parse, to_toml
from ftcore.errors import CheckpointError, FtcoreError


def run(command: Command) -> int:
    """Carry out a command; returns the exit code."""
    # Imported here, so that --help and a mistyped option answer at once.
    from ftcore.data.prepare import prepare
    from ftcore.data.tokenizer import Tokenizer
    from ftcore.env.device import DTYPES, resolve_device, set_threads
    from ftcore.env.plan import plan
    from ftcore.env.run import RunFolder
    from ftcore.env.seed import generator
    from ftcore.evaluate.report import json_line, write_predictions
    from ftcore.evaluate.suite import Suite
    from ftcore.model.hub import resolve
    from ftcore.model.load import load_model
    from ftcore.tune.artifact import save_artifact
    from ftcore.tune.loop import Loop
    from ftcore.tune.setup import choose_trainable
    from ftcore.tune.task import TASKS

    config, kind, seed = command.config, TASKS[command.task], command.config.env.seed
    started = time.perf_counter()

    # ---- 1 dataset preparation: files -> token ids and what is supervised ------------------------
    folder = resolve(config.model.path)
    tokenizer = Tokenizer.load(folder)
    data = prepare(config.data, tokenizer, seed=seed)
    print(data.summary())

    # ---- 2 model initialisation: config.json and safetensors -> one transformer ------------------
    loaded = load_model(
        folder,
        task=kind.model_task,
        dtype=DTYPES[config.env.precision],
        num_labels=len(data.labels) if data.labels else None,
        init=config.model.init,
        generator=generator(seed, 1),
    )
    print(f"{folder}: {loaded.accounting}")

    # ---- 3 training environment: device, plan, run folder ----------------------------------------
    set_threads(config.env.threads)
    device = resolve_device(config.env.device)
    model = loaded.model.to(device)
    print(choose_trainable(model, config.peft, generator(seed, 2)))
    print(plan(model, data.train.documents, config))
    if command.dry_run:
        return 0
    name = config.log.name or f"{command.task}-{time.strftime('%Y%m%d-%H%M%S')}"
    is_new = command.resume is None
    with RunFolder(command.resume or config.log.dir / name, resume=not is_new) as run:
        run.write(CONFIG_FILE, to_toml(command))
        data.write(run.path / "data")
