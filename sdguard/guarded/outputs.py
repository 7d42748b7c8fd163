"""What a pipeline's call gives, in whatever form: the images in it, and the same with others in their place and the reports beside them."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from sdguard.guarded.report import GuardReport


def images_of(output: Any) -> Any:
    """The images of a pipeline's output, a single one as a list; raises `TypeError` where it cannot be told what they are.

    diffusers gives an output with ``images``, or a tuple that begins with them; pipelines of somebody's own may give these alone.
    """
    if isinstance(output, tuple):
        images = output[0] if output else None
    elif isinstance(output, (list, np.ndarray, Tensor, Image.Image)):
        images = output
    elif isinstance(output, dict) and "images" in output:
        images = output["images"]
    else:
        images = getattr(output, "images", None)
    if isinstance(images, Image.Image):
        return [images]
    if not isinstance(images, (list, np.ndarray, Tensor)):
        raise TypeError(f"The pipeline's output, of class {type(output).__name__}, has no images that can be told by what was judged.")
    return images


def check_count(images: Any, count: int) -> None:
    """Raise `RuntimeError` where images are not as many as were judged; a run without steps has none."""
    if len(images) not in (0, count):
        raise RuntimeError(f"{len(images)} images were made where {count} were judged: the pipeline is changed by being called.")


def blank(images: Any, withheld: list[int]) -> Any:
    """A pipeline's images with the withheld ones blanked, whatever form they were asked for in."""
    if not withheld:
        return images
    if isinstance(images, list):
        return [blank_of(image) if i in withheld else image for i, image in enumerate(images)]
    images = images.clone() if isinstance(images, Tensor) else images.copy()
    images[[i for i in withheld if i < len(images)]] = 0  # a run without steps has no image to blank
    return images


def blank_of(image: Any) -> Any:
    """An image like another with nothing on it."""
    return Image.new(image.mode, image.size) if isinstance(image, Image.Image) else image * 0


def with_images(output: Any, images: Any, reports: Sequence[GuardReport]) -> Any:
    """A pipeline's output with other images in it, of its own form; and where that can be, with ``reports`` as its ``guard``."""
    if isinstance(output, tuple):
        one = images[0] if isinstance(output[0], Image.Image) else images
        make = getattr(output, "_make", tuple)
        return make((one, *output[1:]))
    if isinstance(output, Image.Image):
        return images[0]
    if isinstance(output, (list, np.ndarray, Tensor)):
        return images
    if isinstance(output, dict) and not hasattr(output, "images"):
        return {**output, "images": images}
    images = images[0] if isinstance(output.images, Image.Image) else images
    if images is not output.images:
        _set(output, "images", images)
    with contextlib.suppress(AttributeError):  # of a class with slots; the pipeline has them too
        _set(output, "guard", reports)
    return output


def _set(output: Any, name: str, value: Any) -> None:
    """Set an attribute as the class does it, or past a class that is frozen."""
    try:
        setattr(output, name, value)
    except AttributeError:
        object.__setattr__(output, name, value)
