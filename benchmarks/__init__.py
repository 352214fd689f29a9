"""Benchmarks of clipping, and of its peers in other libraries."""
