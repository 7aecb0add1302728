"""Stage 1, dataset preparation: files to rows, rows to documents of token ids, documents to batches."""
