"""AdamW with FP32 masters, the schedules, and the router's bias update (arXiv:2412.19437 §2.1.2, §4.2)."""
