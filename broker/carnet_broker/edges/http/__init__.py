"""The plain HTTP face of the broker: health, metrics and the public key set, for loopback or the pod network."""
