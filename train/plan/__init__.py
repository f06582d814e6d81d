"""Closed-form accounts of a run before it runs: bytes held, FLOPs done and bytes sent, per rank. No tensor is made."""
