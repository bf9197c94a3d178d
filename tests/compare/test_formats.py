"""The same data in every form that `load` reads; what goes by a form's own rules; and what is too large."""

import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from lossary.compare.encode import Encoder
from lossary.compare.load import limits, load, rows_of
from lossary.errors import BadInput
from tests.compare.test_load import refused

pa = pytest.importorskip("pyarrow")
ROWS = 60


def said(problem, *words):
    assert any(all(word in note for word in words) for note in problem.notes), problem.notes


def frame(rows=ROWS):
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "size": (np.arange(rows) * 7 % 64) / 8,
            "shade": rng.choice(["red", "blue"], rows),
            "count": rng.integers(0, 9, rows),
            "flag": rng.random(rows) < 0.5,
            "y": rng.choice(["no", "yes"], rows),
        }
    )


def arrow(path, table, opened):
    table = pa.Table.from_pandas(table)
    with opened(path, table.schema) as file:
        file.write_table(table, max_chunksize=25)


WRITERS = {
    "data.csv": lambda table, path: table.to_csv(path, index=False),
    "data.tsv": lambda table, path: table.to_csv(path, index=False, sep="\t"),
    "data.parquet": lambda table, path: table.to_parquet(path, row_group_size=25),
    "data.feather": lambda table, path: table.to_feather(path),
    "data.arrow": lambda table, path: arrow(path, table, pa.ipc.new_file),
    "data.arrows": lambda table, path: arrow(path, table, pa.ipc.new_stream),
    "other.csv": lambda table, path: table.to_parquet(path),  # the contents say what it is, not the name
}


class TestTables:
    @pytest.mark.parametrize("name", WRITERS)
    def test_every_format_gives_the_same_problem(self, name, tmp_path):
        table, path = frame(), tmp_path / name
        table.loc[[3, 8], "size"], table.loc[5, "shade"] = np.nan, None
        WRITERS[name](table, path)
        problem, expected = load(path, target="y"), load(table, target="y")
        assert problem.digest == expected.digest
        assert problem.name == path.stem
        assert expected.features["size"].isna().sum() == 2
        assert expected.features["shade"].isna().sum() == 1

    def test_types_of_columns(self, tmp_path):
        table = frame().assign(
            small=pd.Series(range(ROWS), dtype="Int16").where(lambda v: v != 9),
            single=np.arange(ROWS, dtype=np.float32) / 3,
            kind=pd.Categorical(["a", "b", "c"] * 20),
            when=pd.date_range("2024-01-01", periods=ROWS, tz="Europe/Berlin"),
            took=pd.to_timedelta(np.arange(ROWS), unit="min"),
            maybe=pd.Series([True, False, None] * 20, dtype="boolean"),
        )
        table.to_parquet(tmp_path / "data.parquet")
        for source in (table, tmp_path / "data.parquet"):
            kinds = load(source, target="y").features.dtypes
            assert kinds["small"] == kinds["single"] == kinds["took"] == np.float64
            assert kinds["kind"].kind == kinds["maybe"].kind == "O"
            assert kinds["when"].kind == "M"
        features = load(table, target="y").features
        assert features["took"].tolist() == [60.0 * i for i in range(ROWS)]
        assert features["when"][0] == pd.Timestamp("2023-12-31 23:00")
        assert np.isnan(features["small"][9])
        assert features["maybe"][:2].tolist() == ["True", "False"]
        encoded = Encoder().fit(features).transform(features)
        assert np.isfinite(encoded).all()

    def test_columns_that_nothing_can_be_made_of(self, tmp_path):
        table = frame().assign(odd=[{"a": i} for i in range(ROWS)], raw=[b"\xff"] * ROWS, z=[1j] * ROWS)
        refused("'odd'", "--drop 'odd'", source=table)
        refused("'raw'", "bytes", source=table, drop=["odd"])
        refused("'z'", "complex", source=table, drop=["odd", "raw"])
        refused("'odd'", source=table, target="odd")
        assert len(load(table, target="y", drop=["odd", "raw", "z"]))
        table.drop(columns="z").to_parquet(tmp_path / "data.parquet")
        refused("'odd'", "--drop", source=tmp_path / "data.parquet")

    def test_arrays_in_a_column_are_numbers_beside_the_others(self, tmp_path):
        vectors = np.arange(ROWS * 3.0).reshape(ROWS, 3)
        frame().assign(v=list(vectors)).to_parquet(tmp_path / "data.parquet")
        features = load(tmp_path / "data.parquet", target="y").features
        np.testing.assert_array_equal(features[["v[0]", "v[1]", "v[2]"]], vectors)
        assert features["v[1]"].dtype == np.float32

    def test_bad_input_rules_hold(self, tmp_path):
        """Those of `test_load` for CSV, on a Parquet file."""
        path = tmp_path / "data.parquet"

        def written(**columns):
            frame().assign(**columns).to_parquet(path)
            return path

        refused("data.parquet", "49 rows", source=written(y=["a", "b"] * 24 + ["a"] + [None] * 11))
        refused("'y'", "constant", source=written(y="a"))
        refused("'y'", "single row", "'lone'", source=written(y=["a", "b"] * 29 + ["a", "lone"]))
        refused("'size'", "infinite", "row 17", source=written(size=[1.0] * 16 + [np.inf] * 44))
        refused("'size'", "every value missing", "--drop 'size'", source=written(size=None))
        refused("target", "no column 'z'", source=written(), target="z")
        refused("'y'", "60 distinct", source=written(y=[f"name{i}" for i in range(ROWS)]))
        said(load(written(same=1), target="y"), "Constant", "'same'")
        said(load(written(answer=frame()["y"] == "yes"), target="y"), "'answer'", "tells the target")

    def test_names_twice(self):
        table = frame()
        table.columns = ["size", "size", "count", "flag", "y"]
        refused("'size'", "rename", source=table)

    def test_damaged(self, tmp_path):
        for name, writer in WRITERS.items():
            if name not in ("data.csv", "data.tsv"):
                writer(frame(), tmp_path / name)
                whole = (tmp_path / name).read_bytes()
                (tmp_path / name).write_bytes(whole[: len(whole) * 2 // 3])
                refused(name, source=tmp_path / name)

    def test_old_feather(self, tmp_path):
        (tmp_path / "old.feather").write_bytes(b"FEA1" + bytes(60))
        refused("old.feather", "version 1", source=tmp_path / "old.feather")

    def test_package_missing(self, tmp_path, monkeypatch):
        frame().to_parquet(tmp_path / "data.parquet")
        monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
        refused("data.parquet", "pip install pyarrow", source=tmp_path / "data.parquet")


class TestArrays:
    def write(self, path, **arrays):
        np.savez(path / "data.npz", **arrays)
        return path / "data.npz"

    def test_names(self, tmp_path):
        x, y = np.arange(ROWS * 2.0).reshape(ROWS, 2), np.arange(ROWS) % 2
        for names in (("x", "y"), ("X", "target"), ("features", "labels")):
            problem = load(self.write(tmp_path, **dict(zip(names, (x, y)))))
            np.testing.assert_array_equal(problem.features, x)
            assert problem.target.tolist() == y.tolist()
            assert (problem.shape, problem.task, problem.target_name) == ((), "classes", "y")
            said(problem, f"'{names[0]}'", f"'{names[1]}'")
        path = self.write(tmp_path, x=x, y=y, price=np.linspace(0, 1, ROWS), site=y.astype(str), more=x)
        assert load(path, target="price").task == "real"
        said(load(path), "left out", "'price', 'site', 'more'")
        assert len(np.unique(load(path, target="price", group="site").group)) == 2
        refused("no array 'prise'", "mean 'price'", source=path, target="prise")
        refused("'x', 'X'", source=self.write(tmp_path, x=x, X=x, y=y), target=None)
        refused("'y', 'label'", "named by --target", source=self.write(tmp_path, x=x, y=y, label=y), target=None)
        refused("features", source=self.write(tmp_path, a=x, y=y), target=None)
        refused("no column 'site'", source=self.write(tmp_path, x=x, y=y), target=None, group="site")

    def test_missing_values_and_text(self, tmp_path):
        x = np.arange(ROWS * 2.0).reshape(ROWS, 2)
        x[7, 1] = np.nan
        problem = load(self.write(tmp_path, x=x, y=np.array([b"no", b"yes"] * 30)))
        assert problem.classes == ("no", "yes")
        said(problem, "Missing values in 1 column, 1 in all")
        problem = load(self.write(tmp_path, x=np.array([["red", "b"], ["blue", "c"]] * 30), y=x[:, 0] % 7))
        assert problem.features["x0"][:2].tolist() == ["red", "blue"]

    def test_images(self, tmp_path):
        rng = np.random.default_rng(0)
        y = np.arange(ROWS) % 2
        first = rng.integers(0, 256, (ROWS, 3, 5, 6), dtype=np.uint8)
        problem = load(self.write(tmp_path, x=first, y=y))
        assert problem.shape == (3, 5, 6)
        np.testing.assert_array_equal(problem.features.to_numpy().reshape(ROWS, 3, 5, 6), first)
        assert set(problem.features.dtypes) == {np.dtype(np.float32)}
        last = load(self.write(tmp_path, x=np.moveaxis(first, 1, -1), y=y))
        assert last.digest == problem.digest
        said(last, "channels come last")
        grey = load(self.write(tmp_path, x=first[:, 0], y=y))
        assert grey.shape == (1, 5, 6)
        assert load(self.write(tmp_path, x=first[:, 0].astype(float), y=y)).shape == (5, 6)
        ordered = load(self.write(tmp_path, x=np.asfortranarray(first), y=y))
        assert ordered.digest == problem.digest

    def test_a_test_of_its_own(self, tmp_path):
        x, y = np.arange(300.0).reshape(100, 3), np.arange(100) % 2
        path = self.write(tmp_path, x_train=x[:70], y_train=y[:70], x_test=x[70:], y_test=y[70:])
        problem = load(path)
        assert problem.test.tolist() == list(range(70, 100))
        np.testing.assert_array_equal(problem.features, x)

    def test_refused(self, tmp_path):
        x, y = np.arange(ROWS * 2.0).reshape(ROWS, 2), np.arange(ROWS) % 2

        def bad(*words, **arrays):
            refused(*words, source=self.write(tmp_path, **({"x": x, "y": y} | arrays)), target=None)

        bad("'y'", "unpickled", y=y.astype(object))
        bad("'x'", "unpickled", x=x.astype(object))
        bad("'y'", "50 rows", "60", y=y[:50])
        bad("'x'", "row 4", "infinite", x=np.where(np.arange(ROWS)[:, None, None] == 3, np.inf, x[..., None]))
        bad("'x'", "row 4", "missing", x=np.where(np.arange(ROWS)[:, None, None] == 3, np.nan, x[..., None]))
        bad("'x'", "complex", x=x + 1j)
        bad("'x'", "no rows", x=np.float64(3))
        bad("'y'", "(60, 2, 2)", y=np.zeros((ROWS, 2, 2)))
        bad("'y'", "(60, 2)", y=x)
        (tmp_path / "data.npz").write_bytes(b"PK\x03\x04 no archive")
        refused("data.npz", "damaged", source=tmp_path / "data.npz", target=None)
        np.save(tmp_path / "data.npy", x)
        refused("data.npy", "NumPy array", source=tmp_path / "data.npy")

    def test_a_header_that_promises_more_than_there_is(self, tmp_path):
        """Sixteen terabytes are neither allocated nor waited for."""
        path = self.write(tmp_path, x=np.zeros((ROWS, 2)), y=np.arange(ROWS) % 2)
        whole = path.read_bytes()
        assert whole.count(b"(60, 2), }" + b" " * 9) == 1
        path.write_bytes(whole.replace(b"(60, 2), }" + b" " * 9, b"(999999999999, 2), }"[:19].ljust(19)))
        refused("data.npz", source=path, target=None)


class TestEmbeddings:
    def test_beside_a_table(self, tmp_path):
        values = np.random.default_rng(0).normal(size=(ROWS, 3))
        np.save(tmp_path / "e.npy", values)
        table = frame()
        table.loc[4, "y"] = None
        problem = load(table, target="y", embeddings=tmp_path / "e.npy")
        assert len(problem) == ROWS - 1
        kept = np.delete(values, 4, axis=0).astype(np.float32)
        np.testing.assert_array_equal(problem.features.iloc[:, -3:], kept)
        assert problem.shape == ()
        encoded = Encoder().fit(problem.features).transform(problem.features)
        expected = (kept - kept.mean(0)) / kept.std(0)
        np.testing.assert_allclose(encoded[:, -3:], expected, atol=1e-5)

    def test_with_a_test(self, tmp_path):
        values = np.random.default_rng(0).normal(size=(ROWS + 30, 3))
        np.save(tmp_path / "e.npy", values)
        both = frame(ROWS + 30)
        problem = load(both[:ROWS], target="y", test=both[ROWS:], embeddings=tmp_path / "e.npy")
        np.testing.assert_array_equal(problem.features.iloc[:, -3:], values.astype(np.float32))

    def test_refused(self, tmp_path):
        path = tmp_path / "e.npy"

        def bad(*words, values, **more):
            np.save(path, values)
            refused("embeddings", "e.npy", *words, source=frame(), embeddings=path, **more)

        refused("embeddings", "no such file", source=frame(), embeddings=path)
        bad("59 rows", "60", values=np.zeros((59, 2)))
        bad("60 rows", "90", values=np.zeros((60, 2)), test=frame(30))
        bad("row 8", "missing", values=np.where(np.arange(ROWS)[:, None] == 7, np.nan, np.ones(2)))
        bad("(60, 2, 2)", values=np.zeros((60, 2, 2)))
        bad("e.npy", values=np.zeros((60, 2)).astype(object))
        path.write_bytes(b"no array")
        refused("e.npy", source=frame(), embeddings=path)


@pytest.fixture
def folder(tmp_path):
    """Writes images, 26 of each class, as `draw(class, number)` gives them."""

    def write(draw, name="animals", kind="png", number=26):
        for place, label in enumerate(("cat", "dog")):
            (tmp_path / name / label).mkdir(parents=True)
            for n in range(number):
                Image.fromarray(draw(place, n)).save(tmp_path / name / label / f"{n:02}.{kind}")
        return tmp_path / name

    return write


def grey(place, n, size=(8, 6)):
    return np.random.default_rng((place, n, *size)).integers(0, 256, size, dtype=np.uint8)


class TestImages:
    def test_small_ones_are_read_as_they_are(self, folder):
        problem = load(folder(grey))
        assert problem.shape == (1, 8, 6)
        expected = np.stack([grey(place, n) for place in (0, 1) for n in range(26)]) / 255
        np.testing.assert_allclose(problem.features, expected.reshape(52, -1), rtol=1e-6)
        assert (problem.task, problem.classes, problem.target_name) == ("classes", ("cat", "dog"), "class")
        assert problem.target.tolist() == [0] * 26 + [1] * 26
        assert problem.ids[27] == "dog/01.png"
        assert problem.name == "animals"
        said(problem, "52 images", "grey", "8 x 6")

    def test_colour(self, folder):
        def draw(place, n):
            return np.stack([grey(place, n + 100 * c) for c in range(3)], axis=-1)

        problem = load(folder(draw))
        assert problem.shape == (3, 8, 6)
        expected = np.stack([draw(place, n) for place in (0, 1) for n in range(26)]).transpose(0, 3, 1, 2) / 255
        np.testing.assert_allclose(problem.features, expected.reshape(52, -1), rtol=1e-6)

    def test_one_in_colour_makes_all_so(self, folder):
        path = folder(grey)
        Image.fromarray(np.full((8, 6, 3), (255, 0, 51), dtype=np.uint8)).save(path / "cat" / "00.png")
        values = load(path).features.to_numpy().reshape(52, 3, 8, 6)
        np.testing.assert_allclose(values[0, :, 0, 0], [1, 0, 0.2])
        np.testing.assert_allclose(values[1, 0], grey(0, 1) / 255, rtol=1e-6)
        assert (values[1:, 0] == values[1:, 2]).all()

    def test_sixteen_bits(self, folder):
        problem = load(folder(lambda place, n: grey(place, n).astype(np.uint16) * 256 + 77))
        expected = (grey(0, 0).astype(float) * 256 + 77) / 65535
        np.testing.assert_allclose(problem.features.iloc[0], expected.ravel(), rtol=1e-5)

    def test_large_ones_are_made_smaller(self, folder):
        """To 32 pixels along the longer side; a plain surface keeps its value, halves keep their means."""

        def draw(place, n):
            half = np.full((200, 400), 40 + 4 * n, dtype=np.uint8)
            half[:, 200:] = 200 - 100 * place
            return half

        problem = load(folder(draw))
        assert problem.shape == (1, 16, 32)
        first = problem.features.iloc[3].to_numpy().reshape(16, 32) * 255
        np.testing.assert_allclose(first[:, :15], 52, atol=1)
        np.testing.assert_allclose(first[:, 17:], 200, atol=1)

    def test_sizes_that_differ_become_their_median(self, folder):
        problem = load(folder(lambda place, n: grey(place, n, (10 + n % 3, 20))))
        assert problem.shape == (1, 11, 20)

    def test_a_photograph_held_upright(self, folder):
        path = folder(grey)
        for file in path.rglob("*.png"):
            with Image.open(file) as image:
                turned = Image.fromarray(np.rot90(np.asarray(image)))
                exif = turned.getexif()
                exif[0x0112] = 6  # turn it clockwise to look at it
                turned.save(file, exif=exif)
        np.testing.assert_allclose(load(path).features.iloc[5], grey(0, 5).ravel() / 255, rtol=1e-6)

    def test_names_of_classes_stay_words(self, tmp_path):
        for number in range(30):
            for n in range(2):
                (tmp_path / f"{number:03}").mkdir(exist_ok=True)
                Image.fromarray(grey(number, n)).save(tmp_path / f"{number:03}" / f"{n}.png")
        problem = load(tmp_path)
        assert problem.task == "classes"
        assert problem.classes[:2] == ("000", "001")
        assert load(tmp_path, task="ordinal").classes[7] == "007"
        ages = load(tmp_path, task="real")
        assert ages.target.tolist() == [float(name.split("/")[0]) for name in ages.ids]

    def test_train_and_test(self, folder, tmp_path):
        folder(grey, "sets/train")
        folder(lambda place, n: grey(place, n + 50, (16, 12)), "sets/test", number=12)
        folder(lambda place, n: grey(place, n + 80), "sets/val", number=3)
        problem = load(tmp_path / "sets")
        assert problem.test.tolist() == list(range(52, 76))
        assert problem.shape == (1, 8, 6)  # that of those to learn from
        assert problem.ids[52] == "test/cat/00.png"
        said(problem, "'val'")

    def test_other_files_are_left_out(self, folder):
        path = folder(grey)
        (path / "cat" / "labels.txt").write_text("x")
        (path / "cat" / ".DS_Store").write_text("x")
        (path / "none").mkdir()
        problem = load(path)
        assert len(problem) == 52
        said(problem, "'cat/labels.txt'")
        said(problem, "without images", "'none'")

    def test_refused(self, folder, tmp_path):
        path = folder(grey)
        refused("no column 'shade'", source=path, target=None, drop=["shade"])
        whole = (path / "dog" / "03.png").read_bytes()
        for content in (b"", b"no image", whole[: len(whole) // 2], whole[:60] + b"\xff\xff" + whole[62:]):
            (path / "dog" / "03.png").write_bytes(content)
            refused("03.png", "mend or remove", source=path, target=None)
        (tmp_path / "empty" / "cat").mkdir(parents=True)
        refused("no images", "sub-folder", source=tmp_path / "empty", target=None)

    def test_a_bomb(self, folder, monkeypatch):
        monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 40)
        refused("00.png", "decompression bomb", source=folder(grey), target=None)


class Pairs(Dataset):
    def __init__(self, *items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, place):
        return self.items[place]


class Endless(IterableDataset):
    def __iter__(self):
        place = 0
        while True:
            yield torch.tensor([place, -place]).float(), place % 2
            place += 1


class TestDatasets:
    def test_tensors(self):
        x, y = torch.randn(ROWS, 2, 4, 5, generator=torch.manual_seed(0)), torch.arange(ROWS) % 30
        problem = load(TensorDataset(x, y))
        assert problem.shape == (2, 4, 5)
        np.testing.assert_array_equal(problem.features.to_numpy().reshape(x.shape), x)
        assert problem.task == "classes"  # whole numbers always are
        assert problem.target.tolist() == y.tolist()
        said(problem, "30 distinct values", "--task real")
        assert load(TensorDataset(x, y.float())).task == "real"
        assert load(TensorDataset(x, (torch.rand(ROWS, 3) < 0.5).float())).task == "multilabel"

    def test_rows_of_numbers_are_a_table(self):
        problem = load(Pairs(*(([i, i % 3, 1.5 * i], ("no", "yes")[i % 2]) for i in range(ROWS))))
        assert problem.features["x2"].tolist() == [1.5 * i for i in range(ROWS)]
        assert problem.classes == ("no", "yes")
        assert problem.shape == ()

    def test_names_of_classes(self):
        source = Pairs(*((torch.randn(3), i % 2) for i in range(ROWS)))
        source.classes = ["cat", "dog"]
        assert load(source).classes == ("cat", "dog")

    def test_a_test_and_a_stream(self, monkeypatch):
        x = torch.randn(90, 3)
        problem = load(TensorDataset(x[:60], x[:60, 0]), test=TensorDataset(x[60:], x[60:, 0]), drop=["x0"])
        np.testing.assert_array_equal(problem.features["x1"].astype(np.float32), x[:, 1])
        assert problem.test.tolist() == list(range(60, 90))
        monkeypatch.setattr(limits, "MOST_CELLS", 200)
        problem = load(Endless())
        assert problem.features["x0"].tolist() == list(range(100))
        said(problem, "100 items", "goes on")

    def test_refused(self):
        pair = (torch.zeros(3), 1)
        for words, source in (
            (("item 0", "a pair"), Pairs(*[torch.zeros(3)] * ROWS)),
            (("item 0", "a pair"), Pairs(*[(1, 2, 3)] * ROWS)),
            (("item 7", "(4,)", "(3,)"), Pairs(*[pair] * 7, (torch.zeros(4), 1))),
            (("item 0", "object"), Pairs(*[(None, 1)] * ROWS)),
            (("empty",), Pairs()),
            (
                ("item 9", "IndexError", "tuple index"),
                type("Short", (Pairs,), {"__len__": lambda self: 60})(*[pair] * 9),
            ),
        ):
            refused(*words, source=source, target=None)
        refused("no column 'label'", "'y'", source=Pairs(*[pair] * ROWS), target="label")


class TestRowsToPredict:
    """The columns of rows without a target, under the names that a model has learned."""

    @pytest.mark.parametrize("name", WRITERS)
    def test_tables(self, name, tmp_path):
        path = tmp_path / name
        WRITERS[name](frame(), path)
        learned = load(path, target="y").features
        WRITERS[name](frame().drop(columns="y"), path)
        pd.testing.assert_frame_equal(rows_of(path), learned)

    def test_text_that_looks_like_numbers(self, tmp_path):
        (tmp_path / "data.csv").write_text("code,size\n007,1\n010,2\n")
        assert rows_of(tmp_path / "data.csv", words=["code"])["code"].tolist() == ["007", "010"]
        assert rows_of(tmp_path / "data.csv")["code"].tolist() == [7, 10]

    def test_arrays_and_embeddings(self, tmp_path):
        x = np.random.default_rng(0).normal(size=(5, 2, 3, 2)).astype(np.float32)
        np.savez(tmp_path / "data.npz", x=x)
        np.testing.assert_array_equal(rows_of(tmp_path / "data.npz", shape=(2, 3, 2)), x.reshape(5, 12))
        with pytest.raises(BadInput, match=r"\(2, 3, 2\).*\(1, 3, 2\)"):
            rows_of(tmp_path / "data.npz", shape=(1, 3, 2))
        np.save(tmp_path / "e.npy", x[:, 0, 0])
        found = rows_of(frame(5), embeddings=tmp_path / "e.npy")
        assert list(found)[-2:] == ["embeddings[0]", "embeddings[1]"]

    def test_images_take_the_form_that_was_learned(self, folder, tmp_path):
        problem = load(folder(grey))
        (tmp_path / "new" / "more").mkdir(parents=True)
        for n, (place, size) in enumerate([("new", (8, 6)), ("new/more", (16, 12))]):
            values = np.kron(grey(0, n), np.ones((size[0] // 8, size[1] // 6))).astype(np.uint8)
            Image.fromarray(np.stack([values] * 3, axis=-1)).save(tmp_path / place / f"{n}.png")
        found = rows_of(tmp_path / "new", shape=problem.shape)
        assert found["file"].tolist() == ["0.png", "more/1.png"]
        assert list(found)[-48:] == list(problem.features)
        np.testing.assert_allclose(found.iloc[0, -48:].astype(float), problem.features.iloc[0], rtol=1e-6)

    def test_too_many(self, monkeypatch):
        monkeypatch.setattr(limits, "MOST_CELLS", 300)
        with pytest.raises(BadInput, match="100 rows are too many"):
            rows_of(frame(100))


@pytest.fixture(scope="module")
def datasets():
    found = pytest.importorskip("datasets")
    found.disable_progress_bars()
    yield found
    found.enable_progress_bars()


class TestSaved:
    """Hugging Face datasets, as their own package writes them."""

    def test_columns_say_what_the_package_says(self, datasets, tmp_path):
        table = frame().assign(y=(frame()["y"] == "yes").astype(int), part=[[0], [0, 1], []] * 20)
        kinds = {"y": datasets.ClassLabel(names=["never", "ever"])}
        kinds["part"] = datasets.Sequence(datasets.ClassLabel(names=["wing", "beak"]))
        kinds["map"] = datasets.Array2D((2, 3), "float32")
        maps = np.random.default_rng(0).normal(size=(ROWS, 2, 3)).astype(np.float32)
        made = datasets.Dataset.from_dict({**table.to_dict("list"), "map": maps})
        made = made.cast(datasets.Features({**made.features, **kinds}))
        made.save_to_disk(str(tmp_path / "data"))
        problem = load(tmp_path / "data", drop="part")
        read = datasets.load_from_disk(str(tmp_path / "data"))
        assert problem.classes == ("ever", "never")
        assert [problem.classes[code] for code in problem.target] == read.features["y"].int2str(read["y"])
        for name in ("size", "shade", "count", "flag"):
            assert problem.features[name].tolist() == list(read[name])
        np.testing.assert_array_equal(problem.features.iloc[:, -6:], maps.reshape(ROWS, 6))
        said(problem, "'y'", "class labels")
        labels = load(tmp_path / "data", target="part", drop=["y"])
        assert (labels.task, labels.classes) == ("multilabel", ("beak", "wing"))
        assert labels.target[:3].tolist() == [[0, 1], [1, 1], [0, 0]]
        refused("'part'", "--drop 'part'", source=tmp_path / "data")

    def test_class_labels_that_are_numbers_may_be_features(self, datasets, tmp_path):
        kinds = {"y": datasets.Value("string"), "kind": datasets.ClassLabel(names=["10", "20"])}
        made = datasets.Dataset.from_dict(
            {"y": ["no", "yes"] * 30, "kind": [0, 1, 1] * 20}, features=datasets.Features(kinds)
        )
        made.save_to_disk(str(tmp_path / "data"))
        assert load(tmp_path / "data", target="y").features["kind"][:3].tolist() == ["10", "20", "20"]

    def test_images_and_splits(self, datasets, tmp_path):
        kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["no", "yes"])})

        def split(start, rows):
            pictures = [Image.fromarray(grey(0, start + n)) for n in range(rows)]
            return datasets.Dataset.from_dict({"image": pictures, "label": [0, 1] * (rows // 2)}, features=kinds)

        both = datasets.DatasetDict(train=split(0, 60), test=split(100, 24), other=split(200, 4))
        both.save_to_disk(str(tmp_path / "data"))
        problem = load(tmp_path / "data")
        assert problem.shape == (1, 8, 6)
        assert problem.test.tolist() == list(range(60, 84))
        np.testing.assert_allclose(problem.features.iloc[61], grey(0, 101).ravel() / 255, rtol=1e-6)
        said(problem, "'other'")
        datasets.DatasetDict(a=split(0, 4), b=split(0, 4)).save_to_disk(str(tmp_path / "ab"))
        refused("'a', 'b'", "one of them", source=tmp_path / "ab", target=None)


class TestSize:
    """What is beyond a limit is sampled: every row with the same chance, and a note says so."""

    ROWS = 20_000
    MOST = 12_000  # cells, so 3,000 rows of four columns

    @pytest.fixture(autouse=True)
    def limits(self, monkeypatch):
        monkeypatch.setattr(limits, "MOST_CELLS", self.MOST)
        monkeypatch.setattr(limits, "MOST_NUMBERS", self.MOST)

    def table(self):
        place = np.arange(self.ROWS)
        words = np.char.add('a "word", and ', (place % 7).astype(str))
        return pd.DataFrame({"place": place + 0.5, "words": words, "y": place % 2, "w": place % 5})

    def drawn(self, problem, total=ROWS):
        """The rows that were drawn, all over the source, each as it stands there."""
        place = (problem.features.iloc[:, 0] - 0.5).to_numpy(dtype=int)
        assert (np.diff(place) > 0).all()
        np.testing.assert_array_equal(problem.target, place % 2)
        quarters = np.bincount(place * 4 // total, minlength=4)
        expected = len(place) / 4
        assert (np.abs(quarters - expected) < 4 * np.sqrt(expected)).all()
        said(problem, f"Read {len(place):,} of {total:,}", "at random")
        assert problem.partial
        return place

    @pytest.mark.parametrize("name", WRITERS)
    def test_tables(self, name, tmp_path):
        WRITERS[name](self.table(), tmp_path / name)
        problem = load(tmp_path / name, target="y")
        place = self.drawn(problem)
        assert self.MOST / 4 / 2.2 < len(place) <= self.MOST / 4
        assert problem.features["words"].tolist() == [f'a "word", and {p % 7}' for p in place]
        assert load(tmp_path / name, target="y").digest == problem.digest

    def test_text_by_its_length(self, tmp_path, monkeypatch):
        monkeypatch.setattr(limits, "MOST_CELLS", 10**9)
        for name in ("data.csv", "data.parquet", "data.arrow"):
            WRITERS[name](self.table(), tmp_path / name)
            monkeypatch.setattr(limits, "MOST_BYTES", 10**9)
            assert len(load(tmp_path / name, target="y")) == self.ROWS
            monkeypatch.setattr(limits, "MOST_BYTES", 200_000)
            assert 1_000 < len(self.drawn(load(tmp_path / name, target="y"))) < 8_000

    def test_every_row_as_often(self, tmp_path, monkeypatch):
        """Over 300 seeds, of 60 rows about 15 to 30 at a time: no place in the file is favoured."""
        from lossary.compare.load import text

        monkeypatch.setattr(limits, "MOST_CELLS", 30 * 4)
        monkeypatch.setattr(limits, "FEWEST_ROWS", 1)
        path = tmp_path / "data.csv"
        self.table()[:60].to_csv(path, index=False)
        times, made = np.zeros(60), text.random.Random
        for seed in range(300):
            monkeypatch.setattr(text.random, "Random", lambda _, seed=seed: made(seed))
            times[text.read(path).rows] += 1
        share = times.sum() / 300 / 60
        assert 0.2 < share < 0.5
        assert (np.abs(times - 300 * share) < 4.5 * np.sqrt(300 * share * (1 - share))).all()

    def test_rows_in_messages_are_those_of_the_file(self, tmp_path):
        table = self.table()
        table["place"] *= 1e37
        table.to_csv(tmp_path / "data.csv", index=False)
        message = refused("infinite", source=tmp_path / "data.csv")
        row = int(message.split("data row ")[1].split(";")[0])
        assert row > 34
        table.loc[: row - 2, "place"] = table["w"]
        table.to_csv(tmp_path / "data.csv", index=False)
        refused(f"data row {row};", source=tmp_path / "data.csv")

    def test_a_ragged_line_anywhere_is_refused(self, tmp_path):
        path = tmp_path / "data.csv"
        self.table().to_csv(path, index=False)
        lines = path.read_text().split("\n")
        for number in range(15_000, 15_020):
            path.write_text("\n".join([*lines[: number - 1], lines[number - 1] + ",1", *lines[number:]]))
            refused(f"line {number}:", "5 fields", "4", source=path)

    def test_line_breaks_within_quotes(self, tmp_path):
        table = self.table()
        table["words"] = [f'one\ntwo, "{place}"' for place in range(self.ROWS)]
        table.to_csv(tmp_path / "data.csv", index=False)
        problem = load(tmp_path / "data.csv", target="y")
        assert problem.features["words"].tolist() == [f'one\ntwo, "{place}"' for place in self.drawn(problem)]

    def test_arrays_and_datasets(self, tmp_path, monkeypatch):
        place = np.arange(self.ROWS)
        x = np.stack([place + 0.5, place % 3, place % 5, place % 7], axis=1)
        for source in (x, np.asfortranarray(x)):
            np.savez(tmp_path / "data.npz", x=source, y=place % 2)
            with monkeypatch.context() as patch:
                patch.setattr(limits, "MOST_NUMBERS", 10**6)
                assert 2_700 < len(self.drawn(load(tmp_path / "data.npz"))) < 3_300
        refused("column by column", source=tmp_path / "data.npz", target=None)
        np.savez_compressed(tmp_path / "data.npz", x=x.reshape(-1, 2, 1, 2), y=place % 2)
        problem = load(tmp_path / "data.npz")
        assert problem.shape == (2, 1, 2)
        self.drawn(problem)
        self.drawn(load(TensorDataset(torch.from_numpy(x), torch.from_numpy(place % 2))))

    def test_data_frames_and_embeddings(self, tmp_path):
        problem = load(self.table(), target="y")
        self.drawn(problem)
        np.save(tmp_path / "e.npy", np.arange(self.ROWS * 10.0).reshape(-1, 10))
        problem = load(self.table(), target="y", embeddings=tmp_path / "e.npy")
        assert 900 < len(problem) < 1500
        np.testing.assert_array_equal(problem.features["embeddings[3]"], (problem.features["place"] - 0.5) * 10 + 3)

    def test_images(self, tmp_path, monkeypatch):
        monkeypatch.setattr(limits, "MOST_NUMBERS", 3 * 32 * 32 * 60)
        for n in range(200):
            (tmp_path / f"c{n % 2}").mkdir(exist_ok=True)
            Image.fromarray(grey(0, n)).save(tmp_path / f"c{n % 2}" / f"{n:03}.bmp")
        problem = load(tmp_path)
        assert 40 < len(problem) < 85
        expected = [grey(0, int(name[3:6])).ravel() / 255 for name in problem.ids]
        np.testing.assert_allclose(problem.features, expected, rtol=1e-6)
        said(problem, "of 200 images")

    def test_rows_too_wide(self, tmp_path):
        wide = pd.DataFrame(np.zeros((60, 300)), columns=[f"c{i}" for i in range(300)]).assign(y=[0, 1] * 30)
        wide.to_csv(tmp_path / "data.csv", index=False)
        wide.to_parquet(tmp_path / "data.parquet")
        for source in (tmp_path / "data.csv", tmp_path / "data.parquet", wide):
            refused("39 ", "12,000", source=source)

    def test_a_line_too_long(self, tmp_path, monkeypatch):
        monkeypatch.setattr(limits, "LONGEST_LINE", 10_000)
        (tmp_path / "data.csv").write_text("a,y\n1,2\n" + "x" * 3_000_000)
        refused("line 3", "longer than", source=tmp_path / "data.csv")


PEAK = """
import resource, sys
from lossary.compare.load import load
problem = load(sys.argv[1], target="y")
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(len(problem), len(problem.features.columns), peak)
print(problem.notes[0])
"""


@pytest.mark.slow
@pytest.mark.timeout(900)  # on a slow disk
def test_two_gigabytes(tmp_path):
    """Sampled within 2 GB of memory, by a process of its own."""
    if shutil.disk_usage(tmp_path).free < 4e9:
        pytest.skip("no room for two gigabytes")
    rng, path, block, rows = np.random.default_rng(0), tmp_path / "large.csv", 100_000, 0
    columns = {f"c{i}": rng.normal(size=block).round(4) for i in range(20)}
    text = pd.DataFrame(
        {**columns, "word": rng.choice(["red", "blue, dark"], block), "y": rng.choice(["no", "yes"], block)}
    )
    header, body = text.to_csv(index=False).encode().split(b"\n", 1)
    with open(path, "wb") as file:
        file.write(header + b"\n")
        while file.tell() < 2e9:
            file.write(body)
            rows += block
    done = subprocess.run([sys.executable, "-c", PEAK, str(path)], capture_output=True, text=True)
    path.unlink()
    assert done.returncode == 0, done.stderr
    numbers, note = done.stdout.splitlines()
    read, wide, gigabytes = map(float, numbers.split())
    assert limits.MOST_CELLS / 22 / 2.2 < read < limits.MOST_CELLS / 22
    assert wide == 21
    assert f"of {rows:,} rows" in note
    assert gigabytes < 2
