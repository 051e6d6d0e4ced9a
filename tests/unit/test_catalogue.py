"""The model catalogue: what it accepts and how it refuses."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from inference_service.catalogue import Catalogue, CatalogueError

REPOSITORY = Path(__file__).parents[2]


def entry(**changes: Any) -> dict[str, Any]:
    complete: dict[str, Any] = {
        "id": "painter",
        "display_name": "Painter",
        "kind": "image",
        "path": "painter",
        "default": True,
        "license": "MIT",
        "defaults": {"width": 64, "height": 64, "steps": 20, "guidance_scale": 3.0},
        "limits": {"min_size": 32, "max_size": 128, "size_multiple": 8, "max_steps": 100},
        "price": {"step_millicredits": 50},
    }
    return complete | changes


def read(directory: Path, *entries: dict[str, Any]) -> Catalogue:
    (directory / "painter").mkdir(exist_ok=True)
    (directory / "painter" / "model_index.json").write_text("{}")
    file = directory / "catalogue.yaml"
    file.write_text(yaml.safe_dump({"models": list(entries)}))
    return Catalogue.read(file)


def test_shipped_catalogue_offers_the_shipped_model() -> None:
    catalogue = Catalogue.read(REPOSITORY / "models" / "catalogue.yaml")
    model = catalogue.default("image")
    assert model is not None
    assert model.id == "emoji-diffusion"
    assert model.path == REPOSITORY / "models" / "emoji-diffusion"
    assert model in catalogue.preloaded
    assert catalogue.find("emoji-diffusion") is model
    assert catalogue.find("../emoji-diffusion") is None


def test_paths_start_at_the_catalogues_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    assert read(tmp_path, entry()).models[0].path == tmp_path.resolve() / "painter"


@pytest.mark.parametrize(
    ("entries", "told"),
    [
        ([], "models"),
        ([entry(default=False)], "exactly one model with `default: true`, not 0"),
        ([entry(), entry(id="other")], "exactly one model with `default: true`, not 2"),
        ([entry(), entry(default=False)], "two models have the id painter"),
        ([entry(id="../painter")], "models.0.id"),
        ([entry(kind="video")], "models.0.kind"),
        ([entry(path="elsewhere")], "models.0.path"),
        ([entry(colour="red")], "models.0.colour"),
        ([entry(dtype="int4")], "models.0.dtype"),
        ([entry(display_name="a\x1b[31m")], "models.0.display_name"),
        ([entry(price={"step_millicredits": -1})], "models.0.price.step_millicredits"),
        ([entry(defaults=entry()["defaults"] | {"width": 68})], "defaults.width must be a multiple of 8"),
        ([entry(defaults=entry()["defaults"] | {"height": 16})], "defaults.height must be 32 to 128"),
        ([entry(defaults=entry()["defaults"] | {"steps": 101})], "defaults.steps must be 1 to 100"),
        ([entry(defaults=entry()["defaults"] | {"guidance_scale": float("nan")})], "models.0.defaults.guidance_scale"),
        ([entry(limits=entry()["limits"] | {"max_size": 4104})], "models.0.limits.max_size"),
        ([entry(limits=entry()["limits"] | {"min_size": 36})], "min_size is not a multiple"),
        ([entry(limits=entry()["limits"] | {"min_size": 136})], "min_size is larger than max_size"),
    ],
)
def test_mistakes_are_told(tmp_path: Path, entries: list[dict[str, Any]], told: str) -> None:
    with pytest.raises(CatalogueError) as caught:
        read(tmp_path, *entries)
    assert told in str(caught.value)


def test_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(CatalogueError, match="No such file"):
        Catalogue.read(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CatalogueError, match="not YAML"):
        Catalogue.read(tmp_path / "binary.yaml")


@pytest.mark.parametrize(("size", "fine"), [(24, False), (32, True), (36, False), (128, True), (136, False), (0, False), (-8, False)])
def test_size_limits(tmp_path: Path, size: int, fine: bool) -> None:
    assert (read(tmp_path, entry()).models[0].limits.size_problem(size) is None) is fine
