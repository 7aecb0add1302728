"""Stage 4, partial and full fine-tuning: freeze, lora -> task -> optim -> loop -> checkpoint."""
