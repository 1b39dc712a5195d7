"""Timings, memory and throughput."""
