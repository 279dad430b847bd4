"""Replay: samples of earlier tasks, and what is asked of them."""
