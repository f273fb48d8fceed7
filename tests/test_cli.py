"""Every command on the demo data, and one clear sentence for every mistake."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from command_lines import assert_one_sentence, overriding
from small_dataset import ROWS, write

from mgrad_jax.cli import main

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the quickest model."""
    out = tmp_path_factory.mktemp("runs") / "run"
    assert main(["train", *MODEL, "--data", "demo", "--epochs", "3", "--out", str(out)]) == 0
    return out


MODEL = ["--model", "vbpr", "--set", "embedding_dim=8"]


def words(text: str) -> str:
    """A sentence as one line, whatever the terminal's width."""
    return " ".join(text.split())


# --- commands ---------------------------------------------------------------------------------------------------------


def test_train_writes_a_run_and_prints_a_table(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["train", *MODEL, "--data", "demo", "--no-mirror", "--epochs", "2", "--set", "reg_weight=1e-3"]
    assert main([*arguments, "--optimizer", "sgd", "--optimizer-arg", "momentum=0.9", "--max-norm", "1.0"]) == 0
    captured = capfd.readouterr()
    assert captured.err == ""
    assert "vbpr on demo, plain, seed 999" in captured.out
    assert "recall" in captured.out
    result = json.loads((tmp_path / "runs" / "vbpr-demo-plain-s999" / "result.json").read_text())
    assert result["mirror"] is None
    assert result["hyper_parameters"]["reg_weight"] == 1e-3
    assert result["optimizer"]["momentum"] == 0.9
    assert {
        "model",
        "data",
        "seed",
        "epochs_run",
        "best_epoch",
        "valid",
        "test",
        "seconds",
        "device",
        "versions",
    } <= set(result)


def test_replay_is_named_in_the_result(tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = ["train", *MODEL, "--data", "demo", "--replay", "--interval", "2", "--epochs", "1", "--out", str(out)]
    assert main(arguments) == 0
    result = json.loads((out / "result.json").read_text())
    assert (result["training"], result["mirror"], result["replay"]) == ("replay", None, {"interval": 2})


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("sam", {"rho": 0.1}),
        pytest.param("ssam-f", {"rho": 0.1, "sparsity": 0.5, "fisher_samples": 4}, marks=pytest.mark.slow),
        pytest.param("ssam-d", {"refresh_epochs": 1}, marks=pytest.mark.slow),
    ],
)
def test_flat_minima(method: str, arguments: dict[str, float], tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = ["train", *MODEL, "--data", "demo", "--epochs", "1", "--out", str(out), "--flat-minima", method]
    for name, value in arguments.items():
        command += ["--flat-minima-arg", f"{name}={value}"]
    assert main(command) == 0
    assert json.loads((out / "result.json").read_text())["training"] == method
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert (config["training"], config["flat_minima_args"]) == (method, arguments)
    assert main(["evaluate", str(out)]) == 0


def test_evaluate_repeats_the_result(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "users.csv"
    assert main(["evaluate", str(run), "--per-user", str(file)]) == 0
    assert "vbpr on demo" in capfd.readouterr().out
    per_user = pd.read_csv(file)
    test = json.loads((run / "result.json").read_text())["test"]
    assert len(per_user) == 600
    for name, value in test.items():
        assert per_user[name].mean() == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_recommend(run: Path, tmp_path: Path, suffix: str) -> None:
    from mgrad_jax.data import load_interactions

    users, output = tmp_path / "users.txt", tmp_path / f"lists.{suffix}"
    users.write_text("user\n5\n3\n5\n")
    assert main(["recommend", str(run), "--top-k", "7", "--users", str(users), "--output", str(output)]) == 0
    table = pd.read_csv(output) if suffix == "csv" else pd.read_parquet(output)
    assert list(table.columns) == ["user", "rank", "item", "score"]
    assert table["user"].tolist() == [5] * 7 + [3] * 7
    assert table["rank"].tolist() == [*range(1, 8)] * 2
    train = load_interactions("demo").train
    for user, rows in table.groupby("user"):
        assert not set(rows["item"]) & set(train[train[:, 0] == user, 1])
        assert (np.diff(rows["score"]) <= 0).all()
    assert not list(tmp_path.glob(".*"))


def test_recommend_for_all_users_and_more_items_than_there_are(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "lists.parquet"
    assert main(["recommend", str(run), "--top-k", "1000", "--output", str(output)]) == 0
    table = pd.read_parquet(output)
    assert table["user"].nunique() == 600
    assert table.groupby("user").size().eq(400 - 12).all()  # all but the user's training items


def test_info(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "demo"]) == 0
    out = capfd.readouterr().out
    assert "8,400" in out
    assert "96.5" in out


def test_models(capfd: pytest.CaptureFixture[str]) -> None:
    from mgrad_jax import models

    assert main(["models"]) == 0
    out = capfd.readouterr().out
    assert all(name in out for name in models.names())
    assert "reg_weight" in out


def test_one_model_is_shown_with_ranges_and_published_grid(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "slmrec"]) == 0
    out = capfd.readouterr().out
    row = next(line for line in out.splitlines() if "ssl_temp" in line)
    cells = [cell.strip() for cell in row.split("│")[1:-1]]
    assert cells == ["ssl_temp", "float", "0.2", "> 0", "yes", "0.1, 0.2, 0.5, 1.0", cells[-1]]
    assert "published grid of learning_rate: 0.0001, 0.001, 0.01, 0.1" in out
    assert "needs image and text" in out
    assert main(["models", "popularity"]) == 0
    assert "popularity ranks by" in capfd.readouterr().out
    code = main(["models", "slmrek"])
    assert_one_sentence(code, capfd.readouterr(), "did you mean slmrec?")


def test_prepare_then_info(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    pairs = np.argwhere(rng.random((30, 20)) < 0.6)
    raw = tmp_path / "raw.csv"
    pd.DataFrame({"user": pairs[:, 0], "item": pairs[:, 1], "rating": 5}).to_csv(raw, index=False)
    assert main(["prepare", str(raw), str(tmp_path / "small"), "--k-core", "3"]) == 0
    assert main(["info", str(tmp_path / "small")]) == 0
    out = capfd.readouterr().out
    assert "30" in out
    assert "no image_feat.npy" in words(out)


def test_prepare_without_header_and_with_features(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pairs = np.argwhere(np.random.default_rng(0).random((30, 20)) < 0.6)
    raw, array, ids = tmp_path / "raw.csv", tmp_path / "text.npy", tmp_path / "ids.txt"
    pd.DataFrame(pairs).to_csv(raw, index=False, header=False)
    np.save(array, np.arange(40, dtype=np.float32).reshape(20, 2))
    ids.write_text("".join(f"{item}\n" for item in range(20)))
    command = ["prepare", str(raw), str(tmp_path / "small"), "--k-core", "3", "--no-header"]
    assert main([*command, "--text-features", str(array), str(ids)]) == 0
    items = pd.read_csv(tmp_path / "small" / "item_map.tsv", sep="\t")["raw"]
    np.testing.assert_array_equal(np.load(tmp_path / "small" / "text_feat.npy")[:, 0], 2 * items)
    code = main([*command, "--overwrite", "--text-features", "nowhere.npy", str(ids)])
    assert_one_sentence(code, capfd.readouterr(), "nowhere")


COMMANDS = [[], ["train"], ["sweep"], ["evaluate"], ["recommend"], ["prepare"], ["info"], ["models"]]


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--help"]) == 0
    assert "Usage" in capfd.readouterr().out


# --- bad input --------------------------------------------------------------------------------------------------------


def spoil_nan(directory: Path) -> None:
    table = np.load(directory / "image_feat.npy")
    table[2, 3] = np.nan
    np.save(directory / "image_feat.npy", table)


def spoil_truncated(directory: Path) -> None:
    file = directory / "text_feat.npy"
    file.write_bytes(file.read_bytes()[:-20])


def replaced(row: int, value: tuple[Any, ...]) -> Callable[[Path], Path]:
    return lambda directory: write(directory, [value if i == row else r for i, r in enumerate(ROWS)])


BAD_DATA: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing directory": (shutil.rmtree, "does not exist"),
    "missing file": (lambda d: (d / "data.inter").unlink(), "holds no .inter file"),
    "wrong column": (lambda d: write(d, header="userID\tproduct\tx_label\n"), "no itemID column among"),
    "negative id": (replaced(3, (1, -1, 0)), "line 5: itemID -1 is negative"),
    "huge id": (replaced(3, (1, 10**12, 0)), "line 5: itemID 1000000000000 is above"),
    "id beyond the features": (replaced(5, (1, 9, 2)), "has 4 rows and the dataset 10 items"),
    "id that is no number": (replaced(3, (1, "x", 0)), "line 5: itemID is 'x'"),
    "NaN feature": (spoil_nan, "row 2, column 3 is NaN"),
    "feature rows": (lambda d: np.save(d / "image_feat.npy", np.zeros((3, 5))), "has 3 rows and the dataset 4 items"),
    "empty split": (lambda d: write(d, [r for r in ROWS if r[2] != 1]), "the valid split is empty"),
    "truncated npy": (spoil_truncated, "is damaged or not a plain .npy array"),
    "missing features": (lambda d: [(d / f"{m}_feat.npy").unlink() for m in ("image", "text")], "features"),
}

BAD_OPTIONS: dict[str, tuple[list[str], str]] = {
    "unknown option": (["--alpha3", "1"], "no option '--alpha3' (did you mean --alpha1 or --alpha2?); see "),
    "unknown model": (["--model", "freedum"], "unknown model 'freedum'; choose one of bm3, dragon,"),
    "unknown --set key": (["--set", "droput=0.1"], "has no hyper-parameter 'droput'; choose among"),
    "--set without value": (["--set", "dropout"], "is not of the form key=value"),
    "badly typed --set value": (["--set", "embedding_dim=wide"], "embedding_dim is 'wide'; it must be a whole number"),
    "badly typed option": (["--alpha1", "big"], "--alpha1"),
    "option without value": (["--alpha1"], "--alpha1"),
    "unknown optimizer": (["--optimizer", "adamm"], "unknown optimizer 'adamm'; choose one of"),
    "unknown optimizer argument": (["--optimizer-arg", "beta=1"], "adam has no argument 'beta'; choose among b1, b2"),
    "badly typed optimizer argument": (["--optimizer-arg", "b1=high"], "b1"),
    "alpha of zero": (["--alpha1", "0"], "alpha1 is 0.0; it must be a positive number"),
    "negative alpha": (["--alpha2", "-0.1"], "alpha2 is -0.1; it must be a positive number"),
    "interval of zero": (["--interval", "0"], "interval is 0"),
    "learning rate of NaN": (["--learning-rate", "nan"], "learning_rate is nan"),
    "no epochs": (["--epochs", "0"], "epochs is 0"),
    "negative seed": (["--seed", "-1"], "seed is -1"),
    "unknown metric": (["--metric", "recall@7"], "unknown metric 'recall@7'; choose one of recall@5,"),
    "mirror and replay": (["--mirror", "--replay"], "exclude each other"),
    "unknown flat-minima method": (
        ["--flat-minima", "sharp"],
        "unknown flat-minima method 'sharp'; choose one of mirror, sam, ssam-f, ssam-d.",
    ),
    "unknown flat-minima argument": (
        ["--flat-minima", "ssam-f", "--flat-minima-arg", "samples=3"],
        "ssam-f has no argument 'samples'; choose among rho, sparsity, refresh_epochs, fisher_samples, seed.",
    ),
    "flat-minima argument out of range": (
        ["--flat-minima", "ssam-d", "--flat-minima-arg", "sparsity=1.5"],
        "`sparsity` must be a Python number from 0 to below 1, not 1.5",
    ),
    "flat-minima argument of another method": (
        ["--flat-minima-arg", "rho=0.1"],
        "mirror training takes no flat-minima argument 'rho'; leave it out.",
    ),
    "unknown method": (
        ["--method", "miror"],
        "unknown method 'miror'; choose one of mirror, mirror-ascent, plain, replay, sam, ssam-f,",
    ),
    "near method": (["--method", "reply"], "(did you mean replay?)"),
    "two methods": (["--method", "plain", "--mirror"], "--method plain and --mirror exclude each other; leave one"),
    "two other methods": (
        ["--method", "sam", "--flat-minima", "ssam-d"],
        "--method sam and --flat-minima ssam-d exclude",
    ),
    "two spellings of an argument": (
        ["--method", "sam", "--method-arg", "rho=1", "--flat-minima-arg", "rho=2"],
        "--method-arg rho is given twice",
    ),
    "flat minima and mirror": (["--flat-minima", "sam", "--mirror"], "--mirror and --flat-minima sam exclude"),
    "flat minima and no mirror": (["--flat-minima", "ssam-f", "--no-mirror"], "exclude each other"),
    "flat minima and replay": (["--flat-minima", "ssam-d", "--replay"], "exclude each other"),
    "unexpected argument": (["surplus"], "surplus"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data(case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    spoil, part = BAD_DATA[case]
    data = write(tmp_path / "data")
    spoil(data)
    code = main(["train", *MODEL, "--data", str(data), "--out", str(tmp_path / "run")])
    assert_one_sentence(code, capfd.readouterr(), part)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_option(case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options, part = BAD_OPTIONS[case]
    code = main(overriding(["train", *MODEL, "--data", "demo", "--out", str(tmp_path / "run")], options))
    assert_one_sentence(code, capfd.readouterr(), part)
    assert not (tmp_path / "run").exists()


def test_missing_option_and_unknown_command(capfd: pytest.CaptureFixture[str]) -> None:
    assert_one_sentence(main(["train", "--data", "demo"]), capfd.readouterr(), "--model")
    assert_one_sentence(
        main(["trian"]), capfd.readouterr(), "choose one of train, sweep, evaluate, recommend, compare,"
    )


def test_unwritable_output(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    below = str(tmp_path / "file" / "run")
    code = main(["train", *MODEL, "--data", "demo", "--out", below])
    assert_one_sentence(code, capfd.readouterr(), "cannot be written")
    code = main(["recommend", str(run), "--output", f"{below}.csv"])
    assert_one_sentence(code, capfd.readouterr(), "cannot be written")
    code = main(["recommend", str(run), "--output", str(tmp_path / "lists.xlsx")])
    assert_one_sentence(code, capfd.readouterr(), "ends neither in .csv nor in .parquet")


@pytest.mark.parametrize("content", ["0\n600\n", "0\n-1\n", "a\n", "", None])
def test_bad_users_file(run: Path, tmp_path: Path, content: str | None, capfd: pytest.CaptureFixture[str]) -> None:
    users = tmp_path / "users.txt"
    if content is not None:
        users.write_text(content)
    code = main(["recommend", str(run), "--users", str(users), "--output", str(tmp_path / "lists.csv")])
    assert_one_sentence(code, capfd.readouterr(), str(users))


def test_bad_run(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert_one_sentence(main(["evaluate", str(tmp_path)]), capfd.readouterr(), "holds no run")
    copy = shutil.copytree(run, tmp_path / "copy")
    (copy / "config.yaml").write_text("model: [")
    assert_one_sentence(main(["evaluate", str(copy)]), capfd.readouterr(), "config.yaml")
    (copy / "config.yaml").write_text("model: vbpr\n")
    assert_one_sentence(main(["evaluate", str(copy)]), capfd.readouterr(), "config.yaml")


def test_resume_of_a_different_configuration(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = ["train", *MODEL, "--data", "demo", "--epochs", "3", "--out", str(run)]
    assert_one_sentence(main(command), capfd.readouterr(), "already holds a run; add --resume")
    code = main([*command, "--resume", "--alpha2", "0.1"])
    assert_one_sentence(code, capfd.readouterr(), "alpha2 was 0.2 and is 0.1")


def test_resume_on_other_data(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data, out = write(tmp_path / "data"), tmp_path / "run"
    command = ["train", *MODEL, "--data", str(data), "--epochs", "1", "--out", str(out)]
    assert main(command) == 0
    np.save(data / "text_feat.npy", np.ones((4, 5), np.float32))
    capfd.readouterr()
    assert_one_sentence(main([*command, "--resume"]), capfd.readouterr(), "is not what")
    assert_one_sentence(main(["evaluate", str(out)]), capfd.readouterr(), "is not the data of")


def test_damaged_checkpoint(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    for path in (copy / "checkpoint").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    command = ["train", *MODEL, "--data", "demo", "--epochs", "5", "--out", str(copy), "--resume"]
    assert_one_sentence(main(command), capfd.readouterr(), "is damaged; delete it")
    assert_one_sentence(main(["evaluate", str(copy)]), capfd.readouterr(), "is damaged; delete it")


# --- evaluate and recommend -------------------------------------------------------------------------------------------


def test_recommend_counts_what_it_wrote(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    output, users = tmp_path / "lists.csv", tmp_path / "users.txt"
    command = ["recommend", str(run), "--output", str(output)]
    assert main([*command, "--top-k", "2"]) == 0
    assert capfd.readouterr().out == f"{output}: 600 users, 2 items each.\n"
    users.write_text("5\n")
    assert main([*command, "--top-k", "1000", "--users", str(users)]) == 0
    assert capfd.readouterr().out == f"{output}: 1 user, 388 items each, fewer than the 1000 asked for.\n"


def test_where_a_table_cannot_go(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "directory.csv").mkdir()
    (tmp_path / "file").write_text("")
    users = tmp_path / "users.csv"
    users.write_text("1\n")
    for output, part in (
        ("directory.csv", "is a directory; give a file in it"),
        ("file/lists.csv", "cannot be written"),
        ("lists", "ends neither in .csv nor in .parquet"),
        ("users.csv", "is the file of --users"),
    ):
        command = ["recommend", str(run), "--users", str(users), "--output", str(tmp_path / output)]
        assert_one_sentence(main(command), capfd.readouterr(), part)
    code = main(["evaluate", str(run), "--per-user", str(tmp_path / "directory.csv")])
    assert_one_sentence(code, capfd.readouterr(), "--per-user")
    assert users.read_text() == "1\n"


def test_what_is_no_run(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    for place, part in (("nowhere", "does not exist"), ("file", "is a file"), ("file/x", "does not exist")):
        assert_one_sentence(main(["evaluate", str(tmp_path / place)]), capfd.readouterr(), part)
    unfinished = shutil.copytree(run, tmp_path / "unfinished")
    (unfinished / "result.json").unlink()
    assert main(["evaluate", str(unfinished)]) == 0
    assert "its training is not finished" in capfd.readouterr().out


# --- what is said of a training ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["vbpr", "freedom"])
def test_dry_run_trains_and_writes_nothing(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    data = write(tmp_path / "data")
    before = sorted(tmp_path.rglob("*"))
    command = ["train", "--model", model, "--data", str(data), "--dry-run", "--set", "embedding_dim=2"]
    if model == "freedom":
        command += ["--set", "knn_k=2"]
    assert main(command) == 0
    captured = capfd.readouterr()
    assert captured.err == ""
    for part in ("nothing was trained", "3 users, 4 items", "5 train, 2 valid, 2 test", "batches per epoch", "(free)"):
        assert part in words(captured.out)
    assert sorted(tmp_path.rglob("*")) == before


def test_dry_run_refuses_what_training_refuses(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = ["train", *MODEL, "--dry-run", "--data", "demo", "--out"]
    assert_one_sentence(main([*command, str(run)]), capfd.readouterr(), "already holds a run; add --resume")
    code = main([*command, str(tmp_path / "none"), "--resume"])
    assert_one_sentence(code, capfd.readouterr(), "holds no run")
    (tmp_path / "file").write_text("")
    assert_one_sentence(main([*command, str(tmp_path / "file" / "x")]), capfd.readouterr(), "cannot be written")
    data = write(tmp_path / "data")
    for modality in ("image", "text"):
        (data / f"{modality}_feat.npy").unlink()
    code = main(["train", *MODEL, "--dry-run", "--data", str(data)])
    assert_one_sentence(code, capfd.readouterr(), "features")
    assert main([*command, str(run), "--resume"]) == 0
    assert "would be gone on with" in capfd.readouterr().out
