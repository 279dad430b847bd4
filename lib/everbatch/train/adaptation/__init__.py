"""Test-time adaptation: a model in use predicts an ordered stream, and follows it without a label."""
