"""What each piece of the FP8 recipe is for: one-step errors and short runs with one piece changed."""
