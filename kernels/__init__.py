"""Kernels and their references: each a folder whose `api` picks a back end. Imports jax only."""
