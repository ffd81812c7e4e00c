"""The batching engine: token ids in, token ids out. It knows no text, no paths and no configs."""
