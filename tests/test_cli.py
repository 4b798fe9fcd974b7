import pytest
import yaml

from sane_ray.cli import parse, run_job
from sane_ray.config import PRESETS, PrepareJob, PretrainJob
from sane_ray.errors import InputError


def parsed(*arguments):
    return parse(PretrainJob, presets=PRESETS, argv=arguments)


def test_without_arguments_the_first_preset_counts():
    job, dry_run = parsed()
    assert job == PRESETS["digits"]()
    assert dry_run is False


def test_flags_win_over_yaml_and_yaml_over_the_preset(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text("pretraining: {learning_rate: 0.5, epochs: 7}\naugmentation: {view_2: canonical}\n")
    job, _ = parsed("--preset", "cnn", "--config", str(path), "--pretraining.epochs", "9")
    assert (job.pretraining.learning_rate, job.pretraining.epochs) == (0.5, 9)
    assert (job.augmentation.view_2, job.autoencoder.d_model) == ("canonical", 1024)


def test_dashes_and_underscores_mean_the_same():
    job, dry_run = parsed("--run-name", "a-b", "--dry-run", "--pretraining.learning-rate=1e-3")
    assert (job.run_name, dry_run, job.pretraining.learning_rate) == ("a-b", True, 1e-3)


def test_lists_are_written_as_in_yaml():
    job, _ = parsed("--zoo.checkpoint_epochs", "[0,3]", "--autoencoder.max_positions", "[9,8,7]")
    assert (job.zoo.checkpoint_epochs, job.autoencoder.max_positions) == ([0, 3], [9, 8, 7])


def test_a_printed_config_read_back_is_the_same(capsys, tmp_path):
    with pytest.raises(SystemExit) as ended:
        parsed("--preset", "resnet18", "--pretraining.seed", "5", "--print_config")
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["autoencoder"]["d_model"] == 2048
    path = tmp_path / "printed.yaml"
    path.write_text(printed)
    job, _ = parsed("--config", str(path))
    assert job == parsed("--preset", "resnet18", "--pretraining.seed", "5")[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--pretraining.learning_rat", "1"],
            r"no config field is called 'pretraining\.learning_rat'; did you mean pr",
        ),
        (["--pretraining.learning-rat=1"], r"no config field is called 'pretraining\.learning_rat'; did you mean pr"),
        (["--pretraining.epochs", "many"], r"^config field pretraining\.epochs: expected a whole number, got many$"),
        (["--pretraining.learning_rate", "x"], r"^config field pretraining\.learning_rate: expected a number, got x$"),
        (["--tokens.align_biases", "x"], r"no config field is called 'tokens\.align_biases' \("),
        (
            ["--cluster.num_workers", "x"],
            r"^config field cluster\.num_workers: expected a whole number or a list, such as \[1, 2\], got x$",
        ),
        (["--zoo.checkpoint_epochs", "5"], r"zoo\.checkpoint_epochs: expected a list, such as \[1, 2\], got 5$"),
        (["--run-name"], r"^--run-name needs a value$"),
        (["--pretraining", "3"], r"pretraining is 3: it is a section, .*--pretraining\.FIELD VALUE"),
        (["--pretraining.epochs", "0"], r"config field pretraining\.epochs is 0: must be at least 1"),
        (["--loss.reconstruction", "all"], r"loss\.reconstruction.*one of 'signal', 'elements'.*all"),
        (["--preset", "gpt"], r"--preset is 'gpt': must be one of digits, cnn, resnet18"),
        (["--config", "nowhere.yaml"], r"^--config .*nowhere\.yaml does not exist$"),
        (["stray"], r"stray"),
    ],
)
def test_bad_arguments_are_told_in_one_sentence(arguments, message):
    with pytest.raises(InputError, match=message) as refusal:
        parsed(*arguments)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("--nosuch", None),
        ("--pretraining.nosuch", None),
        ("--runname", "run_name"),
        ("--learning-rate", "pretraining.learning_rate or zoo.learning_rates"),
        ("--pretraining.learning-rates", "pretraining.learning_rate"),
        ("--clustr.num-workers", "cluster.num_workers"),
    ],
)
def test_an_unknown_flag_is_likened_only_to_what_is_spelled_much_like_it(name: str, near: str | None):
    with pytest.raises(InputError) as refusal:
        parsed(name, "1")
    hint = f"; did you mean {near}?" if near else ""
    called = name[2:].replace("-", "_")
    assert str(refusal.value) == f"no config field is called {called!r}{hint} (`--help` lists them all)"


def test_a_switch_is_told_in_words():
    with pytest.raises(InputError, match=r"^config field audit: expected true or false, got maybe$"):
        parse(PrepareJob, argv=["--audit", "maybe"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "pretraining: {epoch: 3}",
            r"no config field is called 'pretraining\.epoch'; did you mean pretraining\.epochs",
        ),
        ("pretrainin: {epochs: 3}", r"no config field is called 'pretrainin.*did you mean pretraining"),
        ("pretraining: {epochs: x}", r"pretraining\.epochs: expected a whole number, got x"),
        ("a: [", r"(?i)config"),
    ],
)
def test_a_bad_file_is_told_in_one_sentence(tmp_path, content, message):
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        parsed("--config", str(path))


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as ended:
        parse(PretrainJob, presets=PRESETS, examples="examples:\n  one line\n  another", argv=["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "--pretraining.learning_rate" in text and "Peak of the OneCycle schedule" in text
    assert "`cnn`: The published small-CNN setting" in " ".join(text.split())
    assert "examples:\n  one line\n  another" in text


def test_bad_input_ends_with_status_2_and_other_errors_keep_their_traceback(capsys):
    def refuse(job, dry_run):
        raise InputError("the file is empty: make it fuller")

    def fail(job, dry_run):
        raise ZeroDivisionError("a defect")

    def interrupt(job, dry_run):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        run_job(PretrainJob, refuse, argv=[])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: the file is empty: make it fuller\n"
    with pytest.raises(ZeroDivisionError):
        run_job(PretrainJob, fail, argv=[])
    with pytest.raises(SystemExit) as ended:
        run_job(PretrainJob, interrupt, argv=[])
    assert ended.value.code == 130


@pytest.mark.parametrize(
    ("arguments", "audit"),
    [
        ([], False),
        (["--audit"], True),
        (["--audit", "--dry-run"], True),
        (["--audit", "false"], False),
        (["--audit=true"], True),
    ],
)
def test_a_field_that_is_true_or_false_is_a_switch(arguments: list[str], audit: bool):
    assert parse(PrepareJob, argv=arguments)[0].audit is audit
