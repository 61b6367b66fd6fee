"""Benchmarks: scripts run as `python -m flashcocos.benchmarks.NAME`, and the results they wrote."""
