"""Timings, memory and throughput of this package and of others."""
