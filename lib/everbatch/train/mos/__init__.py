"""MOS: an adapter for each task beside a frozen vision transformer, merged, aligned and found again by the samples themselves."""
