"""The tasks of train.py: those of tune/task.py, preference and RL."""

from collections.abc import Mapping

from ftcore.tune import task
from ftcore.tune.task import TaskKind

POLICY = TaskKind("lm", task.token_labels, "CAUSAL_LM")  # the loss is PpoLoop's; this plans memory
TASKS: Mapping[str, TaskKind] = {**task.TASKS, "ppo": POLICY, "grpo": POLICY}
