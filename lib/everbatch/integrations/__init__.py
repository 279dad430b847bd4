"""Bridges into trainers of other libraries; each imports its library, and nothing here imports a bridge."""
