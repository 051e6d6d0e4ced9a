"""Command line of inference_service: `python -m inference_service serve`."""

import argparse
import sys

from inference_service.app import serve
from inference_service.catalogue import Catalogue, CatalogueError
from inference_service.settings import InferenceSettings
from servicekit import process
from servicekit.settings import EXIT_CONFIGURATION, load


def main() -> None:
    """Run a role of the service until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(prog="inference_service", description="Models behind one streaming RPC.")
    parser.add_argument("role", choices=["serve"])
    parser.parse_args()
    settings = load(InferenceSettings)
    try:
        catalogue = Catalogue.read(settings.models_file)
    except CatalogueError as error:
        print(f"GENMESH_MODELS_FILE: {error}", file=sys.stderr)
        sys.exit(EXIT_CONFIGURATION)
    process.run(settings, service="inference_service", role="serve", main=lambda stop: serve(settings, catalogue, stop))


if __name__ == "__main__":
    main()
