"""Warm starts: weights shrunk towards a fresh initialisation."""
