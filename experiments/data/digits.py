"""The handwritten digits that scikit-learn brings along (UCI; 1797 images of 8 x 8)."""

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

SHAPE = (8, 8, 1)


def load(seed: int = 0) -> list[np.ndarray]:
    """Train images, test images, train labels, test labels: a fixed, stratified split, 60 % to train."""
    digits = load_digits()
    images = (digits.images[..., None] / 16).astype(np.float32)
    return train_test_split(images, digits.target, test_size=0.4, stratify=digits.target, random_state=seed)
