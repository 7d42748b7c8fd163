"""The README's pictures of the demo, from the screenshots that the browser tests took: half the size, few enough bytes for a page."""

from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[2]
TAKEN = {"generate-steered-panda": "demo-generate", "geometry": "demo-geometry"}
WIDTH, MOST = 1000, 250_000

for name, target in TAKEN.items():
    image = Image.open(ROOT / "build" / "screenshots" / f"{name}.png").convert("RGB")
    image = image.resize((WIDTH, WIDTH * image.height // image.width), Image.Resampling.LANCZOS)
    path = ROOT / "docs" / f"{target}.webp"
    quality = next(q for q in range(90, 20, -5) if not image.save(path, quality=q) and path.stat().st_size < MOST)
    print(f"{path.relative_to(ROOT)}: {image.width} x {image.height}, quality {quality}, {path.stat().st_size / 1000:.0f} kB")
