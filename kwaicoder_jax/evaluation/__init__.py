"""Benchmarks by execution: prompts, sandboxed runs, pass@k; and infilling by comparing text.

This file imports nothing, because the sandbox's launcher passes through it in a bare interpreter.
"""
