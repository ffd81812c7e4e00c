"""Make token ids of token ids: continuous batching that knows no text, no paths and no configs."""
