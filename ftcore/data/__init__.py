"""Stage 1, dataset preparation: files to rows, rows to token ids, documents to batches."""
