"""What measures, plans, draws or ablates a run from outside; the run imports nothing of it."""
