"""Stage 4, partial and full fine-tuning: what is trained, against which loss, by which steps.

freeze and lora choose what is trained and adapter is the update's file form; task makes the loss;
optim and schedule make the step; loop runs them and checkpoint remembers where it was.
"""
