"""How cells are run: functions of (cell, home) that give numbers by name."""
