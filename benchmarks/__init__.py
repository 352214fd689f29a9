"""What clipping costs, beside its peers."""
