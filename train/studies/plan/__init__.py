"""Whether a layout fits, before it runs: memory, FLOPs and bytes sent of one rank."""
