"""Envoy's configuration, rendered from typed settings and the contract. The template lies in `envoy/envoy.yaml`."""
