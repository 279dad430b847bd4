"""Engines: the shards a mixin sees, the hosts behind them, and the passes of a step."""
