"""From a prompt file to token ids."""
