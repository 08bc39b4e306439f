"""`kvloom ask`: answers equal transformers', the second reuses the file, wrong files are said."""

from __future__ import annotations

import re
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvloom.cli.ask import MAX_FILE_BYTES, decode_text
from kvloom.errors import RequestError
from tests.cli.conftest import KVLOOM, SMALL, Invoke, assert_error, run_kvloom

TEXT = "def add(left, right):\n    return left + right  # naïve\n" * 8
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f]")


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "code.py"
    path.write_text(TEXT, encoding="utf-8")
    return str(path)


def greedy_answer(model: str, name: str, question: str, num_tokens: int) -> str:
    """What plain transformers answers."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    content = f"Here is {name}:\n\n{TEXT.rstrip()}\n\n{question}"
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    with torch.inference_mode():
        output = AutoModelForCausalLM.from_pretrained(model).generate(
            **ids, max_new_tokens=num_tokens, do_sample=False
        )
    answer: str = tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    return answer


def cells(stderr: str, question: str) -> list[str]:
    """The table's row of a question, behind the question itself."""
    row = next(line for line in stderr.splitlines() if line.startswith(f"{question} "))
    return row.removeprefix(question).split()


def test_answers_are_those_of_transformers_and_the_file_is_read_once(
    invoke: Invoke, tiny_model: str, file: str
) -> None:
    questions = ["What is it?", "Which names occur?"]
    result = invoke("ask", file, *questions, "-m", tiny_model, "--max-tokens", "12", *SMALL)
    assert result.exit_code == 0, result.output
    expected = [greedy_answer(tiny_model, "code.py", question, 12) for question in questions]
    assert result.stdout == "".join(f"{answer}\n" for answer in expected)
    first, second = (cells(result.stderr, question) for question in questions)
    assert first[1] == "0"
    assert int(second[1]) > 100
    assert int(second[0]) < 40
    assert not CONTROL.search(result.stdout + result.stderr)


def test_without_prefix_caching_the_file_is_read_again(
    invoke: Invoke, tiny_model: str, file: str
) -> None:
    options = ("-m", tiny_model, "--max-tokens", "2", "--no-prefix-caching", *SMALL)
    result = invoke("ask", file, "One?", "Two?", *options)
    assert result.exit_code == 0, result.output
    assert cells(result.stderr, "Two?")[1] == "0"


def test_standard_input_is_a_file_too(invoke: Invoke, tiny_model: str, file: str) -> None:
    options = ("-m", tiny_model, "--max-tokens", "3", *SMALL)
    result = invoke("ask", "-", "What?", *options, text=TEXT)
    assert result.exit_code == 0, result.output
    assert result.stdout == greedy_answer(tiny_model, "the text", "What?", 3) + "\n"


def test_a_model_without_chat_template_is_asked_in_plain_text(
    invoke: Invoke, plain_model: str
) -> None:
    options = ("-m", plain_model, "--max-tokens", "3", *SMALL)
    result = invoke("ask", "-", "What?", *options, text="short")
    assert result.exit_code == 0, result.output
    assert "no chat template" in result.stderr


def test_a_file_that_does_not_fit_is_said_with_its_tokens_and_the_limit(
    invoke: Invoke, plain_model: str, file: str
) -> None:
    result = invoke("ask", file, "What?", "-m", plain_model, *SMALL)
    assert result.exit_code == 1
    assert result.stdout == ""
    error = result.stderr.splitlines()[-1]
    assert re.match(r"Error: code.py is too long. The prompt has \d+ tokens and at most 127", error)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"\x7fELF\x02\x00\x00", "binary"),
        ("Straße".encode("latin-1"), "no UTF-8 text (byte 4 is 0xdf)"),
        (b"", "empty"),
        (b" \n\t\n", "empty"),
        (b"\xef\xbb\xbf", "empty"),
    ],
)
def test_a_file_that_is_no_text_is_refused_before_the_model_is_loaded(
    invoke: Invoke, tmp_path: Path, content: bytes, part: str
) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    assert_error(invoke("ask", str(path), "What?", "-m", "no/model"), 1, part)
    assert_error(invoke("ask", "-", "What?", "-m", "no/model", text=content), 1, part)


def test_a_file_that_cannot_be_read_is_said(invoke: Invoke, tmp_path: Path) -> None:
    assert_error(invoke("ask", str(tmp_path / "none"), "Q?"), 1, "No such file")
    assert_error(invoke("ask", str(tmp_path), "Q?"), 1, "directory")
    assert_error(invoke("ask", "a\0b", "Q?"), 1, "cannot be read")


def test_a_huge_file_is_refused() -> None:
    with pytest.raises(RequestError, match="larger than"):
        decode_text("big", b"a" * (MAX_FILE_BYTES + 1))


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ((), "FILE"),
        (("file",), "QUESTION"),
        (("file", "  "), "empty"),
        (("file", "Q?", "--threads", "0"), "--threads"),
        (("file", "Q?", "--threads", "two"), "--threads"),
        (("file", "Q?", "--kv-memory", "garbage"), "--kv-memory"),
        (("file", "Q?", "--kv-memory", "-1"), "--kv-memory"),
        (("file", "Q?", "--max-model-len", "0"), "--max-model-len"),
        (("file", "Q?", "--dtype", "int4"), "--dtype"),
        (("file", "Q?", "--max-tokens", "0"), "--max-tokens"),
        (("file", "Q?", "--temperature", "-1"), "--temperature"),
        (("file", "Q?", "--temperature", "nan"), "--temperature"),
        (("file", "Q?", "--temprature", "1"), "--temprature"),
    ],
)
def test_wrong_usage_is_exit_code_2(invoke: Invoke, arguments: tuple[str, ...], part: str) -> None:
    assert_error(invoke("ask", *arguments), 2, part)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (("-m", "./nowhere.gguf"), "does not exist"),
        (("-m", "weights.bin"), "pickled"),
        (("-m", " "), "names no model"),
        (("-m", "nobody/nothing"), "nobody/nothing"),
        (("--kv-memory", "900TiB"), "more than"),
        (("--top-p", "0"), "top_p"),
    ],
)
def test_wrong_models_and_values_are_one_line(
    invoke: Invoke, file: str, options: tuple[str, ...], part: str
) -> None:
    assert_error(invoke("ask", file, "Q?", *options), 1, part)


def test_kv_memory_that_holds_nothing_is_said(invoke: Invoke, tiny_model: str, file: str) -> None:
    result = invoke("ask", file, "Q?", "-m", tiny_model, "--kv-memory", "10")
    assert_error(result, 1, "10 bytes", "raise kv_memory")


def test_a_process_writes_answers_only_to_standard_output(tiny_model: str, file: str) -> None:
    done = run_kvloom("ask", file, "What?", "-m", tiny_model, "--max-tokens", "5", *SMALL)
    assert done.returncode == 0, done.stderr
    assert done.stdout == greedy_answer(tiny_model, "code.py", "What?", 5) + "\n"
    assert "computed" in done.stderr
    assert "\x1b" not in done.stdout + done.stderr


def test_a_reader_that_leaves_is_no_traceback(tiny_model: str, file: str) -> None:
    command = [*KVLOOM, "ask", file, "What?", "-m", tiny_model, "--max-tokens", "3000", *SMALL]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(1)
        process.stdout.close()
        stderr = process.stderr.read().decode()
        assert process.wait(timeout=120) == 1
    assert "Traceback" not in stderr
    assert "BrokenPipe" not in stderr


def test_ctrl_c_ends_with_130_and_no_traceback(tiny_model: str, file: str) -> None:
    command = [*KVLOOM, "ask", file, "What?", "-m", tiny_model, "--max-tokens", "3000", *SMALL]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130
    assert b"Traceback" not in stderr
