"""A user's own data by its path: what is guessed, repaired and refused."""

from pathlib import Path

import numpy as np
import pytest
from own_files import RNG, images, inside_path, series, texts
from PIL import Image

from patternsearch.cli import main
from patternsearch.config import load_config
from patternsearch.data.tables import read_table
from patternsearch.errors import TaskError
from patternsearch.task import checked, get_task


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_table_of_series():
    def edit(row, i):
        return [row[0], {7: "", 8: "N/A"}.get(i, row[1]), *row[2:]]

    task = get_task(series(edit=edit))
    data = checked(task)
    assert task.spec.channels == 2 and task.spec.horizon == 24 and task.spec.grid == (96,)
    assert "2 series (a, b)" in task.note and "missing numbers, interpolated: 2" in task.note
    assert "never changing in training and left out: 'c'" in task.note
    x, y = data.train
    assert np.array_equal(x[24][-24:], y[0]), "what follows the window"
    slope = np.diff(x[0][6:10, 0])
    assert np.allclose(slope, slope[0], atol=1e-5), "the gap is a straight line"
    config = load_config(task.name)
    assert config.task == task.name and config.train.batch == 16 and config.trials == 32


DAYS = ("Jan {:02}, 2020", "2020-01-{:02} 10:00:00 UTC", "Thu, 2 Jan {:02} 10:00 PM", "{} Mai 1999")


@pytest.mark.parametrize("day", DAYS)
def test_dates_are_no_texts(day):
    assert (
        "2 series (a, b)"
        in get_task(series(edit=lambda row, i: [f'"{day.format(i)}"', *row[1:]])).note
    )


def test_names_of_places_are_no_texts():
    cities = ("New York City", "Los Angeles", "Salt Lake City")
    task = get_task(series(edit=lambda row, i: [cities[i % 3], *row[1:]]))
    assert "2 series (a, b)" in task.note and "no numbers and left out: 'day'" in task.note


@pytest.mark.parametrize(
    ("name", "step", "kept"),
    [("", 1, False), ("", "gaps", False), ("", "mixed", False), ("", "wave", True),
     ("Unnamed: 0", 1, False), ("hour", 3600, False), ("total", "gaps", True), ("a", "wave", True)],
)  # fmt: skip
def test_a_first_column_that_numbers_the_rows(name, step, kept):
    t = np.arange(300)
    steps = {"gaps": t + t // 7, "wave": t % 9, 1: t, 3600: 3600 * t, "mixed": 7 * t % 300}
    first = steps[step]
    rows = [f"{n},{np.sin(i / 5):.4f},{i % 5}" for i, n in enumerate(first)]
    inside_path("n.csv").write_text("\n".join([f"{name},0,1", *rows]) + "\n")
    task = get_task("n.csv")
    assert task.spec.channels == 2 + kept
    assert kept != ("the number of the row and left out: " in task.note)
    if name:
        assert get_task(f"n.csv?columns={name}").spec.channels == 1


def test_a_column_that_changes_only_after_training():
    task = get_task(series(edit=lambda row, i: [*row[:3], "0.1" if i < 320 else "0.2"]))
    assert task.spec.channels == 2 and np.abs(task.load().test[0]).max() < 10
    assert "never changing in training and left out: 'c'" in task.note


def test_columns_and_horizon():
    task = get_task(series() + "?horizon=6&columns=b")
    assert task.spec.channels == 1 and task.spec.horizon == 6
    checked(task)
    for query, message in [
        ("horizon=99", "horizon=99 must be from 1 to 30"),
        ("horizon=x", "horizon=x must be from 1"),
        ("columns=dai", "no column 'dai'. Did you mean 'day'"),
        ("columns=day", "row 1 after the header: expected a number in column 'day', found 'd0'"),
        ("columns=", "no column ''"),
        ("horizon", "horizon= must be from 1"),
        ("horizont=3", "no option 'horizont'. Did you mean 'horizon'"),
    ]:
        with pytest.raises(TaskError, match=message.replace(".", r"\.")):
            get_task(f"{series()}?{query}")


@pytest.mark.parametrize(
    ("first", "names", "rows"),
    [
        ("day,0,b,17", ["day", "0", "b", "17"], 20),  # a word over numbers
        (",0,1,2", ["", "0", "1", "2"], 20),  # as pandas writes an index and plain columns
        ("0,1,2,3", [f"column {i}" for i in (1, 2, 3, 4)], 21),
        ("d,7,8,9", [f"column {i}" for i in (1, 2, 3, 4)], 21),
        ("d,b,0.5,9", [f"column {i}" for i in (1, 2, 3, 4)], 21),
        ("d1,b,c,e", [f"column {i}" for i in (1, 2, 3, 4)], 21),  # comes again
    ],
)
def test_what_is_a_header(first, names, rows):
    path = inside_path("h.csv")
    path.write_text("\n".join([first, *(f"d{i},{i},{i % 3},5.5" for i in range(20))]) + "\n")
    header, found = read_table(path)
    assert header == names and len(found) == rows


def test_counts_over_numbers_that_are_not_whole_are_names():
    inside_path("h.csv").write_text("0,1\n0.5,0.25\n,7.5\n")
    assert read_table(inside_path("h.csv"))[0] == ["0", "1"]


def test_parquet_is_like_csv():
    import pandas

    first = get_task(series())
    pandas.read_csv("s.csv").to_parquet("s.parquet")
    second = get_task(str(inside_path("s.parquet")))
    assert np.allclose(first.load().test[0], second.load().test[0], atol=1e-5)
    inside_path("broken.parquet").write_bytes(b"PAR1nothing")
    with pytest.raises(TaskError, match="expected a Parquet file"):
        get_task("broken.parquet")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda row, i: row[:-1] if i == 4 else row, "row 6: expected 4 cells .* found 3: 'd4, "),
        (lambda row, i: [row[0], "nan" if i % 3 else row[1], *row[2:]], "'a' lacks 266 of 400"),
        (lambda row, i: [row[0], "x" if i == 3 else row[1], *row[2:]], "row 4 after the header"),
        (lambda row, i: [row[0], "1", "2", "3"], "no column ever changes in the first 280 rows"),
        (lambda row, i: [row[0], row[1], "1,5", "3"], "row 2: expected 4 cells"),
        (lambda row, i: [row[0], row[1], f'"{i},5"', "3"], "'b' has numbers such as '0,5'; write"),
        (lambda row, i: [row[0], row[1], f"1'{100 + i}.5", "3"], "'b' has numbers such as "),
        (lambda row, i: [*row[:3], "1e20" if i == 350 else "1e-9" * (i % 2) or "0"], "1e.20 in c"),
        (lambda row, i: [*row[:3], "1e300" if i == 50 else "0"], r"'c' holds 1e\+300, too large"),
        (lambda row, i: ["x", "y", "z", f"w{i}"], "expected columns of numbers, found none"),
    ],
)
def test_series_that_are_refused(edit, message):
    with pytest.raises(TaskError, match=message):
        get_task(series(edit=edit))


def test_columns_of_one_name():
    path = series()
    inside_path("s.csv").write_text(inside_path("s.csv").read_text().replace("day,a,b", "day,a,a"))
    for name in (path, f"{path}?columns=a"):
        with pytest.raises(TaskError, match="column 'a' comes twice; name every column once"):
            get_task(name)
    with pytest.raises(TaskError, match="column 'c' comes twice"):
        get_task(f"{path}?columns=c,c")


def test_examples_to_classify_are_no_series():
    series()
    path = inside_path("s.csv")
    path.write_text(path.read_text().replace("day,a,b,c", "day,a,b,Label"))
    with pytest.raises(TaskError, match=r"beside a column 'Label' are examples .* \.npz arrays"):
        get_task("s.csv")
    assert get_task("s.csv?columns=a,b").spec.channels == 2


def test_where_a_path_leads(monkeypatch, tmp_path):
    """From home, with marks of its own, as a name of ours; files that changed are read again."""
    monkeypatch.setenv("HOME", str(tmp_path))
    x = RNG.rand(60, 6).astype("f4")
    np.savez("own.npz", x=x, y=np.arange(60) % 2)
    assert get_task("~/own.npz").spec.grid == (6,) and get_task("~/own.npz").name == "~/own.npz"
    with pytest.raises(TaskError, match="horizon are for tables"):
        get_task("own.npz?horizon=3")
    odd = series("what? #1.CSV")
    assert get_task(odd).spec.horizon == 24 and get_task(f"{odd}?horizon=3").spec.horizon == 3
    folder = images("digits")
    before = len(get_task(folder).load().train[0])
    Image.new("RGB", (20, 20)).save("digits/a/more.png")
    assert len(get_task(folder).load().train[0]) == before + 1


def test_cells_of_any_length():
    path = inside_path("long.csv")
    rows = [f'"{"a long text " * (12_000 if i == 9 else 1)} {i}",{i % 2}' for i in range(60)]
    path.write_text("\n".join(["text,label", *rows]))
    assert "2 classes in column 'label'" in get_task(str(path)).note


def test_too_few_rows_and_nothing_at_all():
    with pytest.raises(TaskError, match="3 rows; a series needs at least 200"):
        get_task(series(rows=3))
    inside_path("empty.csv").write_text("")
    with pytest.raises(TaskError, match="found nothing in it"):
        get_task("empty.csv")
    with pytest.raises(TaskError, match=r"no such file or folder, seen from .*a folder of images"):
        get_task("nowhere.csv")
    inside_path("what.xyz").write_text("?")
    with pytest.raises(TaskError, match="expected a folder of images per class"):
        get_task("what.xyz")


def test_labelled_texts():
    task = get_task(texts())
    data = checked(task)
    assert task.spec.classes == 2 and task.spec.grid == (32,) and task.space == "texts"
    assert [len(x) for x, _ in (data.train, data.valid, data.test)] == [72, 24, 24]
    assert "texts in column 'text', 2 classes in column 'label'" in task.note
    path = inside_path("t2.csv")
    path.write_text(inside_path("t.csv").read_text() + '"no label on this one here",\n')
    assert "rows without text or label were left out: 1" in get_task(str(path)).note


def test_which_columns_are_text_and_label():
    address = "https://example.org/" + "x" * 90
    rows = [f'web,{address}{i},"it says {i} again", {"ab"[i % 2]}' for i in range(60)]
    inside_path("w.csv").write_text("\n".join(["from,where,what,kind", *rows, rows[0].strip()]))
    note = get_task("w.csv").note
    assert "texts in column 'what', 2 classes in column 'kind'" in note


def test_texts_that_are_refused():
    with pytest.raises(TaskError, match="two classes or more must be in column 'label', found 'f"):
        get_task(texts("one.csv", classes=("fox",)))
    with pytest.raises(TaskError, match="3 texts with a label; 50 are the least"):
        get_task(texts("few.csv", rows=3))
    path = inside_path("latin.csv")
    path.write_bytes(inside_path("few.csv").read_bytes().replace(b"loudly", b"gr\xfcn", 1))
    with pytest.raises(TaskError, match=r"latin.csv, line 2: expected UTF-8 text, .* iconv"):
        get_task(str(path))
    path.write_bytes(RNG.bytes(3000) + b"\0")
    with pytest.raises(TaskError, match=r"latin.csv: expected a text file, found bytes that are"):
        get_task(str(path))
    path.write_text(inside_path("few.csv").read_text().replace('"the', 'the "', 1) + '"open,fox\n"')
    with pytest.raises(TaskError, match="row 2: expected 2 cells like the first row, found 3"):
        get_task(str(path))
    path.write_text(inside_path("few.csv").read_text() + '"open,fox\nthe next,hen\n')
    with pytest.raises(TaskError, match="row 5: a quotation mark is left open; close"):
        get_task(str(path))
    path.write_text("".join(f"fox\t{chr(34) * (i == 99)}the quick fox {i}\n" for i in range(200)))
    with pytest.raises(TaskError, match="row 100: a quotation mark is left open"):
        get_task(str(path))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("delimiter", [";", "|"])
def test_how_tables_are_written(encoding, newline, delimiter):
    path = Path(series())
    plain = path.read_text()
    path.write_bytes(plain.replace(",", delimiter).replace("\n", newline).encode(encoding))
    assert "2 series (a, b)" in get_task(str(path)).note


def test_plain_text():
    path = inside_path("l.txt")
    path.write_text("".join(f"line {i} of a text, says {'abcd'[i % 4]}\n" for i in range(300)))
    task = get_task(str(path))
    data = checked(task)
    assert "the next character in windows of 64" in task.note and task.spec.causal
    assert np.array_equal(data.train[0][0, 1:], data.train[1][0, :-1])
    path = inside_path("w.txt")
    path.write_text("".join(f"w{i % 50} says w{i % 7}\n" for i in range(13_000)))
    assert "running text of 52,000 words, 53 told apart" in get_task(str(path)).note
    inside_path("short.txt").write_text("too short")
    with pytest.raises(TaskError, match="9 characters; a language model needs at least 2,000"):
        get_task("short.txt")
    inside_path("same.txt").write_text("a" * 3000)
    with pytest.raises(TaskError, match="only 'a' in it"):
        get_task("same.txt")


def says(capsys, *arguments, command="sweep") -> tuple[str, str]:
    with pytest.raises(SystemExit):
        main([command, *arguments])
    return capsys.readouterr()


@pytest.mark.parametrize("make", [series, texts, images], ids=["series", "texts", "images"])
def test_the_command_says_what_it_guessed(make, capsys):
    out, err = says(capsys, "--data", make(), "--dry-run")
    assert not err and out.splitlines()[0].startswith(str(inside_path("")))
    assert "space       " in out and "search      32 trials" in out and "left out:" not in out[500:]


def test_options_of_the_command(capsys):
    images("digits")  # not the task of this name
    assert "digits: images in a folder a class" in says(capsys, "--data", "digits", "--dry-run")[0]
    path = series()
    out, _ = says(capsys, "--data", path, "--columns", "a,b", "--horizon", "6", "--dry-run")
    assert "2 series (a, b), 6 rows ahead" in out
    assert "or give --data PATH" in says(capsys, "--dry-run")[1]
    assert "--data is empty" in says(capsys, "--data", "")[1]
    assert "/x.csv: no path: " in says(capsys, "--data", "~nobody-of-this-name/x.csv")[1]
    assert "no path: " in says(capsys, "--data", f"{'x' * 300}.csv")[1]
    assert "are for --data without a task" in says(capsys, "digits", "--horizon", "3")[1]
    assert "error: " in says(capsys, "--data", "nowhere.csv")[1]


def test_a_sweep_of_ones_own_series(stocked, capsys):
    """From the file to the best pattern, trained again with its test errors."""
    path = series()
    out, err = says(
        capsys, "--data", path, "--trials", "1", "--executor", "inline", "--name", "own",
        "--set", "train.epochs=2", "--columns", "a"
    )  # fmt: skip
    assert "best: mse" in out, err
    with pytest.raises(SystemExit):
        main(["train", "sweeps/own/best.yaml"])
    out = capsys.readouterr().out
    assert "equal to the logged" in out and "test mse: " in out and "test mae: " in out


def test_a_comparison_on_ones_own_series(stocked, capsys):
    """What was guessed, then the same table as of a published set."""
    out, err = says(
        capsys, "--data", series("what? #1.csv"), "--columns", "a", "--horizon", "3", "--trials",
        "1", "--seeds", "2", "--executor", "inline", "--set", "train.epochs=1", command="compare",
    )  # fmt: skip
    assert not err and "1 series (a), 3 rows ahead" in out.splitlines()[0]
    table = inside_path("comparisons/what-1-small/compare.md").read_text()
    assert "| native | **" in table and " of its parameters and " in table
    assert "or give --data PATH" in says(capsys, command="compare")[1]
