"""Hold what every other folder may use: plain data, errors, the terminal, signals."""
