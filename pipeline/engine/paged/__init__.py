"""Hold keys and values in pages, for one GPU: shapes stay, so that a decode step is one graph of kernels."""
