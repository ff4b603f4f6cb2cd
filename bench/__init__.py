"""The benchmark: fused_ema against torch and published packages; run `python -m bench`."""
