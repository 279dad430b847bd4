"""Prediction over streams, counted once over all ranks."""
