"""The documentation's pictures of the demo, from the screenshots that the browser tests took: half the size, few enough bytes."""

from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[2]
TAKEN = {"generate-verbatim": "demo-generate", "geometry": "demo-geometry"}
WIDTH, MOST = 1000, 250_000

for name, target in TAKEN.items():
    image = Image.open(ROOT / "build" / "screenshots" / f"{name}.png").convert("RGB")
    image = image.resize((WIDTH, WIDTH * image.height // image.width), Image.Resampling.LANCZOS)
    path = ROOT / "docs" / f"{target}.webp"
    quality = 90
    image.save(path, quality=quality)
    while path.stat().st_size >= MOST:
        quality -= 5
        image.save(path, quality=quality)
    print(f"{path.relative_to(ROOT)}: {image.width} x {image.height}, quality {quality}, {path.stat().st_size / 1000:.0f} kB")
