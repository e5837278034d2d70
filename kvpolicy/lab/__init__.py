"""Benchmarks, and what people look at: each prints ratios taken in one run."""
