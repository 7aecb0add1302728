"""Named recipes: flags that are placed before the user's own, so that the last one wins.

Each preset belongs to one task; what it was measured at stands in RECORDS.md.
"""

PRESETS: dict[str, dict[str, dict[str, dict[str, object]]]] = {
    "pretrain": {
        # The built-in base model, from random weights, on the corpus of tests/bench/base.
        "base": {
            "model": {"path": "builtin:base", "init": "random"},
            "optim": {"lr": 2e-3, "batch_size": 32, "weight_decay": 0.1},
            "schedule": {"shape": "cosine", "warmup": 0.02, "final": 0.02},
            "loop": {"eval_every": 500, "save_every": 250},
        },
        # On from the weights of the built-in base, or of another small decoder.
        "continue": {"optim": {"lr": 1e-3}},
    },
    # A small encoder such as MiniLM; the epochs suit a few thousand rows.
    "mlm": {"small": {"optim": {"lr": 5e-4}, "loop": {"epochs": 2.0}}},
    "classify": {"small": {"optim": {"lr": 2e-4}, "loop": {"epochs": 4.0}}},
    "regress": {"small": {"optim": {"lr": 2e-4}, "loop": {"epochs": 4.0}}},
    "tag": {"small": {"optim": {"lr": 5e-4, "batch_size": 16}, "loop": {"epochs": 8.0}}},
    "sft": {
        # `python train.py` and nothing else: LoRA and the norms of the built-in base, chat data.
        "assistant": {
            "data": dict.fromkeys(("train", "dev", "test"), ["builtin:chat"]),
            "peft": {"method": "lora", "rank": 16, "alpha": 32.0, "extra_modules": ["*norm*"]},
            "optim": {"lr": 1e-3, "batch_size": 8, "loraplus_lr_ratio": 10.0},
            "schedule": {"shape": "cosine", "warmup": 0.05},
            "loop": {"epochs": 1.1, "eval_every": 700, "save_every": 700},
            "eval": {"intent_field": "intent"},
        },
        # Other chats, with the built-in base or another small decoder.
        "chat": {
            "peft": {"method": "lora", "rank": 16, "alpha": 32.0},
            "optim": {"lr": 2e-3, "batch_size": 16},
        },
    },
}
