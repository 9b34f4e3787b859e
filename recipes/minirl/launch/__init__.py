"""From a configuration to processes: plans, commands, machines, devices."""
