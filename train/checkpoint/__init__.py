"""Checkpoints: torch DCP with safetensors payloads and JSON, published atomically; no pickle is ever read."""
