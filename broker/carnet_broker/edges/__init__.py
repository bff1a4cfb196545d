"""The adapters of the broker: each knows one piece of the outside world, and none knows another."""
