"""Is every node fit for a run? Each rank examines its own and its links; rank 0 names what is sick, in one table."""
