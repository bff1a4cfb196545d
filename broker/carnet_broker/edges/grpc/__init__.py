"""The gRPC face of the broker: the services of ``protos/carnet/v1``, behind mutual TLS."""
