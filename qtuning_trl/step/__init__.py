"""What happens between drawing and training: samples are scored, selected, and put into micro-batches."""
