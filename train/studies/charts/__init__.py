"""What pages of charts share: their look, their figures, and one file that opens offline."""
