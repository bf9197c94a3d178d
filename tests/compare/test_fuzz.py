"""Files damaged in every way that comes to mind: refused in one line, or read as an independent reader reads them."""

import io
import json
import shutil

import numpy as np
import pandas as pd
import pytest

from lossary.compare.load import load
from lossary.errors import BadInput

ROWS = 60
JUNK = [b'"', b",", b"\n", b"\r", b";", b"\xff", b"\0", b"inf", b"NA", b"'", b"-", b"\t", b"1e999", b"", b"\xe9", b" "]
JUNK += [
    b"9" * 400,
    b'""',
    b"\r\n",
    b"\xef\xbb\xbf",
    b"nan",
    b"True",
    b"\x80" * 9,
    b"\0" * 16,
    b"\xff" * 8,
    b"|",
    b"1,5",
]


def mangled(rng, good):
    """The bytes overwritten, cut out, repeated, flipped, swapped or cut off at one or two random places."""
    content = bytearray(good)
    for _ in range(rng.integers(1, 3)):
        start, width, what = int(rng.integers(len(content) + 1)), int(rng.integers(0, 9)), rng.integers(12)
        if what < 3:
            content[start : start + width // 2] = JUNK[rng.integers(len(JUNK))] * int(rng.integers(1, 3))
        elif what < 4:
            content[start:start] = content[start : start + width]
        elif what < 9 and len(content):
            content[min(start, len(content) - 1)] ^= 1 << int(rng.integers(8))
        elif what == 9:
            content[start : start + width] = b""
        elif what == 10:
            end = int(rng.integers(len(content) + 1))
            one, two = content[start : start + width], content[end : end + width]
            content[start : start + width], content[end : end + width] = two, one
        else:
            content = content[:start]
    return bytes(content)


def frame(rng):
    return pd.DataFrame(
        {
            "a": rng.normal(size=ROWS).round(3),
            "b": rng.choice(["red", "blue, dark", "x"], ROWS),
            "c": rng.integers(0, 5, ROWS),
            "y": rng.choice(["no", "yes"], ROWS),
        }
    )


def outcome(source, **arguments):
    """The problem, or None where it is refused in one line."""
    refusal = None
    try:
        problem = load(source, **arguments)
    except BadInput as error:
        refusal = str(error)
    if refusal is not None:
        assert len(refusal.splitlines()) == 1
        assert len(refusal) < 900
        return None
    assert len(problem) >= 50
    assert np.isfinite(problem.target).all()
    return problem


def agree(problem, expected):
    """Every feature and the target say what the expected columns say, on the rows whose target is known."""
    known = expected[problem.target_name].notna().to_numpy()
    if problem.classes:
        said = np.array(problem.classes)[problem.target]
        meant = [
            str(int(v)) if isinstance(v, float) and v.is_integer() else str(v)
            for v in expected[problem.target_name][known]
        ]
        assert said.tolist() == [word.strip() for word in meant]
    else:
        np.testing.assert_allclose(problem.target, expected[problem.target_name][known].astype(float), rtol=1e-9)
    for name, values in problem.features.items():
        meant = expected[name][known]
        if values.dtype.kind in "biuf":
            np.testing.assert_allclose(values.astype(float), pd.to_numeric(meant, errors="coerce"), rtol=1e-7)
        else:
            assert values.fillna("").tolist() == [str(v).strip() if pd.notna(v) else "" for v in meant]


def tokens(text, separator):
    """Fields of a table, cut by hand: quotes only at the start of a field, two of them for one."""
    rows, row, field, state = [], [], "", "start"
    for mark in [*text, "\n"]:
        if state == "quoted":
            state, field = ("closing", field) if mark == '"' else (state, field + mark)
            continue
        if state == "closing" and mark == '"':
            state, field = "quoted", field + '"'
        elif mark in ("\n", "\r", separator):
            row.append(field)
            field, state = "", "start"
            if mark != separator:
                if any(row) or len(row) > 1:
                    rows.append(row)
                row = []
        elif state == "start" and mark == '"':
            state = "quoted"
        elif state == "start" and mark == " ":
            pass
        else:
            state, field = "plain", field + mark
    return rows


def csv_table(content):
    text = content.decode("utf-8-sig")
    header = next(line for line in text.replace("\r", "\n").split("\n") if line.strip())
    separator = next((mark for mark in ",\t;|" if mark in header), ",")
    header, *rows = tokens(text, separator)
    return pd.DataFrame(rows, columns=[name or f"Unnamed: {place}" for place, name in enumerate(header)])


MISSING = ["", "NA", "N/A", "n/a", "#N/A", "<NA>", "NaN", "nan", "NULL", "null", "?"]


class Csv:
    """Text; damage includes odd encodings, names twice and columns without values."""

    def write(self, rng, path):
        table = frame(rng)
        kind = rng.integers(20)
        if kind == 0:
            table = table.rename(columns={"b": "a"})
        elif kind == 1:
            table["c"] = None
        text = table.to_csv(index=False, lineterminator=str(rng.choice(["\n", "\r\n", "\r"])))
        content = text.encode(str(rng.choice(["utf-16", "latin-1", "utf-8-sig"])) if kind == 2 else "utf-8")
        path = path / "data.csv"
        path.write_bytes(content if kind < 2 else mangled(rng, content))
        return path, {"target": "y"}

    def read(self, path):
        table = csv_table(path.read_bytes())
        table = table.apply(lambda values: values.str.strip())
        return table.where(~table.isin(MISSING))


class Parquet:
    def write(self, rng, path):
        path = path / "data.parquet"
        table = frame(rng)
        table.to_parquet(path, row_group_size=25, compression=[None, "snappy", "zstd"][rng.integers(3)])
        path.write_bytes(mangled(rng, path.read_bytes()))
        return path, {"target": "y"}

    def read(self, path):
        import pyarrow.parquet as pq

        return pq.ParquetFile(path).read().replace_schema_metadata().to_pandas()


class Arrow:
    def write(self, rng, path):
        import pyarrow as pa

        table, path = pa.Table.from_pandas(frame(rng)), path / "data.arrow"
        opened = pa.ipc.new_file if rng.random() < 0.5 else pa.ipc.new_stream
        with opened(path, table.schema) as file:
            file.write_table(table, max_chunksize=25)
        path.write_bytes(mangled(rng, path.read_bytes()))
        return path, {"target": "y"}

    def read(self, path):
        import pyarrow as pa

        content = path.read_bytes()
        opened = pa.ipc.open_file if content.startswith(b"ARROW1") else pa.ipc.open_stream
        return opened(content).read_all().replace_schema_metadata().to_pandas()


class Npz:
    """Also objects that would have to be unpickled, and lengths that do not match."""

    def write(self, rng, path):
        table, path, kind = frame(rng), path / "data.npz", rng.integers(8)
        x, y = table[["a", "c"]].to_numpy(float), table["y"].to_numpy(str)
        arrays = {"x": x, "y": y, "more": rng.normal(size=ROWS)}
        if kind == 0:
            arrays["y"] = y.astype(object)
        elif kind == 1:
            arrays["x"] = x[:-1]
        (np.savez_compressed if rng.random() < 0.5 else np.savez)(path, **arrays)
        if kind > 1:
            path.write_bytes(mangled(rng, path.read_bytes()))
        return path, {}

    def read(self, path):
        with np.load(path, allow_pickle=False) as arrays:
            x, y = arrays["x"], arrays["y"]
        return pd.DataFrame({"x0": x[:, 0], "x1": x[:, 1], "y": y})


class Npy:
    """Embeddings beside a good table."""

    def write(self, rng, path):
        beside, path = path / "data.csv", path / "data.npy"
        frame(rng).to_csv(beside, index=False)
        np.save(path, rng.normal(size=(ROWS, 4)).astype(np.float32))
        path.write_bytes(mangled(rng, path.read_bytes()))
        return beside, {"target": "y", "embeddings": path}

    def read(self, path):
        values = np.load(path.with_suffix(".npy"), allow_pickle=False)
        table = pd.DataFrame(values, columns=[f"embeddings[{i}]" for i in range(values.shape[1])])
        return pd.concat([pd.read_csv(path), table], axis=1)


class Images:
    """One of many is damaged."""

    def __init__(self):
        from PIL import Image

        rng, self.good = np.random.default_rng(0), {}
        for number in range(52):
            kind, file = ("png", "bmp", "jpeg", "gif")[number % 4], io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (6, 6), dtype=np.uint8)).save(file, kind)
            self.good[f"data/{('cats', 'dogs')[number % 3 % 2]}/{number}.{kind}"] = file.getvalue()

    def write(self, rng, path):
        damaged = rng.choice(list(self.good), 1)
        for name, content in self.good.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(mangled(rng, content) if name in damaged else content)
        return path / "data", {}

    def read(self, path):
        from PIL import Image

        files, images = sorted(path.rglob("*.*")), []
        for file in files:
            with Image.open(file) as image:
                images.append(image.copy())
        colour = any(image.mode not in ("1", "L", "LA") for image in images)  # damage may say so
        rows = []
        for file, image in zip(files, images):
            small = image.convert("RGB" if colour else "L").resize((6, 6), Image.Resampling.BILINEAR)
            values = np.asarray(small).reshape(36, -1).T.ravel() / 255
            rows.append({f"pixel[{i}]": value for i, value in enumerate(values)} | {"class": file.parent.name})
        return pd.DataFrame(rows)


class Saved:
    """A Hugging Face dataset on disk: one of its three files is damaged."""

    def write(self, rng, path):
        import pyarrow as pa

        saved = path / "data"
        saved.mkdir()
        table = frame(rng)
        values = {name: {"dtype": kind, "_type": "Value"} for name, kind in zip("abc", ("float64", "string", "int64"))}
        label = {"names": ["no", "yes"], "_type": "ClassLabel"}
        table = pa.Table.from_pandas(table.assign(y=(table["y"] == "yes").astype(int)))
        with pa.ipc.new_stream(saved / "data-00000-of-00001.arrow", table.schema) as file:
            file.write_table(table, max_chunksize=25)
        info = {"citation": "", "description": "", "features": {**values, "y": label}}
        (saved / "dataset_info.json").write_text(json.dumps(info, indent=2))
        state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_fingerprint": "0", "_split": None}
        (saved / "state.json").write_text(json.dumps(state, indent=2))
        damaged = sorted(saved.iterdir())[rng.integers(3)]
        damaged.write_bytes(mangled(rng, damaged.read_bytes()))
        return saved, {"target": "y"}

    def read(self, path):
        import pyarrow as pa

        content = next(path.glob("*.arrow")).read_bytes()
        table = pa.ipc.open_stream(content).read_all().replace_schema_metadata().to_pandas()
        names = json.loads((path / "dataset_info.json").read_text())["features"]["y"]["names"]
        return table.assign(y=[names[code] if code >= 0 else None for code in table["y"]])


# What is damaged, how many times in the ordinary and in the slow form. Together 210 and 2,200.
FORMATS = {
    Csv: (60, 600),
    Parquet: (30, 350),
    Arrow: (30, 350),
    Npz: (35, 350),
    Npy: (20, 200),
    Images: (10, 100),
    Saved: (25, 250),
}


def damage(kind, seeds, path):
    """How many of these damaged files were read; the others were refused."""
    made, read = kind(), 0
    for seed in seeds:
        folder = path / str(seed)
        folder.mkdir()
        source, arguments = made.write(np.random.default_rng(seed), folder)
        problem = outcome(source, **arguments)
        if problem is not None:
            read += 1
            agree(problem, made.read(source))
        shutil.rmtree(folder)
    return read


@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_files_are_refused_or_read_as_they_stand(kind, tmp_path):
    times = FORMATS[kind][0]
    assert 0 < damage(kind, range(times), tmp_path) < times


@pytest.mark.slow
@pytest.mark.parametrize("kind", FORMATS)
def test_many_damaged_files(kind, tmp_path):
    times = FORMATS[kind][1]
    assert times / 20 < damage(kind, range(10_000, 10_000 + times), tmp_path) < times


def test_the_comparison_finds_a_wrong_value(tmp_path):
    """Otherwise the tests above could not fail."""
    path, arguments = Parquet().write(np.random.default_rng(3), tmp_path)
    frame(np.random.default_rng(3)).to_parquet(path)
    problem, expected = load(path, **arguments), Parquet().read(path)
    agree(problem, expected)
    for name, value in (("a", 0.5), ("b", "blue"), ("y", "maybe")):
        wrong = expected.copy()
        wrong.loc[7, name] = value
        with pytest.raises(AssertionError):
            agree(problem, wrong)
