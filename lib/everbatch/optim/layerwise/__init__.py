"""Layer-wise trust ratios and the learning-rate rules of large batches."""
