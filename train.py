"""Fine-tune a language model: seven stages, top to bottom.

    python train.py                                     LoRA chat fine-tuning of the built-in model
    python train.py TASK --help                         every option with its unit and default
    python train.py TASK ... --dry-run                  what the run will do and take
    python train.py TASK ... --verify                   what must not change its result, tried
    python train.py --help                              the tasks
    python train.py --resume runs/NAME                  continue a run that was stopped

Exit codes: 0 done; 2 what was asked must be mended; 3 a file of the run cannot be written or
trusted; 130 and 143 stopped by a signal, after saving.
"""

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING
from ftcore.cli import CONFIG_FILE, Command, parse, to_toml
from ftcore.config import PpoRun
from ftcore.errors import CheckpointError, ConfigError, DataError, FtcoreError

if TYPE_CHECKING:
    from ftcore.data.store import Prepared
    from ftcore.data.tokenizer import Tokenizer
    from ftcore.env.run import RunFolder
    from ftcore.model.load import LoadedModel
    from ftcore.model.transformer import ModelSpec
    from ftcore.tune.loop import Loop

def run(command: Command) -> int:
    """Stages 1 to 3: all that can refuse the command, before anything but the cache is written;
    returns the exit code."""
    # Imported here, as in `tune`, so that --help and a mistyped option answer at once.
    import torch
    from ftcore.align.ppo import PpoLoop
    from ftcore.align.preference import kind_of
    from ftcore.align.rollout import Actor
    from ftcore.data.prepare import prepared
    from ftcore.data.tokenizer import Tokenizer
    from ftcore.env import compute
    from ftcore.env.plan import planned
    from ftcore.env.run import RunFolder
    from ftcore.files import write_file
    from ftcore.hub import lineage
    from ftcore.tune.adapter import load_base, named_parts
    from ftcore.tune.loop import Loop
    from ftcore.tune.task import choose_trainable
    from ftcore.verify import verify
    from kernels.memory import reuse_across_steps

    config, seed = command.config, command.config.env.seed
    kind = kind_of(command.task, config)

    # ---- 1 dataset preparation: files -> token ids and what is supervised ------------------------
    if not config.data.train:
        raise ConfigError("nothing to train on: name a file with --data.train FILE")
    if config.model.init == "random" and config.peft.method == "lora":
        raise ConfigError("peft.method = 'lora' over random weights, which are not kept: use full")
    tokenizer = Tokenizer.load(lineage(config.model.path)[0])
    data, origin = prepared(config.data, tokenizer, seed=seed)
    data.labels = data.labels or config.labels
    print(f"{origin}\n{data.summary()}")

    # ---- 2 model initialisation: config.json and safetensors -> one transformer ------------------
    precision = "fp32" if command.only == "--verify" else config.env.precision
    weights, products = compute.PRECISIONS[precision]
    loaded = load_base(config.model.path, task=kind.model_task, dtype=weights, labels=data.labels,
                       init=config.model.init, generator=compute.generator(seed, 1))
    model = loaded.model
    print(f"\n{config.model.path}: {loaded.accounting}")

    # ---- 3 environment: device, what is trained, the plan, the run folder ------------------------
    torch.set_num_threads(config.env.threads)
    reuse_across_steps()
    compute.use_deterministic(config.env.deterministic)
    model.to(compute.resolve_device(config.env.device, config.env.kernels))
    new = loaded.accounting.new if config.model.init == "pretrained" else ()
    print(f"\n{choose_trainable(model, config.peft, compute.generator(seed, 2), new=new)}")
    model.use_kernels(config.env.kernels)
    model.compute_in(products)
    if config.peft.method == "lora":
        named_parts(model, loaded.family)  # else the adapter could not be saved in the end
    check_lengths(model.spec, data, command.task)
    model.trunk.recompute = config.env.recompute
    loss = kind.loss if command.only == "--dry-run" else None
    memory_bytes, plan = planned(config, model, data.train.documents, loss)
    print(f"\n{plan}")
    if command.only == "--verify":
        print(f"\n{verify(config, kind, loaded, tokenizer, data)}")
    if command.only:
        return 0
    make = partial(Loop, model, kind.loss)
    if isinstance(config, PpoRun):  # it makes the rows that it trains on
        make = partial(PpoLoop, model, kind.loss, actor=Actor(model, tokenizer, config, data))
    name = config.log.name or f"{command.task}-{time.strftime('%Y%m%d-%H%M%S')}"
    path, resumes = command.resume or config.log.dir / name, command.resume is not None
    with RunFolder(path, resume=resumes) as run_folder:
        if not resumes:  # a resumed run keeps the origins that its file names
            write_file(path / CONFIG_FILE, to_toml(command))
        data.write(path / "data", resumes=resumes)
        run_folder.dump("plan.json", memory_bytes)
        print(f"\nrun folder: {path}")
        return tune(command, run_folder, data, loaded, tokenizer, make=make)

def tune(command: Command, run: "RunFolder", data: "Prepared", loaded: "LoadedModel",
         tokenizer: "Tokenizer", *, make: "Callable[..., Loop]") -> int:
    """Stages 4 to 7, by the loop that `make` makes, in a run folder that this process holds;
    returns the exit code."""
    from ftcore.align.preference import refer
    from ftcore.deploy.answers import REFERENCE
    from ftcore.evaluate import report
    from ftcore.monitor.journal import reference
    from ftcore.tune.adapter import save_artifact
    from ftcore.tune.freeze import assert_unmoved, frozen_hashes

    config, model, path = command.config, loaded.model, run.path
    started = time.perf_counter()

    # ---- 4 fine-tuning: the loop, and what the base model could do before it ---------------------
    if command.task == "dpo":
        refer(model, data, config)
    suite = report.Suite(command.task, config, tokenizer, data.labels)
    loop = make(data.train.documents, config, run,
                evaluate=(lambda: suite.dev(model, data.dev)) if data.dev.documents else None)
    base, base_file = None, path / "base.json"
    if any(split.chats for split in data.tests.values()):
        if not base_file.is_file():
            before = suite.tests(model, data.tests)
            run.dump(base_file.name, before.metrics)
            report.write_predictions(path / "base-predictions.jsonl", before.predictions)
        base = json.loads(base_file.read_text("utf-8"))
    run.dump("groups.json", loop.optimizer.groups())
    frozen = frozen_hashes(model)
    if command.resume:
        loop.restore(loop.checkpoints.latest())
    if code := loop.train():
        return code
    loop.restore_best()
    assert_unmoved(frozen, model)

    # ---- 5 evaluation: base against tuned, on rows never trained on ------------------------------
    results = suite.tests(model, data.tests)
    if data.tests:
        print(f"\n{results.against(base or {})}")
        report.note_opening(path, config.data.test, results.metrics)
    if results.predictions:
        report.write_predictions(path / "predictions.jsonl", results.predictions)
    if gap := suite.gap(model, data.train.documents, data.dev):
        print(f"\n{gap}")

    # ---- 6 deployment: what other programs load --------------------------------------------------
    artifact = save_artifact(loaded, tokenizer, path, config)

    # ---- 7 monitoring: what requests should be like, and where all is written down ---------------
    if records := reference(model, data.dev, suite):
        report.write_predictions(path / REFERENCE, records)
    seconds = round(time.perf_counter() - started, 1)
    summary = {"run": str(path), "task": command.task, "steps": loop.progress.step, "base": base}
    summary |= {"seconds": seconds, "tuned": results.metrics, "intervals": results.intervals}
    run.dump("eval.json", summary)
    if config.peft.method == "lora":
        proof = report.certify(model, next(iter(data.tests.values()), data.dev), suite)
        print(f"merged: {report.json_line(proof)} in {run.dump('certificate.json', proof)}")
    print(f"saved:  {artifact}\npage:   {report.write_page(path)}")
    print(f"curves: tensorboard --logdir {path / 'tensorboard'}")
    print(f"next:   python eval.py {path} --data.test FILE")
    print(report.json_line(summary))
    return 0

def check_lengths(spec: "ModelSpec", data: "Prepared", task: str) -> None:
    """Raise DataError where a document is longer than the model's learned positions reach."""
    from ftcore.data.pack import apart, is_pair

    for name, split in data.splits() if spec.position == "learned" else ():
        longest = max(apart(split.documents), key=len)
        if len(longest) > (most := spec.max_positions):
            side = "cut_left (or drop)" if is_pair(split.documents[0]) else "cut_right (or drop)"
            side = "drop" if task == "tag" else side
            what = f"{name}: row {longest.row_id} has {len(longest)} tokens, the model takes {most}"
            raise DataError(f"{what}: --data.max-length {most} --data.over-length {side}")

def main(argv: list[str]) -> int:
    """Parse, run, and turn what a user can mend into one message."""
    try:
        return run(parse(argv))
    except FtcoreError as error:
        print(f"error: {error}", file=sys.stderr)
        return 3 if isinstance(error, CheckpointError) else 2

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
