"""Envoy's configuration for an embedded stack: the one of `envoy/`, with the addresses of this stack."""

from pathlib import Path

from cli.stack.ports import PortBlock
from edge.render import render
from edge.settings import EnvoySettings
from servicekit.settings import load


def configuration(
    ports: PortBlock,
    directory: Path,
    *,
    edge_port: int,
    edge_tls_port: int,
    certificates_dir: Path,
    replicas_inference: int,
    hsts_max_age_s: int,
) -> str:
    """The text of Envoy's configuration file; others that it names are written to `directory`."""
    return render(
        load(
            EnvoySettings,
            edge_port=edge_port,
            edge_tls_port=edge_tls_port,
            admin_port=ports.port("envoy-admin"),
            certificates_dir=certificates_dir,
            sds_dir=directory,
            gateway_addresses=(ports.address("gateway"),),
            jobs_addresses=(ports.address("jobs"),),
            credits_addresses=(ports.address("credits"),),
            inference_addresses=tuple(ports.address(f"inference-{index}") for index in range(replicas_inference)),
            jwks_address=ports.address("gateway-jwks"),
            hsts_max_age_s=hsts_max_age_s,
        )
    )
