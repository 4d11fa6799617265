"""What every part speaks: patterns, axes, rules, nonzero, sharding, tables."""
