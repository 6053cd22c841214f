"""The decoder: configuration, parameters, forward pass and key-value cache."""
