"""Read a prompt file, and turn its rows into token ids."""
