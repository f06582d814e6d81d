"""One page on runs, finished or running: read their logs, draw, serve."""
