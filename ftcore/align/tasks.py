"""All tasks of train.py: those of tune, and those that learn from preferences."""

from collections.abc import Mapping
from functools import partial

from ftcore.align.preference import bradley_terry, dpo
from ftcore.config import Run
from ftcore.tune import task as tune
from ftcore.tune.task import TaskKind

POLICY = TaskKind("lm", tune.token_labels, "CAUSAL_LM")  # ppo.py has its loss; for the plan
PAIRED: Mapping[str, TaskKind] = {"reward": TaskKind("classify", bradley_terry, "SEQ_CLS"),
                                  "dpo": TaskKind("lm", dpo, "CAUSAL_LM")}
TASKS: Mapping[str, TaskKind] = {**tune.TASKS, **PAIRED, "ppo": POLICY, "grpo": POLICY}

def kind_of(task: str, config: Run) -> TaskKind:
    """A task; a loss of pairs with the options of the section that has the task's name."""
    kind = TASKS[task]
    options = vars(getattr(config, task)) if task in PAIRED else {}
    return kind._replace(loss=partial(kind.loss, **options)) if options else kind
