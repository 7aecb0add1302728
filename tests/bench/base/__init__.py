"""How the built-in base model was made: its corpus, its tokenizer, its pre-training."""
