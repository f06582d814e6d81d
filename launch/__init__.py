"""Entrypoints: parse arguments, turn configuration into frozen dataclasses, call one function."""
