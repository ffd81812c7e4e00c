"""What makes the engine fast on a CPU in bf16. Nothing here is needed to be right, and no GPU uses it."""
