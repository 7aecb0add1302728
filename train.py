"""Fine-tune a language model: seven stages, top to bottom.

    python train.py                                     LoRA chat fine-tuning of the built-in model
    python train.py {pretrain,sft,classify} --help      every option with its unit and default
    python train.py --resume runs/NAME                  continue a run that was stopped
"""

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
    from ftcore.evaluate.evaluator import answer, evaluate_loss
    from ftcore.evaluate.report import json_line, write_predictions
    from ftcore.evaluate.suite import evaluate_splits
    from ftcore.model.hub import resolve
    from ftcore.model.load import load_model
    from ftcore.tune.artifact import save_artifact
    from ftcore.tune.checkpoint import Checkpoints
    from ftcore.tune.freeze import assert_unmoved, frozen_hashes
    from ftcore.tune.loop import Loop
    from ftcore.tune.setup import choose_trainable
    from ftcore.tune.task import TASKS

    config, kind = command.config, TASKS[command.task]
    started = time.perf_counter()

    # ---- 1 dataset preparation: files -> token ids and what is supervised ------------------------
    folder = resolve(config.model.path)
    tokenizer = Tokenizer.load(folder)
    data = prepare(config.data, tokenizer, seed=config.env.seed)
    print(data.summary())

    # ---- 2 model initialisation: config.json and safetensors -> one transformer ------------------
    loaded = load_model(
        folder,
        task=kind.model_task,
        dtype=DTYPES[config.env.precision],
        num_labels=len(data.labels) if data.labels else None,
        init=config.model.init,
        generator=generator(config.env.seed, 1),
    )
    model = loaded.model
    print(f"{folder}: {loaded.accounting}")

    # ---- 3 training environment: device, precision, plan, run folder -----------------------------
    device = resolve_device(config.env.device)
    set_threads(config.env.threads)
    model.to(device)
    parameters = choose_trainable(model, config.peft, generator(config.env.seed, 2))
    print(parameters)
    lengths = [len(document) for document in data.train.documents]
    num_steps = config.loop.num_steps(len(lengths), config.optim.batch_size)
    print(plan(model, lengths=lengths, num_steps=num_steps))
    if command.dry_run:
        return 0
    name = config.log.name or f"{command.task}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = RunFolder(command.resume or config.log.dir / name, resume=command.resume is not None)
    with folder as run:
        run.write(CONFIG_FILE, to_toml(command))
        data.write(run.path / "data")

        # ---- 4 fine-tuning: the loop ---------------------------------------------------------
        def evaluate() -> dict[str, float]:
            values = evaluate_loss(
                model,
                kind.loss,
                data.dev.documents,
                max_tokens=config.loop.micro_batch_tokens,
                device=device,
                num_bytes=data.dev.num_bytes,
            )
            return {f"eval/{name}": value for name, value in values.items()}

        tests = data.tests
        options = {"labels": data.labels, "device": device}
        is_generative = command.task == "sft"
        before = None
        if is_generative and tests and command.resume is None:
            before = evaluate_splits(
                command.task, config, model, tokenizer, tests, **options
            )
        frozen = frozen_hashes(model)
        checkpoints = Checkpoints(run.path, config.loop.keep_last)
        loop = Loop(
            model,
            kind.loss,
            data.train.documents,
            optim=config.optim,
            schedule=config.schedule,
            loop=config.loop,
            run=run,
            checkpoints=checkpoints,
            seed=config.env.seed,
            device=device,
            evaluate=evaluate if data.dev.documents else None,
        )
        if command.resume:
            loop.restore(checkpoints.latest())
        code = loop.train()
        if code:
            return code
        loop.restore_best()
        assert_unmoved(frozen, model)

        # ---- 5 evaluation: base against tuned, on rows never trained on --------------------------
        results = evaluate_splits(command.task, config, model, tokenizer, tests, **options)
        if before:
            print(f"\nbefore\n{before}")
        print(f"\nafter\n{results}" if tests else "no test file: nothing was evaluated")
        write_predictions(run.path / "predictions.jsonl", results.predictions)

        # ---- 6 deployment: what other programs load ----------------------------------------------
        artifact = save_artifact(
            loaded, tokenizer, run.path, labels=data.labels, base=config.model.path, kind=kind
        )

        # ---- 7 monitoring: where it is written down, and what to do next -------------------------
        summary = {
            "run": str(run.path),
            "task": command.task,
            "steps": loop.progress.step,
            "seconds": round(time.perf_counter() - started, 1),
            "before": before.metrics if before else None,
            "after": results.metrics,
        }
        run.dump("eval.json", summary)
        shown = [chat for split in list(tests.values())[-2:-1] for chat in split.chats]
        shown = shown[: config.eval.samples]
        if shown:
            texts = answer(
                model,
                tokenizer,
                [chat.messages[:-1] for chat in shown],
                max_new_tokens=config.eval.max_new_tokens,
            )
            for chat, text in zip(shown, texts, strict=True):
                print(f"\n> {chat.messages[-2]['content']}\n{text}")
        print(f"\nsaved {artifact}; curves: tensorboard --logdir {run.path / 'tensorboard'}")
        print(f"next: python eval.py {run.path} --data.test FILE")
        print(json_line(summary))
    return 0


def main(argv: list[str]) -> int:
    """Parse, run, and turn what a user can mend into one message."""
    try:
        return run(parse(argv))
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    except FtcoreError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
