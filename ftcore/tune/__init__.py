"""Stage 4, partial and full fine-tuning: what is trained, against which loss, by which steps.

freeze and lora choose the parameters; adapter is their file form.
"""
