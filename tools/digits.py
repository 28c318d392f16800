"""Write scikit-learn's handwritten digits as a NumPy archive, for `hpctrain data pack`.

    python tools/digits.py data/digits.npz

1797 images of 8 x 8 pixels with 17 grey levels: `image` uint8 (1797, 8, 8), `label` int64 (1797,).
They come with scikit-learn, so that the demo needs no download of its own. (E. Alpaydin and
C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998.)
Knows nothing of shards.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits


def main(target: Path) -> None:
    digits = load_digits()
    target.parent.mkdir(parents=True, exist_ok=True)
    np.savez(target, image=digits.images.astype(np.uint8), label=digits.target.astype(np.int64))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python tools/digits.py FILE.npz")
    main(Path(sys.argv[1]))
