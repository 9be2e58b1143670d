"""What klas_hf costs beside its bounds and its peers: `python -m benchmarks`."""
