"""Command line of inference_service: `python -m inference_service serve`."""

import argparse
import sys


def main() -> None:
    """Run a role of the service until SIGTERM or SIGINT."""
    # Imported here: a spawned model process imports this module too, and needs none of it.
    from inference_service.catalogue import Catalogue, CatalogueError
    from inference_service.model_entry import spawn
    from inference_service.settings import InferenceSettings
    from servicekit.settings import EXIT_CONFIGURATION, load

    parser = argparse.ArgumentParser(prog="inference_service", description="Models behind one streaming RPC.")
    parser.add_argument("role", choices=["serve"])
    parser.parse_args()
    settings = load(InferenceSettings)
    try:
        catalogue = Catalogue.read(settings.models_file)
    except CatalogueError as error:
        print(f"GENMESH_MODELS_FILE: {error}", file=sys.stderr)
        sys.exit(EXIT_CONFIGURATION)
    # Torch takes seconds to load: it begins before this process loads gRPC and S3.
    first = spawn(settings.model_options())

    from inference_service.app import serve
    from servicekit import process

    process.run(settings, service="inference_service", role="serve", main=lambda stop: serve(settings, catalogue, first, stop))


if __name__ == "__main__":
    main()
