"""Hosts: what stands between the shards a mixin sees and the engine that owns the weights."""
