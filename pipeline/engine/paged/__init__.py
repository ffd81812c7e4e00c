"""Keys and values in pages, for one GPU: static shapes, so that a decode step is one graph of kernels."""
