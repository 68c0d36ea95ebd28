"""The thumbnails of the gallery, a picture of each notebook: `python docs/thumbnails.py`."""

import base64
import io
import pathlib

import nbformat
from PIL import Image

DOCS = pathlib.Path(__file__).parent
PICTURES = {  # of a notebook, which one
    "adapters": 0,
    "eight_devices": 0,
    "frameworks": 0,
    "groups_dying": 0,
    "learning_rate": 2,
    "low_rank_training": 0,
    "own_parts": 0,
    "singular_values_dying": 0,
    "smaller_program": 0,
}


def pictures(name: str) -> list[bytes]:
    notebook = nbformat.read(DOCS.parent / "notebooks" / f"{name}.ipynb", as_version=4)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    data = [output.get("data", {}).get("image/png") for output in outputs]
    return [base64.b64decode(picture) for picture in data if picture]


if __name__ == "__main__":
    for name, which in PICTURES.items():
        image = Image.open(io.BytesIO(pictures(name)[which])).convert("RGB")
        image.thumbnail((480, 300))
        image.save(DOCS / "images" / f"gallery_{name}.png", optimize=True)
