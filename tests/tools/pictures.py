"""Pictures that tests look at."""

import numpy as np
from PIL import Image


def is_whole(image: Image.Image) -> bool:
    """Whether each edge of the image has one colour: a title or a label that is cut off would show there."""
    pixels = np.asarray(image.convert("RGB"))
    return all((edge == edge[0]).all() for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]))
