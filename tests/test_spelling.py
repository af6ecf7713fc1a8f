"""Options of generation without their section."""

import pytest

import depthmix_cli
from checkpoints import save_checkpoint
from depthmix_cli.answering import chat, generate
from depthmix_cli.measuring import evaluate
from depthmix_cli.spelling import spell_out


@pytest.mark.parametrize("command", [generate, chat])
@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (["--max-new-tokens", "3"], ["--generation.max-new-tokens", "3"]),
        (["--max_new_tokens=3"], ["--generation.max-new-tokens=3"]),
        (["--do-sample", "--top-k", "2"], ["--generation.do-sample=true", "--top-k", "2"]),
        (["--do-sample", "false"], ["--generation.do-sample", "false"]),
        (["--do-sample"], ["--generation.do-sample=true"]),
        (["--generation.top-k", "2"], ["--generation.top-k", "2"]),
        (["--no-fast", "--tempalte", "plain"], ["--no-fast", "--tempalte", "plain"]),
        (["--nothing-like-it"], ["--nothing-like-it"]),
        (["--", "--max-new-tokens"], ["--", "--max-new-tokens"]),
        (["--max-new-tokens", "--help"], ["--max-new-tokens", "--help"]),
    ],
)
def test_options_of_generation_get_their_section(given, meant, command):
    assert spell_out(["ask", "RUN", *given], command) == ["ask", "RUN", *meant]


def test_commands_that_generate_nothing_keep_their_arguments():
    for command in (evaluate, None):
        assert spell_out(["x", "--max-new-tokens", "3"], command) == ["x", "--max-new-tokens", "3"]


def test_a_model_answers_with_them_and_an_unknown_one_names_the_nearest(tmp_path, capsys):
    base = str(save_checkpoint(tmp_path / "base"))
    answers = []
    for flag in ("--max-new-tokens", "--generation.max-new-tokens"):
        assert depthmix_cli.main(["generate", base, "1 + 1 =", flag, "3"]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]
    assert depthmix_cli.main(["generate", base, "1 + 1 =", "--temprature", "0.7"]) == 1
    shown = capsys.readouterr().err
    assert shown == "depthmix: `--temprature` is no option; did you mean `--temperature`?\n"
