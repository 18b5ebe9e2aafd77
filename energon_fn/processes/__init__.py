"""Worker processes, and how batches cross from them."""
