"""How rows are dealt: what stays together, what is kept in proportion, what comes later."""

import re

import numpy as np
import pandas as pd
import pytest

from lossary.compare.problem import Problem, deal, folds, lock, splits
from lossary.errors import BadInput


def problem(features, target, group=None, **more):
    target = np.asarray(target)
    task = "real" if target.dtype == np.float64 else "classes" if target.ndim == 1 else "multilabel"
    names = np.unique(target) if task == "classes" else range(target.shape[-1] if target.ndim == 2 else 0)
    return Problem("p", "p", pd.DataFrame(features), target, "y", task, tuple(map(str, names)), group, **more)


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

    def test_copies_stay_together_in_what_is_left_of_a_table(self):
        """Of twelve rows, each in a twelfth of the table, three are locked: the others are each in a ninth of the rest,
        which is more than would be kept together in a table of its own."""
        x = np.arange(480) % 12
        p = problem({"x": x.astype(float)}, (x % 3 == 0).astype(np.int64))
        search, locked = lock(p)
        assert len(locked) == 120
        assert p.parted == 0
        rows = p.rows(search)
        assert problem({"x": rows.features["x"]}, rows.target).parted == 360
        assert rows.parted == 0
        for train, test in splits(rows, 5, np.random.default_rng(0)):
            assert not set(rows.patterns[train]) & set(rows.patterns[test])

    def test_one_of_each_is_no_surplus(self):
        """Rows in pairs, the two of each in groups next to each other: all hang together. In groups of their own
        none does."""
        x, pair = np.random.default_rng(0).normal(size=(100, 2))[np.arange(200) % 100], np.arange(200) % 100
        chain = problem(x, pair % 2, np.where(np.arange(200) < 100, pair, (pair + 1) % 100))
        assert len(chain.surplus) == 100
        assert len(set(chain.patterns[np.setdiff1d(np.arange(200), chain.surplus)])) == 100
        assert 30 < (chain.surplus < 100).sum() < 70  # the first as often as the second
        assert chain.parted == 200
        assert "200 have an equal one that a split may put on the other side" in chain.repeats
        own = problem(x, pair % 2, pair)
        assert len(own.surplus) == own.parted == 0
        assert own.repeats == "Splits keep rows with equal features together."

    @pytest.mark.parametrize(("levels", "columns", "rows"), [(4, 5, 300), (3, 8, 3000), (10, 3, 1000)])
    def test_rows_are_equal_by_chance_or_copied(self, levels, columns, rows):
        """(n - 1) / levels ** columns twins are expected of n rows."""
        rng = np.random.default_rng(0)
        x = rng.integers(0, levels, (rows, columns)).astype(float)
        y = (x.sum(1) > x.sum(1).mean()).astype(np.int64)
        assert problem(x, y).crowded
        assert not problem(np.tile(np.hstack([x, rng.normal(size=(rows, 1))]), (2, 1)), np.tile(y, 2)).crowded
        noisy = problem(x, rng.integers(0, 2, rows))
        assert noisy.coarse == (levels == 10)  # where more than half of the rows have a twin
        assert not problem(x + rng.normal(size=(rows, columns)), y).crowded

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


class TestTests:
    """Rows that the caller set aside."""

    def make(self, x, test=range(70, 100), y=None, **more):
        y = np.arange(100) % 2 if y is None else y
        return problem({"x": np.asarray(x, dtype=float)}, y, test=np.array(test), **more)

    def test_they_are_locked_whatever_their_number(self):
        for test in ([3, 1, 99], range(10, 90)):
            search, locked = lock(self.make(range(100), test), seed=5)
            assert locked.tolist() == sorted(test)
            assert sorted([*search, *locked]) == list(range(100))

    def test_copies_are_left_out(self):
        x = np.arange(100)
        x[[0, 5, 71]] = x[70]
        p = self.make(x)
        assert p.leaked.tolist() == [0, 5]
        assert lock(p)[0].tolist() == [i for i in range(70) if i not in (0, 5)]
        assert lock(p)[1].tolist() == list(range(70, 100))

    def test_groups_are_left_out(self):
        p = self.make(range(100), group=np.arange(100) % 97)
        assert lock(p)[0].tolist() == [i for i in range(70) if i > 2]

    def test_equal_rows_of_a_coarse_table_are_no_copies(self):
        rng = np.random.default_rng(0)
        p = self.make(rng.integers(0, 3, 100), y=rng.integers(0, 2, 100))
        assert p.coarse
        assert len(p.leaked) == 0

    def test_classes_without_rows_to_learn_from(self):
        y = np.where(np.arange(100) < 80, np.arange(100) % 2, 2)
        with pytest.raises(BadInput, match="no row of '2' is left"):
            lock(self.make(range(100), y=y))
        labels = np.stack([np.arange(100) % 2, np.arange(100) > 75], axis=1).astype(np.int64)
        with pytest.raises(BadInput, match="no row of '1' is left"):
            lock(self.make(range(100), y=labels))
        with pytest.raises(BadInput, match="no row is left"):
            lock(self.make([3] * 2 + [4] * 98, range(100), y=np.arange(100.0)))

    def test_rows_keep_theirs(self):
        p = self.make(range(100))
        assert p.rows(np.array([99, 4, 70])).test.tolist() == [0, 2]
        assert p.rows(lock(p)[0]).test is None


class TestTime:
    def make(self, rows=400, times=60, seed=0, **more):
        rng = np.random.default_rng(seed)
        time = rng.integers(0, times, rows).astype(float)
        return problem({"x": rng.normal(size=rows)}, rng.integers(0, 2, rows), time=time, **more)

    def test_the_latest_quarter_is_locked(self):
        for seed in range(20):
            p = self.make(seed=seed)
            search, locked = lock(p)
            assert p.time[search].max() < p.time[locked].min()  # ties whole
            assert sorted([*search, *locked]) == list(range(400))
            largest = np.bincount(p.time.astype(int)).max()
            assert abs(len(locked) - 100) <= largest / 2

    def test_different_times_give_exactly_a_quarter(self):
        order = np.random.default_rng(0).permutation(200)
        p = problem({"x": np.arange(200.0)}, np.arange(200) % 2, time=order.astype(float))
        assert sorted(order[lock(p)[1]]) == list(range(150, 200))

    def test_groups_and_copies_go_by_their_latest_row(self):
        time, group = np.arange(100.0), np.arange(100)
        group[10] = 99
        x = np.arange(100.0)
        x[20] = x[98]
        p = problem({"x": x}, np.arange(100) % 2, group, time=time)
        _, locked = lock(p)
        assert {10, 20} < set(locked)
        assert len(locked) == 25
        for train, test in splits(p, 5, np.random.default_rng(0)):
            assert 10 not in train
            assert 20 not in train
            assert len(np.intersect1d(train, test)) == 0

    def test_folds_are_tested_on_what_is_later(self):
        for seed in range(20):
            p = self.make(seed=seed)
            found = splits(p, 5, np.random.default_rng(seed))
            assert len(found) == 5
            seen = np.zeros(400, dtype=int)
            for (train, test), (after, _) in zip(found, [*found[1:], (None, None)]):
                assert p.time[train].max() < p.time[test].min()
                assert np.array_equal(train, np.flatnonzero(p.time < p.time[test].min()))  # all that is before
                assert after is None or np.array_equal(np.sort([*train, *test]), after)
                seen[test] += 1
            assert np.array_equal(seen, (p.time >= p.time[found[0][1]].min()).astype(int))
            sizes = [len(found[0][0]), *(len(test) for _, test in found)]
            assert min(sizes) > 400 / 6 / 2 - 10
            assert max(sizes) < 400 / 6 * 1.5 + 10

    def test_partitions_differ_by_seed_alone(self):
        p = self.make(2000, 2000)
        first, again, other = (splits(p, 4, np.random.default_rng(seed)) for seed in (1, 1, 2))
        assert all(np.array_equal(a[1], b[1]) for a, b in zip(first, again))
        assert not any(np.array_equal(a[1], b[1]) for a, b in zip(first, other))

    def test_as_few_times_as_there_are_blocks(self):
        p = problem({"x": np.arange(90.0)}, np.arange(90) % 2, time=np.repeat(np.arange(6.0), [80, 2, 2, 2, 2, 2]))
        assert [len(test) for _, test in splits(p, 5, np.random.default_rng(0))] == [2] * 5
        for number in (1, 5):
            few = p.rows(np.flatnonzero(p.time < number))
            with pytest.raises(BadInput, match=f"{number} different time.*--time"):
                splits(few, 5, np.random.default_rng(0))
        with pytest.raises(BadInput, match="--time"):
            lock(p.rows(np.arange(80)))

    def test_groups_that_reach_to_the_end(self):
        group = np.arange(400) % 20
        with pytest.raises(BadInput, match="1 different time"):
            lock(problem({"x": np.arange(400.0)}, np.arange(400) % 2, group, time=np.repeat(np.arange(20.0), 20)))

    def test_a_class_that_comes_late(self):
        y = np.where(np.arange(100) > 90, 2, np.arange(100) % 2)
        with pytest.raises(BadInput, match=r"'2'.*--time"):
            lock(problem({"x": np.arange(100.0)}, y, time=np.arange(100.0)))

    def test_without_a_time_they_are_the_folds(self):
        p = problem({"x": np.arange(100.0)}, np.arange(100) % 2)
        fold = folds(p, 4, np.random.default_rng(3))
        for k, (train, test) in enumerate(splits(p, 4, np.random.default_rng(3))):
            assert test.tolist() == np.flatnonzero(fold == k).tolist()
            assert train.tolist() == np.flatnonzero(fold != k).tolist()


class TestLabels:
    def test_strata_are_the_rarest_label(self):
        y = np.array([[1, 1, 0], [1, 0, 0], [0, 0, 0], [1, 0, 1], [0, 1, 1], [1, 1, 1], [0, 1, 0]])
        p = problem({"x": np.arange(7.0)}, y)
        assert p.strata.tolist() == [0, 0, 3, 2, 2, 2, 1]  # 4, 4 and 3 rows; the first of equally rare ones

    def test_every_label_in_proportion(self):
        rng = np.random.default_rng(0)
        y = np.stack([rng.random(1000) < share for share in (0.02, 0.3, 0.6)], axis=1).astype(np.int64)
        p = problem({"x": np.arange(1000.0)}, y)
        _, locked = lock(p)
        assert len(locked) == 250
        assert abs(y[locked, 0].sum() - y[:, 0].sum() / 4) < 1
        assert np.abs(y[locked].mean(0) - y.mean(0)).max() < 0.05

    def test_coarse_by_the_whole_target(self):
        rng = np.random.default_rng(0)
        x = rng.integers(0, 4, 200).astype(float)
        same = np.stack([x > 1, x > 2], axis=1).astype(np.int64)
        assert not problem({"x": x}, same).coarse
        assert problem({"x": x}, rng.integers(0, 2, (200, 2))).coarse


class TestProblem:
    def test_rows(self):
        more = {"time": np.arange(6.0), "weight": np.arange(6.0), "ids": np.array(list("abcdef"), dtype=object)}
        p = problem({"x": np.arange(6.0)}, np.array([0, 1, 0, 1, 0, 1]), np.arange(6), shape=(1, 1, 1), **more)
        some = p.rows(np.array([4, 1]))
        assert (
            some.features["x"].tolist() == some.group.tolist() == some.time.tolist() == some.weight.tolist() == [4, 1]
        )
        assert some.features.index.tolist() == [0, 1]
        assert some.target.tolist() == [0, 1]
        assert some.ids.tolist() == ["e", "b"]
        assert some.shape == (1, 1, 1)
        assert len(some) == 2
        labels = problem({"x": np.arange(3.0)}, np.eye(3, dtype=np.int64)).rows(np.array([2, 0]))
        assert labels.target.tolist() == [[0, 0, 1], [1, 0, 0]]

    def test_outputs(self):
        x = {"x": np.arange(6.0)}
        assert problem(x, np.arange(6) % 3).outputs == 3
        assert problem(x, np.zeros((6, 4), dtype=np.int64)).outputs == 4
        assert problem(x, np.arange(6.0)).outputs == 1

    def test_digest_sees_every_value_and_nothing_else(self):
        def digest(x=(1.0, 2.0), y=(0, 1), name="x", called="p", group=None, **more):
            made = problem({name: list(x)}, np.array(y), group, **more)
            return Problem(**{**vars(made), "name": called, "notes": (called,)}).digest

        assert re.fullmatch(r"[0-9a-f]{64}", digest())
        assert digest() == digest(called="other")
        two = np.array([0.0, 1.0])
        others = [digest(x=(1.0, 2.5)), digest(y=(1, 0)), digest(name="z"), digest(group=np.array([0, 1]))]
        others += [digest(time=two), digest(weight=two), digest(ids=np.array(["a", "b"], dtype=object))]
        others += [digest(test=np.array([0])), digest(test=np.array([1])), digest(shape=(1, 1)), digest(time=two[::-1])]
        assert len({digest(), *others}) == 12
