"""Options of a run: typed dataclasses, strict YAML and `key=value` over them, and DeepSpeed's configuration."""

from everbatch.config.deepspeed import deepspeed_config
from everbatch.config.layers import build, dump, fail, help_text, parse, resolved
from everbatch.config.tree import ConfigError

__all__ = ["ConfigError", "build", "deepspeed_config", "dump", "fail", "help_text", "parse", "resolved"]
